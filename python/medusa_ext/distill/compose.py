"""How one record is made: its prompt, its answers, its seed; nothing but its number decides."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from medusa_ext.distill.dialogue import Dialogue
from medusa_ext.distill.prompts import Prompt, Prompts
from medusa_ext.options import integer, number, parse_options, shown
from medusa_ext.results import Result

if TYPE_CHECKING:
    from medusa_ext.engine import Engine

DEFAULT_GIVEN_TOKENS = 1024
DEFAULT_OWN_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the records, beside model and prompts. Options of the same name as `Options`.

    Attributes:
        seed: of the run; every record has its own from it.
        turns: answers of a record at most; None: one for each turn of a given prompt, one where
            the model writes its own.
        system: message for conversations without one; None: what the chat template says.
        max_new_tokens: of an answer.
        temperature: of answers, as top_k, top_p, min_p and repetition_penalty.
        prompt_temperature: of user turns that the model writes, as prompt_top_p.
        min_prompt_tokens: shorter user turns are left out.
        max_prompt_tokens: longer ones too; None: 128 where the model writes them, else 1024.
    """

    seed: int = 0
    turns: int | None = None
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    prompt_temperature: float = 1.0
    prompt_top_p: float = 1.0
    min_prompt_tokens: int = 1
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges; ValueError."""
        integer("seed", self.seed, 0, 2**64 - 1)
        if self.turns is not None:
            integer("turns", self.turns, 1)
        if self.system is not None and not isinstance(self.system, str):
            raise ValueError(f"system must be text, got {shown(self.system)}")
        integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        integer("min_prompt_tokens", self.min_prompt_tokens, 1)
        if self.max_prompt_tokens is not None:
            integer("max_prompt_tokens", self.max_prompt_tokens, self.min_prompt_tokens, 2**30)
        parse_options(self.answer_options(0), num_prompts=1, vocab_size=1)
        number("prompt_temperature", self.prompt_temperature, 1e-6, 1e6, or_zero=True)
        number("prompt_top_p", self.prompt_top_p, 0.0, 1.0, open_low=True)

    def answer_options(self, seed: int) -> dict[str, Any]:
        """Return the options of an answer's request."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {"seed": seed, **{name: getattr(self, name) for name in names}}

    def prompt_options(self, seed: int) -> dict[str, Any]:
        """Return the options of the request for a user turn; its noise is not the answer's."""
        return {
            "seed": seed ^ 1,
            "temperature": self.prompt_temperature,
            "top_p": self.prompt_top_p,
        }

    def prompt_limit(self, *, own: bool) -> int:
        """Return the tokens of a user turn at most."""
        if self.max_prompt_tokens is not None:
            return self.max_prompt_tokens
        return DEFAULT_OWN_TOKENS if own else DEFAULT_GIVEN_TOKENS


def seed_of(run_seed: int, record: int) -> int:
    """Return a record's seed: the upper 63 bits of SHA-256 of the text "<run seed>:<record>".

    63, so that it fits the signed 64-bit columns of data frames.
    """
    digest = hashlib.sha256(f"{run_seed}:{record}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def normalised(text: str) -> bytes:
    """Return what two prompts have in common that count as one: letters, not case or spaces."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Request:
    """A text that a record needs next.

    Attributes:
        tokens: ids of the prompt.
        options: as for `Engine.generate`.
    """

    tokens: list[int]
    options: dict[str, Any]


class LeftOut(str):
    """Why a number has no record: "empty", "too short", "too long" or "repeated"."""

    __slots__ = ()


Outcome: TypeAlias = dict[str, Any] | LeftOut
Making: TypeAlias = Generator[Request, Result, Outcome]


class Claims:
    """Which record a prompt belongs to: the first one, in the order of numbers, that has it."""

    def __init__(self) -> None:
        """Begin with none."""
        self._owners: dict[bytes, int] = {}
        self.lost: list[int] = []  # records whose prompt turned out to be an earlier one's

    def claim(self, text: str, number: int) -> bool:
        """Whether a record may have this prompt, as far as is known now."""
        key = normalised(text)
        owner = self._owners.get(key, number)
        if owner < number:
            return False
        if owner > number:
            self.lost.append(owner)
        self._owners[key] = number
        return True


class Composer:
    """Makes records of one engine, recipe and set of prompts."""

    def __init__(self, engine: Engine, recipe: Recipe, prompts: Prompts | None) -> None:
        """Check that they go together.

        Args:
            engine: that writes.
            recipe: what decides.
            prompts: None: the model writes its own.

        Raises:
            ValueError: the model has no chat template for what is asked, or too little context.
        """
        self._recipe = recipe
        self._prompts = prompts
        self._max_context = engine.max_context
        self._dialogue = Dialogue(engine.encoder, engine.tokenizer, engine.eos_token_id)
        self._max_prompt = recipe.prompt_limit(own=prompts is None)
        if not self._dialogue.has_template and (recipe.system is not None or recipe.turns):
            raise ValueError(
                "this model has no chat template, so that its data has no system message and one "
                "turn; leave system and turns out"
            )
        if recipe.max_new_tokens >= self._max_context:
            raise ValueError(
                f"max_new_tokens={recipe.max_new_tokens} leaves no room for a prompt in a context "
                f"of {self._max_context} tokens; lower it"
            )
        self.claims = Claims()
        if prompts is None:  # a template that refuses does so now
            self._dialogue.opening(self._messages(None), [])

    @property
    def count(self) -> int | None:
        """Numbers that there are; None: no end."""
        return None if self._prompts is None else len(self._prompts.items)

    def make(self, number: int, *, alone: bool = False) -> Making:
        """Make one record.

        Args:
            number: of the record, from 0.
            alone: whether no other record can have the same prompt.

        Yields:
            What to complete; send back the result.

        Returns:
            The record without its settings, or why there is none.
        """
        prompt = None if self._prompts is None else self._prompts.items[number]
        seed = seed_of(self._recipe.seed, number)
        messages = self._messages(prompt)
        ids: list[int] = []
        mask: list[int] = []
        for turn in range(self._num_turns(prompt)):
            said = (
                (yield from self._write_turn(messages, ids, seed))
                if prompt is None
                else self._checked(prompt.turns[turn])
            )
            if not isinstance(said, LeftOut):
                asked = [*messages, {"role": "user", "content": said}]
                tokens = self._dialogue.prompt(asked, ids)
                if len(tokens) + self._recipe.max_new_tokens > self._max_context:
                    said = LeftOut("too long")
                # Last: what is left out for another reason must not keep others from its prompt,
                # because a run that goes on from the file does not know of it.
                elif turn == 0 and not alone and not self._claim(said, number):
                    said = LeftOut("repeated")
            if isinstance(said, LeftOut):
                if turn == 0:
                    return said
                break  # the turns so far are a conversation too
            result = yield Request(tokens, self._recipe.answer_options(seed))
            mask += [0] * (len(tokens) - len(mask)) + [1] * len(result.token_ids)
            ids = [*tokens, *result.token_ids]
            messages = [*asked, {"role": "assistant", "content": result.text}]
        record: dict[str, Any] = {
            "record": number,
            "seed": seed,
            "input_ids": ids,
            "assistant_mask": mask,
            "messages": messages,
        }
        if prompt is not None and prompt.category is not None:
            record["category"] = prompt.category
        return record

    def _claim(self, text: str, number: int) -> bool:
        return self._prompts is not None or self.claims.claim(text, number)

    def _num_turns(self, prompt: Prompt | None) -> int:
        if not self._dialogue.has_template:
            return 1
        if prompt is None:
            return self._recipe.turns or 1
        return min(len(prompt.turns), self._recipe.turns or len(prompt.turns))

    def _messages(self, prompt: Prompt | None) -> list[dict[str, str]]:
        """Return the messages before the user's first."""
        system = prompt.system if prompt is not None and prompt.system else self._recipe.system
        if system is None or not self._dialogue.has_template:
            return []
        return [{"role": "system", "content": system}]

    def _write_turn(
        self, messages: list[dict[str, str]], ids: list[int], seed: int
    ) -> Generator[Request, Result, str | LeftOut]:
        """Have the model say what a user says."""
        tokens = self._dialogue.opening(messages, ids)
        if len(tokens) + self._max_prompt >= self._max_context:
            return LeftOut("too long")
        options = {
            **self._recipe.prompt_options(seed),
            "max_new_tokens": self._max_prompt,
            "eos_token_id": self._dialogue.stop_ids,
            "stop_strings": self._dialogue.stop_strings,
        }
        result = yield Request(tokens, options)
        # Raw text has no end; a user's turn that was cut short is none.
        if result.finish_reason == "length" and self._dialogue.has_template:
            return LeftOut("too long")
        return self._checked(result.text.strip())

    def _checked(self, text: str) -> str | LeftOut:
        if not text:
            return LeftOut("empty")
        length = self._dialogue.num_tokens(text)
        if length < self._recipe.min_prompt_tokens:
            return LeftOut("too short")
        return text if length <= self._max_prompt else LeftOut("too long")


def remake(
    engine: Engine, recipe: Recipe, prompts: Prompts | None, number: int
) -> dict[str, Any] | None:
    """Make one record again, alone.

    Args:
        engine: with the model of the run, on the same kind of device.
        recipe: of the run.
        prompts: of the run; None: the model writes its own.
        number: "record" of the line.

    Returns:
        The line without "settings", or None where this number has no record.

    Raises:
        ValueError: as `distill`, or there is no such prompt.
    """
    composer = Composer(engine, recipe, prompts)
    integer("number", number, 0, None if composer.count is None else composer.count - 1)
    making = composer.make(number, alone=True)
    try:
        request = next(making)
        while True:
            request = making.send(engine.generate(request.tokens, **request.options))
    except StopIteration as stop:
        outcome: Outcome = stop.value
    return None if isinstance(outcome, LeftOut) else outcome
