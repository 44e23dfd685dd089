"""Steps that a device runs with no host in between: they happen, and change nothing."""

from collections.abc import Sequence
from itertools import product

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
TOO_MANY_ENDS = 33  # with so many, a request stays with the host
TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]


class HostOnly(_core.Drafter):
    """Guesses nothing; a drafter in Python keeps every step with the host."""

    @property
    def max_nodes(self) -> int:
        return 1

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        return [([], []) for _ in inputs]


def texts(
    session: _core.Session, samplings: list[dict], *, late: int = 0, eos_ids: Sequence[int] = ()
) -> tuple[list[list[int]], _core.SessionStats]:
    """What requests of 30 tokens emit; the last `late` of them come when others are under way."""
    found: dict[int, list[int]] = {}

    def submit(i: int) -> int:
        sampling = _core.SamplingParams(**samplings[i])
        prompt = [5 + i, 3, 9]
        return session.submit(prompt, max_new_tokens=30, sampling=sampling, eos_ids=eos_ids)

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
def model(backend: _core.Backend, request: pytest.FixtureRequest) -> _core.Model:
    if backend.name == "cpu":
        pytest.skip("steps on the CPU are the host's")
    name = getattr(request, "param", "f32")
    shape = next(shape for shape in SHAPES if shape.name == name)
    return model_for(shape, unit_of(backend), 1)


@pytest.mark.parametrize(
    ("model", "kind", "late"),
    [
        *product(["f32"], ["plain", "heads"], [0, 2]),
        ("bf16-token-map", "plain", 0),
        ("bf16-token-map", "heads", 2),
        ("f16-tied", "plain", 2),
        ("f16-tied", "heads", 0),
    ],
    indirect=["model"],
)
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


@pytest.mark.parametrize("model", ["f32", "bf16-token-map"], indirect=True)
def test_typical_acceptance_emits_what_host_steps_emit(model: _core.Model) -> None:
    """It follows the tree, so that the same guesses must be made too."""
    options = {"max_batch": 2, "max_context": 200}
    samplings = [
        {"temperature": 0.7, "acceptance": "typical", "epsilon": 0.02, "delta": 0.1},
        {"temperature": 1.3, "acceptance": "typical", "epsilon": 0.3, "delta": 0.6},
    ]
    drafter = _core.medusa_drafter(model, _core.TreeSpec.from_paths(TREE))
    results = []
    for ends in (1, TOO_MANY_ENDS):
        session = _core.Session(model, drafter, **options)
        results.append(texts(session, samplings, eos_ids=[2] * ends))
    (got, stats), (want, host_stats) = results
    assert got == want
    assert stats.device_steps > 0.5 * stats.steps > 2
    assert host_stats.device_steps == 0
    assert host_stats.steps < sum(map(len, want))


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


def test_the_end_is_told_before_the_steps_that_run_on_without_it(model: _core.Model) -> None:
    options = {"max_batch": 1, "max_context": 200}
    (text,), _ = texts(_core.Session(model, None, **options), SAMPLINGS[1:2])
    end = next(i for i in range(8, 30) if text[i] not in text[:i])
    session = _core.Session(model, None, **options)
    session.submit(
        [5, 3, 9],
        max_new_tokens=30,
        sampling=_core.SamplingParams(**SAMPLINGS[1]),
        eos_ids=[text[end]],
    )
    tokens: list[int] = []
    while not session.idle:
        for event in session.step():
            tokens += event.tokens
    assert tokens == text[: end + 1]
    # One token a step; the next step was under way already and is not waited for.
    assert session.stats().steps == end + 1
    # It is read when something new comes, and leaves nothing behind.
    (again,), _ = texts(session, SAMPLINGS[1:2])
    assert again == text


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
