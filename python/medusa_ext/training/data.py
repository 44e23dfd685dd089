"""Records of tokens, as `medusa-ext distill` writes them, split in two."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.distill.records import Record, read_records
from medusa_ext.loading import LoadError

DRAFT_TOKENS = 4096


def digest(record: Record) -> bytes:
    """Of tokens and mask: 32 bytes, the same wherever the record stands."""
    return hashlib.sha256(record.ids.tobytes() + record.generated.tobytes()).digest()


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

    def learned(self) -> list[Record]:
        """The records that are not set aside."""
        return [record for record, out in zip(self.records, self.held_out, strict=True) if not out]

    def frequent_tokens(self, vocab_size: int) -> list[int]:
        """Tokens that the model wrote most often in what is learned from, by falling frequency.

        Enough for heads to choose among: a twelfth of the vocabulary, where that is more than
        DRAFT_TOKENS. Tokens that are equally frequent, or absent, come by id.
        """
        counts = np.zeros(vocab_size, np.int64)
        for record in self.learned():
            counts += np.bincount(record.ids[record.generated], minlength=vocab_size)
        size = min(vocab_size, max(DRAFT_TOKENS, vocab_size // 12))
        chosen: list[int] = np.argsort(-counts, kind="stable")[:size].tolist()
        return chosen

    def digest(self) -> str:
        """Of all records and their order."""
        return hashlib.sha256(b"".join(map(digest, self.records))).hexdigest()


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
        for record in read_records(
            path, vocab_size=vocab_size, max_context=max_context, max_length=max_length
        ):
            if record.generated[1:].any():  # the first token has no position before it
                records.append(Record(record.ids, record.generated))
                found = record.line.get("settings")
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
    draws = [int.from_bytes(digest(record)[:8], "big") / 2**64 for record in records]
    chosen = np.array([draw < share for draw in draws])
    if not chosen.any():
        chosen[int(np.argmin(draws))] = True
    if chosen.all():
        chosen[int(np.argmax(draws))] = False
    return chosen
