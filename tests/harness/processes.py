"""Processes of their own that begin with the SDKs imported: a second of the processor less for each.

What they are forked from has done nothing but import, and make keys. That a process can also begin from nothing is
shown by tests that start an interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

PROCESSES = multiprocessing.get_context("forkserver")


def _start() -> None:
    """Start what processes are forked from. Python 3.11 tells it no path, and goes on without what it does not find."""
    PROCESSES.set_forkserver_preload(["harness.preloaded"])
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, before] if before else [here])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


if "harness.preloaded" not in sys.modules:  # which imports this module too, where processes are forked from
    _start()


class Forked:
    """`work(*arguments)` in a process of its own, with the environment of now; used as a subprocess.Popen is."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        (out, its_out), (err, its_err) = (PROCESSES.Pipe(duplex=False) for _ in range(2))
        begin = (its_out, its_err, dict(os.environ), work, arguments)
        self._process = PROCESSES.Process(target=_begin, args=begin)
        self._process.start()
        self.stdout, self.stderr = _text(out), _text(err)
        its_out.close()
        its_err.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As a user or the orchestrator does."""
        os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        """As a power cut does."""
        self._process.kill()

    def wait(self, timeout: float) -> int:
        """Its exit code, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} seconds")
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """All that it says until it ends."""
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        limit = threading.Timer(timeout, self.kill)
        reader.start()
        limit.start()
        said = self.stdout.read()
        reader.join()
        self.wait(timeout)
        limit.cancel()
        limit.join()
        self.stdout.close()
        self.stderr.close()
        return said, errors[0]

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0]:
            self.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()


def command(line: list[str]) -> None:
    """A process: the command line."""
    from coriolis_azure import cli

    sys.argv = ["coriolis-azure", *line]
    sys.exit(cli.main())


def completed(line: list[str]) -> subprocess.CompletedProcess[str]:
    """A command, run to its end."""
    with Forked(command, line) as process:
        out, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(line, process.wait(0), out, errors)


def _text(pipe: Connection) -> TextIO:
    with pipe:
        return os.fdopen(os.dup(pipe.fileno()))


def _begin(
    out: Connection,
    err: Connection,
    env: dict[str, str],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What an interpreter does around its program."""
    os.environ.clear()
    os.environ.update(env)
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(*arguments)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
