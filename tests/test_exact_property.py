"""The central promise, on random models, heads, trees, batches, prompts, options and schedules.

The tokens are those of one-at-a-time decoding, whatever else happens.
"""

from collections.abc import Callable

import numpy as np
import pytest

import exact_util as exact
from exact_models import BLOCK_SHAPES, CONTEXT, SHAPES, Rng, Shape, model_for
from exact_util import Job, ScriptedDrafter, Tally
from medusa_ext import _core
from medusa_ext.trees import named_tree, tree_names
from util import unit_of

TALLY = Tally()


def random_jobs(
    rng: Rng, shape: Shape, isa: str, max_context: int, tight: bool = False
) -> list[Job]:
    """One request, a few, or more than any batch holds; some begin with another's text.

    tight: short ones that run to the context's end.
    """
    count = int(rng.choice([1, 2, 4, 7, 13, 17], p=[0.2, 0.2, 0.25, 0.15, 0.1, 0.1]))
    longest = min(40 if tight or count >= 10 else CONTEXT, max_context - 1)
    jobs: list[Job] = []
    for _ in range(count):
        prompt = exact.random_prompt(rng, shape.vocab, longest)
        if jobs and rng.random() < 0.4:
            other = jobs[int(rng.integers(len(jobs)))].prompt
            prompt = (
                *other[: int(rng.integers(1, len(other) + 1))],
                *prompt[: int(rng.integers(4))],
            )
            prompt = prompt[:longest]
        max_new = int(rng.integers(1, 48)) if count < 10 else int(rng.integers(1, 16))
        if tight or (max_context - len(prompt) < 60 and rng.random() < 0.5):
            max_new = 0
        job = Job(prompt, max_new, exact.random_sampling(rng), reuse=bool(rng.random() < 0.7))
        if rng.random() < 0.4:
            known = exact.known_tokens(shape, isa, job, max_context)
            eos = [int(rng.choice(known)), *rng.integers(0, shape.vocab, int(rng.integers(3)))]
            job = Job(
                job.prompt, job.max_new, job.sampling, tuple(int(id) for id in eos), job.reuse
            )
        jobs.append(job)
    return jobs


def random_drafter(
    rng: Rng, shape: Shape, model: _core.Model, tight: bool
) -> tuple[str, _core.Drafter | None]:
    kinds = (
        ["scripted"] * 4
        + ["lookup", "plain"]
        + ["heads", "heads", "dynamic", "named tree"] * (shape.heads > 0)
    )
    kind = str(rng.choice(kinds))
    max_nodes = int(rng.choice([2, 5, 16, 64, 100, 256][: 3 if tight else 6]))
    if kind == "scripted":
        return kind, ScriptedDrafter(int(rng.integers(2**32)), max_nodes, shape.vocab)
    if kind == "lookup":
        low = int(rng.integers(1, 3))
        drafter = _core.prompt_lookup_drafter(
            min_ngram=low,
            max_ngram=low + int(rng.integers(4)),
            max_nodes=max_nodes,
            max_depth=int(rng.integers(1, 30)),
            max_matches=int(rng.integers(1, 6)),
        )
        return kind, drafter
    if kind == "plain":
        return kind, None
    if kind == "dynamic":
        return kind, exact.dynamic_drafter(rng, shape, model, max_nodes)
    ranks = min(shape.head_vocab or shape.draft_vocab or shape.vocab, 50)
    if kind == "named tree":
        paths = named_tree(str(rng.choice(tree_names())), max_depth=shape.heads)
    else:
        paths = exact.random_paths(rng, max_nodes, int(rng.integers(1, shape.heads + 1)), ranks)
    tree = _core.TreeSpec.from_paths(paths)
    return kind, _core.medusa_drafter(model, tree)


def check_random_case(backend: _core.Backend, shape: Shape, case: int) -> None:
    isa = unit_of(backend)
    rng = np.random.default_rng([case, *shape.name.encode()])
    threads = int(rng.integers(1, 3))
    model = model_for(shape, isa, threads)
    tight = bool(
        rng.random() < 0.15
    )  # sequences that start with little and outgrow the cache together
    max_context = int(rng.choice([CONTEXT, CONTEXT, int(rng.integers(16, CONTEXT)), 64, 128]))
    if tight:
        max_context = int(rng.integers(130, 260))
    jobs = random_jobs(rng, shape, isa, max_context, tight)
    kind, drafter = random_drafter(rng, shape, model, tight)
    options = {
        "max_batch": int(rng.integers(1, 14)),
        "max_context": max_context,
        "cache_tokens": 0
        if not tight and rng.random() < 0.4
        else int(rng.integers(1, 2 * max_context)),
        "prefill_chunk": int(rng.choice([1, 2, 7, 64, int(rng.integers(1, 601)), 600])),
    }
    session = _core.Session(model, drafter, **options)
    known = [list(exact.known_tokens(shape, isa, job, max_context)) for job in jobs]
    scripted = drafter if isinstance(drafter, ScriptedDrafter) else None
    outcomes = exact.run(
        session,
        jobs,
        drafter=scripted,
        scripts=known,
        rng=rng if rng.random() < 0.6 else None,
        cancel_rate=float(rng.choice([0.0, 0.0, 0.05])),
    )
    what = f"case {case} of {shape.name} on {isa}: {kind}, {threads} threads, {options}"
    for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
        exact.check(job, outcome, tokens, max_context, what)
    TALLY.add(backend, session, outcomes)
    met = TALLY.of(backend)
    met[f"drafter {kind}"] += 1
    if kind == "dynamic":  # no path of the heads emits so many tokens
        met["lookup beyond the heads"] += sum(
            sum(outcome.stats.accepted_lengths[shape.heads + 2 :]) for outcome in outcomes
        )
    met.update(scripted.met if scripted else {})
    met["ends exactly at max_context"] += sum(
        len(job.prompt) + len(outcome.tokens) == max_context
        for job, outcome in zip(jobs, outcomes, strict=True)
    )


def skip_where_not_stored(backend: _core.Backend, shape: Shape) -> None:
    if shape.blocks and backend.name != "cpu":
        pytest.skip("this backend stores no weights in blocks")


@pytest.mark.parametrize("shape", [*SHAPES, *BLOCK_SHAPES], ids=lambda shape: shape.name)
def test_speculation_never_changes_the_tokens(
    backend: _core.Backend, shape: Shape, case_count: Callable[[int], int]
) -> None:
    skip_where_not_stored(backend, shape)
    for case in range(case_count(10 if shape.blocks else 30)):
        check_random_case(backend, shape, case)


@pytest.mark.parametrize("shape", [*SHAPES, *BLOCK_SHAPES], ids=lambda shape: shape.name)
def test_one_at_a_time_decoding_ends_where_it_should(backend: _core.Backend, shape: Shape) -> None:
    """The reference runs without end and is cut by Python; here a session cuts by itself."""
    skip_where_not_stored(backend, shape)
    isa = unit_of(backend)
    rng = np.random.default_rng(len(shape.name))
    model = model_for(shape, isa, 1)
    for job in random_jobs(rng, shape, isa, 128):
        session = _core.Session(model, None, max_batch=1, max_context=128)
        known = list(exact.known_tokens(shape, isa, job, 128))
        exact.check(job, exact.run(session, [job])[0], known, 128, "plain")


def test_every_shape_is_worth_testing(backend: _core.Backend) -> None:
    """Texts that differ from each other and in themselves; twins between which rounding chooses."""
    isa = unit_of(backend)
    for shape in [*SHAPES, *(BLOCK_SHAPES if backend.name == "cpu" else [])]:
        rng = np.random.default_rng(5)
        jobs = [Job(tuple(rng.integers(0, shape.vocab, 9).tolist()), 40) for _ in range(4)]
        texts = [exact.known_tokens(shape, isa, job, CONTEXT) for job in jobs]
        assert len(set(texts)) == len(texts)
        assert len(set(sum(texts, ()))) >= 16, f"{shape.name}: {texts}"
        logits = np.zeros((9, shape.vocab), np.float32)
        _core.score(model_for(shape, isa, 1), list(jobs[0].prompt), 64, logits, None)
        spread = logits.std()
        assert 0.3 < spread < 30
        if "tied" not in shape.name:
            twins = np.abs(logits[:, 0 : shape.vocab - 1 : 2] - logits[:, 1::2])
            assert twins.max() < 1e-4 * spread
            assert (twins > 0).mean() > 0.2, "no rounding to choose by"


def test_the_cases_met_what_they_are_for(
    backend: _core.Backend, case_count: Callable[[int], int]
) -> None:
    met = TALLY.of(backend)
    if not met["cases"]:
        pytest.skip("no random case was run")
    wanted = {
        "cases": 100,
        "accepted paths of depth 3 and more": 200,
        "compactions across a page border": 20,
        "set-backs": 5,
        "requests that reused tokens": 20,
        "eos inside an accepted path": 5,
        "limit inside a right path": 5,
        "ends exactly at max_context": 5,
        "finish stop": 50,
        "finish length": 50,
        "finish cancelled": 5,
        "drafter scripted": 20,
        "drafter heads": 10,
        "drafter dynamic": 5,
        "lookup beyond the heads": 10,
        "drafter named tree": 5,
        "drafter lookup": 5,
        "drafter plain": 5,
    }
    share = case_count(1000) / 1000  # less than 1 on an emulated device
    if share < 1:  # too few cases to count on one
        del wanted["lookup beyond the heads"]
    missing = {
        what: (met[what], least)
        for what, least in wanted.items()
        if met[what] < least * min(1, share)
    }
    assert not missing, f"met too little (met, wanted): {missing}"
