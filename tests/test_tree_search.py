"""The tree that calibration chooses, against exhaustive search; the walk, against plain loops."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_ext import _core
from medusa_ext.calibration.guesses import Offered
from medusa_ext.calibration.ranks import BEYOND, Ranks, accepted, walk
from medusa_ext.calibration.tree_search import best_paths, search

NOTHING = Offered([], 0, 0, np.empty((0, 0, 0), np.int32), np.empty((0, 0, 0), np.float32))


def make_ranks(answers: list[np.ndarray], num_ranks: int, categories=None) -> Ranks:
    """Ranks of answers [rows, K] each."""
    ranks = np.concatenate(answers).astype(np.int16)
    return Ranks(
        ranks,
        np.cumsum([0, *map(len, answers)]),
        tuple(categories or [""] * len(answers)),
        tuple(range(len(answers))),
        num_ranks,
        (NOTHING,) * len(answers),
    )


def random_ranks(seed: int, *, rows: int, heads: int, num_ranks: int, answers: int = 1) -> Ranks:
    """Heads that are right together: a position is easy or hard for all of them."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(answers):
        ease = random.beta(1, 1, rows)[:, None]
        ranks = np.minimum(random.geometric(0.1 + 0.85 * ease, (rows, heads)) - 1, num_ranks)
        for head in range(heads):  # token i + 1 + head of rows + 1 tokens
            ranks[rows - head :, head] = BEYOND
        parts.append(ranks)
    return make_ranks(parts, num_ranks)


def share(ranks: Ranks, path: tuple[int, ...]) -> float:
    """Of the positions that can tell, those whose tokens run through the path, head by head."""
    value, rows = 1.0, list(range(len(ranks.ranks)))
    for head, rank in enumerate(path):
        rows = [row for row in rows if ranks.ranks[row, head] != BEYOND]
        hits = [row for row in rows if ranks.ranks[row, head] == rank]
        value *= len(hits) / len(rows) if rows else 0.0
        rows = hits
    return value


def best_by_trying_all(ranks: Ranks, num_paths: int) -> float:
    """The greatest sum of values over all trees of that many paths."""
    heads, num_ranks = ranks.num_heads, ranks.num_ranks
    paths = [
        path
        for depth in range(1, heads + 1)
        for path in np.ndindex(*[num_ranks] * depth)
        if share(ranks, path) > 0
    ]
    value = {path: share(ranks, path) for path in paths}
    sums = [
        sum(value[path] for path in tree)
        for tree in combinations(paths, min(num_paths, len(paths)))
        if all(len(path) == 1 or path[:-1] in tree for path in tree)
    ]
    return max(sums)


@pytest.mark.parametrize("num_paths", [1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "num_ranks"), [(1, 4), (2, 3), (3, 2)])
def test_no_tree_sums_to_more(heads, num_ranks, num_paths):
    for seed in range(5):
        ranks = random_ranks(seed, rows=40, heads=heads, num_ranks=num_ranks)
        paths, values = best_paths(ranks, num_paths, strength=0)
        assert sum(values) == pytest.approx(best_by_trying_all(ranks, num_paths))
        assert values == pytest.approx([share(ranks, tuple(path)) for path in paths])


def greedy_products(ranks: Ranks, num_paths: int) -> list[list[int]]:
    """The growth of the paper: products of the heads' own shares, best neighbour first."""
    shares = ranks.accuracies()[0]
    tree: list[tuple[int, ...]] = []
    near = {(0,)}
    while len(tree) < num_paths and near:
        path = max(near, key=lambda p: np.prod([shares[head, rank] for head, rank in enumerate(p)]))
        near.remove(path)
        tree.append(path)
        if path[-1] + 1 < ranks.num_ranks:
            near.add((*path[:-1], path[-1] + 1))
        if len(path) < ranks.num_heads:
            near.add((*path, 0))
    return [list(path) for path in tree]


def test_better_than_greedy_growth_from_products():
    """Where head 0 is right at its second guess, head 1 is at its third: no product knows."""
    rows = np.array([[0, 0]] * 40 + [[1, 2]] * 35 + [[2, 1]] * 25)
    ranks = make_ranks([row[None] for row in rows], 3)
    grown = sum(share(ranks, tuple(path)) for path in greedy_products(ranks, 4))
    paths, values = best_paths(ranks, 4, strength=0)
    assert paths == [[0], [0, 0], [1], [1, 2]]
    assert sum(values) == pytest.approx(1.5)
    assert grown == pytest.approx(1.4)


def test_later_heads_are_judged_where_they_can_be():
    """Of answers of 3 tokens head 1 sees one position in two; it is right there every time."""
    ranks = make_ranks([np.array([[0, 0], [1, BEYOND]])] * 10, 2)
    shares, counts = ranks.accuracies()
    assert counts.tolist() == [20, 10]
    assert shares.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    paths, values = best_paths(ranks, 3, strength=0)
    assert paths == [[0], [1], [0, 0]]
    assert values == [0.5, 0.5, 0.5]


def test_rare_paths_borrow_from_shorter_contexts():
    """(1, 0) was never seen; head 1 is right there as often as it is elsewhere, a little less."""
    ranks = make_ranks([np.array([[0, 0]] * 90 + [[1, 1]] * 2)], 2)
    assert [1, 0] not in best_paths(ranks, 9, strength=0)[0]
    paths, values = best_paths(ranks, 9, strength=8)
    assert 0 < values[paths.index([1, 0])] < values[paths.index([1])]
    seen, smoothed = 90 / 92, (90 + 8 * 90 / 92) / (90 + 8)
    assert values[paths.index([0, 0])] == pytest.approx(seen * smoothed)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_every_beginning_is_a_tree(seed, heads, num_ranks, weighted):
    ranks = random_ranks(seed, rows=30, heads=heads, num_ranks=num_ranks)
    weights = np.random.default_rng(seed).random(len(ranks.ranks)) if weighted else None
    paths, values = best_paths(ranks, 40, weights=weights)
    assert values == sorted(values, reverse=True)
    assert all(0 < value <= 1 + 1e-12 for value in values)
    for count in range(len(paths) + 1):
        assert _core.TreeSpec.from_paths(paths[:count]).num_nodes == count + 1


def plain_walk(ranks: Ranks, paths: list[list[int]]) -> tuple[int, int]:
    """Tokens and steps by loops over every token."""
    tree = {tuple(path) for path in paths}
    tokens = steps = 0
    for start, end in zip(ranks.starts[:-1], ranks.starts[1:], strict=True):
        length = end - start + 1
        tokens, steps, emitted = tokens + length, steps + 1, 1
        while emitted < length:
            row, path = ranks.ranks[start + emitted - 1], ()
            while len(path) < len(row) and (*path, row[len(path)]) in tree:
                path = (*path, row[len(path)])
            emitted += min(len(path) + 1, length - emitted)
            steps += 1
    return tokens, steps


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 12))
def test_walk_equals_plain_loops(seed, heads, num_paths):
    ranks = random_ranks(seed, rows=12, heads=heads, num_ranks=4, answers=3)
    paths = best_paths(ranks, num_paths)[0]
    done = walk(ranks, paths)
    assert (done.tokens, done.steps) == plain_walk(ranks, paths)
    assert done.tokens_per_step == done.tokens / done.steps
    assert done.visited.sum() == done.steps - 3
    if not paths:
        assert (done.tokens_per_step, done.tokens_per_later_step) == (1, 1)


def test_ranks_beyond_those_looked_at_match_nothing():
    ranks = make_ranks([np.array([[2, 0], [BEYOND, BEYOND]])], 2)
    assert accepted(ranks, [[0], [1], [0, 0]]).tolist() == [0, 0]
    assert accepted(ranks, [[2]]).tolist() == [0, 0]  # 2 stands for "none of them" here


def test_search_looks_where_steps_begin():
    """Half the positions follow a right guess, and a step with a tree never begins at those."""
    # Rank 0 right, then a position that only a step without a tree would begin at.
    answer = np.array([[0], [1], [0], [1], [0], [1], [2], [2], [BEYOND]][:-1])
    ranks = make_ranks([answer] * 20, 3)
    plain, found = best_paths(ranks, 2)[0], search(ranks, 2, [2, 3])[0]
    assert plain == [[0], [1]]
    assert found == [[0], [2]]
    assert walk(ranks, found).steps < walk(ranks, plain).steps


def test_search_stops_where_nothing_else_was_ever_right():
    ranks = make_ranks([np.array([[0, 2], [2, BEYOND]])], 2)
    assert search(ranks, 10, [4])[0] == [[0]]
    nothing = make_ranks([np.full((3, 2), 2)], 2)
    assert search(nothing, 10, [4]) == ([], [])


def test_halves_share_no_text_and_see_every_category():
    parts = [np.full((n, 1), n) for n in range(1, 9)]
    ranks = make_ranks(parts, 20, ["a", "b"] * 4)
    first, second = ranks.halves()
    assert {int(row) for row in first.ranks[:, 0]} == {1, 4, 5, 8}
    assert {int(row) for row in second.ranks[:, 0]} == {2, 3, 6, 7}
    assert sorted(first.categories) == sorted(second.categories) == ["a", "a", "b", "b"]
    assert set(first.by_category()) == {"a", "b"}
    assert first.by_category()["b"].ranks[:, 0].tolist() == [4] * 4 + [8] * 8


@pytest.mark.parametrize("categories", ["abcdef", "aaabbbccc", "aab", "ab"])
def test_halves_of_odd_categories_are_balanced(categories):
    ranks = make_ranks([np.full((1, 1), 0)] * len(categories), 20, list(categories))
    first, second = (len(half.categories) for half in ranks.halves())
    assert abs(first - second) <= 1


def test_error_of_tokens_per_step():
    """The ratio estimator by hand: texts of 4 and 2 answers' tokens, of 3 steps and 2."""
    one, other = np.array([[0], [1], [1]]), np.array([[1]])
    ranks = make_ranks([one, other], 2)
    done = walk(ranks, [[0]])
    assert (done.tokens, done.steps) == (4 + 2, 3 + 2)
    off = 4 - 6 / 5 * 3, 2 - 6 / 5 * 2
    assert done.error == pytest.approx((2 * (off[0] ** 2 + off[1] ** 2)) ** 0.5 / 5)
    assert walk(ranks, []).error == 0  # one token a step, whatever the text
    turns = replace(ranks, texts=(0, 0))
    assert walk(turns, [[0]]).error is None  # one text says nothing of others
