"""A conversation that keeps its messages; the cache keeps its keys and values between turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from medusa_ext.results import Piece, Result

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from medusa_ext.answers import Stream
    from medusa_ext.engine import Engine
    from medusa_ext.options import GenerateOptions


class Chat:
    """A conversation. `engine.chat()` makes one; not for use by several threads at once.

    A turn gives exactly what `engine.generate(messages)` gives. It is only sooner: the engine takes
    keys and values of the longest common beginning from its cache, so that earlier turns are not
    computed again.

    Attributes:
        messages: the conversation so far, as dictionaries with "role" and "content"; may be changed
            between turns.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        """Begin a conversation.

        Args:
            engine: that answers.
            system: the system message; None: what the chat template says without one.
        """
        self._engine = engine
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, not the system message."""
        self.messages = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )

    def send(self, text: str, **options: Unpack[GenerateOptions]) -> Result:
        """Say something and wait for the whole answer.

        Args:
            text: the user's message, not empty.
            **options: as for `Engine.generate`.

        Returns:
            The answer. If it is interrupted, what was said so far stays in `messages`.
        """
        result: Result | None = None
        for piece in self.stream(text, **options):
            result = piece.result
        assert result is not None  # the last piece carries it
        return result

    def stream(self, text: str, **options: Unpack[GenerateOptions]) -> Generator[Piece, None, None]:
        """Say something and receive the answer in pieces; the last one carries the result.

        Closing the iterator early keeps what was said so far as the answer.
        """
        if not isinstance(text, str) or not text:
            raise ValueError("a chat message must be a string that is not empty")
        messages = [*self.messages, {"role": "user", "content": text}]
        return self._turn(messages, self._engine.stream(messages, **options))

    def _turn(self, messages: list[dict[str, Any]], stream: Stream) -> Generator[Piece, None, None]:
        finished = False
        try:
            for piece in stream:
                finished = piece.result is not None
                yield piece
        finally:
            stream.close()
            if finished or stream.text:
                self.messages = [*messages, {"role": "assistant", "content": stream.text}]
