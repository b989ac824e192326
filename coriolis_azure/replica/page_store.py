"""Stores in page blobs; translates AzureError into DestinationFailed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

from .. import vhd
from ..azure.blobs import MOST, PAGE, Blob
from ..azure.pages import Pages
from ..clock import Clock
from ..errors import AzureError, DestinationFailed
from ..threads import Lock
from .medium import Content, Store

_LOST = (
    "LeaseIdMissing",
    "LeaseIdMismatchWithBlobOperation",
    "LeaseLost",
    "LeaseNotPresentWithBlobOperation",
    "LeaseIdMismatchWithLeaseOperation",
    "LeaseNotPresentWithLeaseOperation",
    "ConditionNotMet",
)
_BUFFER = 4096  # bytes of an index that are written at once
_BUFFERS = 16
_BUFFER_SECONDS = 5.0


class PageStore:
    """The first `size` bytes of a page blob. See Store."""

    def __init__(self, blob: Blob, size: int, disk: str, stopped: Callable[[], bool]) -> None:
        self.blob, self.size = blob, size
        self._disk, self._stopped = disk, stopped
        self._pages: Pages | None = None

    def read(self, offset: int, length: int) -> bytes:
        """See Store."""
        self._go_on(offset)
        start = offset // PAGE * PAGE
        before, whole = offset - start, offset - start + length
        with translated(self.blob.url, f"cannot be read at offset {offset}", self._disk, offset):
            data = self.blob.read(start, whole + -whole % PAGE)
        if len(data) < whole:
            raise DestinationFailed(
                f"{self.blob.url} ends at offset {start + len(data)}", disk=self._disk, offset=offset
            )
        return data if len(data) == length else data[before:whole]

    def write(self, offset: int, data: Content) -> None:
        """See Store."""
        self._go_on(offset)
        self._pages = None
        view = memoryview(data)
        if len(view) % PAGE:  # the end of the disk, which is followed by zeros
            view = memoryview(bytes(view) + bytes(-len(view) % PAGE))
        with translated(self.blob.url, f"cannot be written at offset {offset}", self._disk, offset):
            for start in range(0, len(view), MOST):
                self.blob.write(offset + start, view[start : start + MOST])

    def zero(self, offset: int, length: int) -> None:
        """Clear the pages. See Store."""
        self._go_on(offset)
        self._pages = None
        with translated(self.blob.url, f"cannot be cleared at offset {offset}", self._disk, offset):
            self.blob.clear(offset, length + -length % PAGE)

    def reflink(self, source: Store, offset: int, length: int) -> bool:
        """See Store."""
        del source, offset, length
        return False

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the allocated pages. See Store."""
        pages = self._pages
        if pages is None:
            with translated(self.blob.url, "cannot be read", self._disk):
                pages = self._pages = self.blob.pages(self.size + -self.size % PAGE)
        yield from pages.within(offset, length)

    def resize(self, size: int) -> None:
        """See Store. At every moment, only zeros follow the end of the disk."""
        with translated(self.blob.url, "cannot be resized", self._disk):
            start, end = min(self.size, size), vhd.rounded(self.size)
            start += -start % PAGE
            if start < end:
                self.blob.clear(start, end - start)
            self.blob.resize(vhd.rounded(size) + vhd.FOOTER)
        self.size, self._pages = size, None

    def flush(self) -> None:
        """Do nothing: what Azure has confirmed is durable. See Store."""

    @contextlib.contextmanager
    def uncached(self) -> Iterator[Callable[[int, int], Content]]:
        """See Store. Nothing is cached on this host."""
        yield self.read

    def _go_on(self, offset: int) -> None:
        if self._stopped():
            raise DestinationFailed(f"work on {self.blob.url} was stopped", disk=self._disk, offset=offset)


class IndexStore(PageStore):
    """The index of a draft in a page blob. Its short entries are collected and written together. See Store."""

    def __init__(self, blob: Blob, size: int, disk: str, stopped: Callable[[], bool], clock: Clock) -> None:
        super().__init__(blob, size, disk, stopped)
        self._clock = clock
        self._lock = Lock()
        self._buffers: dict[int, bytearray] = {}
        self._written = clock.monotonic()

    def read(self, offset: int, length: int) -> bytes:
        """See Store."""
        self.flush()
        return super().read(offset, length)

    def write(self, offset: int, data: Content) -> None:
        """See Store."""
        view = memoryview(data)
        with self._lock:
            while view:
                start = offset // _BUFFER * _BUFFER
                if start not in self._buffers:
                    self._buffers[start] = bytearray(PageStore.read(self, start, self._length(start)))
                part = view[: start + _BUFFER - offset]
                self._buffers[start][offset - start : offset - start + len(part)] = part
                offset, view = offset + len(part), view[len(part) :]
            due = self._clock.monotonic() - self._written > _BUFFER_SECONDS
        if due or len(self._buffers) >= _BUFFERS:
            self.flush()

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """See Store."""
        self.flush()
        yield from super().extents(offset, length)

    def flush(self) -> None:
        """See Store."""
        with self._lock:
            for start, buffer in self._buffers.items():
                super().write(start, buffer)
            self._buffers, self._written = {}, self._clock.monotonic()

    def _length(self, start: int) -> int:
        return min(_BUFFER, self.size - start)


@contextlib.contextmanager
def translated(url: str, what: str, disk: str, offset: int | None = None) -> Iterator[None]:
    """Raise an AzureError of the block as DestinationFailed."""
    try:
        yield
    except AzureError as error:
        remedy = error.remedy
        if error.code in _LOST:
            remedy = "Find out who else uses this blob: its lease was broken or taken over. Then run again."
        raise DestinationFailed(
            f"{url} {what}: {error}", remedy=remedy, disk=disk, offset=offset, code=error.code or None
        ) from error


def unnamed() -> IO[bytes]:
    """A temporary file without a name, for a document that may be too large for memory."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise DestinationFailed(
            f"no temporary file can be created: {error}",
            remedy="Free space in the folder for temporary files, or set TMPDIR to another one, then run again.",
        ) from error
