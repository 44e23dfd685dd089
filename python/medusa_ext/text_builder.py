"""One text in the making: tokens in, final text out, cut at a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from medusa_ext.detokenize import Detokenizer


class TextBuilder:
    """Takes tokens one by one, so that the text cannot depend on how many a step accepted.

    Text is given out when it is final: never half a character, never a part of what may become a
    stop string.
    """

    def __init__(self, detokenizer: Detokenizer, stop_strings: Iterable[str]) -> None:
        """Begin with no text."""
        self._detokenizer = detokenizer
        self._stop_strings = tuple(stop_strings)
        self._pending = ""  # decoded, but perhaps the beginning of a stop string
        self._given: list[str] = []
        self.token_ids: list[int] = []
        self.stopped = False  # a stop string ended the text

    @property
    def text(self) -> str:
        """All final text so far."""
        return "".join(self._given)

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens until one completes a stop string; return the text that became final."""
        given = []
        for token in tokens:
            if self.stopped:
                break
            self.token_ids.append(token)
            given.append(self._add(self._detokenizer.push(token)))
        return self._keep("".join(given))

    def finish(self) -> str:
        """Return the text still held back; no token follows."""
        if self.stopped:
            return ""
        last = self._add(self._detokenizer.finish())
        if not self.stopped:
            last += self._pending
        return self._keep(last)

    def _add(self, text: str) -> str:
        if not self._stop_strings:
            return text
        self._pending += text
        given = ""
        if text:
            starts = [self._pending.find(stop) for stop in self._stop_strings]
            found = [start for start in starts if start >= 0]
            self.stopped = bool(found)
            given = self._pending[
                : min(found) if found else len(self._pending) - self._held_length()
            ]
        self._pending = self._pending[len(given) :]
        return given

    def _held_length(self) -> int:
        """Return the length of the longest end of the pending text that begins a stop string."""
        longest = max(map(len, self._stop_strings)) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            end = self._pending[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0

    def _keep(self, text: str) -> str:
        if text:
            self._given.append(text)
        return text
