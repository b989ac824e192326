"""Runs that bring a destination from one content to another, at each kind of place."""

from __future__ import annotations

from typing import Any

from coriolis_azure.events import Report, silent
from harness.image_runs import bring
from harness.replicas import BlobPlace, FilePlace

CHUNK = 65536
SIZE = (2 << 20) + 3 * CHUNK + 512  # a short last chunk
LAST = SIZE // CHUNK
A, B = b"A" * CHUNK, b"B" * CHUNK
Place = FilePlace | BlobPlace


def run(
    place: Place,
    content: dict[int, bytes],
    *,
    size: int = SIZE,
    disk: str = "id",
    report: Report = silent,
    full: bool = False,
    die: int = -1,
    **options: Any,
) -> list[int]:
    """What a run does: make the place hold `content` (by chunk, else zeros). The chunks that were sent.

    `die`: after so many of them the run ends without a commit.
    """
    with place.open(report, **options) as image:
        sent, _ = bring(image, content, size=size, disk=disk, full=full, chunk=CHUNK, die=die)
    return sent


def expected(content: dict[int, bytes], size: int = SIZE) -> bytes:
    return b"".join(content.get(i, b"").ljust(CHUNK, b"\0") for i in range(-(-size // CHUNK)))[:size]
