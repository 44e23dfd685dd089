"""compact_kv: accepted rows slide down to the end of the committed cache, bit for bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from medusa_ext import _core
from util import (
    DTYPES,
    PagedCase,
    assert_same_bits,
    join_rows,
    normal,
    path_to,
    prompt_rows,
    random_parents,
    reports_contents,
    tree_rows,
    trees,
    with_threads,
)

SHAPE: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def fill(
    case: PagedCase, rng: np.random.Generator, sequence: int, length: int, parents: list[int]
) -> None:
    """Committed tokens and a tree, different in every layer."""
    rows = join_rows(prompt_rows(sequence, 0, length), tree_rows(sequence, length, parents))
    kv = (length + len(parents), case.num_kv_heads, case.head_dim)
    for layer in range(case.num_layers):
        case.write(rows, normal(rng, *kv), normal(rng, *kv), layer=layer)


def expected(
    case: PagedCase, before: np.ndarray, moves: list[tuple[int, int, list[int]]]
) -> np.ndarray:
    """dump() after the moves, by the reference, through the page table."""
    want = before.copy()
    for sequence, length, path in moves:
        if path:
            cells = case.cells(sequence, range(length + path[-1] + 1))
            rows = reference.compact_kv(np.moveaxis(before[:, :, cells], 2, 0), length, path)
            want[:, :, cells] = np.moveaxis(rows, 0, 2)
    return want


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80])
def test_several_sequences(backend: _core.Backend, head_dim: int, dtype: str, threads: int) -> None:
    rng = np.random.default_rng(head_dim)
    lengths, sizes = [63, 0, 120, 64, 5], [64, 256, 20, 1, 30]
    shape = {**SHAPE, "head_dim": head_dim}
    capacities = [a + b for a, b in zip(lengths, sizes, strict=True)]
    case = PagedCase(with_threads(backend, threads), capacities, dtype=dtype, seed=1, **shape)
    moves = []
    for sequence, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        parents = random_parents(rng, size, 0.2)
        fill(case, rng, sequence, length, parents)
        if sequence != 4:  # one sequence stays as it is
            moves.append((sequence, length, path_to(parents, int(rng.integers(size)))))
    before = case.dump()
    _core.ops.compact_kv(case.backend, case.cache, moves)
    assert_same_bits(case.dump(), expected(case, before, moves))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parents=trees(max_nodes=140),
    length=st.integers(0, 130),
    pick=st.integers(0, 10**9),
    dtype=st.sampled_from(DTYPES),
)
def test_any_path(
    backend: _core.Backend, parents: list[int], length: int, pick: int, dtype: str
) -> None:
    case = PagedCase(backend, [length + len(parents)], dtype=dtype, seed=pick % 1000, **SHAPE)
    fill(case, np.random.default_rng(pick), 0, length, parents)
    before = case.dump()
    moves = [(0, length, path_to(parents, pick % len(parents)))]
    _core.ops.compact_kv(backend, case.cache, moves)
    assert_same_bits(case.dump(), expected(case, before, moves))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_border(backend: _core.Backend, dtype: str) -> None:
    """Moves within a page, from the next page, across the border, and over more than a page."""
    paths = [[0, 1, 2, 5], [0, 3], [0, 70, 71, 139], [0, 64, 128], [0, *range(65, 130)], [139]]
    crossings = 0
    for length in (0, 1, 63, 64, 127):
        for path in paths:
            case = PagedCase(backend, [length + 140], dtype=dtype, seed=length, **SHAPE)
            fill(case, np.random.default_rng(length), 0, length, [*range(-1, 139)])
            before = case.dump()
            _core.ops.compact_kv(backend, case.cache, [(0, length, path)])
            assert_same_bits(
                case.dump(), expected(case, before, [(0, length, path)]), f"{length} {path}"
            )
            crossings += sum(
                (length + i) // 64 != (length + node) // 64 for i, node in enumerate(path)
            )
    assert crossings > 50


def test_identity_and_empty_paths_move_nothing(backend: _core.Backend) -> None:
    case = PagedCase(backend, [100, 100], **SHAPE)
    fill(case, np.random.default_rng(2), 0, 60, [*range(-1, 30)])
    before = case.dump()
    for moves in ([(0, 60, [*range(31)])], [(0, 60, [0])], [(0, 60, []), (1, 0, [])], []):
        _core.ops.compact_kv(backend, case.cache, moves)
        assert_same_bits(case.dump(), before)


def test_nan_payloads_and_signed_zeros_survive(backend: _core.Backend) -> None:
    """A move copies bits: unwritten rows are NaN, and moving one must not quieten or lose it."""
    case = PagedCase(backend, [80], **SHAPE)
    kv = np.full((3, 2, 6), -0.0, np.float32)
    rows = tree_rows(0, 62, [-1, 0, 0])
    for layer in range(2):
        case.write(rows, kv, kv, layer=layer)
    before = case.dump()
    _core.ops.compact_kv(backend, case.cache, [(0, 62, [0, 2, 9])])  # node 9 was never written
    assert_same_bits(case.dump(), expected(case, before, [(0, 62, [0, 2, 9])]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_a_move_the_cache_is_that_of_the_chain(backend: _core.Backend, dtype: str) -> None:
    """Tree, walk, move, next row: K, V and the next row's attention as if the path had been written
    one by one.
    """
    rng = np.random.default_rng(3)
    shape = {**SHAPE, "num_layers": 1, "head_dim": 32, "dtype": dtype}
    for length in (0, 50, 63, 64, 100):
        parents = random_parents(rng, 60, 0.3)
        path = path_to(parents, 59)
        tree, chain = (PagedCase(backend, [length + 61], seed=seed, **shape) for seed in (1, 2))
        prompt, nodes, extra = (
            (normal(rng, n, 4, 32), normal(rng, n, 2, 32), normal(rng, n, 2, 32))
            for n in (length, 60, 1)
        )
        for case in (tree, chain):
            if length:
                case.write(prompt_rows(0, 0, length), prompt[1], prompt[2])
        tree.write(tree_rows(0, length, parents), nodes[1], nodes[2])
        _core.ops.compact_kv(backend, tree.cache, [(0, length, path)])
        for i, node in enumerate(path):
            chain.write(prompt_rows(0, length + i, 1), nodes[1][[node]], nodes[2][[node]])
        end = length + len(path)
        for got, want in zip(tree.read(0, range(end)), chain.read(0, range(end)), strict=True):
            assert_same_bits(got, want)
        row = prompt_rows(0, end, 1)
        outs = [
            _core.ops.tree_attention(
                backend,
                case.write(row, extra[1], extra[2], extra[0]),
                case.cache,
                0,
                row,
                0.2,
                0,
                "f32",
            )
            for case in (tree, chain)
        ]
        assert_same_bits(outs[0], outs[1])


def test_compact_kv_refuses_bad_moves(backend: _core.Backend) -> None:
    case = PagedCase(backend, [100], **SHAPE)
    before = case.dump()
    for move in [
        (0, 0, [0, 2, 1]),
        (0, 0, [0, 0]),
        (0, 0, [-1, 2]),
        (0, -1, [0]),
        (-1, 0, [0, 2]),
        (0, 10**6, [0, 2]),
    ]:
        with pytest.raises(ValueError, match=r"^compact_kv"):
            _core.ops.compact_kv(backend, case.cache, [move])
    assert_same_bits(case.dump(), before)


def test_rows_without_a_page_stay(backend: _core.Backend) -> None:
    """Slots 128 and on lie on pages that the table does not name."""
    case = PagedCase(backend, [100], **SHAPE)
    fill(case, np.random.default_rng(5), 0, 120, [-1, 0, 0, 0])
    before = case.dump()
    move = (0, 120, [0, 2, 9])
    if reports_contents(backend):
        with pytest.raises(ValueError, match=r"^compact_kv"):
            _core.ops.compact_kv(backend, case.cache, [move])
        assert_same_bits(case.dump(), before)
        return
    _core.ops.compact_kv(backend, case.cache, [move])
    assert_same_bits(case.dump(), expected(case, before, [(0, 120, [0, 2])]))
