"""The three standard streams, whatever the caller has done to them: closed, a terminal that goes away, ASCII."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# What writing to a pipe or terminal ends with that somebody has closed.
_READER_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF}


class Unheard:
    """A stream that may fail at any time, because its reader is gone or its disk is full: the work goes on.

    `error` is its first failure. What is written after that goes nowhere.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text if somebody listens."""
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if somebody listens."""
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError):
                # Else the interpreter would try again, and fail, as it ends.
                _to_null(self._stream.fileno())


def ready_streams() -> None:
    """Make the standard streams safe to use.

    A closed one becomes /dev/null: else the next file that is opened, an image perhaps, would get its number and all
    that is written to it. What a stream's encoding does not have is escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - a number, and open for good
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast(TextIO, Unheard(sys.stdout)), cast(TextIO, Unheard(sys.stderr))


def ended_streams() -> OSError | None:
    """Flush stdout; why something that was written to it is lost, None where all is read or nobody wants to."""
    sys.stdout.flush()
    error: OSError | None = getattr(sys.stdout, "error", None)
    return None if error is None or error.errno in _READER_GONE else error


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
