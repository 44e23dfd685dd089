"""The Engine on every device: guesses change nothing, and its surface does what it does elsewhere.

Logits of two devices differ in their last bits, so that what an engine writes is compared with
plain decoding on the same device.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_util import Known
from loading_util import make_heads, make_model
from medusa_ext import Engine, Stream, _core

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
TREE = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]  # an emulated device is slow
SMALL: dict[str, Any] = {"max_batch": 3, "max_context": 256, "prefill_chunk": 32}
NO_END: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": []}
SAMPLINGS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "drawn": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "seed": 7},
}
REPEATS = "one two one two one two one"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--device")
        found = [name for name in _core.available_devices() if wanted in ("all", name)]
        skip = pytest.mark.skip(reason=f"--device {wanted}: this build or machine has none")
        metafunc.parametrize("device", found or [pytest.param(wanted, marks=skip)], scope="module")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model in each type; heads of 8 are the least that 16-bit caches take."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_model(folder / name, dtype=word, max_position_embeddings=512)
        for name, word in DTYPES.items()
    }


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_heads(tmp_path_factory.mktemp("heads"), "B")


@pytest.fixture(scope="module")
def plain(device: str, models: dict[str, Path]) -> Iterator[Engine]:
    """One token at a time, f32."""
    with Engine(models["f32"], None, device=device, **SMALL) as engine:
        yield engine


@pytest.mark.parametrize("dtype", DTYPES)
def test_guesses_change_nothing(
    device: str, dtype: str, models: dict[str, Path], heads: Path
) -> None:
    """Heads, prompt lookup and a drafter that knows the text, against plain decoding."""
    with Engine(models[dtype], None, device=device, **SMALL) as engine:
        assert engine.info["dtype"] == dtype
        expected = {
            name: engine.generate(REPEATS, **NO_END, **options).token_ids
            for name, options in SAMPLINGS.items()
        }
        prompt = engine.tokenizer(REPEATS)["input_ids"]
    assert len({tuple(tokens) for tokens in expected.values()}) == len(SAMPLINGS)

    known = Known([prompt + tokens for tokens in expected.values()])
    for given in ({"heads": heads, "tree": TREE}, {"heads": "prompt-lookup"}, {"drafter": known}):
        with Engine(models[dtype], device=device, **given, **SMALL) as engine:
            for name, options in SAMPLINGS.items():
                result = engine.generate(REPEATS, **NO_END, **options)
                assert result.token_ids == expected[name], (engine, name)
                if "drafter" in given:  # whole chains of 7 are accepted
                    assert result.stats.steps <= 5


def test_fewer_rows_of_the_heads_change_nothing(
    device: str, plain: Engine, models: dict[str, Path], heads: Path
) -> None:
    sizes = []
    for head_vocab in (None, 64):
        with Engine(
            models["f32"], heads, device=device, tree=TREE, head_vocab=head_vocab, **SMALL
        ) as engine:
            sizes.append(engine.memory["weight_bytes"])
            for options in SAMPLINGS.values():
                expected = plain.generate(REPEATS, **NO_END, **options).token_ids
                assert engine.generate(REPEATS, **NO_END, **options).token_ids == expected
    assert sizes[0] - sizes[1] >= 3 * (320 - 64) * 32 * 4


def test_a_batch_is_what_each_text_is_alone(
    device: str, models: dict[str, Path], heads: Path
) -> None:
    """Five texts of unequal length on three lines, samples of one text among them."""
    prompts = [REPEATS, "a", "the sea " * 20, "x y", "one two"]
    options = {"temperature": 0.8, "seed": 3, "eos_token_id": []}
    with Engine(models["f32"], heads, device=device, tree=TREE, **SMALL) as engine:
        alone = [engine.generate(prompt, max_new_tokens=10, **options) for prompt in prompts]
        batch = engine.generate(prompts, max_new_tokens=10, **options)
        assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
        samples = engine.generate("a", max_new_tokens=10, num_return_sequences=3, **options)
        assert samples[0].token_ids == alone[1].token_ids
        assert len({tuple(sample.token_ids) for sample in samples}) == 3
        stats = engine.session_stats()
        assert (stats.active, stats.waiting) == (0, 0)


def test_stream_and_stop_strings(device: str, plain: Engine, models: dict[str, Path]) -> None:
    text = plain.generate(REPEATS, **NO_END).text
    stop = text[6:9]
    with Engine(models["f32"], device=device, **SMALL) as engine:
        assert "".join(piece.text for piece in engine.stream(REPEATS, **NO_END)) == text
        cut = engine.generate(REPEATS, stop_strings=[stop], **NO_END)
        assert (cut.text, cut.finish_reason) == (text[: text.find(stop)], "stop")
        end = plain.generate(REPEATS, **NO_END).token_ids[7]
        ended = engine.generate(REPEATS, max_new_tokens=24, eos_token_id=end).token_ids
        assert ended[-1] == end
        assert ended == plain.generate(REPEATS, max_new_tokens=24, eos_token_id=end).token_ids
        stream = engine.stream(REPEATS, max_new_tokens=None, eos_token_id=[])
        next(stream)
        stream.close()  # its place is free again
        assert engine.generate(REPEATS, **NO_END).text == text
        assert engine.session_stats().active == 0
    assert isinstance(stream, Stream)


def test_chat_takes_earlier_turns_from_the_cache(
    device: str, plain: Engine, models: dict[str, Path], heads: Path
) -> None:
    with Engine(models["f32"], heads, device=device, tree=TREE, **SMALL) as engine:
        chat = engine.chat("Short.")
        chat.send("Hello there.", max_new_tokens=12)
        second = chat.send("And then?", max_new_tokens=12)
        assert second.stats.reused_tokens > 0
        assert second.text == plain.generate(chat.messages[:-1], max_new_tokens=12).text


def test_scores_are_what_decoding_sees(device: str, plain: Engine) -> None:
    """The likeliest token of every row is the one that greedy decoding took there."""
    prompt = plain.tokenizer(REPEATS)["input_ids"]
    tokens = plain.generate(prompt, **NO_END).token_ids
    logits, hidden = plain.score(prompt + tokens, return_hidden=True)
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == tokens
    assert hidden.shape == (len(prompt) + len(tokens), 32)
    chunked = plain.score(prompt + tokens, chunk=5)
    np.testing.assert_array_equal(chunked.view(np.uint32), logits.view(np.uint32))


def test_scores_are_close_to_those_of_the_cpu(
    device: str, plain: Engine, models: dict[str, Path]
) -> None:
    """Sums of 48 products or fewer, 3 layers: a thousand roundings of values below 100."""
    with Engine(models["f32"], None, device="cpu", **SMALL) as engine:
        expected = engine.score(REPEATS)
    assert np.abs(plain.score(REPEATS) - expected).max() < 1000 * 2.0**-24 * 100


def test_typical_acceptance(device: str, models: dict[str, Path], heads: Path) -> None:
    """Not exact, but the same every time."""
    options = {"acceptance": "typical", "temperature": 0.7, "max_new_tokens": 12}
    with Engine(models["f32"], heads, device=device, tree=TREE, **SMALL) as engine:
        first, second = (engine.generate(REPEATS, **options).token_ids for _ in range(2))
    assert first == second


def test_a_text_that_fills_the_context(device: str, plain: Engine, models: dict[str, Path]) -> None:
    """Pages are crossed, and the last tree has no room for all its nodes."""
    options = {"max_new_tokens": None, "eos_token_id": []}
    limits = {**SMALL, "max_context": 150}
    prompt = plain.tokenizer("the sea and " * 10)["input_ids"][:60]
    with Engine(models["f32"], None, device=device, **limits) as engine:
        expected = engine.generate(prompt, **options)
    assert (len(expected.token_ids), expected.finish_reason) == (90, "length")
    known = Known([prompt + expected.token_ids])
    with Engine(models["f32"], device=device, drafter=known, **limits) as engine:
        result = engine.generate(prompt, **options)
        assert (result.token_ids, result.finish_reason) == (expected.token_ids, "length")
        assert result.stats.steps < 30


def test_two_engines_on_one_device_in_two_threads(
    device: str, plain: Engine, models: dict[str, Path], heads: Path
) -> None:
    """Each writes what it writes alone; one is closed while the other one works."""
    expected = {seed: _drawn(plain, seed) for seed in range(4)}
    outcomes: dict[int, object] = {}

    def work(first: int) -> None:
        try:
            with Engine(models["f32"], heads, device=device, tree=TREE, **SMALL) as engine:
                for seed in range(first, 4, 2):
                    outcomes[seed] = _drawn(engine, seed)
        except Exception as error:
            outcomes[first] = error

    threads = [threading.Thread(target=work, args=(first,), daemon=True) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread hangs"
    assert outcomes == expected


def _drawn(engine: Engine, seed: int) -> list[int]:
    result = engine.generate(REPEATS, temperature=1.0, seed=seed, **NO_END)
    tokens: list[int] = result.token_ids
    return tokens


def test_the_engine_names_its_device(device: str, plain: Engine) -> None:
    assert plain.info["backend"].startswith(f"{device}, ")
    assert plain.memory["weight_bytes"] > 0
