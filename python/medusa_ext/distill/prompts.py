"""Prompts from a JSON or JSONL file or from a data set of the hub, in the forms people keep them.

A prompt is one of:

* {"conversations": [{"from": "human", "value": "..."}, ...]}, as ShareGPT has them;
* {"messages": [{"role": "user", "content": "..."}, ...]};
* {"turns": ["...", "..."]}, several turns of one user, as MT-Bench has them;
* {"prompt": "..."}, or just "...".

Answers in them are left out: the model writes its own. A system message that comes first is kept,
and so is "category". A prompt without a user's message, or with an empty one, is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medusa_ext.options import shown

TASKS = "tasks"  # the name of the prompts that come along
_FORMS = '"conversations", "messages", "turns" or "prompt"'
_USERS, _SYSTEMS = ("user", "human"), ("system",)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user says.

    Attributes:
        turns: the user's messages, at least one; none is empty.
        system: the system message; None: what the chat template says without one.
        category: a word that travels with the record, or None.
    """

    turns: tuple[str, ...]
    system: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts and where they come from.

    Attributes:
        name: of the file or data set.
        items: at least one; their numbers count those that were not left out.
    """

    name: str
    items: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts, in hexadecimal."""
        text = json.dumps([asdict(item) for item in self.items])
        return hashlib.sha256(text.encode()).hexdigest()


def read_prompts(name: str, split: str = "train") -> Prompts:
    """Read the prompts of a file, or else of a data set.

    Args:
        name: a .json file (one list) or .jsonl file (one prompt a line), "tasks" (see `tasks`), a
            folder that the datasets library reads, or the hub id of a data set.
        split: of the data set.

    Raises:
        ValueError: names the file, the place, and what is wrong there.
        ImportError: a data set needs the extra "train".
    """
    path = Path(name)
    rows: Iterable[tuple[str, Any]]
    if path.is_file() or path.suffix in (".json", ".jsonl"):
        rows = _rows_of_file(path)
        name = path.name
    elif name == TASKS:
        from medusa_ext.distill.tasks import tasks

        return tasks()
    else:
        rows = _rows_of_dataset(name, split)
    parsed = (_parse(row, f"{name}, {place}") for place, row in rows)
    items = tuple(prompt for prompt in parsed if prompt is not None)
    if not items:
        raise ValueError(f"{name} holds no prompt in which a user says something")
    return Prompts(name, items)


def _rows_of_file(path: Path) -> list[tuple[str, Any]]:
    """Return (place, value) of each prompt."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"cannot read the prompts in {path}: {reason}") from None
    if text.lstrip().startswith("["):
        return [(f"entry {index}", row) for index, row in enumerate(_parse_json(text, f"{path}"))]
    # Not splitlines: JSON may hold U+2028 and its like as they are.
    return [
        (f"line {number}", _parse_json(line, f"{path}, line {number}"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _parse_json(text: str, where: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _rows_of_dataset(name: str, split: str) -> Iterable[tuple[str, Any]]:
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]  # an extra
    except ImportError:
        raise ImportError(
            f"no file is named {name}, and a data set of that name needs the datasets library; "
            'install it with: pip install "medusa_ext[train]"'
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises whatever it met on the way
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"no file is named {name}, and it cannot be loaded as a data set: "
            f"{lines[0][:200] if lines else repr(error)}"
        ) from None
    return ((f"row {index}", row) for index, row in enumerate(rows))


def _parse(row: object, where: str) -> Prompt | None:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a prompt is an object with {_FORMS}, got {shown(row)}")
    said, system = _said(row, where)
    for text in said:
        if not isinstance(text, str):
            raise ValueError(f"{where}: what a user says must be text, got {shown(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: the text is not valid Unicode (a lone surrogate)") from None
    if not said or not all(text.strip() for text in said):
        return None
    category = row.get("category")
    return Prompt(tuple(said), system, category if isinstance(category, str) else None)


def _said(row: Mapping[str, Any], where: str) -> tuple[list[Any], str | None]:
    """What the user says, and the system message."""
    for key, role, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        if row.get(key) is not None:
            messages = [
                (_text(message, role, where), _text(message, content, where))
                for message in _list(row[key], key, where)
            ]
            system = messages[0][1] if messages and messages[0][0] in _SYSTEMS else None
            return [text for speaker, text in messages if speaker in _USERS], system or None
    if row.get("turns") is not None:
        return _list(row["turns"], "turns", where), None
    if row.get("prompt") is not None:
        return [row["prompt"]], None
    raise ValueError(f"{where}: a prompt has {_FORMS}, got {shown(list(row))}")


def _list(value: object, key: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'{where}: "{key}" must be a list, got {shown(value)}')
    return value


def _text(message: object, key: str, where: str) -> str:
    value = message.get(key) if isinstance(message, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f'{where}: a message must have a text "{key}", got {shown(message)}')
    return value
