"""A process on a terminal of its own, and what it wrote there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from harness.processes import PROCESSES

_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(
    work: Callable[..., None], *arguments: Any, width: int = 80, variables: dict[str, str] | None = None
) -> str:
    """All that `work(*arguments)` writes to its terminal until it ends."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with Connection(its) as terminal:
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
        begin = (terminal, {**env, "TERM": "xterm", **(variables or {})}, work, arguments)
        process = PROCESSES.Process(target=_begin, args=begin)
        process.start()
    said = bytearray()
    with (
        os.fdopen(ours, "rb", buffering=0) as screen,
        suppress(OSError),
    ):  # EIO: nobody has the terminal any more
        while piece := screen.read(65536):
            said += piece
    process.join(60)
    return said.decode().replace("\r\n", "\n")


def text(said: str) -> str:
    """What people see of what was written to a terminal: colours and movements left out."""
    return _SEQUENCE.sub("", said)


def _begin(
    terminal: Connection, env: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number in range(3):
        os.dup2(terminal.fileno(), number)
    terminal.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    work(*arguments)
