"""Where disks are written to: one interface, and `open` that knows which kind a URL names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from ..errors import InvalidInput
from ..events import Report
from ..hashing import Manifest
from .grains import Grains
from .image import Image, ImageFolder

if TYPE_CHECKING:
    from ..storage import Storage

__all__ = [
    "Content",
    "Destination",
    "Folder",
    "Grains",
    "Image",
    "ImageFolder",
    "Kept",
    "Place",
    "open",
]

Content = bytes | bytearray | memoryview

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ("file://", "blob://")
_ELSEWHERE = re.compile(r"[^/]+:")  # what rsync, scp and others take for a host, a drive or a service
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[^/\\\x00-\x1f\x7f]*[^/\\\x00-\x1f\x7f.]")


class Destination(Protocol):
    """One disk being written. A context manager; leaving it is `close`.

    One thread calls `known` first. Then several at a time may call `expect`, `write`, `zero` and `read`: in
    any order of offsets, but no byte is written twice in a run, and each write lies within a range that
    `expect` was told of before. When all of them are done, one thread calls `flush`, then `commit`, then
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

    def known(self, disk: str, size: int, chunk: int, full: bool) -> Manifest:
        """What is held of the disk with the unique id `disk`, as one of `size` bytes, as far as it is known.

        A fresh manifest when nothing is known, when it was another disk, or when `full` asks for it.
        """

    def expect(self, offset: int, length: int) -> None:
        """This range is about to change. Durable on return: a crash leaves it uncertain, never wrong."""

    def write(self, offset: int, data: Content) -> None:
        """Put `data` there."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""

    def read(self, offset: int, length: int) -> bytes:
        """What is there now, written or not by this run."""

    def flush(self) -> None:
        """On return all that was written survives a power loss."""

    def check(self) -> bool | None:
        """Where it is not readable: whether the other side has confirmed what this run wrote, after `flush`.

        True when it has, None when it cannot tell or there was nothing; CorruptChunk when it holds something else.
        """

    def commit(self, manifest: Manifest) -> None:
        """The destination holds exactly what `manifest` says: the next run may start from that."""

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
        """What the last good run left, without changing anything; UNKNOWN where a run has died since.

        InvalidInput where there is no usable manifest. `read` may be called then.
        """


class Place(Folder, Protocol):
    """A folder that outlives runs."""

    def disk(self, name: str) -> Kept:
        """See Folder."""

    def record(self) -> bytes | None:
        """The document that says which disks belong together; None where there is none. See `sets`."""

    def keep_record(self, text: bytes) -> None:
        """Replace that document as a whole, durably."""

    def __enter__(self) -> Place: ...


def open(
    url: str, report: Report, storage: Storage | None = None, *, existing: bool = False, adopt: bool = False
) -> Place:
    """The place that `url` names: a folder by its path or file:// URL, or Blob storage.

    The latter as blob://account/container/prefix; `storage` reaches it. A folder or a container is made when it is
    missing, unless it must be `existing`. `adopt`: images in a folder that no run of ours has made are taken over.

    InvalidInput when it is no such thing, cannot be used, or is in use by another run.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        if not url:
            raise InvalidInput("the destination is empty", remedy="Give the path of a folder.")
        if _ELSEWHERE.match(url):
            raise InvalidInput(
                f"{url} is no folder of this host",
                remedy="Mount the place and give its path, or give a URL that begins with "
                f"{' or '.join(_SCHEMES)}. A folder of that very name is ./{url}",
            )
        return ImageFolder(Path(url), report, existing=existing, adopt=adopt)
    parts = urlsplit(url)
    if scheme[1].lower() == "blob":
        if adopt:
            raise InvalidInput(
                "a VHD in Blob storage that no run has made cannot be adopted",
                remedy="Give another prefix, or the path of a folder.",
            )
        return _in_storage(url, report, storage, existing)
    if scheme[1].lower() != "file":
        raise InvalidInput(
            f"{scheme[0]} is no kind of destination",
            remedy=f"Give the path of a folder, or a URL that begins with {', '.join(_SCHEMES)}.",
        )
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise InvalidInput(f"{url} names no folder of this host", remedy="Give it as file:///path/of/folder.")
    return ImageFolder(Path(unquote(parts.path)), report, existing=existing, adopt=adopt)


def _in_storage(url: str, report: Report, storage: Storage | None, existing: bool) -> Place:
    if storage is None:
        raise InvalidInput(
            f"{url} is in Azure", remedy="Give the connection and the source environment (-c, -e) too."
        )
    remedy = "Give it as blob://account/container/prefix."
    account, _, rest = url.partition("://")[2].partition("/")
    container, _, prefix = unquote(rest).partition("/")
    prefix = prefix.rstrip("/")
    if not _ACCOUNT.fullmatch(account):
        raise InvalidInput(
            f"{url}: {account!r} is no name of a storage account",
            remedy=f"{remedy} The account has 3 to 24 lower-case letters and digits.",
        )
    if not _CONTAINER.fullmatch(container):
        raise InvalidInput(
            f"{url}: {container!r} is no name of a container",
            remedy=f"{remedy} The container has 3 to 63 lower-case letters, digits and single hyphens, and begins and "
            "ends with a letter or digit.",
        )
    if prefix and (len(prefix) > 900 or not all(map(_SEGMENT.fullmatch, prefix.split("/")))):
        raise InvalidInput(
            f"{url}: {prefix!r} cannot be the beginning of blob names",
            remedy=f"{remedy} No part of the prefix may be empty, end with a dot, or hold a backslash.",
        )
    from .blob import BlobFolder  # whoever writes to a folder does without the SDK and its memory

    return BlobFolder(storage, account, container, prefix, report, existing=existing)
