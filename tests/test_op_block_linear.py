"""linear, embed and their fused forms on weights in blocks: GGUF's own blocks, used as they are."""

import numpy as np
import pytest

import reference
from block_util import BLOCK_TYPES, block_inputs, quantised, random_blocks, rounded_rows, values
from medusa_ext import _core
from util import U, assert_same_bits, assert_within, normal, with_threads


@pytest.fixture(autouse=True)
def only_where_stored(backend: _core.Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("this backend stores no weights in blocks")


def bound_of(x: np.ndarray, blocks: np.ndarray, dtype: str) -> np.ndarray:
    """A unit roundoff of every partial sum, of which a group of 32 inputs makes at most four.

    None exceeds sum |x| |d q| + |x sum| |m|; a value d q + m may be far smaller than its parts, so
    the size of the parts counts: |w| + 2 |m| bounds them, m being at most the greatest |w| of the
    group. At worst they add up; signs are random, so that 4 + sqrt(groups) is never passed.
    """
    stored = np.abs(values(blocks, dtype)).astype(np.float64)
    if dtype in ("q4_1", "q4_k"):
        groups = stored.reshape(len(stored), -1, 32)
        stored = (groups + 2 * groups.max(axis=-1, keepdims=True)).reshape(stored.shape)
    size = np.abs(rounded_rows(x)) @ stored.T
    return (4 + np.sqrt(x.shape[1] / 32)) * U * size


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_linear(backend: _core.Backend, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for outputs, blocks_of_row in [(1, 1), (33, 3), (100, 2), (40, 18)]:
        inputs = blocks_of_row * block_inputs(dtype)
        blocks = random_blocks(rng, outputs, inputs, dtype)
        for rows in (1, 2, 3, 5, 8, 13, 16, 40):
            x = normal(rng, rows, inputs)
            bias = normal(rng, outputs) if rows % 2 else None
            residual = normal(rng, rows, outputs) if rows % 3 else None
            got = _core.ops.linear(backend, x, blocks, dtype, bias, residual)
            want = reference.linear(rounded_rows(x), values(blocks, dtype), bias, residual)
            extra = sum(np.abs(part) for part in (bias, residual) if part is not None)
            bound = bound_of(x, blocks, dtype) + 4 * U * (np.abs(want) + extra)
            assert_within(got, want, bound)


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_embed_reads_what_the_file_holds(backend: _core.Backend, dtype: str) -> None:
    blocks = random_blocks(np.random.default_rng(2), 70, 3 * block_inputs(dtype), dtype)
    got = _core.ops.pack_unpack(backend, blocks, dtype, dtype)
    want = values(blocks, dtype)
    if dtype in ("q8_0", "q4_0"):
        assert_same_bits(got, want)
    else:  # the package rounds the product and the sum, we once
        groups = np.abs(want).reshape(len(want), -1, 32).max(axis=-1)
        assert_within(got, want, 4 * U * np.repeat(groups, 32, axis=-1))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1"])
def test_quantised_as_the_package_does(backend: _core.Backend, dtype: str) -> None:
    rng = np.random.default_rng(3)
    weight = normal(rng, 50, 320, scale=0.1)
    weight[3] = 0
    weight[4, :32] = 7.0
    weight[5, 7] = 1e-30
    assert_same_bits(
        _core.ops.pack_unpack(backend, weight, dtype),
        _core.ops.pack_unpack(backend, quantised(weight, dtype), dtype, dtype),
    )


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_extreme_blocks(backend: _core.Backend, dtype: str) -> None:
    """Every byte at its ends, x at its ends: no sum of integers saturates."""
    inputs = 2 * block_inputs(dtype)
    rng = np.random.default_rng(4)
    blocks = random_blocks(rng, 6, inputs, dtype)
    rows = blocks.reshape(6, 2, -1)
    start = {"q8_0": 2, "q4_0": 2, "q4_1": 4, "q4_k": 16}[dtype]
    for row, byte in enumerate([0, 255, 128, 127, 129, 15]):
        rows[row, :, start:] = byte
    x = np.where(rng.random((5, inputs)) < 0.5, -1.0, 1.0).astype(np.float32)
    x[0], x[1] = 1, -1
    got = _core.ops.linear(backend, x, blocks, dtype)
    want = reference.linear(rounded_rows(x), values(blocks, dtype))
    assert_within(got, want, bound_of(x, blocks, dtype))


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_bits_do_not_depend_on_other_rows_or_threads(backend: _core.Backend, dtype: str) -> None:
    rng = np.random.default_rng(5)
    for outputs, blocks_of_row in [(33, 3), (260, 5)]:
        inputs = blocks_of_row * block_inputs(dtype)
        blocks = random_blocks(rng, outputs, inputs, dtype)
        x, bias = normal(rng, 150, inputs), normal(rng, outputs)
        alone = np.concatenate(
            [_core.ops.linear(backend, x[r : r + 1], blocks, dtype, bias) for r in range(len(x))]
        )
        for rows in [*range(2, 27), 64, 119, 121, 128, 150]:
            start = int(rng.integers(0, len(x) - rows + 1))
            got = _core.ops.linear(backend, x[start : start + rows], blocks, dtype, bias)
            assert_same_bits(got, alone[start : start + rows], f"{rows} rows from {start}")
        for threads in (1, 3):
            other = with_threads(backend, threads)
            assert_same_bits(_core.ops.linear(other, x, blocks, dtype, bias), alone)
        part = np.ascontiguousarray(blocks[3:20])
        assert_same_bits(
            _core.ops.linear(backend, x, part, dtype, np.ascontiguousarray(bias[3:20])),
            np.ascontiguousarray(alone[:, 3:20]),
        )


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(backend: _core.Backend, dtype: str, value: float) -> None:
    rng = np.random.default_rng(6)
    inputs = 2 * block_inputs(dtype)
    x = normal(rng, 3, inputs)
    x[1, 37] = value
    got = _core.ops.linear(backend, x, random_blocks(rng, 40, inputs, dtype), dtype)
    assert not np.isfinite(got[1]).any()
    assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e8])
def test_weights_that_no_block_holds_are_refused(
    backend: _core.Backend, dtype: str, value: float
) -> None:
    weight = normal(np.random.default_rng(8), 40, 64)
    weight[35, 50] = value
    with pytest.raises(ValueError, match=f"row 35 holds a value .* too large for {dtype}"):
        _core.ops.pack_unpack(backend, weight, dtype)
    good = np.zeros_like(weight)
    good[35, 50] = 1e-38  # its scale is 0
    assert_same_bits(_core.ops.pack_unpack(backend, good, dtype) + 0.0, np.zeros_like(weight))


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_damaged_scales_are_refused(backend: _core.Backend, dtype: str) -> None:
    blocks = random_blocks(np.random.default_rng(9), 40, 2 * block_inputs(dtype), dtype)
    for byte in (1, 3) if dtype in ("q4_1", "q4_k") else (1,):
        broken = blocks.copy()
        broken[7, broken.shape[1] // 2 + byte] = 0x7C  # infinity
        with pytest.raises(ValueError, match="row 7 holds a value that is no finite number"):
            _core.ops.pack_unpack(backend, broken, dtype, dtype)


def test_tiny_rows_are_zero(backend: _core.Backend) -> None:
    blocks = random_blocks(np.random.default_rng(7), 5, 64, "q8_0")
    x = np.full((2, 64), 1e-38, np.float32)
    assert_same_bits(_core.ops.linear(backend, x, blocks, "q8_0"), np.zeros((2, 5), np.float32))


def test_refused(backend: _core.Backend) -> None:
    x, rows = np.zeros((1, 64), np.float32), np.zeros((4, 64), np.float32)
    with pytest.raises(ValueError, match="q4_k holds blocks of 256 inputs, the weight has 64"):
        _core.ops.linear(backend, x, rows, "q4_k")
    with pytest.raises(ValueError, match="a q4_k weight takes q4_k blocks only"):
        _core.ops.pack_unpack(backend, np.zeros((4, 256), np.float32), "q4_k")
    with pytest.raises(ValueError, match="rows of 35 bytes; a block of q8_0 has 34"):
        _core.ops.linear(backend, x, np.zeros((4, 35), np.uint8), "q8_0")
    with pytest.raises(ValueError, match='choose "bf16", "f16", "f32", "q8_0"'):
        _core.ops.linear(backend, x, rows, "q5_0")
