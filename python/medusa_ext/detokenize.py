"""Token ids to text, one token at a time, in time linear in the length of the text.

Each token's text is given out as soon as no later token can change it, and the pieces joined are
exactly what the tokenizer decodes from all tokens at once (special tokens left out). Two kinds of
tokenizer exist:

* Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2): a token is a string of bytes. Characters may be
  cut across tokens, so the bytes of an unfinished one are held back.
* SentencePiece (Llama 2, Mistral): a token is text, or one byte <0xE2>. A run of byte tokens is
  valid or replaced as a whole, so it is held back until a token of text ends it. The first token of
  a text loses its leading space.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

Transformers: TypeAlias = Any  # a transformers tokenizer, or None; that package is untyped
Backend: TypeAlias = Any  # tokenizers.Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """Turns the tokens of one text into pieces of that text."""

    def push(self, token: int) -> str:
        """Take one token; return the text that became final, often that of the token itself."""

    def finish(self) -> str:
        """Return what is still held back, now that no token follows."""


class DetokenizerFactory:
    """Makes a `Detokenizer` for each text of one tokenizer; holds the tables they share."""

    def __init__(self, tokenizer: Transformers) -> None:
        """Look at how the tokenizer decodes.

        Args:
            tokenizer: backed by the tokenizers library, or None: every text is empty.

        Raises:
            ValueError: a tokenizer of another kind.
        """
        self._backend: Backend = getattr(tokenizer, "backend_tokenizer", None)
        if tokenizer is None:
            return
        if self._backend is None:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} is not backed by the tokenizers library;"
                " the model needs a tokenizer.json"
            )
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        decoder = self._backend.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        stages = state.get("decoders", [state])
        self._byte_level = [stage.get("type") for stage in stages] == ["ByteLevel"]
        self._anchor = () if self._byte_level else self._find_anchor()

    def new(self) -> Detokenizer:
        """Return a detokenizer that has seen no token yet."""
        if self._backend is None:
            return _NoText()
        if self._byte_level:
            return _ByteLevel(self._backend, self._special)
        return _Pieces(self._backend, self._special, self._anchor)

    def _find_anchor(self) -> tuple[int, ...]:
        """Return a token of visible text, to decode what stands in the middle of a text."""
        for word in ("a", "0", "."):
            token = self._backend.token_to_id(word)
            if token is not None and self._backend.decode([token]) == word:
                return (token,)
        return ()


class _NoText:
    """For a model without a tokenizer: token ids go in and out."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class _ByteLevel:
    """The bytes of the tokens through an incremental UTF-8 decoder."""

    def __init__(self, backend: Backend, special: frozenset[int]) -> None:
        self._backend = backend
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        return self._utf8.decode(token_bytes(self._backend.id_to_token(token) or ""))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _Pieces:
    """Pieces decoded behind an anchor token, so that none is taken for the start of a text."""

    def __init__(self, backend: Backend, special: frozenset[int], anchor: Sequence[int]) -> None:
        self._backend = backend
        self._special = special
        self._anchor = list(anchor)
        self._anchor_length = len(backend.decode(self._anchor)) if anchor else 0
        self._held: list[int] = []
        self._at_start = True

    def push(self, token: int) -> str:
        name = None if token in self._special else self._backend.id_to_token(token)
        if name is None:  # special, or beyond the tokenizer's vocabulary: no text
            return ""
        self._held.append(token)
        return "" if _BYTE_TOKEN.fullmatch(name) else self._flush()

    def finish(self) -> str:
        return self._flush() if self._held else ""

    def _flush(self) -> str:
        if self._at_start:
            text: str = self._backend.decode(self._held)
        else:
            text = self._backend.decode(self._anchor + self._held)[self._anchor_length :]
        self._at_start = False
        self._held = []
        return text


@lru_cache(maxsize=1 << 16)
def token_bytes(name: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for.

    Args:
        name: the token as the vocabulary spells it, one printable character per byte; a name with
            any other character (an added token) stands for its own UTF-8.
    """
    table = _byte_table()
    if all(character in table for character in name):
        return bytes(table[character] for character in name)
    return name.encode()


@lru_cache(maxsize=1)
def _byte_table() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
