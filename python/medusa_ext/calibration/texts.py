"""Held-out text to calibrate on: records of tokens, or prompts that the model is yet to answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from medusa_ext.distill import prompts
from medusa_ext.distill.prompts import Prompt
from medusa_ext.distill.records import Record, read_records
from medusa_ext.loading import LoadError


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


def read_data(
    path: Path, *, model: str, vocab_size: int, max_context: int
) -> list[Text] | list[Prompt]:
    """Read a JSONL file of records, as `medusa-ext distill` writes them, or a file of prompts.

    A record has input_ids, assistant_mask and perhaps a category; one without a token that the
    model wrote is left out. Records that were sampled, or made with another model, are a warning.

    Raises:
        ValueError: a file, its line, and what is wrong with it.
    """
    if not _holds_records(path):
        return read_prompts(path)
    found = read_records(path, vocab_size=vocab_size, max_context=max_context)
    texts = [text for text in map(_text, _warned(found, path, model)) if text.answers]
    if not texts:
        raise LoadError(f"{path}: no record holds a token that the model wrote (assistant_mask 1)")
    return texts


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts, in any of the forms that `medusa-ext distill` reads; ValueError."""
    if not path.is_file():  # a data set of that name is not looked for
        raise LoadError(f"cannot read {path}: No such file")
    return list(prompts.read_prompts(str(path)).items)


def _holds_records(path: Path) -> bool:
    """Whether the first line that says anything is a record."""
    try:
        with path.open("rb") as file:
            return b'"input_ids"' in next((line for line in file if line.strip()), b"")
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None


def _warned(records: Iterable[Record], path: Path, model: str) -> Iterator[Record]:
    """Pass the records on; warn, once each, of settings that do not suit a calibration."""
    sampled = other = False
    for record in records:
        settings: Any = record.line.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        if settings.get("temperature") and not sampled:
            sampled = True
            warnings.warn(
                f"{path} was sampled at temperature {settings['temperature']}; a calibration says "
                "what greedy decoding does: distil without --temperature",
                stacklevel=2,
            )
        name = str(settings.get("model", model))
        if Path(name).name != Path(model).name and not other:
            other = True
            warnings.warn(
                f"{path} was made with the model {name}, and this one is {model}; heads are judged "
                "by what their own model writes: distil with it",
                stacklevel=2,
            )
        yield record


def _text(record: Record) -> Text:
    category = record.line.get("category")
    answers, at = [], 0
    for generated, run in groupby(record.generated.tolist()):
        end = at + len(list(run))
        if generated and end > max(at, 1):  # the first token has no position before it
            answers.append((max(at, 1), end))
        at = end
    return Text(record.ids.tolist(), answers, category if isinstance(category, str) else "")
