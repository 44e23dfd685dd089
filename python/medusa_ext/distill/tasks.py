"""Prompts for who has none: what people ask a model for, put together from templates and words.

What a model writes when it plays the user is narrower than what users ask, and heads that learned
from it alone guess worse elsewhere. These prompts come in eight categories, the same for any model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from medusa_ext.distill.prompts import TASKS, Prompt, Prompts

COUNT = 40_000
TASKS_FILE = Path(__file__).with_name("tasks.json")
_SLOT = re.compile(r"\{(\w+)\}")
NUMBERS = {**dict.fromkeys("abcde", (2, 30)), "small": (2, 12), "big": (40, 900)}


def tasks(count: int = COUNT) -> Prompts:
    """The first `count` prompts of an endless series, no two alike; categories take turns."""
    content = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    templates, words = content["templates"], content["words"]
    categories = list(templates)
    items: list[Prompt] = []
    seen: set[str] = set()
    number = 0
    while len(items) < count:
        category = categories[number % len(categories)]
        draws = _draws(number)
        text = _filled(_one_of(templates[category], draws), words, draws)
        number += 1
        if text not in seen:
            seen.add(text)
            items.append(Prompt((text,), None, category))
    return Prompts(TASKS, tuple(items))


def _filled(template: str, words: dict[str, list[str]], draws: Iterator[int]) -> str:
    """The template with a word or number for each name; a name that comes twice is the same."""
    values: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            low, high = NUMBERS.get(name, (0, 0))
            values[name] = (
                str(low + next(draws) % (high - low + 1)) if high else _one_of(words[name], draws)
            )
        return values[name]

    return _SLOT.sub(value, template)


def _one_of(choices: list[str], draws: Iterator[int]) -> str:
    return choices[next(draws) % len(choices)]


def _draws(number: int) -> Iterator[int]:
    """Numbers that follow from one alone, the same on every machine."""
    index = 0
    while True:
        digest = hashlib.sha256(f"{number}:{index}".encode()).digest()
        yield int.from_bytes(digest[:8], "big")
        index += 1
