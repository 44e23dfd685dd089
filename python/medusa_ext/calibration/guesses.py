"""How much heads, n-grams and the text so far count where each step grows a tree of its own.

A token that may follow a node has the share exp(s) / (exp(rest) + the sum over all that may), with

    s = head * log p_head + ngram * gain + lookup[m]

where p_head is its share of the head's candidates, gain what n-grams say of it after the two tokens
before it (`medusa_ext.loading.ngrams`), and lookup[m] stands where the text said it before, m equal
tokens long. `rest` stands for all other tokens. A node's value, how often a step keeps it, is the
product of the shares on its path; csrc/core/guess_tree.cpp takes the most valuable nodes. The
weights are those that make the model's own tokens most likely (a logistic regression for each
head, by Newton's method), given the tokens before.

Sources: J. Kim et al., Exploring and Improving Drafts in Blockwise Parallel Decoding,
arXiv:2404.09221; Y. Li et al., EAGLE-2, arXiv:2406.16858; A. Saxena, Prompt Lookup Decoding, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.loading.ngrams import Ngrams

NGRAM, AHEAD = _core.LOOKUP_NGRAM, _core.LOOKUP_AHEAD
_MAX_ROWS = 20_000  # of a fit; more change nothing
_COLUMNS = ("log_share", "gain", "right", "told", "matched")
_ROUNDS = 30
_RIDGE = 1e-2
_SMOOTH = 2.0  # neighbouring lengths of a match count about alike: within exp(1 / sqrt(2))
_STRENGTH = 8.0  # rare lengths: so many places' worth of what one token less says are mixed in

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """Of a dynamic tree's sources.

    Attributes:
        heads: (head, ngram, rest) of each head.
        lookup: [K][NGRAM] by equal tokens; rows are empty where the text takes no part.
        chain: [NGRAM] how often the text's next token is right, by equal tokens before it; or
            empty.
    """

    heads: Sequence[Sequence[float]]
    lookup: Sequence[Sequence[float]]
    chain: Sequence[float]

    @staticmethod
    def of(content: Mapping[str, Any]) -> Weights:
        """From calibration.json, checked there."""
        return Weights(content["heads"], content["lookup"], content["chain"])

    def content(self) -> dict[str, Any]:
        """For calibration.json."""
        return {"heads": self.heads, "lookup": self.lookup, "chain": self.chain}

    def model(self, ngrams: _core.Ngrams | None) -> _core.GuessModel:
        """For a drafter; ValueError where a weight is impossible."""
        heads = [
            (head, ngram, rest, list(lookup))
            for (head, ngram, rest), lookup in zip(self.heads, self.lookup, strict=True)
        ]
        return _core.GuessModel(heads, list(self.chain), ngrams)


@dataclass(frozen=True)
class Offered:
    """An answer, and what the heads offered after each of its m tokens but the last.

    Attributes:
        tokens: of the text.
        start: of the answer in it.
        end: of the answer, not included.
        ids: candidates [K, m - 1, W] i32, best first.
        logits: of these, f32.
    """

    tokens: list[int]
    start: int
    end: int
    ids: NDArray[np.int32]
    logits: NDArray[np.float32]

    def walk(self, guesses: _core.GuessModel, nodes: int) -> list[int]:
        """Rows at which steps of greedy decoding with trees of so many nodes begin."""
        return _core.walk_guesses(
            guesses, self.tokens, self.start, self.end, self.ids, self.logits, nodes
        )

    def judge(self, ngrams: _core.Ngrams | None, *, with_lookup: bool) -> _core.Judged:
        """What each head, the n-grams and the text offered where the answer's tokens stand."""
        return _core.judge_guesses(
            ngrams, self.tokens, self.start, self.end, self.ids, self.logits, with_lookup
        )


def compiled(ngrams: Ngrams | None) -> _core.Ngrams | None:
    """The table as drafters read it."""
    if ngrams is None:
        return None
    names = (field.name for field in fields(ngrams) if field.name != "vocab_size")
    return _core.Ngrams(**{name: getattr(ngrams, name) for name in names})


def fit(answers: Sequence[Offered], ngrams: _core.Ngrams | None, *, with_lookup: bool) -> Weights:
    """Fit the weights to answers of the model.

    Args:
        answers: with at least one row.
        ngrams: of the heads; None: what follows what is not known.
        with_lookup: whether the text takes part.
    """
    total = sum(offered.end - offered.start - 1 for offered in answers)
    every = -(-total // _MAX_ROWS) or 1
    judged, columns, first = [], dict[str, list[NDArray[Any]]](), 0
    for offered in answers:
        one: Mapping[str, Any] = offered.judge(ngrams, with_lookup=with_lookup)
        judged.append((one["found"], one["kept"]))
        some = slice(first, None, every)  # of each text, wherever in it
        first = (first - len(one["found"])) % every
        for name in _COLUMNS:
            columns.setdefault(name, []).append(one[name][some].copy())
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    heads, lookup = [], []
    for head in range(table["right"].shape[1]):
        rows = table["right"][:, head] > -2  # not beyond the answer
        found = _regress(**{name: column[rows, head] for name, column in table.items()})
        heads.append([short(value) for value in found[:3]])
        lookup.append([short(value) for value in found[3:]] if with_lookup else [])
    chain = _chain(judged) if with_lookup else []
    return Weights(heads, lookup, chain)


def _regress(
    log_share: NDArray[np.float32],
    gain: NDArray[np.float32],
    right: NDArray[np.int8],
    told: NDArray[np.int8],
    matched: NDArray[np.int8],
) -> Floats:
    """Weights of one head: head, ngram, rest and NGRAM of lookup.

    Args:
        log_share: [n, C] of what was offered; -inf: nothing.
        gain: [n, C] of the same.
        right: [n] which of them is the model's own token; -1: none.
        told: [n] which of them the text said before; -1: none.
        matched: [n] equal tokens, 1 to NGRAM, of those that it said.
    """
    count = len(right)
    offered = np.isfinite(log_share)
    features = np.zeros((count, log_share.shape[1] + 1, 4))  # the last class: all other tokens
    features[:, :-1, 0] = np.where(offered, log_share, 0.0)
    features[:, :-1, 1] = gain
    features[:, -1, 2] = 1.0
    said = np.flatnonzero(told >= 0)
    features[said, told[said], 3] = 1.0
    wanted = features[np.arange(count), np.where(right < 0, log_share.shape[1], right)]
    slot = np.where(matched > 0, matched - 1, 0)
    weights = np.zeros(3 + NGRAM)
    smooth = _smoothing()
    penalty = _RIDGE * np.eye(3 + NGRAM)
    penalty[3:, 3:] += smooth

    def shares(weights: Floats) -> tuple[Floats, float]:
        own = np.column_stack((np.tile(weights[:3], (count, 1)), weights[3 + slot]))
        scores = np.einsum("ncf,nf->nc", features, own)
        scores[:, :-1][~offered] = -np.inf
        top = scores.max(axis=1, keepdims=True)
        exp = np.exp(scores - top)
        total = exp.sum(axis=1, keepdims=True)
        of_right = (wanted * own).sum(axis=1) - top[:, 0] - np.log(total[:, 0])
        return exp / total, float(-of_right.sum() + weights @ penalty @ weights / 2)

    share, loss = shares(weights)
    for _ in range(_ROUNDS):
        mean = np.einsum("nc,ncf->nf", share, features)
        off = mean - wanted
        spread = np.einsum("nc,ncf,ncg->nfg", share, features, features)
        spread -= mean[:, :, None] * mean[:, None]
        slope, curve = penalty @ weights, penalty.copy()
        slope[:3] += off[:, :3].sum(axis=0)
        curve[:3, :3] += spread[:, :3, :3].sum(axis=0)
        for m in range(NGRAM):
            rows = slot == m
            slope[3 + m] += off[rows, 3].sum()
            curve[3 + m, 3 + m] += spread[rows, 3, 3].sum()
            curve[3 + m, :3] += spread[rows, 3, :3].sum(axis=0)
            curve[:3, 3 + m] = curve[3 + m, :3]
        step = np.linalg.solve(curve, slope)
        for size in 0.5 ** np.arange(20):  # the loss is convex: a short enough step lowers it
            tried, lower = shares(weights - size * step)
            if lower < loss:
                break
        else:
            return weights  # but for rounding
        weights = weights - size * step
        done = loss - lower < 1e-9 * max(abs(loss), 1.0)
        share, loss = tried, lower
        if done:
            break
    return weights


def _smoothing() -> Floats:
    """[NGRAM, NGRAM]: penalises what differs from one length of a match to the next."""
    rise = np.diff(np.eye(NGRAM), axis=0)
    smooth: Floats = _SMOOTH * rise.T @ rise
    return smooth


def _chain(judged: Sequence[tuple[NDArray[np.int8], NDArray[np.int8]]]) -> list[float]:
    """How often the text's next token is right, by equal tokens before it.

    Args:
        judged: of each answer [R] equal tokens before the root, and [R] how many after are right.
    """
    hits, counts = np.zeros(NGRAM + 1), np.zeros(NGRAM + 1)
    for lengths, rights in judged:
        for row, (found, kept) in enumerate(zip(lengths, rights, strict=True)):
            tried = min(int(kept) + 1, len(lengths) - row, AHEAD) if found else 0
            matched = np.minimum(int(found) + np.arange(tried), NGRAM)
            np.add.at(counts, matched, 1)
            np.add.at(hits, matched[: int(kept)], 1)
    chain, before, strength = [], 0.0, 0.0
    for length in range(1, NGRAM + 1):
        total = float(counts[length]) + strength
        before = (float(hits[length]) + strength * before) / total if total else 0.0
        strength = _STRENGTH
        chain.append(short(before))
    return chain


def short(value: float) -> float:
    """Six digits say all that is known."""
    return float(f"{value:.6g}")
