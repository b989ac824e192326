"""Copies of a disk by an agent over pipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coriolis_azure import transfer
from coriolis_azure.clock import Clock
from coriolis_azure.events import Progress, Report, silent
from coriolis_azure.readers.agents import AgentReader
from coriolis_azure.readers.channel import Direct
from coriolis_azure.readers.conversation import Job, Stream
from coriolis_azure.readers.flow import Flow
from coriolis_azure.readers.rate_limiter import RateLimiter
from coriolis_azure.replica.destinations import Destination
from coriolis_azure.replica.manifest import Manifest
from harness.images import Image
from harness.pipes import Pipes

CHUNK = 65536
LEAF = 4096


def job(disk: Path, **options: Any) -> Job:
    return Job((str(disk),), disk.stat().st_size, **{"leaf": LEAF, "wait": 0.0, **options})


def by_agent(
    start: Callable[[], Stream],
    task: Job,
    base: Manifest,
    destination: Destination,
    report: Report = silent,
    *,
    disk: str = "os",
    clock: Clock | None = None,
    verify: bool = True,
    limiter: RateLimiter | None = None,
    direct: Direct | None = None,
    concurrent: int = 1,
) -> transfer.Outcome:
    """What `start`'s agents read, brought to a destination that holds `base`."""
    clock = clock or Clock()
    reader = AgentReader(start, task, Flow(disk, report, clock, limiter), direct)
    progress = Progress(disk, base.size, report, clock)
    return transfer.copy(reader, base, destination, progress, verify=verify, concurrent=concurrent)


def replicate(
    disk: Path,
    path: Path,
    *,
    chunk: int = CHUNK,
    full: bool = False,
    verify: bool = True,
    report: Report = silent,
    stream: Pipes | None = None,
    clock: Clock | None = None,
    **options: Any,
) -> transfer.Outcome:
    """One run with the real agent, behind `stream` where that is given."""
    with Image(path) as image, stream or Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, chunk, full=full)
        task = job(disk, **options)
        return by_agent(lambda: pipes, task, base, image, report, clock=clock, verify=verify)


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
        image = self.medium.open("image")
        if self._target is None and image is not None:
            image.write(self._wrong, b"rot")
        else:
            self.write(self._wrong, b"rot")
