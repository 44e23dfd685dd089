"""From a checkpoint to a model in memory, one tensor at a time."""

import os
from dataclasses import dataclass
from typing import Any

from medusa_ext import _core
from medusa_ext.loading.checkpoint import Checkpoint, open_checkpoint
from medusa_ext.loading.config import Config
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import FLOAT_BYTES
from medusa_ext.loading.heads import HeadsInfo
from medusa_ext.loading.plan import to_json
from medusa_ext.loading.source import Source


@dataclass
class LoadedModel:
    """A model in memory and what belongs to it."""

    model: _core.Model
    tokenizer: Any  # of transformers; None where the checkpoint has none
    chat_template: str | None
    config: Config  # canonical, as model.config
    eos_ids: list[int]
    heads_info: HeadsInfo | None
    weights_dtype: str  # in memory: "f32", "f16" or "bf16"
    source: Source


def load_model(
    model: str | os.PathLike[str] | Source,
    heads: str | os.PathLike[str] | None = "auto",
    *,
    head_vocab: int | None = None,
    dtype: str = "auto",
    backend: _core.Backend,
    **hub: Any,  # noqa: ANN401 - options of resolve
) -> LoadedModel:
    """Load a model, its tokenizer and its Medusa heads.

    Args:
        model: a directory, a `.gguf` file, an exported file, a hub id, "demo", or a resolved
            source.
        heads: a directory or hub id, None for none, "auto" for those that come with the model, if
            any.
        head_vocab: rows to keep of each head's own lm_head, the most frequent tokens'; None: all.
        dtype: of weights and cache in memory: "f32", "f16", "bf16", or "auto" for the file's own
            (bf16 where it is quantised).
        backend: where the weights go.
        **hub: local_files_only, cache_dir and revision of `resolve`.

    Raises:
        LoadError: one line that names the file and what is wrong with it; nothing stays in memory.
    """
    _check_dtype(dtype)
    checkpoint = open_checkpoint(model, heads, head_vocab=head_vocab, **hub)
    return load_checkpoint(checkpoint, dtype=dtype, backend=backend)


def load_checkpoint(
    checkpoint: Checkpoint, *, dtype: str = "auto", backend: _core.Backend
) -> LoadedModel:
    """Load what `open_checkpoint` found and checked; dtype, backend and errors as `load_model`."""
    _check_dtype(dtype)
    tokenizer, eos_ids = checkpoint.tokenizer, checkpoint.eos_ids  # refused before weights are read
    chosen = checkpoint.dtype(dtype)
    return LoadedModel(
        model=build(checkpoint, chosen, backend),
        tokenizer=tokenizer,
        chat_template=_template(tokenizer),
        config=checkpoint.config,
        eos_ids=eos_ids,
        heads_info=checkpoint.heads_info,
        weights_dtype=chosen,
        source=checkpoint.source,
    )


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in FLOAT_BYTES:
        raise LoadError(f"dtype is {dtype!r}; wanted one of auto, {', '.join(FLOAT_BYTES)}")


def build(checkpoint: Checkpoint, dtype: str, backend: _core.Backend) -> _core.Model:
    """Read every tensor into the backend's layout; each page of the file is let go once packed."""
    builder = _core.ModelBuilder(to_json(checkpoint.config), dtype, backend)
    for entry in checkpoint.entries:
        array, stored = entry.read(dtype)
        builder.add(entry.name, array, "bf16" if stored == "bf16" else None)
        del array
        entry.file.release(entry.key)
    return builder.finish()


def _template(tokenizer: Any) -> str | None:  # noqa: ANN401 - a transformers tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name; the default one is for chatting
        template = template.get("default")
    return template or None
