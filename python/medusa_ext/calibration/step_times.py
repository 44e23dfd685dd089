"""Decoding one text at a time with trees of several sizes, and what a step of each takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from medusa_ext import _core
from medusa_ext.calibration.file import Calibration

WARM_UP_TOKENS = 16
PREFILL_CHUNK = 128


class Decoders:
    """A session for each number of nodes, over one model."""

    def __init__(
        self,
        model: _core.Model,
        calibration: Calibration,
        nodes: Sequence[int],
        context: int,
        kind: str,
    ) -> None:
        """Open the sessions.

        Args:
            model: with heads.
            calibration: of the heads.
            nodes: of the trees, the root counted; 1 is plain decoding.
            context: tokens of prompt and output together.
            kind: of trees.
        """
        self.sessions = {}
        for count in nodes:
            drafter = calibration.drafter(model, count, kind) if count > 1 else None
            self.sessions[count] = _core.Session(
                model, drafter, max_batch=1, max_context=context, prefill_chunk=PREFILL_CHUNK
            )

    def decode(
        self, nodes: int, tokens: list[int], max_new_tokens: int, eos_ids: Sequence[int] = ()
    ) -> tuple[list[int], _core.RequestStats]:
        """Complete a prompt greedily with one of the trees."""
        session = self.sessions[nodes]
        session.submit(tokens, max_new_tokens=max_new_tokens, eos_ids=eos_ids, reuse_prefix=False)
        made: list[int] = []
        while True:
            for event in session.step():
                made += event.tokens
                if event.finish is not None:
                    return made, event.stats

    def step_times(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        done: Callable[[], None] = lambda: None,
    ) -> dict[int, float]:
        """Seconds of a step by number of nodes: the median over prompts.

        The sizes take turns, prompt by prompt, so that a machine that changes its pace changes it
        for all of them.
        """
        seconds: dict[int, list[float]] = {count: [] for count in self.sessions}
        for count in self.sessions:
            self.decode(count, prompts[0], WARM_UP_TOKENS)
        for prompt in prompts:
            for count, found in seconds.items():
                stats = self.decode(count, prompt, max_new_tokens)[1]
                if stats.steps > 1:
                    found.append(stats.decode_s / (stats.steps - 1))
                done()
        return {count: statistics.median(found) for count, found in seconds.items() if found}


def answer(
    session: _core.Session,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    done: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Complete prompts greedily, side by side; the answers stand in their order."""
    made: dict[int, list[int]] = {}
    for prompt in prompts:
        request = session.submit(prompt, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
        made[request] = []
    while not session.idle:
        for event in session.step():
            made[event.request] += event.tokens
            if event.finish is not None:
                done()
    return list(made.values())
