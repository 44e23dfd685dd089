"""Medusa heads in every format that exists (A to F): names and shapes -> canonical tensors."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.config import NO_HEADS, Config, read_json
from medusa_ext.loading.errors import LoadError, shape_text
from medusa_ext.loading.files import (
    ArrayTensors,
    PickledTensors,
    SafetensorsTensors,
    TensorFile,
)
from medusa_ext.loading.hf import HEAD_PREFIXES, has_weights, open_weights
from medusa_ext.loading.plan import Entry, TensorSet

_FILES: list[tuple[str, Callable[[Path], TensorFile], str]] = [
    ("medusa_lm_head.safetensors", SafetensorsTensors, "B"),
    ("medusa_lm_head.pt", PickledTensors, "A"),
]


@dataclass(frozen=True)
class HeadsInfo:
    """What heads a model was given. `format` is a letter A to F, or "export"."""

    format: str
    num_heads: int
    num_layers: int
    shared_lm_head: bool
    head_vocab: int  # rows of each projection
    path: Path


@dataclass
class Heads:
    """Heads that were found and checked, nothing read yet."""

    info: HeadsInfo
    config: Config  # HeadsConfig
    entries: list[Entry]
    lm_head: Entry | None = None  # the copy of the model's own that E may hold; not loaded


@dataclass(frozen=True)
class _Style:
    """How one family of formats spells its tensors."""

    block: re.Pattern[str]  # head, layer, kind
    projection: re.Pattern[str]  # head, and for original files the layer count
    block_name: str  # what `block` matches, to name one that is missing


_N = r"(0|[1-9]\d{0,3})"  # one spelling per number, so that no name stands for another
_ORIGINAL = _Style(
    re.compile(rf"{_N}\.{_N}\.linear\.(weight|bias)"),
    re.compile(rf"{_N}\.{_N}\.weight"),
    "{}.{}.linear.{}",
)
_VLLM = _Style(
    re.compile(rf"blocks\.{_N}\.layers\.{_N}\.(weight|bias)"),
    re.compile(rf"(?:lm_heads\.{_N}|lm_head)\.()weight"),
    "blocks.{}.layers.{}.{}",
)


def open_heads(folder: Path, base: Config) -> Heads:
    """The heads of a directory.

    Args:
        folder: a directory in one of the formats A to F.
        base: the canonical configuration of the model they are for.

    Raises:
        LoadError: no heads there, or heads that are damaged, unsupported or for another model.
    """
    path = folder / "config.json"
    raw = read_json(path) if path.is_file() else {}
    for name, kind, letter in _FILES:
        if (folder / name).is_file():
            tensors = TensorSet([kind(folder / name)])
            return _Reader(tensors, "", _ORIGINAL, letter, raw, base, path).read()
    if raw.get("model_type") == "medusa":
        return _open_vllm(open_weights(folder), raw, base, path)
    heads = heads_inside(open_weights(folder), raw, base, path) if has_weights(folder) else None
    if heads is None:
        raise LoadError(
            f"{folder} holds no Medusa heads; wanted medusa_lm_head.safetensors, "
            'medusa_lm_head.pt, a config.json with model_type "medusa", or tensors medusa_head.*'
        )
    return heads


def heads_inside(tensors: TensorSet, raw: Config, base: Config, path: Path) -> Heads | None:
    """Heads stored beside the base model's own tensors (formats D and F), or None."""
    for prefix, letter in zip(HEAD_PREFIXES, "DF", strict=True):
        if any(name.startswith(prefix) for name in tensors):
            return _Reader(tensors, prefix, _ORIGINAL, letter, raw, base, path).read()
    announced = _announced(raw)[0]
    if announced:
        warnings.warn(
            f"{path} announces {announced} Medusa heads, but the weights hold none", stacklevel=2
        )
    return None


def _announced(raw: Config) -> tuple[int | None, int | None]:
    """Head and layer counts that a config claims, in any format's spelling."""
    inner = raw.get("medusa")
    if isinstance(inner, dict):
        return inner.get("num_medusa_heads"), inner.get("num_medusa_layers")
    if raw.get("model_type") == "medusa":
        return raw.get("num_heads"), raw.get("num_hidden_layers")
    return raw.get("medusa_num_heads"), raw.get("medusa_num_layers")


class _Reader:
    """One pass over the names of one set of heads."""

    def __init__(
        self,
        tensors: TensorSet,
        prefix: str,
        style: _Style,
        letter: str,
        raw: Config,
        base: Config,
        path: Path,
    ) -> None:
        self.tensors, self.prefix, self.style = tensors, prefix, style
        self.letter, self.raw, self.path = letter, raw, path
        self.hidden, self.vocab = base["hidden_size"], base["vocab_size"]
        self.blocks: dict[tuple[int, int, str], str] = {}
        self.projections: dict[int, tuple[int, str]] = {}
        self.map_key: str | None = None
        for name in tensors:
            if not name.startswith(prefix):
                if not prefix:
                    self._refuse(name)
                continue
            self._sort(name, name[len(prefix) :], style)
        self._count()

    def _sort(self, name: str, rest: str, style: _Style) -> None:
        file = self.tensors.where[name]
        if rest.endswith(("input_scale", "weight_scale")) or file.dtype(name).startswith("F8"):
            raise LoadError(
                f"{file.path}: tensor {name} belongs to FP8 heads, which are not supported"
            )
        if block := style.block.fullmatch(rest):
            self.blocks[int(block[1]), int(block[2]), block[3]] = name
        elif projection := style.projection.fullmatch(rest):
            head = int(projection[1] or 0)
            if head in self.projections:
                self._refuse(name)
            self.projections[head] = (int(projection[2] or 0), name)
        elif rest == "token_map" and style is _VLLM:
            self.map_key = name
        else:
            self._refuse(name)

    def _refuse(self, name: str) -> None:
        shape = shape_text(self.tensors.shape(name))
        raise LoadError(
            f"{self.tensors.where[name].path}: tensor {name} of shape {shape} is no part of "
            "Medusa heads"
        )

    def _count(self) -> None:
        """Counts come from the names: published configs lie."""
        heads = {head for head, _, _ in self.blocks} | set(self.projections)
        self.num_heads = max(heads, default=-1) + 1
        self.num_layers = max((layer for _, layer, _ in self.blocks), default=-1) + 1
        if self.num_heads == 0:
            raise LoadError(f"{self.tensors.describe()} holds no tensor of Medusa heads")
        claims = zip(
            ("heads", "layers"),
            _announced(self.raw),
            (self.num_heads, self.num_layers),
            strict=True,
        )
        for what, claimed, counted in claims:
            if claimed is not None and claimed != counted:
                warnings.warn(
                    f"{self.path} announces {claimed} Medusa {what}, the weights hold {counted}; "
                    f"{counted} are loaded",
                    stacklevel=2,
                )
        for key in self.blocks.values():
            shape = self.tensors.shape(key)
            if shape[-1:] != (self.hidden,) and len(set(shape)) == 1:
                raise LoadError(
                    f"{self.tensors.where[key].path}: the heads are for hidden size {shape[-1]} "
                    f"(tensor {key}), the model has {self.hidden}"
                )

    def block_entries(self, optional_bias: bool = False) -> list[Entry]:
        """Blocks of all heads; a bias that may be absent is zero."""
        entries, zeros = [], ArrayTensors(self.tensors.files[0].path)
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                for kind, shape in (
                    ("weight", (self.hidden, self.hidden)),
                    ("bias", (self.hidden,)),
                ):
                    name, key = f"heads.{head}.{layer}.{kind}", self.blocks.get((head, layer, kind))
                    if key is None and kind == "bias" and optional_bias:
                        zeros.arrays[name] = np.zeros(shape, np.float32)
                        entries.append(Entry(name, shape, zeros, name))
                        continue
                    missing = self.prefix + self.style.block_name.format(head, layer, kind)
                    entries.append(self.tensors.entry(name, shape, key or missing))
        return entries

    def read(self) -> Heads:
        """Formats A to D and F."""
        entries = self.block_entries()
        shared = not self.projections
        for head in range(0 if shared else self.num_heads):
            layer, key = self.projections.get(
                head, (self.num_layers, f"{self.prefix}{head}.{self.num_layers}.weight")
            )
            if layer != self.num_layers:
                wanted = f"{self.prefix}{head}.{self.num_layers}.weight"
                raise LoadError(
                    f"{self.tensors.where[key].path}: tensor {key} is out of place; wanted {wanted}"
                )
            entries.append(
                self.tensors.entry(f"heads.{head}.lm_head.weight", (self.vocab, self.hidden), key)
            )
        letter = "C" if shared and self.letter in "AB" else self.letter
        return self.finish(letter, entries, shared, self.vocab)

    def finish(self, letter: str, entries: list[Entry], shared: bool, rows: int) -> Heads:
        """The result."""
        config = {
            **NO_HEADS,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "shared_lm_head": shared,
        }
        config["head_vocab"] = rows
        info = HeadsInfo(letter, self.num_heads, self.num_layers, shared, rows, self.path.parent)
        return Heads(info, config, entries)


def _open_vllm(tensors: TensorSet, raw: Config, base: Config, path: Path) -> Heads:
    """Format E: other names, optional biases, projections that may cover part of the vocabulary."""
    prefix = "medusa_heads." if any(name.startswith("medusa_heads.") for name in tensors) else ""
    reader = _Reader(tensors, prefix, _VLLM, "E", raw, base, path)
    entries = reader.block_entries(optional_bias=not raw.get("medusa_fc_bias", False))
    token_map = _token_map(reader)
    only_first = raw.get("original_lm_head", False) is True
    if not reader.projections:
        if not only_first:
            raise LoadError(f"{tensors.describe()}: tensor {prefix}lm_heads.0.weight is missing")
        return reader.finish("E", entries, True, reader.vocab)
    stored_rows = tensors.shape(reader.projections[min(reader.projections)][1])[0]
    rows = len(token_map) if token_map is not None else stored_rows
    if only_first and rows == reader.vocab:  # the base model's lm_head under another name
        heads = reader.finish("E", entries, True, reader.vocab)
        key = reader.projections[min(reader.projections)][1]
        heads.lm_head = tensors.entry("lm_head.weight", (rows, reader.hidden), key)
        return heads
    if rows > reader.vocab:
        raise LoadError(
            f"{tensors.describe()}: the heads guess {rows} tokens, the model's vocabulary has "
            f"{reader.vocab}"
        )
    for head in range(reader.num_heads):
        source = min(reader.projections) if only_first else head
        _, key = reader.projections.get(source, (0, f"{prefix}lm_heads.{source}.weight"))
        name = f"heads.{head}.lm_head.weight"
        whole = tensors.entry(name, (stored_rows, reader.hidden), key)
        if stored_rows > rows and token_map is not None:
            whole = whole.only(token_map)
        elif stored_rows != rows:
            raise LoadError(
                f"{whole.file.path}: tensor {key} has {stored_rows} rows, token_map has {rows}"
            )
        entries.append(whole)
    if rows < reader.vocab:
        ids = ArrayTensors(tensors.files[0].path)
        ids.arrays["token_map"] = (
            np.arange(rows, dtype=np.int32) if token_map is None else token_map
        )
        entries.append(Entry("heads.token_map", (rows,), ids, "token_map"))
    return reader.finish("E", entries, False, rows)


def _token_map(reader: _Reader) -> NDArray[np.int32] | None:
    """Vocabulary ids of the projections' rows, or None where the rows are the ids."""
    if reader.map_key is None:
        return None
    file, key = reader.tensors.where[reader.map_key], reader.map_key
    ids, dtype = file.read(key, "")
    if dtype not in ("i32", "i64") or ids.ndim != 1:
        raise LoadError(
            f"{file.path}: tensor {key} is {dtype} {shape_text(ids.shape)}; wanted i32 or i64 of "
            "one axis"
        )
    if len(ids) == reader.vocab:  # the whole vocabulary: as vLLM does, the rows are the ids
        return None
    if (
        not len(ids)
        or ids.min() < 0
        or ids.max() >= reader.vocab
        or len(np.unique(ids)) != len(ids)
    ):
        raise LoadError(
            f"{file.path}: tensor {key} must hold distinct ids below the vocabulary size "
            f"{reader.vocab}"
        )
    return ids.astype(np.int32)
