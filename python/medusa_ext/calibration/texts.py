"""Held-out text to calibrate on: records of tokens, or prompts that the model is yet to answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from medusa_ext.distill import prompts
from medusa_ext.distill.prompts import Prompt
from medusa_ext.loading import LoadError
from medusa_ext.options import shown


@dataclass(frozen=True)
class Text:
    """A conversation as tokens.

    Attributes:
        tokens: prompt and answers, as the model saw and wrote them.
        answers: [start, end) of what the model wrote; start is at least 1, end beyond start.
        category: "" where the data name none.
    """

    tokens: list[int]
    answers: list[tuple[int, int]]
    category: str = ""


def read_data(path: Path, *, vocab_size: int, max_context: int) -> list[Text] | list[Prompt]:
    """Read a JSONL file of records, as `medusa-ext distill` writes them, or a file of prompts.

    A record has input_ids, assistant_mask and perhaps a category; one without a token that the
    model wrote is left out.

    Raises:
        ValueError: a file, its line, and what is wrong with it.
    """
    # Not splitlines: JSON may hold U+2028 and its like as they are.
    lines = [(number, line) for number, line in enumerate(_read(path).split("\n"), 1) if line]
    if not lines or '"input_ids"' not in lines[0][1]:
        return read_prompts(path)
    texts = []
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"{where} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise LoadError(f"{where} holds {shown(value)}; wanted a record of medusa-ext distill")
        texts.append(_text(value, where, vocab_size, max_context))
    texts = [text for text in texts if text.answers]
    if not texts:
        raise LoadError(f"{path}: no record holds a token that the model wrote (assistant_mask 1)")
    return texts


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts, in any of the forms that `medusa-ext distill` reads; ValueError."""
    _read(path)  # a data set of that name is not looked for
    return list(prompts.read_prompts(str(path)).items)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoadError(f"cannot read {path}: it is not UTF-8") from None


def _text(value: dict[str, Any], where: str, vocab_size: int, max_context: int) -> Text:
    ids, mask = (_whole_numbers(value, name, where) for name in ("input_ids", "assistant_mask"))
    if len(ids) != len(mask) or not set(mask) <= {0, 1}:
        raise LoadError(
            f"{where}: assistant_mask must hold 0 or 1 for each of the {len(ids)} input_ids"
        )
    if len(ids) > max_context:
        raise LoadError(
            f"{where}: {len(ids)} tokens; the model's context holds {max_context}: leave it out"
        )
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise LoadError(
            f"{where}: token {bad} is outside the model's vocabulary of {vocab_size}; is the data "
            "from another model?"
        )
    category = value.get("category")
    answers, at = [], 0
    for generated, run in groupby(mask):
        end = at + len(list(run))
        if generated and end > max(at, 1):  # the first token has no position before it
            answers.append((max(at, 1), end))
        at = end
    return Text(ids, answers, category if isinstance(category, str) else "")


def _whole_numbers(value: dict[str, Any], name: str, where: str) -> list[int]:
    numbers = value.get(name)
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise LoadError(f"{where}: {name} is missing or no list of whole numbers")
    return numbers
