"""The comparison with other engines: its figures, its processes, its command; no peer needed."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import contestants, figures, machine, prompts, report, settings
from benchmarks.peers.__main__ import main
from benchmarks.peers.contest import Entry, Outcome, rotated
from benchmarks.peers.contestants import CONTESTANTS, Contestant, Job
from benchmarks.peers.figures import Run, Spread
from benchmarks.peers.process import ContestantError, Worker
from benchmarks.peers.prompts import Question
from benchmarks.peers.trace import Trace
from engine_util import make_tiny
from loading_util import make_heads
from medusa_ext import Engine

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def job(tiny: Path) -> Job:
    return Job(str(tiny), None, None, None, threads=1, context=256, eos_ids=[2])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    asked = [("art", "a e i"), ("art", "to the"), ("maths", "on one")]
    lines = [json.dumps({"category": kind, "turns": [text, "?"]}) for kind, text in asked]
    path.write_text("\n".join(lines))
    return path


def run_of(name: str, prompt: int, rate: float, tokens: tuple[int, ...] = (7, 8, 9)) -> Run:
    """Two tokens after the prefill, at this rate."""
    marks = ((0.5, 1), (0.5 + 1 / rate, 2), (0.5 + 2 / rate, 3))
    return Run(name, prompt, 0, "art" if prompt < 2 else "maths", tokens, marks)


# Figures.


def test_a_run_counts_what_came_after_the_first_pass() -> None:
    run = Run("a", 0, 0, "art", (1, 2, 3, 4, 5, 6), ((0.25, 1), (0.5, 4), (1.25, 6)))
    assert (run.prefill_s, run.decoded, run.steps, run.decode_s) == (0.25, 5, 2, 1.0)
    assert run.rate == 5.0
    assert figures.tokens_per_step([run, run_of("a", 1, 1.0)]) == (5 + 2) / (2 + 2)


@pytest.mark.parametrize("marks", [(), ((0.25, 1),)])
def test_a_run_of_no_decoded_token_has_no_rate(marks: Any) -> None:
    run = Run("a", 0, 0, "art", (1,), marks)
    assert (run.decoded, run.steps, run.rate) == (0, 0, None)
    assert figures.tokens_per_step([run]) is None
    assert Spread.of([run.rate]) is None


def test_median_and_quartiles() -> None:
    assert Spread.of([4.0, None, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_ratios_pair_the_same_prompt_of_the_same_round() -> None:
    ours = [run_of("a", 0, 10.0), run_of("a", 1, 40.0), run_of("a", 2, 90.0)]
    ours += [replace(run_of("a", 0, 100.0), round_index=1)]
    peer = [run_of("b", 2, 30.0), run_of("b", 0, 10.0), run_of("b", 1, 20.0)]
    found = figures.ratios([*peer, *ours], "a", "b")  # 1, 2, 3; the second round has no partner
    assert found is not None
    assert (found.median, found.p25, found.p75) == pytest.approx((2.0, 1.5, 2.5))
    assert found.count == 3


def test_where_answers_differ() -> None:
    assert figures.difference([1, 2, 3], [1, 2, 3]) is None
    assert figures.difference([1, 2, 3], [1, 5, 3]) == 1
    assert figures.difference([1, 2], [1, 2, 3]) == 2
    assert figures.difference([1, 2, 0], [1, 2], eos_ids=[0]) is None
    assert figures.difference([1, 2, 0], [1, 2, 3], eos_ids=[0]) == 2


def test_agreement_says_how_often_and_from_where() -> None:
    runs = [run_of("plain", place, 1.0) for place in range(4)]
    answers = [(7, 8, 9), (7, 8, 1), (1, 8, 9), (7, 1, 1)]
    runs += [run_of("b", place, 1.0, answer) for place, answer in enumerate(answers)]
    assert figures.agreement(runs, "b", "plain") == figures.Agreement(1, 4, (0, 1))


def test_a_trace_joins_what_one_pass_emitted() -> None:
    trace = Trace()
    for tokens, same_pass in (([4], False), ([5, 6], False), ([7], True), ([], False)):
        trace.emit(tokens, same_pass=same_pass)
    assert trace.tokens == [4, 5, 6, 7]
    assert [count for _, count in trace.marks] == [1, 4]
    assert 0 <= trace.marks[0][0] <= trace.marks[1][0]


# Prompts and arguments.


def test_a_limit_takes_all_categories_in_turn() -> None:
    asked = [Question(kind, f"{kind}{place}") for kind in "abc" for place in range(3)]
    taken = [question.text for question in prompts.spread(asked, 5)]
    assert taken == ["a0", "a1", "b0", "b1", "c0"]
    assert prompts.spread(asked, 20) == prompts.spread(asked, None) == asked


def test_every_contestant_begins_in_turn() -> None:
    assert [rotated("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert rotated("abc", 2) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only llama", "'llama' is no contestant; there are medusa-plain, "),
        ("--only ,", "is no contestant"),
        ("--tokens 1", "'1' is not a whole number from 2 up"),
        ("--threads two", "'two' is not a whole number from 1 up"),
        ("--limit 0", "'0' is not a whole number from 1 up"),
        ("--prefills -1", "'-1' is not a whole number from 0 up"),
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the prompts"),
        ("\n", "holds no prompts"),
        ('{"turns": ["a"]}\n{"turns": []}', "line 2: wanted"),
        ("no json", "line 1: wanted"),
        ('{"category": 1, "turns": ["a"]}', "line 1: wanted"),
    ],
)
def test_bad_prompts_are_one_line(
    content: str | None,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["--model", str(tiny), "--prompts", str(path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_model_that_is_not_there(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "no.gguf"), "--prompts", str(questions)]) == 2
    assert "no such path" in capsys.readouterr().err


def test_an_answer_too_long_for_the_context(
    tiny: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", str(tiny), "--prompts", str(questions), "--prefills", "0"]
    assert main([*command, "--tokens", "600"]) == 2
    assert "the model's context has 512; lower --tokens" in capsys.readouterr().err


# Processes.


def stops(worker: Worker) -> bool:
    """Whether the kernel says T, stopped, before long."""
    for _ in range(6000):
        status = Path(f"/proc/{worker.process_id}/stat").read_text()
        if status.rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_a_worker_answers_as_the_engine_and_stands_still_between(job: Job, tiny: Path) -> None:
    with Engine(tiny, None, threads=1) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=12, eos_token_id=[]).token_ids
        expected = expected[: expected.index(2) + 1] if 2 in expected else expected
    with Worker("medusa-plain", job) as worker:
        assert min(worker.ready["loaded_mib"], worker.ready["imports_mib"]) > 0
        for _ in range(2):
            assert stops(worker)
            reply = worker.ask(PROMPT, 12)
            assert reply["tokens"] == expected
            assert [count for _, count in reply["marks"]] == list(range(1, len(expected) + 1))
            assert reply["peak_mib"] >= worker.ready["loaded_mib"]


def test_a_contestant_that_cannot_load_says_why(job: Job) -> None:
    with pytest.raises(ContestantError, match=r"^ValueError: no Medusa heads for this model; give"):
        Worker("medusa-heads", job)


def test_a_process_that_dies_is_told(job: Job) -> None:
    with Worker("medusa-plain", job) as worker:
        os.kill(worker.process_id, signal.SIGKILL)
        with pytest.raises(ContestantError, match=r"^its process ended with signal SIGKILL"):
            worker.ask(PROMPT, 2)


# The command.


def no_such(name: str) -> Contestant:
    return replace(CONTESTANTS[name], modules=("no_such_module",), needs_gguf=False)


def test_the_command_on_a_tiny_model(
    tiny: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(CONTESTANTS, "openvino", no_such("openvino"))
    out = tmp_path / "results"
    command = ["--model", str(tiny), "--heads", str(make_heads(tmp_path / "heads", "A", base=tiny))]
    command += ["--prompts", str(questions), "--limit", "2", "--tokens", "9", "--threads", "1"]
    command += ["--rounds", "2", "--prefills", "0", "--out", str(out)]
    command += ["--only", "medusa-plain,medusa-heads,medusa-lookup,openvino,ctranslate2"]
    assert main(command) == 0

    said = capsys.readouterr().out
    assert "medusa-heads: the tokens of medusa-plain on 4 of 4 prompts" in said
    assert "openvino: left out, no_such_module is not installed; pip install openvino-gen" in said
    assert "ctranslate2: left out, " in said

    content = json.loads((out / "peers.json").read_text())
    assert [one["name"] for one in content["contestants"]] == [
        "medusa-plain",
        "medusa-heads",
        "medusa-lookup",
    ]
    assert set(content["left_out"]) == {"openvino", "ctranslate2"}
    assert len(content["runs"]) == 3 * 2 * 2
    assert {run["category"] for run in content["runs"]} == {"art", "maths"}
    assert {"date", "machine", "versions", "commit", "command", "settings"} <= set(content)
    page = (out / "peers.md").read_text()
    assert all(text in page for text in ("| medusa-heads |", content["command"], "| art | maths |"))
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["peers.json", "peers.md", "peers.png"]


def test_nobody_is_left_to_run(
    tiny: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(CONTESTANTS, "openvino", no_such("openvino"))
    command = ["--model", str(tiny), "--prompts", str(questions), "--prefills", "0"]
    assert main([*command, "--only", "openvino", "--out", str(tmp_path / "results")]) == 2
    assert "nobody is left to run; openvino: no_such_module" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# The report.


def outcome_of(answer: tuple[int, ...]) -> Outcome:
    """Heads twice as fast as plain decoding, and four times a peer."""
    names = {"medusa-plain": 20.0, "medusa-heads": 40.0, "peer": 10.0}
    runs = [
        run_of(name, place, rate, answer if name == "medusa-heads" else (7, 8, 9))
        for name, rate in names.items()
        for place in range(3)
    ]
    prefills = [Run(name, 3, 0, "prefill", (1,), ((0.25, 1),)) for name in names]
    return Outcome({name: Entry("bf16", 30, 90, 100) for name in names}, runs, prefills)


def test_the_table_has_ratios_to_what_leads_and_to_plain_decoding() -> None:
    head, rows = report.table(report.lines(outcome_of((7, 8, 9)), []))
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert by_name["peer"]["medusa-heads / this"] == "4.00 (4.00-4.00)"
    assert by_name["peer"]["medusa-plain / this"] == "2.00 (2.00-2.00)"
    assert by_name["medusa-plain"]["medusa-heads / this"] == "2.00 (2.00-2.00)"
    assert by_name["medusa-heads"]["medusa-heads / this"] == "-"
    assert by_name["peer"]["prefill of 512, tokens/s"] == "2048.0"
    assert by_name["peer"]["tokens/step"] == "1.00"
    assert (by_name["peer"]["peak MiB"], by_name["peer"]["of it imports"]) == ("100", "30")


def test_an_inexact_answer_of_ours_is_wrong() -> None:
    found = report.lines(outcome_of((7, 8, 9)), [])
    assert report.is_exact(found)
    assert not any("WRONG" in text for text in report.sentences(found, {}))
    found = report.lines(outcome_of((7, 1, 9)), [])
    assert not report.is_exact(found)
    assert any(
        text.startswith("WRONG, medusa-heads: the tokens of medusa-plain on 0 of 3 prompts")
        for text in report.sentences(found, {})
    )


def test_a_result_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of((7, 8, 9))
    found = report.lines(outcome, [])
    about = {
        **machine.describe(),
        "load_before": 3.0,
        "command": "c",
        "model": {"name": "m", "mib": 1.0},
    }
    report.write(tmp_path, about, found, outcome)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    assert b"- this machine was busy before the start (load 3.0)" in before["peers.md"]
    assert report.busy(0.1) is None

    def breaks(_found: object, _names: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(report, "draw", breaks)
    with pytest.raises(OSError, match="No space left"):
        report.write(tmp_path, about, found, outcome)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before


def test_the_extra_names_what_the_contestants_need() -> None:
    """`pip install "medusa_ext[bench]"` brings every peer."""
    text = (settings.ROOT / "pyproject.toml").read_text()
    extra = text[text.index("\nbench = [") :].partition("]")[0]
    for name, contestant in CONTESTANTS.items():
        if name not in contestants.OURS:
            assert all(f'"{word}' in extra for word in contestant.package.split()), name
