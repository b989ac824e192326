"""Reads a snapshot of a VHD blob in a storage account, and lists what changed since an older one.

Azure never changes a snapshot of a blob, nor its metadata: they say from the start what the snapshot is for.
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import vhd
from ..errors import NotFound
from ..model import Json
from . import names
from .blobs import Blob, Properties
from .page_lists import SnapshotBlob
from .pages import Pages


class VhdSnapshot(SnapshotBlob):
    """The content of a snapshot of the VHD of a disk of `size` bytes."""

    def __init__(self, blob: Blob, size: int) -> None:
        super().__init__(blob.url, size)
        self._blob = blob
        self._document: Json | None = None

    def fill(self, offset: int, data: memoryview) -> None:
        """See SnapshotBlob."""
        self._blob.fill(offset, data)

    def document(self) -> Json:
        """See SnapshotBlob. Asked for once; raises NotFound if the snapshot is gone."""
        if self._document is None:
            properties = self._blob.find()
            if properties is None:
                raise NotFound(f"{self.snapshot} does not exist")
            self._document = document(self._blob, properties)
        return self._document

    def _listed(self, offset: int, length: int, older: SnapshotBlob | None) -> tuple[Pages, Pages]:
        if older is not None and not isinstance(older, VhdSnapshot):
            raise TypeError(f"a snapshot of a VHD is not compared with {type(older).__name__}")
        since = older._blob.snapshot if older is not None else ""
        return self._blob.listed(offset, length, since=since, hook=self._check)


def document(snapshot: Blob, properties: Properties) -> Json:
    """A snapshot of a blob in the form of a managed snapshot. The disk is the one that its metadata name."""
    tags = tags_of(properties.metadata)
    disk = tags.get(names.DISK_TAG, "")
    return {
        "id": snapshot.url,
        "tags": tags,
        "properties": {
            "incremental": True,
            "uniqueId": properties.etag,
            "timeCreated": snapshot.snapshot,
            "incrementalSnapshotFamilyId": disk,
            "creationData": {"sourceUniqueId": disk, "sourceResourceId": snapshot.url.partition("?")[0]},
            "diskSizeBytes": properties.size - vhd.FOOTER,
        },
    }


def metadata_of(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as the metadata of a blob, in whose names hyphens are not allowed."""
    return {name.replace("-", "_"): value for name, value in tags.items()}


def tags_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The tags in the metadata of a blob."""
    return {name.lower().replace("_", "-"): value for name, value in metadata.items()}
