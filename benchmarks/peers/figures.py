"""From runs to figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One answer of one contestant, or one prefill.

    Attributes:
        name: of the contestant.
        prompt: index; a round asks every contestant every prompt.
        round_index: from 0.
        category: of the prompt.
        tokens: the answer.
        marks: per pass that emitted tokens: seconds since the start, tokens so far.
    """

    name: str
    prompt: int
    round_index: int
    category: str
    tokens: tuple[int, ...]
    marks: tuple[tuple[float, int], ...]

    @property
    def prefill_s(self) -> float | None:
        """Seconds to the first token; None where nothing was emitted."""
        return self.marks[0][0] if self.marks else None

    @property
    def decoded(self) -> int:
        """Tokens after the pass that ended the prefill."""
        return self.marks[-1][1] - self.marks[0][1] if self.marks else 0

    @property
    def steps(self) -> int:
        """Passes after the prefill."""
        return max(0, len(self.marks) - 1)

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return self.marks[-1][0] - self.marks[0][0] if self.marks else 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per second after the prefill; None where there are none."""
        return self.decoded / self.decode_s if self.decoded and self.decode_s > 0 else None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` numbers."""

    median: float
    p25: float
    p75: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of those that are not None; None if there is none."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return None
        if len(known) == 1:
            return cls(known[0], known[0], known[0], 1)
        p25, median, p75 = statistics.quantiles(known, n=4, method="inclusive")
        return cls(median, p25, p75, len(known))


def of(runs: Iterable[Run], name: str) -> list[Run]:
    """The runs of one contestant."""
    return [run for run in runs if run.name == name]


def ratios(runs: Sequence[Run], name: str, other: str) -> Spread | None:
    """Rates of `name` over those of `other`, on the same prompt of the same round."""
    rates = {(run.round_index, run.prompt): run.rate for run in of(runs, other)}
    quotients = []
    for run in of(runs, name):
        rate = rates.get((run.round_index, run.prompt))
        if run.rate is not None and rate is not None:
            quotients.append(run.rate / rate)
    return Spread.of(quotients)


def tokens_per_step(runs: Sequence[Run]) -> float | None:
    """Tokens after the prefill per pass, all answers together; None where there are none."""
    steps = sum(run.steps for run in runs)
    return sum(run.decoded for run in runs) / steps if steps else None


@dataclass(frozen=True)
class Agreement:
    """How often answers are the same tokens, up to the end of the shorter one's text.

    Attributes:
        same: answers without a difference.
        count: answers compared.
        first: where those that differ do so first, in tokens from 0: the earliest and the median.
    """

    same: int
    count: int
    first: tuple[int, float] | None


def agreement(runs: Sequence[Run], name: str, other: str, eos_ids: Sequence[int] = ()) -> Agreement:
    """Compare answers to the same prompt of the same round.

    Args:
        runs: of both.
        name: one contestant.
        other: another.
        eos_ids: some engines end an answer with this token and others before it.
    """
    known = {(run.round_index, run.prompt): run.tokens for run in of(runs, other)}
    places: list[int | None] = []
    for run in of(runs, name):
        reference = known.get((run.round_index, run.prompt))
        if reference is not None:
            places.append(difference(run.tokens, reference, eos_ids))
    differing = [place for place in places if place is not None]
    first = (min(differing), statistics.median(differing)) if differing else None
    return Agreement(len(places) - len(differing), len(places), first)


def difference(a: Sequence[int], b: Sequence[int], eos_ids: Sequence[int] = ()) -> int | None:
    """Where two answers differ first, an end-of-sequence token at the end left aside; or None."""
    a, b = (answer[:-1] if answer and answer[-1] in eos_ids else answer for answer in (a, b))
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))
