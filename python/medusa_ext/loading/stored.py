"""The types that a model's weights have in memory: chosen from headers, before a weight is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from medusa_ext.loading.blocks import BLOCKS
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import FLOAT_BYTES
from medusa_ext.loading.plan import Entry, count
from medusa_ext.options import DTYPES, WEIGHTS, choice

# Scale and minimum cost q4_1 half a bit more than q4_0's scale alone, and lose less.
_QUANTISED = {"q8": "q8_0", "q4": "q4_1"}
_OF_HEADS = "q8_0"  # they only guess, but a wrong guess costs a step
_STACKS = {  # parts of one matrix in memory, see csrc/core/model.cpp
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}
# As the CPU packs blocks (csrc/backend/cpu/kernels/block_layout.h): outputs side by side, inputs at
# once, and bytes of a block; the 6-bit scales of q4_k become whole bytes.
_OUTPUTS, _INPUTS = 32, 64
_PACKED_BYTES = {name: block.num_bytes for name, block in BLOCKS.items()} | {"q4_k": 148}


@dataclass(frozen=True)
class Stored:
    """Types in memory.

    Attributes:
        weights: as it was asked for.
        dtype: of the cache, and of matrices that are not in blocks: "f32", "f16" or "bf16".
        blocks: block types by tensor; the others are not in blocks.
        text: the types of all matrices, that of the most bytes first: "q4_1, q8_0".
    """

    weights: str
    dtype: str
    blocks: Mapping[str, str]
    text: str


def check_types(weights: str, dtype: str) -> None:
    """Refuse, with ValueError, what no model can be stored as."""
    choice("weights", weights, WEIGHTS)
    choice("dtype", dtype, DTYPES)
    if weights in FLOAT_BYTES and dtype not in ("auto", weights):
        raise LoadError(
            f'weights="{weights}" and dtype="{dtype}" contradict each other: dtype is the type of '
            'weights that are not in blocks; give one of the two, or weights="auto"'
        )


def choose_types(
    entries: Sequence[Entry], file_dtype: str, *, weights: str, dtype: str, kind: str
) -> Stored:
    """Choose the type of each matrix.

    Args:
        entries: of the model and its heads.
        file_dtype: what dtype "auto" is for this model.
        weights: "auto" (blocks stay as the file has them, heads beside blocks become q8_0), "q8" or
            "q4" (quantised to q8_0 and q4_1, heads to q8_0), or a float type.
        dtype: of the cache and of what is not in blocks: a float type or "auto".
        kind: of device: "cpu" or "cuda", which has no products for blocks.

    Raises:
        ValueError: the two contradict each other, or there is no such type.
        NotImplementedError: blocks are asked for where there are no products for them.
    """
    check_types(weights, dtype)
    if weights in _QUANTISED and kind != "cpu":
        raise NotImplementedError(
            f'weights="{weights}" is for the CPU: a GPU has no products for weights in blocks; use '
            'weights="auto" or device="cpu"'
        )
    floats = weights if weights in FLOAT_BYTES else file_dtype if dtype == "auto" else dtype
    blocks: dict[str, str] = {}
    if weights not in FLOAT_BYTES and kind == "cpu":
        quantised = any(entry.dtype in BLOCKS for entry in entries)
        for parts in _matrices(entries):
            chosen = {_type_of(entry, weights, quantised) for entry in parts}
            name = chosen.pop()
            block = BLOCKS.get(name) if not chosen else None
            if block is None or any(entry.shape[1] % block.elements for entry in parts):
                continue  # a mixture, floats, or rows that no blocks fill: stays dtype
            blocks |= {entry.name: name for entry in parts}
    sizes: dict[str, int] = {}
    for parts in _matrices(entries):
        name = blocks.get(parts[0].name, floats)
        sizes[name] = sizes.get(name, 0) + _matrix_bytes(parts, blocks, floats)
    text = ", ".join(sorted(sizes, key=lambda name: -sizes[name]))
    return Stored(weights, floats, blocks, text)


def weight_bytes(entries: Iterable[Entry], stored: Stored) -> tuple[int, int]:
    """Bytes of the model and of its heads in memory, but for what layouts of floats are padded by.

    Those of blocks are counted as they are padded.
    """
    entries, sizes = list(entries), [0, 0]
    for entry in entries:
        if len(entry.shape) == 1:  # gains, biases and token maps stay 4 bytes wide
            sizes[_of_heads(entry)] += 4 * count(entry.shape)
    for parts in _matrices(entries):
        sizes[_of_heads(parts[0])] += _matrix_bytes(parts, stored.blocks, stored.dtype)
    return sizes[0], sizes[1]


def _type_of(entry: Entry, weights: str, quantised: bool) -> str:
    """quantised: some entry is in blocks, and heads that are in none beside it become some."""
    if weights == "auto":
        beside = quantised and _of_heads(entry) and entry.dtype not in BLOCKS
        return _OF_HEADS if beside else entry.dtype
    return _OF_HEADS if _of_heads(entry) else _QUANTISED[weights]


def _of_heads(entry: Entry) -> bool:
    return entry.name.startswith("heads.")


def _matrices(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Tensors of rank 2, each with those that one matrix in memory holds beside it."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if len(entry.shape) == 2:
            *prefix, part, _ = entry.name.split(".")
            found.setdefault(".".join([*prefix, _STACKS.get(part, part)]), []).append(entry)
    return list(found.values())


def _matrix_bytes(parts: Sequence[Entry], blocks: Mapping[str, str], dtype: str) -> int:
    kind = blocks.get(parts[0].name)
    if kind is None:
        return sum(count(entry.shape) for entry in parts) * FLOAT_BYTES[dtype]
    outputs, inputs = sum(entry.shape[0] for entry in parts), parts[0].shape[1]
    elements = -(-outputs // _OUTPUTS) * _OUTPUTS * -(-inputs // _INPUTS) * _INPUTS
    return elements // BLOCKS[kind].elements * _PACKED_BYTES[kind]
