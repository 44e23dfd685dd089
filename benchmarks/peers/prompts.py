"""Questions of a file, as the token ids that every contestant gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from medusa_ext.loading import LoadError, open_checkpoint
from medusa_ext.loading.source import Source
from medusa_ext.prompts import PromptEncoder

PREFILL_TOKENS = 512


class InputError(Exception):
    """What the user gave cannot be used; one line for them."""


@dataclass(frozen=True)
class Question:
    """The first turn of a conversation."""

    category: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A question as every contestant gets it."""

    category: str
    ids: list[int]


@dataclass(frozen=True)
class Text:
    """What turns questions into ids, read from a model's file without its weights."""

    encoder: PromptEncoder
    eos_ids: list[int]
    max_context: int

    @classmethod
    def of(cls, source: Source) -> Text:
        """Read tokenizer, chat template and end-of-sequence ids.

        Raises:
            InputError: the file has none, or cannot be read.
        """
        try:
            checkpoint = open_checkpoint(source, None)
            tokenizer, eos_ids = checkpoint.tokenizer, checkpoint.eos_ids
        except LoadError as error:
            raise InputError(str(error)) from None
        if tokenizer is None:
            raise InputError(f"{source.given} has no tokenizer; give a model that has one")
        template = getattr(tokenizer, "chat_template", None)
        template = template if isinstance(template, str) else None
        config = checkpoint.config
        encoder = PromptEncoder(tokenizer, template, config["vocab_size"])
        return cls(encoder, eos_ids, config["max_context"])

    def prompt(self, question: Question) -> Prompt:
        """Apply the chat template, where there is one."""
        if not self.encoder.has_template:
            return Prompt(question.category, self.encoder.encode_text(question.text))
        text = self.encoder.render([{"role": "user", "content": question.text}])
        return Prompt(question.category, self.encoder.encode_text(text, add_special_tokens=False))

    def windows(self, questions: list[Question], count: int) -> list[list[int]]:
        """`count` different prompts of PREFILL_TOKENS tokens, cut from all questions in a row."""
        ids: list[int] = []
        for question in questions:
            ids += self.encoder.encode_text(question.text + "\n\n", add_special_tokens=False)
        while len(ids) < PREFILL_TOKENS + count - 1:
            ids += ids
        stride = max(1, min(PREFILL_TOKENS, (len(ids) - PREFILL_TOKENS) // max(1, count - 1)))
        return [ids[start : start + PREFILL_TOKENS] for start in range(0, count * stride, stride)]


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines with "turns", a list of texts, and perhaps "category".

    Raises:
        InputError: names the file and the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the prompts {path}: {reason}; give --prompts FILE") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            turn, category = record["turns"][0], record.get("category", "all")
        except (ValueError, LookupError, TypeError, AttributeError):
            turn = category = None
        if not (isinstance(turn, str) and turn.strip() and isinstance(category, str)):
            raise InputError(
                f'{path}, line {number}: wanted {{"category": "...", "turns": ["..."]}}, '
                f"got {line[:80]!r}"
            )
        questions.append(Question(category, turn))
    if not questions:
        raise InputError(f"{path} holds no prompts; give another with --prompts FILE")
    return questions


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions taken from all categories in turn, in the order of the file."""
    if limit is None or limit >= len(questions):
        return questions
    seen: dict[str, int] = {}
    places = []
    for place, question in enumerate(questions):
        rank = seen[question.category] = seen.get(question.category, -1) + 1
        places.append((rank, place))
    return [questions[place] for place in sorted(place for _, place in sorted(places)[:limit])]
