"""From the events of a session to pieces of text and results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from medusa_ext import _core
from medusa_ext.pump import Pump
from medusa_ext.results import Piece, Result, make_stats
from medusa_ext.text_builder import TextBuilder

Submission = Callable[[], int]
Key: TypeAlias = Any  # of the caller; hashable


class Answer:
    """One request's text in the making."""

    def __init__(self, pump: Pump, builder: TextBuilder) -> None:
        """Begin with no text."""
        self._pump = pump
        self._builder = builder
        self._told_to_stop = False
        self._first_tokens = 0  # that the first step emitted: they came with the prefill
        self.result: Result | None = None

    @property
    def text(self) -> str:
        """All final text so far."""
        return self._builder.text

    def take(self, event: _core.Event) -> str:
        """Take one event; return the text that became final. The last event sets `result`."""
        builder = self._builder
        self._first_tokens = self._first_tokens or len(event.tokens)
        text = builder.push(event.tokens)
        if event.finish is not None:
            text += builder.finish()
            self.result = Result(
                text=builder.text,
                token_ids=builder.token_ids,
                finish_reason="stop" if builder.stopped else event.finish,
                prompt_tokens=event.stats.prompt_tokens,
                stats=make_stats(event.stats, self._first_tokens or 1),
            )
        elif builder.stopped and not self._told_to_stop:
            self._told_to_stop = True
            self._pump.stop(event.request)
        return text


def complete(
    pump: Pump, submissions: Sequence[Submission], answers: Sequence[Answer]
) -> list[Result]:
    """Run requests to their ends; the results stand in the order of the submissions."""
    ticket = pump.submit(submissions)
    try:
        answer_of = dict(zip(ticket.requests, answers, strict=True))
        results = [answer.result for answer in answers]
        while None in results:
            for event in pump.wait(ticket):
                answer_of[event.request].take(event)
            results = [answer.result for answer in answers]
        return [result for result in results if result is not None]
    finally:
        pump.cancel(ticket)


class Batch:
    """Prompts of one caller that come while others of it are being made.

    Not for use by several threads at once.

    Attributes:
        num_tokens: generated so far.
    """

    def __init__(self, pump: Pump, prepare: Callable[..., tuple[Submission, Answer]]) -> None:
        """Begin without prompts."""
        self._pump = pump
        self._prepare = prepare
        self._ticket = pump.submit([])
        self._running: dict[int, tuple[Key, Answer]] = {}
        self.num_tokens = 0

    def add(self, key: Hashable, prompt: object, **options: Any) -> None:  # noqa: ANN401
        """Start a prompt; its result comes with this key. Options and errors of `stream`."""
        submission, answer = self._prepare(prompt, options)
        self._pump.submit([submission], self._ticket)
        self._running[self._ticket.requests[-1]] = key, answer

    def wait(self) -> list[tuple[Key, Result]]:
        """Go on with all of them; return the keys and results of those that ended, often none."""
        done = []
        for event in self._pump.wait(self._ticket) if self._running else []:
            key, answer = self._running.get(event.request, (None, None))
            if answer is None:  # dropped
                continue
            self.num_tokens += len(event.tokens)
            answer.take(event)
            if answer.result is not None:
                del self._running[event.request]
                done.append((key, answer.result))
        return done

    def drop(self, key: Hashable) -> None:
        """End a prompt; no result comes. Nothing happens if it has ended."""
        for request, (other, _) in list(self._running.items()):
            if other == key:
                del self._running[request]
                self._pump.stop(request)

    def close(self) -> None:
        """End all."""
        self._running.clear()
        self._pump.cancel(self._ticket)


class Stream:
    """Iterator over the pieces of one text; the last piece carries the result.

    Closing it, leaving its `with` block, ^C while it waits, or dropping it ends the request and
    frees its slot. Not for use by several threads at once.
    """

    def __init__(self, pump: Pump, submission: Submission, answer: Answer) -> None:
        """Start the request."""
        self._pump = pump
        self._answer = answer
        self._pieces: deque[Piece] = deque()
        self._open = True
        self._ticket = pump.submit([submission])

    @property
    def text(self) -> str:
        """All text so far."""
        return self._answer.text

    def __iter__(self) -> Stream:
        """Return itself."""
        return self

    def __next__(self) -> Piece:
        """Wait for the next piece."""
        try:
            while self._open and not self._pieces:
                for event in self._pump.wait(self._ticket):
                    text = self._answer.take(event)
                    if text or self._answer.result is not None:
                        self._pieces.append(Piece(text, self._answer.result))
                    self._open = self._answer.result is None
        except BaseException:
            self.close()
            raise
        if not self._pieces:
            raise StopIteration
        return self._pieces.popleft()

    def close(self) -> None:
        """End the request if it still runs; no further pieces come."""
        self._open = False
        self._pieces.clear()
        self._pump.cancel(self._ticket)

    def __enter__(self) -> Stream:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close."""
        if hasattr(self, "_ticket"):  # construction may have failed
            self.close()
