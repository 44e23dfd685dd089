"""Weights in blocks as GGUF files hold them: sizes, values, and files of this package's own.

A block is so many consecutive inputs of one output, with a scale and often a minimum in f16:

    q8_0   32   d, q [32] i8                       d q
    q4_0   32   d, q [32] u4                       d (q - 8)
    q4_1   32   d, m, q [32] u4                    d q + m
    q4_k  256   d, n, (s, t) [8] u6, q [8, 32] u4  d s q - n t

In bytes, 4-bit values i and i + 16 (q4_k: i and i + 32 of 64) share one, the first below.
Source: ggml's block formats, https://github.com/ggml-org/llama.cpp.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import SafetensorsTensors
from medusa_ext.options import shown

BLOCKS_KEY = "medusa_ext.blocks"  # in an exported file: JSON, block type by tensor
_CHUNK = 1 << 20  # elements expanded at once: 4 MB of f32
_NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """Sizes of a block: its values, its bytes, and the f16 numbers that it starts with."""

    elements: int
    num_bytes: int
    scales: int


BLOCKS = {
    "q8_0": BlockType(32, 34, 1),
    "q4_0": BlockType(32, 18, 1),
    "q4_1": BlockType(32, 20, 2),
    "q4_k": BlockType(256, 144, 2),
}


def row_bytes(kind: str, elements: int) -> int:
    """Bytes of a row of so many values, which whole blocks must hold."""
    block = BLOCKS[kind]
    return elements // block.elements * block.num_bytes


def scales_are_finite(kind: str, rows: Bytes) -> bool:
    """Whether all scales and minima of rows of blocks [rows, bytes] are numbers."""
    block = BLOCKS[kind]
    bits = rows.reshape(-1, block.num_bytes)[:, 1 : 2 * block.scales : 2]  # the upper bytes
    return not bool(((bits & 0x7C) == 0x7C).any())


def dequantise(kind: str, rows: Bytes) -> Floats:
    """Rows of blocks [rows, bytes] -> values [rows, elements]; each operation rounds to f32."""
    block = BLOCKS[kind]
    blocks = np.ascontiguousarray(rows).reshape(-1, block.num_bytes)
    head = 2 * block.scales
    scales = np.ascontiguousarray(blocks[:, :head]).view(np.float16).astype(np.float32)
    scale, data = scales[:, :1], blocks[:, head:]
    if kind == "q8_0":
        values = scale * data.view(np.int8)
    elif kind == "q4_k":
        values = _q4_k(scales, data)
    else:
        nibbles = np.concatenate([data & 15, data >> 4], axis=1)
        if kind == "q4_0":
            values = scale * (nibbles.astype(np.int8) - np.int8(8))
        else:
            values = scale * nibbles + scales[:, 1:]
    return values.astype(np.float32, copy=False).reshape(len(rows), -1)


def _q4_k(scales: Floats, data: Bytes) -> Floats:
    """[blocks, 2] and [blocks, 12 + 128] -> [blocks, 256].

    The 12 bytes hold 6 bits each of s and t: bytes 0 to 7 those of the first four pairs, whose
    upper two bits complete the others, in bytes 8 to 11: s below, t above.
    """
    low, high, packed = data[:, :4], data[:, 4:8], data[:, 8:12]
    s = np.concatenate([low & 63, (packed & 15) | (low >> 6 << 4)], axis=1)
    t = np.concatenate([high & 63, (packed >> 4) | (high >> 6 << 4)], axis=1)
    quads = data[:, 12:].reshape(-1, 4, 1, 32)
    nibbles = np.concatenate([quads & 15, quads >> 4], axis=2).reshape(-1, 8, 32)
    values: Floats = (scales[:, :1] * s)[..., None] * nibbles - (scales[:, 1:] * t)[..., None]
    return values.reshape(-1, 256)


def quantise(kind: str, array: NDArray[Any], given: str) -> Bytes:
    """Rows of floats (bf16 as uint16) -> rows of q8_0 or q4_1 blocks, bit for bit as the core does.

    The rules stand in csrc/backend/cpu/block_weight.h. A block that cannot hold its values, which
    the caller looks for, has a scale or minimum that is no finite number.
    """
    columns = array.shape[1]
    out: Bytes = np.empty((len(array), row_bytes(kind, columns)), np.uint8)
    step = max(1, _CHUNK // columns)
    for first in range(0, len(array), step):
        part = array[first : first + step]
        if given == "bf16":
            part = (part.astype(np.uint32) << np.uint32(16)).view(np.float32)
        groups = part.astype(np.float32).reshape(-1, BLOCKS[kind].elements)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            blocks = _q8_0(groups) if kind == "q8_0" else _q4_1(groups)
        out[first : first + step] = blocks.reshape(len(part), -1)
    return out


def _q8_0(groups: Floats) -> Bytes:
    d = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    q = (groups * _inverse(d)).astype(np.float64)  # in which half is added without rounding
    q = np.clip(np.trunc(q + np.copysign(0.5, q)), -127, 127)
    return np.concatenate([_f16(d), q.astype(np.int8).view(np.uint8)], axis=1)


def _q4_1(groups: Floats) -> Bytes:
    m = groups.min(1, keepdims=True)
    d = (groups.max(1, keepdims=True) - m) / np.float32(15)
    q = np.floor((groups - m) * _inverse(d) + np.float32(0.5))
    low, high = np.split(np.clip(q, 0, 15).astype(np.uint8), 2, axis=1)
    return np.concatenate([_f16(d), _f16(m), low | high << np.uint8(4)], axis=1)


def _inverse(d: Floats) -> Floats:
    """1 / d; 0 for a group so small that its scale is none."""
    inverse: Floats = np.float32(1) / d
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _f16(values: Floats) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def expand(kind: str, rows: Bytes, dtype: str) -> NDArray[Any]:
    """Rows of blocks as "f32", "f16" or "bf16" (uint16), rounded to nearest even; in pieces."""
    block = BLOCKS[kind]
    columns = rows.shape[1] // block.num_bytes * block.elements
    out: NDArray[Any] = np.empty((len(rows), columns), _NUMPY[dtype])
    step = max(1, _CHUNK // columns)
    for first in range(0, len(rows), step):
        values = dequantise(kind, rows[first : first + step])
        out[first : first + step] = round_bf16(values) if dtype == "bf16" else values
    return out


def round_bf16(values: Floats) -> NDArray[np.uint16]:
    """F32 -> bf16 bits, to nearest even; the values are finite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: NDArray[np.uint32] = (bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)
    return rounded.astype(np.uint16)


def blocks_to_json(blocks: Mapping[str, str]) -> str:
    """The value of BLOCKS_KEY."""
    return json.dumps(dict(sorted(blocks.items())))


class ExportedTensors(SafetensorsTensors):
    """An exported file: matrices may lie in blocks there, as U8 [rows, bytes]."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError where the metadata and the tensors disagree."""
        super().__init__(path)
        self.blocks = self._read_blocks()

    def _read_blocks(self) -> dict[str, str]:
        try:
            found = json.loads(self.metadata.get(BLOCKS_KEY, "{}"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise LoadError(
                f"{self.path}: the metadata {BLOCKS_KEY} is damaged; export the model again"
            )
        names = set(self.names())
        for name, kind in found.items():
            if name not in names:
                raise LoadError(
                    f"{self.path}: the metadata {BLOCKS_KEY} names the tensor {shown(name)}, "
                    "which the file does not hold"
                )
            block = BLOCKS.get(kind) if isinstance(kind, str) else None
            if block is None:
                raise LoadError(
                    f"{self.path}: tensor {name} is in blocks of the type {shown(kind)}; this "
                    f"version reads {', '.join(BLOCKS)}"
                )
            shape, word = super().shape(name), super().dtype(name)
            if word != "U8" or len(shape) != 2 or shape[1] % block.num_bytes:
                raise LoadError(
                    f"{self.path}: tensor {name} holds {word} {list(shape)}; {kind} blocks lie in "
                    f"U8 [rows, a multiple of {block.num_bytes}]"
                )
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorFile; counts values."""
        shape, kind = super().shape(name), self.blocks.get(name)
        if kind is None:
            return shape
        block = BLOCKS[kind]
        return shape[0], shape[1] // block.num_bytes * block.elements

    def dtype(self, name: str) -> str:
        """See TensorFile; a block type by its name."""
        return self.blocks.get(name) or super().dtype(name)

    def expands(self, dtype: str) -> bool:
        """Whether blocks of this type can be read."""
        return dtype in BLOCKS

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """See TensorFile."""
        kind = self.blocks.get(name)
        if kind is None:
            return super().read(name, dtype)
        return expand(kind, self.read_blocks(name), dtype), dtype

    def read_rows(self, name: str, dtype: str, rows: NDArray[Any]) -> NDArray[Any]:
        """See BlockFile."""
        return expand(self.blocks[name], self.read_blocks(name)[rows], dtype)

    def read_blocks(self, name: str) -> Bytes:
        """The blocks as they are, [rows, bytes]."""
        rows: Bytes = self.file.array(name)
        if not scales_are_finite(self.blocks[name], rows):
            raise LoadError(f"{self.path}: tensor {name} holds scales that are no finite numbers")
        return rows
