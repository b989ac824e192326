"""Runs that bring a destination from one content to another, at each kind of place."""

from __future__ import annotations

from dataclasses import replace

from coriolis_azure.events import silent
from coriolis_azure.replica.manifest import ZERO
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
    size=SIZE,
    disk="id",
    report=silent,
    full=False,
    die=-1,
    **options,
):
    """What a run does: make the place hold `content` (by chunk, else zeros). The chunks that were sent.

    `die`: after so many of them the run ends without a commit.
    """
    sent: list[int] = []
    with place.open(report, **options) as image:
        base = image.known(disk, size, CHUNK, full=full)
        now = replace(base, digests=base.digests.copy(), fresh=False)
        digest = base.digester()
        for index in range(base.count):
            offset, length = base.span(index)
            data = content.get(index, b"").ljust(length, b"\0")[:length] if index in content else b""
            new = digest(data) if data else ZERO
            if new == base.digest(index):
                continue
            image.intend(offset, length)
            if new == ZERO:
                image.zero(offset, length)
            else:
                image.write(offset, data)
            now.digests.put(index, new)
            image.settle(now, index, 1)
            sent.append(index)
            if len(sent) == die:
                return sent
        image.flush()
        image.commit(now)
    return sent


def expected(content: dict[int, bytes], size: int = SIZE) -> bytes:
    return b"".join(content.get(i, b"").ljust(CHUNK, b"\0") for i in range(-(-size // CHUNK)))[:size]
