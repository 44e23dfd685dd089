"""rms_norm."""

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import (
    EPS,
    U,
    activation_dtype,
    assert_same_bits,
    assert_within,
    normal,
    rounded,
    with_threads,
)

WIDTHS = [1, 2, 6, 15, 16, 33, 64, 576, 1000, 8192, 9001, 16388]


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("out_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(backend: _core.Backend, width: int, out_dtype: str, eps: float) -> None:
    rng = np.random.default_rng(width)
    x = normal(rng, 40, width) * np.float32(10.0) ** rng.integers(-4, 4, (40, 1)).astype(np.float32)
    x[3], x[5] = 0, 1e-12
    gain = normal(rng, width) + 1
    got = _core.ops.rms_norm(backend, x, gain, eps, out_dtype)
    want = reference.rms_norm(x, gain, np.float32(eps))
    # Squares are summed in f32: relative error of a sum of positive terms, random walk of up to
    # `width` roundings, halved by the root; then a root, a quotient and two products, each half a
    # unit to one unit.
    bound = (4 + 0.5 * np.sqrt(width)) * U * np.abs(want)
    assert_within(
        got,
        want,
        bound + (EPS["bf16"] * np.abs(want) * 1.001 if out_dtype == "bf16" else 0) + 1e-44,
    )


@pytest.mark.parametrize("out_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [6, 33, 576])
def test_rows_are_independent(backend: _core.Backend, width: int, out_dtype: str) -> None:
    rng = np.random.default_rng(3)
    x, gain = normal(rng, 37, width), normal(rng, width)
    together = _core.ops.rms_norm(backend, x, gain, 1e-5, out_dtype)
    for row in (0, 1, 17, 36):
        assert_same_bits(
            _core.ops.rms_norm(backend, x[row : row + 1], gain, 1e-5, out_dtype),
            together[row : row + 1],
        )
    order = rng.permutation(37)
    assert_same_bits(_core.ops.rms_norm(backend, x[order], gain, 1e-5, out_dtype), together[order])
    for threads in (1, 2):
        assert_same_bits(
            _core.ops.rms_norm(with_threads(backend, threads), x, gain, 1e-5, out_dtype), together
        )


@pytest.mark.parametrize("width", [6, 33, 576, 9000])
def test_narrow_outputs_are_the_rounded_wide_one(backend: _core.Backend, width: int) -> None:
    rng = np.random.default_rng(width)
    x, gain = normal(rng, 5, width), normal(rng, width)
    wide = _core.ops.rms_norm(backend, x, gain, 1e-5, "f32")
    for dtype in {activation_dtype(d, backend) for d in ("f32", "f16", "bf16")}:
        got = _core.ops.rms_norm(backend, x, gain, 1e-5, dtype)
        assert_same_bits(got, rounded(wide, dtype), dtype)


def test_rms_norm_refuses_a_gain_of_another_width(backend: _core.Backend) -> None:
    with pytest.raises(ValueError, match=r"^rms_norm.*5.*4"):
        _core.ops.rms_norm(
            backend, np.zeros((2, 4), np.float32), np.zeros(5, np.float32), 1e-5, "f32"
        )
