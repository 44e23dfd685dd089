"""`python -m benchmarks.peers`: measure, print, write."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.peers import machine, prompts, report, settings
from benchmarks.peers.contest import Contest
from benchmarks.peers.contestants import Job
from benchmarks.peers.prompts import InputError, Prompt, Text
from benchmarks.peers.settings import Settings
from medusa_ext.loading import LoadError
from medusa_ext.loading.source import Source, resolve

# Nodes of a tree, tokens drafted ahead: no contestant may meet the end of its context.
ROOM_FOR_GUESSES = 64
WIDTH = 160  # of the table in a file


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit status."""
    wanted = settings.parse(arguments)
    try:
        return _measure(wanted, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _measure(wanted: Settings, arguments: Sequence[str]) -> int:
    try:
        source = resolve(wanted.model, local_files_only=True)
    except LoadError as error:
        raise InputError(str(error)) from None
    questions = prompts.read_questions(wanted.prompts)
    text = Text.of(source)
    asked = [text.prompt(question) for question in prompts.spread(questions, wanted.limit)]
    windows = text.windows(questions, wanted.prefills) if wanted.prefills else []
    job = Job(
        model=str(source.path.resolve()),
        heads=wanted.heads,
        weights=wanted.weights,
        converted=None,
        threads=wanted.threads,
        context=_context(wanted, text, asked, windows),
        eos_ids=text.eos_ids,
    )

    load = os.getloadavg()[0]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with progress, Contest(job, is_gguf=source.kind == "gguf", say=_Teller(progress)) as contest:
        for name in wanted.only:
            contest.enter(name)
        if not contest.outcome.entries:
            reasons = "; ".join(f"{name}: {why}" for name, why in contest.outcome.left_out.items())
            raise InputError(f"nobody is left to run; {reasons}")
        bar = progress.add_task("", total=wanted.rounds * (len(asked) + len(windows)))
        outcome = contest.run(
            asked,
            windows,
            tokens=wanted.tokens,
            rounds=wanted.rounds,
            tick=lambda: progress.advance(bar),
        )

    found = report.lines(outcome, text.eos_ids)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    report.show(console, found, outcome.left_out)
    try:
        paths, no_chart = report.write(
            wanted.out, _about(wanted, arguments, source, load), found, outcome
        )
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from None
    for line in [report.busy(load), no_chart, f"wrote {', '.join(map(str, paths))}"]:
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if report.is_exact(found) else 1


class _Teller:
    """Shows what is being done; what stays true is printed above the bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, text: str) -> None:
        if "left out" in text or not self._progress.tasks:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            self._progress.update(self._progress.tasks[0].id, description=text)


def _context(
    wanted: Settings, text: Text, asked: Sequence[Prompt], windows: Sequence[Sequence[int]]
) -> int:
    """Tokens that every contestant makes room for."""
    longest = max([len(prompt.ids) for prompt in asked] + [len(window) for window in windows])
    needed = longest + wanted.tokens + ROOM_FOR_GUESSES
    if needed > text.max_context:
        raise InputError(
            f"the longest prompt has {longest} tokens; with --tokens {wanted.tokens} and "
            f"{ROOM_FOR_GUESSES} for guesses that is {needed}, and the model's context has "
            f"{text.max_context}; lower --tokens"
        )
    return min(text.max_context, -(-needed // 256) * 256)


def _about(
    wanted: Settings, arguments: Sequence[str], source: Source, load: float
) -> dict[str, Any]:
    options = dataclasses.asdict(wanted) | {"prompts": wanted.prompts.name}
    options.pop("out")
    size = source.path.stat().st_size if source.path.is_file() else 0
    return {
        "program": "peers",
        **machine.describe(),
        "load_before": round(load, 2),
        "command": shlex.join(["python", "-m", "benchmarks.peers", *arguments]),
        "settings": options,
        "model": {"name": source.path.name, "mib": round(size / 2**20, 1)},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
