"""The file of records: one JSON object a line, in the order of their numbers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from medusa_ext.options import shown


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
                if data.endswith(b"\n"):  # else it is half a line, the last one
                    self._take(data, f"{self.path}, line {number}")
                    size += len(data)
        return size

    def _take(self, data: bytes, where: str) -> None:
        try:
            line = json.loads(data)
            settings, number = line["settings"], line["record"]
            sizes = len(line["input_ids"]), len(line["assistant_mask"])
            in_order = type(number) is int and number >= self.next_number
            if not (in_order and sizes[0] == sizes[1] and isinstance(settings, dict)):
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
