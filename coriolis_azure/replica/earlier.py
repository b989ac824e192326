"""Reads a disk at an earlier point in time, through what that point and all newer ones have kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from ..errors import DestinationFailed
from . import undo
from .documents import Documents
from .manifest import Manifest
from .medium import Medium, Past, Readable


class _Missing:
    """An image that does not exist."""

    size = 0

    def read(self, offset: int, length: int) -> bytes:
        """Raise DestinationFailed."""
        raise DestinationFailed(f"the image is missing: no {length} bytes at offset {offset}", offset=offset)


@contextmanager
def disk_at(
    medium: Medium, documents: Documents, points: Sequence[str], stored: Callable[[], Manifest]
) -> Iterator[tuple[Manifest, Readable]]:
    """The manifest and the content of a disk at an earlier point. See Persistent.at.

    `points`: the label of that point, and those of all newer ones. `stored`: the manifest of the disk as it is now.
    """
    manifest: Manifest | None = None
    disk: Readable | None = None
    logs: list[tuple[Past, Manifest]] = []
    with ExitStack() as opened:
        for point in points:
            past = opened.enter_context(closing(medium.past(point)))
            then = documents.manifest_at(point, past)
            if then is None:
                continue  # the disk did not change before the next newer point
            manifest = manifest or then
            disk = past.open("image")
            if disk is not None:
                break  # a snapshot needs nothing of newer points
            logs.append((past, then))
        if manifest is None:
            manifest = stored()
        if disk is None:
            medium.share()
            disk = medium.open("image") or _Missing()
        for past, then in reversed(logs):
            disk = undo.over(past, disk, then)
        yield manifest, disk
