"""From a checkpoint to a model in memory, one tensor at a time."""

import os
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.device import kind_of
from medusa_ext.loading.checkpoint import Checkpoint, open_checkpoint
from medusa_ext.loading.config import Config
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.head_rows import HeadVocab
from medusa_ext.loading.heads import HeadsInfo
from medusa_ext.loading.plan import Entry, to_json
from medusa_ext.loading.source import Source
from medusa_ext.loading.stored import Stored, check_types


@dataclass
class LoadedModel:
    """A model in memory and what belongs to it."""

    model: _core.Model
    tokenizer: Any  # of transformers; None where the checkpoint has none
    chat_template: str | None
    config: Config  # canonical, as model.config
    eos_ids: list[int]
    heads_info: HeadsInfo | None
    stored: Stored  # types in memory
    source: Source


def load_model(
    model: str | os.PathLike[str] | Source,
    heads: str | os.PathLike[str] | None = "auto",
    *,
    head_vocab: HeadVocab = "auto",
    weights: str = "auto",
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
        head_vocab: how many tokens heads choose among, the most frequent ones; "auto": those of
            draft_tokens.json beside the heads, or all where there is none; None: all.
        weights: in memory: "auto" for the file's own (blocks of a quantised file stay as they are
            on a CPU), "q8" or "q4" to quantise them (on a CPU alone), or "f32", "f16" or "bf16".
        dtype: of the cache, and of weights that are not in blocks: "f32", "f16", "bf16", or "auto"
            for the file's own (bf16 where it is quantised).
        backend: where the weights go.
        **hub: local_files_only, cache_dir and revision of `resolve`.

    Raises:
        LoadError: one line that names the file and what is wrong with it; nothing stays in memory.
        NotImplementedError: weights in blocks on a GPU.
    """
    check_types(weights, dtype)
    checkpoint = open_checkpoint(model, heads, head_vocab=head_vocab, **hub)
    return load_checkpoint(checkpoint, weights=weights, dtype=dtype, backend=backend)


def load_checkpoint(
    checkpoint: Checkpoint, *, weights: str = "auto", dtype: str = "auto", backend: _core.Backend
) -> LoadedModel:
    """Load what `open_checkpoint` found and checked; other arguments and errors as `load_model`."""
    stored = checkpoint.stored(weights, dtype, kind_of(backend.name))
    tokenizer, eos_ids = checkpoint.tokenizer, checkpoint.eos_ids  # refused before weights are read
    return LoadedModel(
        model=build(checkpoint, stored, backend),
        tokenizer=tokenizer,
        chat_template=_template(tokenizer),
        config=checkpoint.config,
        eos_ids=eos_ids,
        heads_info=checkpoint.heads_info,
        stored=stored,
        source=checkpoint.source,
    )


def build(checkpoint: Checkpoint, stored: Stored, backend: _core.Backend) -> _core.Model:
    """Read every tensor into the backend's layout; each page of the file is let go once packed."""
    config = to_json(checkpoint.config)
    builder = _core.ModelBuilder(config, stored.dtype, backend, stored.blocks)
    # Copies of rows first: they touch all pages of another tensor, while little else is resident.
    for entry in sorted(checkpoint.entries, key=lambda entry: not entry.copied):
        array, given = _read(entry, stored)
        try:
            builder.add(entry.name, array, given)
        except ValueError as error:  # values that no block can hold, say
            raise LoadError(f"{entry.file.path}: {error}") from None
        del array
        entry.file.release(entry.key)
    return builder.finish()


def _read(entry: Entry, stored: Stored) -> tuple[NDArray[Any], str | None]:
    """What the builder takes: the array, and its type where NumPy cannot tell it."""
    kind = stored.blocks.get(entry.name)
    if kind is not None and entry.dtype == kind:
        return entry.read_blocks(), kind
    # What is quantised is not rounded before.
    array, given = entry.read(stored.dtype if kind is None else "f32")
    return array, "bf16" if given == "bf16" else None


def _template(tokenizer: Any) -> str | None:  # noqa: ANN401 - a transformers tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name; the default one is for chatting
        template = template.get("default")
    return template or None
