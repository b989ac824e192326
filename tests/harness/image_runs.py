"""Runs that write images as a transfer does, and die where they are told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from coriolis_azure.events import Event, Notice, Report, silent
from coriolis_azure.replica.destinations import Destination
from coriolis_azure.replica.manifest import ZERO, Manifest
from harness.images import Image

CHUNK = 65536
REGION = 1 << 20
SIZE = 2 * REGION + 3 * CHUNK + 512  # three regions, a short last chunk
A, B = b"A" * CHUNK, b"B" * CHUNK


class Told(list[str]):
    """A report that keeps the notices."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.append(event.text)


def run(
    path: Path,
    content: dict[int, bytes],
    *,
    size: int = SIZE,
    disk: str = "id",
    report: Report = silent,
    full: bool = False,
    adopt: bool = False,
) -> list[int]:
    """What a run does to an image: make it hold `content` (by chunk, else zeros). Gives back what was sent."""
    with Image(path, report, adopt=adopt) as image:
        sent, _ = bring(image, content, size=size, disk=disk, full=full)
    return sent


def bring(
    image: Destination,
    content: dict[int, bytes],
    *,
    size: int = SIZE,
    disk: str = "id",
    full: bool = False,
    chunk: int = CHUNK,
    die: int = -1,
    after_known: Callable[[], None] = lambda: None,
) -> tuple[list[int], Manifest]:
    """What a transfer does to a destination: the chunks that were sent, and the manifest that was committed.

    `die`: after so many of them it ends without a commit.
    """
    base = image.known(disk, size, chunk, full=full)
    after_known()
    now = replace(base, digests=base.digests.copy(), fresh=False)
    digest = base.digester()
    sent: list[int] = []
    for index in range(base.count):
        offset, length = base.span(index)
        data = content.get(index, b"")[:length]
        data += bytes(length - len(data)) if data else b""
        new = digest(data) if data else ZERO
        if new == base.digest(index):
            continue
        sent.append(index)
        image.intend(offset, length)
        if new == ZERO:
            image.zero(offset, length)
        else:
            image.write(offset, data)
        now.digests.put(index, new)
        image.settle(now, index, 1)
        if len(sent) == die:
            return sent, now
    image.flush()
    image.commit(now)
    return sent, now


def holds(path: Path, content: dict[int, bytes], size: int = SIZE) -> bool:
    """Whether the file is `content`, and zeros elsewhere."""
    if path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        for index in range(-(-size // CHUNK)):
            length = min(CHUNK, size - index * CHUNK)
            data = file.read(length)
            if data != content.get(index, b"").ljust(length, b"\0")[:length]:
                return False
    return True


def put(image: Destination, base: Manifest, index: int, data: bytes) -> None:
    """Write a chunk, as a transfer does."""
    now = replace(base, digests=base.digests.copy())
    image.intend(index * CHUNK, CHUNK)
    image.write(index * CHUNK, data)
    now.digests.put(index, base.digester()(data))
    image.settle(now, index, 1)


def dies_after_writing(path: Path, index: int, data: bytes) -> None:
    """A run that ends without a commit."""
    with Image(path) as image:
        put(image, image.known("id", SIZE, CHUNK, full=False), index, data)
