"""README.md and docs/: every code block runs, the option tables are true, the links lead somewhere.

The word after a block's language says how it is checked: `run` runs it; `network` needs the
network, so it is only compiled; `install` has the two commands of the README, whose parts are
looked up here and which CI runs as they stand.
"""

import ast
import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

from medusa_ext import Engine, cli
from medusa_ext.options import GenerateOptions, Options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, mark and text of every code block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_how_it_is_checked(page: Path) -> None:
    allowed = {("python", "run"), ("python", "network"), ("sh", "run"), ("sh", "install")}
    assert {(language, mark) for language, mark, _ in blocks(page)} <= allowed
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page, one after the other, as a reader would type them."""
    names: dict[str, object] = {}
    for language, mark, text in blocks(page):
        if language == "python":
            code = compile(text, str(page), "exec")
            if mark == "run":
                exec(code, names)
    engine = names.get("engine")
    if isinstance(engine, Engine):
        engine.close()
        assert capsys.readouterr().out


def test_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        shlex.split(line)
        for language, mark, text in blocks(ROOT / "README.md")
        if (language, mark) == ("sh", "run")
        for line in text.splitlines()
    ]
    assert len(commands) >= 3
    for program, *arguments in commands:
        assert program == "medusa-ext"
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out


def test_install_commands_name_what_exists() -> None:
    """Two commands, each one line: an extra of pyproject.toml, then the main job or the tests."""
    texts = [text.strip() for _, mark, text in blocks(ROOT / "README.md") if mark == "install"]
    assert texts == [
        'pip install ".[demo]" && medusa-ext generate "Why is the sky blue?"',
        'pip install ".[test]" && pytest',
    ]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^demo = \[", project, re.MULTILINE)
    assert re.search(r"^test = \[", project, re.MULTILINE)
    assert re.search(r'^medusa-ext = "medusa_ext.cli:main"', project, re.MULTILINE)


def table(heading: str) -> dict[str, str]:
    """Option -> default of the table after a heading line."""
    text = README[README.index(heading) :]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text.split("\n\n", 2)[1], re.MULTILINE)
    return dict(rows)


def test_table_of_generate_options() -> None:
    rows = table("Of `generate`, `stream` and chat turns")
    defaults = {field.name: repr(field.default) for field in dataclasses.fields(Options)}
    assert {name: default.replace('"', "'") for name, default in rows.items()} == defaults
    assert list(defaults) == list(GenerateOptions.__annotations__)


def test_table_of_engine_options() -> None:
    rows = table("Of `Engine` ")
    parameters = inspect.signature(Engine).parameters
    defaults = {name: repr(one.default) for name, one in parameters.items() if name != "model"}
    assert {name: default.replace('"', "'") for name, default in rows.items()} == defaults


def test_the_tables_are_true_of_the_command_line() -> None:
    """Every option of the tables is a flag with the same default; the rest is explained here."""
    of_generate, of_engine = table("Of `generate`, `stream`"), table("Of `Engine` ")
    commands = typer.main.get_command(cli.app).commands
    exceptions = {"generate": {"drafter"}, "chat": {"drafter", "max_batch", "num_return_sequences"}}
    for name, missing in exceptions.items():
        flags = {flag: one for one in commands[name].params for flag in one.opts}
        for option, default in {**of_generate, **of_engine}.items():
            flag = f"--{option.replace('_', '-')}"
            assert (flag in flags) == (option not in missing), (name, flag)
            if flag in flags and (name, option) != ("chat", "max_new_tokens"):
                wanted = ast.literal_eval(default) or None
                assert (flags[flag].default or None) == wanted, (name, flag)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target.split("#")[0]).exists(), (
            target
        )
