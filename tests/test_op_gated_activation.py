"""gated_activation and residual_silu: one number at a time."""

import numpy as np
import pytest
import reference
from medusa_ext import _core
from util import EPS, U, assert_same_bits, assert_within, normal, with_threads

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


def wide_values(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Small, medium and saturating inputs, zeros among them."""
    x = normal(rng, rows, width) * rng.choice(np.float32([1e-3, 1, 5, 30, 200]), (rows, width))
    x.reshape(-1)[::17] = 0
    return x


@pytest.mark.parametrize("out_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 6, 15, 33, 100, 1536])
def test_gated_activation(
    backend: _core.Backend, width: int, activation: str, out_dtype: str
) -> None:
    rng = np.random.default_rng(width)
    gate_up = np.concatenate([wide_values(rng, 40, width), normal(rng, 40, width)], axis=1)
    got = _core.ops.gated_activation(backend, gate_up, activation, out_dtype)
    want = reference.gated_activation(gate_up, activation)
    gate, up = np.split(np.abs(gate_up).astype(np.float64), 2, axis=1)
    # A sigmoid, exp or tanh good to a few units, then two products. For gelu 1 + erf cancels at negative gates,
    # so its error is relative to gate * up, not to the result; silu's stays relative down to where f32 underflows.
    bound = 4 * U * (np.abs(want) if activation == "silu" else gate * up)
    assert_within(
        got,
        want,
        bound + (EPS["bf16"] * np.abs(want) * 1.001 if out_dtype == "bf16" else 0) + 1e-36 * up,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [6, 33, 576])
def test_elements_are_independent(backend: _core.Backend, width: int, activation: str) -> None:
    """The same number gives the same bits wherever it stands: vector body and tail fall alike."""
    rng = np.random.default_rng(1)
    gate, up = normal(rng, 1, 19), normal(rng, 1, 19)
    alone = np.concatenate(
        [
            _core.ops.gated_activation(
                backend, np.concatenate([gate[:, [i]], up[:, [i]]], 1), activation, "f32"
            )
            for i in range(19)
        ],
        1,
    )
    together = _core.ops.gated_activation(backend, np.concatenate([gate, up], 1), activation, "f32")
    assert_same_bits(together, alone)
    x = normal(rng, 31, 2 * width)
    whole = _core.ops.gated_activation(backend, x, activation, "f32")
    for row in (0, 13, 30):
        assert_same_bits(
            _core.ops.gated_activation(backend, x[row : row + 1], activation, "f32"),
            whole[row : row + 1],
        )
    for threads in (1, 2):
        assert_same_bits(
            _core.ops.gated_activation(with_threads(backend, threads), x, activation, "f32"), whole
        )


def test_gated_activation_refuses_an_odd_width(backend: _core.Backend) -> None:
    with pytest.raises(ValueError, match=r"^gated_activation.*5"):
        _core.ops.gated_activation(backend, np.zeros((2, 5), np.float32), "silu", "f32")


def test_gated_activation_refuses_an_unknown_name(backend: _core.Backend) -> None:
    with pytest.raises(ValueError, match="relu"):
        _core.ops.gated_activation(backend, np.zeros((2, 4), np.float32), "relu", "f32")
