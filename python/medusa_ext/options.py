"""The options of a request: names, defaults, allowed values, and the errors of everything else."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from medusa_ext import _core

DEFAULT_MAX_NEW_TOKENS = 256
DTYPES = ("auto", "bf16", "f16", "f32")
WEIGHTS = ("auto", "q8", "q4", "bf16", "f16", "f32")

# What users of other engines type, where the nearest spelling would not find it.
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "do_sample": "temperature",
    "stop": "stop_strings",
    "n": "num_return_sequences",
    "stop_token_ids": "eos_token_id",
    "repeat_penalty": "repetition_penalty",
    "typical_p": "acceptance",
}


class GenerateOptions(TypedDict, total=False):
    """Keyword options of `generate`, `stream` and chat turns, named as in transformers."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int] | np.ndarray
    stop_strings: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | np.ndarray | None
    num_return_sequences: int
    acceptance: str
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options of one call.

    Attributes:
        max_new_tokens: tokens at most, end-of-sequence included; None: up to the end of the
            context.
        temperature: 0 takes the likeliest token; else in [1e-6, 1e6].
        top_k: keep the k likeliest ids; 0: all.
        top_p: in (0, 1]; keep the likeliest ids up to this mass.
        min_p: in [0, 1]; keep ids at least this likely, relative to the likeliest.
        repetition_penalty: in [1e-3, 1e3]; above 1 makes tokens of the text so far less likely.
        seed: one number for every prompt, or one per prompt (a list or an array).
        stop_strings: the text ends before the first of these.
        eos_token_id: ids that end the text, one or several (a list or an array); [] for none, so
            that only the length ends it; None: the model's own.
        num_return_sequences: samples per prompt, at most 65536; more than one need a temperature.
        acceptance: "exact", or "typical" (faster, changes the output).
        epsilon: of typical acceptance, in [0, 1].
        delta: of typical acceptance, >= 0.
    """

    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | tuple[int, ...] = 0
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] | None = None
    num_return_sequences: int = 1
    acceptance: str = "exact"
    epsilon: float = 0.09
    delta: float = 0.3

    def sampling(self, prompt_index: int, sample_index: int) -> _core.SamplingParams:
        """Return the parameters of one sample of one prompt."""
        return _core.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed if isinstance(self.seed, int) else self.seed[prompt_index],
            sample_index=sample_index,
            acceptance=self.acceptance,
            epsilon=self.epsilon,
            delta=self.delta,
        )


def parse_options(given: Mapping[str, Any], *, num_prompts: int, vocab_size: int) -> Options:
    """Check the options of one call.

    Args:
        given: option names and values as the user typed them.
        num_prompts: length of the batch, which a list of seeds must have.
        vocab_size: V; end-of-sequence ids lie below it.

    Raises:
        TypeError: an option does not exist.
        ValueError: a value is of the wrong type or outside its range.
    """
    names = list(GenerateOptions.__annotations__)
    for name in given:
        if name not in names:
            near = _OTHER_NAMES.get(name) or next(
                iter(difflib.get_close_matches(name, names, n=1)), None
            )
            hint = f"did you mean {near!r}?" if near else f"options are {', '.join(names)}"
            raise TypeError(f"unknown option {name!r}; {hint}")

    values: dict[str, Any] = {}
    for name, value in given.items():
        match name:
            case "max_new_tokens":
                values[name] = None if value is None else integer(name, value, 1, 2**31 - 1)
            case "temperature":
                values[name] = number(name, value, 1e-6, 1e6, or_zero=True)
            case "top_k":
                values[name] = integer(name, value, 0, 2**31 - 1)
            case "top_p":
                values[name] = number(name, value, 0.0, 1.0, open_low=True)
            case "repetition_penalty":
                values[name] = number(name, value, 1e-3, 1e3)
            case "min_p" | "epsilon":
                values[name] = number(name, value, 0.0, 1.0)
            case "delta":
                values[name] = number(name, value, 0.0, 3.0e38)
            case "seed":
                values[name] = _seed(value, num_prompts)
            case "stop_strings":
                values[name] = _stop_strings(value)
            case "eos_token_id":
                values[name] = _eos(value, vocab_size)
            case "num_return_sequences":
                values[name] = integer(name, value, 1, 65536)
            case "acceptance":
                values[name] = choice(name, value, ("exact", "typical"))
    options = Options(**values)
    draws = options.temperature > 0 and options.acceptance == "exact"
    if options.num_return_sequences > 1 and not draws:
        raise ValueError(
            f"num_return_sequences={options.num_return_sequences} needs a temperature above 0 and"
            ' acceptance="exact": otherwise all samples of a prompt are the same'
        )
    if options.acceptance == "typical":
        defaults = Options()
        filters = [
            name
            for name in ("top_k", "top_p", "min_p")
            if getattr(options, name) != getattr(defaults, name)
        ]
        if filters:
            raise ValueError(
                f'{filters[0]} does not go with acceptance="typical", which draws no random number;'
                ' leave it out or use acceptance="exact"'
            )
    return options


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int in [low, high]; ValueError names it otherwise."""
    try:
        result = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        result = None
    too_large = high is not None and result is not None and result > high
    if result is None or result < low or too_large:
        # A bound so large is no news to whoever gave something else.
        is_range = high is not None and (too_large or high < 2**31 - 1)
        allowed = f"in [{low}, {high}]" if is_range else f"of {low} or more"
        raise ValueError(f"{name} must be an integer {allowed}, got {shown(value)}")
    return result


def number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    or_zero: bool = False,
) -> float:
    """Return `value` as a float in [low, high] or (low, high], or 0; ValueError names it else."""
    span = f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    span = span if high < 1e38 else f"of {low:g} or more"
    allowed = f"{'0 or ' if or_zero else ''}a number {span}"
    try:
        is_other = isinstance(value, bool | str | bytes)
        result = math.nan if is_other else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if or_zero and result == 0:
        return 0.0
    if not low <= result <= high or (open_low and result == low):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return result


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of the allowed strings; ValueError lists them otherwise."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}")
    return value


def plain(value: object) -> object:
    """Return a NumPy array or number as plain lists and numbers; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def shown(value: object, limit: int = 60) -> str:
    """Return `value` as an error message shows it: one line, cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _seed(value: object, num_prompts: int) -> int | tuple[int, ...]:
    value = plain(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return integer("seed", value, 0, 2**64 - 1)
    seeds = tuple(integer(f"seed[{index}]", seed, 0, 2**64 - 1) for index, seed in enumerate(value))
    if len(seeds) != num_prompts:
        raise ValueError(
            f"seed has {len(seeds)} numbers for {num_prompts} prompts;"
            " give one number or one per prompt"
        )
    return seeds


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(
        isinstance(string, str) and string for string in strings
    ):
        raise ValueError(
            f"stop_strings must be a non-empty string or a list of them, got {shown(value)}"
        )
    return tuple(strings)


def _eos(value: object, vocab_size: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    value = plain(value)
    ids = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(integer("eos_token_id", token, 0, vocab_size - 1) for token in ids)
