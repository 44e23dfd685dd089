"""norm_linear and gated_linear: bit for bit what the two ops do one after the other."""

import numpy as np
import pytest

from block_util import random_blocks
from medusa_ext import _core
from util import DTYPES, activation_dtype, assert_same_bits, normal

TYPES = [*DTYPES, "q8_0", "q4_1"]


def weight_of(rng: np.random.Generator, backend: _core.Backend, dtype: str) -> np.ndarray:
    if dtype in DTYPES:
        return normal(rng, 70, 96, scale=0.1)
    if backend.name != "cpu":
        pytest.skip("this backend stores no weights in blocks")
    return random_blocks(rng, 70, 96, dtype)


@pytest.mark.parametrize("rows", [1, 3, 21, 22, 130])
@pytest.mark.parametrize("dtype", TYPES)
def test_norm_linear(backend: _core.Backend, dtype: str, rows: int) -> None:
    rng = np.random.default_rng(1)
    weight = weight_of(rng, backend, dtype)
    x, gain, bias = normal(rng, rows, 96), normal(rng, 96), normal(rng, 70)
    normed = _core.ops.rms_norm(backend, x, gain, 1e-5, activation_dtype(dtype, backend))
    want = _core.ops.linear(backend, normed, weight, dtype, bias)
    got = _core.ops.norm_linear(backend, x, gain, 1e-5, weight, dtype, bias)
    assert_same_bits(got, want)


@pytest.mark.parametrize("rows", [1, 3, 21, 22, 130])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TYPES)
def test_gated_linear(backend: _core.Backend, dtype: str, activation: str, rows: int) -> None:
    rng = np.random.default_rng(2)
    weight = weight_of(rng, backend, dtype)
    gate_up, bias, residual = normal(rng, rows, 192), normal(rng, 70), normal(rng, rows, 70)
    gated = _core.ops.gated_activation(
        backend, gate_up, activation, activation_dtype(dtype, backend)
    )
    want = _core.ops.linear(backend, gated, weight, dtype, bias, residual)
    got = _core.ops.gated_linear(backend, gate_up, activation, weight, dtype, bias, residual)
    assert_same_bits(got, want)
