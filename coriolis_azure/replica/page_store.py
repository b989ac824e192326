"""Stores in page blobs; translates AzureError into DestinationFailed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

from .. import vhd
from ..azure.blobs import MOST, PAGE, Blob, Properties
from ..azure.pages import Pages
from ..clock import Clock
from ..errors import AzureError, Conflict, DestinationFailed, InvalidInput
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
_WINDOW = 64 << 10  # bytes of entries that are read or written at once
_WINDOWS = 4  # in memory
_KEPT_BACK_SECONDS = 5.0


class PageStore:
    """The first `size` bytes of a page blob. See Store."""

    far = True

    def __init__(self, blob: Blob, size: int, disk: str, stopped: Callable[[], bool]) -> None:
        self.blob, self.size = blob, size
        self._disk, self._stopped = disk, stopped
        self._pages: Pages | None = None
        self._listing = Lock()  # so that not every thread lists them

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
        if len(data) % PAGE:  # the end of the disk, which is followed by zeros
            data = bytes(data) + bytes(-len(data) % PAGE)
        with translated(self.blob.url, f"cannot be written at offset {offset}", self._disk, offset):
            if len(data) <= MOST:  # without a slice, which would be copied
                self.blob.write(offset, data)
                return
            view = memoryview(data)
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
        with self._listing:
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


class EntryStore(PageStore):
    """Short entries in a page blob that only this object writes: a window of it is read and written at once. See Store.

    What was written is kept back for some seconds, or until `flush`. `blank`: whether the blob was just made, and holds
    zeros.
    """

    def __init__(
        self,
        blob: Blob,
        size: int,
        disk: str,
        stopped: Callable[[], bool],
        clock: Clock,
        *,
        blank: bool,
    ) -> None:
        super().__init__(blob, size, disk, stopped)
        self._clock = clock
        self._lock = Lock()
        self._windows: dict[int, bytearray] = {}  # by offset, the one that was used last at the end
        self._changed = set[int]()
        self._blank = 0 if blank else size  # from here on, nothing was ever written
        self._written = clock.monotonic()

    def read(self, offset: int, length: int) -> bytes:
        """See Store."""
        if length > _WINDOW:
            self.flush()
            return super().read(offset, length)
        with self._lock:
            return b"".join(
                self._window(start)[low - start : high - start]
                for start, low, high in self._parts(offset, length)
            )

    def write(self, offset: int, data: Content) -> None:
        """See Store."""
        view = memoryview(data)
        with self._lock:
            for start, low, high in self._parts(offset, len(view)):
                self._window(start)[low - start : high - start] = view[low - offset : high - offset]
                self._changed.add(start)
            due = self._clock.monotonic() - self._written > _KEPT_BACK_SECONDS
        if due:
            self.flush()

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """See Store."""
        self.flush()
        yield from super().extents(offset, length)

    def flush(self) -> None:
        """See Store."""
        with self._lock:
            for start in sorted(self._changed):
                self._put(start)
            self._written = self._clock.monotonic()

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The parts of a range by windows: offset of the window, first byte, exclusive end."""
        end = offset + length
        for start in range(offset // _WINDOW * _WINDOW, end, _WINDOW):
            yield start, max(offset, start), min(end, start + _WINDOW)

    def _window(self, start: int) -> bytearray:
        """The window at this offset. The lock is held."""
        window = self._windows.pop(start, None)
        if window is None:
            if len(self._windows) >= _WINDOWS:
                oldest = next(iter(self._windows))
                if oldest in self._changed:
                    self._put(oldest)
                del self._windows[oldest]
            length = min(_WINDOW, self.size - start)
            window = bytearray(super().read(start, length) if start < self._blank else length)
            self._blank = max(self._blank, start + length)
        self._windows[start] = window
        return window

    def _put(self, start: int) -> None:
        """Write a window that has changed. The lock is held."""
        super().write(start, self._windows[start])
        self._changed.discard(start)


class EntryBlob:
    """Entries in a page blob, which is found or made when it is first needed. See Entries.

    It is not leased: an entry that a run without the place still writes proves itself like any other. `image`: gives
    the metadata that shows that the blob is ours.
    """

    def __init__(
        self,
        blob: Blob,
        disk: str,
        stopped: Callable[[], bool],
        clock: Clock,
        image: Callable[[], dict[str, str]],
    ) -> None:
        self._blob, self._disk, self._stopped, self._clock, self._image = blob, disk, stopped, clock, image
        self._lock = Lock()
        self._size = 0
        self._absent = False
        self._store: EntryStore | None = None

    def discard(self) -> None:
        """See Entries. They are replaced when the first new one is written."""
        self._absent = True

    def open(self, size: int) -> None:
        """See Entries."""
        self._size = size

    def read(self, offset: int, length: int) -> bytes:
        """See Entries."""
        store = self._opened(make=False)
        return store.read(offset, length) if store is not None else b""

    def write(self, offset: int, data: bytes) -> None:
        """See Entries."""
        store = self._opened(make=True)
        if store is not None:
            store.write(offset, data)

    def close(self) -> None:
        """See Entries."""
        store, self._store, self._absent = self._store, None, False
        if store is not None:
            store.flush()

    def delete(self) -> None:
        """Delete the blob if it is ours."""
        found = self._blob.find()
        if found is not None and self._is_ours(found):
            self._blob.delete()

    def _opened(self, *, make: bool) -> EntryStore | None:
        """The store; None if there is no blob, and none is to be made. Raises InvalidInput if it is not ours."""
        with self._lock:
            if self._store is None and not self._absent:
                found = self._blob.find()
                self._absent = found is None
                if found is not None:
                    self._refuse_other(found)
                    if found.size != self._pages:
                        self._blob.resize(self._pages)
                    self._store = self._as_store(blank=False)
            if self._store is None and make:
                self._create()
                self._store = self._as_store(blank=True)
            return self._store

    @property
    def _pages(self) -> int:
        """The size in whole pages."""
        return self._size + -self._size % PAGE

    def _as_store(self, *, blank: bool) -> EntryStore:
        return EntryStore(self._blob, self._size, self._disk, self._stopped, self._clock, blank=blank)

    def _create(self) -> None:
        """Create the blob, with zeros. One of ours is replaced."""
        try:
            self._blob.create_pages(self._pages, self._image(), new=True)
        except Conflict:
            if (found := self._blob.find()) is not None:
                self._refuse_other(found)
            self._blob.create_pages(self._pages, self._image())

    def _refuse_other(self, found: Properties) -> None:
        if not self._is_ours(found):
            raise InvalidInput(f"{self._blob.url} was not made by this program")

    def _is_ours(self, found: Properties) -> bool:
        return found.kind == "PageBlob" and self._image().keys() <= found.metadata.keys()


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


def downloaded(blob: Blob) -> IO[bytes] | None:
    """The content of a blob in a temporary file without a name; None if it does not exist."""
    with contextlib.ExitStack() as failing:
        file = failing.enter_context(unnamed())
        if not blob.read_into(file):
            return None
        file.seek(0)
        failing.pop_all()
        return file


def unnamed() -> IO[bytes]:
    """A temporary file without a name, for a document that may be too large for memory."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise DestinationFailed(
            f"no temporary file can be created: {error}",
            remedy="Free space in the folder for temporary files, or set TMPDIR to another one, then run again.",
        ) from error
