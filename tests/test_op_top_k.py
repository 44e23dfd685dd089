"""top_k: the greatest of each row, ties to the lower id."""

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import assert_same_bits, normal, with_threads


def check(backend: _core.Backend, x: np.ndarray, k: int) -> None:
    ids, values = _core.ops.top_k(backend, x, k)
    assert ids.tolist() == reference.top_k(x, k).tolist()
    assert_same_bits(values, np.take_along_axis(x, ids.astype(np.int64), 1))


@pytest.mark.parametrize(
    ("vocab", "k"),
    [
        (1, 1),
        (5, 5),
        (33, 1),
        (100, 10),
        (256, 256),
        (1000, 256),
        (1021, 31),
        (49152, 10),
        (70001, 256),
    ],
)
def test_top_k(backend: _core.Backend, vocab: int, k: int) -> None:
    rng = np.random.default_rng(vocab)
    check(backend, normal(rng, 7, vocab), k)
    check(backend, rng.integers(-3, 3, (7, vocab)).astype(np.float32), k)  # mostly ties
    check(backend, np.sort(normal(rng, 2, vocab), axis=1), k)
    check(backend, -np.sort(normal(rng, 2, vocab), axis=1), k)


def test_equal_values_keep_the_order_of_ids(backend: _core.Backend) -> None:
    check(backend, np.zeros((2, 333), np.float32), 50)
    ids, _ = _core.ops.top_k(backend, np.float32([[0.0, -0.0, 0.0, -0.0, -1.0]]), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]  # the zeros are equal


def test_infinities(backend: _core.Backend) -> None:
    x = normal(np.random.default_rng(1), 3, 90)
    x[:, 10:80] = -np.inf
    x[1, 85] = x[1, 3] = np.inf
    check(backend, x, 60)
    check(backend, np.full((1, 40), -np.inf, np.float32), 12)


def test_nan_comes_last(backend: _core.Backend) -> None:
    """A NaN is never preferred to a number, and ids stay distinct and valid."""
    x = normal(np.random.default_rng(2), 2, 70)
    x[0, :60] = np.nan
    x[1] = np.nan
    ids, _ = _core.ops.top_k(backend, x, 20)
    assert ids[0, :10].tolist() == (60 + reference.top_k(x[:1, 60:], 10)[0]).tolist()
    for row in ids:
        assert len(set(row.tolist())) == 20
        assert row.min() >= 0
        assert row.max() < 70


def test_rows_and_threads(backend: _core.Backend) -> None:
    x = normal(np.random.default_rng(3), 9, 3000)
    whole = _core.ops.top_k(backend, x, 40)[0]
    assert _core.ops.top_k(backend, x[4:5], 40)[0].tolist() == whole[4:5].tolist()
    for threads in (1, 2):
        assert _core.ops.top_k(with_threads(backend, threads), x, 40)[0].tolist() == whole.tolist()


def test_top_k_refuses_impossible_k(backend: _core.Backend) -> None:
    x = np.zeros((2, 300), np.float32)
    for bad in (0, 257):
        with pytest.raises(ValueError, match=rf"^top_k.*{bad}"):
            _core.ops.top_k(backend, x, bad)
    with pytest.raises(ValueError, match=r"^top_k.*11.*10"):
        _core.ops.top_k(backend, x[:, :10].copy(), 11)
