"""From ranks of right tokens to figures: accuracies, and what a tree of guesses would accept."""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

TREES = (16, 64)  # nodes that tokens per step are estimated for
_MAX_RANK = 32


def head_accuracies(ranks: NDArray[np.int64]) -> dict[str, float]:
    """Top-1, top-5 and top-10 of each head, in %.

    Args:
        ranks: [P, K], -1 where a head has no label.
    """
    figures = {}
    for head in range(ranks.shape[1]):
        known = ranks[ranks[:, head] >= 0, head]
        for top in (1, 5, 10):
            hits = float((known < top).mean()) if len(known) else 0.0
            figures[f"head{head}_top{top}"] = 100 * hits
    return figures


def tokens_per_step(ranks: NDArray[np.int64], num_nodes: int) -> float:
    """Tokens that a step would emit with the best tree for exactly these positions.

    Nodes are paths of ranks; a path's worth is the share of the positions where all its ranks are
    right. A prefix is right at least as often as the path, so the most frequent paths form a tree.
    It is an estimate: decoding stops at other positions than text has, and the tree is fitted here.
    """
    whole = ranks[(ranks >= 0).all(1)]
    if not len(whole):
        return 1.0
    counts: Counter[tuple[int, ...]] = Counter()
    for row in whole.tolist():
        for depth, rank in enumerate(row, 1):
            if rank >= _MAX_RANK:
                break
            counts[tuple(row[:depth])] += 1
    best = sorted(counts.values(), reverse=True)[: num_nodes - 1]
    return 1.0 + sum(best) / len(whole)


def compute_metrics(prediction: Any) -> dict[str, float]:  # noqa: ANN401 - EvalPrediction
    """For the Trainer: accuracies and estimates from the ranks that the model returned."""
    ranks = np.asarray(prediction.predictions)
    steps = {f"tokens_per_step_{nodes}": tokens_per_step(ranks, nodes) for nodes in TREES}
    return head_accuracies(ranks) | steps
