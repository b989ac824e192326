"""Clean-up is not interrupted by the signal that asks for it, nor by an impatient second one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def shielded(say: Callable[[str], None]) -> Iterator[None]:
    """Signals that ask the process to end are only noted while the block runs, until Ctrl-C is pressed twice.

    `say` is told what the first one means. The second SIGINT raises KeyboardInterrupt. Outside of the main
    thread, which alone gets signals, this does nothing.
    """
    noted = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        del frame
        noted += number == signal.SIGINT
        if noted > 1:
            raise KeyboardInterrupt
        say("still deleting what was made; Ctrl-C again leaves the rest to `coriolis-azure cleanup`")

    before = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
