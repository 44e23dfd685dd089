"""Prompts put together from templates, and the questions that heads are calibrated on."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from medusa_ext.distill import read_prompts
from medusa_ext.distill.compose import normalised
from medusa_ext.distill.prompts import Prompts
from medusa_ext.distill.tasks import COUNT, NUMBERS, TASKS_FILE, tasks

QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "questions.jsonl"


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return read_prompts("tasks")


def test_series_is_the_same_everywhere(prompts: Prompts) -> None:
    assert prompts.items[2].turns == (
        "What is the most likely reason that the street is wet but the roof is dry? Name two other "
        "possible causes and how to tell them apart.",
    )
    assert tasks(100).items == prompts.items[:100]  # a larger number only makes it longer


def test_all_differ_and_are_filled(prompts: Prompts) -> None:
    texts = [item.turns[0] for item in prompts.items]
    assert len(texts) == len({normalised(text) for text in texts}) == COUNT
    counts = Counter(item.category for item in prompts.items)
    assert len(counts) == 8
    assert min(counts.values()) > COUNT / 80


def test_every_word_has_a_place() -> None:
    """Words may hold braces, as code does; templates hold them around names of words alone."""
    content = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    templates = [text for texts in content["templates"].values() for text in texts]
    assert len(templates) == len(set(templates)) > 400
    used = {name for text in templates for name in re.findall(r"\{(\w+)\}", text)}
    assert used - set(NUMBERS) == set(content["words"])
    assert not any(re.search(r"[{}]", re.sub(r"\{\w+\}", "", text)) for text in templates)
    assert all(words and all(words) for words in content["words"].values())


def test_none_of_the_benchmark_is_among_them(prompts: Prompts, shared_dir: Path) -> None:
    lines = (shared_dir / "data" / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {normalised(turn) for line in lines for turn in json.loads(line)["turns"]}
    assert len(asked) == 160
    for given in (prompts, read_prompts(str(QUESTIONS))):
        assert not asked & {normalised(turn) for item in given.items for turn in item.turns}
