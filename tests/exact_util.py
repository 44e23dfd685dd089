"""Requests, a drafter that knows the answer, and the one-at-a-time decoding that all must equal."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from exact_models import CONTEXT, Rng, Shape, model_for
from medusa_ext import _core
from medusa_ext.calibration.guesses import NGRAM, Weights, compiled
from medusa_ext.distill.records import Record
from medusa_ext.loading.ngrams import count_ngrams
from util import unit_of

SPARE = 16  # tokens that the drafter knows beyond the end of a request

# Requests.


@dataclass(frozen=True)
class Job:
    """One request. sampling: keyword arguments of SamplingParams, as pairs."""

    prompt: tuple[int, ...]
    max_new: int = 0
    sampling: tuple[tuple[str, Any], ...] = ()
    eos: tuple[int, ...] = ()
    reuse: bool = True

    def submit(self, session: _core.Session) -> int:
        return session.submit(
            self.prompt,
            max_new_tokens=self.max_new,
            sampling=_core.SamplingParams(**dict(self.sampling)),
            eos_ids=self.eos,
            reuse_prefix=self.reuse,
        )

    def limit(self, max_context: int) -> int:
        """Tokens that it may emit."""
        room = max_context - len(self.prompt)
        return min(self.max_new or room, room)


@dataclass
class Outcome:
    """What a session answered."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    stats: _core.RequestStats | None = None


def plain_tokens(model: _core.Model, job: Job, max_context: int) -> list[int]:
    """One token a step, alone, whole prompt at once, no end of sequence, SPARE tokens too many."""
    room = json.loads(model.config)["max_context"] - len(job.prompt)
    count = min(job.limit(max_context) + SPARE, room)
    session = _core.Session(model, None, max_batch=1, prefill_chunk=512)
    alone = dataclasses.replace(job, max_new=count, eos=(), reuse=False)
    outcome = run(session, [alone])[0]
    assert len(outcome.tokens) == count
    assert outcome.finish == "length"
    return outcome.tokens


def cut(tokens: list[int], job: Job, max_context: int) -> tuple[list[int], str]:
    """The answer within a longer one: up to the first end-of-sequence token or the limit."""
    kept = tokens[: job.limit(max_context)]
    ends = [i for i, token in enumerate(kept) if token in job.eos]
    return (kept[: ends[0] + 1], "stop") if ends else (kept, "length")


@cache
def known_tokens(shape: Shape, unit: str, job: Job, max_context: int) -> tuple[int, ...]:
    """plain_tokens on one thread, computed once for each job."""
    return tuple(plain_tokens(model_for(shape, unit, 1), job, max_context))


def run(
    session: _core.Session,
    jobs: list[Job],
    *,
    drafter: "ScriptedDrafter | None" = None,
    scripts: list[list[int]] | None = None,
    rng: Rng | None = None,
    cancel_rate: float = 0.0,
) -> list[Outcome]:
    """Every job to its end.

    Args:
        session: an idle one.
        jobs: requests, submitted in this order.
        drafter: the session's, if it needs scripts.
        scripts: what follows each job's prompt.
        rng: if given, jobs arrive and are cancelled at random between steps; else all arrive first.
        cancel_rate: probability of a cancellation, each step.
    """
    outcomes = [Outcome() for _ in jobs]
    owner: dict[int, int] = {}
    submitted = 0
    while submitted < len(jobs) or not session.idle:
        arriving = len(jobs) if rng is None else int(rng.choice([0, 0, 1, 1, 2, 5, 20]))
        for index in range(submitted, min(submitted + arriving, len(jobs))):
            request = jobs[index].submit(session)
            assert request not in owner
            owner[request] = index
            submitted += 1
            if drafter and scripts:
                drafter.scripts[request] = [*jobs[index].prompt, *scripts[index]]
        if rng is not None and owner and rng.random() < cancel_rate:
            request = int(rng.choice(list(owner)))
            assert session.cancel(request) == (outcomes[owner[request]].finish is None)
        take_events(session.step(), owner, outcomes, drafter)
    check_empty(session)
    return outcomes


def take_events(
    events: list[_core.Event],
    owner: dict[int, int],
    outcomes: list[Outcome],
    drafter: "ScriptedDrafter | None" = None,
) -> None:
    """Events of a step into the outcomes of their jobs."""
    for event in events:
        outcome = outcomes[owner[event.request]]
        assert outcome.finish is None, "an event after the last one"
        assert event.tokens or event.finish == "cancelled"
        outcome.tokens += event.tokens
        if event.finish is None:
            continue
        outcome.finish, outcome.stats = event.finish, event.stats
        lengths = event.stats.accepted_lengths
        assert sum(n * count for n, count in enumerate(lengths)) == len(outcome.tokens)
        assert sum(lengths) == event.stats.steps
        if drafter:
            drafter.ended(event)


def check_empty(session: _core.Session) -> None:
    """Nothing runs, and only pages kept for reuse are taken."""
    stats = session.stats()
    assert (stats.active, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert 0 <= stats.pages_cached <= stats.pages_total


def check(job: Job, outcome: Outcome, known: list[int], max_context: int, what: str) -> None:
    """The outcome is what one-at-a-time decoding says; a cancelled one is the beginning of it."""
    want, finish = cut(known, job, max_context)
    got = outcome.tokens
    if outcome.finish == "cancelled":
        want, finish = want[: len(got)], "cancelled"
    if got != want:
        at = 0
        while got[at : at + 1] == want[at : at + 1]:
            at += 1
        raise AssertionError(
            f"{what}: {len(got)} tokens, wanted {len(want)}; the first difference is at {at} after "
            f"a prompt of {len(job.prompt)}: {got[at:][:5]}, wanted {want[at:][:5]}; {job}"
        )
    assert outcome.finish == finish, f"{what}: finish {outcome.finish}, wanted {finish}; {job}"


# Drafters.


class ScriptedDrafter(_core.Drafter):
    """Knows each request's continuation and hides it in random trees.

    Right nodes end at a random depth and stand anywhere among wrong siblings, doubles, tokens
    outside the vocabulary and paths deeper than allowed.
    """

    def __init__(self, seed: int, max_nodes: int, vocab: int) -> None:
        super().__init__()
        self.scripts: dict[int, list[int]] = {}
        self.met: Counter[str] = Counter()
        self._rng = np.random.default_rng(seed)
        self._max_nodes, self._vocab = max_nodes, vocab
        self._right_depth: dict[int, int] = {}  # of the last tree: how far it follows the script
        self._max_depth: dict[int, int] = {}

    @property
    def max_nodes(self) -> int:
        return self._max_nodes

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        return [self._tree(each) for each in inputs]

    def _tree(self, each: _core.DraftInput) -> tuple[list[int], list[int]]:
        rng = self._rng
        script, length = self.scripts[each.request], len(each.tokens)
        self._max_depth[each.request] = each.max_depth
        self._right_depth[each.request] = 0
        num_nodes = each.max_nodes
        if rng.random() < 0.8:
            num_nodes = int(rng.integers(1, each.max_nodes + 1))
        skill = rng.choice([0.0, 0.3, 0.6, 0.9])
        right_limit = int(rng.integers(0, 12))
        tokens: list[int] = []
        parents: list[int] = []
        depth, is_right = [0], [True]
        tip = 0  # deepest right node
        while len(tokens) < num_nodes - 1:
            pick = rng.random()
            parent = int(rng.integers(len(depth)))
            if pick < skill + 0.05:
                parent = tip if pick < skill else len(tokens)
            at = length + depth[parent]
            right = script[at] if at < len(script) else 0
            if parent == tip and depth[tip] < right_limit and rng.random() < 0.7:
                token = right
            else:
                others = [int(rng.integers(self._vocab)), right ^ 1, 0, self._vocab, 2**31 - 1]
                token = others[int(rng.choice(len(others), p=[0.8, 0.1, 0.06, 0.02, 0.02]))]
            tokens.append(token)
            parents.append(parent)
            depth.append(depth[parent] + 1)
            is_right.append(is_right[parent] and at < len(script) and token == right)
            if is_right[-1] and depth[-1] > depth[tip]:
                tip = len(tokens)
        self._right_depth[each.request] = depth[tip]
        return tokens, parents

    def ended(self, event: _core.Event) -> None:
        """Counts ends that fell inside a path which would have been accepted further."""
        count, right = len(event.tokens), self._right_depth.get(event.request, 0)
        usable = min(right, self._max_depth.get(event.request, 0))
        if event.finish == "stop" and 2 <= count < usable:
            self.met["eos inside an accepted path"] += 1
        if event.finish == "length" and 2 <= count <= right:
            self.met["limit inside a right path"] += 1


def dynamic_drafter(
    rng: np.random.Generator, shape: Shape, model: _core.Model, max_nodes: int
) -> _core.Drafter:
    """Trees that each step grows, by weights and n-grams that nobody fitted."""
    with_lookup = bool(rng.random() < 0.8)
    weights = Weights(
        rng.normal(0.5, 0.3, (shape.heads, 3)).tolist(),
        rng.uniform(0, 8, (shape.heads, NGRAM if with_lookup else 0)).tolist(),
        rng.uniform(0.6, 1, NGRAM).tolist() if with_lookup else [],
    )
    ngrams = None
    if rng.random() < 0.7:
        ids = rng.integers(0, shape.vocab, 40).astype(np.int32)
        records = [Record(np.tile(ids, 4), np.ones(160, np.bool_))]
        ngrams = compiled(count_ngrams(records, shape.vocab))
    return _core.dynamic_drafter(model, weights.model(ngrams), max_nodes)


def random_paths(rng: Rng, num_nodes: int, max_depth: int, max_ranks: int) -> list[list[int]]:
    """Paths of a random valid tree, at most num_nodes with the root."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(8 * num_nodes):
        parent = paths[int(rng.integers(len(paths)))]
        path = (*parent, int(rng.integers(max_ranks)))
        if len(path) <= max_depth and path not in paths and len(paths) < num_nodes:
            paths.append(path)
    return [list(path) for path in paths[1:]]


# Random requests.


def random_sampling(rng: Rng) -> tuple[tuple[str, Any], ...]:
    """Greedy or seeded, with any of the filters."""
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["repetition_penalty"] = float(rng.choice([0.8, 1.1, 1.5]))
    if rng.random() < 0.5:
        return tuple(options.items())
    options["temperature"] = float(rng.choice([0.05, 0.4, 0.8, 1.0, 1.7]))
    seeds = [0, 1, int(rng.integers(2**63)), 2**64 - 1]
    options["seed"] = seeds[int(rng.integers(len(seeds)))]
    options["sample_index"] = int(rng.integers(3))
    if rng.random() < 0.4:
        options["top_k"] = int(rng.choice([1, 2, 5, 31, 1000]))
    if rng.random() < 0.4:
        options["top_p"] = float(rng.choice([1e-6, 0.3, 0.8, 0.95]))
    if rng.random() < 0.4:
        options["min_p"] = float(rng.choice([0.01, 0.1, 0.5]))
    return tuple(options.items())


def random_prompt(rng: Rng, vocab: int, max_length: int) -> tuple[int, ...]:
    """Any text, a repeated phrase, or token 0 everywhere; often about as long as a page."""
    lengths = [1, 2, 63, 64, 65, 128, 129, *rng.integers(1, 301, 4), *rng.integers(1, 30, 4)]
    length = min(int(rng.choice(lengths)), max_length)
    kind = rng.random()
    if kind < 0.1:
        return (0,) * length
    text = rng.integers(0, vocab, length)
    if kind < 0.4:
        text = np.resize(text[: int(rng.integers(2, 12))], length)
    return tuple(int(token) for token in text)


class Tally:
    """Counts what the cases of a module met, for each instruction set."""

    def __init__(self) -> None:
        self._met: dict[str, Counter[str]] = {}

    def of(self, backend: _core.Backend) -> Counter[str]:
        return self._met.setdefault(unit_of(backend), Counter())

    def add(self, backend: _core.Backend, session: _core.Session, outcomes: list[Outcome]) -> None:
        """The statistics of a session whose requests are over."""
        met = self.of(backend)
        stats = session.stats()
        met["cases"] += 1
        met["set-backs"] += stats.set_backs
        met["compactions across a page border"] += stats.compactions_across_pages
        for outcome in outcomes:
            lengths = outcome.stats.accepted_lengths
            met["requests"] += 1
            met["tokens"] += len(outcome.tokens)
            met["steps"] += sum(lengths)
            met["accepted paths of depth 3 and more"] += sum(lengths[4:])
            met["requests that reused tokens"] += outcome.stats.reused_tokens > 0
            met["distinct tokens"] += len(set(outcome.tokens))
            met[f"finish {outcome.finish}"] += 1


def prompt_of(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    """A random prompt."""
    return tuple(np.random.default_rng(seed).integers(0, vocab, length).tolist())


def known_of(backend: _core.Backend, shape: Shape, job: Job, max_context: int) -> list[int]:
    """known_tokens for a backend's instruction set."""
    return list(known_tokens(shape, unit_of(backend), job, max_context))


def check_scripted(
    backend: _core.Backend,
    shape: Shape,
    jobs: list[Job],
    *,
    max_context: int = CONTEXT,
    max_nodes: int = 64,
    seed: int = 0,
    tally: "Tally | None" = None,
    **options: int,
) -> tuple[_core.Session, list[Outcome]]:
    """Jobs through one session with the drafter that knows, checked; its statistics go to tally."""
    known = [known_of(backend, shape, job, max_context) for job in jobs]
    model = model_for(shape, unit_of(backend), 2)
    drafter = ScriptedDrafter(seed, max_nodes, shape.vocab)
    session = _core.Session(model, drafter, max_context=max_context, **options)
    outcomes = run(session, jobs, drafter=drafter, scripts=known)
    for job, outcome, tokens in zip(jobs, outcomes, known, strict=True):
        check(job, outcome, tokens, max_context, f"{shape.name}, {options}")
    if tally:
        tally.add(backend, session, outcomes)
        tally.of(backend).update(drafter.met)
    return session, outcomes
