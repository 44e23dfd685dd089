"""Lets any number of threads share one Session.

Whichever thread needs events and finds nobody stepping drives the session, and hands every event to
the call that waits for it; the others sleep. There is no thread of our own, so nothing runs while
nobody waits, and nothing has to be stopped when the interpreter ends.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import starmap

from medusa_ext import _core


class Ticket:
    """The requests of one call, and the events that came for them."""

    def __init__(self) -> None:
        """Begin without requests."""
        self.requests: list[int] = []
        self.events: deque[_core.Event] = deque()
        self.error: Exception | None = None


class Pump:
    """Drives a session for the threads that wait for its events.

    ^C may interrupt the main thread between any two bytecodes, so events pass through an inbox that
    a single call fills, and every thread that takes the lock first hands out what is in it.
    """

    def __init__(self, session: _core.Session) -> None:
        """Take over a session: nobody else may step it."""
        self._session = session
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._driver: int | None = None  # the thread that steps, or that works on the model alone
        self._inbox: deque[list[_core.Event]] = deque()
        self._waiting: dict[int, Ticket] = {}  # unfinished requests
        self._closed = False

    def submit(self, submissions: Iterable[Callable[[], int]]) -> Ticket:
        """Start requests by calls of Session.submit; if one fails, cancel those before it."""
        ticket = Ticket()
        try:
            with self._lock:  # no event is handed out before its ticket is known
                self._check_open()
                for submission in submissions:
                    request = submission()
                    ticket.requests.append(request)
                    self._waiting[request] = ticket
        except BaseException:
            self.cancel(ticket)
            raise
        return ticket

    def wait(self, ticket: Ticket) -> list[_core.Event]:
        """Return the new events of these requests, at least one; drives if nobody does.

        Raises:
            RuntimeError: the engine was closed, or decoding failed in another thread.
            Exception: what Session.step raised in this thread.
        """
        thread = threading.get_ident()
        while True:
            try:
                with self._lock:
                    while True:
                        self._hand_out()
                        if ticket.error is not None:
                            raise ticket.error
                        if ticket.events:
                            events = list(ticket.events)
                            ticket.events.clear()
                            return events
                        if self._driver is None:
                            break
                        self._changed.wait()
                    self._check_open()
                    self._driver = thread
                self._step()
            finally:
                self._stop_driving(thread)

    def stop(self, request: int) -> None:
        """End a request early; its last event still comes."""
        self._session.cancel(request)

    def cancel(self, ticket: Ticket) -> None:
        """Give up these requests. Never blocks: the garbage collector may call it anywhere."""
        for request in ticket.requests:
            if self._waiting.pop(request, None) is not None:
                self._session.cancel(request)
        if not self._waiting and self._lock.acquire(blocking=False):
            try:
                self._retire()
            finally:
                self._lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other thread from stepping meanwhile."""
        thread = threading.get_ident()
        try:
            with self._lock:
                while self._driver is not None:
                    self._changed.wait()
                self._check_open()
                self._driver = thread
            yield
        finally:
            self._stop_driving(thread)

    def close(self) -> None:
        """End all requests with an error, wait for a running step, let go of the session."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._fail(RuntimeError("the engine was closed while this text was being made"))
            while self._driver not in (None, threading.get_ident()):
                self._changed.wait()
            del self._session

    def _step(self) -> None:
        try:
            # One call that both steps and stores: no ^C can fall between the two and lose events.
            self._inbox.extend(starmap(self._session.step, ((),)))
        except Exception as error:
            failure = RuntimeError(f"decoding failed in another thread: {error}")
            failure.__cause__ = error
            with self._lock:
                self._hand_out()
                self._fail(failure)
            raise
        with self._lock:
            self._hand_out()
            if self._waiting and self._session.idle:
                self._fail(
                    _core.InternalError("the session is idle before its requests have ended")
                )

    def _stop_driving(self, thread: int) -> None:
        if self._driver == thread:
            with self._lock:
                self._hand_out()
                self._changed.notify_all()
                self._driver = None
                self._retire()

    def _retire(self) -> None:
        """Make the step that frees the slots of cancelled requests, where nobody else will."""
        nobody = self._driver is None and not self._waiting
        if nobody and not self._closed and not self._session.idle:
            self._session.step()

    def _hand_out(self) -> None:
        """Move events from the inbox to their tickets; after an interrupt anywhere, go on."""
        while self._inbox:
            for event in self._inbox[0]:
                ticket = self._waiting.get(event.request)
                if ticket is None:  # given up, or handed out before an interrupt
                    continue
                if not any(event is known for known in ticket.events):
                    ticket.events.append(event)
                if event.finish is not None:
                    self._waiting.pop(event.request, None)
            self._inbox.popleft()

    def _fail(self, error: Exception) -> None:
        for request, ticket in list(self._waiting.items()):
            ticket.error = error
            self._session.cancel(request)
        self._waiting.clear()
        self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed; make a new one")
