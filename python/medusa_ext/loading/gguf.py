"""GGUF files through the package `gguf`: configuration, and tensors expanded as they are read."""

import math
import mmap
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.blocks import round_bf16, scales_are_finite
from medusa_ext.loading.config import MAX_HEAD_DIM, MAX_LAYERS, NO_HEADS, Config, Fields
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import drop_pages
from medusa_ext.loading.plan import Convert, Entry, TensorSet, base_shapes
from medusa_ext.loading.rope import canonical_rope, reach

FAMILIES = ("llama", "qwen2", "qwen3")
_CHUNK = 1 << 20  # elements expanded at once: 4 MB of f32
_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_NAMES = {
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class _Reader(gguf.GGUFReader):
    """The package's reader with two steps replaced: both are only ever called by the reader itself.

    It makes a NumPy array of each element of each array: 2 s for the vocabulary of a small model.
    Here an array of
    numbers is one part, and strings are views. It also trusts every length in the file, which is
    checked here.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[Any]]:
        array = gguf.GGUFValueType.ARRAY
        if raw_type != array:
            size, parts, indices, types = super()._get_field_parts(orig_offs, raw_type)
            if orig_offs + size > len(self.data) or size == 0:
                raise ValueError(f"the metadata ends inside a value at byte {orig_offs}")
            return size, parts, indices, types
        view = self.data.data
        item_type, num_items = struct.unpack_from("<IQ", view, orig_offs)
        item_type, offset = gguf.GGUFValueType(item_type), orig_offs + 12
        if item_type == gguf.GGUFValueType.STRING:
            strings, read_length = [], struct.Struct("<Q").unpack_from
            for _ in range(num_items):
                (length,) = read_length(view, offset)
                offset += 8 + length
                if offset > len(view):
                    raise ValueError(f"the metadata ends inside a string at byte {offset - length}")
                strings.append(view[offset - length : offset])
            return offset - orig_offs, strings, list(range(num_items)), [array, item_type]
        dtype = np.dtype(self.gguf_scalar_to_np[item_type])
        if offset + num_items * dtype.itemsize > len(view):
            raise ValueError(f"the metadata ends inside an array at byte {offset}")
        values = np.frombuffer(view, dtype, num_items, offset)
        return 12 + values.nbytes, [values], [0], [array, item_type]

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            _, name, _, dims, raw_type, offset = field.parts
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(raw_type[0])]
            elements = 1
            for size in dims.tolist():
                elements *= size
            end = start_offs + int(offset[0]) + elements * block_bytes // block
            if end > len(self.data):
                shape = "[" + ", ".join(str(size) for size in reversed(dims.tolist())) + "]"
                raise ValueError(
                    f"tensor {bytes(name).decode()} of shape {shape} ends at byte {end}, the file "
                    f"at {len(self.data)}"
                )
        super()._build_tensors(start_offs, fields)


class GgufFile:
    """A GGUF file: `fields` of metadata, and tensors (a TensorFile)."""

    def __init__(self, path: Path) -> None:
        """Reads the header alone; LoadError where it is damaged or not GGUF."""
        self.path = path
        try:
            self.reader = _Reader(path)
        except OSError as error:
            raise LoadError(f"cannot read {path}: {error.strerror}") from None
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            OverflowError,
            struct.error,
            RecursionError,
        ) as error:
            raise LoadError(f"{path} is no readable GGUF file: {error}") from None
        if self.reader.byte_order != "I":
            raise LoadError(
                f"{path} was written for machines of the other byte order; that is not supported"
            )
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.file_map = self.reader.data.base

    def field(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - any metadata value
        """A metadata value, or `default`."""
        found = self.reader.fields.get(key)
        if found is None:
            return default
        try:
            return found.contents()
        except (ValueError, IndexError) as error:
            raise LoadError(f"{self.path}: metadata {key} is damaged: {error}") from None

    def fields(self, prefix: str) -> Config:
        """Scalars and short arrays whose key starts with `prefix`, without it."""
        keys = [key for key in self.reader.fields if key.startswith(prefix)]
        return {key[len(prefix) :]: self.field(key) for key in keys}

    def names(self) -> Iterable[str]:
        """See TensorFile."""
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorFile."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def dtype(self, name: str) -> str:
        """See TensorFile; a block type by its name in lower case."""
        word = self.tensors[name].tensor_type.name
        return _FLOATS.get(word, word.lower())

    def expands(self, dtype: str) -> bool:
        """Whether blocks of this type can be read."""
        return dtype.startswith(("q", "iq", "tq", "mxfp"))

    def num_bytes(self, name: str) -> int:
        """See TensorFile."""
        return int(self.tensors[name].n_bytes)

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """See TensorFile."""
        tensor = self.tensors[name]
        stored = self.dtype(name)
        if stored == "bf16":
            return np.asarray(tensor.data).view(np.uint16).reshape(self.shape(name)), stored
        if stored in ("f32", "f16"):
            return np.asarray(tensor.data), stored
        return self._expand(name, dtype, np.asarray(tensor.data)), dtype

    def read_rows(self, name: str, dtype: str, rows: NDArray[Any]) -> NDArray[Any]:
        """See BlockFile."""
        return self._expand(name, dtype, np.asarray(self.tensors[name].data)[rows])

    def read_blocks(self, name: str) -> NDArray[np.uint8]:
        """See BlockFile."""
        rows: NDArray[np.uint8] = np.asarray(self.tensors[name].data)
        if not scales_are_finite(self.dtype(name), rows):
            raise LoadError(f"{self.path}: tensor {name} holds scales that are no finite numbers")
        return rows

    def _expand(self, name: str, dtype: str, data: NDArray[np.uint8]) -> NDArray[Any]:
        """Rows of blocks [rows, bytes] of a tensor -> their values."""
        tensor, shape = self.tensors[name], (len(data), self.shape(name)[-1])
        out = np.empty(shape, {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype])
        rows = max(1, _CHUNK // shape[-1])
        for first in range(0, shape[0], rows):
            try:
                values = gguf.dequantize(data[first : first + rows], tensor.tensor_type)
            except NotImplementedError:
                raise LoadError(
                    f"{self.path}: tensor {name} is stored as {self.dtype(name)}, which the "
                    "package gguf cannot expand"
                ) from None
            if not np.isfinite(values).all():
                raise LoadError(
                    f"{self.path}: tensor {name} holds scales that are no finite numbers"
                )
            out[first : first + rows] = round_bf16(values) if dtype == "bf16" else values
        return out

    def release(self, name: str) -> None:
        """See TensorFile."""
        if isinstance(self.file_map, mmap.mmap):
            data = self.tensors[name].data
            drop_pages(data.ctypes.data, data.nbytes)


def read_config(file: GgufFile) -> Config:
    """The canonical configuration of a GGUF file, without heads."""
    family = file.field("general.architecture")
    if family not in FAMILIES:
        raise LoadError(
            f"{file.path}: architecture {family!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    fields = Fields(file.fields(f"{family}."), f"{file.path}: {family}")
    if fields.get("expert_count"):
        raise LoadError(
            f"{file.path}: expert_count {fields.get('expert_count')}: mixtures of experts are not "
            "supported"
        )
    hidden, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", hidden // num_heads, limit=MAX_HEAD_DIM)
    if fields.count("attention.value_length", head_dim) != head_dim:
        raise LoadError(f"{file.path}: keys and values of different lengths are not supported")
    rotary_dim = fields.count("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise LoadError(
            f"{file.path}: rope.dimension_count {rotary_dim} is not supported, only head_dim "
            f"{head_dim}"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LoadError(
            f"{file.path}: tensor token_embd.weight is missing; wanted shape [vocab_size, {hidden}]"
        )
    num_layers, max_context = (
        fields.count("block_count", limit=MAX_LAYERS),
        fields.count("context_length"),
    )
    params = _rope_params(fields, max_context)
    rope = canonical_rope(params, head_dim, max_context, str(file.path))
    if "rope_freqs.weight" in file.tensors:
        factors = TensorSet([file]).entry("", (head_dim // 2,), "rope_freqs.weight").read("f32")[0]
        rope["inv_freq"] = [
            float(value) for value in np.asarray(rope["inv_freq"], np.float32) / factors
        ]
    # llama.cpp's own families llama (Mistral among them) and qwen have one window for all layers,
    # or none.
    window = (
        fields.count("attention.sliding_window") if fields.get("attention.sliding_window") else 0
    )
    return {
        "family": family,
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_context": reach(params, max_context),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "activation": "silu",
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "tied_embeddings": "output.weight" not in file.tensors,
        "embedding_scale": 1.0,
        "attention_scale": 0.0,
        "windows": [window] * num_layers,
        "rope": rope,
        "heads": dict(NO_HEADS),
    }


def entries(file: GgufFile, config: Config) -> list[Entry]:
    """Every tensor of the model, checked."""
    tensors = TensorSet([file])
    plan = []
    for name, shape in base_shapes(config).items():
        convert: Convert | None = None
        part = name.split(".")[2] if name.startswith("layers.") else ""
        if config["family"] == "llama" and part in ("q_proj", "k_proj"):
            convert = _halves_from_pairs(
                config["num_heads" if part == "q_proj" else "num_kv_heads"]
            )
        plan.append(tensors.entry(name, shape, _stored_name(name), convert))
    # rope_freqs.weight went into the configuration.
    tensors.refuse_others((entry.key for entry in plan), lambda name: name == "rope_freqs.weight")
    return plan


def eos_ids(file: GgufFile, vocab_size: int) -> list[int]:
    """End-of-sequence, end-of-turn and end-of-message ids of the metadata."""
    ids = [file.field(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    for token in ids:
        if token is not None and not 0 <= token < vocab_size:
            raise LoadError(
                f"{file.path}: end-of-sequence id {token} is not below the vocabulary size "
                f"{vocab_size}"
            )
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def _stored_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, layer, part, kind = name.split(".")
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def _rope_params(fields: Fields, max_context: int) -> Config:
    kind = fields.get("rope.scaling.type", "none")
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear")
    if kind == "none" and fields.get("rope.scale_linear") not in (None, 1.0):
        kind = "linear"  # the spelling of old files
    params: Config = {
        "rope_type": {"none": "default"}.get(kind, kind),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "factor": factor,
    }
    if kind == "yarn":
        params["original_max_position_embeddings"] = fields.count(
            "rope.scaling.original_context_length", max_context
        )
        if fields.get("rope.scaling.attn_factor") is not None:
            # llama.cpp multiplies by it; transformers' attention_factor replaces the whole.
            magnitude = 0.1 * math.log(max(float(factor or 1.0), 1.0)) + 1.0
            params["attention_factor"] = fields.number("rope.scaling.attn_factor") * magnitude
    return params


def _halves_from_pairs(num_heads: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Undo llama.cpp's order of q and k rows: neighbours (2i, 2i + 1) become (i, i + D / 2)."""

    def convert(array: NDArray[Any]) -> NDArray[Any]:
        rows, rest = array.shape[0], array.shape[1:]
        pairs = array.reshape(num_heads, rows // num_heads // 2, 2, *rest)
        halves: NDArray[Any] = pairs.swapaxes(1, 2).reshape(rows, *rest)
        return halves

    return convert
