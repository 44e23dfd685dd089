"""The tree of N nodes that accepts most.

The value of a node is the share of steps whose tokens run through it: the joint share of its whole
path, since products of the heads' own shares under-rate paths (where head 0 is right, the others
are right more often). A step emits 1 + the sum of the values of its nodes. No node is worth more
than its parent, so the N best nodes by value hang together, and no other N nodes sum to more:
there is no need to grow greedily, and the best tree of n < N nodes is the beginning of the list.

Steps do not begin everywhere alike: most begin after a token that the heads did not guess. So the
search is repeated with the places where steps with the trees that it found begin.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from medusa_ext.calibration.ranks import Ranks, walk
from medusa_ext.trees import Paths

# Rare paths: so many positions' worth of what shorter contexts say are mixed into each count.
STRENGTH = 8.0
_ROUNDS = 3

Floats = NDArray[np.float64]


def best_paths(
    ranks: Ranks, num_paths: int, *, weights: Floats | None = None, strength: float = STRENGTH
) -> tuple[Paths, list[float]]:
    """The most valuable paths.

    Args:
        ranks: that the model's own tokens had.
        num_paths: to find; there are fewer where nothing else was ever right.
        weights: [P] of the rows, how often a step begins there; None: equal.
        strength: of the smoothing; 0 counts whole paths only.

    Returns:
        Paths, the most valuable first and parents before children, and their values.
    """
    shares = _shares(ranks, weights, strength)
    paths: Paths = []
    values: list[float] = []
    # Ties go to the shorter path, so that a parent comes before a child of the same value.
    heap = [(-1.0, 0, ())]
    while heap and len(paths) < num_paths + 1:
        negative, depth, path = heapq.heappop(heap)
        paths.append(list(path))
        values.append(-negative)
        if depth < ranks.num_heads:
            share = shares(0, path)
            for rank in np.flatnonzero(share).tolist():
                heapq.heappush(heap, (negative * float(share[rank]), depth + 1, (*path, rank)))
    return paths[1:], values[1:]  # the first is the root


def search(ranks: Ranks, num_paths: int, nodes: Sequence[int]) -> tuple[Paths, list[float]]:
    """The most valuable paths where steps begin, for trees of about these numbers of nodes.

    Args:
        ranks: that the model's own tokens had.
        num_paths: to find.
        nodes: of the trees that are likely to be used, the root counted.

    Returns:
        As `best_paths`.
    """
    paths, values = best_paths(ranks, num_paths)
    for _ in range(_ROUNDS):
        weights = np.zeros(len(ranks.ranks))
        for count in nodes:
            weights += walk(ranks, paths[: count - 1]).visited
        paths, values = best_paths(ranks, num_paths, weights=weights / len(nodes))
    return paths, values


def _shares(
    ranks: Ranks, weights: Floats | None, strength: float
) -> Callable[[int, tuple[int, ...]], Floats]:
    """`shares(head, context)` [num_ranks]: of each rank at the head that follows the context.

    `context` are the ranks of the heads from `head` on. As in an n-gram model a context borrows
    from the one without its first rank; heads' own denominators throughout.
    """
    columns = ranks.columns
    weight = np.ones(len(ranks.ranks)) if weights is None else weights

    @cache
    def rows(head: int, context: tuple[int, ...]) -> NDArray[np.intp]:
        if not context:
            return np.flatnonzero(weight)
        before = rows(head, context[:-1])
        found: NDArray[np.intp] = before[columns[head + len(context) - 1, before] == context[-1]]
        return found

    @cache
    def shares(head: int, context: tuple[int, ...]) -> Floats:
        found = rows(head, context)
        column = columns[head + len(context), found]
        valid = column >= 0
        hits = np.bincount(
            column[valid], weights=weight[found][valid], minlength=ranks.num_ranks + 1
        )
        total = hits.sum()
        if not context or strength == 0:
            return hits[:-1] / total if total else np.zeros(ranks.num_ranks)
        borrowed = strength * shares(head + 1, context[1:])
        smoothed: Floats = (hits[:-1] + borrowed) / (total + strength)
        return smoothed

    return shares
