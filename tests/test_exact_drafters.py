"""Drafters that fail, and typical acceptance: not exact, but lawful."""

import gc
import threading

import pytest

import exact_util as exact
from exact_models import CONTEXT, SHAPES, Shape, model_for
from exact_util import Job, Outcome, ScriptedDrafter, check_scripted, known_of, prompt_of
from medusa_ext import _core
from util import unit_of


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=lambda shape: shape.name)
def test_typical_acceptance_at_temperature_0_is_greedy(
    backend: _core.Backend, shape: Shape
) -> None:
    jobs = [
        Job(prompt_of(n, n, shape.vocab), 30, (("acceptance", "typical"),)) for n in (1, 40, 70)
    ]
    check_scripted(backend, shape, jobs, max_batch=2)
    for job in jobs:
        greedy = Job(job.prompt, job.max_new)
        assert known_of(backend, shape, job, 448) == known_of(backend, shape, greedy, 448)


def test_typical_acceptance_repeats_itself_and_ends_right(backend: _core.Backend) -> None:
    """Same request, same tree: same text, whatever else is in the batch; ends where it should."""
    shape = SHAPES[0]
    model = model_for(shape, unit_of(backend), 2)
    tree = _core.TreeSpec.from_paths(
        [[i] for i in range(40)] + [[i, j] for i in range(8) for j in range(8)]
    )
    sampling = (("temperature", 1.5), ("acceptance", "typical"), ("epsilon", 0.0), ("seed", 3))
    jobs = [Job(prompt_of(n, n, shape.vocab), 25, sampling) for n in (1, 20, 63, 64, 65)]
    session = _core.Session(model, _core.medusa_drafter(model, tree), max_batch=5)
    together = exact.run(session, jobs)
    for job, outcome in zip(jobs, together, strict=True):
        for _ in range(2):
            alone_session = _core.Session(model, _core.medusa_drafter(model, tree), max_batch=1)
            alone = exact.run(alone_session, [job])[0]
            assert (alone.tokens, alone.finish) == (outcome.tokens, "length")
            assert alone.stats.accepted_lengths == outcome.stats.accepted_lengths
        assert len(outcome.tokens) == 25
        assert outcome.stats.steps < 25, "nothing was accepted"
    # A step that passes its end-of-sequence token is cut there.
    for at in range(1, 12):
        want = together[1].tokens
        job = Job(jobs[1].prompt, 25, sampling, eos=(want[at],))
        outcome = exact.run(_core.Session(model, _core.medusa_drafter(model, tree)), [job])[0]
        assert outcome.tokens == want[: want.index(want[at]) + 1]
        assert outcome.finish == "stop"


# Drafters that fail.


class FailingDrafter(ScriptedDrafter):
    """Fails at random calls, in every way that a Python drafter can."""

    FAILURES = ("raise", "no list", "too few", "bad parent", "too many nodes", "lengths differ")

    def __init__(self, seed: int, max_nodes: int, vocab: int) -> None:
        super().__init__(seed, max_nodes, vocab)
        self.failures: list[str] = []

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        answer = super().draft(inputs)
        if self._rng.random() < 0.6:
            return answer
        failure = self.FAILURES[len(self.failures) % len(self.FAILURES)]
        self.failures.append(failure)
        if failure == "raise":
            raise LookupError("no idea today")
        wrong = {
            "no list": 5,
            "too few": answer[1:],
            "bad parent": [([1, 2], [0, 2])] * len(inputs),
            "too many nodes": [([1] * self.max_nodes, [0] * self.max_nodes)] * len(inputs),
            "lengths differ": [([1, 2], [0])] * len(inputs),
        }
        return wrong[failure]


def step_or_error(session: _core.Session) -> tuple[list[_core.Event], Exception | None]:
    try:
        return session.step(), None
    except (LookupError, ValueError) as error:
        return [], error


def test_a_session_survives_its_drafter(backend: _core.Backend) -> None:
    """The error comes out of step(), and the next step goes on as if there had been none."""
    shape = SHAPES[1]
    jobs = [Job(prompt_of(n, n, shape.vocab), 30) for n in (3, 64, 100, 30, 7)]
    known = [known_of(backend, shape, job, CONTEXT) for job in jobs]
    drafter = FailingDrafter(1, 20, shape.vocab)
    session = _core.Session(
        model_for(shape, unit_of(backend), 2), drafter, max_batch=3, prefill_chunk=9
    )
    owner = {job.submit(session): index for index, job in enumerate(jobs)}
    drafter.scripts = {request: [*jobs[i].prompt, *known[i]] for request, i in owner.items()}
    outcomes = [Outcome() for _ in jobs]
    raised = 0
    while not session.idle:
        before = len(drafter.failures)
        events, error = step_or_error(session)
        assert len(drafter.failures) == before + (error is not None)
        if error is not None:
            assert isinstance(error, LookupError) == (drafter.failures[-1] == "raise"), error
            assert str(error)
            assert "\n" not in str(error)
            raised += 1
        exact.take_events(events, owner, outcomes)
    exact.check_empty(session)
    assert raised == len(drafter.failures) >= 2 * len(FailingDrafter.FAILURES)
    for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
        exact.check(job, outcome, tokens, CONTEXT, "failing drafter")


class LastTokenDrafter(_core.Drafter):
    """Proposes the last token again and again."""

    @property
    def max_nodes(self) -> int:
        return 5

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        return [([each.tokens[-1]] * 3, [0, 1, 2]) for each in inputs]


def test_requests_from_another_thread_and_a_drafter_that_only_the_session_holds(
    backend: _core.Backend,
) -> None:
    shape = SHAPES[3]
    session = _core.Session(model_for(shape, unit_of(backend), 2), LastTokenDrafter(), max_batch=3)
    gc.collect()
    jobs = [Job(prompt_of(n, 1 + 5 * n, shape.vocab), 12) for n in range(20)]
    known = [known_of(backend, shape, job, CONTEXT) for job in jobs]
    requests: list[int] = []
    thread = threading.Thread(target=lambda: requests.extend(job.submit(session) for job in jobs))
    events: list[_core.Event] = []
    thread.start()
    while thread.is_alive() or not session.idle:
        events += session.step()
    thread.join()
    outcomes = [Outcome() for _ in jobs]
    exact.take_events(events, {request: i for i, request in enumerate(requests)}, outcomes)
    exact.check_empty(session)
    for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
        exact.check(job, outcome, tokens, CONTEXT, "two threads")
