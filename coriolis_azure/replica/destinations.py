"""Where disks are written to: the interfaces that a transfer and a verification know."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, runtime_checkable

from .grains import Grains
from .manifest import Manifest
from .medium import Readable

Content = bytes | bytearray | memoryview


class Destination(Protocol):
    """One disk being written. A context manager; leaving it is `close`.

    One thread calls `known` first. Then several at a time may call `intend`, `write`, `zero` and `read`: in
    any order of offsets, but no byte is written twice in a run, and each write lies within a range that
    `intend` was told of before. When all of them are done, one thread calls `flush`, then `commit`, then
    `close`. A run that fails is closed without `commit`. Whatever goes wrong is DestinationFailed with disk
    and offset.
    """

    @property
    def readable(self) -> bool:
        """Whether `read` gives back what is there; without it there is no patching and no verifying."""

    @property
    def checkable(self) -> bool:
        """Where it is not readable: whether `check` has something to ask, and somebody to ask it."""

    @property
    def far(self) -> bool:
        """Whether each call waits for another host: many are made at a time, and none to make another smaller."""

    @property
    def grains(self) -> Grains | None:
        """Where digests of grains are kept from run to run, once `known` has been called; None where they are not."""

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What is held of the disk with the unique id `disk`, as one of `size` bytes, as far as it is known.

        A fresh manifest when nothing is known, when it was another disk, or when `full` asks for it.
        """

    def intend(self, offset: int, length: int) -> None:
        """This range is about to change. Durable on return: a crash leaves it uncertain, never wrong."""

    def write(self, offset: int, data: Content) -> None:
        """Put `data` there."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """All that had to be written of these chunks has been: they are there as `manifest` says. By one thread."""

    def read(self, offset: int, length: int) -> bytes:
        """What is there now, written or not by this run."""

    def flush(self) -> None:
        """On return all that was written survives a power loss."""

    def check(self) -> bool | None:
        """Where it is not readable: whether the other side has confirmed what this run wrote, after `flush`.

        True when it has, None when it cannot tell or there was nothing; CorruptChunk when it holds something else.
        """

    def commit(self, manifest: Manifest) -> None:
        """The destination holds exactly what `manifest` says: the next run may start from that.

        At a Place nobody sees it yet: that is up to `publish`.
        """

    def close(self) -> None:
        """Let go of it. Harmless when repeated."""

    def __enter__(self) -> Destination: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Folder(Protocol):
    """A place for the disks of a VM, ours alone while it is open. A context manager; leaving is `close`."""

    def disk(self, name: str) -> Destination:
        """The destination for the disk `name`: "os" or "data-<lun>"."""

    def names(self) -> list[str]:
        """The disks there is something of."""

    def claim(self, vm: str) -> None:
        """From now on this place is for the VM with the ARM id `vm`. InvalidInput when it is another's."""

    def reserve(self, disks: Collection[str]) -> None:
        """Take what is here of `disks` for this run. InvalidInput where it may not be written, before anything is."""

    def stop(self) -> None:
        """Whatever is under way on its disks ends soon, with DestinationFailed. From any thread."""

    def tell_removed(self, disks: Collection[str]) -> None:
        """Report, for each disk held here that is none of `disks`, that it is no longer one of the VM's."""

    def close(self) -> None:
        """Let go of the place and of its disks. Harmless when repeated."""

    def __enter__(self) -> Folder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Kept(Destination, Protocol):
    """A disk whose manifest is kept beside it."""

    def stored(self) -> Manifest:
        """What the last good run left, without changing anything; UNKNOWN where a run in place has died since.

        InvalidInput where there is no usable manifest. `read` may be called then.
        """

    def at(self, points: Sequence[str]) -> AbstractContextManager[tuple[Manifest, Readable]]:
        """The manifest and the content at the first of these points, which reach to the newest kept; of none, as it is.

        What is read is to be compared with the manifest. InvalidInput where there is nothing of it.
        """


class Points(Protocol):
    """Where a place keeps its earlier points, by labels."""

    def records(self) -> dict[str, bytes | None]:
        """The record of each point; None where it is not whole."""

    def complete(self, label: str, record: bytes) -> None:
        """The point is whole; durable on return."""

    def remove(self, label: str) -> None:
        """Delete a point, the record first; one that is not there is no error."""


@runtime_checkable
class Place(Folder, Protocol):
    """A folder that outlives runs."""

    def disk(self, name: str) -> Kept:
        """See Folder."""

    def record(self) -> bytes | None:
        """The document that says which disks belong together; None where there is none. See `sets`."""

    def keep_record(self, text: bytes) -> None:
        """Replace that document as a whole, durably."""

    def publish(self, record: bytes) -> None:
        """Replace that document and with it all images whose disks have committed: all of them, whoever dies."""

    @property
    def points(self) -> Points:
        """The earlier points that are kept."""

    def unpublished(self) -> list[str]:
        """The disks whose images are not yet what the document says, since a run has died while it published."""

    def __enter__(self) -> Place: ...
