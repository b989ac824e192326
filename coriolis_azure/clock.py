"""Clocks that can be injected (tests hold theirs), and waits that can be cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from .errors import WaitEnded

# How often a wait checks whether it is cancelled. It polls a flag, since a signal handler must not take a lock.
_SLICE_SECONDS = 0.1
# In a hurried scope, waits longer than this end.
_SHORT_SECONDS = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Scope:
    """A cancellation scope: the waits of a piece of work in any thread, and the VM and disk the work is about.

    Cancelling a scope cancels those within it. A scope inherits the VM and disk of the one around it.
    """

    def __init__(self, around: Scope | None = None, *, vm: str = "", disk: str = "") -> None:
        self._around = around
        self.vm: str = vm or (around.vm if around is not None else "")
        self.disk: str = disk or (around.disk if around is not None else "")
        # Only ever set, and polled by any thread. Without a lock: a signal handler may set them.
        self._cancelled = self._hurried = False

    def cancel(self) -> None:
        """End every wait."""
        self._cancelled = True

    def hurry(self) -> None:
        """End long waits, such as those that Azure asks for; operations in progress are still waited for."""
        self._hurried = True

    @property
    def cancelled(self) -> bool:
        """Whether all waits end."""
        return self._cancelled or (self._around is not None and self._around.cancelled)

    @property
    def hurried(self) -> bool:
        """Whether long waits end."""
        return self._hurried or self.cancelled or (self._around is not None and self._around.hurried)

    def is_within(self, other: Scope) -> bool:
        """Whether this is `other`, or a part of its work."""
        return self is other or (self._around is not None and self._around.is_within(other))

    @contextmanager
    def entered(self) -> Iterator[Scope]:
        """Make the waits of the block, in this thread, belong to this scope."""
        token = _scope.set(self)
        try:
            yield self
        finally:
            _scope.reset(token)


_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)


def scope() -> Scope | None:
    """The scope of this thread's waits; None if nothing can cancel them."""
    return _scope.get()


def apart() -> Scope:
    """A new scope for the VM and disk of this thread's scope, but not cancelled with it."""
    current = scope()
    return Scope(vm=current.vm, disk=current.disk) if current is not None else Scope()


def hurried() -> bool:
    """Whether the current work should end soon."""
    current = scope()
    return current is not None and current.hurried


def refuse_cancelled(what: str) -> None:
    """Raise WaitEnded if the current work, which `what` names, is cancelled."""
    current = scope()
    if current is not None and current.cancelled:
        raise WaitEnded(f"{what} was cancelled")


def wait(seconds: float) -> None:
    """Wait. Raises WaitEnded if the wait is cancelled; an interrupt ends it, too."""
    until, current = time.monotonic() + seconds, scope()
    while (left := until - time.monotonic()) > 0:
        if current is not None and (current.cancelled or (current.hurried and seconds > _SHORT_SECONDS)):
            raise WaitEnded(f"a wait of {seconds:.0f} s was cancelled")
        time.sleep(left if current is None else min(left, _SLICE_SECONDS))


def boot_id() -> str:
    """The kernel's id of the current boot of this host; "" if it cannot be read."""
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def rfc3339(moment: datetime) -> str:
    """A moment in the format of documents and events: UTC, with milliseconds."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(text: str) -> datetime | None:
    """The moment that a text in that format names, in UTC; None if it names none."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return found.astimezone(timezone.utc) if found.tzinfo is not None else None
    except (ValueError, OverflowError):  # the first and the last hours of the calendar are in UTC none of it
        return None


T = TypeVar("T")


def retried(act: Callable[[], T], refused: type[Exception], pauses: Iterable[float], clock: Clock) -> T:
    """Return the result of `act`; if it raises `refused`, retry after each of the pauses."""
    for pause in pauses:
        try:
            return act()
        except refused:
            clock.sleep(pause)
    return act()


class Clock:
    """The clock of this host."""

    def now(self) -> datetime:
        """The current time, in UTC."""
        return datetime.now(timezone.utc)

    def monotonic(self) -> float:
        """The seconds since some fixed moment; never decreases."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait. Raises WaitEnded if the wait is cancelled; an interrupt ends it, too."""
        wait(seconds)
