"""A model with its heads, found and checked but not read: what load, export and inspect share."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from medusa_ext.loading import hf, tokenizer
from medusa_ext.loading.blocks import ExportedTensors
from medusa_ext.loading.config import NO_HEADS, Config, from_hf, read_json
from medusa_ext.loading.config import eos_ids as config_eos_ids
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import FLOAT_BYTES
from medusa_ext.loading.head_rows import HeadVocab, check_head_vocab, choose_tokens
from medusa_ext.loading.heads import Heads, HeadsInfo, heads_inside, open_heads
from medusa_ext.loading.plan import Entry, TensorSet, base_shapes, head_shapes, majority_dtype
from medusa_ext.loading.source import DEMO, DEMO_HEADS, Source, resolve
from medusa_ext.loading.stored import Stored, choose_types

FORMAT = "1"  # of the one-file form; medusa::load_model refuses others


@dataclass
class Checkpoint:
    """Everything but the values. `config` is canonical and includes the heads."""

    source: Source
    config: Config
    entries: list[Entry]
    stored_dtype: str  # "f32", "f16" or "bf16": what dtype "auto" is
    heads_info: HeadsInfo | None
    raw: Config = field(default_factory=dict)  # config.json where there is one
    gguf: Any = None  # the open GgufFile, whose metadata holds the tokenizer
    metadata: dict[str, str] | None = None  # of the one-file form

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401 - a transformers tokenizer
        """The tokenizer, or None where the checkpoint has none."""
        if self.gguf is not None:
            from medusa_ext.loading import gguf_tokenizer

            return tokenizer.wrap(*gguf_tokenizer.build(self.gguf))
        if self.metadata is not None:
            return tokenizer.from_metadata(self.metadata, str(self.source.path))
        return tokenizer.from_directory(self.source.path)

    @cached_property
    def eos_ids(self) -> list[int]:
        """End-of-sequence ids, most trusted source first."""
        vocab_size = self.config["vocab_size"]
        if self.gguf is not None:
            from medusa_ext.loading import gguf

            return gguf.eos_ids(self.gguf, vocab_size)
        if self.metadata is not None:
            try:
                ids = json.loads(self.metadata.get("medusa_ext.eos_ids", "[]"))
            except json.JSONDecodeError:
                ids = "damaged"
            return config_eos_ids(ids, vocab_size, f"{self.source.path}: medusa_ext.eos_ids")
        return hf.read_eos_ids(self.source.path, self.raw, self.tokenizer, vocab_size)

    def stored(self, weights: str = "auto", dtype: str = "auto", kind: str = "cpu") -> Stored:
        """The types in memory on a kind of device; arguments and errors as `choose_types`."""
        return choose_types(
            self.entries, self.stored_dtype, weights=weights, dtype=dtype, kind=kind
        )

    def special_ids(self) -> set[int]:
        """Special and added tokens, end of sequence included."""
        ids = {*self.eos_ids}
        if self.tokenizer is not None:
            ids |= {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return ids


def open_checkpoint(
    model: str | os.PathLike[str] | Source,
    heads: str | os.PathLike[str] | None = "auto",
    *,
    head_vocab: HeadVocab = "auto",
    **hub: Any,  # noqa: ANN401 - options of resolve
) -> Checkpoint:
    """Find a model and its heads and check every tensor's name, shape and type.

    Args:
        model: what `resolve` takes, or its result.
        heads: None, "auto" (those that come with the model, if any), a directory or hub id;
            "prompt-lookup" needs none either.
        head_vocab: how many tokens heads choose among, the most frequent ones; "auto": those of
            draft_tokens.json beside the heads, or all where there is none; None: all.
        **hub: local_files_only, cache_dir and revision of `resolve`.

    Raises:
        LoadError: anything missing, surplus, damaged or unsupported.
    """
    named = not (heads is None or (isinstance(heads, str) and heads in ("auto", "prompt-lookup")))
    if isinstance(heads, str) and heads == "none":
        raise LoadError("heads is 'none'; for plain decoding give None")
    source = model if isinstance(model, Source) else resolve(model, **hub)
    hub.pop("revision", None)  # of the model, not of the heads
    opened, own = {"gguf": _open_gguf, "export": _open_export, "directory": _open_directory}[
        source.kind
    ](source, not named and heads == "auto")
    if named:
        found = resolve(heads, what="heads", **hub)  # type: ignore[arg-type]  # it refuses others
        if found.kind != "directory":
            raise LoadError(
                f'heads {found.given} is a file; give a directory, a hub id, "auto" or None'
            )
        own = open_heads(found.path, opened.config)
    head_vocab = check_head_vocab(head_vocab)
    if isinstance(head_vocab, int) and own is None:
        raise LoadError(
            f"head_vocab {head_vocab} needs Medusa heads, and there are none; leave head_vocab out"
        )
    if own is not None:
        own = choose_tokens(own, head_vocab, opened.config, opened.entries, opened.special_ids)
        opened.config["heads"] = own.config
        opened.entries.extend(own.entries)
        opened.heads_info = own.info
    return opened


def _open_directory(source: Source, with_heads: bool) -> tuple[Checkpoint, Heads | None]:
    path = source.path / "config.json"
    if not path.is_file():
        raise LoadError(f"{source.path} is no model: config.json is missing")
    raw = read_json(path)
    config = from_hf(raw, str(path))
    tensors = hf.open_weights(source.path)
    hf.untie_if_different(config, tensors, path)
    entries = hf.entries(tensors, config)
    own = heads_inside(tensors, raw, config, path) if with_heads else None
    return Checkpoint(source, config, entries, majority_dtype(entries), None, raw=raw), own


def _open_gguf(source: Source, with_heads: bool) -> tuple[Checkpoint, Heads | None]:
    try:
        from medusa_ext.loading import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise LoadError(
            f"{source.given} is a GGUF file and needs the package gguf; install it with: pip "
            'install "medusa-ext[demo]"'
        ) from None
    file = gguf.GgufFile(source.path)
    config = gguf.read_config(file)
    entries = gguf.entries(file, config)
    own = open_heads(DEMO_HEADS, config) if with_heads and source.given == DEMO else None
    return Checkpoint(source, config, entries, majority_dtype(entries), None, gguf=file), own


def _open_export(source: Source, with_heads: bool) -> tuple[Checkpoint, Heads | None]:
    file = ExportedTensors(source.path)
    metadata = file.metadata
    found = metadata.get("medusa_ext.format")
    if found is None:
        raise LoadError(
            f"{source.given} was not written by `medusa-ext export`; for a Hugging Face model "
            "give its directory"
        )
    if found != FORMAT:
        raise LoadError(
            f"{source.given} has export format {found!r}; this version reads {FORMAT!r}: export "
            "it again"
        )
    try:
        config = json.loads(metadata["medusa_ext.config"])
        heads = config["heads"]
        tensors = TensorSet([file])
        entries = [tensors.entry(name, shape, name) for name, shape in base_shapes(config).items()]
        tail = head_shapes(config)
        info = HeadsInfo(
            "export",
            heads["num_heads"],
            heads["num_layers"],
            heads["shared_lm_head"],
            heads["head_vocab"],
            source.path,
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise LoadError(
            f"{source.given}: the metadata medusa_ext.config is damaged: {error!r}"
        ) from None
    head_entries = [
        tensors.ids(name, shape) if name == "heads.token_map" else tensors.entry(name, shape, name)
        for name, shape in tail.items()
    ]
    tensors.refuse_others([entry.key for entry in entries + head_entries], lambda _: False)
    dtype = metadata.get("medusa_ext.dtype") or majority_dtype(entries)
    if dtype not in FLOAT_BYTES:
        raise LoadError(f"{source.given}: the metadata medusa_ext.dtype is {dtype!r}")
    own = Heads(info, heads, head_entries) if with_heads and heads["num_heads"] else None
    config["heads"] = dict(NO_HEADS)
    return Checkpoint(source, config, entries, dtype, None, metadata=metadata), own
