"""What the text so far guesses beside Medusa heads: how often it is right, which nodes it takes.

Where the last tokens of a text stood before, what followed them there is a guess at what follows
now; at the text's end it goes on with itself, so that a loop is guessed to any length. The drafter
puts it in the place of nodes of the tree that are worth less, so that their number stays; `kept`
does the same on ranks alone. Source of the idea: A. Saxena, Prompt Lookup Decoding, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.trees import Paths

NGRAM = 8  # equal tokens that are told apart; more count as so many
AHEAD = 16  # tokens that are guessed at most
_STRENGTH = 8.0  # rare lengths: so many places' worth of what one token less says are mixed in

Bytes = NDArray[np.int8]


@dataclass(frozen=True)
class LookedUp:
    """What followed where the last tokens of a text stood before, at every place of `Ranks`.

    Attributes:
        length: [P] equal tokens, 0 where there are none.
        room: [P] guesses in a row that the answer has room for.
        right: [P] how many of the guesses are, up to the first wrong one.
        place: [P, K] their ranks among each head's candidates; -1: not among them.
    """

    length: Bytes
    room: Bytes
    right: Bytes
    place: NDArray[np.int16]

    def choose(self, rows: NDArray[np.intp]) -> LookedUp:
        """Return some rows only."""
        return LookedUp(self.length[rows], self.room[rows], self.right[rows], self.place[rows])


@dataclass(frozen=True)
class Worth:
    """How often a step's tokens run through a guess.

    Attributes:
        values: of the tree's paths, the most valuable first.
        lookup: [NGRAM][AHEAD] of the d-th token that followed where the last m tokens stood before.
    """

    values: Sequence[float]
    lookup: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Kept:
    """What a step's tree holds at every place.

    Attributes:
        kind: [P] of the tree.
        nodes: [kinds, nodes] bool; of the static tree's nodes, the root first.
        right: [P] right guesses of the text's own that it holds, in a row.
    """

    kind: NDArray[np.intp]
    nodes: NDArray[np.bool_]
    right: NDArray[np.intp]


def look_up(tokens: list[int], start: int, end: int, ids: NDArray[np.int32]) -> LookedUp:
    """Find what the text said before, for each token of an answer but the last.

    Args:
        tokens: of the text.
        start: of the answer in it.
        end: of the answer, not included.
        ids: candidates [K, end - start - 1, num_ranks].

    Returns:
        A row for each, as if the answer ended for want of room: one that ended by itself may have
        had room for more.
    """
    num_heads, num_rows, _ = ids.shape
    found = _core.latest_matches(tokens, start + 1, max(end, start + 1), NGRAM)
    room = np.minimum(np.arange(num_rows - 1, -1, -1), AHEAD)
    guess = np.full((num_rows, AHEAD), -1, np.int64)
    for row, (length, at) in enumerate(found):
        if length:
            said = tokens[at : start + row + 1]
            guess[row, : room[row]] = np.resize(said, room[row])
    truth = np.full((num_rows, AHEAD), -2, np.int64)
    for row in range(num_rows):
        follows = tokens[start + row + 1 : min(end, start + row + 1 + AHEAD)]
        truth[row, : len(follows)] = follows
    place = np.full((num_rows, num_heads), -1, np.int16)
    for head in range(min(num_heads, AHEAD)):
        hit = ids[head] == guess[:, head : head + 1]
        place[:, head] = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    return LookedUp(
        np.array([length for length, _ in found], np.int8).reshape(num_rows),
        room.astype(np.int8),
        np.cumprod(guess == truth, axis=1).sum(axis=1).astype(np.int8),
        place,
    )


def joined(parts: Sequence[LookedUp], num_heads: int) -> LookedUp:
    """All rows of some answers."""
    none = np.empty(0, np.int8)
    return LookedUp(
        np.concatenate([none, *(part.length for part in parts)]),
        np.concatenate([none, *(part.room for part in parts)]),
        np.concatenate([none, *(part.right for part in parts)]),
        np.concatenate([np.empty((0, num_heads), np.int16), *(part.place for part in parts)]),
    )


def shares(looked_up: LookedUp, weights: NDArray[np.float64]) -> list[list[float]]:
    """How often the d-th token that followed the last m tokens is right, and all before it.

    Args:
        looked_up: the places.
        weights: [P] of them, how often a step begins there.

    Returns:
        [NGRAM][AHEAD]. Of the places where the answer has room for so many.
    """
    before = np.zeros(AHEAD)
    table = []
    ahead = np.arange(1, AHEAD + 1)
    for length in range(1, NGRAM + 1):
        rows = looked_up.length == length
        counts = weights[rows] @ (looked_up.room[rows, None] >= ahead)
        hits = weights[rows] @ (looked_up.right[rows, None] >= ahead)
        strength = _STRENGTH if length > 1 else 0.0
        total = counts + strength
        before = np.divide(hits + strength * before, total, out=np.zeros(AHEAD), where=total > 0)
        before = np.minimum.accumulate(before)
        table.append(before.tolist())
    return table


def kept(looked_up: LookedUp, paths: Paths, child: NDArray[np.intp], worth: Worth) -> Kept:
    """What the drafter's tree holds at every place.

    Args:
        looked_up: the places.
        paths: of the static tree, parents first.
        child: [nodes, ranks] of the static tree, -1 where there is none.
        worth: of the paths, and of what was looked up.

    Returns:
        The trees, one for all places that differ in nothing that matters.
    """
    num_heads = looked_up.place.shape[1]
    same = np.full(looked_up.place.shape, -1, np.intp)  # the static node of each token looked up
    at = np.zeros(len(same), np.intp)
    for head in range(num_heads):
        place = looked_up.place[:, head]
        at = np.where((at >= 0) & (place >= 0), child[at, place], -1)
        same[:, head] = at
    # The drafter's order: the most valuable first, of equals the shorter path.
    value = [1.0] * (len(paths) + 1)
    node_of = {(): 0} | {tuple(path): 1 + index for index, path in enumerate(paths)}
    order = [node_of[path] for path in sorted(node_of, key=lambda path: (len(path), path))][1:]
    for node in order:
        above = value[node_of[tuple(paths[node - 1][:-1])]]
        value[node] = min(float(np.float32(worth.values[node - 1])), above)
    order.sort(key=lambda node: -value[node])
    static = [(node, len(paths[node - 1]), value[node]) for node in order]
    lookup = [np.asarray(row, np.float32).tolist() for row in worth.lookup]
    # Places differ by few things only: trees are filled once for each kind.
    key = np.column_stack((looked_up.length, looked_up.room, same))
    kinds, kind = np.unique(key, axis=0, return_inverse=True)
    nodes = np.zeros((len(kinds), len(paths) + 1), bool)
    told = np.zeros(len(kinds), np.intp)
    for index, (length, room, *doubles) in enumerate(kinds.tolist()):
        said = lookup[length - 1][:room] if length else []
        told[index] = _fill(nodes[index], static, room, said, doubles)
    kind = kind.reshape(-1)
    return Kept(kind, nodes, np.minimum(looked_up.right, told[kind]))


def _fill(
    nodes: NDArray[np.bool_],
    static: Sequence[tuple[int, int, float]],
    room: int,
    said: Sequence[float],
    doubles: Sequence[int],
) -> int:
    """Fill one tree as the drafter does.

    Args:
        nodes: [nodes]; those of the static tree that it holds become true.
        static: (node, depth, value), the most valuable first.
        room: deeper nodes have none.
        said: values of the tokens looked up.
        doubles: the static node of each of the first of these, -1 for none.

    Returns:
        How many tokens looked up it holds.
    """
    nodes[0] = True
    count, at, told = 1, 0, 0
    while count < len(nodes) and (at < len(static) or told < len(said)):
        node, depth, value = static[at] if at < len(static) else (-1, 0, -1.0)
        if told < len(said) and said[told] > value:
            node = doubles[told] if told < len(doubles) else -1
            told += 1
        else:
            at += 1
            if depth > room:
                continue
        count += node < 0 or not nodes[node]
        if node >= 0:
            nodes[node] = True
    return told
