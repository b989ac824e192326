"""The pages of a snapshot of a disk: listed in windows, with every answer checked, whichever service has the blob."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from ..errors import AzureError, Unreadable
from ..model import Json
from .pages import PAGE, Pages

Range = tuple[int, int, bool]  # start, exclusive end, whether it was cleared
WINDOW = 128 << 30  # bytes per listing: listing all of a large blob at once may time out in Azure
_SMALLEST_WINDOW = 1 << 30


class SnapshotBlob(ABC):
    """The snapshot of a disk of `size` bytes as a page blob: the disk and, in its last page, the footer of a fixed VHD.

    `snapshot` is its id, `document` what Azure says of it, if that is known already. Several threads read it.
    """

    def __init__(self, snapshot: str, size: int, document: Json | None = None) -> None:
        self.snapshot, self.size = snapshot, size
        self._document = document

    @abstractmethod
    def fill(self, offset: int, data: memoryview) -> None:
        """Fill `data` with what the disk holds from `offset` on."""

    def document(self) -> Json:
        """What Azure says of the snapshot, in the form of a managed one; asked for once."""
        if self._document is None:
            self._document = self._described()
        return self._document

    @abstractmethod
    def _described(self) -> Json:
        """What Azure says of the snapshot. Raises NotFound if it is gone."""

    @abstractmethod
    def _ranges(self, offset: int, length: int, older: SnapshotBlob | None) -> list[Range]:
        """The pages of one window, from as many answers as it takes, each of which has passed `_check`.

        With `older`, those that changed since.
        """

    def pages(self) -> Pages:
        """The allocated pages of the disk. Raises Unreadable if the list is not complete or not Azure's."""
        pages = Pages((start, end) for start, end, _ in self._listed(None))
        if pages.is_empty(self.size, PAGE):
            raise Unreadable("the list of pages ends before the footer of the disk")
        return pages

    def changes(self, older: SnapshotBlob) -> tuple[Pages, Pages]:
        """The pages that were written and those that were cleared since `older`, a snapshot of the same blob.

        A page that was written again with equal content counts as written. Raises Unreadable for a list that Azure
        would not give, AzureError if it does not compare these two.
        """
        written, cleared, both = Pages(), Pages(), Pages()
        for start, end, is_cleared in self._listed(older):
            both.append(start, end)  # all of them are in order
            (cleared if is_cleared else written).append(start, end)
        return written, cleared

    def _listed(self, older: SnapshotBlob | None) -> Iterator[Range]:
        """Yield the pages of the blob in windows, in order; with `older`, those that changed since."""
        at, window, end = 0, WINDOW, self.size + PAGE
        while at < end:
            length = min(window, end - at)
            try:
                ranges = self._ranges(at, length, older)
            except AzureError as error:
                if error.code != "OperationTimedOut" or window <= _SMALLEST_WINDOW:
                    raise
                window //= 2
                continue
            if any(not at <= start < stop <= at + length for start, stop, _ in ranges):
                raise Unreadable("the list of pages goes beyond what was asked for")
            yield from ranges
            at += length

    def _check(self, response: Any) -> None:
        """Raise Unreadable if an answer cannot be about this blob, or is by a service that may not know our request."""
        headers = response.http_response.headers
        if response.http_response.status_code != 200:
            return
        if headers.get("x-ms-blob-content-length") != str(self.size + PAGE):
            raise Unreadable("the list of pages is of a blob of another size")
        version = response.http_request.headers.get("x-ms-version")
        if headers.get("x-ms-version") != version:
            raise Unreadable(f"the list of pages was not made by version {version} of the service")
