"""Token ids of a conversation, in which what the model wrote stays as it wrote it.

A chat template renders text, and text encoded again may give other tokens than those the model
chose. So the template is only asked for what stands between the messages: it renders the
conversation with a marker in place of a message, and is cut there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medusa_ext.detokenize import Transformers
from medusa_ext.prompts import PromptEncoder

_MARK = "QXZ7marker7ZXQ"

Messages = Sequence[Mapping[str, Any]]


class Dialogue:
    """Puts a model's own tokens between messages; without a chat template there is one turn."""

    def __init__(
        self, encoder: PromptEncoder, tokenizer: Transformers, eos_ids: Sequence[int]
    ) -> None:
        """Look at the chat template.

        Args:
            encoder: of the engine.
            tokenizer: of transformers.
            eos_ids: that end the model's texts.

        Raises:
            ValueError: there is no tokenizer, or the template does not repeat what a user says.
        """
        if tokenizer is None:
            raise ValueError("this model came without a tokenizer, and data needs its text")
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self.has_template = encoder.has_template
        # What ends a user's turn that the model writes.
        self.stop_ids = tuple(eos_ids)
        self.stop_strings: tuple[str, ...] = ()
        if self.has_template:
            self._find_stop()

    def prompt(self, messages: Messages, ids: Sequence[int]) -> list[int]:
        """Return the ids up to where the answer to the last message begins.

        Args:
            messages: the conversation; the last message is a user's.
            ids: of the conversation up to the end of the last answer; none yet: [].
        """
        if not self.has_template:
            return self._encoder.encode_text(messages[-1]["content"])
        return self._after_answer(self._encoder.render(_marked(messages)), ids)

    def opening(self, messages: Messages, ids: Sequence[int]) -> list[int]:
        """Return the ids up to where the user speaks next; arguments as of `prompt`."""
        if not self.has_template:
            return self._start()
        user = {"role": "user", "content": _MARK}
        text = self._encoder.render([*_marked(messages), user])
        # A space before the user's text belongs to its first token.
        return self._after_answer(_cut(text, last=True)[0].rstrip(" "), ids)

    def num_tokens(self, text: str) -> int:
        """Return how many tokens a user's text is."""
        return len(self._encoder.encode_text(text, add_special_tokens=False))

    def _after_answer(self, text: str, ids: Sequence[int]) -> list[int]:
        """Return `ids`, then those of the rendered text behind the last answer's marker."""
        if not ids:
            return self._encoder.encode_text(text, add_special_tokens=False)
        added = self._encoder.encode_text(_cut(text)[1], add_special_tokens=False)
        if ids[-1] in self._eos_ids and added[:1] == [ids[-1]]:
            added = added[1:]  # the model ended its turn itself
        return [*ids, *added]

    def _find_stop(self) -> None:
        """Find what follows a user's text: a token of its own, else a text."""
        follows = _cut(self._encoder.render([{"role": "user", "content": _MARK}]))[1]
        ids = self._encoder.encode_text(follows, add_special_tokens=False)
        if ids and ids[0] in self._tokenizer.added_tokens_decoder:
            self.stop_ids = tuple(dict.fromkeys((*self.stop_ids, ids[0])))
        elif follows.strip():
            self.stop_strings = (follows.strip(),)

    def _start(self) -> list[int]:
        """Return the token that a text begins with."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, *self._eos_ids):
            if token is not None:
                return [int(token)]
        raise ValueError("the tokenizer names no token that begins a text; give prompts")


def _marked(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with a marker in place of the last answer."""
    marked = [dict(message) for message in messages]
    for message in reversed(marked):
        if message["role"] == "assistant":
            message["content"] = _MARK
            break
    return marked


def _cut(text: str, *, last: bool = False) -> tuple[str, str]:
    """Return what stands before and after the first or the last marker."""
    if _MARK not in text:
        raise ValueError(
            "the model's chat template leaves out messages, so that no conversation can be built "
            "with it; use one turn and give prompts"
        )
    before, _, after = text.rpartition(_MARK) if last else text.partition(_MARK)
    return before, after
