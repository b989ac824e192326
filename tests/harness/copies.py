"""Copies of a disk by an agent over pipes."""

from __future__ import annotations

from pathlib import Path

from coriolis_azure import transfer
from coriolis_azure.clock import Clock
from coriolis_azure.events import silent
from coriolis_azure.readers import conversation
from coriolis_azure.replica.image import Image
from harness.pipes import Pipes

CHUNK = 65536
LEAF = 4096


def job(disk: Path, **options) -> conversation.Job:
    return conversation.Job("os", (str(disk),), disk.stat().st_size, **{"leaf": LEAF, "wait": 0.0, **options})


def replicate(
    disk: Path,
    path: Path,
    *,
    chunk=CHUNK,
    full=False,
    verify=True,
    report=silent,
    stream: Pipes | None = None,
    clock: Clock | None = None,
    **options,
):
    """One run with the real agent, behind `stream` where that is given."""
    with Image(path) as image, stream or Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, chunk, full)
        task = job(disk, **options)
        return transfer.copy(lambda: pipes, task, base, image, report, clock=clock or Clock(), verify=verify)


def change(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


class Lying(Image):
    """An image that has something else in a chunk than what was written there."""

    def __init__(self, path: Path, chunk: int) -> None:
        super().__init__(path)
        self._wrong = chunk * CHUNK + 5

    def flush(self) -> None:
        super().flush()
        self.write(self._wrong, b"rot")
