"""gather_rows."""

import numpy as np
import pytest

from medusa_ext import _core
from util import activation_dtype, assert_same_bits, normal, reports_contents, rounded


@pytest.mark.parametrize("out_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [1, 6, 33, 576])
def test_gather_rows(backend: _core.Backend, width: int, out_dtype: str) -> None:
    rng = np.random.default_rng(width)
    x = normal(rng, 25, width)
    for index in ([0], [24, 0, 24, 7], rng.integers(0, 25, 60).tolist()):
        got = _core.ops.gather_rows(backend, x, np.asarray(index, np.int32), out_dtype)
        assert_same_bits(got, rounded(x[index], out_dtype))


def test_every_type_of_the_backend(backend: _core.Backend) -> None:
    x = normal(np.random.default_rng(1), 9, 37)
    index = np.asarray([8, 8, 0, 3], np.int32)
    for dtype in {activation_dtype(d, backend) for d in ("f32", "f16", "bf16")}:
        got = _core.ops.gather_rows(backend, x, index, dtype)
        assert_same_bits(got, rounded(x[index], dtype), dtype)


@pytest.mark.parametrize("bad", [-1, 3, 1 << 30, -(1 << 31)])
def test_rows_that_do_not_exist(backend: _core.Backend, bad: int) -> None:
    x = np.ones((3, 4), np.float32)
    index = np.asarray([0, bad, 2], np.int32)
    if reports_contents(backend):
        with pytest.raises(ValueError, match=rf"^gather_rows.*{bad}.*3"):
            _core.ops.gather_rows(backend, x, index, "f32")
    else:  # zeros, which is what a line that has ended gives to the heads
        got = _core.ops.gather_rows(backend, x, index, "f32")
        assert_same_bits(got, x * np.float32([[1], [0], [1]]))
