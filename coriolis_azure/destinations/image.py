"""Raw images: sparse files, one a disk, or block devices, and the state beside them.

Beside `os.raw` stand `os.raw.manifest`, what the image holds, with the size, mtime and inode the file had
then, and, during a run and after one that died, `os.raw.dirty`, the regions of 64 MiB the run was to write.

The rule: *a chunk outside of the dirty regions holds what the manifest says.* Each step keeps it, whether the
process is killed or the power fails after it:

* Write: the region is in `dirty`, durably, before its first byte changes. After a crash, the chunks of dirty
  regions are read again: the image itself is the truth, and the price is local reads.
* Commit: content to the medium; then the manifest is replaced as a whole, durably; then `dirty` goes. Dying
  before the replacement leaves the older manifest with all regions dirty that differ from it, dying after it
  the new one with regions that need not have been.
* Resize: what is cut off or added is written to `dirty` first, like any change.
* Anew: the manifest is removed, durably, then `dirty`, then the content. Dying in between leaves an image
  without a manifest, which is read as a whole.
* The file is not as the manifest knew it (copied, edited, restored): it is read as a whole. While `dirty`
  exists, our own writes explain another mtime, so then only the inode counts.

`os.raw.grains` is not part of the state: it saves reading, and is not believed. See `grains`.

Our mtime is taken after fsync; a stranger's write within the same tick of the file system's clock, a few
milliseconds, is not seen. A block device has no mtime to tell of strangers' writes; without a manifest
nothing is known of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import DestinationFailed, InvalidInput
from ..events import Notice, Report, Step, silent
from ..hashing import UNKNOWN, ZERO, Manifest, grain_count
from ..pipeline import Lock, ordered
from . import sets
from .grains import Grains

REGION = 64 << 20
_HEADER = f"dirty regions of {REGION} bytes\n"
_RECORD = re.compile(rb"[0-9a-f]{12}\n")
_ZEROS = bytes(1 << 20)
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_DISK = re.compile(r"os|data-[0-9]{1,3}")
_REMEDIES = {
    errno.ENOSPC: "Free space at the destination, then run again: what had arrived is kept.",
    errno.EDQUOT: "Raise the quota at the destination, then run again: what had arrived is kept.",
    errno.EFBIG: "Use a file system and a file size limit that allow files as large as the disk.",
    errno.EROFS: "Make the destination writable, then run again.",
    errno.EACCES: "Give this user the right to read and write the destination, then run again.",
    errno.EPERM: "Give this user the right to read and write the destination, then run again.",
    errno.EIO: "Check the health of the medium under the destination, then run again.",
}


@dataclass(frozen=True)
class _Kept:
    """What the state beside an image says: the manifest and how the file was then."""

    manifest: Manifest
    stamp: dict[str, int]


class Image:
    """One raw image: a Destination. Nothing is opened or made before it is used.

    `path` is a file, made when it is missing, or a block device of at least the disk's size.
    """

    readable = True
    far = False

    def __init__(self, path: Path, report: Report = silent) -> None:
        self.path = path
        self.name = path.name.removesuffix(".raw")
        self._manifest_path = path.with_name(path.name + ".manifest")
        self._dirty_path = path.with_name(path.name + ".dirty")
        self.grains = Grains(path.with_name(path.name + ".grains"))
        self._report = report
        self._fd = -1
        self._dirty_fd = -1
        self._block = False
        self._holes = True
        self._expected: set[int] = set()
        self._lock = Lock()
        self._stopped = False

    # What it holds

    def known(self, disk: str, size: int, chunk: int, full: bool) -> Manifest:
        """What the image holds, as a disk of `size` bytes; it has that size then. See Destination."""
        with self._translated("cannot be opened"):
            self._open(os.O_RDWR | os.O_CREAT)
            found = self._size()
        if self._block and found < size:
            raise InvalidInput(
                f"{self.path} has {found} bytes, the disk has {size}",
                remedy="Give a device that is large enough.",
            )
        with self._translated("cannot be prepared"):
            kept = self._kept()
            if kept is not None and disk and kept.manifest.disk and kept.manifest.disk != disk:
                self._report(Notice(f"{self.path} held another disk of that name; it is written anew"))
                full = True
            anew = full or (found == 0 and not self._block)
            if anew:
                self.grains.forget()
            self.grains.open(grain_count(chunk))
            return self._anew(disk, size, chunk) if anew else self._as_found(kept, disk, size, chunk)

    def stored(self) -> Manifest:
        """What the last good run said the image holds; what a dead run was writing since then is UNKNOWN.

        Nothing is changed. InvalidInput where there is no usable state.
        """
        with self._translated("cannot be read"):
            if self._fd < 0:
                self._open(os.O_RDONLY)
            kept = self._kept()
            if kept is None:
                raise InvalidInput(
                    f"there is no usable {self._manifest_path}", remedy="Replicate to this destination first."
                )
            regions = self._dirty()
            found, said = self._size(), kept.manifest.size
        if regions == set() and (found < said if self._block else found != said):
            raise DestinationFailed(
                f"{self.path} has {found} bytes, its manifest is of {said}",
                disk=self.name,
                offset=min(found, said),
            )
        return _forget(kept.manifest, self._chunks(kept.manifest, regions))

    def _as_found(self, kept: _Kept | None, disk: str, size: int, chunk: int) -> Manifest:
        """Go on with the content there is."""
        regions = self._dirty()
        if kept is None and self._block:
            return self._keep(Manifest.new(size, chunk, disk, UNKNOWN))
        base = self._trusted(kept, regions, chunk)
        unsure: Iterable[int]
        if base is None:
            base = Manifest.new(min(size, self._size()), chunk, disk, UNKNOWN)
            unsure = range(base.count)
        else:
            unsure = self._chunks(base, regions)
        base = replace(self._reread(base, unsure), disk=disk or base.disk, fresh=False)
        resized = self._resize(base, size)
        clean = kept is not None and regions == set() and resized == kept.manifest
        return resized if clean else self._keep(resized)

    def _trusted(self, kept: _Kept | None, regions: set[int] | None, chunk: int) -> Manifest | None:
        """The kept manifest where it still speaks of this content, as a disk of the file's size; or None."""
        if kept is None:
            self._report(Notice(f"{self.path} has no usable state beside it; it is read as a whole"))
            return None
        interrupted = regions != set()
        now = self._stamp()
        same = now["inode"] == kept.stamp["inode"] if interrupted else now == kept.stamp
        if not same:
            self._report(Notice(f"{self.path} was changed since the last run; it is read as a whole"))
            return None
        if regions is None:
            self._report(Notice(f"{self._dirty_path} is damaged; {self.path} is read as a whole"))
            return None
        if kept.manifest.chunk != chunk:
            self._report(Notice(f"the chunk size has changed; {self.path} is read as a whole"))
            return None
        if interrupted:
            self._report(Notice(f"the last run to {self.path} did not end well; what it wrote is read again"))
        # Where the size differs a run died while resizing, and all that it cut off or added is dirty.
        return kept.manifest if self._block else kept.manifest.resized(self._size(), UNKNOWN)

    def _anew(self, disk: str, size: int, chunk: int) -> Manifest:
        """Forget the content: a file of holes; of a device, which keeps what it had, nothing is known."""
        self._unlink(self._manifest_path)
        self._unlink(self._dirty_path)
        if self._block:
            return self._keep(Manifest.new(size, chunk, disk, UNKNOWN))
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, size)
        return self._keep(Manifest.new(size, chunk, disk, ZERO))

    def _resize(self, base: Manifest, size: int) -> Manifest:
        if self._block:
            return base.resized(size, UNKNOWN)
        now = self._size()
        if now != size:
            self.expect(min(now, size), abs(now - size))
            os.ftruncate(self._fd, size)
        return base.resized(size, ZERO)

    def _reread(self, base: Manifest, indexes: Iterable[int]) -> Manifest:
        """The manifest with these chunks as they are in the image."""
        digests, digest = base.digests, base.digester()

        def read(index: int) -> tuple[int, bytes]:
            offset, length = base.span(index)
            return index, ZERO if self._is_hole(offset, length) else digest(self.read(offset, length))

        told = False
        with contextlib.closing(ordered(read, indexes, threads=2, ahead=6)) as results:
            for index, found in results:
                if not told:
                    self._report(Step("read back", self.name))
                    told, digests = True, base.digests.copy()
                digests.put(index, found)
        return replace(base, digests=digests)

    def _is_hole(self, offset: int, length: int) -> bool:
        """Whether the file system knows the range to be empty."""
        if self._block:
            return False
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO and self._size() >= offset + length

    # Content

    def expect(self, offset: int, length: int) -> None:
        """These bytes are about to change; durable on return. See Destination."""
        regions = range(offset // REGION, (offset + length - 1) // REGION + 1)
        if self._expected.issuperset(regions):
            return
        with self._lock, self._translated(f"cannot note a change at offset {offset}", offset):
            missing = [region for region in regions if region not in self._expected]
            if self._dirty_fd < 0:
                self._begin_dirty()
            _write_whole(self._dirty_fd, "".join(f"{region:012x}\n" for region in missing).encode())
            os.fdatasync(self._dirty_fd)
            self._expected.update(missing)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` there. See Destination."""
        view = memoryview(data)
        self._go_on(offset)
        with self._translated(f"cannot be written at offset {offset}", offset):
            while view:
                done = os.pwrite(self._fd, view, offset)
                offset, view = offset + done, view[done:]

    def zero(self, offset: int, length: int) -> None:
        """Make the range a hole, or zeros where there are no holes. See Destination."""
        with self._translated(f"cannot be cleared at offset {offset}", offset):
            if self._holes:
                try:
                    _punch(self._fd, offset, length)
                except OSError as error:
                    if error.errno not in _NO_HOLES:
                        raise
                    self._holes = False
                else:
                    return
        for start in range(offset, offset + length, len(_ZEROS)):
            self.write(start, memoryview(_ZEROS)[: offset + length - start])

    def read(self, offset: int, length: int) -> bytes:
        """What is there. See Destination."""
        parts = []
        self._go_on(offset)
        with self._translated(f"cannot be read at offset {offset}", offset):
            while length:
                part = os.pread(self._fd, length, offset)
                if not part:
                    raise DestinationFailed(
                        f"{self.path} ends at offset {offset}", disk=self.name, offset=offset
                    )
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stop(self) -> None:
        """Reads and writes under way are the last ones; from any thread."""
        self._stopped = True

    def _go_on(self, offset: int) -> None:
        if self._stopped:
            raise DestinationFailed(f"{self.path} was given up", disk=self.name, offset=offset)

    def flush(self) -> None:
        """Content to the medium, and out of the cache: reading back reads the medium. See Destination."""
        with self._translated("cannot be flushed"):
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self) -> bool | None:
        """None: an image is read back. See Destination."""
        return None

    def commit(self, manifest: Manifest) -> None:
        """The image holds what `manifest` says. See Destination."""
        with self._translated("cannot be committed"):
            self._keep(manifest)

    def close(self) -> None:
        """Close the files. See Destination."""
        for fd in (self._fd, self._dirty_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._dirty_fd = -1
        self._expected = set()
        self.grains.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The state beside it

    def _keep(self, manifest: Manifest) -> Manifest:
        """Make `manifest` what the next run starts from: content, then manifest, then the end of `dirty`."""
        os.fsync(self._fd)
        new = self._manifest_path.with_name(self._manifest_path.name + ".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for text in manifest.text({"image": self._stamp()}):
                _write_whole(fd, text)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, self._manifest_path)  # noqa: PTH105  (beside os.fsync: the steps of this module)
        self._sync_folder()
        if self._dirty_fd >= 0:
            os.close(self._dirty_fd)
            self._dirty_fd = -1
        self._expected = set()
        self._unlink(self._dirty_path)
        return manifest

    def _kept(self) -> _Kept | None:
        """What stands beside the image; None where there is nothing of use."""
        try:
            with self._manifest_path.open("rb") as file:
                manifest, document = Manifest.read(file)
            stamp = document["image"]
            if not all(type(stamp[name]) is int for name in ("size", "mtime_ns", "inode")):
                raise TypeError
        except FileNotFoundError:
            return None
        except InvalidInput as error:
            self._report(Notice(f"{self._manifest_path} is not used: {error.message}"))
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            self._report(Notice(f"{self._manifest_path} is damaged and not used"))
            return None
        return _Kept(manifest, stamp)

    def _begin_dirty(self) -> None:
        """Open `dirty` to append; it exists durably then. One of a dead run is taken up as it is."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._dirty_fd = os.open(self._dirty_path, flags, 0o600)
        if os.fstat(self._dirty_fd).st_size == 0:
            _write_whole(self._dirty_fd, _HEADER.encode())
        os.fdatasync(self._dirty_fd)
        self._sync_folder()

    def _dirty(self) -> set[int] | None:
        """The regions a dead run was about to write; None when all must be taken for such."""
        try:
            raw = self._dirty_path.read_bytes()
        except FileNotFoundError:
            return set()
        records = raw[len(_HEADER) :].splitlines(keepends=True)
        if not raw.startswith(_HEADER.encode()) or not all(map(_RECORD.fullmatch, records)):
            return None
        return {int(record, 16) for record in records}

    def _chunks(self, manifest: Manifest, regions: set[int] | None) -> Iterator[int]:
        """The chunks that touch these regions; all of them for None."""
        if regions is None:
            yield from range(manifest.count)
            return
        last = -1
        for region in sorted(regions):
            first = max(last + 1, region * REGION // manifest.chunk)
            last = max(last, min(manifest.count, -(-(region + 1) * REGION // manifest.chunk)) - 1)
            yield from range(first, last + 1)

    def _open(self, flags: int) -> None:
        self.close()
        self._fd = os.open(self.path, flags, 0o600)
        kind = os.fstat(self._fd).st_mode
        self._block = stat.S_ISBLK(kind)
        if not self._block and not stat.S_ISREG(kind):
            raise InvalidInput(f"{self.path} is neither a file nor a block device")

    def _size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END) if self._block else os.fstat(self._fd).st_size

    def _stamp(self) -> dict[str, int]:
        """What shows that a file is still the one it was; of a device only its size does."""
        if self._block:
            return {"size": self._size(), "mtime_ns": 0, "inode": 0}
        now = os.fstat(self._fd)
        return {"size": now.st_size, "mtime_ns": now.st_mtime_ns, "inode": now.st_ino}

    def _unlink(self, path: Path) -> None:
        """Remove a file, durably."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
            self._sync_folder()

    def _sync_folder(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _translated(self, what: str, offset: int | None = None) -> Iterator[None]:
        """An OSError in the block is DestinationFailed."""
        try:
            yield
        except OSError as error:
            raise DestinationFailed(
                f"{self.path} {what}: {error.strerror}",
                remedy=_REMEDIES.get(error.errno or 0),
                disk=self.name,
                offset=offset,
            ) from error


def _unusable(path: Path, error: OSError) -> InvalidInput:
    """Why a folder cannot be a destination."""
    remedies = {
        errno.ENOENT: "Give a folder that is there.",
        errno.ENOTDIR: "Give a folder: a file of that name, or of one above it, is in the way.",
        errno.EEXIST: "Give a folder: a file of that name is in the way.",
        errno.EACCES: f"Give this user the right to read and write {path}, or give another folder.",
        errno.EPERM: f"Give this user the right to read and write {path}, or give another folder.",
        errno.EROFS: "Give a folder on a file system that is not mounted read-only.",
        errno.ENOSPC: "Free space at the destination, or give another folder.",
        errno.EDQUOT: "Raise the quota at the destination, or give another folder.",
    }
    return InvalidInput(
        f"{path} cannot be used as a destination: {error.strerror}",
        remedy=remedies.get(error.errno or 0, "Give another folder."),
    )


class ImageFolder:
    """A folder of images, `os.raw` and `data-<lun>.raw`, ours alone while it is open. A destinations.Folder.

    The folder is made when it is missing, unless it must be `existing`. InvalidInput when it cannot be used or
    another run uses it.
    """

    def __init__(self, path: Path, report: Report = silent, *, existing: bool = False) -> None:
        self.path = path
        self._report = report
        self._opened: list[Image] = []
        self._lock_fd = -1
        try:
            if not existing:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise InvalidInput(
                f"another run is using {path}", remedy="Wait for it to end, or give another folder."
            ) from error
        except OSError as error:
            self.close()
            raise _unusable(path, error) from error

    def disk(self, name: str) -> Image:
        """The image of the disk `name`: "os" or "data-<lun>"."""
        if not _DISK.fullmatch(name):
            raise InvalidInput(f"{name!r} is no name of a disk", remedy="Use os, or data-<lun>.")
        image = Image(self.path / f"{name}.raw", self._report)
        self._opened.append(image)
        return image

    def claim(self, vm: str) -> None:
        """Keep whose images these are, and refuse another VM's: they would be overwritten."""
        owner = self.path / ".vm"
        try:
            found = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.exists() else ""
            if not found:
                new = owner.with_name(".vm.new")  # whoever dies here leaves all of it or nothing
                new.write_text(vm + "\n", encoding="utf-8")
                new.replace(owner)
                return
        except OSError as error:
            raise InvalidInput(
                f"{owner} cannot be used: {error.strerror}",
                remedy="Give a folder in which this user may read and write.",
            ) from error
        if found.lower() != vm.lower():
            raise InvalidInput(
                f"{self.path} holds the replica of another VM: {found[:500]}",
                remedy=f"Give each VM a folder of its own; if this is the VM's, remove {owner}.",
            )

    def record(self) -> bytes | None:
        """The document that says which disks belong together. See Place."""
        path = self.path / sets.NAME
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error

    def keep_record(self, text: bytes) -> None:
        """Replace that document as a whole, durably. See Place."""
        path = self.path / sets.NAME
        new = path.with_name(path.name + ".new")
        try:
            new.unlink(missing_ok=True)
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                _write_whole(fd, text)
                os.fsync(fd)
            finally:
                os.close(fd)
            new.replace(path)
        except OSError as error:
            raise DestinationFailed(
                f"{path} cannot be written: {error.strerror}", remedy=_REMEDIES.get(error.errno or 0)
            ) from error

    def stop(self) -> None:
        """Whatever is under way on the images ends soon."""
        for image in self._opened:
            image.stop()

    def names(self) -> list[str]:
        """The disks there is an image of."""
        return sorted(path.stem for path in self.path.glob("*.raw") if _DISK.fullmatch(path.stem))

    def tell_removed(self, disks: Collection[str]) -> None:
        """Report, for each image of a disk that is none of `disks`, that it is no longer one of the VM's."""
        for name in self.names():
            if name not in disks:
                path = self.path / f"{name}.raw"
                self._report(Notice(f"{path} is kept as it is: {name} is no longer a disk of the VM"))

    def close(self) -> None:
        """Close the images and let other runs in. Harmless when repeated."""
        for image in self._opened:
            image.close()
        self._opened = []
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> ImageFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _forget(manifest: Manifest, indexes: Iterable[int]) -> Manifest:
    """The manifest with these chunks UNKNOWN."""
    digests = manifest.digests.copy()
    for index in indexes:
        digests.put(index, UNKNOWN)
    return replace(manifest, digests=digests)


def _write_whole(fd: int, data: bytes) -> None:
    """Write all of `data` where the file stands."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@functools.cache
def _fallocate() -> Callable[..., Any] | None:
    """The C library's fallocate, with 64-bit offsets; None where there is none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate64
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    result: Callable[..., Any] = function
    return result


def _punch(fd: int, offset: int, length: int) -> None:
    """Make the range a hole; OSError when that cannot be."""
    fallocate = _fallocate()
    if fallocate is None:
        raise OSError(errno.ENOSYS, "no fallocate")
    if fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
