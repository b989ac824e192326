"""The command line in a process of its own, and a sandbox that serves it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.constants import DEADLINE, MIB
from harness.processes import completed

COMMAND = [sys.executable, "-m", "coriolis_azure"]
# A run that cannot be over before a signal reaches it: its copying would take minutes.
SLOW = ["--limit", "16KiB/s"]


def run(*arguments: object, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = completed([str(argument) for argument in arguments])
    assert done.returncode == check, done.stderr
    return done


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sandbox that serves in the foreground of a process of its own, with a VM `web`."""
    folder = tmp_path_factory.mktemp("cli")
    directory = folder / "azure"
    with subprocess.Popen(
        [*COMMAND, "sandbox", "serve", str(directory)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        for name, size in (("os", 3 * MIB), ("data", 2 * MIB + 512)):
            (folder / f"{name}.raw").write_bytes(
                os.urandom(size // 512 * 256) + bytes(size - size // 512 * 256)
            )
        run(
            "sandbox",
            "add-vm",
            directory,
            "web",
            "--os-disk",
            folder / "os.raw",
            "--data-disk",
            folder / "data.raw",
        )
        yield directory
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=DEADLINE) == 0


@pytest.fixture
def settings(served: Path) -> list[str]:
    return ["-c", str(served / "connection.json"), "-e", str(served / "environment.json")]
