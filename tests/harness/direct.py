"""A worker that is reached over the direct channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coriolis_azure import transfer
from coriolis_azure.events import Event
from coriolis_azure.readers.channel import Direct
from coriolis_azure.readers.conversation import Job
from harness.copies import by_agent
from harness.images import Image
from harness.pipes import Pipes

CHUNK = 65536
ADDRESS = "127.0.0.1"


class Worker(Pipes):
    """An agent that was told the address of its connection, as the SSH server tells it."""

    def __init__(self, address: str = ADDRESS) -> None:
        super().__init__(words=[address])


def copied(disk: Path, worker: Worker, direct: Direct, told: list[Event], **options: Any) -> transfer.Outcome:
    size = disk.stat().st_size
    with Image(disk.with_name("os.raw")) as image, worker:
        base = image.known("id", size, CHUNK, full=False)
        job = Job((str(disk),), size, wait=0.0, **options)
        return by_agent(lambda: worker, job, base, image, told.append, direct=direct)
