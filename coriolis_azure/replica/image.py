"""Raw images: sparse files, one a disk, or block devices, and the state beside them.

Beside `os.raw` stand `os.raw.manifest`, what the image holds, with the size, mtime, ctime and inode the file had
then, and, during a run and after one that died, `os.raw.dirty`, the regions of 64 MiB the run was to write.

The rule: *a chunk outside of the dirty regions holds what the manifest says, if the file is as we left it.* Each step
keeps it, whether the process is killed or the power fails after it:

* Write: the region is in `dirty`, durably, before its first byte changes.
* Commit: content to the medium; then the manifest is replaced as a whole, durably; then `dirty` goes. Dying
  before the replacement leaves the older manifest with all regions dirty that differ from it, dying after it
  the new one with regions that need not have been.
* Resize: what is cut off or added is written to `dirty` first, like any change.
* Anew: the manifest is replaced by one that knows nothing, durably, then the content changes.
* A run that fails in an orderly way flushes and notes at the end of `dirty` how it left the file: then only the dirty
  regions are read again. A run that was killed, or whose flush failed, leaves no such note.

What is not proved is read: the whole image where the file is not as we left it (size, mtime, ctime or inode differ:
edited, restored, copied, booted), where the file system cannot show that (it has no ctime of its own), where a run died
without a note of how it left the file, and where there is no usable manifest; all of a block device at each run, since
nothing tells of writes to it. It is read from the medium: flushed, then past the page cache, which after a failed flush
holds what the medium does not.

Nobody else may be at work on an image: see `exclusive`. An image without a manifest is somebody else's unless nothing
is in it; it is refused, or, where that was asked for, adopted: read as a whole.

`os.raw.grains` is not part of the state: it saves reading, and is not believed. See `grains`.

Our mtime is taken after fsync; a stranger's write within the same tick of the file system's clock, a few
milliseconds, is not seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import formats
from ..errors import CorruptChunk, DestinationFailed, InvalidInput, exhausted_remedy
from ..events import Notice, Report, Step, silent
from ..threads import Lock, ordered
from . import devices, exclusive, sets, statefiles
from .digests import Digests
from .grains import Grains
from .manifest import UNKNOWN, ZERO, Manifest, grain_count
from .runmark import RunMark

REGION = 64 << 20
_HEADER = f"dirty regions of {REGION} bytes\n"
_RECORD = re.compile(rb"[0-9a-f]{12}\n")
_LEFT = b"left as "
_BLOCK = 4096  # what reads past the page cache are aligned to
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

Stamp = dict[str, int | str]


@dataclass(frozen=True)
class State:
    """What the state beside an image says: the manifest and how the file was then."""

    manifest: Manifest
    stamp: Stamp


@dataclass(frozen=True)
class _Dirty:
    """The regions a dead run was about to write, None for all, and how it left the file, where it could note that."""

    regions: set[int] | None
    left: Stamp | None = None

    def __bool__(self) -> bool:
        return self.regions != set()


class Image:
    """One raw image: a Destination. Nothing is opened or made before it is used.

    `path` is a file, made when it is missing, or a block device of at least the disk's size, or a link to one. An
    image that is somebody else's is refused unless `adopt`. `mark`: of the run that writes.
    """

    readable = True
    checkable = False
    far = False
    foreign_remedy = (
        "Give another folder, or move it away. If it may be overwritten, run with --adopt: it is read, and what "
        "differs is sent."
    )

    def __init__(
        self, path: Path, report: Report = silent, *, adopt: bool = False, mark: RunMark | None = None
    ) -> None:
        self.path = path
        self.name = path.name.removesuffix(".raw")
        self._manifest_path = path.with_name(path.name + ".manifest")
        self._dirty_path = path.with_name(path.name + ".dirty")
        self.grains = Grains(path.with_name(path.name + ".grains"))
        self._report = report
        self._adopt = adopt
        self._mark = mark
        self._fd = -1
        self._dirty_fd = -1
        self._block = False
        self._stateless = False  # no state is kept beside it, so nothing is believed of it
        self._holes = True
        self._expected: set[int] = set()
        self._seen: Stamp | None = None  # how the file was when this run had made sure of its content
        self._failed = False
        self._lock = Lock()
        self._stopped = False

    # What it holds

    def take(self) -> None:
        """Open it for this run alone, if it is there. InvalidInput where it may not be written, and why."""
        if self._fd >= 0 and fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
            return
        self.close()
        try:
            with self._translated("cannot be opened"):
                if os.path.lexists(self.path):
                    self._open(os.O_RDWR)
                    self._refuse_foreign()
        except BaseException:
            self.close()
            raise

    def known(self, disk: str, size: int, chunk: int, full: bool) -> Manifest:
        """What the image holds, as a disk of `size` bytes; it has that size then. See Destination."""
        self.take()
        self._seen = None
        with self._translated("cannot be opened"):
            if self._fd < 0:
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
            anew = full or (not self._block and (found == 0 or (kept is None and self._is_empty())))
            if not self._stateless:
                if anew:
                    self.grains.forget()
                self.grains.open(grain_count(chunk))
            base = self._anew(disk, size, chunk) if anew else self._as_found(kept, disk, size, chunk)
            self._seen = self._stamp()
            return base

    def stored(self) -> Manifest:
        """What the last good run said the image holds; what a dead run was writing since then is UNKNOWN.

        Nothing is changed. InvalidInput where there is no usable state.
        """
        with self._translated("cannot be read"):
            if self._fd < 0:
                self._open(os.O_RDONLY)
            self._drop_cache()
            kept = self._kept(ours=False)
            if kept is None:
                raise InvalidInput(
                    f"there is no usable {self._manifest_path}", remedy="Replicate to this destination first."
                )
            dirty = self._dirty(ours=False)
            found, said = self._size(), kept.manifest.size
            begun = kept.manifest.digests != Digests.filled(UNKNOWN, kept.manifest.count)
        if begun and not dirty and (found < said if self._block else found != said):
            raise DestinationFailed(
                f"{self.path} has {found} bytes, its manifest is of {said}",
                disk=self.name,
                offset=min(found, said),
            )
        return _forget(kept.manifest, self._chunks(kept.manifest, dirty.regions))

    def _as_found(self, kept: State | None, disk: str, size: int, chunk: int) -> Manifest:
        """Go on with the content there is."""
        dirty = self._dirty()
        if kept is None and self._block and not self._adopt:
            return self._keep(Manifest.new(size, chunk, disk, UNKNOWN))
        base = self._trusted(kept, dirty, chunk)
        unsure: Iterable[int]
        if base is None:
            base = Manifest.new(min(size, self._size()), chunk, disk, UNKNOWN)
            unsure = range(base.count)
        else:
            unsure = range(base.count) if self._block else self._chunks(base, dirty.regions)
        again = self._reread(base, unsure)
        if self._block and kept is not None and not dirty and again != base:
            self._report(Notice(f"{self.path} was changed since the last run; what differs is sent again"))
        resized = self._resize(replace(again, disk=disk or base.disk, fresh=False), size)
        clean = kept is not None and not dirty and resized == kept.manifest
        return resized if clean else self._keep(resized)

    def _trusted(self, kept: State | None, dirty: _Dirty, chunk: int) -> Manifest | None:
        """The kept manifest where it still speaks of this content, as a disk of the file's size; or None."""
        doubt = self._doubt(kept, dirty, chunk)
        if doubt or kept is None:
            self._report(Notice(f"{doubt}; {self.path} is read as a whole"))
            return None
        if dirty:
            self._report(Notice(f"the last run to {self.path} did not end well; what it wrote is read again"))
        # Where the size differs a run died while resizing, and all that it cut off or added is dirty.
        now = self._size()
        return kept.manifest.resized(min(now, kept.manifest.size) if self._block else now, UNKNOWN)

    def _doubt(self, kept: State | None, dirty: _Dirty, chunk: int) -> str:
        """Why nothing of what is kept may be believed; "" where it may."""
        if kept is None:
            return f"{self.path} has no usable state beside it"
        if self._mark is not None and self._mark.contested:
            return f"another run may still have been writing to {self.path}"
        if kept.manifest.chunk != chunk:
            return "the chunk size has changed"
        if self._block:
            return ""
        if dirty.regions is None:
            return f"{self._dirty_path} is damaged"
        if dirty and dirty.left is None:
            return f"the last run to {self.path} did not end well"
        if self._stamp() != (dirty.left if dirty else kept.stamp):
            return f"{self.path} was changed since the last run"
        if statefiles.ctime_can_be_set(self.path.parent):
            return "its file system does not show whether a file was changed"
        return ""

    def _anew(self, disk: str, size: int, chunk: int) -> Manifest:
        """Forget the content: a file of holes; of a device, which keeps what it had, nothing is known."""
        unknown = self._keep(Manifest.new(size, chunk, disk, UNKNOWN))
        if self._block:
            return unknown
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, size)
        return self._keep(Manifest.new(size, chunk, disk, ZERO))

    def _resize(self, base: Manifest, size: int) -> Manifest:
        if self._block:
            return base.resized(size, UNKNOWN)
        now = self._size()
        if now != size:
            self.intend(min(now, size), abs(now - size))
            os.ftruncate(self._fd, size)
        return base.resized(size, ZERO)

    def _reread(self, base: Manifest, indexes: Iterable[int]) -> Manifest:
        """The manifest with these chunks as they are on the medium."""
        digests, digest = base.digests, base.digester()

        told = False
        with self._medium() as content:

            def read(index: int) -> tuple[int, bytes]:
                offset, length = base.span(index)
                return index, ZERO if self._is_hole(offset, length) else digest(content(offset, length))

            with contextlib.closing(ordered(read, indexes, threads=2, ahead=6)) as results:
                for index, found in results:
                    if not told:
                        self._report(Step("read back", self.name))
                        told, digests = True, base.digests.copy()
                    digests.put(index, found)
        return replace(base, digests=digests)

    @contextlib.contextmanager
    def _medium(self) -> Iterator[Callable[[int, int], bytes | memoryview]]:
        """What reads a range from the medium: past the page cache, or, where that cannot be, after it was dropped.

        Writes that failed leave pages in the cache that look clean and are on no medium.
        """
        try:
            os.fsync(self._fd)
        except OSError:
            # The first error may be about a dead run's writes; the reads show what came of them.
            os.fsync(self._fd)
        self._drop_cache()
        try:
            direct = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            yield self.read
            return

        def read(offset: int, length: int) -> bytes | memoryview:
            self._go_on(offset)
            room = mmap.mmap(-1, -(-length // _BLOCK) * _BLOCK)
            try:
                done = os.preadv(direct, [room], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                done = 0
            return memoryview(room)[:length] if done >= length else self.read(offset, length)

        try:
            yield read
        finally:
            os.close(direct)

    def _drop_cache(self) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _is_hole(self, offset: int, length: int) -> bool:
        """Whether the file system knows the range to be empty."""
        if self._block:
            return False
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO and self._size() >= offset + length

    def _is_empty(self) -> bool:
        """Whether there is nothing in the file but zeros."""
        size = self._size()
        pieces = ((at, min(len(_ZEROS), size - at)) for at in range(0, size, len(_ZEROS)))
        return all(self._is_hole(at, length) or _is_zeros(self.read(at, length)) for at, length in pieces)

    # Whose it is

    def _refuse_foreign(self) -> None:
        """InvalidInput where the image is not one that a run of ours has made, or another device than it was."""
        if self._stateless:
            return
        if os.path.lexists(self._manifest_path):
            kept = self._kept() if self._block else None
            if kept is None or self._adopt or kept.stamp.get("device", "") == self._stamp()["device"]:
                return
            what = f"{self.path} is another device than at the last run"
        else:
            what = f"{self.path} holds data, and no run of ours has made it"
        if not self._adopt and self._is_blank():
            return
        form = formats.wrapped(*self._ends())
        if form:
            raise InvalidInput(
                f"{self.path} is a {form} image, and a raw one is meant", remedy=formats.remedy(form)
            )
        if not self._adopt:
            raise InvalidInput(what, remedy=self.foreign_remedy)

    def _ends(self) -> tuple[bytes, bytes]:
        """What formats are told by. Only a file ends where its image does."""
        size = self._size()
        head = self.read(0, min(size, formats.HEAD))
        return head, b"" if self._block else self.read(max(0, size - formats.TAIL), min(size, formats.TAIL))

    def _is_blank(self) -> bool:
        """Whether there is nothing in it; of a device, whether there is nothing at its beginning and its end."""
        if not self._block:
            return self._is_empty()
        length = min(self._size(), len(_ZEROS))
        return all(_is_zeros(self.read(at, length)) for at in (0, self._size() - length))

    # Content

    def intend(self, offset: int, length: int) -> None:
        """These bytes are about to change; durable on return. See Destination."""
        regions = range(offset // REGION, (offset + length - 1) // REGION + 1)
        if self._expected.issuperset(regions):
            return
        with self._lock, self._translated(f"cannot note a change at offset {offset}", offset):
            missing = [region for region in regions if region not in self._expected]
            self._check_ours()
            if not self._stateless:
                if self._dirty_fd < 0:
                    self._begin_dirty()
                statefiles.write(self._dirty_fd, "".join(f"{region:012x}\n" for region in missing).encode())
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
        if self._mark is not None:
            self._mark.check()

    def _check_ours(self) -> None:
        """DestinationFailed when another run has come, or somebody has changed the file before our first write."""
        if self._mark is not None:
            self._mark.check(now=True)
        if self._seen is not None and not self._expected and self._stamp() != self._seen:
            raise DestinationFailed(
                f"{self.path} was changed by somebody else while this run was at work",
                remedy="End what writes to it, then run again: it is read as a whole.",
                disk=self.name,
            )

    def flush(self) -> None:
        """Content to the medium, and out of the cache: reading back reads the medium. See Destination."""
        with self._translated("cannot be flushed"):
            os.fsync(self._fd)
            self._drop_cache()

    def check(self) -> bool | None:
        """None: an image is read back. See Destination."""
        return None

    def commit(self, manifest: Manifest) -> None:
        """The image holds what `manifest` says. See Destination."""
        with self._translated("cannot be committed"):
            self._check_ours()
            if self._mark is not None and self._mark.contested:
                self._check_all(manifest)
            self._keep(manifest)

    def _check_all(self, manifest: Manifest) -> None:
        """CorruptChunk where the image is not as the manifest says."""
        found = self._reread(manifest, range(manifest.count))
        for index in found.digests.differing(manifest.digests):
            offset = manifest.span(index)[0]
            text = f"{self.name}: the chunk at offset {offset} was changed by another run"
            raise CorruptChunk(text, disk=self.name, offset=offset)

    def close(self) -> None:
        """Close the files. See Destination."""
        self._note_how_it_is_left()
        for fd in (self._fd, self._dirty_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._dirty_fd = -1
        self._expected, self._seen, self._failed = set(), None, False
        self.grains.close()

    def _note_how_it_is_left(self) -> None:
        """At the end of `dirty`, so that a later write of somebody else shows. Not where it is unsure what is there."""
        if self._dirty_fd < 0 or self._fd < 0 or self._failed:
            return
        with contextlib.suppress(OSError, DestinationFailed, InvalidInput):
            os.fsync(self._fd)
            if self._mark is not None:
                self._mark.check(now=True)
            statefiles.write(self._dirty_fd, _LEFT + json.dumps(self._final_stamp()).encode() + b"\n")
            os.fdatasync(self._dirty_fd)

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
        if self._stateless:
            return manifest
        statefiles.replace(self._manifest_path, manifest.text({"image": self._final_stamp()}))
        if self._dirty_fd >= 0:
            os.close(self._dirty_fd)
            self._dirty_fd = -1
        self._expected = set()
        statefiles.remove(self._dirty_path)
        return manifest

    def _kept(self, *, ours: bool = True) -> State | None:
        """What stands beside the image; None where there is nothing of use."""
        try:
            fd = statefiles.open_existing(self._manifest_path, os.O_RDONLY, ours=ours)
        except FileNotFoundError:
            return None
        try:
            with os.fdopen(fd, "rb") as file:
                manifest, document = Manifest.read(file)
            stamp = document["image"]
            if not all(type(stamp[name]) is int for name in ("size", "mtime_ns", "inode")):
                raise TypeError
        except InvalidInput as error:
            self._report(Notice(f"{self._manifest_path} is not used: {error.message}"))
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            self._report(Notice(f"{self._manifest_path} is damaged and not used"))
            return None
        return State(manifest, stamp)

    def _begin_dirty(self) -> None:
        """Open `dirty` to append; it exists durably then. One of a dead run is taken up as it is."""
        self._dirty_fd = statefiles.open_or_create(self._dirty_path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(self._dirty_fd).st_size == 0:
            statefiles.write(self._dirty_fd, _HEADER.encode())
        os.fdatasync(self._dirty_fd)
        statefiles.sync_folder(self.path.parent)

    def _dirty(self, *, ours: bool = True) -> _Dirty:
        """What a dead run has left of what it was about to write."""
        if self._stateless:
            return _Dirty(set())
        try:
            raw = statefiles.read(self._dirty_path, ours=ours)
        except FileNotFoundError:
            return _Dirty(set())
        records = raw[len(_HEADER) :].splitlines(keepends=True)
        left = None
        if records and records[-1].startswith(_LEFT):
            with contextlib.suppress(ValueError):
                left = json.loads(records.pop()[len(_LEFT) :])
        if not raw.startswith(_HEADER.encode()) or not all(map(_RECORD.fullmatch, records)):
            return _Dirty(None)
        return _Dirty({int(record, 16) for record in records}, left)

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
        """Open the image, for this run alone where it is to be written."""
        self.close()
        if flags & os.O_CREAT:
            self._fd = exclusive.create(self.path)
            return
        path = self._followed()
        kind = os.stat(path).st_mode  # noqa: PTH116
        self._block = stat.S_ISBLK(kind)
        if not self._block and not stat.S_ISREG(kind):
            raise InvalidInput(f"{self.path} is neither a file nor a block device")
        if flags & os.O_ACCMODE == os.O_RDONLY:
            self._fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        elif self._block:
            self._fd = exclusive.open_device(path)
        else:
            self._fd = self._open_file(path)

    def _open_file(self, path: Path) -> int:
        """Open the file for writing, if it is ours and nobody else uses it."""
        fd = statefiles.open_existing(path, os.O_RDONLY)
        try:
            exclusive.refuse_writers(fd, path)
            exclusive.refuse_loops(fd, path)
            if os.fstat(fd).st_nlink > 1:
                raise InvalidInput(
                    f"{path} has other names (hard links), whose content would change with it",
                    remedy="Make it a file of its own: copy it, remove it, and rename the copy.",
                )
        finally:
            os.close(fd)
        return exclusive.open_file(path)

    def _followed(self) -> Path:
        """The path, or the block device that it leads to. InvalidInput for other links, and those of other users."""
        link = os.lstat(self.path)
        if not stat.S_ISLNK(link.st_mode):
            return self.path
        path = self.path.resolve()
        if link.st_uid not in (0, os.geteuid()) or not path.is_block_device():
            raise InvalidInput(
                f"{self.path} is a link",
                remedy="Remove it and run again: only links of your own to a block device are followed.",
            )
        return path

    def _size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END) if self._block else os.fstat(self._fd).st_size

    def _stamp(self) -> Stamp:
        """What shows that a file is still as it was; of a device, only which one it is."""
        now = os.fstat(self._fd)
        if self._block:
            device = devices.identity(now.st_rdev)
            return {"size": self._size(), "mtime_ns": 0, "ctime_ns": 0, "inode": 0, "device": device}
        return {
            "size": now.st_size,
            "mtime_ns": now.st_mtime_ns,
            "ctime_ns": now.st_ctime_ns,
            "inode": now.st_ino,
        }

    def _final_stamp(self) -> Stamp:
        """How this run leaves the file; never again so where another program has it open and may have mapped it."""
        if self._block:
            return self._stamp()
        with exclusive.alone(self._fd) as alone:
            return self._stamp() | ({} if alone else {"ctime_ns": 0})

    @contextlib.contextmanager
    def _translated(self, what: str, offset: int | None = None) -> Iterator[None]:
        """An OSError in the block is DestinationFailed."""
        try:
            yield
        except OSError as error:
            self._failed = True
            raise DestinationFailed(
                f"{self.path} {what}: {error.strerror}",
                remedy=_REMEDIES.get(error.errno or 0) or exhausted_remedy(error),
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

    The folder is made when it is missing, unless it must be `existing`: then nothing in it can be written, and nothing
    is left in it. `adopt`: images that no run of ours has made are taken over. InvalidInput when it cannot be used or
    another run uses it.
    """

    def __init__(
        self, path: Path, report: Report = silent, *, existing: bool = False, adopt: bool = False
    ) -> None:
        self.path = path
        self._report, self._adopt = report, adopt
        self._images: dict[str, Image] = {}
        self._lock_fd = -1
        self._mark: RunMark | None = None
        try:
            if existing:
                self._share()
            else:
                self._take()
        except BlockingIOError as error:
            self.close()
            raise InvalidInput(
                f"another run is using {path}", remedy="Wait for it to end, or give another folder."
            ) from error
        except OSError as error:
            self.close()
            raise _unusable(path, error) from error
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        """Make the folder if need be, and keep other runs out."""
        if not self.path.is_dir():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700)
            self.path.chmod(0o700)
        self._lock_fd = statefiles.open_or_create(self.path / ".lock", os.O_RDWR)
        _flock(self._lock_fd, fcntl.LOCK_EX)
        mark = RunMark(self.path / ".run", self._lock_fd)
        mark.take()
        self._mark = mark

    def _share(self) -> None:
        """Keep writers out, where that can be done by somebody who may only read."""
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder")
        try:
            self._lock_fd = statefiles.open_existing(self.path / ".lock", os.O_RDONLY, ours=False)
        except (FileNotFoundError, PermissionError):
            return
        _flock(self._lock_fd, fcntl.LOCK_SH)

    def disk(self, name: str) -> Image:
        """The image of the disk `name`: "os" or "data-<lun>"."""
        if not _DISK.fullmatch(name):
            raise InvalidInput(f"{name!r} is no name of a disk", remedy="Use os, or data-<lun>.")
        if name not in self._images:
            path = self.path / f"{name}.raw"
            self._images[name] = Image(path, self._report, adopt=self._adopt, mark=self._mark)
        return self._images[name]

    def reserve(self, disks: Collection[str]) -> None:
        """Open the images that are there, for this run alone. See Folder."""
        for name in disks:
            self.disk(name).take()

    def claim(self, vm: str) -> None:
        """Keep whose images these are, and refuse another VM's: they would be overwritten."""
        owner = self.path / ".vm"
        try:
            found = self._owner(owner)
            if not found:
                statefiles.replace(owner, [f"{vm}\n".encode()])
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
            return statefiles.read(path, ours=self._mark is not None)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error

    def keep_record(self, text: bytes) -> None:
        """Replace that document as a whole, durably. See Place."""
        path = self.path / sets.NAME
        if self._mark is not None:
            self._mark.check(now=True)
        try:
            statefiles.replace(path, [text])
        except OSError as error:
            raise DestinationFailed(
                f"{path} cannot be written: {error.strerror}", remedy=_REMEDIES.get(error.errno or 0)
            ) from error

    def _owner(self, path: Path) -> str:
        try:
            return statefiles.read(path).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def stop(self) -> None:
        """Whatever is under way on the images ends soon."""
        for image in self._images.values():
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
        for image in self._images.values():
            image.close()
        self._images = {}
        if self._mark is not None:
            self._mark.end()
            self._mark = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> ImageFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _flock(fd: int, kind: int) -> None:
    """BlockingIOError while another run holds the lock; harmless where the file system has none."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _forget(manifest: Manifest, indexes: Iterable[int]) -> Manifest:
    """The manifest with these chunks UNKNOWN."""
    digests = manifest.digests.copy()
    for index in indexes:
        digests.put(index, UNKNOWN)
    return replace(manifest, digests=digests)


def _is_zeros(data: bytes) -> bool:
    return data == _ZEROS[: len(data)]


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
