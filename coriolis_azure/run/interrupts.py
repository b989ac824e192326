"""When work is interrupted: by the end of the process that waits for it. Clean-up is not, except by a second Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..clock import Scope
from ..threads import every

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TELL_SECONDS = 0.05
# What deleting needs where nothing is left: a connection for each of its threads, and the files that one reads.
_SPARE_DESCRIPTORS = 16
_LOOK_SECONDS = 0.5


@contextmanager
def ended_with_parent() -> Iterator[None]:
    """Interrupt the block as Ctrl-C does, once, when the process that waits for this one's result is gone.

    That is the one that started this one by `multiprocessing`; where there is none, this does nothing.
    """
    parent = multiprocessing.parent_process()
    interrupted = False

    def look() -> None:
        nonlocal interrupted
        if parent is not None and not interrupted and not parent.is_alive():
            interrupted = True
            os.kill(os.getpid(), signal.SIGINT)

    if parent is None:
        yield
        return
    with every(_LOOK_SECONDS, look):
        yield


@contextmanager
def shielded(say: Callable[[str], None]) -> Iterator[None]:
    """Signals that ask the process to end are only noted while the block runs, until Ctrl-C is pressed twice.

    The first one ends long waits. `say` is told what it means, by another thread: the signal may have interrupted
    this one in the middle of a line. The second SIGINT raises KeyboardInterrupt, and ends all waits. Outside of the
    main thread, which alone gets signals, nothing of this is done. Nobody else can call off the waits of the block.
    """
    scope = Scope()
    noted: list[int] = []
    told = False

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        noted.append(number)
        scope.hurry()
        if noted.count(signal.SIGINT) > 1:
            scope.cancel()
            raise KeyboardInterrupt

    def tell() -> None:
        nonlocal told
        if noted and not told:
            told = True
            say("still deleting what was made; Ctrl-C again leaves the rest to `coriolis-azure cleanup`")

    before = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        before = {}
    try:
        with scope.entered(), every(_TELL_SECONDS, tell, optional=True):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Spare:
    """Descriptors held back during a run, so that its clean-up has some where something has used up all others."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def take(self) -> None:
        """Hold them; as many as there are, if there are fewer."""
        with contextlib.suppress(OSError):
            while len(self._held) < _SPARE_DESCRIPTORS:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def give(self) -> None:
        """Give them back."""
        while self._held:
            os.close(self._held.pop())

    def __enter__(self) -> Spare:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.give()
