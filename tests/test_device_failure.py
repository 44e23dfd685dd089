"""A device that fails: the process lives, the engine is closed and says why, another one works."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_util import make_tiny
from medusa_ext import CudaError, Engine

MESSAGE = "cudaErrorIllegalAddress: an illegal memory access was encountered"
CLOSED = f"this engine is closed, the device failed: {MESSAGE}; make a new one"
FOREVER: dict[str, Any] = {"max_new_tokens": None, "eos_token_id": []}


class Breaking:
    """A session whose step fails once `is_time` says so."""

    def __init__(self, session: Any, is_time: Callable[[Any], bool]) -> None:
        self._session, self._is_time = session, is_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self) -> Any:
        if self._is_time(self._session):
            raise CudaError(MESSAGE)
        return self._session.step()


def break_at(engine: Engine, is_time: Callable[[Any], bool]) -> None:
    broken: Any = Breaking(engine._session, is_time)
    engine._session = engine._pump._session = broken


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny: Path) -> Engine:
    return Engine(tiny, None, device="cpu", threads=1)


def assert_closed(engine: Engine) -> None:
    """Every way in says what happened; close still gives the memory back."""
    for call in (
        lambda: engine.generate("a"),
        lambda: next(engine.stream("a")),
        lambda: engine.chat().send("a"),
        lambda: engine.score("a"),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == CLOSED
    engine.close()
    engine.close()
    assert not hasattr(engine, "_session")
    with pytest.raises(RuntimeError, match=r"^this engine is closed; make a new one$"):
        engine.generate("a")


def test_a_step_that_fails(tiny: Path, engine: Engine) -> None:
    with Engine(tiny, None, device="cpu", threads=1) as other:
        expected = other.generate("Hello", max_new_tokens=9).token_ids
        break_at(engine, lambda session: session.stats().steps == 3)
        with pytest.raises(CudaError, match=MESSAGE):
            engine.generate("Hello", **FOREVER)
        assert_closed(engine)
        assert other.generate("Hello", max_new_tokens=9).token_ids == expected
    with Engine(tiny, None, device="cpu", threads=1) as third:
        assert third.generate("Hello", max_new_tokens=9).token_ids == expected


def test_a_stream_gives_what_came_before(engine: Engine) -> None:
    whole = engine.generate("Hello", max_new_tokens=20, eos_token_id=[]).text
    steps = engine.session_stats().steps
    break_at(engine, lambda session: session.stats().steps == steps + 10)
    stream = engine.stream("Hello", max_new_tokens=20, eos_token_id=[])
    pieces: list[str] = []
    with pytest.raises(CudaError, match=MESSAGE):
        pieces.extend(piece.text for piece in stream)
    stream.close()
    assert pieces
    assert whole.startswith("".join(pieces))
    assert_closed(engine)


def test_every_thread_hears_of_it(engine: Engine) -> None:
    def all_have_come(session: Any) -> bool:
        time.sleep(0.01)  # so that no text ends before
        return session.stats().active == 3

    break_at(engine, all_have_come)
    outcomes: list[Exception] = []

    def work() -> None:
        try:
            engine.generate("Hello", **FOREVER)
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread hangs"
    assert (
        sorted(type(error).__name__ for error in outcomes) == ["CudaError"] + ["RuntimeError"] * 2
    )
    assert all(MESSAGE in str(error) for error in outcomes)
    assert_closed(engine)


def test_a_score_that_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise CudaError(MESSAGE)

    monkeypatch.setattr("medusa_ext._core.score", fail)
    with pytest.raises(CudaError, match=MESSAGE):
        engine.score("Hello")
    assert_closed(engine)


def test_the_engine_in_a_with_block(engine: Engine) -> None:
    """Leaving the block after the failure hides nothing."""
    break_at(engine, lambda session: True)
    with pytest.raises(CudaError, match=MESSAGE), engine:
        engine.generate("Hello")
    assert repr(engine) == "Engine(closed)"
