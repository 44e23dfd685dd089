"""Threads and limits: bits do not follow the caller's floating-point mode, absurd sizes fail at
once.
"""

import re
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from medusa_ext import _core
from util import (
    PagedCase,
    assert_same_bits,
    normal,
    prompt_rows,
    reports_contents,
    with_threads,
)

DENORMAL = np.float32(1e-39)


@pytest.fixture
def flushing() -> Iterator[ModuleType]:
    """This thread takes denormals for zero, as torch lets a caller choose."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield torch
    torch.set_flush_denormal(False)


def tiny_products() -> tuple[np.ndarray, np.ndarray]:
    """x and W whose products are denormal; large enough that several threads share the work."""
    rng = np.random.default_rng(1)
    return normal(rng, 3, 256, scale=1e-20), normal(rng, 600, 256, scale=1e-20)


@pytest.fixture
def cpu(backend: _core.Backend) -> _core.Backend:
    """The backends whose arithmetic the caller's float mode could reach."""
    if backend.name != "cpu":
        pytest.skip("the float mode of host threads is none of a device's")
    return backend


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("outputs", [5, 600])
def test_linear_keeps_denormals(
    cpu: _core.Backend, threads: int, outputs: int, request: pytest.FixtureRequest
) -> None:
    x, weight = tiny_products()
    weight = np.ascontiguousarray(weight[:outputs])
    want = _core.ops.linear(with_threads(cpu, 1), x, weight, "f32")
    assert np.count_nonzero(want) > 0.9 * want.size
    early = with_threads(cpu, threads)
    request.getfixturevalue("flushing")
    late = with_threads(cpu, threads)  # its workers inherit the mode of this thread
    for one in (early, late):
        assert_same_bits(_core.ops.linear(one, x, weight, "f32"), want)


def test_small_ops_keep_denormals(cpu: _core.Backend, request: pytest.FixtureRequest) -> None:
    """Too small to share: computed on the caller's thread."""
    y = np.full((1, 16), DENORMAL, np.float32)
    zeros = np.zeros_like(y)
    want = _core.ops.residual_silu(cpu, y, zeros)
    assert np.all(want > 0)
    request.getfixturevalue("flushing")
    assert_same_bits(_core.ops.residual_silu(cpu, y, zeros), want)


def test_verify_keeps_denormals(cpu: _core.Backend, request: pytest.FixtureRequest) -> None:
    """The greatest logit is denormal: flushed, it would tie with id 0."""
    logits = np.zeros((1, 8), np.float32)
    logits[0, 5] = DENORMAL
    request.getfixturevalue("flushing")
    _, tokens = _core.ops.verify(cpu, logits, [1], [-1], _core.SamplingParams())
    assert tokens == [5]


def test_mode_of_the_caller_is_restored(cpu: _core.Backend, flushing: ModuleType) -> None:
    _core.ops.linear(cpu, *tiny_products(), "f32")
    x = flushing.tensor([1e-39])
    assert float((x * 1.0)[0]) == 0.0


@pytest.mark.parametrize("ancestor", [0, 200, 255])
@pytest.mark.parametrize("prefix", [2**31 - 1, 2**31 - 64, 2**31 - 200])
def test_attention_refuses_slots_near_the_end_of_int(
    backend: _core.Backend, prefix: int, ancestor: int
) -> None:
    if not reports_contents(backend):
        pytest.skip("this device does not report what lies in memory")
    case = PagedCase(backend, [64])
    rows = prompt_rows(0, 0, 1)
    rows["prefix_len"][:] = prefix
    rows["position"][:] = prefix
    rows["ancestors"][0, ancestor // 64] = np.uint64(1 << (ancestor % 64))
    q = np.zeros((1, 2, 16), np.float32)
    with pytest.raises(ValueError, match=f"slot {prefix + ancestor}"):
        _core.ops.tree_attention(backend, q, case.cache, 0, rows, 1.0, 0, "f32")


def test_memory_beyond_the_machine_is_refused() -> None:
    backend = _core.Backend(threads=1)
    with pytest.raises(MemoryError) as error:
        _core.KvCache(
            backend,
            num_layers=64,
            num_kv_heads=64,
            head_dim=256,
            dtype="f32",
            page_table=np.zeros((1, 1), np.int32),
            num_pages=100_000,
        )
    found = re.fullmatch(r"(\d+) bytes asked, (\d+) bytes free", str(error.value))
    assert found is not None, str(error.value)
    assert int(found[1]) == 100_000 * 64 * 64 * 64 * 256 * 2 * 4
    assert int(found[2]) < int(found[1])
