"""Clean-up is not interrupted by the signal that asks for it, nor by an impatient second one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .pipeline import every

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TELL_SECONDS = 0.05


@contextmanager
def shielded(say: Callable[[str], None]) -> Iterator[None]:
    """Signals that ask the process to end are only noted while the block runs, until Ctrl-C is pressed twice.

    `say` is told what the first one means, by another thread: the signal may have interrupted this one in the
    middle of a line. The second SIGINT raises KeyboardInterrupt. Outside of the main thread, which alone gets
    signals, this does nothing.
    """
    noted: list[int] = []
    told = False

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        noted.append(number)
        if noted.count(signal.SIGINT) > 1:
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
        with every(_TELL_SECONDS, tell):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
