"""The pages of a snapshot of a disk: listed in windows, with every answer checked, whichever service has the blob."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from heapq import merge
from typing import Any

from ..errors import AzureError, Unreadable
from ..model import Json
from .pages import PAGE, Pages

WINDOW = 128 << 30  # bytes per listing: listing all of a large blob at once may time out in Azure
TIMED_OUT = "OperationTimedOut"  # a window was too large for Azure
_SMALLEST_WINDOW = 1 << 30


class SnapshotBlob(ABC):
    """The snapshot of a disk of `size` bytes as a page blob: the disk and, in its last page, the footer of a fixed VHD.

    `snapshot` is its id. Several threads read it.
    """

    def __init__(self, snapshot: str, size: int) -> None:
        self.snapshot, self.size = snapshot, size

    @abstractmethod
    def fill(self, offset: int, data: memoryview) -> None:
        """Fill `data` with what the disk holds from `offset` on."""

    @abstractmethod
    def document(self) -> Json:
        """What Azure says of the snapshot, in the form of a managed one."""

    @abstractmethod
    def _listed(self, offset: int, length: int, older: SnapshotBlob | None) -> tuple[Pages, Pages]:
        """The pages of one window, from as many answers as it takes, each of which has passed `_check`.

        Those that hold something, and those that were cleared; with `older`, of those that changed since.
        """

    def pages(self) -> Pages:
        """The allocated pages of the disk. Raises Unreadable if the list is not complete or not Azure's."""
        pages = Pages()
        for _, _, window in self.windows():
            for start, length in window:
                pages.append(start, start + length)
        return pages

    def windows(self) -> Iterator[tuple[int, int, Pages]]:
        """Yield the allocated pages window by window, with offset and length of each. Raises what `pages` raises."""
        offset, window = 0, Pages()
        for offset, length, window, _ in self._windows(None):
            yield offset, length, window
        if window.is_empty(self.size, PAGE):
            raise Unreadable("the list of pages ends before the footer of the disk")

    def changes(self, older: SnapshotBlob) -> tuple[Pages, Pages]:
        """The pages that were written and those that were cleared since `older`, a snapshot of the same blob.

        A page that was written again with equal content counts as written. Raises Unreadable for a list that Azure
        would not give, AzureError if it does not compare these two.
        """
        written, cleared, both = Pages(), Pages(), Pages()
        for _, _, *window in self._windows(older):
            for start, length in merge(*window):
                both.append(start, start + length)  # no page is in both lists
            for pages, listed in zip((written, cleared), window, strict=True):
                for start, length in listed:
                    pages.append(start, start + length)
        return written, cleared

    def _windows(self, older: SnapshotBlob | None) -> Iterator[tuple[int, int, Pages, Pages]]:
        """Yield the pages of the blob in windows, in order; with `older`, those that changed since."""
        at, window, end = 0, WINDOW, self.size + PAGE
        while at < end:
            length = min(window, end - at)
            try:
                listed = self._listed(at, length, older)
            except AzureError as error:
                if error.code != TIMED_OUT or window <= _SMALLEST_WINDOW:
                    raise
                window //= 2
                continue
            if any(
                not at <= first <= last <= at + length
                for first, last in map(Pages.span, filter(None, listed))
            ):
                raise Unreadable("the list of pages goes beyond what was asked for")
            yield at, length, *listed
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
