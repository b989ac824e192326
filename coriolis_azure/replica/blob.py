"""Fixed VHDs in Blob storage: page blobs, one a disk, from which Azure makes managed disks, and their state.

Beside `os.vhd` stands `os.vhd.manifest`, a block blob: what the VHD holds, as of the last run that ended well. What
the VHD itself is at the moment is in its metadata, which changes together with it:

    coriolis_image     an id made with the blob: another one means that somebody has replaced it
    coriolis_state     `complete`, or `writing` from a run's first change until it has ended well
    coriolis_dirty     the regions that a run was to change since the manifest was written, as bits
    coriolis_region    the bytes of such a region
    coriolis_manifest  the manifests that may be believed, each named by the run that wrote it
    coriolis_lease     the lease under which this was written

The rule is that of `image`: *a chunk outside of the dirty regions holds what the manifest says.* A region is dirty
before its first byte changes. Dying leaves `writing`, and a VHD without its footer, so nothing takes it for whole.

* Begin to change: metadata (`writing`, the region); then the footer is cleared; then content.
* Commit: content; the footer; the manifest; metadata (`complete`, nothing dirty), which gives the VHD its ETag;
  that ETag into the manifest's metadata. Dying before the last step costs one reading of the whole VHD.
* While a run writes, the VHD is leased, and every change of it carries the lease. A run that was suspended until its
  lease ran out and another took over can change nothing of it. The manifest has no lease: what such a run still puts
  there is not named in the VHD's metadata, and not believed.
* After a run that died, the lease tells whether anybody else has written since. If it can be taken over nobody has,
  and only the dirty regions are read again; else the whole VHD is.
* While nothing is dirty, an ETag other than the noted one is a stranger's change, which no run overwrites unasked.
* The lease on `.vm`, beside the VHDs, is the folder's lock. A run that died keeps the next one waiting for a minute
  at most.

After the disk's own bytes come zeros up to a whole MiB, then the footer.
"""

from __future__ import annotations

import base64
import contextlib
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import IO

from .. import vhd
from ..azure.blobs import MOST, PAGE, Blob, Container, Pages, Properties, Storage
from ..clock import Clock
from ..errors import AzureError, Conflict, CoriolisAzureError, DestinationFailed, InvalidInput
from ..events import Notice, Report, Step, Waiting
from ..threads import Lock, every, ordered
from . import sets
from .image import _forget
from .manifest import UNKNOWN, ZERO, Manifest

REGION = 64 << 20
_REGIONS = 4096  # at most, so that they fit into metadata: in large disks they are larger
_LEASE_SECONDS = 60
_RENEW_SECONDS = 15
_THREADS = 16
_IMAGE, _STATE, _DIRTY = "coriolis_image", "coriolis_state", "coriolis_dirty"
_REGION, _DISK, _SIZE, _ETAG = "coriolis_region", "coriolis_disk", "coriolis_size", "coriolis_etag"
_MANIFEST, _LEASE = "coriolis_manifest", "coriolis_lease"
_WRITING, _COMPLETE = "writing", "complete"
_NAME = re.compile(r"os|data-[0-9]{1,3}")
_TAKEN = ("LeaseAlreadyPresent",)
_OTHERWISE = (409, 412)  # the statuses of a refusal because a blob is another one than it was
_LOST = (
    "LeaseIdMissing",
    "LeaseIdMismatchWithBlobOperation",
    "LeaseLost",
    "LeaseNotPresentWithBlobOperation",
    "LeaseIdMismatchWithLeaseOperation",
    "LeaseNotPresentWithLeaseOperation",
    "ConditionNotMet",
)


class BlobImage:
    """One fixed VHD in a page blob: a Destination. Nothing is made before it is used.

    `hold` renews the lock on the place that the VHD is in, or raises AzureError where it is lost.
    """

    readable = True
    checkable = False
    far = True
    grains = None

    def __init__(
        self, container: Container, path: str, storage: Storage, report: Report, hold: Callable[[], None]
    ) -> None:
        self.name = path.rpartition("/")[2].removesuffix(".vhd")
        self._blob = container.blob(path)
        self._manifest = container.blob(f"{path}.manifest")
        self._clock, self._report, self._hold = storage.clock, report, hold
        self._lock = Lock()
        self._stopped = False
        self._leased = False
        self._undisturbed = False  # whether the lease proves that nobody has written since a run that died
        self._pages: Pages | None = None
        self._kept: Manifest | None = None
        # What this run's manifest is named by; which ones may be believed; the ETag of the one that is there.
        self._run = uuid.uuid4().hex
        self._believed: tuple[str, ...] = ()
        self._put: str | None = None
        # As in the metadata.
        self._image, self._disk, self._region = "", "", REGION
        self._state = _WRITING
        self._dirty: set[int] = set()
        self._size = 0
        # Where the footer is, or is to be; whether this run has made sure that none is there.
        self._end, self._begun = 0, False

    @property
    def url(self) -> str:
        """Where it is."""
        return self._blob.url

    # What it holds

    def known(self, disk: str, size: int, chunk: int, full: bool) -> Manifest:
        """What the VHD holds, as a disk of `size` bytes; it has that size then. See Destination."""
        with self._translated("cannot be prepared"):
            found = self._blob.find()
            if found is None:
                return self._anew(disk, size, chunk, new=True)
            self._refuse_foreign(found)
            self._take(found)
            found = self._blob.find() or found
            self._remember(found.metadata)
            kept, noted = self._read_manifest()
            if self._disk and disk and self._disk != disk:
                self._report(Notice(f"{self.url} held another disk of that name; it is written anew"))
                full = True
            if full:
                return self._anew(disk, size, chunk)
            return self._as_found(found, kept, noted, disk, size, chunk)

    def stored(self) -> Manifest:
        """What the last good run said the VHD holds; what a dead run was writing since then is UNKNOWN.

        Nothing is changed. InvalidInput where there is no usable state.
        """
        with self._translated("cannot be read"):
            found = self._blob.find()
            if found is not None:
                self._remember(found.metadata)
            kept, _ = self._read_manifest() if found is not None else (None, None)
            if kept is None:
                raise InvalidInput(
                    f"there is no usable {self._manifest.url}", remedy="Replicate to this destination first."
                )
        return _forget(kept, self._chunks(kept, self._dirty))

    def _as_found(
        self, found: Properties, kept: Manifest | None, noted: str | None, disk: str, size: int, chunk: int
    ) -> Manifest:
        """Go on with the content there is."""
        there = self._end = max(0, found.size - vhd.FOOTER)
        base = self._trusted(found, kept, noted, chunk)
        unsure: Iterable[int]
        if base is None:
            base = Manifest.new(min(size, there) or size, chunk, disk, UNKNOWN)
            unsure = range(base.count)
        else:
            unsure = self._chunks(base, self._dirty)
            if vhd.rounded(base.size) != there:  # a run died while it resized
                base = base.resized(min(size, there), UNKNOWN)
                unsure = [i for i in unsure if i < base.count]
                unsure = sorted({*unsure, *(i for i in range(base.count) if base.digest(i) == UNKNOWN)})
        again = replace(self._reread(base, unsure), disk=disk or base.disk, fresh=False)
        self._disk = disk or self._disk
        if again != kept or self._dirty:
            # Of what is after the disk's end no manifest speaks: a run that died may have made the disk longer.
            self._clear_from(again.size)
            self._keep(again, self._state)
        if again.size == size and there == vhd.rounded(size):
            return again
        return self._keep(self._resized(again, size), self._state)

    def _trusted(
        self, found: Properties, kept: Manifest | None, noted: str | None, chunk: int
    ) -> Manifest | None:
        """The manifest where it still speaks of this content; None where the content must be read as a whole."""
        if kept is None:
            self._report(Notice(f"{self.url} has no usable state beside it; it is read as a whole"))
            return None
        if not self._undisturbed and not self._unchanged(found, noted):
            return None
        if kept.chunk != chunk:
            self._report(Notice(f"the chunk size has changed; {self.url} is read as a whole"))
            return None
        if self._dirty:
            self._report(Notice(f"the last run to {self.url} did not end well; what it wrote is read again"))
        return kept

    def _unchanged(self, found: Properties, noted: str | None) -> bool:
        """Whether the VHD is as the last run left it; `noted`: its ETag then. InvalidInput for a stranger's change."""
        if noted == found.etag and not self._dirty:
            return True
        if self._state == _WRITING:
            what = "did not end well, and somebody may have written to it since"
        elif noted is None:
            what = "died as it ended"
        else:
            raise InvalidInput(
                f"{self.url} was changed by somebody since the last run",
                remedy="To keep the change, copy the blob or give another prefix. To let go of it, run with --full, "
                "which writes the blob anew; in the orchestrator, delete the disks of the transfer first.",
            )
        self._report(Notice(f"the last run to {self.url} {what}; it is read as a whole"))
        return False

    def _anew(self, disk: str, size: int, chunk: int, *, new: bool = False) -> Manifest:
        """A page blob of zeros, whatever there was unless it is to be `new`; it has no footer yet."""
        self._image, self._disk, self._size = uuid.uuid4().hex, disk, size
        self._state, self._dirty, self._region = _WRITING, set(), _region(size)
        self._end, self._begun = vhd.rounded(size), True
        self._believed = (self._run,)
        made = self._create(new)
        self._take()
        found = self._blob.find()
        if found is None or found.etag != made:
            raise DestinationFailed(f"{self.url} was changed by somebody as it was made", disk=self.name)
        return self._keep(Manifest.new(size, chunk, disk, ZERO), _WRITING)

    def _create(self, new: bool) -> str:
        """Make the page blob; its ETag."""
        try:
            return self._blob.create_pages(self._end + vhd.FOOTER, self._metadata(), new=new)
        except AzureError as error:
            found = self._blob.find() if error.facts.get("status") in _OTHERWISE else None
            if found is None or found.metadata.get(_IMAGE) != self._image:
                raise
            return found.etag  # ours: the answer was lost, and the request made again

    def _resized(self, base: Manifest, size: int) -> Manifest:
        """Give the VHD the size of the disk. After the disk's end there are zeros, at every moment."""
        end = vhd.rounded(size)
        low, high = min(base.size, size), max(end, self._end)
        self._region = _region(high)
        self.intend(low, high - low)
        self._clear_from(low)
        self._blob.resize(end + vhd.FOOTER)
        self._end, self._pages = end, None
        return base.resized(size, ZERO)

    def _clear_from(self, offset: int) -> None:
        """Clear what is between the disk's end and the footer."""
        start = offset + -offset % PAGE
        if start < self._end:
            self._blob.clear(start, self._end - start)

    def _reread(self, base: Manifest, indexes: Iterable[int]) -> Manifest:
        """The manifest with these chunks as they are in the VHD; what is not allocated is not asked for."""
        digests = base.digests.copy()
        digest = base.digester()
        told = False

        def read(index: int) -> tuple[int, bytes]:
            offset, length = base.span(index)
            empty = self._pages is not None and self._pages.is_empty(offset, length)
            return index, ZERO if empty else digest(self.read(offset, length))

        def asked() -> Iterator[int]:
            nonlocal told
            for index in indexes:
                if not told:
                    self._report(Step("read back", self.name))
                    self._pages = self._blob.pages(self._end)
                    told = True
                yield index

        with contextlib.closing(ordered(read, asked(), threads=_THREADS, ahead=2 * _THREADS)) as results:
            for index, found in results:
                digests.put(index, found)
        return replace(base, digests=digests)

    # Content

    def intend(self, offset: int, length: int) -> None:
        """These bytes are about to change; durable on return. See Destination."""
        regions = range(offset // self._region, (offset + length - 1) // self._region + 1)
        if self._begun and self._dirty.issuperset(regions):
            return
        with self._lock, self._translated(f"cannot note a change at offset {offset}", offset):
            dirty = self._dirty.union(regions)
            if self._state != _WRITING or dirty != self._dirty:
                self._blob.set_metadata(self._metadata(_WRITING, dirty))
            if not self._begun:
                self._blob.clear(self._end, vhd.FOOTER)
            self._state, self._dirty, self._begun = _WRITING, dirty, True

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` there. See Destination."""
        self._go_on(offset)
        view = memoryview(data)
        if len(view) % PAGE:  # the end of the disk; what follows are zeros
            view = memoryview(bytes(view) + bytes(PAGE - len(view) % PAGE))
        with self._translated(f"cannot be written at offset {offset}", offset):
            for start in range(0, len(view), MOST):
                self._blob.write(offset + start, view[start : start + MOST])

    def zero(self, offset: int, length: int) -> None:
        """Clear the pages. See Destination."""
        self._go_on(offset)
        with self._translated(f"cannot be cleared at offset {offset}", offset):
            self._blob.clear(offset, length + -length % PAGE)

    def read(self, offset: int, length: int) -> bytes:
        """What is there. See Destination."""
        self._go_on(offset)
        with self._translated(f"cannot be read at offset {offset}", offset):
            data = self._blob.read(offset, length)
        if len(data) != length:
            raise DestinationFailed(f"{self.url} ends at offset {offset}", disk=self.name, offset=offset)
        return data

    def stop(self) -> None:
        """Reads and writes under way are the last ones; from any thread."""
        self._stopped = True

    def _go_on(self, offset: int) -> None:
        if self._stopped:
            raise DestinationFailed(f"{self.url} was given up", disk=self.name, offset=offset)

    def flush(self) -> None:
        """Nothing to do: Azure has kept what it has answered for. See Destination."""

    def check(self) -> bool | None:
        """None: a blob is read back. See Destination."""
        return None

    def commit(self, manifest: Manifest) -> None:
        """The VHD holds what `manifest` says, and is whole. See Destination."""
        if self._state == _COMPLETE and not self._dirty and manifest == self._kept:
            return
        with self._translated("cannot be committed"):
            if self._state != _COMPLETE:
                footer = vhd.footer(self._end, uuid.UUID(self._image), self._clock.now())
                self._blob.write(self._end, footer)
            self._keep(manifest, _COMPLETE)

    def remove(self) -> None:
        """Delete the VHD and its state; what is gone is no error. InvalidInput where the blob is none of ours."""
        with self._translated("cannot be deleted"):
            found = self._blob.find()
            if found is not None:
                self._refuse_foreign(found)
                self._take(found)
                self._blob.delete()
                self._leased = False
            self._manifest.delete()

    def renew(self) -> None:
        """Keep others out for another minute."""
        if self._leased:
            self._blob.renew()

    def close(self) -> None:
        """Give the lease up; one over a half-written VHD runs out by itself, and the next run takes it over."""
        if self._leased:
            self._leased = False
            if self._state == _COMPLETE:
                self._blob.release()

    def __enter__(self) -> BlobImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The state beside it

    def _keep(self, manifest: Manifest, state: str) -> Manifest:
        """Make `manifest` what the next run starts from: manifest, then the end of what is dirty, then the ETag."""
        with _unnamed() as file:
            file.writelines(manifest.text({"image": self._image, "run": self._run}))
            self._put = self._put_manifest(file)
        self._size, self._region = manifest.size, _region(manifest.size)
        self._believed = (self._run,)
        etag = self._blob.set_metadata(self._metadata(state, set()))
        self._state, self._dirty = state, set()
        self._put = self._note(etag.strip('"'))
        self._kept = manifest
        return manifest

    def _put_manifest(self, file: IO[bytes]) -> str:
        """Replace the manifest; its ETag. One that is not the one we know is replaced only while the lease is ours."""
        if self._put is None:
            found = self._manifest.find()
            self._put = found.etag if found else ""
        for last in (False, False, True):
            file.seek(0)
            try:
                return self._manifest.put(file, new=not self._put, only=self._put)
            except AzureError as error:
                if last or error.facts.get("status") not in _OTHERWISE:
                    raise
                self._blob.renew()
                found = self._manifest.find()
                self._put = found.etag if found else ""
        raise AssertionError("the last try returns or raises")

    def _note(self, etag: str) -> str:
        """Keep the VHD's ETag with the manifest, while that is ours; the manifest's own ETag then."""
        try:
            return self._manifest.set_metadata({_ETAG: etag}, only=self._put or "")
        except AzureError as error:
            found = self._manifest.find() if error.facts.get("status") in _OTHERWISE else None
            if found is None or found.metadata.get(_ETAG) != etag:
                raise
            return found.etag  # ours: the answer was lost, and the request made again

    def _read_manifest(self) -> tuple[Manifest | None, str | None]:
        """The manifest and the ETag that the VHD had then; None for what is not there or of no use."""
        found = self._manifest.find()
        self._put = found.etag if found else ""
        try:
            with _unnamed() as file:
                if found is None or not self._manifest.read_into(file):
                    return None, None
                file.seek(0)
                manifest, document = Manifest.read(file)
            if document["image"] != self._image:
                raise TypeError
            # Replicas of older versions name none.
            if self._believed and document["run"] not in self._believed:
                self._report(
                    Notice(f"{self._manifest.url} is of a run that lost the VHD to another, and not used")
                )
                return None, None
        except InvalidInput as error:
            self._report(Notice(f"{self._manifest.url} is not used: {error.message}"))
            return None, None
        except (ValueError, KeyError, TypeError, RecursionError):
            self._report(Notice(f"{self._manifest.url} is damaged or another's, and not used"))
            return None, None
        if named := document.get("run"):
            self._believed = (str(named),)
        etag = found.metadata.get(_ETAG)
        self._kept = manifest
        return manifest, f'"{etag}"' if etag else None

    def _metadata(self, state: str = _WRITING, dirty: set[int] | None = None) -> dict[str, str]:
        said = {_IMAGE: self._image, _STATE: state, _REGION: str(self._region), _SIZE: str(self._size)}
        if self._disk:
            said[_DISK] = self._disk
        if self._blob.lease_id:
            said[_LEASE] = self._blob.lease_id
        said[_MANIFEST] = ",".join(dict.fromkeys((*self._believed, self._run)))
        if dirty:
            bits = sum(1 << region for region in dirty)
            raw = bits.to_bytes(-(-bits.bit_length() // 8), "little")
            said[_DIRTY] = base64.b64encode(raw).decode()
        return said

    def _remember(self, metadata: Mapping[str, str]) -> None:
        """Take over what the metadata says. Damaged, it means that everything is dirty."""
        self._image, self._disk = metadata.get(_IMAGE, ""), metadata.get(_DISK, "")
        self._state = _COMPLETE if metadata.get(_STATE) == _COMPLETE else _WRITING
        self._believed = tuple(name for name in metadata.get(_MANIFEST, "").split(",") if name)
        try:
            self._region = int(metadata[_REGION])
            bits = int.from_bytes(base64.b64decode(metadata.get(_DIRTY, ""), validate=True), "little")
            if self._region <= 0:
                raise ValueError
        except (KeyError, ValueError):
            self._region, bits = 1 << 62, 1
        self._dirty = {at for at in range(bits.bit_length()) if bits >> at & 1}

    def _chunks(self, manifest: Manifest, regions: set[int]) -> Iterator[int]:
        """The chunks that touch these regions."""
        last = -1
        for region in sorted(regions):
            first = max(last + 1, region * self._region // manifest.chunk)
            last = max(last, min(manifest.count, -(-(region + 1) * self._region // manifest.chunk)) - 1)
            yield from range(first, last + 1)

    def _refuse_foreign(self, found: Properties) -> None:
        if found.kind != "PageBlob" or _IMAGE not in found.metadata:
            what = "is no page blob" if found.kind != "PageBlob" else "was not made by this program"
            raise InvalidInput(
                f"{self.url} {what}, and is left as it is",
                remedy="Give another prefix, or remove the blob if nobody needs it.",
            )

    def _take(self, found: Properties | None = None) -> None:
        """Lease the VHD, which had these properties: with the lease that a dead run has left, where it still holds."""
        if self._leased:
            return
        left = found.metadata.get(_LEASE) if found is not None else None
        self._undisturbed = bool(left) and self._blob.inherit(str(left))
        if not self._undisturbed:
            _lease(self._blob, self.url, self._clock, self._report)
        self._leased = True
        self._hold()  # whoever lost the place while it waited must not begin
        if self._undisturbed and found is not None and found.metadata.get(_STATE) != _COMPLETE:
            # Whoever takes over from us finds our lease.
            self._blob.set_metadata({**found.metadata, _LEASE: self._blob.lease_id})

    @contextlib.contextmanager
    def _translated(self, what: str, offset: int | None = None) -> Iterator[None]:
        """An AzureError in the block is DestinationFailed."""
        try:
            yield
        except AzureError as error:
            remedy = error.remedy
            if error.facts.get("code") in _LOST:
                remedy = (
                    "Find out who else uses this blob: its lease was broken or taken over. Then run again."
                )
            raise DestinationFailed(
                f"{self.url} {what}: {error}",
                remedy=remedy,
                disk=self.name,
                offset=offset,
                code=error.facts.get("code"),
            ) from error


class BlobFolder:
    """The fixed VHDs below one prefix of a container, ours alone while it is open. A destinations.Folder.

    The container is made when it is missing, unless it must be `existing`. InvalidInput when another run uses the
    place; else the AzureError that says why it cannot be used.
    """

    def __init__(
        self,
        storage: Storage,
        account: str,
        container: str,
        prefix: str,
        report: Report,
        *,
        existing: bool = False,
    ) -> None:
        self._storage, self._report = storage, report
        self._prefix = f"{prefix}/" if prefix else ""
        self._opened: list[BlobImage] = []
        self._ending = contextlib.ExitStack()
        self._container = storage.account(account).container(container)
        if not existing:
            self._container.ensure()
        self.url = f"{self._container.url}/{prefix}".rstrip("/")
        self._owner = self._container.blob(f"{self._prefix}.vm")
        if not existing:
            with contextlib.suppress(Conflict):
                self._owner.put(b"", new=True)
        elif self._owner.find() is None:
            raise InvalidInput(f"there is no replica at {self.url}", remedy="Replicate a VM to it first.")
        _lease(self._owner, self.url, storage.clock, report)
        self._ending.callback(self._owner.release)
        # Leased as long as the place is ours: who has lost the place cannot replace it any more.
        self._record = self._container.blob(f"{self._prefix}{sets.NAME}")
        self._ending.callback(self._record.release)
        self._ending.enter_context(every(_RENEW_SECONDS, self._renew))

    def disk(self, name: str) -> BlobImage:
        """The VHD of the disk `name`: "os" or "data-<lun>"."""
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is no name of a disk", remedy="Use os, or data-<lun>.")
        image = BlobImage(
            self._container, f"{self._prefix}{name}.vhd", self._storage, self._report, self._owner.renew
        )
        self._opened.append(image)
        return image

    def claim(self, vm: str) -> None:
        """Keep whose VHDs these are, and refuse another VM's: they would be overwritten."""
        found = (self._owner.text() or b"").decode("utf-8", "replace").strip()
        if found and found.lower() != vm.lower():
            raise InvalidInput(
                f"{self.url} holds the replica of another VM: {found}",
                remedy="Give each VM a prefix of its own.",
            )
        if not found:
            self._owner.put(vm.encode())

    def record(self) -> bytes | None:
        """The document that says which disks belong together. See Place."""
        return self._record.text() or None

    def keep_record(self, text: bytes) -> None:
        """Replace that document, while the place is ours. See Place."""
        try:
            if not self._record.lease_id:
                with contextlib.suppress(Conflict):
                    self._record.put(b"", new=True)
                _lease(self._record, self._record.url, self._storage.clock, self._report)
                self._owner.renew()
            self._record.put(text)
        except AzureError as error:
            raise DestinationFailed(
                f"{self._record.url} cannot be written: {error}", remedy=error.remedy
            ) from error

    def stop(self) -> None:
        """Whatever is under way on the VHDs ends soon."""
        for image in self._opened:
            image.stop()

    def names(self) -> list[str]:
        """The disks there is a VHD of."""
        ours = (
            found.name[len(self._prefix) :].removesuffix(".vhd")
            for found in self._container.blobs(self._prefix)
            if found.name.endswith(".vhd") and _IMAGE in found.metadata
        )
        return sorted(name for name in ours if _NAME.fullmatch(name))

    def remove(self, disks: Collection[str]) -> None:
        """Delete the VHDs of these disks with their state, and with the last VHD what this place is locked by."""
        for name in disks:
            with self.disk(name) as vhd:
                vhd.remove()
        if not self.names():
            self._record.delete()
            self._owner.delete()

    def reserve(self, disks: Collection[str]) -> None:
        """Nothing: each VHD is leased when it is used. See Folder."""

    def tell_removed(self, disks: Collection[str]) -> None:
        """Report, for each VHD of a disk that is none of `disks`, that it is no longer one of the VM's."""
        for name in self.names():
            if name not in disks:
                kept = f"{self.url}/{name}.vhd"
                self._report(Notice(f"{kept} is kept as it is: {name} is no longer a disk of the VM"))

    def close(self) -> None:
        """Give all leases up. Harmless when repeated."""
        for image in self._opened:
            image.close()
        self._opened = []
        self._ending.close()

    def __enter__(self) -> BlobFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _renew(self) -> None:
        """One that cannot be renewed is told by the next write."""
        for renew in (self._owner.renew, self._record.renew, *(image.renew for image in self._opened)):
            with contextlib.suppress(CoriolisAzureError):
                renew()


def _lease(blob: Blob, place: str, clock: Clock, report: Report) -> None:
    """Lease a blob, as soon as a run that died no longer has it; InvalidInput when one that lives does."""
    until = clock.monotonic() + _LEASE_SECONDS + 5
    told = False
    while True:
        try:
            blob.lease(_LEASE_SECONDS)
        except Conflict as error:
            if error.facts.get("code") not in _TAKEN:
                raise
            if clock.monotonic() >= until:
                raise InvalidInput(
                    f"another run is using {place}",
                    remedy="Wait for it to end, or give another prefix. Break the lease if it is not a run of ours.",
                ) from error
            if not told:
                report(Waiting(f"another run of {place} to end, or its lease to run out", _LEASE_SECONDS))
                told = True
            clock.sleep(5)
        else:
            return


def _region(size: int) -> int:
    """The bytes of a region in a disk of that size."""
    region = REGION
    while region * _REGIONS < vhd.rounded(size):
        region *= 2
    return region


@contextlib.contextmanager
def _unnamed() -> Iterator[IO[bytes]]:
    """A file without a name, for a text that may be too large for memory."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        raise DestinationFailed(
            f"a temporary file of ours cannot be used: {error}",
            remedy="Free space there, or name another folder in TMPDIR, then run again.",
        ) from error
