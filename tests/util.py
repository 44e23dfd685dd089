"""Helpers shared by the tests: number formats, comparisons, random trees, paged caches poisoned
with NaN.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from hypothesis import strategies as st

from medusa_ext import _core

PAGE_TOKENS = 64
DTYPES = ["f32", "f16", "bf16"]
# Unit roundoff: the greatest relative error of rounding to nearest.
EPS = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
U = EPS["f32"]


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """The upper halves of f32 numbers, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded_bits = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), (bits >> 16 | 0x40).astype(np.uint16), rounded_bits)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Bf16 bits as f32 numbers."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """X to the nearest value of dtype, as f32."""
    if dtype == "bf16":
        return from_bf16(bf16_bits(x))
    return (
        np.asarray(x, np.float32)
        .astype({"f16": np.float16, "f32": np.float32}[dtype])
        .astype(np.float32)
    )


def activation_dtype(weight_dtype: str, backend: _core.Backend | None = None) -> str:
    """Element type in which products want their input, and attention its queries."""
    if backend is not None and backend.name != "cpu":
        return weight_dtype
    return "bf16" if weight_dtype == "bf16" else "f32"


def reports_contents(backend: _core.Backend) -> bool:
    """Whether an op names a bad index that lies in memory; a device leaves such rows alone."""
    return backend.name == "cpu"


def fitting_head_dim(backend: _core.Backend, dtype: str, head_dim: int) -> int:
    """The head size, or the next one that this backend takes: CUDA wants rows of 16 bytes."""
    return head_dim if backend.name == "cpu" or dtype == "f32" else -(-head_dim // 8) * 8


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Equal shapes, types and bits; NaNs compare by their bits."""
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    unsigned = f"u{got.dtype.itemsize}"
    differs = np.argwhere(got.view(unsigned) != want.view(unsigned))
    if len(differs):
        at = tuple(differs[0])
        raise AssertionError(
            f"{what}: {len(differs)} of {got.size} differ, "
            f"first at {at}: {got[at]!r} and {want[at]!r}"
        )


def assert_within(got: np.ndarray, want: np.ndarray, bound: np.ndarray | float) -> None:
    """|got - want| <= bound everywhere; NaN fails."""
    assert got.shape == want.shape, f"{got.shape}, {want.shape}"
    error = np.abs(got.astype(np.float64) - want)

    bad = np.argwhere(~(error <= bound))
    if len(bad):
        at = tuple(bad[0])
        limit = np.broadcast_to(bound, error.shape)[at]
        raise AssertionError(
            f"{len(bad)} of {got.size} off, "
            f"first at {at}: {got[at]}, want {want[at]}, bound {limit:.3g}"
        )


def unit_of(backend: _core.Backend) -> str:
    """What computes: the instruction set of the CPU, from its detail line, or the device."""
    return backend.detail.split(",")[0].strip() if backend.name == "cpu" else backend.name


@cache
def backend_for(unit: str, threads: int) -> _core.Backend:
    """One backend for each pair; a device has threads of its own."""
    if unit.startswith("cuda"):
        return _core.Backend(unit)
    return _core.Backend("cpu", threads=threads, isa=unit)


def with_threads(backend: _core.Backend, threads: int) -> _core.Backend:
    """A new backend like this one with another number of threads."""
    if backend.name != "cpu":
        return _core.Backend(backend.name)
    return _core.Backend("cpu", threads=threads, isa=unit_of(backend))


# Trees: lists of parents, node 0 the root with parent -1, parents before children.


def random_parents(
    rng: np.random.Generator, num_nodes: int, bushiness: float, max_children: int = 256
) -> list[int]:
    """0: mostly a chain; 1: mostly children of the root; between: anything."""
    parents = [-1]
    for node in range(1, num_nodes):
        draw = rng.random()
        parent = int(rng.integers(node))
        if draw < bushiness / 2:
            parent = 0
        elif draw > 0.5 + bushiness / 2:
            parent = node - 1
        parents.append(parent if parents.count(parent) < max_children else node - 1)
    return parents


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 64) -> list[int]:
    """Random parents: chains, stars and all between, one node included."""
    num_nodes = draw(st.one_of(st.integers(1, 8), st.integers(1, max_nodes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_parents(rng, num_nodes, draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])))


def within_depth(backend: _core.Backend, parents: list[int]) -> list[int]:
    """The tree, or one no deeper than the backend takes: nodes that are go to the root."""
    shallow, depth = [-1], [0]
    for parent in parents[1:]:
        shallow.append(parent if depth[parent] < backend.max_tree_depth else 0)
        depth.append(depth[shallow[-1]] + 1)
    return shallow


def path_to(parents: list[int], node: int) -> list[int]:
    """Nodes from the root to this one."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def depths(parents: list[int]) -> list[int]:
    """Depth of every node; the root has 0."""
    return [len(path_to(parents, node)) - 1 for node in range(len(parents))]


def random_node_tokens(rng: np.random.Generator, parents: list[int], vocab: int) -> list[int]:
    """Tokens with distinct siblings."""
    tokens = [int(rng.integers(vocab))]
    unused: dict[int, list[int]] = {}
    for parent in parents[1:]:
        tokens.append(unused.setdefault(parent, rng.permutation(vocab).tolist()).pop())
    return tokens


# Rows of a step.

Rows = dict[str, np.ndarray]


def prompt_rows(sequence: int, start: int, count: int) -> Rows:
    """A chunk of a prompt: causal rows start .. start + count - 1."""
    position = np.arange(start, start + count, dtype=np.int32)
    zeros = np.zeros(count, np.int32)
    return {
        "token": zeros,
        "sequence": zeros + np.int32(sequence),
        "position": position,
        "slot": position.copy(),
        "prefix_len": position + 1,
        "ancestors": np.zeros((count, 4), np.uint64),
    }


def tree_rows(sequence: int, length: int, parents: list[int]) -> Rows:
    """A tree whose root follows `length` committed tokens."""
    rows = prompt_rows(sequence, length, len(parents))
    rows["prefix_len"][:] = length
    rows["position"] = np.asarray(depths(parents), np.int32) + np.int32(length)
    for node in range(len(parents)):
        for above in path_to(parents, node):
            rows["ancestors"][node, above // 64] |= np.uint64(1 << (above % 64))
    return rows


def join_rows(*parts: Rows) -> Rows:
    """The rows of several parts in one step."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def pick_rows(rows: Rows, index: np.ndarray | slice | list[int]) -> Rows:
    """Some of the rows."""
    return {name: np.ascontiguousarray(value[index]) for name, value in rows.items()}


def seen_slots(rows: Rows, row: int, window: int = 0) -> list[int]:
    """Slots that a row sees, in logical order, straight from the definition."""
    prefix, words = int(rows["prefix_len"][row]), [int(word) for word in rows["ancestors"][row]]
    slots = list(range(prefix)) + [prefix + j for j in range(256) if words[j // 64] >> (j % 64) & 1]
    first = max(0, int(rows["position"][row]) - window + 1) if window else 0
    return slots[first:]


@dataclass
class PagedCase:
    """A cache of several sequences: all NaN, pages in random order, unused indices out of range.

    The last line of the page table lists all pages in order, so that tests see unowned memory.
    """

    backend: _core.Backend
    capacities: list[int]  # tokens per sequence
    num_layers: int = 1
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    dtype: str = "f32"
    seed: int = 0
    spare_pages: int = 1
    cache: _core.KvCache = field(init=False)
    page_table: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        wanted = [-(-capacity // PAGE_TOKENS) for capacity in self.capacities]
        self.num_pages = sum(wanted) + self.spare_pages
        order = np.random.default_rng(self.seed).permutation(self.num_pages).astype(np.int32)
        table = np.full((len(wanted) + 1, self.num_pages + 1), 1 << 30, np.int32)
        table[:, 1::2] = -(1 << 30)
        taken = 0
        for line, pages in enumerate(wanted):
            table[line, :pages] = order[taken : taken + pages]
            taken += pages
        table[-1, : self.num_pages] = np.arange(self.num_pages)
        self.page_table = table
        self.cache = _core.KvCache(
            self.backend,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            page_table=table,
            num_pages=self.num_pages,
        )

    def write(
        self, rows: Rows, k: np.ndarray, v: np.ndarray, q: np.ndarray | None = None, layer: int = 0
    ) -> np.ndarray:
        """Put k, v [R, Hkv, D] f32 at the rows' slots, unrotated; returns q [R, H, D] as attention
        wants it.
        """
        num_rows = len(rows["slot"])
        q = np.zeros((num_rows, self.num_heads, self.head_dim), np.float32) if q is None else q
        qkv = np.concatenate([part.reshape(num_rows, -1) for part in (q, k, v)], axis=1)
        cos = np.ones((num_rows, self.head_dim // 2), np.float32)
        sin = np.zeros_like(cos)
        return _core.ops.rope_write(
            self.backend, qkv, rows, cos, sin, None, None, 1e-6, self.cache, layer
        )

    def read(
        self, sequence: int, slots: list[int] | range, layer: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """K and V [slots, Hkv, D] f32."""
        pairs = [self.cache.read(layer, sequence, slot) for slot in slots]
        empty = np.zeros((0, self.num_kv_heads, self.head_dim), np.float32)
        return (
            (np.stack([k for k, _ in pairs]), np.stack([v for _, v in pairs]))
            if pairs
            else (empty, empty)
        )

    def dump(self) -> np.ndarray:
        """The whole cache [L, 2, pages * 64, Hkv, D] f32, by page index."""
        line = len(self.capacities)
        return np.stack(
            [
                np.stack(self.read(line, range(self.num_pages * PAGE_TOKENS), i))
                for i in range(self.num_layers)
            ]
        )

    def cells(self, sequence: int, slots: list[int] | range) -> np.ndarray:
        """Where slots of a sequence lie in dump()."""
        slots = np.asarray(slots, np.int64)
        return (
            self.page_table[sequence, slots // PAGE_TOKENS].astype(np.int64) * PAGE_TOKENS
            + slots % PAGE_TOKENS
        )


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal f32 numbers."""
    return (rng.standard_normal(shape) * scale).astype(np.float32)
