"""A disk at an earlier point in time: a snapshot of its VHD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from ..azure.blobs import Blob
from ..errors import DestinationFailed
from .medium import PastPart
from .page_store import PageStore, downloaded, translated, unnamed

POINT, SNAPSHOT = "coriolis_point", "coriolis_snapshot"
SIZE = "coriolis_size"  # metadata: the size of the disk, in bytes


class VhdPast:
    """A disk at an earlier point in time: a snapshot of the VHD `image`. See Past. `manifest`: its manifest's blob."""

    def __init__(self, image: Blob, size: int, manifest: Blob, point: str) -> None:
        self._image, self._size = image, size
        self._manifest, self._point = manifest, point
        self._disk = image.name.rpartition("/")[2].removesuffix(".vhd")
        self._snapshot = ""

    def snapshot(self) -> bool:
        """See Past."""
        with translated(self._image.url, "cannot be snapshotted", self._disk):
            taken = self._image.take_snapshot({POINT: self._point, SIZE: str(self._size)})
        self._snapshot = taken.snapshot
        return True

    def open(self, part: PastPart) -> PageStore | None:
        """See Past."""
        if part != "image":
            return None
        with translated(self._manifest.url, "cannot be read", self._disk):
            found = self._manifest.find()
            if found is None:
                return None
            blob = self._image.at(found.metadata.get(SNAPSHOT, ""))
            snapshot = blob.find() if blob.snapshot else None
        size = snapshot.metadata.get(SIZE, "") if snapshot is not None else ""
        if not size.isdigit():
            raise DestinationFailed(f"the snapshot of {self._image.url} is gone", disk=self._disk)
        return PageStore(blob, int(size), self._disk, lambda: False)

    def make(self, part: PastPart, size: int) -> PageStore:
        """Never called: a snapshot needs no other part. See Past."""
        raise NotImplementedError

    def load(self) -> IO[bytes] | None:
        """See Past."""
        with translated(self._manifest.url, "cannot be read", self._disk):
            return downloaded(self._manifest)

    def save(self, pieces: Iterable[bytes]) -> None:
        """See Past."""
        with unnamed() as file, translated(self._manifest.url, "cannot be written", self._disk):
            file.writelines(pieces)
            file.seek(0)
            self._manifest.put(file)
            self._manifest.set_metadata({SNAPSHOT: self._snapshot})

    def close(self) -> None:
        """See Past."""
