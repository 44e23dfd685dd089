"""The memory of an engine, planned from a checkpoint's headers before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from medusa_ext import _core
from medusa_ext.calibration.file import STATIC, auto_tree, find_calibration, kind_of_trees
from medusa_ext.device import check_model, kind_of, open_device
from medusa_ext.loading import Checkpoint, Stored, weight_bytes
from medusa_ext.loading.files import FLOAT_BYTES
from medusa_ext.options import integer
from medusa_ext.trees import Tree, tree_for

PAGE_TOKENS = 64
DEFAULT_CACHE_TOKENS = 16384
_MAX_NODES = 256  # of a tree; slots of one may lie beyond the context
_MAX_RANKED = 256  # candidates of a head
_F32 = 4
# Per row of a pass: token, sequence, position, slot, visible prefix, prompt length, two indices,
# and a bit for every node of the largest tree.
_ROW_BYTES = 8 * 4 + _MAX_NODES // 8
# What CUDA kernels take as they first need it: partial sums of products, the state of the steps,
# what verifying keeps between kernels, and smaller pieces that these outgrew;
_KERNEL_BYTES = 256 << 20
# and partial sums of attention, whose cap and bound are those of tree_attention.cu for the GPUs of
# today: 64 (2 multiprocessors + kv heads) pairs of a row and a head, one part for 512 tokens.
_MAX_PARTIAL_BYTES = 512 << 20
_MULTIPROCESSORS = 160
# A shorter context than this is no help to anybody.
_LEAST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of a session, checked.

    Attributes:
        max_batch: sequences side by side.
        max_context: tokens of prompt and output; None: the model's own.
        cache_tokens: of all sequences; None: min(max_batch * max_context, 16384).
        prefill_chunk: tokens of prompts in one pass.
    """

    max_batch: int = 8
    max_context: int | None = None
    cache_tokens: int | None = None
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        """Check types and ranges; ValueError."""
        integer("max_batch", self.max_batch, 1, 1024)
        integer("prefill_chunk", self.prefill_chunk, 1, 8192)
        if self.cache_tokens is not None:
            integer("cache_tokens", self.cache_tokens, 1, 2**30)
        if self.max_context is not None:  # the upper bound is the model's
            integer("max_context", self.max_context, 2)

    def within(self, model_context: int) -> Limits:
        """Return the limits for a model; ValueError where it has less context."""
        if self.max_context is None:
            return replace(self, max_context=model_context)
        integer("max_context", self.max_context, 2, model_context)
        return self

    @property
    def context(self) -> int:
        """What `within` chose."""
        assert self.max_context is not None
        return self.max_context

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds: never less than one whole context."""
        tokens = self.cache_tokens
        if tokens is None:
            tokens = min(self.max_batch * self.context, DEFAULT_CACHE_TOKENS)
        return max(tokens, self.context)


@dataclass(frozen=True, slots=True)
class Guesses:
    """What a drafter adds to a step: nodes of a tree (the root counted), heads that run."""

    max_nodes: int = 1
    heads: int = 0

    @staticmethod
    def of(
        tree: _core.TreeSpec | None, drafter: _core.Drafter | None, heads: int | None = None
    ) -> Guesses:
        """Those of a tree for Medusa heads, of another drafter, or of none.

        `heads` are those of a model whose trees are dynamic, of as many nodes as `tree` has.
        """
        if tree is not None:
            deepest = tree.depth if heads is None else min(heads, tree.num_nodes - 1)
            return Guesses(tree.num_nodes, deepest)
        if drafter is not None:
            return Guesses(integer("the drafter's max_nodes", drafter.max_nodes, 1, _MAX_NODES))
        return Guesses()


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the memory of an engine depends on.

    Attributes:
        checkpoint: model and heads.
        device: "cpu" or "cuda".
        stored: types of weights and cache.
        limits: of the session, within the model's.
        guesses: of the drafter.
    """

    checkpoint: Checkpoint
    device: str
    stored: Stored
    limits: Limits
    guesses: Guesses = Guesses()

    def changed(self, **limits: int) -> Sizes:
        """Return these sizes with other limits."""
        return replace(self, limits=replace(self.limits, **limits))

    def with_types(self, **types: str) -> Sizes:
        """Return these sizes with weights or dtype chosen anew."""
        weights = types.get("weights", self.stored.weights)
        dtype = "auto" if weights in FLOAT_BYTES else types.get("dtype", self.stored.dtype)
        return replace(self, stored=self.checkpoint.stored(weights, dtype, self.device))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by what they are for.

    Attributes:
        weights: the model.
        heads: the Medusa heads.
        cache: keys and values.
        workspace: activations and logits of a pass, and what the heads compute.
        kernels: that kernels of a device need for themselves, at most.
    """

    weights: int
    heads: int
    cache: int
    workspace: int
    kernels: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.heads + self.cache + self.workspace + self.kernels

    def __str__(self) -> str:
        """The parts that are not nothing, in MiB."""
        names = ("weights", "heads", "cache", "workspace", "kernels")
        parts = [(name, getattr(self, name)) for name in names]
        return ", ".join(f"{name} {mebibytes(size)}" for name, size in parts if size)


def plan(sizes: Sizes) -> MemoryPlan:
    """Return what an engine of these sizes takes, but for what layouts of floats are padded by.

    The formulas are those of csrc/core/scheduler.cpp (cache), forward.cpp (workspace) and
    head_runner.cpp (heads); tests hold them equal.
    """
    weights, heads = weight_bytes(sizes.checkpoint.entries, sizes.stored)
    return MemoryPlan(
        weights,
        heads,
        cache_bytes(sizes),
        workspace_bytes(sizes) + _draft_bytes(sizes),
        _kernel_bytes(sizes),
    )


def cache_bytes(sizes: Sizes) -> int:
    """K and V of all pages."""
    config = sizes.checkpoint.config
    pages = -(-sizes.limits.tokens // PAGE_TOKENS)
    elements = 2 * config["num_layers"] * config["num_kv_heads"] * config["head_dim"]
    return pages * PAGE_TOKENS * int(elements) * FLOAT_BYTES[sizes.stored.dtype]


def workspace_bytes(sizes: Sizes) -> int:
    """Activations and logits of the greatest pass."""
    config = sizes.checkpoint.config
    d, f, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_heads"] * head_dim, config["num_kv_heads"] * head_dim
    logit_rows = sizes.limits.max_batch * sizes.guesses.max_nodes
    rows = sizes.limits.prefill_chunk + logit_rows
    residual, rotary = 4 * d, 2 * len(config["rope"]["inv_freq"])
    row = residual + (q + 2 * kv) + 2 * q + 3 * f + rotary
    logits = logit_rows * (d + config["vocab_size"])
    return int(rows * row + logits) * _F32 + rows * _ROW_BYTES


def _draft_bytes(sizes: Sizes) -> int:
    """States, logits and candidates of the heads."""
    config, heads = sizes.checkpoint.config, sizes.checkpoint.config["heads"]
    if not sizes.guesses.heads:
        return 0
    rows = sizes.limits.max_batch * sizes.guesses.heads
    vocab = heads["head_vocab"] or config["vocab_size"]
    return rows * _F32 * int(2 * config["hidden_size"] + vocab + 2 * _MAX_RANKED)


def _kernel_bytes(sizes: Sizes) -> int:
    """Bytes that kernels of the device need between them, at most."""
    if sizes.device == "cpu":
        return 0
    config = sizes.checkpoint.config
    pairs = 64 * (2 * _MULTIPROCESSORS + int(config["num_kv_heads"]))
    parts = 6 + sizes.limits.context // 512
    partial = parts * (pairs + int(config["num_heads"])) * (int(config["head_dim"]) + 2) * _F32
    return _KERNEL_BYTES + min(_MAX_PARTIAL_BYTES, partial)


def check_memory(sizes: Sizes, backend: _core.Backend) -> None:
    """Refuse what the device cannot hold.

    Raises:
        MemoryError: bytes wanted and free, and what would fit.
    """
    room, wanted = _room(backend), plan(sizes)
    if wanted.total <= room:
        return
    free, total = backend.memory()
    raise MemoryError(
        f"the model does not fit: it wants {wanted.total} bytes ({wanted}), and {backend.name} has "
        f"{free} bytes free of {total}; {advice(sizes, room)}"
    )


def fits(sizes: Sizes, backend: _core.Backend) -> bool:
    """Whether the device holds an engine of these sizes."""
    return _fits(sizes, _room(backend))


def _room(backend: _core.Backend) -> int:
    """Bytes that an engine may take.

    A GPU must have them free now. On a CPU memory is committed as it is used, so that the limit is
    all that this process may ever use.
    """
    free, total = backend.memory()
    return total if kind_of(backend.name) == "cpu" else free


@dataclass(frozen=True, slots=True)
class Forecast:
    """What an engine would take of a device, and whether it is there.

    Attributes:
        device: its name.
        plan: bytes wanted.
        cache_tokens: that the cache would hold.
        stored: types of weights and cache.
        detail: of the device; None where it is absent.
        free: bytes; None where it is absent.
        device_total: bytes; None where it is absent.
        absent: why the device cannot be used; None where it can.
        advice: what would fit; None where all fits, or the device is absent.
    """

    device: str
    plan: MemoryPlan
    cache_tokens: int
    stored: Stored
    detail: str | None = None
    free: int | None = None
    device_total: int | None = None
    absent: str | None = None
    advice: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        del values["stored"]
        return {**values, "total": self.plan.total}


def forecast(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    limits: Limits,
    *,
    weights: str = "auto",
    tree: Tree = "auto",
    guesses: bool = True,
) -> Forecast:
    """Plan an engine without making one; the device may be absent.

    Args:
        checkpoint: model and heads.
        device: as for `Engine`.
        dtype: as for `Engine`.
        limits: of the session.
        weights: as for `Engine`.
        tree: as for `Engine`.
        guesses: whether prompt lookup guesses where there are no heads.

    Raises:
        ValueError: an argument is impossible.
        NotImplementedError: the device's kernels do not compute this model.
    """
    if device == "auto":
        device = "cuda" if "cuda" in _core.available_devices() else "cpu"
    backend, absent = None, None
    try:
        backend = open_device(device)
    except (NotImplementedError, _core.CudaError) as error:
        absent = str(error)
    kind = kind_of(device)
    stored = checkpoint.stored(weights, dtype, kind)
    check_model(checkpoint.config, stored.dtype, kind)
    threads = 0 if backend is None else backend.threads
    found = find_calibration(checkpoint)
    trees = kind_of_trees(None, tree, found, kind)
    auto = auto_tree(found, kind, stored, threads, trees)
    spec = tree_for(checkpoint.config, tree, *auto)
    heads = None if trees == STATIC else checkpoint.config["heads"]["num_heads"]
    drafter = _core.prompt_lookup_drafter() if guesses else None
    sizes = Sizes(
        checkpoint,
        kind,
        stored,
        limits.within(checkpoint.config["max_context"]),
        Guesses.of(spec, drafter, heads),
    )
    made = Forecast(device, plan(sizes), sizes.limits.tokens, stored, absent=absent)
    if backend is None:
        return made
    free, total = backend.memory()
    room = _room(backend)
    return replace(
        made,
        detail=backend.detail,
        free=free,
        device_total=total,
        advice=None if made.plan.total <= room else advice(sizes, room),
    )


def advice(sizes: Sizes, room: int) -> str:
    """Say which options would bring an engine below `room` bytes."""
    alone = [f"{name}={value!r}" for name, value in _smaller(sizes, room)]
    if alone:
        return f"{' or '.join(alone)} would fit"
    least = replace(sizes, limits=replace(sizes.limits, max_batch=1, cache_tokens=None))
    for types in [_half(sizes), {"weights": "q4"}][: 2 if sizes.device == "cpu" else 1]:
        smaller = least.with_types(**types)
        context = _greatest_context(smaller, room)
        if context is not None:
            given = "".join(f'{name}="{value}", ' for name, value in types.items())
            return f"{given}max_batch=1 and max_context={context} together would fit"
    return "no option makes it fit; take a smaller model or another device"


def _half(sizes: Sizes) -> dict[str, str]:
    """The option that makes f32 half as large; none where it is smaller already."""
    if sizes.stored.dtype != "f32":
        return {}
    return {"weights" if sizes.stored.weights == "f32" else "dtype": "bf16"}


def _smaller(sizes: Sizes, room: int) -> list[tuple[str, object]]:
    """Options that suffice alone, each with the greatest value that does."""
    limits = sizes.limits
    found: list[tuple[str, object]] = []
    types = [_half(sizes)] if _half(sizes) else []
    if sizes.device == "cpu":
        types += [{"weights": "q8"}, {"weights": "q4"}]
    for one in types:
        if _fits(sizes.with_types(**one), room):
            found += one.items()
            break  # the one that changes the values least
    numbers = {
        "max_batch": _greatest(
            lambda count: _fits(sizes.changed(max_batch=count), room), 1, limits.max_batch
        ),
        "cache_tokens": _greatest(
            lambda count: _fits(sizes.changed(cache_tokens=count), room),
            limits.context,
            limits.tokens,
        ),
        "max_context": _greatest_context(sizes, room),
    }
    found += [(name, value) for name, value in numbers.items() if value is not None]
    return found


def _greatest_context(sizes: Sizes, room: int) -> int | None:
    context = sizes.limits.context
    return _greatest(
        lambda count: _fits(sizes.changed(max_context=count), room),
        min(_LEAST_CONTEXT, context),
        context,
    )


def _fits(sizes: Sizes, room: int) -> bool:
    return plan(sizes).total <= room


def _greatest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the greatest number in [low, high] that fits, None where not even `low` does."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def mebibytes(num_bytes: int) -> str:
    """`1,234.5 MiB`."""
    return f"{num_bytes / 2**20:,.1f} MiB"
