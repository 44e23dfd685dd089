"""rope_write: norm of the q and k heads, rotation, and K and V put into the paged cache."""

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import (
    DTYPES,
    EPS,
    PagedCase,
    Rows,
    U,
    activation_dtype,
    assert_same_bits,
    assert_within,
    join_rows,
    normal,
    pick_rows,
    prompt_rows,
    random_parents,
    reports_contents,
    rounded,
    tree_rows,
    with_threads,
)


def make_rows(rng: np.random.Generator) -> Rows:
    """Two prompt chunks that cross page borders and two trees, of four sequences."""
    return join_rows(
        prompt_rows(0, 0, 70),
        tree_rows(1, 63, random_parents(rng, 20, 0.5)),
        prompt_rows(2, 120, 11),
        tree_rows(3, 0, [-1]),
    )


CAPACITIES = [70, 83, 131, 1]


def cos_sin(rows: Rows, rotary: int) -> tuple[np.ndarray, np.ndarray]:
    angles = rows["position"][:, None] * 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary"),
    [
        (1, 1, 2, 2),
        (4, 2, 6, 6),
        (9, 3, 64, 64),
        (8, 1, 80, 32),
        (2, 2, 256, 256),
        (6, 2, 16, 10),
        (3, 3, 34, 34),
    ],
)
def test_rope_write(
    backend: _core.Backend,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    dtype: str,
    gains: bool,
) -> None:
    rng = np.random.default_rng(head_dim)
    rows = make_rows(rng)
    num_rows = len(rows["slot"])
    case = PagedCase(backend, CAPACITIES, 2, heads, kv_heads, head_dim, dtype, seed=1)
    qkv = normal(rng, num_rows, (heads + 2 * kv_heads) * head_dim)
    cos, sin = cos_sin(rows, rotary)
    q_gain, k_gain = (
        (normal(rng, head_dim) + 1, normal(rng, head_dim) + 1) if gains else (None, None)
    )
    before = case.dump()
    q = _core.ops.rope_write(backend, qkv, rows, cos, sin, q_gain, k_gain, 1e-5, case.cache, 1)

    parts = qkv.reshape(num_rows, heads + 2 * kv_heads, head_dim)
    stored = [
        case.cache.read(1, int(s), int(t))
        for s, t in zip(rows["sequence"], rows["slot"], strict=True)
    ]
    k, v = np.stack([pair[0] for pair in stored]), np.stack([pair[1] for pair in stored])
    assert_same_bits(v, rounded(parts[:, heads + kv_heads :], dtype), "V")

    for got, part, gain, out_dtype in [
        (q, parts[:, :heads], q_gain, activation_dtype(dtype, backend)),
        (k, parts[:, heads : heads + kv_heads], k_gain, dtype),
    ]:
        x = part if gain is None else reference.rms_norm(part, gain, np.float32(1e-5))
        want = reference.rotate(x, cos, sin)
        # Norm as in rms_norm; then two products and a sum, three units of |a cos| + |b sin| <= |a|
        # + |b|; then the rounding to the type stored (f16 has subnormals).
        half = cos.shape[1]
        pair = np.abs(x).astype(np.float64)
        pair[..., : 2 * half] = np.tile(pair[..., :half] + pair[..., half : 2 * half], 2)
        bound = (2 + (0 if gain is None else 4 + 0.5 * np.sqrt(head_dim))) * U * pair
        assert_within(
            got,
            want,
            bound
            + (EPS[out_dtype] * (np.abs(want) + bound) + 2.0**-25 if out_dtype != "f32" else 0),
        )
        assert_same_bits(got, rounded(got, out_dtype), "holds values of its type")

    after = case.dump()
    written = np.zeros(case.num_pages * 64, bool)
    for sequence, slot in zip(rows["sequence"], rows["slot"], strict=True):
        written[case.cells(int(sequence), [int(slot)])] = True
    assert_same_bits(after[:, :, ~written], before[:, :, ~written], "slots of nobody")
    assert_same_bits(after[0], before[0], "the other layer")
    assert written.sum() == num_rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_row_alone(backend: _core.Backend, dtype: str) -> None:
    """Rows one at a time, in any order of sequences, and with any number of threads write the same
    bits.
    """
    rng = np.random.default_rng(7)
    rows = make_rows(rng)
    num_rows, heads, kv_heads, head_dim = len(rows["slot"]), 4, 2, 32
    qkv = normal(rng, num_rows, (heads + 2 * kv_heads) * head_dim)
    cos, sin = cos_sin(rows, head_dim)
    gain = normal(rng, head_dim)

    def run(steps: list[np.ndarray], threads: int) -> tuple[np.ndarray, np.ndarray]:
        case = PagedCase(
            with_threads(backend, threads), CAPACITIES, 1, heads, kv_heads, head_dim, dtype, seed=1
        )
        q = np.full((num_rows, heads, head_dim), np.nan, np.float32)
        for index in steps:
            q[index] = _core.ops.rope_write(
                case.backend,
                qkv[index],
                pick_rows(rows, index),
                cos[index],
                sin[index],
                gain,
                gain,
                1e-5,
                case.cache,
                0,
            )
        return q, case.dump()

    everything = np.arange(num_rows)
    whole = run([everything], 1)
    for steps, threads in [
        ([everything], 2),
        ([everything[i : i + 1] for i in everything], 1),
        ([everything[::-1].copy()], 2),
    ]:
        q, cache = run(steps, threads)
        assert_same_bits(q, whole[0])
        assert_same_bits(cache, whole[1])


def test_rope_write_refuses_wrong_shapes(backend: _core.Backend) -> None:
    case = PagedCase(backend, [10], 1, 2, 1, 16)
    rows = prompt_rows(0, 0, 3)
    cos = np.ones((3, 8), np.float32)
    good = np.zeros((3, 4 * 16), np.float32)
    bad_calls = [
        (good[:, :-1].copy(), cos, None, 0),  # not a whole number of heads
        (good[:, :32].copy(), cos, None, 0),  # no q head
        (good, np.ones((3, 9), np.float32), None, 0),  # rotates more than head_dim
        (good, np.ones((2, 8), np.float32), None, 0),
        (good, cos, np.ones(15, np.float32), 0),
        (good, cos, None, 1),
        (good, cos, None, -1),
    ]
    for qkv, table, gain, layer in bad_calls:
        with pytest.raises(ValueError, match=r"^rope_write"):
            _core.ops.rope_write(
                backend, qkv, rows, table, table, gain, None, 1e-5, case.cache, layer
            )
    assert np.isnan(case.dump()).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("slot", 700), ("slot", -1), ("slot", 64), ("sequence", -1), ("sequence", 9)],
)
def test_rows_without_a_page_write_nothing(backend: _core.Backend, name: str, value: int) -> None:
    """Slot 64 lies on a page that the table does not name. The other rows go on on a device."""
    case = PagedCase(backend, [10], 1, 2, 1, 16)
    rows, rng = prompt_rows(0, 0, 3), np.random.default_rng(4)
    rows[name][1] = value
    qkv, cos = normal(rng, 3, 4 * 16), np.ones((3, 8), np.float32)

    def write() -> np.ndarray:
        return _core.ops.rope_write(
            backend, qkv, rows, cos, np.zeros_like(cos), None, None, 1e-5, case.cache, 0
        )

    if reports_contents(backend):
        with pytest.raises(ValueError, match=rf"^rope_write.*{name} {value}"):
            write()
        assert np.isnan(case.dump()).all()
        return
    assert_same_bits(write(), qkv[:, :32].reshape(3, 2, 16))
    after, cells = case.dump(), case.cells(0, [0, 2])
    assert_same_bits(after[0, 0, cells, 0], qkv[[0, 2], 32:48])
    assert_same_bits(after[0, 1, cells, 0], qkv[[0, 2], 48:])
    assert np.isnan(np.delete(after, cells, axis=2)).all()
