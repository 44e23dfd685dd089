"""Hugging Face directories: which files hold the weights, and which tensor is which."""

import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from medusa_ext.loading.config import Config, eos_ids, read_json
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import PickledTensors, SafetensorsTensors, TensorFile
from medusa_ext.loading.plan import Entry, TensorSet, base_shapes

_PARTS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
# Written by transformers before 4.32: a buffer that follows from the configuration.
_ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
HEAD_PREFIXES = ("medusa_head.", "medusa_heads.")
_LAYOUTS: list[tuple[str, str, Callable[[Path], TensorFile]]] = [
    ("model.safetensors", "model.safetensors.index.json", SafetensorsTensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", PickledTensors),
]


def has_weights(folder: Path) -> bool:
    """Whether `open_weights` finds a file to open."""
    return any((folder / name).is_file() for layout in _LAYOUTS for name in layout[:2])


def open_weights(folder: Path) -> TensorSet:
    """The weights of a directory, safetensors before pickles, nothing read yet.

    Raises:
        LoadError: no weights, a shard that is missing or damaged, or an index that disagrees with
            the shards.
    """
    for single, index, kind in _LAYOUTS:
        if (folder / single).is_file():
            return TensorSet([kind(folder / single)])
        if (folder / index).is_file():
            return _open_shards(folder, folder / index, kind)
    wanted = ", ".join(name for layout in _LAYOUTS for name in layout[:2])
    raise LoadError(f"{folder} holds no weights; wanted one of {wanted}")


def _open_shards(folder: Path, index: Path, kind: Callable[[Path], TensorFile]) -> TensorSet:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{index}: weight_map is missing or empty")
    files: list[TensorFile] = []
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise LoadError(
                f"{index}: shard {shard!r} must be the name of a file in the same directory"
            )
        if not (folder / shard).is_file():
            raise LoadError(f"{folder / shard} is missing; {index.name} names it")
        files.append(kind(folder / shard))
    tensors = TensorSet(files)
    for name, shard in weight_map.items():
        if name not in tensors or tensors.where[name].path.name != shard:
            raise LoadError(
                f"{folder / str(shard)}: tensor {name} is missing; {index.name} names it there"
            )
    return tensors


def untie_if_different(config: Config, tensors: TensorSet, path: Path) -> None:
    """Where the config ties the embeddings but the weights hold two, believe the weights."""
    embed, head = _TOP["embed_tokens.weight"], _TOP["lm_head.weight"]
    if (
        config["tied_embeddings"]
        and embed in tensors
        and head in tensors
        and not _same(tensors, embed, head)
    ):
        # transformers 5 trusts the weights here too.
        warnings.warn(
            f"{path} ties the embeddings, but {embed} and {head} differ; they are loaded as "
            "stored, not tied",
            stacklevel=2,
        )
        config["tied_embeddings"] = False


def entries(tensors: TensorSet, config: Config) -> list[Entry]:
    """Every tensor of the base model, checked; Medusa heads in the same files are left alone."""
    plan = []
    for name, shape in base_shapes(config).items():
        key = stored_name(name)
        if name == "embed_tokens.weight" and config["tied_embeddings"] and key not in tensors:
            key = _TOP["lm_head.weight"] if _TOP["lm_head.weight"] in tensors else key
        plan.append(tensors.entry(name, shape, key))

    def harmless(name: str) -> bool:
        tied_copy = config["tied_embeddings"] and name == _TOP["lm_head.weight"]
        return (
            tied_copy
            or name.startswith(HEAD_PREFIXES)
            or _ROTARY_BUFFER.fullmatch(name) is not None
        )

    tensors.refuse_others((entry.key for entry in plan), harmless)
    return plan


def stored_name(name: str) -> str:
    """Canonical name -> name in a Hugging Face checkpoint."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}"


def read_eos_ids(folder: Path, raw: Config, tokenizer: Any, vocab_size: int) -> list[int]:  # noqa: ANN401
    """End-of-sequence ids: generation_config.json, else config.json, else the tokenizer."""
    sources: list[tuple[Any, Path]] = [(raw.get("eos_token_id"), folder / "config.json")]
    if (folder / "generation_config.json").is_file():
        path = folder / "generation_config.json"
        sources.insert(0, (read_json(path).get("eos_token_id"), path))
    if tokenizer is not None:
        sources.append((tokenizer.eos_token_id, folder))
    for value, where in sources:
        if value is not None:
            return eos_ids(value, vocab_size, str(where))
    return []


def _same(tensors: TensorSet, first: str, second: str) -> bool:
    """Whether two stored tensors are equal bit for bit, compared in pieces."""
    files = tensors.where[first], tensors.where[second]
    if files[0].shape(first) != files[1].shape(second) or files[0].dtype(first) != files[1].dtype(
        second
    ):
        return False
    arrays = files[0].read(first, "")[0], files[1].read(second, "")[0]
    equal = all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in _pieces(*arrays))
    for file, name in zip(files, (first, second), strict=True):
        file.release(name)
    return equal


def _pieces(first: Any, second: Any, rows: int = 1024) -> Iterable[tuple[Any, Any]]:  # noqa: ANN401 - arrays
    for start in range(0, len(first), rows):
        yield first[start : start + rows], second[start : start + rows]
