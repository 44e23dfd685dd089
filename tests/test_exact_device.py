"""Steps that a device runs with no host in between: they happen, and change nothing."""

import numpy as np
import pytest

from exact_models import SHAPES, config_json, model_for, tiny_weights
from medusa_ext import _core
from util import unit_of

SAMPLINGS = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.3},
]
TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]


class HostOnly(_core.Drafter):
    """Guesses nothing; a drafter in Python keeps every step with the host."""

    @property
    def max_nodes(self) -> int:
        return 1

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        return [([], []) for _ in inputs]


def texts(
    session: _core.Session, samplings: list[dict], *, late: int = 0
) -> tuple[list[list[int]], _core.SessionStats]:
    """What requests of 30 tokens emit; the last `late` of them come when others are under way."""
    found: dict[int, list[int]] = {}

    def submit(i: int) -> int:
        sampling = _core.SamplingParams(**samplings[i])
        return session.submit([5 + i, 3, 9], max_new_tokens=30, sampling=sampling)

    def step() -> None:
        for event in session.step():
            found.setdefault(event.request, []).extend(event.tokens)

    ids = [submit(i) for i in range(len(samplings) - late)]
    for i in range(len(ids), len(samplings)):
        for _ in range(5):
            step()
        ids.append(submit(i))
    while not session.idle:
        step()
    return [found[request] for request in ids], session.stats()


@pytest.fixture
def model(backend: _core.Backend) -> _core.Model:
    if backend.name == "cpu":
        pytest.skip("steps on the CPU are the host's")
    return model_for(SHAPES[0], unit_of(backend), 1)


@pytest.mark.parametrize("kind", ["plain", "heads"])
@pytest.mark.parametrize("late", [0, 2])
def test_device_steps_emit_what_host_steps_emit(model: _core.Model, kind: str, late: int) -> None:
    options = {"max_batch": 3, "max_context": 200}
    want, stats = texts(_core.Session(model, HostOnly(), **options), SAMPLINGS)
    assert stats.device_steps == 0
    drafter = None
    if kind == "heads":
        drafter = _core.medusa_drafter(model, _core.TreeSpec.from_paths(TREE))
    got, stats = texts(_core.Session(model, drafter, **options), SAMPLINGS, late=late)
    assert got == want
    assert stats.device_steps > 0.5 * stats.steps > 5


def test_a_cancelled_request_leaves_the_others_alone(model: _core.Model) -> None:
    options = {"max_batch": 2, "max_context": 200}
    want, _ = texts(_core.Session(model, None, **options), SAMPLINGS[:1])
    session = _core.Session(model, None, **options)
    kept = session.submit([5, 3, 9], max_new_tokens=30)
    other = session.submit([7, 7], max_new_tokens=100)
    tokens: list[int] = []
    for number in range(200):
        if number == 9:
            assert session.cancel(other)
        for event in session.step():
            tokens += event.tokens if event.request == kept else []
        if session.idle:
            break
    assert tokens == want[0]
    assert session.stats().active == 0


def test_broken_logits_are_an_error_and_not_the_end(backend: _core.Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("steps on the CPU are the host's")
    builder = _core.ModelBuilder(config_json(SHAPES[0]), "f32", backend)
    for name, value in tiny_weights(SHAPES[0]).items():
        builder.add(name, value * np.nan if name == "norm.weight" else value)
    session = _core.Session(builder.finish(), None, max_batch=1, max_context=100)
    for _ in range(2):
        request = session.submit([1, 2, 3], max_new_tokens=5)
        with pytest.raises(ValueError, match="finite"):
            session.step()
        session.cancel(request)
        while not session.idle:
            session.step()
