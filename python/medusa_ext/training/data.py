"""Records of tokens, as `medusa-ext distill` writes them: read, checked, and split."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading import LoadError


@dataclass(frozen=True)
class Record:
    """One conversation. `generated` marks the tokens that the model wrote, end-of-turn included."""

    ids: NDArray[np.int32]  # [S]
    generated: NDArray[np.bool_]  # [S]

    def digest(self) -> bytes:
        """Of tokens and mask: 32 bytes, the same wherever the record stands."""
        return hashlib.sha256(self.ids.tobytes() + self.generated.tobytes()).digest()


@dataclass
class Data:
    """All records of some files, in their order."""

    records: list[Record]
    held_out: NDArray[np.bool_]  # per record
    paths: list[Path]
    skipped: int  # records without a token that the model wrote
    settings: dict[str, Any] = field(default_factory=dict)  # of the first record: model, ...

    def num_tokens(self, held_out: bool) -> int:
        """Tokens that the model wrote, in one part of the data."""
        chosen = zip(self.records, self.held_out, strict=True)
        return sum(int(record.generated.sum()) for record, out in chosen if out == held_out)

    def digest(self) -> str:
        """Of all records and their order."""
        return hashlib.sha256(b"".join(record.digest() for record in self.records)).hexdigest()


def read_data(
    paths: Sequence[Path],
    *,
    vocab_size: int,
    max_context: int,
    held_out: float,
    max_length: int | None = None,
) -> Data:
    """Read JSONL files of records and set some aside for evaluation.

    A record is set aside by its own content, so that data which grows keeps its split and a record
    that stands twice is on one side only.

    Args:
        paths: files with one object a line: input_ids, assistant_mask (0 or 1 for each id), and
            more that is not needed here.
        vocab_size: V of the model.
        max_context: tokens that the model can see.
        held_out: share of the records to set aside, in (0, 1).
        max_length: cut longer records here; None: refuse those beyond max_context.

    Raises:
        LoadError: a file, its line, and what is wrong with it; or nothing is left to train on.
    """
    records: list[Record] = []
    settings: dict[str, Any] = {}
    skipped = 0
    for path in paths:
        before = len(records) + skipped
        for where, value in _objects(path):
            record = _record(value, where, vocab_size, max_context, max_length)
            if record.generated[1:].any():  # the first token has no position before it
                records.append(record)
                found = value.get("settings")
                settings = settings or (found if isinstance(found, dict) else {})
            else:
                skipped += 1
        if len(records) + skipped == before:
            raise LoadError(f"{path} holds no records; write some with: medusa-ext distill")
    if len(records) < 2:
        raise LoadError(
            f"{', '.join(map(str, paths))}: {len(records)} of {len(records) + skipped} records "
            "hold a token that the model wrote (assistant_mask 1); wanted at least 2, one to learn "
            "from and one to set aside"
        )
    return Data(records, _split(records, held_out), list(paths), skipped, settings)


def _split(records: Sequence[Record], share: float) -> NDArray[np.bool_]:
    draws = [int.from_bytes(record.digest()[:8], "big") / 2**64 for record in records]
    chosen = np.array([draw < share for draw in draws])
    if not chosen.any():
        chosen[int(np.argmin(draws))] = True
    if chosen.all():
        chosen[int(np.argmax(draws))] = False
    return chosen


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place for messages."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise LoadError(f"{where} is not valid JSON: {error}") from None
                if not isinstance(value, dict):
                    raise LoadError(f"{where} holds a JSON {type(value).__name__}; wanted objects")
                yield where, value
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path} is not UTF-8 text; wanted one JSON object a line") from None


def _record(
    value: dict[str, Any], where: str, vocab_size: int, max_context: int, max_length: int | None
) -> Record:
    ids = _whole_numbers(value.get("input_ids"), f"{where}: input_ids")
    mask = _whole_numbers(value.get("assistant_mask"), f"{where}: assistant_mask")
    if len(ids) != len(mask):
        raise LoadError(
            f"{where}: {len(ids)} input_ids and {len(mask)} of assistant_mask; wanted equal numbers"
        )
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if len(bad):
        raise LoadError(
            f"{where}: token {bad[0]} is outside the model's vocabulary of {vocab_size}; is the "
            "data from another model?"
        )
    if ((mask != 0) & (mask != 1)).any():
        raise LoadError(f"{where}: assistant_mask holds other numbers than 0 and 1")
    if len(ids) > min(max_length or max_context, max_context):
        if max_length is None:
            raise LoadError(
                f"{where}: {len(ids)} tokens; the model's context holds {max_context}: cut longer "
                "records with --max-length"
            )
        ids, mask = ids[: min(max_length, max_context)], mask[: min(max_length, max_context)]
    return Record(ids.astype(np.int32), mask.astype(bool))


def _whole_numbers(value: object, what: str) -> NDArray[np.int64]:
    if not isinstance(value, list) or not _are_ints(value):
        raise LoadError(f"{what} is missing or no list of whole numbers")
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise LoadError(f"{what} holds a number beyond 64 bits") from None


def _are_ints(values: Iterable[object]) -> bool:
    return all(type(value) is int for value in values)
