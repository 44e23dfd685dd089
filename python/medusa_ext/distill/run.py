"""Many records side by side: as one text ends the next begins, and lines come out in order."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from medusa_ext.distill.compose import Composer, LeftOut, Making, Outcome, Recipe
from medusa_ext.distill.prompts import Prompts
from medusa_ext.distill.records import RecordFile
from medusa_ext.options import integer

if TYPE_CHECKING:
    from medusa_ext.answers import Batch
    from medusa_ext.engine import Engine
    from medusa_ext.results import Result

# Prompts of the model's own that may be of no use in a row before it is told that it has no others.
MAX_LEFT_OUT = 2000
_REPORT_S = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        records: lines in the file.
        tokens: of assistants in the file.
        new_records: of these, made by this run.
        new_tokens: of these, made by this run.
        generated: tokens that this run generated: prompts of the model's own and texts in the
            making are among them.
        left_out: numbers of this run without a record, by reason.
        seconds: since the run began.
        remaining_s: seconds to go at the rate so far; None while unknown.
    """

    records: int
    tokens: int
    new_records: int
    new_tokens: int
    generated: int
    left_out: Mapping[str, int]
    seconds: float
    remaining_s: float | None


def distill(
    engine: Engine,
    path: str | os.PathLike[str],
    recipe: Recipe,
    prompts: Prompts | None = None,
    *,
    records: int | None = None,
    tokens: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Write what a model says to prompts, or to prompts of its own, to a JSONL file.

    The file is the same, byte for byte, whatever the batch, the drafter and the number of threads,
    and however often the run was interrupted: the same call goes on where the file ends.

    Args:
        engine: that writes; all of its max_batch texts are kept busy.
        path: of the file. A line has "record" (its number), "seed", "input_ids" [S], as the model
            saw and chose them, "assistant_mask" [S] (1: chosen by the model in an answer, its
            end-of-sequence token included), "messages", "settings", and "category" of the prompt.
        recipe: what decides the records.
        prompts: None: the model writes its own, no two alike.
        records: lines that the file shall have; None: no limit.
        tokens: of assistants that the file shall have at least; None: no limit. The first limit
            that is reached ends the run, as does the last prompt.
        on_progress: called a few times a second.

    Returns:
        How it ended.

    Raises:
        ValueError: an argument is impossible, or the file was made with other settings.
        OSError: the file cannot be written; what is in it stays whole.
        RuntimeError: the model writes no prompt of its own that can be used.
    """
    check_goals(records, tokens, endless=prompts is None)
    composer = Composer(engine, recipe, prompts)
    info = engine.info
    settings = {
        "model": info["model"],
        # Only where they differ, so that files made before there were blocks can be continued.
        **({"weights": info["weights"]} if info["weights"] != info["dtype"] else {}),
        "dtype": info["dtype"],
        "max_context": engine.max_context,
        "prompts": None if prompts is None else prompts.name,
        "prompts_sha256": None if prompts is None else prompts.digest,
        **asdict(recipe),
    }
    with RecordFile(path, settings) as file, closing(engine.batch()) as batch:
        run = _Run(composer, file, batch, engine.max_batch, records, tokens)
        while run.step():
            if on_progress is not None and run.report_is_due():
                on_progress(run.progress())
        return run.progress()


def check_goals(records: int | None, tokens: int | None, *, endless: bool) -> None:
    """Refuse, with ValueError, a run that could not end."""
    for name, value in (("records", records), ("tokens", tokens)):
        if value is not None:
            integer(name, value, 1)
    if endless and records is None and tokens is None:
        raise ValueError("give records or tokens: prompts of the model's own have no end")


class _Run:
    """Records between their beginning and the file."""

    def __init__(
        self,
        composer: Composer,
        file: RecordFile,
        batch: Batch,
        slots: int,
        records: int | None,
        tokens: int | None,
    ) -> None:
        self._composer = composer
        self._file = file
        self._batch = batch
        self._slots = slots
        self._wanted = {"records": records, "tokens": tokens}
        self._making: dict[int, Making] = {}
        self._made: dict[int, Outcome] = {}  # those that wait for an earlier one
        self._next_start = self._next_write = file.next_number
        self._left_out: Counter[str] = Counter()
        self._in_a_row = 0
        self._old = {"records": file.records, "tokens": file.tokens}
        self._began = self._reported = time.monotonic()
        if composer.count is None:
            for number, text in file.first_turns:
                composer.claims.claim(text, number)

    def step(self) -> bool:
        """Make a few tokens of all texts; False: nothing is left to do."""
        if self._is_done():
            return False
        self._fill()
        if self._making:
            for number, result in self._batch.wait():
                self._advance(number, result)
        self._write()
        return not self._is_done() and (bool(self._making) or self._has_next())

    def report_is_due(self) -> bool:
        """Whether the last report is a while ago."""
        now = time.monotonic()
        if now - self._reported < _REPORT_S:
            return False
        self._reported = now
        return True

    def progress(self) -> Progress:
        """How far it is."""
        now = {"records": self._file.records, "tokens": self._file.tokens}
        new = {name: now[name] - self._old[name] for name in now}
        seconds = time.monotonic() - self._began
        wanted = dict(self._wanted)
        if self._composer.count is not None:  # left-out prompts end the run too, a little sooner
            left = now["records"] + self._composer.count - self._next_write
            wanted["records"] = min(left, wanted["records"] or left)
        remaining = [
            max(0, goal - now[name]) * seconds / new[name]
            for name, goal in wanted.items()
            if goal is not None and new[name] > 0
        ]
        return Progress(
            records=now["records"],
            tokens=now["tokens"],
            new_records=new["records"],
            new_tokens=new["tokens"],
            generated=self._batch.num_tokens,
            left_out=dict(self._left_out),
            seconds=seconds,
            remaining_s=min(remaining, default=None),
        )

    def _is_done(self) -> bool:
        now = {"records": self._file.records, "tokens": self._file.tokens}
        return any(goal is not None and now[name] >= goal for name, goal in self._wanted.items())

    def _has_next(self) -> bool:
        return self._composer.count is None or self._next_start < self._composer.count

    def _fill(self) -> None:
        # The first alone: what all prompts begin with, the template's system message, is then in
        # the cache when the others come.
        slots = self._slots if self._batch.num_tokens else 1
        while len(self._making) < slots and self._has_next():
            number = self._next_start
            self._next_start += 1
            self._making[number] = self._composer.make(number)
            self._advance(number, None)

    def _advance(self, number: int, result: Result | None) -> None:
        """Give a record what it asked for, and start what it asks for next."""
        making = self._making.get(number)
        if making is None:  # lost its prompt in this very step
            return
        try:
            # A generator that has not begun takes None.
            request = making.send(result)  # type: ignore[arg-type]
        except StopIteration as stop:
            del self._making[number]
            self._made[number] = stop.value
        else:
            self._batch.add(number, request.tokens, **request.options)
        lost = self._composer.claims.lost
        while lost:
            later = lost.pop()
            self._making.pop(later, None)
            self._batch.drop(later)
            self._made[later] = LeftOut("repeated")

    def _write(self) -> None:
        while self._next_write in self._made and not self._is_done():
            outcome = self._made.pop(self._next_write)
            self._next_write += 1
            if isinstance(outcome, LeftOut):
                self._left_out[outcome] += 1
                self._in_a_row += 1
                self._check_hope()
            else:
                self._file.write(outcome)
                self._in_a_row = 0

    def _check_hope(self) -> None:
        if self._composer.count is None and self._in_a_row >= MAX_LEFT_OUT:
            counts = ", ".join(f"{count} {why}" for why, count in self._left_out.most_common())
            raise RuntimeError(
                f"the model wrote {self._in_a_row} user turns in a row that cannot be used "
                f"({counts}); give prompts, or other limits"
            )
