"""Where the model's own tokens stood among the candidates of Medusa heads.

The matrix of ranks, and the best candidates themselves, are all that calibration knows of model
and heads: accuracies, the tree and the steps that decoding with any tree takes follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.calibration.guesses import Offered
from medusa_ext.calibration.texts import Text
from medusa_ext.trees import Paths

BEYOND = -1  # the answer ends before the token that the head guesses
SCORE_CHUNK = 512
GUESS_CANDIDATES = _core.GUESS_CANDIDATES

Int = np.intp


@dataclass(frozen=True)
class Ranks:
    """Ranks of the model's own tokens at every place where a step may begin.

    An answer of m tokens has m - 1 rows: in row i its token i is the root of the tree, and head k
    guesses token i + 1 + k.

    Attributes:
        ranks: [P, K] i16; 0 is a head's best candidate, `num_ranks` none of them, BEYOND no token.
        starts: [A + 1]; the rows of answer a are starts[a] to starts[a + 1].
        categories: of the answers; "" where the data name none.
        texts: that the answers stand in.
        num_ranks: candidates that were looked at.
        answers: and the best candidates, of the same rows.
    """

    ranks: NDArray[np.int16]
    starts: NDArray[Int]
    categories: tuple[str, ...]
    texts: tuple[int, ...]
    num_ranks: int
    answers: tuple[Offered, ...]

    @property
    def num_heads(self) -> int:
        """K."""
        return int(self.ranks.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return len(self.ranks) + len(self.categories)

    def choose(self, answers: Sequence[int] | NDArray[Int]) -> Ranks:
        """Return some answers only, in the order given."""
        parts = [np.arange(self.starts[a], self.starts[a + 1]) for a in answers]
        lengths = [len(part) for part in parts]
        rows = np.concatenate([np.empty(0, Int), *parts])
        return Ranks(
            self.ranks[rows],
            np.cumsum([0, *lengths], dtype=Int),
            tuple(self.categories[a] for a in answers),
            tuple(self.texts[a] for a in answers),
            self.num_ranks,
            tuple(self.answers[a] for a in answers),
        )

    def halves(self) -> tuple[Ranks, Ranks]:
        """Return two halves that share no text; the texts of each category take turns.

        A new category begins in the half that has fewer texts.
        """
        turn: dict[str, int] = {}
        side: dict[int, int] = {}
        sizes = [0, 0]
        for text, category in zip(self.texts, self.categories, strict=True):
            if text not in side:
                fewer = int(sizes[1] < sizes[0])
                turn[category] = side[text] = 1 - turn.get(category, 1 - fewer)
                sizes[side[text]] += 1
        parts = ([a for a, text in enumerate(self.texts) if side[text] == half] for half in (0, 1))
        first, second = (self.choose(part) for part in parts)
        return first, second

    def by_category(self) -> dict[str, Ranks]:
        """Return the answers of each named category."""
        names = sorted(set(self.categories) - {""})
        return {
            name: self.choose([a for a, other in enumerate(self.categories) if other == name])
            for name in names
        }

    def accuracies(self) -> tuple[NDArray[np.float64], NDArray[Int]]:
        """How often a candidate is the model's own token.

        Returns:
            Shares [K, num_ranks] of the positions that a head can be judged at, and their number
            [K]: a later head has fewer.
        """
        counted = [column[column >= 0] for column in self.columns]
        hits = np.stack([np.bincount(ranks, minlength=self.num_ranks + 1) for ranks in counted])
        counts = hits.sum(axis=1)
        return hits[:, : self.num_ranks] / np.maximum(counts, 1)[:, None], counts

    @property
    def columns(self) -> NDArray[np.int16]:
        """[K, P], contiguous by head."""
        return np.ascontiguousarray(self.ranks.T)


@dataclass(frozen=True)
class Walk:
    """What decoding these answers takes.

    Attributes:
        answers: with any token.
        visited: [P] bool; the rows at which a step begins.
        texts: [T, 2] tokens of each text's answers, and steps that emit them; the first of an
            answer, which has no tree, emits one.
    """

    answers: int
    visited: NDArray[np.bool_]
    texts: NDArray[Int]

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return int(self.texts[:, 0].sum())

    @property
    def steps(self) -> int:
        """Of all answers."""
        return int(self.texts[:, 1].sum())

    @property
    def tokens_per_step(self) -> float:
        """As `Stats.tokens_per_step` counts them."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_later_step(self) -> float:
        """Without the first step of every answer, which belongs to the prefill."""
        later = self.steps - self.answers
        return (self.tokens - self.answers) / later if later else 0.0

    @property
    def error(self) -> float | None:
        """Of `tokens_per_step`, a ratio of sums over texts: its standard error; None of one."""
        count = len(self.texts)
        if count < 2:
            return None
        off = self.texts[:, 0] - self.tokens_per_step * self.texts[:, 1]
        return float(np.sqrt(count / (count - 1) * (off**2).sum()) / self.steps)


def joined(walks: Sequence[Walk]) -> Walk:
    """Of texts that were walked through apart."""
    return Walk(
        sum(walk.answers for walk in walks),
        np.concatenate([walk.visited for walk in walks]),
        np.concatenate([walk.texts for walk in walks]),
    )


def accepted(ranks: Ranks, paths: Paths) -> NDArray[Int]:
    """Return how many guesses a step with this tree keeps at each row, [P]."""
    nodes = {(): 0} | {tuple(path): 1 + index for index, path in enumerate(paths)}
    # child[node, rank]; the last column stands for BEYOND and is no child, as is num_ranks.
    child = np.full((len(nodes), ranks.num_ranks + 2), -1, Int)
    for path, node in nodes.items():
        if path and path[-1] < ranks.num_ranks:
            child[nodes[path[:-1]], path[-1]] = node
    at = np.zeros(len(ranks.ranks), Int)
    depth = np.zeros(len(ranks.ranks), Int)
    for column in ranks.columns:
        at = np.where(at >= 0, child[at, column], -1)
        depth += at >= 0
    return depth


def walk(ranks: Ranks, paths: Paths) -> Walk:
    """Decode the answers again with a tree, on ranks alone: exactly the steps of an engine."""
    stride = (accepted(ranks, paths) + 1).tolist()
    begun: list[list[int]] = []  # rows of each answer
    for start, end in zip(ranks.starts[:-1].tolist(), ranks.starts[1:].tolist(), strict=True):
        rows, row = [], start
        while row < end:
            rows.append(row - start)
            row += stride[row]
        begun.append(rows)
    return _walk(ranks, begun)


def walk_dynamic(ranks: Ranks, guesses: _core.GuessModel, nodes: int) -> Walk:
    """The same with a tree of so many nodes that each step grows: exactly the steps of an engine.

    An answer that ended by itself is walked as if it had ended for want of room, which its last
    tokens then lack.
    """
    return _walk(ranks, [answer.walk(guesses, nodes) for answer in ranks.answers])


def _walk(ranks: Ranks, begun: Sequence[Sequence[int]]) -> Walk:
    """From the rows of each answer at which steps begin."""
    visited = np.zeros(len(ranks.ranks), bool)
    for start, rows in zip(ranks.starts[:-1], begun, strict=True):
        visited[start + np.asarray(rows, Int)] = True
    _, text = np.unique(ranks.texts, return_inverse=True)
    tokens = np.bincount(text, 1 + np.diff(ranks.starts)).astype(Int)
    steps = np.bincount(text, [1 + len(rows) for rows in begun]).astype(Int)
    return Walk(len(begun), visited, np.column_stack((tokens, steps)))


def collect(
    model: _core.Model,
    texts: Iterable[Text],
    *,
    num_heads: int,
    num_ranks: int,
    hidden_size: int,
    done: Callable[[int], None] = lambda _: None,
) -> Ranks:
    """Run the model and its heads over texts that the model wrote.

    The hidden states, the candidates and their order are, bit for bit, those of decoding at
    temperature 0.

    Args:
        model: with heads.
        texts: tokens below the model's vocabulary, no longer than its context.
        num_heads: K of the model.
        num_ranks: candidates to look at, up to 256.
        hidden_size: d of the model.
        done: called after each text with its tokens.
    """
    parts: list[NDArray[np.int16]] = []
    answers: list[Offered] = []
    starts, categories, origins = [0], [], []
    for origin, text in enumerate(texts):
        tokens = np.asarray(text.tokens, np.int32)
        hidden = np.empty((len(tokens), hidden_size), np.float32)
        _core.score(model, text.tokens, SCORE_CHUNK, None, hidden)
        for start, end in text.answers:
            rows = hidden[start - 1 : end - 2]
            ids = np.empty((num_heads, len(rows), num_ranks), np.int32)
            logits = np.empty(ids.shape, np.float32)
            if len(rows):
                _core.head_candidates(model, rows, ids, logits)
            parts.append(_ranks_of(tokens[start:end], ids))
            best = (ids[..., :GUESS_CANDIDATES].copy(), logits[..., :GUESS_CANDIDATES].copy())
            answers.append(Offered(text.tokens, start, end, *best))
            starts.append(starts[-1] + len(rows))
            categories.append(text.category)
            origins.append(origin)
        done(len(tokens))
    ranks = np.concatenate([np.empty((0, num_heads), np.int16), *parts])
    return Ranks(
        ranks,
        np.array(starts, Int),
        tuple(categories),
        tuple(origins),
        num_ranks,
        tuple(answers),
    )


def _ranks_of(answer: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int16]:
    """Ranks [m - 1, K] of an answer's tokens [m] among candidates ids [K, m - 1, num_ranks]."""
    num_heads, num_rows, num_ranks = ids.shape
    found = np.full((num_rows, num_heads), BEYOND, np.int16)
    for head in range(num_heads):
        own = answer[1 + head :]
        hit = ids[head, : len(own)] == own[:, None]
        found[: len(own), head] = np.where(hit.any(axis=1), hit.argmax(axis=1), num_ranks)
    return found
