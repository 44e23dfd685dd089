"""Prompts of users, in the forms that people keep them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_ext.distill import Prompt, Prompts, read_prompts

FORMS = [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]},
    {"turns": ["Hi"], "question_id": 81},
    {"prompt": "Hi"},
    "Hi",
]


@pytest.mark.parametrize("as_list", [False, True])
def test_forms_of_prompts(tmp_path: Path, as_list: bool) -> None:
    path = tmp_path / "prompts.json"
    text = json.dumps(FORMS) if as_list else "\n".join(json.dumps(form) for form in FORMS) + "\n\n"
    path.write_text(text)
    prompts = read_prompts(str(path))
    assert prompts.name == "prompts.json"
    assert prompts.items == (Prompt(("Hi",)),) * 5


def test_turns_system_and_category_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "one\u2028two"},
                {"role": "assistant", "content": "left out"},
                {"role": "user", "content": "three"},
            ],
            "category": "math",
        },
        {"turns": ["a", "b"], "category": "writing"},
        {"conversations": [{"from": "system", "value": "T"}, {"from": "human", "value": "c"}]},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_prompts(str(path)).items == (
        Prompt(("one\u2028two", "three"), "S", "math"),
        Prompt(("a", "b"), None, "writing"),
        Prompt(("c",), "T"),
    )


def test_prompts_without_a_user_are_left_out(tmp_path: Path) -> None:
    """As files of ShareGPT have them; numbers go by those that remain."""
    path = tmp_path / "prompts.json"
    answer, empty = {"from": "gpt", "value": "Hello"}, {"from": "human", "value": " "}
    first, second = {"from": "human", "value": "Hi"}, {"from": "human", "value": "Bye"}
    rows = [[answer], [first, answer, empty], [first, answer], [], [second]]
    path.write_text(json.dumps([{"conversations": row} for row in rows] + [{"turns": [""]}, ""]))
    assert read_prompts(str(path)).items == (Prompt(("Hi",)), Prompt(("Bye",)))


BAD_PROMPTS = [
    ("", "holds no prompt"),
    ("[]", "holds no prompt"),
    ("{", "line 1 is not JSON"),
    ('"a"\n{"prompt": 3}', "line 2: what a user says must be text, got 3"),
    ('{"prompt": " "}', "holds no prompt in which a user says something"),
    ('{"text": "x"}', 'line 1: a prompt has "conversations", "messages", "turns" or "prompt"'),
    ("[3]", "entry 0: a prompt is an object with"),
    ('{"turns": []}', "holds no prompt"),
    ('{"turns": "x"}', '"turns" must be a list'),
    ('{"messages": [{"role": "user"}]}', 'a message must have a text "content"'),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "holds no prompt"),
    ('"\\ud800"', "not valid Unicode"),
    ("[" * 100000, "is not JSON"),
]


@pytest.mark.parametrize(("text", "message"), BAD_PROMPTS, ids=lambda value: str(value)[:30])
def test_bad_prompts(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad.jsonl") as caught:
        read_prompts(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        if name != "somebody/chats":
            raise FileNotFoundError(f"no data set {name}\nand more")
        return [{"messages": [{"role": "user", "content": split}], "id": 3}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    prompts = read_prompts("somebody/chats", "test")
    assert prompts == Prompts("somebody/chats", (Prompt(("test",)),))
    with pytest.raises(ValueError, match=r"no file is named nobody/x, .*: no data set nobody/x$"):
        read_prompts("nobody/x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "medusa_ext\[train\]"'):
        read_prompts("somebody/chats")
