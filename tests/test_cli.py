"""The command line: output, exit status, one line per error, interrupts, and no terminal."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine_util import demo_engine, make_tiny
from loading_util import make_heads, make_model
from medusa_ext import Engine, _core, cli
from medusa_ext.cli import common
from medusa_ext.results import make_stats

COMMAND = [sys.executable, "-m", "medusa_ext"]
LONG = ["--max-new-tokens", "16000", "--temperature", "3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that no token ends, with room for a second of text."""
    folder = make_model(tmp_path_factory.mktemp("endless"), max_position_embeddings=16384)
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')
    return str(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line; exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.run(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_generate_demo(run) -> None:
    """The text alone on standard output, one line of statistics on standard error."""
    expected = demo_engine().generate(
        [{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=12
    )
    status, out, err = run("generate", "Why is the sky blue?", "-n", "12", "--threads", "2")
    assert (status, out) == (0, expected.text + "\n")
    assert err.count("\n") == 1
    assert err.startswith("[12 tokens, ")
    assert all(word in err for word in ("tokens/s", "tokens/step", "prefill"))


def test_generate_raw_with_options(run, tiny: str) -> None:
    options = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 4}
    with Engine(tiny) as engine:
        expected = engine.generate("ab ab", **options)
    flags = [
        text
        for name, value in options.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    status, out, _ = run("generate", "ab ab", "--raw", "--model", tiny, *flags)
    assert (status, out) == (0, expected.text + "\n")


def test_generate_json_batch_of_samples(run, tiny: str) -> None:
    status, out, err = run(
        "generate",
        "one",
        "two",
        "-m",
        tiny,
        "-n",
        "5",
        "-t",
        "1",
        "--json",
        "--num-return-sequences",
        "2",
    )
    results = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [result["prompt"] for result in results] == ["one", "one", "two", "two"]
    assert all(1 <= len(result["token_ids"]) <= 5 for result in results)
    keys = {"prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "stats"}
    assert all(set(result) == keys for result in results)


def test_generate_reads_standard_input_and_files(
    run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first line\n\nsecond line\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from input\n"))
    status, out, err = run("generate", "-", "--file", str(path), "-m", tiny, "-n", "2")
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("> ")] == [
        "> from input",
        "> first line",
        "> second line",
    ]
    assert err.count("tokens/step") == 3


@pytest.mark.parametrize("flag", ["--stop", "--stop-strings"])
def test_stop_strings(run, tiny: str, flag: str) -> None:
    with Engine(tiny) as engine:
        text = engine.generate("stop here", max_new_tokens=20, eos_token_id=[]).text
    stop = text[5:7]
    status, out, _ = run("generate", "stop here", "--raw", "-m", tiny, "-n", "20", flag, stop)
    assert (status, out) == (0, text[: text.find(stop)] + "\n")


def test_statistics_line() -> None:
    """One token has no rate; the first step's tokens count in no rate."""
    stats = _core_stats(accepted_lengths=[0, 1], steps=1, decode_s=0.5)
    line = common.statistics_line(1, 1, make_stats(stats))
    assert line == "[1 token, 1.00 tokens/step, prefill 1 token in 0.25 s]"
    stats = _core_stats(accepted_lengths=[0, 0, 0, 2], steps=2, decode_s=0.5, reused_tokens=3)
    line = common.statistics_line(6, 5, make_stats(stats, first_tokens=3))
    assert line == (
        "[6 tokens, 6.0 tokens/s, 3.00 tokens/step, prefill 2 tokens (3 from the cache) in 0.25 s]"
    )


def _core_stats(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**{"prefill_s": 0.25, "reused_tokens": 0, **values})


def test_eos_token_id(run, tiny: str) -> None:
    with Engine(tiny) as engine:
        free = engine.generate("stop here", max_new_tokens=20, eos_token_id=[])
    end = free.token_ids[5]
    arguments = ["-m", tiny, "-n", "20", "--eos-token-id", str(end), "--json"]
    status, out, _ = run("generate", "stop here", "--raw", *arguments)
    assert status == 0
    wanted = free.token_ids[: free.token_ids.index(end) + 1]
    assert json.loads(out)["token_ids"] == wanted


def test_heads_of_an_empty_directory(run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = run("generate", "x", "-m", tiny, "--heads", str(tmp_path / "empty"))
    assert status == 2
    assert "holds no Medusa heads; wanted medusa_lm_head.safetensors" in err


def test_inspect(run, tiny: str, tmp_path: Path) -> None:
    heads = make_heads(tmp_path / "heads", "B")
    status, out, _ = run("inspect", tiny, "--heads", str(heads))
    assert status == 0
    for word in (
        "llama",
        "f32",
        "3 of 1 layers, format B",
        "memory for weights",
        "memory for Medusa heads",
        "cache per 1,000 tokens",
    ):
        assert word in out, word
    status, out, _ = run("inspect", tiny, "--json")
    found = json.loads(out)
    assert (status, found["family"], found["vocab_size"], found["heads"]) == (0, "llama", 320, None)
    # K and V of 3 layers, 2 heads of 8, f32.
    assert found["cache_bytes_per_1000_tokens"] == 1000 * 2 * 3 * 2 * 8 * 4


def test_export_loads_again(run, tiny: str, tmp_path: Path) -> None:
    out_path = tmp_path / "model.safetensors"
    heads = make_heads(tmp_path / "heads", "C")
    status, out, _ = run("export", tiny, str(heads), str(out_path))
    assert status == 0
    assert str(out_path) in out
    with Engine(out_path) as exported, Engine(tiny, None) as original:
        assert exported.info["drafter"] == "3 Medusa heads"
        options = {"max_new_tokens": 12, "temperature": 0.9}
        messages = [{"role": "user", "content": "same?"}]
        expected = original.generate(messages, **options)
        assert exported.generate(messages, **options).token_ids == expected.token_ids
    assert run("export", tiny, str(out_path))[0] == 0
    with Engine(out_path) as exported:
        assert exported.info["drafter"] == "prompt lookup"


@pytest.mark.parametrize("spelling", ["version", "--version"])
def test_version(run, spelling: str) -> None:
    status, out, err = run(spelling)
    assert (status, err) == (0, "")
    assert _core.__version__ in out


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["chat", "-h"]])
def test_help(run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "Usage: medusa-ext" in out


COMMANDS = (
    "Commands are generate, chat, inspect, export, distill, train, calibrate, convert, version; "
    "see medusa-ext --help"
)
BAD = [
    ([], COMMANDS),
    (["generat"], "No such command 'generat'"),
    (["speak"], COMMANDS),
    (["--nothing"], "; see medusa-ext --help"),
    (["generate"], "no prompt"),
    (["generate", ""], "the prompt is empty"),
    (["generate", "x", "--temprature", "1"], "; see medusa-ext generate --help"),
    (
        ["generate", "x", "--temperature", "-1"],
        "temperature must be 0 or a number in [1e-06, 1e+06]",
    ),
    (["generate", "x", "--temperature", "nan"], "temperature must be 0 or a number in"),
    (["generate", "x", "--top-p", "nan"], "top_p must be a number in (0, 1], got nan"),
    (["generate", "x", "--delta", "nan"], "delta must be a number of 0 or more, got nan"),
    (
        ["generate", "x", "--seed", str(2**64)],
        "seed must be an integer in [0, 18446744073709551615]",
    ),
    (["generate", "x", "--cache-tokens", str(2**64)], "cache_tokens must be an integer in"),
    (["generate", "x", "--prefill-chunk", "0"], "prefill_chunk must be an integer in [1, 8192]"),
    (["generate", "x", "--isa", "sse"], "isa must be"),
    (["generate", "x", "--eos-token-id", "-1"], "eos_token_id must be"),
    (["generate", "x", "--num-return-sequences", "100000000"], "num_return_sequences must be"),
    (["generate", "x", "--num-return-sequences", "3"], "needs a temperature above 0"),
    (["generate", "caf\udce9"], "the prompt is not valid Unicode"),
    (["generate", "x", "--temperature", "warm"], "Invalid value for '--temperature'"),
    (["generate", "x", "-n", "0"], "max_new_tokens must be an integer of 1 or more, got 0"),
    (["generate", "x", "--acceptance", "typical", "--top-k", "4"], "top_k does not go with"),
    (["generate", "x", "--raw", "--system", "s"], "--system is part of the chat template"),
    (["generate", "x", "--model", "/no/such/path"], "no such path: /no/such/path"),
    (["generate", "x", "--model", "nobody/no-such-model"], "the hub cannot serve it"),
    (["generate", "x", "--device", "tpu"], "device must be"),
    (["generate", "x", "--device", "cuda", "--threads", "2"], "threads=2 is for the CPU"),
    (
        ["generate", "x", "--head-vocab", "0"],
        "--head-vocab must be an integer of 1 or more, auto or none, got '0'",
    ),
    (
        ["chat", "--heads", "none", "--head-vocab", "9"],
        "head_vocab 9 needs Medusa heads, and there are none",
    ),
    (["export", "demo", "out.safetensors", "--head-vocab", "99999"], "has 49152 tokens"),
    (["generate", "x", "--dtype", "int3"], "dtype must be"),
    (["generate", "x", "--tree", "oak"], "no tree is named 'oak'"),
    (["generate", "--file", "/no/such/file"], "cannot read the prompts in /no/such/file"),
    (["chat", "--min-p", "7"], "min_p must be"),
    (["chat", "--epsilon", "7"], "epsilon must be"),
    (["inspect"], "Missing argument"),
    (["inspect", "/no/such/path"], "no such path"),
    (["inspect", "/dev/null"], "unknown kind"),
    (["export", "demo"], "Missing argument"),
    (["export", "a", "b", "c", "d"], "export takes MODEL [HEADS] OUT"),
    (["export", "demo", "/no/such/folder/out.safetensors"], "cannot export to"),
]


@pytest.mark.parametrize("word", ["none", "None", "NONE", "auto", "Auto", "12"])
def test_words_of_head_vocab(word: str) -> None:
    wanted = {"none": None, "12": 12}.get(word.lower(), "auto")
    assert common.head_vocab_argument(word) == wanted


@pytest.mark.parametrize("word", ["many", "", "-1", "1.5", "no\nne"])
def test_head_vocab_that_is_no_word(word: str) -> None:
    wanted = "^--head-vocab must be an integer of 1 or more, auto or none, got '.*'$"
    with pytest.raises(ValueError, match=wanted):
        common.head_vocab_argument(word)


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_input(run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("medusa-ext: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_prompt_longer_than_the_context(run, tiny: str) -> None:
    status, out, err = run("generate", "x" * 600, "--model", tiny)
    assert (status, out) == (2, "")
    assert "tokens, but the context has room for 511" in err
    assert err.count("\n") == 1


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


def test_interrupt_exits_with_130(endless: str) -> None:
    """^C while text is coming: no traceback."""
    with subprocess.Popen(
        [*COMMAND, "generate", "x", "--model", endless, *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip() == b""


def test_reader_that_leaves_is_no_traceback(tiny: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        finished = subprocess.run(
            [*COMMAND, "generate", "x", "-n", "20", "--model", tiny],
            stdout=pipe,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=120,
            check=False,
        )
    assert finished.returncode == 1
    assert b"Traceback" not in finished.stderr


def test_chat_without_a_terminal(run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines in, answers out; the second turn takes the first from the cache."""
    lines = "Say something.\n\n/unknown\nAnd more.\n/reset\nAgain.\n/exit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = run("chat", "--model", tiny, "-n", "6")
    assert status == 0
    with Engine(tiny, max_batch=1) as engine:
        chat = engine.chat()
        answers = [
            chat.send(line, max_new_tokens=6).text for line in ("Say something.", "And more.")
        ]
        chat.reset()
        answers.append(chat.send("Again.", max_new_tokens=6).text)
    assert out == "".join(f"{answer}\n" for answer in answers)
    statistics = [line for line in err.splitlines() if "tokens/step" in line]
    assert ["from the cache" in line for line in statistics] == [False, True, True]
    assert "unknown command /unknown; there are /reset and /exit" in err


def test_chat_goes_on_after_an_error(run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 600 + "\nshort\n"))
    status, out, err = run("chat", "--model", tiny, "-n", "3")
    assert status == 0
    assert out
    assert "medusa-ext: error: the prompt has" in err


def test_input_that_is_not_utf8(tiny: str) -> None:
    """A line that chat cannot read is refused and the next one is answered; generate refuses."""
    chat, generate = (
        subprocess.run(
            [*COMMAND, *arguments, "--model", tiny, "-n", "3"],
            input=b"caf\xe9\nshort\n",
            capture_output=True,
            env={**environment(), "PYTHONIOENCODING": "utf-8:strict"},
            timeout=120,
            check=False,
        )
        for arguments in (["chat"], ["generate", "-"])
    )
    assert chat.returncode == 0
    assert chat.stdout.strip()
    assert chat.stderr.count(b"the prompt is not valid Unicode") == 1
    assert chat.stderr.count(b"tokens/step") == 1
    assert (generate.returncode, generate.stdout) == (2, b"")
    assert b"the prompt is not valid Unicode" in generate.stderr


def test_chat_in_a_terminal(endless: str) -> None:
    """^C stops the answer, ^D leaves."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "chat", "--model", endless, *LONG],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.read(2) == b"> "
        os.write(controller, b"hello\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        os.write(controller, b"\x04")
        _, err = process.communicate(timeout=120)
    os.close(controller)
    assert process.returncode == 0
    assert b"[stopped]" in err
    assert b"Traceback" not in err
