"""linear: a matrix times few or many rows, one fixed order of summing for each (row, output)."""

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import (
    DTYPES,
    U,
    activation_dtype,
    assert_same_bits,
    assert_within,
    normal,
    rounded,
    with_threads,
)


def make_case(
    backend: _core.Backend,
    rng: np.random.Generator,
    rows: int,
    outputs: int,
    inputs: int,
    dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """x and W with values that bf16 and f16 do not hold exactly."""
    return rounded(normal(rng, rows, inputs), activation_dtype(dtype, backend)), normal(
        rng, outputs, inputs, scale=0.1
    )


def bound_of(
    x: np.ndarray,
    stored: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """A unit roundoff of every partial sum, none of which exceeds sum |x w| + |bias| + |residual|.

    At worst K + 2 of them add up; signs are random, so that 3 + sqrt(K) / 4 is never passed
    (measured: at most 0.8 of it, and 0.3 for K = 576).
    """
    size = np.abs(x).astype(np.float64) @ np.abs(stored).astype(np.float64).T
    size += (0 if bias is None else np.abs(bias)) + (0 if residual is None else np.abs(residual))
    return (3 + 0.25 * np.sqrt(x.shape[1])) * U * size


@pytest.mark.parametrize("extra", ["", "bias", "residual", "bias+residual"])
@pytest.mark.parametrize("inputs", [2, 6, 34, 576])
@pytest.mark.parametrize("outputs", [1, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(backend: _core.Backend, dtype: str, outputs: int, inputs: int, extra: str) -> None:
    rng = np.random.default_rng(outputs * 1000 + inputs)
    for rows in (1, 2, 3, 5, 8, 13, 16, 40):
        x, weight = make_case(backend, rng, rows, outputs, inputs, dtype)
        bias = normal(rng, outputs) if "bias" in extra else None
        residual = normal(rng, rows, outputs) if "residual" in extra else None
        got = _core.ops.linear(backend, x, weight, dtype, bias, residual)
        stored = rounded(weight, dtype)
        want = reference.linear(x, stored, bias, residual)
        assert_within(got, want, bound_of(x, stored, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(backend: _core.Backend, dtype: str) -> None:
    rng = np.random.default_rng(4)
    x, weight = make_case(backend, rng, 513, 100, 192, dtype)
    got = _core.ops.linear(backend, x, weight, dtype)
    stored = rounded(weight, dtype)
    assert_within(got, reference.linear(x, stored), bound_of(x, stored))


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_is_rounded_to_the_activation_type(backend: _core.Backend, dtype: str) -> None:
    """With the identity as weight the output shows what the product read."""
    x = normal(np.random.default_rng(5), 9, 64)
    got = _core.ops.linear(backend, x, np.eye(64, dtype=np.float32), dtype)
    assert_same_bits(got, rounded(x, activation_dtype(dtype, backend)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 576), (33, 6), (100, 34), (260, 576), (20, 1100)]
)
def test_bits_do_not_depend_on_other_rows(
    backend: _core.Backend, dtype: str, outputs: int, inputs: int
) -> None:
    rng = np.random.default_rng(6)
    x, weight = make_case(backend, rng, 150, outputs, inputs, dtype)
    bias = normal(rng, outputs)
    alone = np.concatenate(
        [_core.ops.linear(backend, x[r : r + 1], weight, dtype, bias) for r in range(len(x))]
    )
    for rows in [*range(2, 41), 64, 65, 100, 127, 128, 150]:
        start = int(rng.integers(0, len(x) - rows + 1))
        got = _core.ops.linear(backend, x[start : start + rows], weight, dtype, bias)
        assert_same_bits(got, alone[start : start + rows], f"{rows} rows from {start}")
    order = rng.permutation(len(x))
    assert_same_bits(
        _core.ops.linear(backend, x[order], weight, dtype, bias), alone[order], "permuted"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_other_outputs(backend: _core.Backend, dtype: str) -> None:
    rng = np.random.default_rng(7)
    x, weight = make_case(backend, rng, 5, 70, 96, dtype)
    together = _core.ops.linear(backend, x, weight, dtype)
    for first, last in [(0, 1), (13, 14), (69, 70), (3, 36)]:
        part = np.ascontiguousarray(weight[first:last])
        assert_same_bits(
            _core.ops.linear(backend, x, part, dtype), np.ascontiguousarray(together[:, first:last])
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 40, 130])
def test_bits_do_not_depend_on_threads(backend: _core.Backend, dtype: str, rows: int) -> None:
    rng = np.random.default_rng(8)
    x, weight = make_case(backend, rng, rows, 301, 160, dtype)
    residual = normal(rng, rows, 301)
    one, two, three = (
        _core.ops.linear(with_threads(backend, n), x, weight, dtype, None, residual)
        for n in (1, 2, 3)
    )
    assert_same_bits(one, two)
    assert_same_bits(one, three)


def test_non_finite_inputs_stay_in_their_row(backend: _core.Backend) -> None:
    rng = np.random.default_rng(9)
    for dtype in DTYPES:
        x, weight = make_case(backend, rng, 6, 40, 64, dtype)
        clean = _core.ops.linear(backend, x, weight, dtype)
        x[2, 5], x[4, 63] = np.nan, np.inf
        got = _core.ops.linear(backend, x, weight, dtype)
        assert np.isnan(got[2]).all()
        assert not np.isfinite(got[4]).any()
        assert_same_bits(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("inputs", [1, 7, 33])
def test_an_odd_number_of_inputs(backend: _core.Backend, inputs: int) -> None:
    """f32 and f16 take any; bf16 multiplies in pairs on the CPU, which says so."""
    rng = np.random.default_rng(10)
    for dtype in ("f32", "f16") if backend.name == "cpu" else DTYPES:
        x, weight = make_case(backend, rng, 5, 40, inputs, dtype)
        stored = rounded(weight, dtype)
        got = _core.ops.linear(backend, x, weight, dtype)
        assert_within(got, reference.linear(x, stored), bound_of(x, stored))
    if backend.name == "cpu":
        with pytest.raises(NotImplementedError, match=rf"{inputs} inputs"):
            _core.ops.linear(backend, x, weight, "bf16")


def test_linear_refuses_wrong_shapes(backend: _core.Backend) -> None:
    x, weight = np.zeros((2, 6), np.float32), np.zeros((5, 8), np.float32)
    with pytest.raises(ValueError, match=r"^linear.*6.*8"):
        _core.ops.linear(backend, x, weight, "f32")
    with pytest.raises(ValueError, match=r"^linear.*bias.*4.*5"):
        _core.ops.linear(
            backend, np.zeros((2, 8), np.float32), weight, "f32", np.zeros(4, np.float32)
        )
