"""Data from the model itself: each answer is what it says there, and a file can be made again."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_util import make_tiny
from loading_util import make_tokenizer, read_weights, write_weights
from medusa_ext import Engine, cli
from medusa_ext.distill import Prompt, Prompts, Recipe, distill, remake, run, seed_of
from medusa_ext.distill.compose import Claims
from medusa_ext.distill.dialogue import Dialogue
from medusa_ext.distill.records import RecordFile

COMMAND = [sys.executable, "-m", "medusa_ext", "distill"]
OWN = Recipe(max_new_tokens=12, max_prompt_tokens=40)  # the model writes its own prompts
USER, ANSWER = {"role": "user"}, {"role": "assistant"}
GIVEN = Prompts(
    "given.jsonl",
    (
        Prompt(("Tell me.", "And then?", "Why?"), "Be brief.", "story"),
        Prompt(("One turn",)),
        Prompt(("x" * 600,)),  # more than the context
        Prompt(("a\nb", "  spaces  ")),
    ),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends its turns every few tokens, some of them at once."""
    folder = make_tiny(tmp_path_factory.mktemp("tiny"))
    state = read_weights(folder)
    state["lm_head.weight"][2] *= 2.5
    write_weights(folder, state)
    return folder


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine(tiny, None, threads=1, max_batch=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of the model's own prompts, three turns each."""
    path = tmp_path_factory.mktemp("whole") / "data.jsonl"
    done = distill(engine, path, _own_turns(), records=40)
    assert done.records == 40
    return path


def _own_turns() -> Recipe:
    return Recipe(max_new_tokens=12, max_prompt_tokens=40, turns=3, temperature=1.2, seed=5)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(record: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """What stands before each answer, and the answer."""
    ids, mask = record["input_ids"], record["assistant_mask"]
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    starts = [i for i, bit in enumerate(mask) if bit and not mask[i - 1]]
    ends = [i for i, bit in enumerate(mask, 1) if bit and not any(mask[i : i + 1])]
    return [(ids[:start], ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def check_answers(engine: Engine, record: dict[str, Any], **options: Any) -> None:
    """Every answer is what the model says alone to the ids before it, and the text is its text."""
    spoken = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
    found = answers(record)
    assert len(found) == len(spoken)
    for (before, answer), text in zip(found, spoken, strict=True):
        alone = engine.generate(before, seed=record["seed"], **options)
        assert (alone.token_ids, alone.text) == (answer, text)


def test_given_prompts(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    done = distill(engine, path, Recipe(max_new_tokens=30), GIVEN)
    first, second, last = records = lines(path)
    assert [record["record"] for record in records] == [0, 1, 3]
    assert [record["seed"] for record in records] == [seed_of(0, number) for number in (0, 1, 3)]
    assert done.left_out == {"too long": 1}
    assert done.tokens == sum(sum(record["assistant_mask"]) for record in records)
    assert [message["role"] for message in first["messages"]] == [
        "system",
        *["user", "assistant"] * 3,
    ]
    assert [m["content"] for m in last["messages"] if m["role"] == "user"] == ["a\nb", "  spaces  "]
    assert first["category"] == "story"
    assert "category" not in second
    assert second["settings"]["max_new_tokens"] == 30
    tokenizer = make_tokenizer()
    for record in records:
        check_answers(engine, record, max_new_tokens=30)
        # The first prompt is as transformers renders it.
        asked = record["messages"][: 2 if record is first else 1]
        rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert record["input_ids"][: len(ids)] == ids
        assert answers(record)[0][0] == ids


def test_ids_between_turns(engine: Engine, whole: Path) -> None:
    """A turn is closed once, by the model's own token or else by the template's."""
    tokenizer = make_tokenizer()
    met = {"ended": 0, "cut": 0}
    for record in lines(whole):
        check_answers(engine, record, max_new_tokens=12, temperature=1.2)
        found = answers(record)
        users = [m["content"] for m in record["messages"] if m["role"] == "user"]
        for turn in range(1, len(found)):
            between = found[turn][0][len(found[turn - 1][0]) + len(found[turn - 1][1]) :]
            ended = found[turn - 1][1][-1] == 2
            met["ended" if ended else "cut"] += 1
            text = f"\n<|im_start|>user\n{users[turn]}<|im_end|>\n<|im_start|>assistant\n"
            text = text if ended else f"<|im_end|>{text}"
            assert between == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert min(met.values()) >= 3, met


def test_own_prompts(engine: Engine, whole: Path) -> None:
    """No two alike, none empty, none too long; numbers rise."""
    records = lines(whole)
    numbers = [record["record"] for record in records]
    assert numbers == sorted(set(numbers))
    said = [record["messages"][0]["content"] for record in records]
    assert len({" ".join(text.split()).casefold() for text in said}) == len(said)
    assert all(text == text.strip() for text in said)
    lengths = [len(engine.encoder.encode_text(text, add_special_tokens=False)) for text in said]
    assert 1 <= min(lengths) <= max(lengths) <= 40
    assert len({record["seed"] for record in records}) == len(records)
    assert max(len(answers(record)) for record in records) == 3


def test_prompts_are_sampled_behind_the_template(engine: Engine, whole: Path) -> None:
    """A user turn is what the model says where the template lets the user speak."""
    opening = make_tokenizer()("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    for record in lines(whole)[:10]:
        turn = engine.generate(opening, max_new_tokens=40, temperature=1.0, seed=record["seed"] ^ 1)
        assert turn.finish_reason == "stop"
        assert turn.text.strip() == record["messages"][0]["content"]


@pytest.mark.parametrize("changes", [{"max_batch": 1}, {"max_batch": 64, "threads": 2}, "heads"])
def test_same_bytes_however_it_is_run(
    tiny: Path, whole: Path, tmp_path: Path, changes: dict[str, int] | str
) -> None:
    options: dict[str, Any] = {"threads": 1, "max_batch": 5}
    options |= {"heads": "prompt-lookup"} if isinstance(changes, str) else changes
    options.setdefault("heads", None)
    with Engine(tiny, **options) as other:
        distill(other, tmp_path / "data.jsonl", _own_turns(), records=40)
    assert (tmp_path / "data.jsonl").read_bytes() == whole.read_bytes()


def test_limits(engine: Engine, whole: Path, tmp_path: Path) -> None:
    """Tokens end a run at the first line that reaches them; a larger limit goes on."""
    path = tmp_path / "data.jsonl"
    done = distill(engine, path, _own_turns(), tokens=200)
    assert done.tokens >= 200
    assert done.tokens - sum(lines(path)[-1]["assistant_mask"]) < 200
    assert whole.read_bytes().startswith(path.read_bytes())
    size = path.stat().st_size
    again = distill(engine, path, _own_turns(), tokens=200)
    assert (again.new_records, again.generated, path.stat().st_size) == (0, 0, size)
    distill(engine, path, _own_turns(), records=40)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5001, 0.9999])
def test_half_a_line_is_made_again(
    engine: Engine, whole: Path, tmp_path: Path, share: float
) -> None:
    path = tmp_path / "data.jsonl"
    data = whole.read_bytes()
    cut = data[: int(share * len(data))]
    path.write_bytes(cut)
    if whole_lines := cut.count(b"\n"):
        distill(engine, path, _own_turns(), records=whole_lines)
        assert path.read_bytes() == cut[: cut.rindex(b"\n") + 1]
        path.write_bytes(cut)
    distill(engine, path, _own_turns(), records=40)
    assert path.read_bytes() == data


def test_killed_again_and_again(tiny: Path, whole: Path, tmp_path: Path) -> None:
    """kill -9 whenever the file has grown; at the end it is the file of an unbroken run."""
    path = tmp_path / "data.jsonl"
    command = [*COMMAND, str(tiny), "--out", str(path), "--records", "40", "--seed", "5"]
    command += ["-n", "12", "-t", "1.2", "--max-prompt-tokens", "40", "--turns", "3"]
    command += ["--threads", "1", "--max-batch", "2"]
    path.touch()
    kills = 0
    for _ in range(40):
        size = path.stat().st_size
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process:
            while process.poll() is None and (kills >= 3 or path.stat().st_size == size):
                time.sleep(0.002)
            process.kill()
            _, err = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    assert kills == 3
    assert path.read_bytes() == whole.read_bytes()


def test_interrupt_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    command = [*COMMAND, str(tiny), "--out", str(path), "--tokens", "100000000"]
    with subprocess.Popen(
        [*command, "--threads", "1", "-n", "12"], env=environment(), stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"stopped; the same command goes on with {path}" in err.decode()
    assert b"Traceback" not in err
    assert lines(path)


def test_a_record_is_remade_alone(engine: Engine, whole: Path) -> None:
    for line in lines(whole)[::9]:
        made = remake(engine, _own_turns(), None, line["record"])
        assert made == {key: value for key, value in line.items() if key != "settings"}
    assert remake(engine, Recipe(max_new_tokens=30), GIVEN, 2) is None  # too long
    with pytest.raises(ValueError, match=r"number must be an integer in \[0, 3\], got 4"):
        remake(engine, OWN, GIVEN, 4)


def test_seeds() -> None:
    """SHA-256 of "<seed>:<record>", computed elsewhere; 63 bits."""
    assert seed_of(0, 0) == 0xAC72368A586A18C1 >> 1
    assert seed_of(7, 123) == 0x9967A5ED67210832 >> 1
    assert len({seed_of(seed, record) for seed in range(30) for record in range(30)}) == 900


def test_other_settings_are_refused(engine: Engine, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(whole.read_bytes() + b'{"half')
    before = path.read_bytes()
    changed = replace(_own_turns(), temperature=0.7, seed=6)
    with pytest.raises(
        ValueError, match=r"other settings: seed 5, now 6; temperature 1\.2, now 0\.7"
    ):
        distill(engine, path, changed, records=60)
    with pytest.raises(ValueError, match=r"prompts None, now 'given.jsonl'; prompts_sha256 None"):
        distill(engine, path, _own_turns(), GIVEN)
    assert path.read_bytes() == before


BROKEN = [
    b"no json\n",
    b"[1]\n",
    b'{"record":0}\n',
    b'{"record":0,"seed":1,"input_ids":[1,2],"assistant_mask":[1],"messages":[],"settings":{}}\n',
    b'{"record":0,"seed":1,"input_ids":[1],"assistant_mask":[1],"messages":[{}],"settings":{}}\n',
    b"\xff\xfe\n",
    b'["one line without an end"]',
    b'{"seed":1,"record":0,"input_ids":[1],"assistant_mask":[1],"settings":{},"messages":[]}',
]


@pytest.mark.parametrize("data", BROKEN)
def test_a_file_of_something_else_is_left_alone(
    engine: Engine, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"notes.txt, line 1 is no record of distill"):
        distill(engine, path, OWN, records=1)
    assert path.read_bytes() == data


def test_a_line_twice_is_refused(engine: Engine, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(whole.read_bytes().splitlines(keepends=True)[0] * 2)
    with pytest.raises(ValueError, match="line 2 is no record"):
        distill(engine, path, _own_turns(), records=1)


def test_two_runs_do_not_share_a_file(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with (
        RecordFile(path, {}),
        pytest.raises(ValueError, match="another process is writing to"),
    ):
        distill(engine, path, OWN, records=1)


def test_full_disk(engine: Engine, whole: Path, tmp_path: Path) -> None:
    """The error names the file, whole lines stay, and with room the run goes on."""
    path = tmp_path / "data.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*data\.jsonl'"):
            distill(engine, path, _own_turns(), records=40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = path.read_bytes()
    assert left.endswith(b"}\n")
    assert whole.read_bytes().startswith(left)
    distill(engine, path, _own_turns(), records=40)
    assert path.read_bytes() == whole.read_bytes()


def test_first_number_keeps_a_prompt() -> None:
    """Whatever order prompts are known in, the first number has it; case and spaces are no help."""
    claims = Claims()
    assert claims.claim("The sky", 5)
    assert claims.claim("another", 4)
    assert not claims.claim("the  SKY", 9)
    assert claims.lost == []
    assert claims.claim("the sky ", 3)
    assert claims.lost == [5]
    assert not claims.claim("THE SKY", 4)


def test_repeated_prompts_are_left_out(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that always says the same: one record, then an error that says so."""
    monkeypatch.setattr(run, "MAX_LEFT_OUT", 50)
    recipes = [Recipe(max_new_tokens=3, prompt_temperature=1e-6, system=f"{n}") for n in range(100)]
    recipe = next(recipe for recipe in recipes if remake(engine, recipe, None, 0) is not None)
    path = tmp_path / "data.jsonl"
    with pytest.raises(RuntimeError, match=r"wrote 50 user turns in a row .* \(50 repeated\)"):
        distill(engine, path, recipe, records=2)
    (record,) = lines(path)
    assert record["record"] == 0
    with pytest.raises(RuntimeError, match=r"\(50 repeated\)"):
        distill(engine, path, recipe, records=2)
    assert len(lines(path)) == 1


def test_prompts_that_never_end(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MAX_LEFT_OUT", 30)
    recipe = Recipe(max_prompt_tokens=1, min_prompt_tokens=1, max_new_tokens=3)
    with pytest.raises(RuntimeError, match=r"cannot be used \(.* too long"):
        distill(engine, tmp_path / "data.jsonl", recipe, tokens=10**9)


def test_a_model_without_a_template(tmp_path: Path) -> None:
    """Text goes on as it stands; prompts of its own start from the first token."""
    folder = make_tiny(tmp_path / "raw")
    for path in [folder / "chat_template.jinja", folder / "tokenizer_config.json"]:
        if path.suffix == ".jinja":
            path.unlink(missing_ok=True)
        else:
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    with Engine(folder, None, threads=1) as raw:
        given, own = tmp_path / "given.jsonl", tmp_path / "own.jsonl"
        distill(raw, given, Recipe(max_new_tokens=9), Prompts("p", (Prompt(("to be", "no")),)))
        (record,) = lines(given)
        assert record["input_ids"][:-9] == raw.encoder.encode_text("to be")
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        check_answers(raw, record, max_new_tokens=9)
        distill(raw, own, OWN, records=6)
        for record in lines(own):
            said = raw.generate([1], max_new_tokens=40, temperature=1.0, seed=record["seed"] ^ 1)
            assert said.text.strip() == record["messages"][0]["content"]
            check_answers(raw, record, max_new_tokens=12)
        with pytest.raises(ValueError, match="no chat template, so that its data has no system"):
            distill(raw, own, Recipe(turns=2), records=1)


def test_a_template_without_special_tokens(engine: Engine) -> None:
    """What ends a user's turn is then a text; a template that drops messages is refused."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content | trim }} {% else %}"
        "BOT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}BOT:{% endif %}"
    )
    encode = engine.encoder.encode_text
    encoder = type(engine.encoder)(engine.tokenizer, template, 320)
    dialogue = Dialogue(encoder, engine.tokenizer, engine.eos_token_id)
    assert (dialogue.stop_ids, dialogue.stop_strings) == ((2,), ("BOT:",))
    assert dialogue.opening([], []) == encode("USER:")
    messages = [{**USER, "content": "x"}, {**ANSWER, "content": "y"}]
    assert dialogue.opening(messages, [7, 2]) == [7, 2, *encode("USER:")]
    assert dialogue.opening(messages, [7]) == [7, 2, *encode("USER:")]
    asked = [*messages, {**USER, "content": " z "}]
    assert dialogue.prompt(asked, [7, 2]) == [7, 2, *encode("USER: z BOT:")]
    last_only = type(engine.encoder)(engine.tokenizer, "{{ messages[-1].content }}<|im_end|>", 320)
    dialogue = Dialogue(last_only, engine.tokenizer, engine.eos_token_id)
    with pytest.raises(ValueError, match="chat template leaves out messages"):
        dialogue.prompt(asked, [7, 2])


BAD = [
    ([], "Missing argument"),
    (["TINY"], "give records or tokens: prompts of the model's own have no end"),
    (["TINY", "--records", "0"], "records must be an integer of 1 or more, got 0"),
    (["TINY", "--tokens", "-5"], "tokens must be an integer of 1 or more, got -5"),
    (["TINY", "--tokens", "9", "--turns", "0"], "turns must be an integer of 1 or more, got 0"),
    (["TINY", "--tokens", "9", "-t", "-1"], "temperature must be 0 or a number in"),
    (["TINY", "--tokens", "9", "--prompt-top-p", "0"], "prompt_top_p must be a number in (0, 1]"),
    (
        ["TINY", "--tokens", "9", "--max-prompt-tokens", "3", "--min-prompt-tokens", "4"],
        "max_prompt_tokens must be an integer in [4, 1073741824], got 3",
    ),
    (["TINY", "--tokens", "9", "-n", "512"], "max_new_tokens=512 leaves no room for a prompt"),
    (["TINY", "--tokens", "9", "--seed", "-1"], "seed must be an integer of 0 or more, got -1"),
    (["TINY", "--tokens", "9", "-o", "/no/such/folder/x.jsonl"], "no such directory"),
    (["TINY", "--prompts", "/no/such/file.jsonl"], "cannot read the prompts in /no/such/file"),
    (["/no/such/model", "--tokens", "9"], "no such path"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_input(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(tiny) if argument == "TINY" else argument for argument in arguments]
    status = cli.run(["distill", *given])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("medusa-ext: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line at the end; all prompts of a file, once."""
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
    prompts.write_text('"first"\n"second"\n' + json.dumps("x" * 600))
    arguments = ["distill", str(tiny), "-o", str(path), "--prompts", str(prompts), "-n", "5"]
    assert cli.run([*arguments, "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"[{path}: 2 records with ")
    assert "this run 2 records" in err
    assert "prompts left out: 1 too long]" in err
    assert [record["messages"][0]["content"] for record in lines(path)] == ["first", "second"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
