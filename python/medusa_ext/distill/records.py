"""The file of records: one JSON object a line, in the order of their numbers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading import LoadError
from medusa_ext.options import shown

_BEGINNING = b'{"record":'  # of every line


@dataclass(frozen=True)
class Record:
    """A conversation as tokens.

    Attributes:
        ids: [S] i32, as the model saw and wrote them.
        generated: [S], the tokens that the model wrote, its end-of-sequence token included.
        line: everything that the file says of it.
    """

    ids: NDArray[np.int32]
    generated: NDArray[np.bool_]
    line: Mapping[str, Any] = field(default_factory=dict)


def read_records(
    path: Path, *, vocab_size: int, max_context: int, max_length: int | None = None
) -> Iterator[Record]:
    """Read a file of records: input_ids and assistant_mask, a 1 for each token of the model's.

    Args:
        path: of the file.
        vocab_size: V of the model.
        max_context: tokens that the model can see.
        max_length: cut longer records here; None: refuse those beyond max_context.

    Raises:
        LoadError: the file, its line, and what is wrong with it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    where = f"{path}, line {number}"
                    yield _record(text, where, vocab_size, max_context, max_length)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoadError(f"cannot read {path}: it is not UTF-8") from None


def _record(
    text: str, where: str, vocab_size: int, max_context: int, max_length: int | None
) -> Record:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where} is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise LoadError(f"{where} holds {shown(line)}; wanted a record of medusa-ext distill")
    ids, mask = (_whole_numbers(line, name, where) for name in ("input_ids", "assistant_mask"))
    if len(ids) != len(mask) or ((mask != 0) & (mask != 1)).any():
        raise LoadError(
            f"{where}: assistant_mask must hold 0 or 1 for each of the {len(ids)} input_ids"
        )
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if len(bad):
        raise LoadError(
            f"{where}: token {bad[0]} is outside the model's vocabulary of {vocab_size}; is the "
            "data from another model?"
        )
    if max_length is None and len(ids) > max_context:
        raise LoadError(
            f"{where}: {len(ids)} tokens; the model's context holds {max_context}: leave the "
            "record out or cut it (medusa-ext train does with --max-length)"
        )
    end = min(max_length or max_context, max_context)
    return Record(ids[:end].astype(np.int32), mask[:end].astype(bool), line)


def _whole_numbers(line: Mapping[str, Any], name: str, where: str) -> NDArray[np.int64]:
    numbers = line.get(name)
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise LoadError(f"{where}: {name} is missing or no list of whole numbers")
    try:
        return np.array(numbers, np.int64)
    except OverflowError:
        raise LoadError(f"{where}: {name} holds a number beyond 64 bits") from None


class RecordFile:
    """A file that grows by whole lines; what a killed run left behind is taken up.

    Attributes:
        records: lines in it.
        tokens: of assistants in it.
        next_number: the record after the last line's.
        first_turns: number and first user turn of each line.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Open or begin a file, and cut a half line at its end.

        Args:
            path: of the file.
            settings: that every line carries; those in the file must be the same.

        Raises:
            ValueError: another process writes to it, a line is no record, or it was made with
                other settings; nothing was changed.
            OSError: it cannot be opened.
        """
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))  # as they come back from the file
        self.records = self.tokens = self.next_number = 0
        self.first_turns: list[tuple[int, str]] = []
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            self._lock()
            self._size = self._read()
            self._file.truncate(self._size)
            self._file.seek(self._size)
        except BaseException:
            self._file.close()
            raise

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line, whole or not at all; OSError names the file."""
        line = {**record, "settings": self._settings}
        data = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._size += len(data)
        self._count(record)

    def close(self) -> None:
        """Bring all lines to the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {self.path}") from None

    def _read(self) -> int:
        """Take up the lines of the file; return where the last whole one ends."""
        size = 0
        with self.path.open("rb") as lines:
            for number, data in enumerate(lines, 1):
                if not data.endswith(b"\n") and data[: len(_BEGINNING)] == _BEGINNING[: len(data)]:
                    break  # half a line
                self._take(data, f"{self.path}, line {number}")
                size += len(data)
        return size

    def _take(self, data: bytes, where: str) -> None:
        try:
            line = json.loads(data)
            settings, number = line["settings"], line["record"]
            sizes = len(line["input_ids"]), len(line["assistant_mask"])
            in_order = type(number) is int and number >= self.next_number
            whole = data.endswith(b"\n") and isinstance(settings, dict)
            if not (whole and in_order and sizes[0] == sizes[1]):
                raise ValueError
            first = next(m["content"] for m in line["messages"] if m["role"] == "user")
            self._count(line)
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
            raise ValueError(
                f"{where} is no record of distill; move the file away or give another name"
            ) from None
        self._compare(settings)
        self.first_turns.append((number, str(first)))

    def _count(self, record: Mapping[str, Any]) -> None:
        self.records += 1
        self.tokens += sum(record["assistant_mask"])
        self.next_number = record["record"] + 1

    def _compare(self, found: dict[str, Any]) -> None:
        if found == self._settings:
            return
        names = [*self._settings, *(name for name in found if name not in self._settings)]
        differences = [
            f"{name} {shown(found.get(name))}, now {shown(self._settings.get(name))}"
            for name in names
            if found.get(name) != self._settings.get(name)
        ]
        raise ValueError(
            f"{self.path} was made with other settings: {'; '.join(differences)}. Give the same "
            "ones to go on with it, or another file"
        )

    def __enter__(self) -> RecordFile:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
