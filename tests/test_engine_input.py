"""Bad input to Engine: one line that says what was given and what is allowed, before work."""

import copy
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from engine_util import demo_engine
from loading_util import make_heads, make_model
from medusa_ext import Drafter, Engine
from medusa_ext.trees import resolve_tree

BAD_OPTIONS = [
    ({"temperature": -1}, r"temperature must be 0 or a number in \[1e-06, 1e\+06\], got -1"),
    ({"temperature": 1e-7}, "temperature must be 0 or .* got 1e-07"),
    ({"temperature": 1e7}, "temperature must be 0 or .* got 10000000.0"),
    ({"temperature": float("nan")}, "temperature must be .* got nan"),
    ({"temperature": float("inf")}, "temperature must be .* got inf"),
    ({"temperature": "hot"}, "temperature must be .* got 'hot'"),
    ({"temperature": True}, "temperature must be .* got True"),
    ({"top_k": -1}, "top_k must be an integer of 0 or more, got -1"),
    ({"top_k": 1.5}, "top_k must be .* got 1.5"),
    ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
    ({"top_p": 1.01}, r"top_p must be .* got 1.01"),
    ({"min_p": -0.1}, r"min_p must be a number in \[0, 1\], got -0.1"),
    ({"repetition_penalty": 0}, r"repetition_penalty must be a number in \[0.001, 1000\], got 0"),
    ({"repetition_penalty": 2000}, "repetition_penalty must be .* got 2000"),
    ({"top_k": 2**64}, r"top_k must be an integer in \[0, 2147483647\], got 18446744073709551616"),
    ({"seed": -1}, "seed must be .* got -1"),
    (
        {"seed": 2**64},
        r"seed must be an integer in \[0, 18446744073709551615\], got 18446744073709551616",
    ),
    ({"seed": [1, 2]}, "seed has 2 numbers for 1 prompts"),
    ({"seed": np.array([1, 2])}, "seed has 2 numbers for 1 prompts"),
    ({"seed": np.array(0.5)}, "seed must be .* got 0.5"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more, got 0"),
    ({"max_new_tokens": "many"}, "max_new_tokens must be .* got 'many'"),
    (
        {"max_new_tokens": 2**64},
        r"max_new_tokens must be an integer in \[1, 2147483647\], got 1844",
    ),
    ({"num_return_sequences": 0}, "num_return_sequences must be .* got 0"),
    (
        {"num_return_sequences": 10**8, "temperature": 1},
        r"num_return_sequences must be an integer in \[1, 65536\], got 100000000",
    ),
    ({"num_return_sequences": 2}, "num_return_sequences=2 needs a temperature above 0"),
    (
        {"num_return_sequences": 2, "temperature": 1, "acceptance": "typical"},
        'num_return_sequences=2 needs .* acceptance="exact"',
    ),
    ({"stop_strings": ""}, "stop_strings must be a non-empty string"),
    ({"stop_strings": ["a", ""]}, "stop_strings must be a non-empty string"),
    ({"stop_strings": [1]}, "stop_strings must be a non-empty string"),
    ({"eos_token_id": 10**6}, "eos_token_id must be an integer in .* got 1000000"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be an integer .* got '</s>'"),
    ({"eos_token_id": np.array([0, 10**6])}, "eos_token_id must be .* got 1000000"),
    ({"acceptance": "loose"}, "acceptance must be 'exact' or 'typical', got 'loose'"),
    ({"acceptance": "typical", "epsilon": 2}, r"epsilon must be a number in \[0, 1\], got 2"),
    ({"acceptance": "typical", "delta": -1}, "delta must be .* got -1"),
    ({"acceptance": "typical", "top_k": 5}, 'top_k does not go with acceptance="typical"'),
    ({"acceptance": "typical", "top_p": 0.5}, 'top_p does not go with acceptance="typical"'),
    ({"acceptance": "typical", "min_p": 0.5}, 'min_p does not go with acceptance="typical"'),
]
BAD_PROMPTS = [
    ("", "the prompt is empty"),
    ([], "the prompt is empty"),
    (["a", ""], "prompt 1 of the batch is empty"),
    ([[1], []], "prompt 1 of the batch is empty"),
    (None, "the prompt must be a string, .* got NoneType"),
    (7, "the prompt must be a string, .* got int"),
    (b"bytes", "the prompt must be a string, .* got bytes"),
    (["a", 7], "prompt 1 of the batch must be a string, token ids or chat messages, got 7"),
    ([1, "a"], "token id 1 must be an integer, got 'a'"),
    ([1, 2.5], "token id 1 must be an integer, got 2.5"),
    ([1, True], "token id 1 must be an integer, got True"),
    ([1, -1], r"token id 1 is -1, outside the vocabulary \[0, 49152\)"),
    ([49152], "token id 0 is 49152, outside the vocabulary"),
    (np.array([0.5]), "prompt 0 of the batch"),
    ([5] * 1024, "the prompt has 1024 tokens, but the context has room for 1023"),
    ("word " * 2000, "the prompt has [0-9]+ tokens, but the context has room for 1023"),
    (["a", [5] * 1024], "prompt 1 of the batch has 1024 tokens"),
    ("caf\udce9", "the prompt is not valid Unicode"),
    (["a", "\ud800"], "the prompt is not valid Unicode"),
    ([{"role": "user", "content": "\ud800"}], "the prompt is not valid Unicode"),
    ({"input_ids": [1, 2]}, r'pass its \["input_ids"\]'),
    ({"role": "user", "content": "a"}, "a single message is no prompt; put it in a list"),
    ([{"role": "user"}], "message 0 must be .* with two strings"),
    ([{"role": "user", "content": ["a"]}], "message 0 must be .* with two strings"),
    ([{"role": "user", "content": "a"}, "b"], "message 1 must be .* got 'b'"),
]
BAD_ENGINES = [
    ({"device": "tpu"}, 'device must be "auto", "cpu", "cuda" or "cuda:N", got \'tpu\''),
    ({"device": "cuda", "threads": 2}, "threads=2 is for the CPU, and device is 'cuda'; leave"),
    ({"dtype": "int8"}, "dtype must be 'auto' or 'bf16' or 'f16' or 'f32', got 'int8'"),
    ({"isa": "sse"}, "isa must be .* got 'sse'"),
    ({"max_batch": 0}, r"max_batch must be an integer in \[1, 1024\], got 0"),
    ({"max_context": 1}, "max_context must be an integer of 2 or more, got 1"),
    ({"max_context": 10**6}, r"max_context must be an integer in \[2, 8192\], got 1000000"),
    ({"max_context": 2**64}, r"max_context must be .* \[2, 8192\], got 18446744073709551616"),
    ({"max_batch": 2**64}, "max_batch must be .* got 18446744073709551616"),
    ({"threads": 0}, "threads must be .* got 0"),
    ({"cache_tokens": -5}, "cache_tokens must be .* got -5"),
    ({"cache_tokens": 2**64}, r"cache_tokens must be an integer in \[1, 1073741824\], got 1844"),
    ({"prefill_chunk": 0}, "prefill_chunk must be .* got 0"),
    ({"prefill_chunk": 2**64}, r"prefill_chunk must be an integer in \[1, 8192\], got 1844"),
    ({"head_vocab": 0}, 'head_vocab must be "auto", None or an integer of 1 or more, got 0'),
    ({"head_vocab": "many"}, "head_vocab must be .* got 'many'"),
    ({"heads": None, "head_vocab": 9}, "head_vocab 9 needs Medusa heads, and there are none"),
    ({"tree": "oak"}, "no tree is named 'oak'"),
    ({"tree": [[0, 0]]}, "tree is invalid"),
    ({"heads": None, "tree": [[0]]}, "needs Medusa heads, and there are none"),
    ({"heads": None, "tree": np.array([[0], [1]])}, "needs Medusa heads, and there are none"),
    ({"tree": np.array([[0.5]])}, "the tree holds .*0.5.*; wanted paths"),
    ({"tree": 0.5}, "the tree is a float; wanted a list of paths"),
    ({"tree": 257}, "a tree's number of nodes must be an integer in \\[1, 256\\], got 257"),
    ({"tree": "0"}, "a tree's number of nodes must be an integer"),
    ({"drafter": object()}, "drafter must be a medusa_ext.Drafter"),
    ({"drafter": Drafter(), "heads": "prompt-lookup"}, "give heads or a drafter, not both"),
    ({"drafter": Drafter(), "heads": np.zeros(2)}, "give heads or a drafter, not both"),
    (
        {"heads": "no/such/heads"},
        "no such path: no/such/heads; give a directory .* of Medusa heads",
    ),
    ({"heads": 5}, 'heads is 5; give .*, "prompt-lookup", "auto", or None'),
    ({"heads": False}, "heads is False; give"),
    ({"heads": b"demo"}, "heads is b'demo'; give"),
    ({"heads": ""}, "heads is empty; give"),
    ({"heads": "none"}, "heads is 'none'; for plain decoding give None"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return demo_engine()


def assert_refused(engine: Engine, message: str, prompt: object, **options: object) -> None:
    """generate and stream refuse with one line and start nothing."""
    steps = engine.session_stats().steps
    for call in (engine.generate, engine.stream):
        with pytest.raises(ValueError, match=message) as caught:
            call(prompt, **options)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    stats = engine.session_stats()
    assert (stats.active, stats.waiting, stats.steps) == (0, 0, steps)


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options(engine: Engine, options: dict[str, object], message: str) -> None:
    assert_refused(engine, message, "Hello", **options)


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=lambda value: str(value)[:40])
def test_bad_prompts(engine: Engine, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        engine.generate(prompt, max_new_tokens=1)
    assert "\n" not in str(caught.value)
    stats = engine.session_stats()
    assert (stats.active, stats.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("temprature", "temperature"),
        ("max_tokens", "max_new_tokens"),
        ("stop", "stop_strings"),
        ("topk", "top_k"),
        ("n", "num_return_sequences"),
    ],
)
def test_unknown_options_name_the_nearest(engine: Engine, name: str, near: str) -> None:
    for call in (engine.generate, engine.stream, engine.chat().send):
        with pytest.raises(TypeError, match=f"unknown option '{name}'; did you mean '{near}'"):
            call("Hello", **{name: 1})


def test_unknown_option_with_no_likeness_lists_all(engine: Engine) -> None:
    with pytest.raises(TypeError, match="options are max_new_tokens, temperature, top_k"):
        engine.generate("Hello", zzz=1)


def test_the_last_position_of_the_context_is_usable(engine: Engine) -> None:
    result = engine.generate([5] * 1023, eos_token_id=[])
    assert (len(result.token_ids), result.finish_reason) == (1, "length")


@pytest.mark.parametrize(("arguments", "message"), BAD_ENGINES, ids=lambda value: str(value)[:40])
def test_bad_engine_arguments(arguments: dict[str, object], message: str) -> None:
    demo_engine()
    with pytest.raises(ValueError, match=message) as caught:
        Engine("demo", **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["/no/such/model", "./nothing", "", "some/model-on-the-hub"])
def test_models_that_are_not_there(model: str) -> None:
    """conftest.py cuts the hub off."""
    with pytest.raises(
        ValueError, match=r"no such path|is empty|the hub cannot serve it"
    ) as caught:
        Engine(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [123, None, b"demo", False, ["demo"]], ids=str)
def test_models_of_the_wrong_type(model: object) -> None:
    with pytest.raises(ValueError, match=r'^model is .*; give a directory, .* or "demo"$'):
        Engine(model)


@pytest.mark.parametrize(
    ("heads", "arguments", "message"),
    [
        (None, {"max_context": 8193}, r"max_context must be an integer in \[2, 128\]"),
        (None, {"tree": [[0]]}, "needs Medusa heads"),
        (
            "B",
            {"tree": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]},
            "has depth 4, the model has 3 heads",
        ),
    ],
    ids=["context", "tree without heads", "tree"],
)
def test_refused_before_weights_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heads: str | None,
    arguments: dict[str, object],
    message: str,
) -> None:
    folder = make_model(tmp_path / "model")
    heads_folder = None if heads is None else make_heads(tmp_path / "heads", heads)

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("medusa_ext.loading.load.build", read)
    with pytest.raises(ValueError, match=message):
        Engine(folder, heads_folder, **arguments)


def test_numpy_values_are_accepted(engine: Engine) -> None:
    """Seeds, end-of-sequence ids and trees as arrays."""
    options = {"max_new_tokens": 4, "temperature": 1}
    expected = engine.generate(["a", "b"], seed=[3, 4], eos_token_id=[0, 2], **options)
    for seed in (np.array([3, 4]), [np.int64(3), np.uint8(4)]):
        results = engine.generate(["a", "b"], seed=seed, eos_token_id=np.array([0, 2]), **options)
        assert [one.token_ids for one in results] == [one.token_ids for one in expected]
    for tree in (np.array([[0, 0], [1, 0]])[:, :1], [np.array([0]), np.array([1])]):
        assert resolve_tree(tree, 1).paths() == [[0], [1]]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    with pytest.raises(ValueError, match="no permission to read"):
        Engine(path)


def test_stream_and_score_take_one_prompt(engine: Engine) -> None:
    with pytest.raises(ValueError, match="stream takes one prompt, got 2"):
        engine.stream(["a", "b"])
    with pytest.raises(ValueError, match="stream gives one sample, got num_return_sequences=2"):
        engine.stream("a", num_return_sequences=2, temperature=1)
    with pytest.raises(ValueError, match="score takes one text, got 2"):
        engine.score(["a", "b"])
    for chunk in (0, 2**64):
        with pytest.raises(
            ValueError, match=rf"chunk must be an integer in \[1, 65536\], got {chunk}"
        ):
            engine.score("a", chunk=chunk)
    with pytest.raises(ValueError, match=r"the model's context has room for 8192; shorten it$"):
        engine.score([5] * 8193)


def test_a_bad_prompt_anywhere_in_a_batch_starts_nothing(engine: Engine) -> None:
    steps = engine.session_stats().steps
    with pytest.raises(ValueError, match="prompt 2 of the batch"):
        engine.generate(["a", "b", ""])
    assert engine.session_stats().steps == steps


def test_closed_engine() -> None:
    engine = Engine("demo", threads=1, max_context=64)
    engine.close()
    engine.close()
    assert repr(engine) == "Engine(closed)"
    for call in (engine.generate, engine.stream, engine.score, engine.chat):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call("Hello")


def test_pickle_and_copy_are_refused(engine: Engine) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        pickle.dumps(engine)
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy(engine)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_process_is_refused(engine: Engine) -> None:
    child = os.fork()
    if child == 0:
        try:
            engine.generate("Hello", max_new_tokens=1)
        except RuntimeError as error:
            os._exit(0 if "belongs to the process" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine.generate("Hello", max_new_tokens=2).token_ids
