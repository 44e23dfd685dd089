"""Exactness where it is easily lost: the context's end, a full cache, reused prefixes, ties."""

from collections.abc import Callable

import numpy as np
import pytest

import exact_util as exact
from exact_models import CONTEXT, SHAPES, Shape, build_model, model_for
from exact_util import Job, ScriptedDrafter, Tally, check_scripted, known_of, prompt_of
from medusa_ext import _core
from util import backend_for, unit_of

TALLY = Tally()
PLAIN_SHAPE = SHAPES[0]


# The context's end.


@pytest.mark.parametrize("max_context", [2, 3, 63, 64, 65, 128, 129, 130])
def test_the_last_position_of_the_context_is_used(backend: _core.Backend, max_context: int) -> None:
    """Trees of 256 nodes next to the end, prompts up to one token short of it."""
    lengths = sorted({1, max_context // 2, *range(max(1, max_context - 9), max_context)})
    for shape in SHAPES[:3]:
        jobs = [Job(prompt_of(n, max(n, 1), shape.vocab)) for n in lengths if 1 <= n < max_context]
        _, outcomes = check_scripted(
            backend,
            shape,
            jobs,
            max_context=max_context,
            max_nodes=256,
            tally=TALLY,
            max_batch=4,
        )
        for job, outcome in zip(jobs, outcomes, strict=True):
            assert len(job.prompt) + len(outcome.tokens) == max_context
            assert outcome.finish == "length"
            TALLY.of(backend)["ends exactly at max_context"] += 1


def test_an_end_of_sequence_token_at_every_place(backend: _core.Backend) -> None:
    """Cut right after it, wherever it falls in an accepted path; ids that never come do nothing."""
    shape = SHAPES[7]
    prompt = prompt_of(3, 20, shape.vocab)
    known = known_of(backend, shape, Job(prompt, 40), CONTEXT)
    for at in range(40):
        job = Job(prompt, 40, eos=(known[at], shape.vocab + 5))
        _, [outcome] = check_scripted(backend, shape, [job], max_nodes=24, seed=at, tally=TALLY)
        assert outcome.tokens == known[: known.index(known[at]) + 1]
        assert outcome.finish == "stop"


def test_max_new_tokens_at_every_place(backend: _core.Backend) -> None:
    shape = SHAPES[1]
    prompt = prompt_of(4, 61, shape.vocab)
    for count in range(1, 40):
        _, [outcome] = check_scripted(
            backend, shape, [Job(prompt, count)], max_nodes=24, seed=count, tally=TALLY
        )
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
    session, outcomes = check_scripted(
        backend,
        shape,
        jobs,
        max_context=190,
        max_nodes=max_nodes,
        tally=TALLY,
        max_batch=4,
        cache_tokens=1,
    )
    assert session.stats().pages_total == 3
    assert session.stats().set_backs > 0
    assert sum(outcome.stats.set_backs for outcome in outcomes) == session.stats().set_backs


def test_no_page_is_ever_lost(backend: _core.Backend, case_count: Callable[[int], int]) -> None:
    """After any schedule of arrivals and cancellations, whoever needs every page still gets it."""
    shape, max_context = PLAIN_SHAPE, 200
    model = model_for(shape, unit_of(backend), 2)
    drafter = ScriptedDrafter(1, 32, shape.vocab)
    session = _core.Session(model, drafter, max_context=max_context, max_batch=3, cache_tokens=256)
    rng = np.random.default_rng(11)
    for _ in range(case_count(8)):
        prompts = [exact.random_prompt(rng, shape.vocab, max_context - 1) for _ in range(6)]
        jobs = [
            Job(prompt, int(rng.integers(1, 60)), reuse=bool(rng.random() < 0.7))
            for prompt in prompts
        ]
        known = [known_of(backend, shape, job, max_context) for job in jobs]
        outcomes = exact.run(
            session, jobs, drafter=drafter, scripts=known, rng=rng, cancel_rate=0.1
        )
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
    """Each turn's prompt is the whole conversation so far; a branch leaves it while a turn runs."""
    model = model_for(shape, unit_of(backend), 2)
    drafter = ScriptedDrafter(2, 20, shape.vocab)
    session = _core.Session(model, drafter, max_batch=3, prefill_chunk=16)
    is_dynamic = dict(shape.rope).get("dynamic_factor", 0) > 0
    text = prompt_of(21, 30, shape.vocab)
    answered = 0  # tokens of the turn before, question and answer
    for turn in range(4):
        branch = (*text[: len(text) // 2], *prompt_of(100 + turn, 9, shape.vocab))
        jobs = [Job(text, 33 + turn), Job(branch, 20), Job((*text, 1, 2, 3), 10)]
        known = [known_of(backend, shape, job, CONTEXT) for job in jobs]
        outcomes = exact.run(session, jobs, drafter=drafter, scripts=known)
        for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
            exact.check(job, outcome, tokens, CONTEXT, f"turn {turn}")
        TALLY.add(backend, session, outcomes)
        if turn > 0 and not is_dynamic:
            assert outcomes[0].stats.reused_tokens >= answered - 1
            assert outcomes[1].stats.reused_tokens >= len(text) // 2
        if turn > 0:
            fresh = exact.run(
                session, [Job(text, 5, reuse=False)], drafter=drafter, scripts=[known[0]]
            )[0]
            assert fresh.stats.reused_tokens == 0
            assert fresh.tokens == outcomes[0].tokens[:5]
        answered = len(text) + len(outcomes[0].tokens)
        text = (*text, *outcomes[0].tokens, *prompt_of(turn, 7 + turn, shape.vocab))


def test_the_same_prompt_again_reuses_all_but_its_last_token(backend: _core.Backend) -> None:
    for length in (1, 2, 63, 64, 65, 66, 128, 129):
        job = Job(prompt_of(length, length, PLAIN_SHAPE.vocab), 12)
        _, outcomes = check_scripted(
            backend, PLAIN_SHAPE, [job, job, job], tally=TALLY, max_batch=1
        )
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
            check_scripted(
                backend,
                shape,
                jobs,
                max_batch=max_batch,
                prefill_chunk=100,
                tally=TALLY,
                seed=max_batch,
            )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_scores_do_not_depend_on_chunks_or_threads(backend: _core.Backend, shape: Shape) -> None:
    tokens = list(prompt_of(8, 200, shape.vocab))

    def score(threads: int, chunk: int) -> tuple[bytes, bytes]:
        logits = np.zeros((200, shape.vocab), np.float32)
        hidden = np.zeros((200, shape.hidden), np.float32)
        _core.score(model_for(shape, unit_of(backend), threads), tokens, chunk, logits, hidden)
        return logits.tobytes(), hidden.tobytes()

    want = score(1, 200)
    for threads, chunk in [(2, 200), (1, 1), (2, 1), (1, 7), (2, 64), (2, 65), (1, 199), (2, 3)]:
        assert score(threads, chunk) == want, f"{threads} threads, chunks of {chunk}"


# Ties, and token 0 everywhere.


@pytest.mark.parametrize("kind", ["scripted", "heads", "lookup", "dynamic"])
def test_all_logits_tied_and_token_0_everywhere(backend: _core.Backend, kind: str) -> None:
    """Every choice is id 0, as are prompts and guesses: every path is right, nothing is padding."""
    shape = SHAPES[2]
    model = build_model(shape, backend_for(unit_of(backend), 2), zero=True)
    tree = _core.TreeSpec.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 1]])
    drafter = {
        "scripted": lambda: ScriptedDrafter(4, 30, shape.vocab),
        "heads": lambda: _core.medusa_drafter(model, tree),
        "lookup": lambda: _core.prompt_lookup_drafter(max_nodes=9),
        "dynamic": lambda: exact.dynamic_drafter(np.random.default_rng(7), shape, model, 9),
    }[kind]()
    jobs = [Job((0,) * length, 30) for length in (1, 5, 64, 100)]
    session = _core.Session(model, drafter, max_batch=3)
    zeros = [[0] * 40] * len(jobs)
    scripted = drafter if isinstance(drafter, ScriptedDrafter) else None
    outcomes = exact.run(session, jobs, drafter=scripted, scripts=zeros)
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert exact.plain_tokens(model, job, CONTEXT)[:30] == [0] * 30
        assert outcome.tokens == [0] * 30
        assert outcome.stats.steps < 30
        if kind == "heads":  # after the first step, which has no hidden state to draft from
            assert outcome.stats.accepted_lengths[3] >= 9


@pytest.mark.parametrize("kind", ["plain", "scripted", "heads"])
def test_noise_belongs_to_the_position(backend: _core.Backend, kind: str) -> None:
    """With all logits tied, the token is that of the least word of Philox at its position."""
    shape = SHAPES[2]
    model = build_model(shape, backend_for(unit_of(backend), 2), zero=True)
    jobs, want = [], []
    for seed, sample, length in [
        (0, 0, 1),
        (2**64 - 1, 3, 30),
        (2**40, 1, 63),
        (5, 0, 64),
        (5, 2, 64),
    ]:
        sampling = (("temperature", 0.7), ("seed", seed), ("sample_index", sample))
        jobs.append(Job(prompt_of(1, length, shape.vocab), 40, sampling))
        positions = range(length, length + 40)
        want.append(
            [int(_core.ops.noise(seed, sample, p, shape.vocab).argmin()) for p in positions]
        )
    drafter: _core.Drafter | None = None
    if kind == "scripted":
        drafter = ScriptedDrafter(6, 50, shape.vocab)
    elif kind == "heads":
        drafter = _core.medusa_drafter(model, _core.TreeSpec.from_paths([[0], [1], [0, 0], [0, 1]]))
    session = _core.Session(model, drafter, max_batch=4)
    outcomes = exact.run(
        session, jobs, drafter=drafter if kind == "scripted" else None, scripts=want
    )
    assert [outcome.tokens for outcome in outcomes] == want
    if kind == "heads":  # ranked by the same noise, the token is first if it is among the 48
        assert np.mean([outcome.stats.steps for outcome in outcomes]) < 36


def test_the_cases_met_what_they_are_for(
    backend: _core.Backend, case_count: Callable[[int], int]
) -> None:
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
    share = case_count(1000) / 1000  # less than 1 on an emulated device
    missing = {
        what: (met[what], least)
        for what, least in wanted.items()
        if met[what] < least * min(1, share)
    }
    assert not missing, f"met too little (met, wanted): {missing}"
