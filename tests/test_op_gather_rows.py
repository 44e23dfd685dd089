"""gather_rows."""

import numpy as np
import pytest

from medusa_ext import _core
from util import assert_same_bits, normal, rounded


@pytest.mark.parametrize("out_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [1, 6, 33, 576])
def test_gather_rows(backend: _core.Backend, width: int, out_dtype: str) -> None:
    rng = np.random.default_rng(width)
    x = normal(rng, 25, width)
    for index in ([0], [24, 0, 24, 7], rng.integers(0, 25, 60).tolist()):
        got = _core.ops.gather_rows(backend, x, np.asarray(index, np.int32), out_dtype)
        assert_same_bits(got, rounded(x[index], out_dtype))


def test_gather_rows_refuses_rows_that_do_not_exist(backend: _core.Backend) -> None:
    x = np.zeros((3, 4), np.float32)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"^gather_rows.*{bad}.*3"):
            _core.ops.gather_rows(backend, x, np.asarray([0, bad], np.int32), "f32")
