"""What would be loaded, read from headers alone."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from medusa_ext.loading.checkpoint import Checkpoint, open_checkpoint
from medusa_ext.loading.files import FLOAT_BYTES
from medusa_ext.loading.head_rows import HeadVocab
from medusa_ext.loading.heads import HeadsInfo
from medusa_ext.loading.plan import count
from medusa_ext.loading.source import Source
from medusa_ext.loading.stored import Stored, weight_bytes


@dataclass(frozen=True)
class Inspection:
    """Sizes of a model as it would lie in memory."""

    path: str
    format: str  # "Hugging Face directory", "GGUF" or "medusa_ext export"
    family: str
    stored_types: dict[str, int]  # type in the file -> bytes
    weights: str  # types in memory: "q4_1, q8_0"
    dtype: str  # of the cache, and of weights that are not in blocks
    num_parameters: int  # without heads
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool
    heads: HeadsInfo | None
    num_head_parameters: int
    weight_bytes: int  # heads included
    cache_bytes_per_1000_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        if values["heads"] is not None:
            values["heads"]["path"] = str(values["heads"]["path"])
        return values


def inspect(
    path: str | os.PathLike[str] | Source,
    heads: str | os.PathLike[str] | None = "auto",
    *,
    head_vocab: HeadVocab = "auto",
    **hub: Any,  # noqa: ANN401 - options of resolve
) -> Inspection:
    """Describe what `load_model` would load on a CPU; no weight is read.

    Args:
        path: what `load_model` takes.
        heads: what `load_model` takes.
        head_vocab: what `load_model` takes.
        **hub: local_files_only, cache_dir and revision of `resolve`.

    Raises:
        LoadError: whatever `load_model` would refuse before it reads weights.
    """
    checkpoint = open_checkpoint(path, heads, head_vocab=head_vocab, **hub)
    return describe(checkpoint, checkpoint.stored())


def describe(checkpoint: Checkpoint, stored: Stored) -> Inspection:
    """Describe what `load_checkpoint` would load, in the types chosen by `Checkpoint.stored`."""
    config = checkpoint.config
    types: dict[str, int] = {}
    sizes = {True: 0, False: 0}  # elements, by "is part of the heads"
    for entry in checkpoint.entries:
        if entry.copied:  # its values are stored and counted under another name
            continue
        types[entry.dtype] = types.get(entry.dtype, 0) + entry.file.num_bytes(entry.key)
        sizes[entry.name.startswith("heads.")] += count(entry.shape)
    row = config["num_kv_heads"] * config["head_dim"] * FLOAT_BYTES[stored.dtype]
    kinds = {"directory": "Hugging Face directory", "gguf": "GGUF", "export": "medusa_ext export"}
    return Inspection(
        path=str(checkpoint.source.path),
        format=kinds[checkpoint.source.kind],
        stored_types=types,
        weights=stored.text,
        dtype=stored.dtype,
        num_parameters=sizes[False],
        heads=checkpoint.heads_info,
        num_head_parameters=sizes[True],
        weight_bytes=sum(weight_bytes(checkpoint.entries, stored)),
        cache_bytes_per_1000_tokens=1000 * 2 * config["num_layers"] * row,
        **{
            key: config[key]
            for key in (
                "family",
                "num_layers",
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "intermediate_size",
                "vocab_size",
                "max_context",
                "tied_embeddings",
            )
        },
    )
