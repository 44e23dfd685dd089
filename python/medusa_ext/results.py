"""What a request gives back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from medusa_ext import _core


@dataclass(frozen=True, slots=True)
class Stats:
    """How a text was made.

    Attributes:
        steps: passes over the model that emitted tokens.
        tokens_per_step: tokens emitted per step; 1 for plain decoding.
        accepted_lengths: [n]: steps that emitted n tokens; together they may be more than
            token_ids has, which ends with the token that completes a stop string.
        prefill_s: seconds from the start of the request's work to the end of its first step.
        decode_s: seconds from there to the end of the last step.
        decode_tokens_per_s: tokens after the first step, per second of decode_s; 0 if there are
            none.
        reused_tokens: tokens of the prompt whose keys and values were still in the cache.
    """

    steps: int
    tokens_per_step: float
    accepted_lengths: list[int]
    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One finished text.

    Attributes:
        text: the new text, without special tokens; ends before a stop string.
        token_ids: the new tokens; the last one is the end-of-sequence token or completes the stop
            string, if one of these ended the text.
        finish_reason: "stop" (end of sequence or stop string) or "length" (max_new_tokens or the
            context's end).
        prompt_tokens: length of the prompt in tokens.
        stats: how it was made.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    stats: Stats

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text that is being made.

    Attributes:
        text: final text that follows that of the pieces before; only the last piece's may be empty.
        result: the whole result with the last piece, else None.
    """

    text: str
    result: Result | None = None


def make_stats(stats: _core.RequestStats, first_tokens: int = 1) -> Stats:
    """Return the session's counts of a finished request with the rates that follow from them.

    Args:
        stats: of the request's last event.
        first_tokens: that the first step emitted.
    """
    lengths = list(stats.accepted_lengths)
    emitted = sum(length * count for length, count in enumerate(lengths))
    return Stats(
        steps=stats.steps,
        tokens_per_step=emitted / stats.steps if stats.steps else 0.0,
        accepted_lengths=lengths,
        prefill_s=stats.prefill_s,
        decode_s=stats.decode_s,
        decode_tokens_per_s=(
            (emitted - first_tokens) / stats.decode_s
            if stats.decode_s > 0 and emitted > first_tokens
            else 0.0
        ),
        reused_tokens=stats.reused_tokens,
    )
