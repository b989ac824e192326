"""Real block devices and file systems for tests: loop devices, which only root can have."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def command(*line: str | Path) -> str:
    """What the program says; a skip where it is missing or this machine does not let a test have that."""
    try:
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{line[0]} is not installed")
    if done.returncode:
        pytest.skip(f"{line[0]} cannot be used here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def loop(backing: Path) -> Iterator[Path]:
    """A loop device over the file."""
    device = command("losetup", "--find", "--show", backing)
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(what: str | Path, at: Path, *options: str) -> Iterator[Path]:
    """A file system."""
    at.mkdir(exist_ok=True)
    command("mount", *options, what, at)
    try:
        yield at
    finally:
        if subprocess.run(["umount", str(at)], check=False).returncode:
            # The kernel lets go of a loop device over a file in it a moment after it was detached.
            subprocess.run(["umount", "--lazy", str(at)], check=True)


def fresh(path: Path) -> bytes:
    """The content of a file or device, as it is on the medium."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()
