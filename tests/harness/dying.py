"""Dying anywhere: a child runs the code under test and counts the system calls that matter; at one of them it ends.

It ends at once, before or after that call. With `power` what was not made durable by fsync is lost as well.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

FOR_GOOD = pytest.MonkeyPatch()  # of what is replaced in a process that will die with it
CALLS = ("open", "pwrite", "write", "ftruncate", "fsync", "fdatasync", "replace", "unlink")


def dying_child(
    work: Callable[[], object], at: int, after: bool, power: bool, calls: tuple[str, ...] = CALLS
) -> bool:
    """Run `work` in a child that dies at number `at` of `calls`. Whether it did, rather than finish."""
    child = os.fork()
    if not child:
        try:
            _arm(at, after, power, calls)
            work()
        except BaseException:  # noqa: BLE001
            os._exit(3)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), f"the child ended with {status}"
    return status == 9


def _arm(at: int, after: bool, power: bool, calls: tuple[str, ...]) -> None:
    real = {name: getattr(os, name) for name in CALLS}
    volatile: list[tuple[str, int, bytes, int]] = []  # path, offset, bytes before, size before
    count = 0

    def die() -> None:
        if power:
            _give_leases_up()
            for path, offset, before, size in reversed(volatile):
                fd = real["open"](path, os.O_WRONLY)
                real["pwrite"](fd, before, offset)
                real["ftruncate"](fd, size)
        os._exit(9)

    def remember(name: str, args: tuple[Any, ...]) -> None:
        """What a write replaces, until fsync makes it durable."""
        if name not in ("fsync", "fdatasync", "pwrite", "write"):
            return
        fd = args[0]
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if name in ("fsync", "fdatasync"):
            volatile[:] = [entry for entry in volatile if entry[0] != path]
            return
        size = os.fstat(fd).st_size
        offset = args[2] if name == "pwrite" else size
        before = b""
        if name == "pwrite":
            before = os.pread(fd, len(args[1]), offset)
        volatile.append((path, offset, before, size))

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += name in calls
            mine = name in calls and count == at
            if mine and not after:
                die()
            remember(name, args)
            try:
                return real[name](*args, **options)
            finally:
                if mine:
                    die()

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))


def _give_leases_up() -> None:
    """Opening a file on which this process has a lease would wait for it to give that up."""
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            fcntl.fcntl(int(fd.name), fcntl.F_SETLEASE, fcntl.F_UNLCK)
