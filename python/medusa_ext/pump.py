"""Lets any number of threads share one Session.

Whichever thread needs events and finds nobody stepping drives the session, and hands every event to
the call that waits for it; the others sleep. There is no thread of our own, so nothing runs while
nobody waits, and nothing has to be stopped when the interpreter ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import starmap

from medusa_ext import _core

# An interrupted driver may leave without a word; the others look for that this often.
LOOK_S = 0.05


class Ticket:
    """The requests of one call, and the events that came for them."""

    def __init__(self) -> None:
        """Begin without requests."""
        self.requests: list[int] = []
        self.events: deque[_core.Event] = deque()
        self.error: Exception | None = None
        self._bell = threading.Lock()  # held: silent
        self._bell.acquire()

    def ring(self) -> None:
        """Wake the thread that sleeps, or the next that wants to. One thread at a time rings."""
        if self._bell.locked():
            self._bell.release()

    def sleep(self) -> None:
        """Sleep until the bell rings, or for a moment."""
        self._bell.acquire(timeout=LOOK_S)


class Pump:
    """Drives a session for the threads that wait for its events.

    ^C may interrupt the main thread between any two bytecodes, so locks are only held by `with`,
    which takes and releases them in C (a Condition does not), nothing that others wait for depends
    on a thread's last words, and events pass through an inbox that a single call fills; every
    thread that takes the lock first hands out what is in it.
    """

    def __init__(self, session: _core.Session) -> None:
        """Take over a session: nobody else may step it."""
        self._session = session
        # Held by the thread that steps, or works on the model alone; taken before _lock.
        self._driving = threading.Lock()
        self._stepper: int | None = None  # the thread inside Session.step
        self._lock = threading.Lock()
        self._inbox: deque[list[_core.Event]] = deque()
        self._waiting: dict[int, Ticket] = {}  # unfinished requests
        self._closed = False
        self._closed_by = ""  # why, where it was not close()

    def submit(
        self, submissions: Iterable[Callable[[], int]], ticket: Ticket | None = None
    ) -> Ticket:
        """Start requests by calls of Session.submit; if one fails, cancel the ticket's.

        Args:
            submissions: without Python code of their own, such as functools.partial, so that no ^C
                can fall between the start of a request and the note of its number.
            ticket: to which they are added; None: a new one.
        """
        self._check_caller()
        ticket = Ticket() if ticket is None else ticket
        try:
            with self._lock:  # no event is handed out before its ticket is known
                self._check_open()
                for submission in submissions:
                    ticket.requests.extend(starmap(submission, ((),)))
                    self._waiting[ticket.requests[-1]] = ticket
        except BaseException:
            self.cancel(ticket)
            raise
        return ticket

    def wait(self, ticket: Ticket) -> list[_core.Event]:
        """Return the new events of these requests, at least one; drives if nobody does.

        Raises:
            RuntimeError: the engine was closed, decoding failed in another thread, or the drafter
                asks its own engine.
            Exception: what Session.step raised in this thread.
        """
        self._check_caller()
        while True:
            with self._lock:
                if self._ready(ticket):
                    if ticket.error is not None:
                        raise ticket.error
                    events = list(ticket.events)
                    ticket.events.clear()
                    return events
                self._check_open()
            if self._driving.locked():
                ticket.sleep()
                continue
            with self._driving:
                with self._lock:  # another thread may have been faster and stepped
                    ready = self._ready(ticket) or self._closed
                if not ready:
                    self._step()
                    self._retire()
            self._wake_all()
            if not ticket.events and len(self._waiting) > len(ticket.requests):
                time.sleep(1e-4)  # else we overtake a thread that waits to drive, time and again

    def stop(self, request: int) -> None:
        """End a request early; its last event still comes. Nothing happens if it has ended."""
        session = getattr(self, "_session", None)  # another thread may close meanwhile
        if session is not None:
            session.cancel(request)

    def cancel(self, ticket: Ticket) -> None:
        """Give up these requests, and free their slots unless some other thread will.

        The garbage collector may call it anywhere: never waits for a lock that this thread holds,
        and for another thread's only in the rare case that it is taken this very moment.
        """
        for request in ticket.requests:
            self._waiting.pop(request, None)
            self.stop(request)
        if self._waiting or self._lock.locked() or self._driving.locked():
            return
        with self._driving:
            self._retire()
        self._wake_all()

    def alone(self, work: Callable[[], None]) -> None:
        """Do this work while no thread steps."""
        self._check_caller()
        try:
            with self._driving:
                self._check_open()
                try:
                    work()
                except _core.CudaError as error:
                    with self._lock:
                        self._give_up(error)
                    raise
                self._retire()
        finally:
            self._wake_all()

    def close(self) -> None:
        """End all requests with an error, wait for a running step, let go of the session."""
        with self._lock:
            if self._closed and not self._closed_by:
                return
            self._closed, self._closed_by = True, ""
            self._fail(RuntimeError("the engine was closed while this text was being made"))
        if self._stepper == threading.get_ident():  # a drafter closes the engine that runs it
            del self._session
            return
        with self._driving:
            del self._session

    def _step(self) -> None:
        try:
            self._stepper = threading.get_ident()
            # One call that both steps and stores: no ^C can fall between the two and lose events.
            self._inbox.extend(starmap(self._session.step, ((),)))
        except Exception as error:
            with self._lock:
                self._hand_out()
                if isinstance(error, _core.CudaError):
                    self._give_up(error)
                else:
                    self._fail(_elsewhere(error))
            raise
        finally:
            self._stepper = None
        with self._lock:
            self._hand_out()
            if self._waiting and self._session.idle:
                self._fail(
                    _core.InternalError("the session is idle before its requests have ended")
                )

    def _retire(self) -> None:
        """Step until the slots of cancelled requests are free, where nobody else will."""
        while not self._waiting and not self._closed and not self._session.idle:
            self._step()

    def _ready(self, ticket: Ticket) -> bool:
        self._hand_out()
        return ticket.error is not None or bool(ticket.events)

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
                ticket.ring()
            self._inbox.popleft()

    def _wake_all(self) -> None:
        """After driving: someone else may have to take over."""
        with self._lock:
            for ticket in list(self._waiting.values()):
                ticket.ring()

    def _give_up(self, error: _core.CudaError) -> None:
        """Close: from now on the state of the device is unknown. Memory goes with close()."""
        self._closed, self._closed_by = True, f", the device failed: {error}"
        self._fail(_elsewhere(error))

    def _fail(self, error: Exception) -> None:
        for request, ticket in list(self._waiting.items()):
            ticket.error = error
            self._session.cancel(request)
            ticket.ring()
        self._waiting.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"this engine is closed{self._closed_by}; make a new one")

    def _check_caller(self) -> None:
        if self._stepper == threading.get_ident():
            raise RuntimeError("a drafter cannot use the engine that runs it")


def _elsewhere(error: Exception) -> RuntimeError:
    """What the threads get that were not the one that met it."""
    failure = RuntimeError(f"decoding failed in another thread: {error}")
    failure.__cause__ = error
    return failure
