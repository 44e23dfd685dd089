"""From what the user passes as a prompt to token ids."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from jinja2 import TemplateError

from medusa_ext.detokenize import Transformers
from medusa_ext.options import shown

_ALLOWED = "a string, a list of token ids, a list of chat messages, or a list of these"


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


class PromptEncoder:
    """Turns strings, token ids and chat messages into token ids; any thread may use it."""

    def __init__(self, tokenizer: Transformers, chat_template: str | None, vocab_size: int) -> None:
        """Take what a loaded model brings.

        Args:
            tokenizer: a transformers tokenizer, or None: prompts are token ids only.
            chat_template: Jinja source, or None for a model without one.
            vocab_size: V; token ids lie in [0, V).
        """
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # transformers changes the tokenizer's state while it encodes

    @property
    def has_template(self) -> bool:
        """Whether messages can be prompts."""
        return self._tokenizer is not None and bool(self._chat_template)

    def encode_batch(
        self, prompt: object, max_tokens: int, *, generates: bool = True
    ) -> tuple[list[list[int]], bool]:
        """Return the token ids of every prompt, and whether the caller gave a batch.

        Args:
            prompt: one prompt or a list of prompts.
            max_tokens: that a prompt may have.
            generates: whether a new token must fit too, for the error of a prompt too long.

        Raises:
            ValueError: a prompt is empty, too long, or none of the allowed kinds.
        """
        if isinstance(prompt, Mapping):
            if "input_ids" in prompt:
                raise ValueError(
                    'the prompt is a mapping, as a tokenizer gives; pass its ["input_ids"]'
                )
            raise ValueError(
                f"a single message is no prompt; put it in a list: [{shown(dict(prompt))}]"
            )
        if hasattr(prompt, "__array__"):
            prompt = np.asarray(prompt)
        if not isinstance(prompt, str) and not _is_list(prompt):
            raise ValueError(f"the prompt must be {_ALLOWED}, got {type(prompt).__name__}")
        if len(prompt) == 0:
            raise ValueError(f"the prompt is empty; give {_ALLOWED}")
        if isinstance(prompt, str) or isinstance(prompt[0], int | np.integer | Mapping):
            return [self._checked(prompt, "the prompt", max_tokens, generates)], False
        return [
            self._checked(item, f"prompt {index} of the batch", max_tokens, generates)
            for index, item in enumerate(prompt)
        ], True

    def _checked(self, prompt: object, name: str, max_tokens: int, generates: bool) -> list[int]:
        ids = self._encode(prompt, name)
        if not ids:
            raise ValueError(f"{name} is empty; give at least one token")
        if len(ids) > max_tokens:
            room = (
                f"the context has room for {max_tokens} and one new token; shorten it, or raise"
                " max_context if the model's own is longer"
                if generates
                else f"the model's context has room for {max_tokens}; shorten it"
            )
            raise ValueError(f"{name} has {len(ids)} tokens, but {room}")
        return ids

    def _encode(self, prompt: object, name: str) -> list[int]:
        if isinstance(prompt, str):
            return self.encode_text(prompt) if prompt else []
        if _is_list(prompt) and len(prompt) and isinstance(prompt[0], Mapping):
            return self.encode_text(self.render(prompt), add_special_tokens=False)
        if not _is_list(prompt):
            raise ValueError(
                f"{name} must be a string, token ids or chat messages, got {shown(prompt)}"
            )
        ids = []
        for index, token in enumerate(prompt):
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise ValueError(f"{name}: token id {index} must be an integer, got {shown(token)}")
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"{name}: token id {index} is {token}, outside the vocabulary"
                    f" [0, {self._vocab_size})"
                )
            ids.append(int(token))
        return ids

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of raw text, by default with the tokenizer's special tokens."""
        if self._tokenizer is None:
            raise ValueError("this model came without a tokenizer; pass token ids")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                "the prompt is not valid Unicode (a lone surrogate, or input that is not UTF-8)"
            ) from None
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation up to where the answer begins.

        Raises:
            ValueError: a message lacks its role or content, the model has no chat template, or the
                template refuses.
        """
        for index, message in enumerate(messages):
            fields = (
                [message.get(key) for key in ("role", "content")]
                if isinstance(message, Mapping)
                else []
            )
            if not fields or not all(isinstance(field, str) for field in fields):
                raise ValueError(
                    f'message {index} must be {{"role": "user", "content": "..."}} with two'
                    f" strings, got {shown(message)}"
                )
        if not self.has_template:
            raise ValueError(
                "this model has no chat template; pass a string or token ids instead of messages"
            )
        try:
            with self._lock:
                text: str = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._chat_template,
                    add_generation_prompt=True,
                    tokenize=False,
                )
        except TemplateError as error:
            raise ValueError(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        return text
