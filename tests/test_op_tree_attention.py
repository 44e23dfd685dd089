"""tree_attention: what each row sees, how exactly it is computed, and that its bits depend on
nothing else.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    depths,
    fitting_head_dim,
    join_rows,
    normal,
    path_to,
    pick_rows,
    prompt_rows,
    random_parents,
    reports_contents,
    rounded,
    seen_slots,
    tree_rows,
    trees,
    with_threads,
    within_depth,
)

SHAPES = [
    (1, 1, 2),
    (4, 2, 6),
    (9, 3, 64),
    (8, 1, 80),
    (2, 2, 256),
    (6, 3, 34),
    (8, 8, 16),
    (16, 2, 128),
]


def run_step(
    case: PagedCase,
    rows: Rows,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    window: int = 0,
    out_dtype: str = "f32",
) -> np.ndarray:
    """Write the rows, then attend; scale 1 / sqrt(D)."""
    q = case.write(rows, k, v, q)
    return _core.ops.tree_attention(
        case.backend, q, case.cache, 0, rows, case.head_dim**-0.5, window, out_dtype
    )


def random_qkv(
    rng: np.random.Generator, case: PagedCase, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q with scores that spread over several units, so that the softmax is neither flat nor a
    maximum.
    """
    kv = (count, case.num_kv_heads, case.head_dim)
    return (
        normal(rng, count, case.num_heads, case.head_dim, scale=2),
        normal(rng, *kv),
        normal(rng, *kv),
    )


def check_rows(
    case: PagedCase, rows: Rows, q: np.ndarray, got: np.ndarray, window: int, out_dtype: str
) -> None:
    """Every row against the f64 reference over the K and V that the cache holds."""
    q = rounded(q, activation_dtype(case.dtype, case.backend))
    scale = np.float32(case.head_dim**-0.5)
    group = case.num_heads // case.num_kv_heads
    held = {s: case.read(s, range(case.capacities[s])) for s in set(rows["sequence"].tolist())}
    for row in range(len(q)):
        keys, values = held[int(rows["sequence"][row])]
        seen = seen_slots(rows, row, window)
        k, v = keys[seen], values[seen]
        assert np.isfinite(k).all(), "the test wrote every slot that is seen"
        want = reference.attention(q[row], k, v, scale)
        # A score's error, as in linear, is the relative error of its weight; the norm shares it.
        # exp, the weighted sum over S keys and the quotient add theirs. The output is a convex mix
        # of V, so all of it times max|v|; then its rounding. Measured: at most 0.8 of this.
        size = scale * np.einsum(
            "hd,shd->hs", np.abs(q[row]), np.repeat(np.abs(k), group, axis=1)
        ).max(axis=1, keepdims=True)
        peak = np.repeat(np.abs(v).max(axis=(0, 2)), group)[:, None]
        bound = (
            ((1 + 0.1 * np.sqrt(case.head_dim)) * size + 4 + 0.25 * np.sqrt(len(seen))) * U * peak
        )
        if case.backend.name != "cpu":
            # exp2 of score * log2 e: two more roundings of the score, 2 units of the result.
            bound += (1.5 * size + 4) * U * peak
            if case.dtype != "f32":  # tensor cores take weights of that type, some of them denormal
                bound += (EPS[case.dtype] + len(seen) * 2.0**-25) * peak
        assert_within(
            got[row],
            want,
            bound + (EPS["bf16"] * (np.abs(want) + bound) if out_dtype == "bf16" else 0),
        )


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("f32", "f32"), ("f16", "f32"), ("bf16", "bf16"), ("bf16", "f32")]
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_mixed_step(
    backend: _core.Backend, heads: int, kv_heads: int, head_dim: int, dtype: str, out_dtype: str
) -> None:
    """Chunks of prompts and trees of several sequences side by side, over caches that end anywhere
    in a page.
    """
    rng = np.random.default_rng(head_dim)
    head_dim = fitting_head_dim(backend, dtype, head_dim)
    case = PagedCase(
        backend, [64, 150, 40, 209, 1, 129], 1, heads, kv_heads, head_dim, dtype, seed=2
    )
    for sequence, length in [(1, 130), (3, 189), (5, 64)]:
        rows = prompt_rows(sequence, 0, length)
        case.write(rows, *random_qkv(rng, case, length)[1:])
    rows = join_rows(
        prompt_rows(0, 0, 64),
        tree_rows(1, 130, random_parents(rng, 20, 0.5)),
        tree_rows(2, 0, random_parents(rng, 40, 0.3)),
        tree_rows(3, 189, random_parents(rng, 20, 0.0)),
        tree_rows(4, 0, [-1]),
        prompt_rows(5, 64, 65),
    )
    q, k, v = random_qkv(rng, case, len(rows["slot"]))
    got = run_step(case, rows, q, k, v, 0, out_dtype)
    check_rows(case, rows, q, got, 0, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 5, 63, 64, 65, 100, 1000])
def test_window(backend: _core.Backend, window: int, dtype: str) -> None:
    rng = np.random.default_rng(window)
    case = PagedCase(backend, [140, 230], 1, 4, 2, 32, dtype, seed=3)
    case.write(prompt_rows(1, 0, 190), *random_qkv(rng, case, 190)[1:])
    rows = join_rows(prompt_rows(0, 0, 140), tree_rows(1, 190, random_parents(rng, 40, 0.2)))
    q, k, v = random_qkv(rng, case, len(rows["slot"]))
    check_rows(case, rows, q, run_step(case, rows, q, k, v, window), window, "f32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tree_of_256_nodes(backend: _core.Backend, dtype: str) -> None:
    rng = np.random.default_rng(4)
    for bushiness, length in [(0.0, 0), (0.5, 61), (1.0, 64), (0.1, 300)]:
        case = PagedCase(backend, [length + 256], 1, 4, 2, 16, dtype, seed=4)
        if length:
            case.write(prompt_rows(0, 0, length), *random_qkv(rng, case, length)[1:])
        rows = tree_rows(0, length, within_depth(backend, random_parents(rng, 256, bushiness)))
        q, k, v = random_qkv(rng, case, 256)
        check_rows(case, rows, q, run_step(case, rows, q, k, v), 0, "f32")


def test_extreme_scores(backend: _core.Backend) -> None:
    """Scores of +-1e4 neither overflow nor lose the winner; equal scores give the mean."""
    case = PagedCase(backend, [100], 1, 1, 1, 4)
    rows = prompt_rows(0, 0, 100)
    k = np.zeros((100, 1, 4), np.float32)
    v = normal(np.random.default_rng(5), 100, 1, 4)
    q = np.full((100, 1, 4), 100, np.float32)
    got = run_step(case, rows, q, k, v)
    assert_within(got[99, 0], v[:, 0].astype(np.float64).mean(axis=0), 20 * U * np.abs(v).max())
    k[:, 0] = -50.0
    k[37] = 50.0
    again = run_step(PagedCase(backend, [100], 1, 1, 1, 4), rows, q, k, v)
    assert_same_bits(again[37:, 0], np.broadcast_to(v[37, 0], (63, 4)).copy())


# Bits.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 70])
def test_bits_do_not_depend_on_company(backend: _core.Backend, dtype: str, window: int) -> None:
    """The same sequences alone, together, in another order, in other pages, with other threads."""
    rng = np.random.default_rng(6)
    lengths, sizes = [100, 64, 0, 150], [30, 1, 17, 64]
    parents = [random_parents(rng, size, 0.4) for size in sizes]
    shape: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 24, "dtype": dtype}
    blank = PagedCase(backend, [1], **shape)
    prompts = [random_qkv(rng, blank, length) for length in lengths]
    nodes = [random_qkv(rng, blank, size) for size in sizes]

    def run(order: list[int], threads: int, seed: int) -> dict[int, np.ndarray]:
        case = PagedCase(
            with_threads(backend, threads),
            [lengths[i] + sizes[i] for i in order],
            seed=seed,
            **shape,
        )
        for line, i in enumerate(order):
            if lengths[i]:
                case.write(prompt_rows(line, 0, lengths[i]), *prompts[i][1:])
        rows = join_rows(*(tree_rows(line, lengths[i], parents[i]) for line, i in enumerate(order)))
        q, k, v = (np.concatenate([nodes[i][part] for i in order]) for part in range(3))
        out = run_step(case, rows, q, k, v, window)
        ends = np.cumsum([sizes[i] for i in order])
        return {i: out[end - sizes[i] : end] for i, end in zip(order, ends, strict=True)}

    together = run([0, 1, 2, 3], 1, 1)
    for order, threads, seed in [
        ([0, 1, 2, 3], 2, 1),
        ([3, 1, 0, 2], 2, 2),
        ([0], 1, 3),
        ([1], 2, 4),
        ([2], 1, 5),
        ([3], 2, 6),
    ]:
        for i, out in run(order, threads, seed).items():
            assert_same_bits(out, together[i], f"sequence {i} in {order}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_bits_do_not_depend_on_chunks(backend: _core.Backend, dtype: str, window: int) -> None:
    """A prompt in one piece, in random chunks, row by row, and as chains of tree nodes gives the
    same bits.
    """
    rng = np.random.default_rng(8)
    head_dim = fitting_head_dim(backend, dtype, 20)
    shape: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    length = 205
    whole = PagedCase(backend, [length], **shape)
    q, k, v = random_qkv(rng, whole, length)
    want = run_step(whole, prompt_rows(0, 0, length), q, k, v, window)
    for cuts in [
        range(1, length),
        [1, 64, 65, 128],
        [63, 127, 191],
        sorted(rng.choice(length, 6, replace=False).tolist()),
    ]:
        for as_tree in (False, True):
            case = PagedCase(backend, [length], seed=9, **shape)
            ends = [0, *cuts, length]
            for start, end in pairwise(ends):
                count = end - start
                rows = (
                    tree_rows(0, start, [*range(-1, count - 1)])
                    if as_tree and count - 1 <= backend.max_tree_depth
                    else prompt_rows(0, start, count)
                )
                if count:
                    out = run_step(case, rows, q[start:end], k[start:end], v[start:end], window)
                    assert_same_bits(out, want[start:end], f"rows {start} to {end}, tree {as_tree}")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    parents=trees(max_nodes=256),
    length=st.sampled_from([0, 1, 37, 63, 64, 65, 126, 127, 128, 130, 255, 1023]),
    data=st.data(),
)
def test_a_node_is_its_path(
    backend: _core.Backend, parents: list[int], length: int, data: st.DataObject
) -> None:
    """A node's output has the bits that causal attention over prefix and path gives, in pages of
    its own.
    """
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype, window = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([0, 3, 66]))
    heads, kv_heads, head_dim = data.draw(st.sampled_from([(2, 1, 8), (3, 3, 64), (4, 2, 18)]))
    head_dim = fitting_head_dim(backend, dtype, head_dim)
    parents = within_depth(backend, parents)
    shape: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    case = PagedCase(backend, [length + len(parents)], seed=1, **shape)
    prompt = random_qkv(rng, case, length)
    q, k, v = random_qkv(rng, case, len(parents))
    if length:
        case.write(prompt_rows(0, 0, length), *prompt[1:])
    out = run_step(case, tree_rows(0, length, parents), q, k, v, window)

    depth = depths(parents)
    leaves = sorted(set(range(len(parents))) - set(parents), key=lambda node: -depth[node])[:4]
    for leaf in leaves:
        path = path_to(parents, leaf)
        chain = PagedCase(backend, [length + len(path)], seed=2, **shape)
        if length:
            chain.write(prompt_rows(0, 0, length), *prompt[1:])
        want = run_step(chain, prompt_rows(0, length, len(path)), q[path], k[path], v[path], window)
        assert_same_bits(out[path], want, f"path to {leaf}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_siblings_permute_outputs(backend: _core.Backend, dtype: str) -> None:
    """Renumbering the nodes, parents still first, moves the outputs and changes no bit."""
    rng = np.random.default_rng(10)
    parents = random_parents(rng, 90, 0.5)
    keys = rng.random(90)
    order = sorted(range(90), key=lambda node: (depths(parents)[node], keys[node]))
    place = {node: new for new, node in enumerate(order)}
    renamed = [-1 if parents[node] < 0 else place[parents[node]] for node in order]
    results = []
    for tree, index in [(parents, list(range(90))), (renamed, order)]:
        case = PagedCase(backend, [190], 1, 4, 2, 16, dtype, seed=len(results))
        draws = np.random.default_rng(11)
        prompt, nodes = random_qkv(draws, case, 100), random_qkv(draws, case, 90)
        case.write(prompt_rows(0, 0, 100), *prompt[1:])
        results.append(run_step(case, tree_rows(0, 100, tree), *(part[index] for part in nodes)))
    assert order != sorted(order)
    assert_same_bits(results[1], results[0][order])


def test_some_rows_of_a_step(backend: _core.Backend) -> None:
    """Attention of any subset of rows over what is already written: nothing but the row matters."""
    rng = np.random.default_rng(12)
    case = PagedCase(backend, [200], 1, 4, 2, 16, "bf16")
    case.write(prompt_rows(0, 0, 120), *random_qkv(rng, case, 120)[1:])
    rows = tree_rows(0, 120, random_parents(rng, 80, 0.5))
    q, k, v = random_qkv(rng, case, 80)
    q = case.write(rows, k, v, q)
    whole = _core.ops.tree_attention(backend, q, case.cache, 0, rows, 0.25, 0, "f32")
    for count in (1, 2, 3, 7, 16, 33):
        index = rng.permutation(80)[:count]
        part = _core.ops.tree_attention(
            backend, q[index], case.cache, 0, pick_rows(rows, index), 0.25, 0, "f32"
        )
        assert_same_bits(part, whole[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_size_of_the_step(backend: _core.Backend, dtype: str) -> None:
    """A tree has the same bits alone and beside a prompt so long that a device cuts the work in
    another way. Its own context is long enough to be cut.
    """
    rng = np.random.default_rng(13)
    case = PagedCase(backend, [440, 300], 1, 64, 8, 8, dtype)
    case.write(prompt_rows(0, 0, 420), *random_qkv(rng, case, 420)[1:])
    rows = join_rows(tree_rows(0, 420, random_parents(rng, 20, 0.4)), prompt_rows(1, 0, 300))
    q, k, v = random_qkv(rng, case, 320)
    together = run_step(case, rows, q, k, v)
    for index in [np.arange(20), np.arange(3, 4), np.arange(20, 25), np.arange(319, 320)]:
        part = pick_rows(rows, index)
        assert_same_bits(run_step(case, part, q[index], k[index], v[index]), together[index])


@pytest.mark.parametrize("window", [0, 900])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_context(backend: _core.Backend, dtype: str, window: int) -> None:
    """A context that is cut into several parts, in one step with a short one that alone is not."""
    rng = np.random.default_rng(14)
    case = PagedCase(backend, [1600, 140], 1, 6, 2, 40, dtype)
    length = 1530
    case.write(prompt_rows(0, 0, length), *random_qkv(rng, case, length)[1:])
    case.write(prompt_rows(1, 0, 120), *random_qkv(rng, case, 120)[1:])
    rows = join_rows(
        tree_rows(0, length, random_parents(rng, 30, 0.3)),
        tree_rows(1, 120, random_parents(rng, 10, 0.3)),
    )
    q, k, v = random_qkv(rng, case, 40)
    got = run_step(case, rows, q, k, v, window)
    check_rows(case, rows, q, got, window, "f32")
    for row in (0, 7, 29, 33):
        alone = run_step(case, pick_rows(rows, [row]), q[[row]], k[[row]], v[[row]], window)
        assert_same_bits(alone, got[[row]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_that_share_long_contexts(backend: _core.Backend, dtype: str) -> None:
    """Few queries of several texts, long and short: on two threads K and V are cut by pages."""
    lengths, sizes = [1500, 70, 1100], [2, 2, 1]
    outs = []
    # V by whole tiles on 2 and 3 threads, by tiles and columns on 4, by columns alone on 7.
    for threads in (1, 2, 3, 4, 7):
        rng = np.random.default_rng(15)
        case = PagedCase(
            with_threads(backend, threads), [1510, 80, 1110], 1, 6, 2, 40, dtype, seed=threads
        )
        for line, length in enumerate(lengths):
            case.write(prompt_rows(line, 0, length), *random_qkv(rng, case, length)[1:])
        rows = join_rows(
            *(
                tree_rows(line, length, random_parents(rng, size, 0.3))
                for line, (length, size) in enumerate(zip(lengths, sizes, strict=True))
            )
        )
        q, k, v = random_qkv(rng, case, 5)
        outs.append(run_step(case, rows, q, k, v))
        check_rows(case, rows, q, outs[-1], 0, "f32")
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


def test_unseen_infinities_leave_no_trace(backend: _core.Backend) -> None:
    """A node with infinite values and NaN keys spoils its descendants and nobody else."""
    rng = np.random.default_rng(15)
    parents = random_parents(rng, 40, 0.3)
    sees = np.array([7 in path_to(parents, node) for node in range(40)])
    assert 1 < sees.sum() < 30
    results = []
    for broken in (False, True):
        case = PagedCase(backend, [190], 1, 4, 2, 16, "bf16")
        draws = np.random.default_rng(16)
        case.write(prompt_rows(0, 0, 150), *random_qkv(draws, case, 150)[1:])
        q, k, v = random_qkv(draws, case, 40)
        if broken:
            k[7], v[7] = np.nan, np.inf
        results.append(run_step(case, tree_rows(0, 150, parents), q, k, v))
    assert_same_bits(results[1][~sees], results[0][~sees])
    assert np.isnan(results[1][sees]).any(axis=(1, 2)).all()


def test_tree_attention_refuses_odd_rows_of_16_bits(backend: _core.Backend) -> None:
    if fitting_head_dim(backend, "bf16", 18) == 18:
        pytest.skip("this backend takes every head size")
    case = PagedCase(backend, [1], 1, 2, 1, 18, "bf16")
    one = random_qkv(np.random.default_rng(0), case, 1)
    with pytest.raises(NotImplementedError, match=r"^tree_attention: head_dim is 18; "):
        run_step(case, prompt_rows(0, 0, 1), *one)


def test_tree_attention_refuses_wrong_arguments(backend: _core.Backend) -> None:
    case = PagedCase(backend, [10], 1, 4, 2, 16)
    rows = prompt_rows(0, 0, 3)
    good = np.zeros((3, 4, 16), np.float32)
    for q, layer, window in [
        (np.zeros((3, 3, 16), np.float32), 0, 0),  # 3 heads over 2
        (np.zeros((3, 4, 18), np.float32), 0, 0),
        (np.zeros((2, 4, 16), np.float32), 0, 0),
        (good, 1, 0),
        (good, 0, -1),
    ]:
        with pytest.raises(ValueError, match=r"^tree_attention"):
            _core.ops.tree_attention(backend, q, case.cache, layer, rows, 0.25, window, "f32")


def test_tree_attention_refuses_wrong_rows(backend: _core.Backend) -> None:
    if not reports_contents(backend):
        pytest.skip("this device does not report what lies in memory")
    case = PagedCase(backend, [10], 1, 4, 2, 16)
    rows = prompt_rows(0, 0, 3)
    good = np.zeros((3, 4, 16), np.float32)
    tree = tree_rows(0, 5, [-1, 0, 1])
    for base, name, value in [
        (rows, "prefix_len", 900),  # prefix and ancestors must make up the position
        (rows, "prefix_len", 0),
        (rows, "sequence", -1),
        (rows, "position", -1),
        (tree, "ancestors", 1 << 40),
    ]:
        wrong = {**base, name: np.full_like(base[name], value)}
        with pytest.raises(ValueError, match=r"^tree_attention: row 0"):
            _core.ops.tree_attention(backend, good, case.cache, 0, wrong, 0.25, 0, "f32")
    far = prompt_rows(0, 70, 3)  # on a page that the table does not name
    with pytest.raises(ValueError, match=r"^tree_attention: page 1 of sequence 0"):
        _core.ops.tree_attention(backend, good, case.cache, 0, far, 0.25, 0, "f32")
