"""residual_silu: the block of a Medusa head."""

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import U, assert_same_bits, assert_within, normal, with_threads


@pytest.mark.parametrize("width", [1, 6, 33, 576])
def test_residual_silu(backend: _core.Backend, width: int) -> None:
    rng = np.random.default_rng(width)
    y, u = normal(rng, 40, width, scale=5), normal(rng, 40, width)
    want = reference.residual_silu(y, u)
    # silu to a few units of itself, then one sum.
    assert_within(
        _core.ops.residual_silu(backend, y, u), want, U * (5 * np.abs(want - u) + np.abs(want))
    )


def test_rows_are_independent(backend: _core.Backend) -> None:
    rng = np.random.default_rng(1)
    y, u = normal(rng, 21, 100), normal(rng, 21, 100)
    whole = _core.ops.residual_silu(backend, y, u)
    for row in (0, 11, 20):
        assert_same_bits(
            _core.ops.residual_silu(backend, y[row : row + 1], u[row : row + 1]),
            whole[row : row + 1],
        )
    for threads in (1, 2):
        assert_same_bits(_core.ops.residual_silu(with_threads(backend, threads), y, u), whole)


def test_zero_changes_nothing(backend: _core.Backend) -> None:
    """silu(0) = 0: a head whose block weights and biases are zero passes its input through."""
    u = normal(np.random.default_rng(2), 3, 33)
    assert_same_bits(_core.ops.residual_silu(backend, np.zeros_like(u), u), u)


def test_residual_silu_refuses_unequal_shapes(backend: _core.Backend) -> None:
    with pytest.raises(
        ValueError, match=r"^residual_silu.*\[2, 4\].*\[2, 5\]|^residual_silu.*\[2, 5\].*\[2, 4\]"
    ):
        _core.ops.residual_silu(backend, np.zeros((2, 4), np.float32), np.zeros((2, 5), np.float32))
