"""Interrupts work when its parent process ends, and protects clean-up from interrupts except a second Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..clock import Scope, apart
from ..threads import every

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TELL_SECONDS = 0.05
# Enough for clean-up if none are left: a connection for each of its threads, and the files that a connection reads.
_SPARE_DESCRIPTORS = 16
_POLL_SECONDS = 0.5
_LEAVING = "press Ctrl-C again to leave the rest to `coriolis-azure cleanup`"
# The scopes of the blocks that are shielded in other threads. Each operation on it is atomic: a handler reads it.
_elsewhere: set[Scope] = set()


@contextmanager
def ended_with_parent() -> Iterator[None]:
    """Interrupt the block as Ctrl-C does, once, if the parent process ends.

    Does nothing in a process that was not started by `multiprocessing`.
    """
    parent = multiprocessing.parent_process()
    interrupted = False

    def poll() -> None:
        nonlocal interrupted
        if parent is not None and not interrupted and not parent.is_alive():
            interrupted = True
            os.kill(os.getpid(), signal.SIGINT)

    if parent is None:
        yield
        return
    with every(_POLL_SECONDS, poll):
        yield


@contextmanager
def shielded(say: Callable[[str], None]) -> Iterator[None]:
    """Defer the signals that ask the process to end until the block is done, or until Ctrl-C is pressed twice.

    The first signal ends long waits, and `say` is called with an explanation, in another thread: the signal may have
    interrupted this one in the middle of a log call. The second SIGINT raises KeyboardInterrupt and ends all waits.
    Outside the main thread, which alone handles signals, they are not deferred; there `ended_together` ends the waits.
    No outer scope can cancel the waits of the block.
    """
    scope = apart()

    def again(received: Sequence[int]) -> None:
        scope.hurry()
        if received.count(signal.SIGINT) > 1:
            scope.cancel()
            raise KeyboardInterrupt

    with _received(again, say, f"still deleting what was created; {_LEAVING}") as received, scope.entered():
        if received is None:
            _elsewhere.add(scope)
        try:
            yield
        finally:
            _elsewhere.discard(scope)


@contextmanager
def ended_together(cancel: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Make a signal that asks the process to end `cancel` the block's work in all threads, instead of interrupting it.

    The block goes on, waits for that work and its clean-up, and then KeyboardInterrupt is raised. A second Ctrl-C ends
    the waits of the clean-up, too. `say`: see `shielded`. Does nothing outside the main thread.
    """

    def again(received: Sequence[int]) -> None:
        cancel()
        for scope in list(_elsewhere):
            scope.hurry()
            if received.count(signal.SIGINT) > 1:
                scope.cancel()

    with _received(again, say, f"ending, and deleting what was created; {_LEAVING}") as received:
        yield
    if received:
        raise KeyboardInterrupt


@contextmanager
def _received(
    again: Callable[[Sequence[int]], None], say: Callable[[str], None], explanation: str
) -> Iterator[list[int] | None]:
    """Call `again` with all signals so far for each that arrives during the block; None if this thread gets none."""
    received: list[int] = []
    explained = False

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        again(received)

    def explain() -> None:
        nonlocal explained
        if received and not explained:
            explained = True
            say(explanation)

    previous = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread
        yield None
        return
    try:
        with every(_TELL_SECONDS, explain, optional=True):
            yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Spare:
    """File descriptors reserved during a run, so that clean-up can use them if all others are exhausted."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def take(self) -> None:
        """Reserve the descriptors, or as many as are available."""
        with contextlib.suppress(OSError):
            while len(self._held) < _SPARE_DESCRIPTORS:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def give(self) -> None:
        """Release the descriptors."""
        while self._held:
            os.close(self._held.pop())

    def __enter__(self) -> Spare:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.give()
