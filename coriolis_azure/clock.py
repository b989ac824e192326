"""Time, as something that can be handed over: the real one here, a held one in tests. Every wait can be called off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import TypeVar

from .errors import WaitEnded

# A wait looks this often whether it was called off: by a flag, as a signal handler must not take a lock.
_SLICE_SECONDS = 0.1
# Once a scope is hurried, no longer wait than this is begun or gone on with.
_SHORT_SECONDS = 30.0


class Scope:
    """The waits of one piece of work, in whatever threads. One within another ends with it."""

    def __init__(self, around: Scope | None = None) -> None:
        self._around = around
        self._cancelled = self._hurried = False

    def cancel(self) -> None:
        """End every wait."""
        self._cancelled = True

    def hurry(self) -> None:
        """End the long waits, for instance those that Azure asks for; operations under way are still waited for."""
        self._hurried = True

    @property
    def cancelled(self) -> bool:
        """Whether no wait goes on."""
        return self._cancelled or (self._around is not None and self._around.cancelled)

    @property
    def hurried(self) -> bool:
        """Whether no long wait goes on."""
        return self._hurried or self.cancelled or (self._around is not None and self._around.hurried)

    @contextmanager
    def entered(self) -> Iterator[Scope]:
        """The waits of the block, in this thread, are the scope's."""
        token = _scope.set(self)
        try:
            yield self
        finally:
            _scope.reset(token)


_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)


def scope() -> Scope | None:
    """The scope that this thread's waits belong to; None where nothing can call them off."""
    return _scope.get()


def hurried() -> bool:
    """Whether somebody wants the work here to end soon."""
    current = scope()
    return current is not None and current.hurried


def wait(seconds: float) -> None:
    """Wait; WaitEnded when the wait is called off. An interrupt ends it, too."""
    until, current = time.monotonic() + seconds, scope()
    while (left := until - time.monotonic()) > 0:
        if current is not None and (current.cancelled or (current.hurried and seconds > _SHORT_SECONDS)):
            raise WaitEnded(f"a wait of {seconds:.0f} s was called off")
        time.sleep(left if current is None else min(left, _SLICE_SECONDS))


def rfc3339(moment: datetime) -> str:
    """A moment as documents and events tell it: UTC, with milliseconds."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


T = TypeVar("T")


def retried(act: Callable[[], T], refused: type[Exception], pauses: Iterable[float], clock: Clock) -> T:
    """What `act` gives; where it is `refused` it is tried again after each of the pauses, and then no more."""
    for pause in pauses:
        try:
            return act()
        except refused:
            clock.sleep(pause)
    return act()


class Clock:
    """The machine's clock."""

    def now(self) -> datetime:
        """This moment, in UTC."""
        return datetime.now(timezone.utc)

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait; WaitEnded when the wait is called off. An interrupt ends it, too."""
        wait(seconds)
