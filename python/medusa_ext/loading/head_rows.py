"""Fewer tokens for Medusa heads to choose among: the frequent ones, other rows are never read.

A head reads its whole lm_head in every step, and with a vocabulary of 128 thousand tokens the heads
read nearly a third as much as the model. They only guess, so a token that they never propose costs
a little acceptance and never changes the output. Source: FR-Spec, arXiv:2502.14856.

Of heads with lm_heads of their own, rows are left out. Heads that share the model's lm_head, which
must stay whole, get a small matrix of their own to share: copies of some of its rows.

Which tokens are frequent is said by draft_tokens.json beside the heads: a JSON list of ids, the
most frequent first. Without it the order of ids stands in for it: byte-pair vocabularies list
single bytes first, then merges as they were learnt, the commonest pair first.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.config import Config
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import ArrayTensors
from medusa_ext.loading.heads import Heads
from medusa_ext.loading.plan import Entry
from medusa_ext.options import integer

DRAFT_TOKENS_FILE = "draft_tokens.json"
_MAX_BYTES = 16 << 20
_REPAIR = "make it again, or remove it"

# How many tokens; "auto": as draft_tokens.json says, if there is one; None: all.
HeadVocab: TypeAlias = int | Literal["auto"] | None


def check_head_vocab(value: object) -> HeadVocab:
    """Return `value`, or the number that a text names; ValueError where it is something else."""
    if value is None:
        return None
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    try:
        return integer("head_vocab", value, 1)
    except ValueError as error:
        raise LoadError(str(error).replace("be an", 'be "auto", None or an')) from None


def choose_tokens(
    heads: Heads,
    wanted: HeadVocab,
    config: Config,
    base: Iterable[Entry],
    special: Callable[[], set[int]],
) -> Heads:
    """The same heads, which choose among fewer tokens.

    Args:
        heads: as they were found; nothing has been read.
        wanted: how many tokens, checked.
        config: of the model.
        base: its tensors.
        special: asked where the order of ids counts: ids that are kept however rare, which are
            special and added tokens and those that end a text.

    Raises:
        LoadError: the number is impossible. A damaged draft_tokens.json is a warning.
    """
    vocab_size = config["vocab_size"]
    if wanted is None:
        return _whole(heads, vocab_size)
    if isinstance(wanted, int) and wanted > vocab_size:
        raise LoadError(
            f"head_vocab is {wanted}; the model's vocabulary has {vocab_size} tokens: give at most "
            "that, or leave head_vocab out"
        )
    listed = _listed(heads, vocab_size)
    size = len(listed) if wanted == "auto" else wanted
    stored = _stored_ids(heads, vocab_size)
    if not 0 < size < len(stored):  # heads that were cut before may have fewer
        return heads
    if heads.config["shared_lm_head"] and len(stored) < vocab_size:
        return _cut(heads, np.arange(size), stored)  # a file's copies: most frequent first
    always: set[int] = set()
    if size > len(listed):
        always = set(np.intersect1d(list(special()), stored).tolist())
        if not listed and size <= len(always):
            raise LoadError(
                f"head_vocab is {size}; the {len(always)} special and added tokens are always "
                f"kept, so give more than {len(always)}"
            )
    rows = _first(stored, listed, always, size, vocab_size)
    if heads.config["shared_lm_head"]:
        return _share(heads, rows, config, base)
    return _cut(heads, np.sort(rows), stored)


def _whole(heads: Heads, vocab_size: int) -> Heads:
    """All tokens again, where an exported file holds copies of some of the model's rows."""
    if not heads.config["shared_lm_head"] or not 0 < heads.config["head_vocab"] < vocab_size:
        return heads
    entries = [entry for entry in heads.entries if entry.name not in _DRAFT]
    return _sized(heads, vocab_size, entries)


def _first(
    stored: NDArray[np.int32],
    listed: Sequence[int],
    always: Iterable[int],
    size: int,
    vocab_size: int,
) -> NDArray[np.intp]:
    """Which of the stored rows come first: as listed, those always kept, then by id."""
    order = np.array([*listed, *sorted(always)], np.intp)
    place = len(order) + np.arange(vocab_size)
    place[order[::-1]] = np.arange(len(order))[::-1]  # of a token that stands twice, the first
    return np.argsort(place[stored], kind="stable")[:size]


def _share(heads: Heads, rows: NDArray[np.intp], config: Config, base: Iterable[Entry]) -> Heads:
    """Copies of rows of the model's lm_head, for all heads."""
    name = "embed_tokens.weight" if config["tied_embeddings"] else "lm_head.weight"
    whole = next(entry for entry in base if entry.name == name)
    copies = replace(whole.only(rows), name="heads.draft_lm_head.weight", copied=True)
    ids = rows.astype(np.int32)
    return _sized(heads, len(rows), [*heads.entries, copies, _token_map(heads, ids)])


def _cut(heads: Heads, rows: NDArray[np.intp], stored: NDArray[np.int32]) -> Heads:
    """Some of the rows that the heads hold, in their order."""
    entries = []
    for entry in heads.entries:
        if entry.name.endswith("lm_head.weight"):
            entries.append(entry.only(rows))
        elif entry.name != "heads.token_map":
            entries.append(entry)
    return _sized(heads, len(rows), [*entries, _token_map(heads, stored[rows])])


_DRAFT = ("heads.draft_lm_head.weight", "heads.token_map")


def _sized(heads: Heads, size: int, entries: list[Entry]) -> Heads:
    info, config = replace(heads.info, head_vocab=size), {**heads.config, "head_vocab": size}
    return replace(heads, info=info, config=config, entries=entries)


def _token_map(heads: Heads, ids: NDArray[np.int32]) -> Entry:
    file = ArrayTensors(heads.info.path)
    file.arrays["token_map"] = ids
    return Entry("heads.token_map", (len(ids),), file, "token_map")


def _stored_ids(heads: Heads, vocab_size: int) -> NDArray[np.int32]:
    """Vocabulary ids of the rows that the heads have now; LoadError where they are none."""
    for entry in heads.entries:
        if entry.name == "heads.token_map":
            ids: NDArray[np.int32] = entry.read("")[0]
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            if len(wrong):
                raise LoadError(
                    f"{entry.file.path}: tensor {entry.key} holds {wrong[0]}; wanted ids of the "
                    f"vocabulary, 0 to {vocab_size - 1}"
                )
            if len(np.unique(ids)) < len(ids):
                raise LoadError(f"{entry.file.path}: tensor {entry.key} names a token twice")
            return ids
    return np.arange(vocab_size, dtype=np.int32)


def _listed(heads: Heads, vocab_size: int) -> list[int]:
    """The ids in draft_tokens.json; none, and a warning, where the file is of no use."""
    path = heads.info.path / DRAFT_TOKENS_FILE
    if heads.info.format == "export" or not path.is_file():
        return []
    try:
        return read_draft_tokens(path, vocab_size)
    except LoadError as error:
        warnings.warn(f"{error}; it is not used", stacklevel=4)
        return []


def read_draft_tokens(path: Path, vocab_size: int) -> list[int]:
    """Read and check a list of token ids.

    Raises:
        LoadError: what is wrong with it, and what to do.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LoadError(f"{path} has over {_MAX_BYTES} bytes and is no list of ids; {_REPAIR}")
        ids = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise LoadError(f"{path} is no JSON ({error}); {_REPAIR}") from None
    if not isinstance(ids, list) or not ids:
        raise LoadError(f"{path} is no list of token ids; {_REPAIR}")
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise LoadError(
                f"{path}: element {index} is {json.dumps(token)[:40]}; wanted an id of the "
                f"vocabulary, 0 to {vocab_size - 1}; {_REPAIR}"
            )
    if len(set(ids)) < len(ids):
        raise LoadError(f"{path} names a token twice; {_REPAIR}")
    return ids
