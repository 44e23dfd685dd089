"""embed, and how a weight is packed: every element rounded to nearest even, nothing else."""

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import (
    DTYPES,
    U,
    assert_same_bits,
    assert_within,
    bf16_bits,
    from_bf16,
    normal,
    reports_contents,
    rounded,
)


def awkward_values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Halfway cases of both 16-bit formats, tiny, huge, signed zeros, among normal numbers."""
    x = normal(rng, *shape).reshape(-1)
    bf16_half = (x.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    f16_half = x.astype(np.float16).astype(np.float32) * np.float32(1 + 2**-11)
    tiny = x * np.float32(2**-16)
    subnormal = x * np.float32(2**-130)
    special = np.resize(
        np.float32([0.0, -0.0, 65504, -65504, 65520, 1e-8, 3e38, np.inf, -np.inf]), x.shape
    )
    pick = rng.integers(0, 8, x.shape)
    return (
        np.choose(pick, [x, x, x, bf16_half, f16_half, tiny, subnormal, special])
        .astype(np.float32)
        .reshape(shape)
    )


@pytest.mark.parametrize("shape", [(1, 2), (33, 6), (100, 576), (7, 34)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_rounds_to_nearest_even(
    backend: _core.Backend, dtype: str, shape: tuple[int, int]
) -> None:
    weight = awkward_values(np.random.default_rng(1), *shape)
    with np.errstate(over="ignore"):
        want = rounded(weight, dtype)
    assert_same_bits(_core.ops.pack_unpack(backend, weight, dtype), want)


@pytest.mark.parametrize("src_dtype", ["f16", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_converts_every_16_bit_source(
    backend: _core.Backend, dtype: str, src_dtype: str
) -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    source = bits.view(np.float16) if src_dtype == "f16" else bits
    values = source.astype(np.float32) if src_dtype == "f16" else from_bf16(bits)
    finite = ~np.isnan(values)
    values = np.where(finite, values, np.float32(0)).reshape(256, 256)
    source = np.where(finite, source, 0).astype(source.dtype).reshape(256, 256)
    with np.errstate(over="ignore"):
        want = rounded(values, dtype)
    assert_same_bits(_core.ops.pack_unpack(backend, source, dtype, src_dtype), want)


def test_a_weight_of_many_pieces(backend: _core.Backend) -> None:
    """More than goes to a device at once; a row lies in two pieces."""
    weight = np.arange(1100 * 1000, dtype=np.float32).reshape(1100, 1000)
    assert_same_bits(_core.ops.pack_unpack(backend, weight, "f32"), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_keeps_nan(backend: _core.Backend, dtype: str) -> None:
    weight = np.ones((5, 6), np.float32)
    weight[3, 4] = np.nan
    weight.view(np.uint32)[4, 0] = 0x7F800001  # its payload lies in the bits that bf16 cuts off
    assert np.array_equal(np.isnan(_core.ops.pack_unpack(backend, weight, dtype)), np.isnan(weight))


@pytest.mark.parametrize("scale", [1.0, 11.3137085])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "width"), [(1, 2), (33, 6), (100, 576), (50, 34)])
def test_embed(backend: _core.Backend, vocab: int, width: int, dtype: str, scale: float) -> None:
    rng = np.random.default_rng(2)
    weight = normal(rng, vocab, width)
    tokens = np.concatenate([[0, vocab - 1], rng.integers(0, vocab, 40)]).astype(np.int32)
    got = _core.ops.embed(backend, tokens, weight, dtype, scale)
    want = reference.embed(tokens, rounded(weight, dtype), np.float32(scale))
    # One f32 product; with scale 1 nothing is rounded.
    assert_within(got, want, U * np.abs(want) if scale != 1.0 else 0.0)


def test_embed_refuses_unknown_tokens(backend: _core.Backend) -> None:
    weight = np.ones((10, 4), np.float32)
    for bad in (-1, 10):
        if not reports_contents(backend):
            got = _core.ops.embed(backend, np.asarray([3, bad], np.int32), weight, "f32", 1.0)
            assert got.tolist() == [[1.0] * 4, [0.0] * 4]
            continue
        with pytest.raises(ValueError, match=rf"^embed.*{bad}.*10"):
            _core.ops.embed(backend, np.asarray([3, bad], np.int32), weight, "f32", 1.0)


def test_bf16_rounding_of_the_tests_themselves() -> None:
    """1 + 2^-8 lies halfway: to even is down; 1 + 3 * 2^-8 goes up.

    Against torch-free known bits.
    """
    assert bf16_bits(np.float32([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.0, 3.4e38])).tolist() == [
        0x3F80, 0x3F80, 0x3F82, 0xC000, 0x7F80,
    ]  # fmt: skip
