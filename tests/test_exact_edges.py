"""Exactness where it is easily lost: the context's end, a full cache, reused prefixes, ties, drafters that fail."""

from collections.abc import Callable

import exact_util as exact
import numpy as np
import pytest
from exact_util import SHAPES, Job, Outcome, ScriptedDrafter, Shape, Tally
from medusa_ext import _core
from util import isa_of

TALLY = Tally()
PLAIN_SHAPE = SHAPES[0]


def prompt_of(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, vocab, length).tolist())


def known_of(backend: _core.Backend, shape: Shape, job: Job, max_context: int) -> list[int]:
    return list(exact.known_tokens(shape, isa_of(backend), job, max_context))


def run_scripted(
    backend: _core.Backend,
    shape: Shape,
    jobs: list[Job],
    *,
    max_context: int = exact.CONTEXT,
    max_nodes: int = 64,
    seed: int = 0,
    **options: int,
) -> tuple[_core.Session, list[Outcome]]:
    """Jobs through one session with the drafter that knows, checked against one-at-a-time decoding."""
    known = [known_of(backend, shape, job, max_context) for job in jobs]
    model = exact.model_for(shape, isa_of(backend), 2)
    drafter = ScriptedDrafter(seed, max_nodes, shape.vocab)
    session = _core.Session(model, drafter, max_context=max_context, **options)
    outcomes = exact.run(session, jobs, drafter=drafter, scripts=known)
    for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
        exact.check(job, outcome, tokens, max_context, f"{shape.name}, {options}")
    TALLY.add(backend, session, outcomes)
    TALLY.of(backend).update(drafter.met)
    return session, outcomes


# The context's end.


@pytest.mark.parametrize("max_context", [2, 3, 63, 64, 65, 128, 129, 130])
def test_the_last_position_of_the_context_is_used(backend: _core.Backend, max_context: int) -> None:
    """Trees of 256 nodes next to the end, prompts up to one token short of it."""
    lengths = sorted({1, max_context // 2, *range(max(1, max_context - 9), max_context)})
    for shape in SHAPES[:3]:
        jobs = [Job(prompt_of(n, max(n, 1), shape.vocab)) for n in lengths if 1 <= n < max_context]
        _, outcomes = run_scripted(backend, shape, jobs, max_context=max_context, max_nodes=256, max_batch=4)
        for job, outcome in zip(jobs, outcomes, strict=True):
            assert len(job.prompt) + len(outcome.tokens) == max_context
            assert outcome.finish == "length"
            TALLY.of(backend)["ends exactly at max_context"] += 1


def test_an_end_of_sequence_token_at_every_place(backend: _core.Backend) -> None:
    """Cut exactly after it, wherever it falls in an accepted path; ids that never come change nothing."""
    shape = SHAPES[7]
    prompt = prompt_of(3, 20, shape.vocab)
    known = known_of(backend, shape, Job(prompt, 40), exact.CONTEXT)
    for at in range(40):
        job = Job(prompt, 40, eos=(known[at], shape.vocab + 5))
        _, [outcome] = run_scripted(backend, shape, [job], max_nodes=24, seed=at)
        assert outcome.tokens == known[: known.index(known[at]) + 1]
        assert outcome.finish == "stop"


def test_max_new_tokens_at_every_place(backend: _core.Backend) -> None:
    shape = SHAPES[1]
    prompt = prompt_of(4, 61, shape.vocab)
    for count in range(1, 40):
        _, [outcome] = run_scripted(backend, shape, [Job(prompt, count)], max_nodes=24, seed=count)
        assert len(outcome.tokens) == count
        assert outcome.finish == "length"


# A full cache.


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("max_nodes", [2, 40])
def test_sequences_that_are_set_back_go_on_as_if_nothing_had_been(
    backend: _core.Backend, shape: Shape, max_nodes: int
) -> None:
    """Three pages for five sequences that each grow to three pages."""
    sampling = ((), (("temperature", 0.8), ("seed", 7)), (("repetition_penalty", 1.2),))
    jobs = [Job(prompt_of(n, 5 + n, shape.vocab), sampling=sampling[n % 3]) for n in range(5)]
    session, outcomes = run_scripted(
        backend, shape, jobs, max_context=190, max_nodes=max_nodes, max_batch=4, cache_tokens=1
    )
    assert session.stats().pages_total == 3
    assert session.stats().set_backs > 0
    assert sum(outcome.stats.set_backs for outcome in outcomes) == session.stats().set_backs


def test_no_page_is_ever_lost(backend: _core.Backend, case_count: Callable[[int], int]) -> None:
    """After any schedule of arrivals and cancellations a request that needs every page still runs."""
    shape, max_context = PLAIN_SHAPE, 200
    model = exact.model_for(shape, isa_of(backend), 2)
    drafter = ScriptedDrafter(1, 32, shape.vocab)
    session = _core.Session(model, drafter, max_context=max_context, max_batch=3, cache_tokens=256)
    rng = np.random.default_rng(11)
    for _ in range(case_count(8)):
        prompts = [exact.random_prompt(rng, shape.vocab, max_context - 1) for _ in range(6)]
        jobs = [Job(prompt, int(rng.integers(1, 60)), reuse=bool(rng.random() < 0.7)) for prompt in prompts]
        known = [known_of(backend, shape, job, max_context) for job in jobs]
        outcomes = exact.run(session, jobs, drafter=drafter, scripts=known, rng=rng, cancel_rate=0.1)
        for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
            exact.check(job, outcome, tokens, max_context, "schedule")
    whole = Job(prompt_of(9, 30, shape.vocab))
    tokens = known_of(backend, shape, whole, max_context)
    outcome = exact.run(session, [whole], drafter=drafter, scripts=[tokens])[0]
    exact.check(whole, outcome, tokens, max_context, "the whole cache")
    assert session.stats().pages_total == 4


# Reused prefixes.


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_chat_turns_equal_fresh_prompts(backend: _core.Backend, shape: Shape) -> None:
    """Each turn's prompt is the whole conversation so far; a branch leaves it while another turn runs."""
    model = exact.model_for(shape, isa_of(backend), 2)
    drafter = ScriptedDrafter(2, 20, shape.vocab)
    session = _core.Session(model, drafter, max_batch=3, prefill_chunk=16)
    is_dynamic = dict(shape.rope).get("dynamic_factor", 0) > 0
    text = prompt_of(21, 30, shape.vocab)
    for turn in range(4):
        branch = (*text[: len(text) // 2], *prompt_of(100 + turn, 9, shape.vocab))
        jobs = [Job(text, 33 + turn), Job(branch, 20), Job((*text, 1, 2, 3), 10)]
        known = [known_of(backend, shape, job, exact.CONTEXT) for job in jobs]
        outcomes = exact.run(session, jobs, drafter=drafter, scripts=known)
        for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
            exact.check(job, outcome, tokens, exact.CONTEXT, f"turn {turn}")
        TALLY.add(backend, session, outcomes)
        if turn > 0 and not is_dynamic:
            assert outcomes[0].stats.reused_tokens >= answered - 1
            assert outcomes[1].stats.reused_tokens >= len(text) // 2
        if turn > 0:
            fresh = exact.run(session, [Job(text, 5, reuse=False)], drafter=drafter, scripts=[known[0]])[0]
            assert fresh.stats.reused_tokens == 0
            assert fresh.tokens == outcomes[0].tokens[:5]
        answered = len(text) + len(outcomes[0].tokens)
        text = (*text, *outcomes[0].tokens, *prompt_of(turn, 7 + turn, shape.vocab))


def test_the_same_prompt_again_reuses_all_but_its_last_token(backend: _core.Backend) -> None:
    for length in (1, 2, 63, 64, 65, 66, 128, 129):
        job = Job(prompt_of(length, length, PLAIN_SHAPE.vocab), 12)
        _, outcomes = run_scripted(backend, PLAIN_SHAPE, [job, job, job], max_batch=1)
        assert [outcome.stats.reused_tokens for outcome in outcomes] == [0, length - 1, length - 1]


# Batches and threads.


def test_thirteen_requests_through_any_number_of_slots(backend: _core.Backend) -> None:
    sampling = ((), (("temperature", 1.0), ("seed", 5)), (("temperature", 0.7), ("top_p", 0.9)))
    for shape in SHAPES[:4]:
        lengths = [1, 64, 65, 3, 130, 17, 63, 2, 128, 90, 31, 5, 200]
        jobs = [
            Job(prompt_of(i, n, shape.vocab), 5 + i, sampling[i % 3]) for i, n in enumerate(lengths)
        ]
        for max_batch in (1, 2, 5, 13, 20):
            run_scripted(backend, shape, jobs, max_batch=max_batch, prefill_chunk=100, seed=max_batch)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_scores_do_not_depend_on_chunks_or_threads(backend: _core.Backend, shape: Shape) -> None:
    tokens = list(prompt_of(8, 200, shape.vocab))

    def score(threads: int, chunk: int) -> tuple[bytes, bytes]:
        logits = np.zeros((200, shape.vocab), np.float32)
        hidden = np.zeros((200, shape.hidden), np.float32)
        _core.score(exact.model_for(shape, isa_of(backend), threads), tokens, chunk, logits, hidden)
        return logits.tobytes(), hidden.tobytes()

    want = score(1, 200)
    for threads, chunk in [(2, 200), (1, 1), (2, 1), (1, 7), (2, 64), (2, 65), (1, 199), (2, 3)]:
        assert score(threads, chunk) == want, f"{threads} threads, chunks of {chunk}"


# Ties, and token 0 everywhere.


@pytest.mark.parametrize("kind", ["scripted", "heads", "lookup"])
def test_all_logits_tied_and_token_0_everywhere(backend: _core.Backend, kind: str) -> None:
    """Every choice is id 0, prompts and guesses are zeros: nothing may be taken for padding, and every path is right."""
    shape = SHAPES[5]
    model = exact.build_model(SHAPES[2], exact.backend_for(isa_of(backend), 2), zero=True)
    tree = _core.TreeSpec.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 1]])
    drafter = {
        "scripted": lambda: ScriptedDrafter(4, 30, shape.vocab),
        "heads": lambda: _core.medusa_drafter(model, tree),
        "lookup": lambda: _core.prompt_lookup_drafter(max_nodes=9),
    }[kind]()
    jobs = [Job((0,) * length, 30) for length in (1, 5, 64, 100)]
    session = _core.Session(model, drafter, max_batch=3)
    zeros = [[0] * 40] * len(jobs)
    scripted = drafter if isinstance(drafter, ScriptedDrafter) else None
    outcomes = exact.run(session, jobs, drafter=scripted, scripts=zeros)
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert exact.plain_tokens(model, job, exact.CONTEXT)[:30] == [0] * 30
        assert outcome.tokens == [0] * 30
        assert outcome.stats.steps < 30
        if kind == "heads":  # the first step has no hidden state to draft from; then depth 2 is always right
            assert outcome.stats.accepted_lengths[3] >= 9


@pytest.mark.parametrize("kind", ["plain", "scripted", "heads"])
def test_noise_belongs_to_the_position(backend: _core.Backend, kind: str) -> None:
    """With all logits tied the sampled token has the greatest noise: the least word of Philox at its absolute position."""
    shape = SHAPES[2]
    model = exact.build_model(shape, exact.backend_for(isa_of(backend), 2), zero=True)
    jobs, want = [], []
    for seed, sample, length in [(0, 0, 1), (2**64 - 1, 3, 30), (2**40, 1, 63), (5, 0, 64), (5, 2, 64)]:
        sampling = (("temperature", 0.7), ("seed", seed), ("sample_index", sample))
        jobs.append(Job(prompt_of(1, length, shape.vocab), 40, sampling))
        positions = range(length, length + 40)
        want.append([int(_core.ops.noise(seed, sample, p, shape.vocab).argmin()) for p in positions])
    drafter: _core.Drafter | None = None
    if kind == "scripted":
        drafter = ScriptedDrafter(6, 50, shape.vocab)
    elif kind == "heads":
        drafter = _core.medusa_drafter(model, _core.TreeSpec.from_paths([[0], [1], [0, 0], [0, 1]]))
    session = _core.Session(model, drafter, max_batch=4)
    outcomes = exact.run(session, jobs, drafter=drafter if kind == "scripted" else None, scripts=want)
    assert [outcome.tokens for outcome in outcomes] == want
    if kind == "heads":  # coupled candidates of tied heads are the token itself, as often as it is among the 48 ranked
        assert np.mean([outcome.stats.steps for outcome in outcomes]) < 36


# Typical acceptance: not exact, but lawful.


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=lambda shape: shape.name)
def test_typical_acceptance_at_temperature_0_is_greedy(backend: _core.Backend, shape: Shape) -> None:
    jobs = [Job(prompt_of(n, n, shape.vocab), 30, (("acceptance", "typical"),)) for n in (1, 40, 70)]
    run_scripted(backend, shape, jobs, max_batch=2)
    for job in jobs:
        greedy = Job(job.prompt, job.max_new)
        assert known_of(backend, shape, job, 448) == known_of(backend, shape, greedy, 448)


def test_typical_acceptance_repeats_itself_and_ends_right(backend: _core.Backend) -> None:
    """Same request, same tree: same text, whatever else is in the batch; ends where it should."""
    shape = PLAIN_SHAPE
    model = exact.model_for(shape, isa_of(backend), 2)
    tree = _core.TreeSpec.from_paths([[i] for i in range(40)] + [[i, j] for i in range(8) for j in range(8)])
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


def test_a_session_survives_its_drafter(backend: _core.Backend) -> None:
    """The error comes out of step(), and the next step goes on as if there had been none."""
    shape = SHAPES[1]
    jobs = [Job(prompt_of(n, n, shape.vocab), 30) for n in (3, 64, 100, 30, 7)]
    known = [known_of(backend, shape, job, exact.CONTEXT) for job in jobs]
    drafter = FailingDrafter(1, 20, shape.vocab)
    session = _core.Session(exact.model_for(shape, isa_of(backend), 2), drafter, max_batch=3, prefill_chunk=9)
    owner = {job.submit(session): index for index, job in enumerate(jobs)}
    drafter.scripts = {request: [*jobs[i].prompt, *known[i]] for request, i in owner.items()}
    outcomes = [Outcome() for _ in jobs]
    raised = 0
    while not session.idle:
        before = len(drafter.failures)
        try:
            events = session.step()
        except (LookupError, ValueError) as error:
            assert isinstance(error, LookupError) == (drafter.failures[-1] == "raise"), error
            assert str(error)
            assert "\n" not in str(error)
            raised += 1
            assert len(drafter.failures) == before + 1
            continue
        assert len(drafter.failures) == before, "a failure that nobody heard of"
        exact.take_events(events, owner, outcomes)
    exact.check_empty(session)
    assert raised == len(drafter.failures) >= 2 * len(FailingDrafter.FAILURES)
    for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
        exact.check(job, outcome, tokens, exact.CONTEXT, "failing drafter")


def test_the_cases_met_what_they_are_for(backend: _core.Backend) -> None:
    met = TALLY.of(backend)
    if not met["cases"]:
        pytest.skip("no case was run")
    wanted = {
        "accepted paths of depth 3 and more": 500,
        "compactions across a page border": 50,
        "set-backs": 20,
        "requests that reused tokens": 50,
        "eos inside an accepted path": 5,
        "limit inside a right path": 5,
        "ends exactly at max_context": 50,
    }
    missing = {what: (met[what], least) for what, least in wanted.items() if met[what] < least}
    assert not missing, f"met too little (met, wanted): {missing}"
