"""Who runs when: every prompt goes to all contestants, one after another, in rotating order."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import CONTESTANTS, Job
from benchmarks.peers.figures import Run
from benchmarks.peers.process import ContestantError, Worker, worker_environment
from benchmarks.peers.prompts import Prompt

WARM_UP_TOKENS = 16


@dataclass
class Entry:
    """A contestant that was ready.

    Attributes:
        detail: what it computes with.
        imports_mib: resident once its modules were imported, the model not yet loaded.
        loaded_mib: resident once the model was.
        peak_mib: the most that was ever resident.
    """

    detail: str
    imports_mib: float
    loaded_mib: float
    peak_mib: float = 0.0


@dataclass
class Outcome:
    """What a contest gave.

    Attributes:
        entries: by name, in the order of the table.
        runs: answers to the prompts.
        prefills: answers of one token to the long prompts.
        left_out: by name, why.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    prefills: list[Run] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: the one that began the last turn comes last."""
    start = turn % len(names) if names else 0
    return [*names[start:], *names[:start]]


class Contest:
    """Contestants in memory, one of which runs."""

    def __init__(
        self, job: Job, *, is_gguf: bool, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Begin with nobody.

        Args:
            job: for everyone; `converted` is filled in for whom it concerns.
            is_gguf: whether the model is a .gguf file, without which peers have nothing to read.
            say: told what is being done.
        """
        self._job, self._is_gguf, self._say = job, is_gguf, say
        self._workers: dict[str, Worker] = {}
        self._stack = ExitStack()
        self.outcome = Outcome()

    def __enter__(self) -> Contest:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()
        self._stack.close()

    def enter(self, name: str) -> None:
        """Start a contestant, or note why it is left out."""
        contestant = CONTESTANTS[name]
        reason = contestant.missing()
        if reason is None and contestant.needs_gguf and not self._is_gguf:
            reason = "it is compared on a .gguf file; give one with --model"
        if reason is not None:
            self._leave_out(name, reason)
            return
        self._say(f"loading {name}")
        try:
            job = self._job
            if name == "ctranslate2":
                folder = self._stack.enter_context(_converted(job))
                job = replace(job, converted=str(folder))
            worker = Worker(name, job)
        except ContestantError as error:
            self._leave_out(name, str(error))
            return
        self._workers[name] = worker
        self.outcome.entries[name] = Entry(**worker.ready)

    def run(
        self,
        prompts: Sequence[Prompt],
        windows: Sequence[list[int]],
        *,
        tokens: int,
        rounds: int,
        tick: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Ask everyone everything.

        Args:
            prompts: to answer.
            windows: long prompts to read only.
            tokens: per answer at most.
            rounds: over all of them.
            tick: called after each turn.

        Returns:
            The outcome; who failed on the way stands among the left out with no figures.
        """
        self._say("warming up")
        for name in list(self._workers):
            for ids in [prompts[0].ids, *windows[:1]]:
                self._ask(name, ids, WARM_UP_TOKENS)
        outcome = self.outcome
        for round_index in range(rounds):
            turns = [(prompt, tokens, outcome.runs) for prompt in prompts]
            turns += [(Prompt("prefill", ids), 1, outcome.prefills) for ids in windows]
            for index, (prompt, limit, runs) in enumerate(turns):
                self._say(f"round {round_index + 1}, {prompt.category}")
                for name in rotated(list(self._workers), index + round_index):
                    reply = self._ask(name, prompt.ids, limit)
                    if reply is not None:
                        marks = tuple((seconds, count) for seconds, count in reply["marks"])
                        answer = tuple(reply["tokens"])
                        runs.append(Run(name, index, round_index, prompt.category, answer, marks))
                tick()
        outcome.runs = [run for run in outcome.runs if run.name in self._workers]
        outcome.prefills = [run for run in outcome.prefills if run.name in self._workers]
        return outcome

    def _ask(self, name: str, ids: list[int], limit: int) -> dict[str, Any] | None:
        worker = self._workers.get(name)
        if worker is None:
            return None
        try:
            reply = worker.ask(ids, limit)
        except ContestantError as error:
            self._workers.pop(name).close()
            self._leave_out(name, str(error))
            return None
        self.outcome.entries[name].peak_mib = reply["peak_mib"]
        return reply

    def _leave_out(self, name: str, reason: str) -> None:
        self.outcome.entries.pop(name, None)
        self.outcome.left_out[name] = reason
        self._say(f"{name} is left out: {reason}")


@contextmanager
def _converted(job: Job) -> Iterator[Path]:
    """The model in the form of CTranslate2, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers.convert", job.model, folder],
            env=worker_environment(job.threads),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise ContestantError(f"the model could not be converted: {lines[-1][:300]}")
        yield Path(folder) / "model"
