"""The command line of `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.peers.contestants import CONTESTANTS
from benchmarks.peers.process import ROOT

MT_BENCH = ROOT.parent / "shared" / "data" / "mt_bench.jsonl"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see --help."""

    model: str
    heads: str | None
    weights: str | None
    prompts: Path
    limit: int | None
    tokens: int
    threads: int
    rounds: int
    prefills: int
    only: tuple[str, ...]
    out: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"error: {message}\n")


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return value

    return parse


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"{unknown[0] if unknown else text!r} is no contestant; there are "
            f"{', '.join(CONTESTANTS)}"
        )
    return names


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line; errors end the program with status 2."""
    parser = _Parser(
        prog="python -m benchmarks.peers",
        description="This engine and other engines on the same model file, prompts, threads and "
        "token counts, one at a time, prompt by prompt.",
        epilog=f"Contestants: {', '.join(CONTESTANTS)}. What is not installed is named and left "
        "out. Exit status: 1 if speculative answers of medusa_ext are not those of plain decoding.",
    )
    count = _at_least(1)
    parser.add_argument("--model", default="demo", help='a .gguf file, or "demo" (the default)')
    parser.add_argument(
        "--heads", help="Medusa heads for medusa-heads; those of the demo model by default"
    )
    parser.add_argument("--weights", help="weights= of medusa_ext.Engine; its own default without")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=MT_BENCH,
        help="JSON lines with category and turns, of which the first is asked; MT-Bench in the "
        "shared folder beside this repository by default",
    )
    parser.add_argument("--limit", type=count, help="prompts at most, spread over the categories")
    parser.add_argument(
        "--tokens", type=_at_least(2), default=128, help="per answer at most (default 128)"
    )
    parser.add_argument(
        "--threads",
        type=count,
        default=len(os.sched_getaffinity(0)),
        help="of each contestant; all cores by default",
    )
    parser.add_argument("--rounds", type=count, default=1, help="over all prompts (default 1)")
    parser.add_argument(
        "--prefills",
        type=_at_least(0),
        default=4,
        help="prompts of 512 tokens per round whose prefill is timed (default 4)",
    )
    parser.add_argument(
        "--only",
        type=_names,
        default=tuple(CONTESTANTS),
        metavar="NAME,NAME",
        help="run only these",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)"
    )
    args = vars(parser.parse_args(arguments))
    if args["heads"] is None and args["model"] == "demo":
        args["heads"] = "demo"
    return Settings(**args)
