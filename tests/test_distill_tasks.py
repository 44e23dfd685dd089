"""Prompts put together from templates, and the questions that heads are calibrated on."""

import json
from collections import Counter
from pathlib import Path

import pytest

from medusa_ext.distill import read_prompts
from medusa_ext.distill.compose import normalised
from medusa_ext.distill.prompts import Prompts
from medusa_ext.distill.tasks import COUNT, tasks

QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "questions.jsonl"


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return read_prompts("tasks")


def test_series_is_the_same_everywhere(prompts: Prompts) -> None:
    assert prompts.items[2].turns == (
        "A box holds 24 red, 29 blue and 2 green balls. How many must you take out to be sure of "
        "two of the same colour?",
    )
    assert tasks(100).items == prompts.items[:100]  # a larger number only makes it longer


def test_all_differ_and_are_filled(prompts: Prompts) -> None:
    texts = [item.turns[0] for item in prompts.items]
    assert len(texts) == len({normalised(text) for text in texts}) == COUNT
    assert not any("{" in text or "}" in text for text in texts)
    counts = Counter(item.category for item in prompts.items)
    assert len(counts) == 8
    assert min(counts.values()) > COUNT / 80


def test_none_of_the_benchmark_is_among_them(prompts: Prompts, shared_dir: Path) -> None:
    lines = (shared_dir / "data" / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {normalised(turn) for line in lines for turn in json.loads(line)["turns"]}
    assert len(asked) == 160
    for given in (prompts, read_prompts(str(QUESTIONS))):
        assert not asked & {normalised(turn) for item in given.items for turn in item.turns}
