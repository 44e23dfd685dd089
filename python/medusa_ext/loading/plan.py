"""Which stored tensor becomes which canonical one: checked before anything is read."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.config import MAX_LAYERS
from medusa_ext.loading.errors import LoadError, shape_text
from medusa_ext.loading.files import FLOAT_BYTES, BlockFile, TensorFile

Shape = tuple[int, ...]
Convert = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: its canonical name and shape, and where it is stored."""

    name: str
    shape: Shape
    file: TensorFile
    key: str
    convert: Convert | None = None  # moves rows; applied to what the file gives
    copied: bool = False  # of another entry's tensor
    rows: NDArray[Any] | None = field(default=None, compare=False)  # kept; None: all

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.file.dtype(self.key)

    def read(self, dtype: str) -> tuple[NDArray[Any], str]:
        """The values, C-contiguous, and their type; `dtype` is what quantised blocks expand to."""
        file = self.file
        if (
            self.rows is not None
            and self.convert is None
            and isinstance(file, BlockFile)
            and file.expands(self.dtype)
        ):  # no others are expanded
            return file.read_rows(self.key, dtype, self.rows), dtype
        array, stored = file.read(self.key, dtype)
        return self._converted(array), stored

    def only(self, rows: NDArray[Any]) -> "Entry":
        """Some of its rows; of floats in a mapped file no others are read."""
        kept = rows if self.rows is None else self.rows[rows]
        return replace(self, shape=(len(rows), *self.shape[1:]), rows=kept)

    def read_blocks(self) -> NDArray[np.uint8]:
        """The stored blocks [rows, bytes], C-contiguous; only rows move, so they stay whole."""
        assert isinstance(self.file, BlockFile)
        return self._converted(self.file.read_blocks(self.key))

    def _converted(self, array: NDArray[Any]) -> NDArray[Any]:
        if self.convert is not None:
            array = self.convert(array)
        if self.rows is not None:
            array = array[self.rows]
        return np.ascontiguousarray(array)


class TensorSet:
    """The tensors of several files under one roof."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        """LoadError where two files hold the same tensor."""
        self.files = list(files)
        self.where: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.names():
                if name in self.where:
                    raise LoadError(
                        f"{file.path}: tensor {name} is also in {self.where[name].path}"
                    )
                self.where[name] = file

    def __contains__(self, name: str) -> bool:
        """Whether some file holds it."""
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self.where)

    def shape(self, name: str) -> Shape:
        """Outermost first."""
        return self.where[name].shape(name)

    def describe(self) -> str:
        """The files, for messages."""
        first = str(self.files[0].path)
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more files"

    def entry(self, name: str, shape: Shape, key: str, convert: Convert | None = None) -> Entry:
        """One checked tensor.

        Raises:
            LoadError: missing, of another shape, or of a type that is no float.
        """
        file = self._file_of(key, shape)
        stored = file.dtype(key)
        if stored not in FLOAT_BYTES and not can_expand(file, stored):
            raise LoadError(
                f"{file.path}: tensor {key} is stored as {stored}; f32, f16 and bf16 are read"
            )
        return Entry(name, shape, file, key, convert)

    def ids(self, name: str, shape: Shape) -> Entry:
        """One checked tensor of token ids; LoadError where it is missing or anything but i32."""
        file = self._file_of(name, shape)
        if file.dtype(name) != "i32":
            raise LoadError(
                f"{file.path}: tensor {name} is stored as {file.dtype(name)}; wanted i32"
            )
        return Entry(name, shape, file, name)

    def _file_of(self, key: str, shape: Shape) -> TensorFile:
        """The file that holds a tensor of this shape."""
        file = self.where.get(key)
        if file is None:
            raise LoadError(
                f"{self.describe()}: tensor {key} is missing; wanted shape {shape_text(shape)}"
            )
        found = file.shape(key)
        if found != shape:
            raise LoadError(
                f"{file.path}: tensor {key} has shape {shape_text(found)}, wanted "
                f"{shape_text(shape)}"
            )
        return file

    def refuse_others(self, used: Iterable[str], harmless: Callable[[str], bool]) -> None:
        """LoadError for the first tensor that is neither used nor harmless."""
        known = set(used)
        for name in self.where:
            if name not in known and not harmless(name):
                raise LoadError(
                    f"{self.where[name].path}: tensor {name} of shape "
                    f"{shape_text(self.shape(name))} is unexpected"
                )


def base_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Canonical names and shapes of a model without heads (csrc/medusa/model.h)."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    q, kv = config["num_heads"] * head_dim, config["num_kv_heads"] * head_dim
    shapes: dict[str, Shape] = {"embed_tokens.weight": (v, d), "norm.weight": (d,)}
    if not config["tied_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    products = [  # name, outputs, inputs, biased
        ("q_proj", q, d, config["qkv_bias"]),
        ("k_proj", kv, d, config["qkv_bias"]),
        ("v_proj", kv, d, config["qkv_bias"]),
        ("o_proj", d, q, config["o_bias"]),
        ("gate_proj", f, d, config["mlp_bias"]),
        ("up_proj", f, d, config["mlp_bias"]),
        ("down_proj", d, f, config["mlp_bias"]),
    ]
    for layer in range(_bounded(config["num_layers"])):
        prefix = f"layers.{layer}."
        shapes[prefix + "attn_norm.weight"] = (d,)
        shapes[prefix + "mlp_norm.weight"] = (d,)
        for name, outputs, inputs, biased in products:
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if biased:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
        if config["qk_norm"]:
            shapes[prefix + "q_norm.weight"] = (head_dim,)
            shapes[prefix + "k_norm.weight"] = (head_dim,)
    return shapes


def head_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Canonical names and shapes of the Medusa heads that `config["heads"]` describes."""
    heads, d = config["heads"], config["hidden_size"]
    shapes: dict[str, Shape] = {}
    for head in range(_bounded(heads["num_heads"])):
        for layer in range(_bounded(heads["num_layers"])):
            shapes[f"heads.{head}.{layer}.weight"] = (d, d)
            shapes[f"heads.{head}.{layer}.bias"] = (d,)
        if not heads["shared_lm_head"]:
            shapes[f"heads.{head}.lm_head.weight"] = (heads["head_vocab"], d)
    if heads["num_heads"] and 0 < heads["head_vocab"] < config["vocab_size"]:
        if heads["shared_lm_head"]:
            shapes["heads.draft_lm_head.weight"] = (heads["head_vocab"], d)
        shapes["heads.token_map"] = (heads["head_vocab"],)
    return shapes


def _bounded(number: int) -> int:
    if number > MAX_LAYERS:
        raise LoadError(f"the config has {number} layers or heads; at most {MAX_LAYERS} are read")
    return number


def count(shape: Shape) -> int:
    """Elements."""
    total = 1
    for size in shape:
        total *= size
    return total


def can_expand(file: TensorFile, dtype: str) -> bool:
    """Whether a file reads blocks of this type as floats."""
    return isinstance(file, BlockFile) and file.expands(dtype)


def majority_dtype(entries: Iterable[Entry]) -> str:
    """The float type that most bytes are stored in; any tensor in blocks makes it bf16."""
    sizes = dict.fromkeys(FLOAT_BYTES, 0)
    for entry in entries:
        if entry.dtype not in FLOAT_BYTES:
            return "bf16"
        sizes[entry.dtype] += entry.file.num_bytes(entry.key)
    return max(sizes, key=lambda dtype: sizes[dtype])


def to_json(config: dict[str, Any]) -> str:
    """ModelConfig as JSON."""
    return json.dumps(config, allow_nan=False)
