"""From ranks to the content of calibration.json: what to use, and what it will do.

Each half of the texts says what trees and weights that the other half chose will do; those that all
of them choose are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medusa_ext import _core
from medusa_ext.calibration.file import DYNAMIC, LOOKUP, STATIC
from medusa_ext.calibration.guesses import Weights, compiled, fit, short
from medusa_ext.calibration.ranks import Ranks, Walk, joined, walk, walk_dynamic
from medusa_ext.calibration.tree_search import search
from medusa_ext.loading import LoadError
from medusa_ext.loading.ngrams import Ngrams
from medusa_ext.trees import MAX_NODES, Paths

_STORED_RANKS = 64
_FEW_TOKENS = 5000
_KINDS = (STATIC, DYNAMIC, LOOKUP)

Content = dict[str, Any]


def statistics(
    ranks: Ranks, ngrams: Ngrams | None, nodes: Sequence[int], sizes: Sequence[int]
) -> Content:
    """Accuracies, trees and weights, and what they will do.

    Args:
        ranks: of all texts.
        ngrams: of the heads.
        nodes: to predict.
        sizes: of the trees that are likely to be used, the root counted.

    Raises:
        LoadError: there are not two texts with answers of two tokens.
    """
    first, second = ranks.halves()
    if not (len(first.ranks) and len(second.ranks)):
        raise LoadError(
            f"the data hold {len(set(ranks.texts))} texts; wanted at least 2 with answers of 2 "
            "tokens or more: one to choose trees, one to predict what they do"
        )
    if ranks.num_tokens < _FEW_TOKENS:
        warnings.warn(
            f"the data hold {ranks.num_tokens} tokens that the model wrote; with fewer than "
            f"{_FEW_TOKENS} the tree and what it is said to do are rough",
            stacklevel=4,
        )
    known = compiled(ngrams)
    chosen, by_first, by_second = (
        _Chosen.of(part, sizes, known) for part in (ranks, first, second)
    )
    crossed = [(by_first, second), (by_second, first)]
    categories = [(by_first, second.by_category()), (by_second, first.by_category())]
    nodes = [count for count in nodes if count <= len(chosen.paths) + 1]
    by_category = {}
    for name, part in ranks.by_category().items():
        own = [(found, parts[name]) for found, parts in categories if name in parts]
        by_category[name] = accuracies(part) | {
            "tokens_per_step" if kind == STATIC else kind: {
                str(count): _predicted(own, count, kind)["tokens_per_step"] for count in nodes
            }
            for kind in _KINDS
        }
    return {
        "answers": len(ranks.categories),
        **accuracies(ranks),
        "tree": chosen.paths,
        "values": [short(value) for value in chosen.values],
        "guesses": {kind: found.content() for kind, found in chosen.weights.items()}
        | {"ngrams": None if ngrams is None else ngrams.digest},
        "predicted": [
            {"nodes": count}
            | _predicted(crossed, count, STATIC)
            | {"chosen_on": short(chosen.walk(ranks, count, STATIC).tokens_per_step)}
            | {kind: _predicted(crossed, count, kind) for kind in chosen.weights}
            for count in nodes
        ],
        "by_category": by_category,
    }


@dataclass(frozen=True)
class _Chosen:
    """What some texts chose: paths and their values, weights of dynamic trees by their kind."""

    paths: Paths
    values: list[float]
    weights: dict[str, Weights]
    models: dict[str, _core.GuessModel]  # of the weights

    @staticmethod
    def of(ranks: Ranks, sizes: Sequence[int], ngrams: _core.Ngrams | None) -> _Chosen:
        weights = {
            kind: fit(ranks.answers, ngrams, with_lookup=kind == LOOKUP)
            for kind in (DYNAMIC, LOOKUP)
        }
        models = {kind: found.model(ngrams) for kind, found in weights.items()}
        return _Chosen(*search(ranks, MAX_NODES - 1, sizes), weights, models)

    def walk(self, ranks: Ranks, nodes: int, kind: str) -> Walk:
        """Through other texts."""
        if kind == STATIC:
            return walk(ranks, self.paths[: nodes - 1])
        return walk_dynamic(ranks, self.models[kind], nodes)


def _predicted(crossed: Sequence[tuple[_Chosen, Ranks]], nodes: int, kind: str) -> Content:
    """What texts take with what others chose."""
    done = joined([chosen.walk(held, nodes, kind) for chosen, held in crossed])
    return {
        "tokens_per_step": short(done.tokens_per_step),
        "error": None if done.error is None else short(done.error),
        "tokens_per_later_step": short(done.tokens_per_later_step),
    }


def accuracies(ranks: Ranks) -> Content:
    """How often heads are right, for the file."""
    shares, counts = ranks.accuracies()
    return {
        "tokens": ranks.num_tokens,
        "heads": [[short(share) for share in row[:_STORED_RANKS]] for row in shares],
        "counts": counts.tolist(),
    }
