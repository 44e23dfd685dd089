"""Medusa heads from one of the formats A to F to another, every tensor bit for bit.

What a format cannot express is an error that names it; nothing is left out in silence.
"""

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading import hf
from medusa_ext.loading.checkpoint import Checkpoint, open_checkpoint
from medusa_ext.loading.config import Config, read_json
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.exporting import CALIBRATION_FILE, write_tensors
from medusa_ext.loading.files import (
    FLOAT_BYTES,
    ArrayTensors,
    PickledTensors,
    SafetensorsTensors,
    cannot_write,
)
from medusa_ext.loading.head_rows import DRAFT_TOKENS_FILE
from medusa_ext.loading.heads import Heads, open_heads
from medusa_ext.loading.ngrams import NGRAMS_FILE
from medusa_ext.loading.plan import Entry, TensorSet, can_expand
from medusa_ext.loading.source import Source, resolve

FORMATS = "ABCDEF"
_PREFIXES = {"D": "medusa_head.", "F": "medusa_heads."}
_HEAD_KEYS = ("medusa_num_heads", "medusa_num_layers", "medusa")
# What some format says in config.json of heads alone; other keys come along.
_OWN_KEYS = (
    *_HEAD_KEYS,
    "version",
    "model_type",
    "architectures",
    "num_heads",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "truncated_vocab_size",
    "medusa_fc_bias",
    "original_lm_head",
)
# Of a base model's directory, what formats D and F do not take over as it is.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
# Belong to heads, whatever their format.
_CARRIED = (CALIBRATION_FILE, DRAFT_TOKENS_FILE, NGRAMS_FILE, "README.md", "LICENSE")
_ROWS = 1024  # compared at once


def convert(
    heads: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    **hub: Any,  # noqa: ANN401 - options of resolve
) -> Path:
    """Write Medusa heads in another format.

    Args:
        heads: a directory or hub id of heads in any format, whole models (D, F) included.
        out: the directory to make; it must not exist, or be empty.
        to: "A" to "F".
        base: the model they are for, needed where its lm_head becomes a copy or takes the place of
            one, and for whole models; those in a whole model have theirs and take no other.
        **hub: local_files_only and cache_dir of `resolve`.

    Returns:
        The directory written.

    Raises:
        LoadError: the heads cannot be read, the format cannot express them (says what would be
            lost), something is missing that it needs, or the directory cannot be written.
    """
    if to not in FORMATS or len(to) != 1:
        raise LoadError(f"the format is {to!r}; wanted one of {', '.join(FORMATS)}")
    path = Path(out).expanduser()
    if not path.name or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise LoadError(f"{path} exists already; name a new directory")
    if not path.absolute().parent.is_dir():
        raise LoadError(f"cannot write {path}; wanted a new directory in an existing one")
    if to == "A" and importlib.util.find_spec("torch") is None:
        raise LoadError(
            'format A is a pickle and needs torch; install it with: pip install "medusa-ext[torch]"'
        )
    source = resolve(heads, what="heads", **hub)
    if source.kind != "directory":
        raise LoadError(f"heads {source.given} is a file; give a directory or a hub id")
    raw = _raw(source.path)
    whole = _is_model(source.path, raw)
    if whole:
        model: Checkpoint | None = _own_model(source, base, to, **hub)
        config: Config = {"base_model_name_or_path": source.given}
    else:
        model = None if base is None else open_checkpoint(base, None, **hub)
        config = _others(raw, model)
    sizes = _sizes(source.path, raw) if model is None else model.config
    found = open_heads(source.path, sizes)
    parts = _Parts.of(found, model, sizes["vocab_size"], source.given)
    with _new_folder(path) as folder:
        _WRITERS[to](parts, folder, config)
        for carried in _CARRIED:
            if (source.path / carried).is_file():
                target = folder / carried
                if target.exists() and not whole:
                    target.rename(folder / f"{target.stem}.base{target.suffix}")
                shutil.copyfile(source.path / carried, target)
    return path


def _own_model(
    source: Source,
    base: str | os.PathLike[str] | None,
    to: str,
    **hub: Any,  # noqa: ANN401 - options of resolve
) -> Checkpoint:
    """The model of formats D and F, tuned together with its heads, so that no other will do."""
    if base is not None and resolve(base, **hub).path.resolve() != source.path.resolve():
        raise LoadError(
            f"{source.given} is a whole model, and --base {os.fspath(base)} would take the place "
            "of its own weights; leave --base out"
        )
    if to not in _PREFIXES:
        warnings.warn(
            f"format {to} holds the heads alone; they are for the weights in {source.given}, which "
            "may be tuned and stay there",
            stacklevel=3,
        )
    return open_checkpoint(source, None)


def _others(raw: Config, model: Checkpoint | None) -> Config:
    """The keys of heads' config.json that no format writes itself."""
    others = {key: value for key, value in raw.items() if key not in _OWN_KEYS}
    given, name = "" if model is None else model.source.given, raw.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return others | {"base_model_name_or_path": given}
    if given and Path(given).name != Path(name).name:
        warnings.warn(
            f"config.json of the heads says that they are for {name}, and --base is {given}; make "
            "sure that this is the same model",
            stacklevel=3,
        )
    return others


@dataclass(frozen=True)
class _Parts:
    """Heads taken apart. `projections` is empty where they use the model's own lm_head."""

    given: str
    num_heads: int
    num_layers: int
    blocks: dict[tuple[int, int, str], Entry]  # by head, layer, "weight" or "bias"
    projections: list[Entry]
    stored_lm_head: Entry | None  # a copy of the model's own
    token_map: Entry | None
    vocab_size: int
    model: Checkpoint | None

    @staticmethod
    def of(heads: Heads, model: Checkpoint | None, vocab_size: int, given: str) -> "_Parts":
        entries = {entry.name: entry for entry in heads.entries}
        info = heads.info
        blocks = {
            (head, layer, kind): entries[f"heads.{head}.{layer}.{kind}"]
            for head in range(info.num_heads)
            for layer in range(info.num_layers)
            for kind in ("weight", "bias")
        }
        for (head, layer, kind), entry in blocks.items():
            if isinstance(entry.file, ArrayTensors):  # a bias that E left out
                blocks[head, layer, kind] = _zeros(entry, blocks[head, layer, "weight"])
        projections = (
            []
            if info.shared_lm_head
            else [entries[f"heads.{head}.lm_head.weight"] for head in range(info.num_heads)]
        )
        return _Parts(
            given,
            info.num_heads,
            info.num_layers,
            blocks,
            projections,
            heads.lm_head,
            entries.get("heads.token_map"),
            vocab_size,
            model,
        )

    @property
    def counts(self) -> Config:
        """Keys of formats A to D."""
        return {"medusa_num_heads": self.num_heads, "medusa_num_layers": self.num_layers}

    def lm_head(self, why: str) -> Entry:
        """The projection that heads share: their own copy, else the base model's."""
        return self.stored_lm_head or self.model_lm_head(why)

    def model_lm_head(self, why: str) -> Entry:
        """The base model's own projection."""
        if self.model is None:
            raise LoadError(f"{self.given}: {why}; name the model they are for with --base")
        wanted = "embed_tokens" if self.model.config["tied_embeddings"] else "lm_head"
        return next(e for e in self.model.entries if e.name == f"{wanted}.weight")

    def whole_projections(self, to: str) -> list[Entry]:
        """A projection for each head that covers the whole vocabulary."""
        if self.token_map is not None:
            raise LoadError(
                f"{self.given}: these heads guess {self.token_map.shape[0]} tokens of the "
                f"vocabulary only, and their token_map would be lost in format {to}, which has a "
                "row for each token; formats that keep it: E"
            )
        if self.projections:
            return self.projections
        why = f"format {to} has a projection for each head, and these heads share the model's"
        return [self.lm_head(why)] * self.num_heads

    def original(self, prefix: str, projections: list[Entry]) -> list[Entry]:
        """All tensors as formats A to D and F spell them."""
        entries = [
            replace(entry, name=f"{prefix}{head}.{layer}.linear.{kind}")
            for (head, layer, kind), entry in self.blocks.items()
        ]
        return entries + [
            replace(entry, name=f"{prefix}{head}.{self.num_layers}.weight")
            for head, entry in enumerate(projections)
        ]


def _write_a(parts: _Parts, folder: Path, config: Config) -> None:
    import torch

    def tensor(entry: Entry) -> torch.Tensor:
        array, stored = entry.read("bf16")
        if stored == "bf16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    entries = parts.original("", parts.whole_projections("A"))
    torch.save({entry.name: tensor(entry) for entry in entries}, folder / "medusa_lm_head.pt")
    _write_config(folder, config | parts.counts)


def _write_b(parts: _Parts, folder: Path, config: Config) -> None:
    entries = parts.original("", parts.whole_projections("B"))
    _write_weights(folder / "medusa_lm_head.safetensors", entries)
    _write_config(folder, config | parts.counts)


def _write_c(parts: _Parts, folder: Path, config: Config) -> None:
    if not parts.num_layers:
        raise LoadError(
            f"{parts.given}: these heads have no layers, and heads of format C are their layers "
            "alone; formats that keep them: A, B, D, E, F"
        )
    if parts.projections or parts.stored_lm_head:
        own = parts.whole_projections("C")
        shared = parts.model_lm_head("format C has no projections, and these heads have their own")
        for head, entry in enumerate(own):
            if not _same_values(entry, shared):
                raise LoadError(
                    f"{parts.given}: the projection of head {head} differs from the model's "
                    "lm_head and would be lost in format C, whose heads share it; formats that "
                    "keep it: A, B, D, E, F"
                )
    _write_weights(folder / "medusa_lm_head.safetensors", parts.original("", []))
    _write_config(folder, config | parts.counts | {"version": "2"})


def _write_e(parts: _Parts, folder: Path, config: Config) -> None:
    biased = any(_bits(e).any() for (_, _, kind), e in parts.blocks.items() if kind == "bias")
    entries = [
        replace(entry, name=f"blocks.{head}.layers.{layer}.{kind}")
        for (head, layer, kind), entry in parts.blocks.items()
        if biased or kind == "weight"
    ]
    own = parts.projections or [
        parts.lm_head("format E holds the projection that heads share, and these do not")
    ]
    entries += [replace(e, name=f"lm_heads.{head}.weight") for head, e in enumerate(own)]
    rows, hidden = own[0].shape
    if parts.token_map is not None:
        entries.append(replace(parts.token_map, name="token_map"))
    own_keys = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "num_heads": parts.num_heads,
        "num_hidden_layers": parts.num_layers,
        "hidden_size": hidden,
        "vocab_size": rows if parts.token_map is None else parts.vocab_size,
        "truncated_vocab_size": rows,
        "medusa_fc_bias": biased,
        "original_lm_head": not parts.projections,
    }
    _write_weights(folder / "model.safetensors", entries)
    _write_config(folder, config | own_keys)


def _write_whole(parts: _Parts, folder: Path, letter: str, keys: Config) -> None:
    """Formats D and F: the base model's own tensors and files, and the heads beside them."""
    if parts.model is None or parts.model.source.kind != "directory":
        given = "" if parts.model is None else f", and {parts.model.source.given} is none"
        raise LoadError(
            f"format {letter} is a whole model with its heads; name the Hugging Face directory (or "
            f"hub id) of the model with --base{given}"
        )
    base = parts.model.source.path
    tensors = hf.open_weights(base)
    entries = [
        Entry(name, tensors.shape(name), tensors.where[name], name)
        for name in tensors
        if not name.startswith(hf.HEAD_PREFIXES)
    ]
    entries += parts.original(_PREFIXES[letter], parts.whole_projections(letter))
    for path in sorted(base.iterdir()):
        heads_own = path.name in ("config.json", CALIBRATION_FILE, DRAFT_TOKENS_FILE)
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not heads_own:
            shutil.copyfile(path, folder / path.name)
    _write_weights(folder / "model.safetensors", entries)
    raw = {key: value for key, value in parts.model.raw.items() if key not in _HEAD_KEYS}
    _write_config(folder, raw | keys)


def _write_d(parts: _Parts, folder: Path, config: Config) -> None:
    _write_whole(parts, folder, "D", parts.counts)


def _write_f(parts: _Parts, folder: Path, config: Config) -> None:
    counts = {"num_medusa_heads": parts.num_heads, "num_medusa_layers": parts.num_layers}
    _write_whole(parts, folder, "F", {"medusa": counts})


_WRITERS: dict[str, Callable[[_Parts, Path, Config], None]] = {
    "A": _write_a,
    "B": _write_b,
    "C": _write_c,
    "D": _write_d,
    "E": _write_e,
    "F": _write_f,
}


def _raw(folder: Path) -> Config:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _is_model(folder: Path, raw: Config) -> bool:
    """Whether a directory is a whole model, as formats D and F are."""
    apart = any((folder / f"medusa_lm_head.{kind}").is_file() for kind in ("safetensors", "pt"))
    return not apart and raw.get("model_type") not in (None, "medusa") and hf.has_weights(folder)


def _sizes(folder: Path, raw: Config) -> Config:
    """Hidden size and vocabulary that heads alone are for, from their tensors."""
    if (folder / "medusa_lm_head.safetensors").is_file():
        tensors = TensorSet([SafetensorsTensors(folder / "medusa_lm_head.safetensors")])
    elif (folder / "medusa_lm_head.pt").is_file():
        tensors = TensorSet([PickledTensors(folder / "medusa_lm_head.pt")])
    elif hf.has_weights(folder):
        tensors = hf.open_weights(folder)
    else:
        raise LoadError(f"{folder} holds no Medusa heads; give a directory in a format A to F")
    shapes = {name: tensors.shape(name) for name in tensors}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    projections = [
        shape
        for name, shape in matrices.items()
        if "lm_head" in name or ("linear" not in name and "layers" not in name)
    ]
    hidden = next((shape[1] for shape in matrices.values()), 1)
    vocab = raw.get("vocab_size") if raw.get("model_type") == "medusa" else None
    if not isinstance(vocab, int):
        vocab = max((shape[0] for shape in projections), default=1)
    return {"hidden_size": hidden, "vocab_size": vocab}


def _zeros(bias: Entry, weight: Entry) -> Entry:
    """A bias of zeros in the type of its weight."""
    return Entry(
        bias.name, bias.shape, weight.file, weight.key, lambda a: np.zeros(len(a), a.dtype)
    )


def _bits(entry: Entry) -> NDArray[np.uint8]:
    array, _ = entry.read("bf16")
    return array.reshape(-1).view(np.uint8)


def _same_values(first: Entry, second: Entry) -> bool:
    """Whether two matrices hold the same numbers, whatever their types; compared in pieces."""
    if first.shape != second.shape:
        return False
    (one, kind), (other, other_kind) = first.read("bf16"), second.read("bf16")
    return all(
        np.array_equal(
            _widened(one[row : row + _ROWS], kind), _widened(other[row : row + _ROWS], other_kind)
        )
        for row in range(0, len(one), _ROWS)
    )


def _widened(array: NDArray[Any], stored: str) -> NDArray[np.uint32]:
    """The numbers as bits of f32."""
    if stored == "bf16":
        widened: NDArray[np.uint32] = array.astype(np.uint32) << np.uint32(16)
        return widened
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def _write_weights(path: Path, entries: list[Entry]) -> None:
    for entry in entries:
        written = entry.dtype in (*FLOAT_BYTES, "i32") or can_expand(entry.file, entry.dtype)
        if not written:
            raise LoadError(
                f"{entry.file.path}: tensor {entry.key} is stored as {entry.dtype}; f32, f16, bf16 "
                "and i32 can be written"
            )
    with path.open("wb") as file:
        write_tensors(file, entries, {"format": "pt"}, "bf16")


def _write_config(folder: Path, config: Config) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial.rename(path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError of a full disk
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
