"""Streaming, chat, and what frees a request's place."""

import gc
import signal
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from engine_util import Known, demo_engine, make_tiny
from medusa_ext import DraftInput, Engine

PROMPT = "Water boils at"
EMOJI = "Repeat exactly: 🙂🙃👩‍👩‍👧‍👦 汉字 e\u0301"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return demo_engine()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def idle(engine: Engine) -> bool:
    stats = engine.session_stats()
    return (stats.active, stats.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, {"max_new_tokens": 20}),
        (EMOJI, {"max_new_tokens": 40, "temperature": 1.5, "seed": 3}),
        ([{"role": "user", "content": EMOJI}], {"max_new_tokens": 40}),
        (PROMPT, {"max_new_tokens": 20, "stop_strings": ["degree", "at sea"]}),
    ],
)
def test_pieces_join_to_the_text(
    engine: Engine, prompt: object, options: dict[str, object]
) -> None:
    expected = engine.generate(prompt, **options)
    pieces = list(engine.stream(prompt, **options))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert all(piece.text for piece in pieces[:-1])
    assert [piece.result is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    last = pieces[-1].result
    assert last is not None
    assert (last.text, last.token_ids, last.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )


def test_pieces_are_never_half_a_character_or_part_of_a_stop_string(tiny: Path) -> None:
    """A random model of bytes: whole characters, broken ones, and stop strings made of them."""
    options = {"max_new_tokens": 200, "temperature": 3.0, "eos_token_id": []}
    met_long = met_broken = met_held = 0
    with Engine(tiny, threads=1) as engine:
        for seed in range(6):
            result = engine.generate("é", seed=seed, **options)
            text = result.text
            assert text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)
            pieces = [piece.text for piece in engine.stream("é", seed=seed, **options)]
            assert "".join(pieces) == text
            met_long += sum(character > "\x7f" and character != "\ufffd" for character in text)
            met_broken += text.count("\ufffd")
            met_held += len(pieces) < len(result.token_ids)

            stop = text[len(text) // 2 :][:4]
            before, given = text[: text.find(stop)], ""
            for piece in engine.stream("é", seed=seed, stop_strings=stop, **options):
                given += piece.text
                assert before.startswith(given)
            assert given == before
    assert min(met_long, met_broken, met_held) > 0, (met_long, met_broken, met_held)


def test_closing_frees_the_place(engine: Engine) -> None:
    stream = engine.stream(PROMPT)
    next(stream)
    assert engine.session_stats().active == 1
    stream.close()
    assert idle(engine)
    assert list(stream) == []
    stream.close()


def test_leaving_the_block_or_dropping_the_stream_frees_the_place(engine: Engine) -> None:
    with engine.stream(PROMPT) as stream:
        next(stream)
    assert idle(engine)
    stream = engine.stream(PROMPT)
    next(stream)
    del stream
    gc.collect()
    assert idle(engine)
    for _ in engine.stream(PROMPT):
        break
    gc.collect()
    assert idle(engine)
    engine.stream(PROMPT)  # never read
    gc.collect()
    assert idle(engine)


def test_other_texts_go_on_when_one_is_closed(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=16).text
    kept, closed = engine.stream(PROMPT, max_new_tokens=16), engine.stream("Another text")
    text = next(kept).text
    next(closed)
    closed.close()
    assert text + "".join(piece.text for piece in kept) == expected
    assert idle(engine)


class Interrupting(Known):
    """^C at the third step of decoding."""

    steps = 0

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        self.steps += 1
        if self.steps == 3:
            signal.raise_signal(signal.SIGINT)
        return super().draft(inputs)


@pytest.mark.parametrize("streaming", [False, True])
def test_interrupt_frees_the_place(tiny: Path, streaming: bool) -> None:
    with Engine(tiny, None, threads=1) as plain:
        expected = plain.generate(PROMPT, max_new_tokens=6).token_ids
    with Engine(tiny, threads=2, drafter=Interrupting([])) as engine:
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream(PROMPT)) if streaming else engine.generate([PROMPT, "More"])
        assert idle(engine)
        assert engine.generate(PROMPT, max_new_tokens=6).token_ids == expected


class Failing(Known):
    """Raises once."""

    failed = False

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError("a drafter's own mistake")
        return super().draft(inputs)


def test_error_of_a_drafter_ends_the_request_alone(tiny: Path) -> None:
    with Engine(tiny, None, threads=1) as plain:
        expected = plain.generate(PROMPT, max_new_tokens=6).token_ids
    with Engine(tiny, threads=2, drafter=Failing([])) as engine:
        with pytest.raises(ZeroDivisionError, match="own mistake"):
            engine.generate(PROMPT)
        assert idle(engine)
        assert engine.generate(PROMPT, max_new_tokens=6).token_ids == expected


def test_chat_reuses_its_cache_and_equals_fresh_prompts(engine: Engine) -> None:
    options = {"max_new_tokens": 24}
    chat = engine.chat(system="You answer in a few words.")
    turns = ["Name a planet.", "Name another one.", "Which of the two is larger?"]
    results = [chat.send(turn, **options) for turn in turns]
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system"] + ["user", "assistant"] * 3
    with Engine("demo", None, threads=1, max_context=1024, prefill_chunk=33) as fresh:
        for index, result in enumerate(results):
            again = fresh.generate(chat.messages[: 2 * index + 2], **options)
            assert (again.text, again.token_ids) == (result.text, result.token_ids)
    for before, result in pairwise(results):
        # All of the earlier prompt, and the answer as far as it tokenises alike.
        assert before.prompt_tokens <= result.stats.reused_tokens < result.prompt_tokens


def test_chat_stream_reset_and_early_close(engine: Engine) -> None:
    chat = engine.chat()
    pieces = list(chat.stream("Name a fruit.", max_new_tokens=16))
    assert chat.messages[-1] == {
        "role": "assistant",
        "content": "".join(piece.text for piece in pieces),
    }
    chat.reset()
    assert chat.messages == []
    with closing(chat.stream("Tell me a long story.", max_new_tokens=64)) as stream:
        first = next(stream).text
    assert idle(engine)
    assert chat.messages[0] == {"role": "user", "content": "Tell me a long story."}
    assert chat.messages[1]["content"].startswith(first)
    chat.reset()
    chat.stream("Never read.")
    gc.collect()
    assert chat.messages == []
    assert idle(engine)


@pytest.mark.parametrize("text", ["", None, ["a"]])
def test_chat_refuses_what_is_no_message(engine: Engine, text: object) -> None:
    chat = engine.chat()
    with pytest.raises(ValueError, match="a chat message must be a string that is not empty"):
        chat.send(text)
    assert chat.messages == []
