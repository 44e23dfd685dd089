"""The one-file form: weights, configuration and tokenizer as safetensors that C++ reads itself."""

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.blocks import (
    BLOCKS_KEY,
    blocks_to_json,
    quantise,
    row_bytes,
    scales_are_finite,
)
from medusa_ext.loading.checkpoint import FORMAT, Checkpoint, open_checkpoint
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import FLOAT_BYTES
from medusa_ext.loading.head_rows import HeadVocab
from medusa_ext.loading.ngrams import NGRAMS_KEY, find_ngrams, to_text
from medusa_ext.loading.plan import Entry, count, to_json
from medusa_ext.loading.source import Source
from medusa_ext.loading.stored import Stored, check_types
from medusa_ext.loading.tokenizer import to_metadata

CALIBRATION_FILE = "calibration.json"  # beside heads, see medusa_ext/calibration/file.py
CALIBRATION_KEY = "medusa_ext.calibration"  # its text in the one-file form
_WORDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "i32": "I32"}


def export(
    model: str | os.PathLike[str] | Source,
    heads: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    weights: str = "auto",
    head_vocab: HeadVocab = "auto",
    **hub: object,
) -> Path:
    """Write a model, its heads and its tokenizer as one file.

    Tensors keep the type they are stored in; blocks that cannot be used as they are become bf16.
    They are written one at a time to a temporary file beside `out`, which takes its place only when
    it is complete.

    Args:
        model: what `load_model` takes.
        heads: what `load_model` takes.
        out: the file to write, ending in .safetensors; an existing file is replaced.
        weights: "auto"; "q8" or "q4" to quantise as loading does; or "bf16", "f16" or "f32" to
            expand all blocks to that type, as GPUs need.
        head_vocab: what `load_model` takes.
        **hub: local_files_only, cache_dir and revision of `resolve`.

    Returns:
        The path written.

    Raises:
        LoadError: the model cannot be read, or the file cannot be written.
    """
    path = Path(out).expanduser()
    if path.suffix != ".safetensors":
        raise LoadError(f"cannot export to {path}; wanted a file name ending in .safetensors")
    if path.is_dir() or not path.parent.is_dir():
        raise LoadError(f"cannot export to {path}; wanted a file in an existing directory")
    check_types(weights, "auto")
    checkpoint = open_checkpoint(model, heads, head_vocab=head_vocab, **hub)
    stored = checkpoint.stored(weights)
    metadata = _metadata(checkpoint, stored)
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".partial", dir=path.parent
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                write_tensors(file, checkpoint.entries, metadata, stored.dtype, stored.blocks)
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise LoadError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _metadata(checkpoint: Checkpoint, stored: Stored) -> dict[str, str]:
    tokenizer = checkpoint.tokenizer
    return {
        "medusa_ext.format": FORMAT,
        "medusa_ext.config": to_json(checkpoint.config),
        "medusa_ext.dtype": stored.dtype,
        "medusa_ext.eos_ids": json.dumps(checkpoint.eos_ids),
        **(to_metadata(tokenizer) if tokenizer is not None else {}),
        **({BLOCKS_KEY: blocks_to_json(stored.blocks)} if stored.blocks else {}),
        **_calibration(checkpoint),
        **_ngrams(checkpoint),
    }


def _calibration(checkpoint: Checkpoint) -> dict[str, str]:
    info, metadata = checkpoint.heads_info, checkpoint.metadata or {}
    if info is None:
        return {}
    if info.format == "export":
        return {key: metadata[key] for key in (CALIBRATION_KEY,) if key in metadata}
    path = info.path / CALIBRATION_FILE
    try:
        return {CALIBRATION_KEY: path.read_text(encoding="utf-8")} if path.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error}") from None


def _ngrams(checkpoint: Checkpoint) -> dict[str, str]:
    found = find_ngrams(checkpoint)
    return {} if found is None else {NGRAMS_KEY: to_text(found)}


def write_tensors(
    file: BinaryIO,
    entries: list[Entry],
    metadata: dict[str, str],
    expanded: str,
    blocks: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a safetensors file, one tensor at a time.

    Those that `blocks` names are written as blocks of that type, other blocks become `expanded`.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name in blocks:
            word, shape = "U8", [entry.shape[0], row_bytes(blocks[entry.name], entry.shape[1])]
            size = shape[0] * shape[1]
        else:
            stored = _stored(entry, expanded)
            word, shape = _WORDS[stored], list(entry.shape)
            size = count(entry.shape) * (4 if stored == "i32" else FLOAT_BYTES[stored])
        header[entry.name] = {
            "dtype": word,
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name in blocks:
            array = _blocks(entry, blocks[entry.name])
        else:
            array, _ = entry.read(_stored(entry, expanded))
        file.write(array.reshape(-1).view(np.uint8).data)  # tofile hides why a disk refuses
        del array
        entry.file.release(entry.key)


def _blocks(entry: Entry, kind: str) -> NDArray[np.uint8]:
    if entry.dtype == kind:
        return entry.read_blocks()
    rows = quantise(kind, *entry.read("f32"))
    if not scales_are_finite(kind, rows):
        raise LoadError(
            f"{entry.file.path}: tensor {entry.key} holds a value that is no finite number, or too "
            f'large for {kind}; the file is damaged, or wants weights="bf16" or "f32"'
        )
    return rows


def _stored(entry: Entry, expanded: str) -> str:
    return entry.dtype if entry.dtype in _WORDS else expanded


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
