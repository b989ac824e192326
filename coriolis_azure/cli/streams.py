"""The three standard streams, made safe: they may be closed, lose their terminal, or only support ASCII."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# The errors of writing to a pipe or terminal whose other end is closed.
_READER_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF}


class FailSafeStream:
    """A stream that may fail, because its reader is gone or its disk is full, without stopping the program.

    `error` is its first failure; later output is discarded.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # click writes UTF-8 there, past us, if the encoding is ASCII
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; a failure is recorded, not raised."""
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; a failure is recorded, not raised."""
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError):
                # Otherwise the interpreter would flush again at exit, and fail.
                _to_null(self._stream.fileno())


def ready_streams() -> None:
    """Make the standard streams safe to use.

    A closed one becomes /dev/null; otherwise the next file opened, perhaps an image, would get its number and its
    output. Characters that a stream's encoding lacks are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - stays open for the life of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, FailSafeStream(sys.stdout))
    sys.stderr = cast(TextIO, FailSafeStream(sys.stderr))


def ended_streams() -> OSError | None:
    """Flush stdout; the error that lost some of its output, None if it was all written or its reader has left."""
    sys.stdout.flush()
    error: OSError | None = getattr(sys.stdout, "error", None)
    return None if error is None or error.errno in _READER_GONE else error


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
