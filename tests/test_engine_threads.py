"""Several threads on one engine, two engines at once, and memory that stays flat."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_util import Known, demo_engine, make_tiny
from medusa_ext import DraftInput, Engine

PATIENCE_S = 300  # of a join; a hang is a failure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def run_all(works: list[Callable[[], object]]) -> list[object]:
    """Run each work in a thread of its own; the results or the exceptions, in order."""
    outcomes: list[object] = [None] * len(works)

    def run(index: int) -> None:
        try:
            outcomes[index] = works[index]()
        except Exception as error:
            outcomes[index] = error

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a thread hangs"
    return outcomes


def test_threads_share_an_engine() -> None:
    """Generate, stream and score side by side give what each gives alone."""
    engine = demo_engine()
    prompts = [f"{count} little pigs" for count in ("One", "Two", "Three", "Four", "Five", "Six")]
    options = {"max_new_tokens": 10, "temperature": 0.8, "seed": 4}
    expected = [engine.generate(prompt, **options).text for prompt in prompts]
    scores = engine.score(prompts[0]).tobytes()

    def generate(prompt: str) -> str:
        return engine.generate(prompt, **options).text

    def stream(prompt: str) -> str:
        return "".join(piece.text for piece in engine.stream(prompt, **options))

    works = [
        *(lambda prompt=prompt: generate(prompt) for prompt in prompts),
        *(lambda prompt=prompt: stream(prompt) for prompt in prompts),
        lambda: engine.score(prompts[0]).tobytes(),
    ]
    assert run_all(works) == [*expected, *expected, scores]
    assert engine.session_stats().active == 0


class Failing(Known):
    """Fails once all texts have come together."""

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        if len(inputs) == 3:
            raise ZeroDivisionError("broken")
        time.sleep(0.02)  # so that no text ends before all have come
        return super().draft(inputs)


def test_failure_of_a_step_reaches_every_thread(tiny: Path) -> None:
    with Engine(tiny, threads=2, max_batch=3, drafter=Failing([])) as engine:
        works = [lambda: engine.generate("Hello", max_new_tokens=None, eos_token_id=[])] * 3
        outcomes = run_all(works)
        kinds = sorted(type(outcome).__name__ for outcome in outcomes)
        assert kinds == ["RuntimeError", "RuntimeError", "ZeroDivisionError"]
        assert all("broken" in str(outcome) for outcome in outcomes)
        assert engine.generate("Hello", max_new_tokens=3).token_ids


class Interrupting(Known):
    """^C once three texts have run together for some steps, whichever thread drives."""

    steps = 0

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        time.sleep(0.005)
        self.steps += len(inputs) == 3
        if self.steps == 5:
            self.steps += 1
            signal.raise_signal(signal.SIGINT)
        return super().draft(inputs)


@pytest.mark.parametrize("attempt", range(4))
def test_interrupt_of_the_main_thread_leaves_the_others_alone(tiny: Path, attempt: int) -> None:
    options = {"max_new_tokens": 150, "eos_token_id": [], "temperature": 1.0}
    with Engine(tiny, None, threads=1) as plain:
        expected = [plain.generate("Hello", seed=seed, **options).token_ids for seed in (1, 2)]
    outcomes: list[object] = []
    with Engine(tiny, threads=1, drafter=Interrupting([])) as engine:

        def work(seed: int) -> Callable[[], object]:
            return lambda: engine.generate("Hello", seed=seed, **options).token_ids

        others = threading.Thread(target=lambda: outcomes.extend(run_all([work(1), work(2)])))
        others.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate("Hello", max_new_tokens=None, eos_token_id=[])
        others.join(PATIENCE_S)
        assert outcomes == expected
        assert engine.session_stats().active == 0


INTERRUPTS = """
import faulthandler, random, signal, sys
from medusa_ext import Engine

faulthandler.dump_traceback_later(60, exit=True)
signal.signal(signal.SIGALRM, signal.default_int_handler)
chance = random.Random(5)
options = {"max_new_tokens": 6, "eos_token_id": [], "temperature": 1.0}
with Engine(sys.argv[1], threads=1) as engine:
    expected = [engine.generate("Hello", seed=seed, **options).token_ids for seed in range(8)]
    interrupts = 0
    while interrupts < 400:
        seed = chance.randrange(8)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 4e-3))
                if chance.random() < 0.5:
                    engine.generate("Hello", seed=seed, **options)
                else:
                    with engine.stream("Hello", seed=seed, **options) as stream:
                        list(stream)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
        assert engine.generate("Hello", seed=seed, **options).token_ids == expected[seed]
        stats = engine.session_stats()
        assert (stats.active, stats.waiting) == (0, 0), stats
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_interrupts_at_any_time_leave_the_engine_whole(tiny: Path) -> None:
    """In a process of its own, since a hang or an interrupt too late would end the others."""
    command = [sys.executable, "-c", INTERRUPTS, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


class Selfish(Known):
    """Asks the engine that runs it."""

    engine: Engine

    def __init__(self, ask: Callable[[Engine], object]) -> None:
        super().__init__([])
        self.ask = ask

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        self.ask(self.engine)
        return super().draft(inputs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.generate("Hello", max_new_tokens=2),
        lambda engine: engine.stream("Hello"),
        lambda engine: engine.score("Hello"),
    ],
    ids=["generate", "stream", "score"],
)
def test_drafter_that_uses_its_own_engine(tiny: Path, ask: Callable[[Engine], object]) -> None:
    drafter = Selfish(ask)
    with Engine(tiny, threads=1, drafter=drafter) as engine:
        drafter.engine = engine
        outcomes = run_all([lambda: engine.generate("Hello", max_new_tokens=8)])
        assert "a drafter cannot use the engine that runs it" in str(outcomes[0])
        assert engine.score("Hello").any()  # this thread is no longer taken for the drafter's
        drafter.ask = lambda engine: None
        assert len(engine.generate("Hello", max_new_tokens=8, eos_token_id=[]).token_ids) == 8


class Patient(Known):
    """Makes no text end before the test has seen it run."""

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        time.sleep(0.02)
        return super().draft(inputs)


def test_close_ends_texts_of_other_threads(tiny: Path) -> None:
    engine = Engine(tiny, threads=2, drafter=Patient([]))

    def close() -> None:
        while engine.session_stats().active < 2:
            time.sleep(0.01)
        engine.close()

    generate = lambda: engine.generate("Hello", max_new_tokens=None, eos_token_id=[])  # noqa: E731
    outcomes = run_all([generate, generate, close])
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError, type(None)]
    assert all("closed" in str(outcome) for outcome in outcomes[:2])


def test_two_engines_at_once() -> None:
    options = {"max_new_tokens": 12}
    expected = [
        demo_engine().generate(prompt, **options).text for prompt in ("Hello", "Good night")
    ]
    with (
        Engine("demo", threads=2, max_context=128) as one,
        Engine("demo", None, threads=1, max_context=128) as two,
    ):
        works = [
            lambda: one.generate("Hello", **options).text,
            lambda: two.generate("Good night", **options).text,
        ]
        assert run_all(works) == expected


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)
def test_memory_stays_flat_over_200_calls(tiny: Path) -> None:
    """After a warm-up that touches all of the cache, 200 calls add less than 4 MiB."""
    with Engine(tiny, threads=2, max_context=128, max_batch=2, cache_tokens=256) as engine:

        def call(index: int) -> None:
            prompt = [1 + index % 50] * (1 + index % 60)
            engine.generate(
                prompt, max_new_tokens=2, stop_strings=["x"], temperature=0.5, seed=index
            )
            if index % 10 == 0:
                next(engine.stream(prompt))

        for index in range(60):
            call(index)
        before = resident_bytes()
        for index in range(200):
            call(index)
        assert resident_bytes() - before < 4 * 2**20
        assert engine.session_stats().active == 0
