"""The volumes that the orchestrator hands over, written through one of its backup writers' ways.

A volume's state travels in its entry of `volumes_info` under `replica_state`. It comes back to us only from runs whose
answer arrived, so it may be older than the volume: whether it may be believed, and whether this run may write, its
record says (`claims`). The state names the record.

An entry without a state is a volume that nothing is known of, unless the destination says that it was made blank
(`zeroed`). It says so for ever, and some say so of volumes that they only attach; so that is believed only while no
run has had to do with a volume of the disk, and the first state that is kept takes the word back.

A volume without a device (`volume_dev` is empty) is kept in Blob storage, in the container that the settings name. Its
state is beside it there, so its entry gets no more than the VHD's URL (`vhd_url`), and it has no record.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from ..azure import names
from ..clock import Clock
from ..errors import CoriolisAzureError, DestinationFailed, DisksChanged, InvalidInput, Unsupported
from ..events import Notice, Report, silent
from ..model import Disk
from ..replica.destinations import Content, Destination
from ..replica.files import FileMedium, FileStore
from ..replica.grains import Grains
from ..replica.manifest import UNKNOWN, ZERO, Manifest
from ..replica.medium import Document, Stamp
from ..replica.replica import Kept, Replica
from ..replica.runmark import RunMark
from ..threads import Lock, every, later, ordered
from . import claims
from .claims import Claim, Claimant

if TYPE_CHECKING:
    from ..replica.container import BlobFolder

LOG = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0  # of silence, after which the other side counts as gone
_LAST_WRITES_SECONDS = 5.0  # for what is on its way when a run is given up
VHD = "vhd_url"
_STATE, _DEVICE, _BLANK = "replica_state", "volume_dev", "zeroed"


class Device(Protocol):
    """A device at the other end of a backup writer's protocol.

    One thread calls `open`, then several `write` and `zero`, then one `flush`, `check` and `close`. Whatever
    goes wrong is DestinationFailed with disk and, where it can be told, offset.
    """

    @property
    def checkable(self) -> bool:
        """What Destination says of it."""

    def open(self) -> None:
        """Reach it."""

    def write(self, offset: int, data: Content) -> None:
        """Put `data` there. That it failed may also be told by a later call."""

    def zero(self, offset: int, length: int) -> None:
        """Write zeros there."""

    def flush(self) -> None:
        """On return all that was written has arrived, and is on the medium as far as the protocol can tell."""

    def check(self) -> bool | None:
        """What Destination says of it."""

    def quiet(self) -> bool:
        """Whether nothing that was sent can be written any more; waits some seconds for what is on its way."""

    def close(self) -> None:
        """Let go of it, whatever state it is in. Harmless when repeated."""


class Volumes:
    """The volumes of one VM, as a destinations.Folder. `disks` are those the VM has now.

    `backend` reaches their devices; None if they are files and devices of this host. `container` opens the place in
    Blob storage for volumes without a device. DisksChanged where a disk has no volume. Entering claims every volume
    for `claimant`: VolumeTaken where another run may be writing to one.
    """

    def __init__(
        self,
        backend: Backend | None,
        volumes_info: Sequence[dict[str, Any]],
        disks: Sequence[Disk],
        claimant: Claimant,
        *,
        container: Callable[[], BlobFolder] | None = None,
    ) -> None:
        self._claimant, self._report = claimant, claimant.report
        self._claims: dict[str, Claim] = {}
        self._backend, self._container = backend, container
        self._ending = ExitStack()
        self._entries = [dict(volume) for volume in volumes_info]
        self._by_name: dict[str, dict[str, Any]] = {}
        for disk, entry in self._matched(disks):
            # A shared disk is copied by its owner's tasks; for the others the destination says so here.
            if entry.get("replicate_disk_data") is not False:
                self._by_name[disk.name] = entry
        self._opened: list[FileVolume | Volume] = []
        self._files: dict[str, FileVolume] = {}
        self._vhds: BlobFolder | None = None

    def _matched(self, disks: Sequence[Disk]) -> Iterator[tuple[Disk, dict[str, Any]]]:
        """Each disk with its volume; DisksChanged where one has none. Volumes without a disk are told of."""
        by_id = {str(entry["disk_id"]).lower(): entry for entry in self._entries}
        for disk in disks:
            entry = by_id.pop(disk.id.lower(), None)
            if entry is None:
                raise DisksChanged(
                    f"{disk.name} ({names.name_of(disk.id)}) has no volume at the destination: the VM has got it since "
                    "the execution began",
                    remedy="Execute the transfer again: it begins with the disks that the VM has then. A disk that is "
                    "not to be replicated can be left out with exclude_disks.",
                    disks=[disk.name],
                )
            yield disk, entry
        for id in by_id:
            self._report(
                Notice(
                    f"the volume of {names.name_of(id)} stays as it is: the VM has no such disk, or it is left out"
                )
            )

    def names(self) -> list[str]:
        """The disks that are to be replicated."""
        return list(self._by_name)

    def vhds(self) -> tuple[BlobFolder | None, list[str]]:
        """The place in Blob storage, None where no volume is a VHD, and the disks whose volumes are VHDs there."""
        return self._vhds, [name for name, entry in self._by_name.items() if not entry.get(_DEVICE)]

    def disk(self, name: str) -> Destination:
        """The destination of the disk `name`."""
        entry = self._by_name[name]
        if self._vhds is not None and not entry.get(_DEVICE):
            vhd = self._vhds.disk(name)
            entry[VHD] = vhd.where
            return vhd
        volume: FileVolume | Volume
        if self._backend is None:
            volume = self._files.setdefault(name, FileVolume(entry, self._report))
        else:
            device = self._backend.device(name, entry[_DEVICE])
            volume = Volume(entry, name, device, self._claims[name], self._report)
        self._opened.append(volume)
        return volume

    def reserve(self, disks: Collection[str]) -> None:
        """Open the volumes that are files or devices of this host, for this run alone. See Folder."""
        if self._backend is None:
            for name in disks:
                volume = self.disk(name) if self._by_name[name].get(_DEVICE) else None
                if isinstance(volume, FileVolume):
                    volume.take()

    def claim(self, vm: str) -> None:
        """Nothing: the orchestrator keeps whose volumes these are."""

    def stop(self) -> None:
        """Whatever is under way on the volumes ends soon."""
        for claim in self._claims.values():
            claim.stop()
        for volume in (*self._opened, *([self._vhds] if self._vhds is not None else [])):
            volume.stop()

    def tell_removed(self, disks: Collection[str]) -> None:
        """Nothing: the orchestrator keeps the list of volumes."""

    @property
    def fenced(self) -> set[str]:
        """The runs from which volumes were taken over: what they have made for these is nobody's any more."""
        return {writer.partition("-")[0] for claim in self._claims.values() for writer in claim.fenced}

    def to_json(self) -> list[dict[str, Any]]:
        """The whole of `volumes_info`, with the states of what was committed."""
        return self._entries

    def close(self) -> None:
        """Let go of all volumes, and when nothing is on its way to any, of the claims on them."""
        for volume in self._opened:
            volume.close()
        for claim in self._claims.values():
            claim.release()
        self._ending.close()

    def __enter__(self) -> Volumes:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def _open(self) -> None:
        without = [entry["disk_id"] for entry in self._by_name.values() if not entry.get(_DEVICE)]
        if without and self._container is None:
            raise InvalidInput(
                f"the volume of disk {without[0]} has no {_DEVICE}",
                remedy="Name storage_account_name and storage_container_name for a replica in Blob storage.",
            )
        if without and self._container is not None:
            self._vhds = self._ending.enter_context(self._container())
        if self._backend is not None:
            self._claim(secrets.token_hex(4))

    def _claim(self, attempt: str) -> None:
        """Claim the volumes."""
        for name, entry in self._by_name.items():
            if entry.get(_DEVICE):
                given = claims.Entry(str(entry["disk_id"]), name, entry.get(_STATE))
                self._claims[name] = self._claimant.claim(given, attempt)
        all_ = list(self._claims.values())
        list(ordered(Claim.acquire, all_, threads=4, ahead=8, abort=self.stop))
        self._ending.enter_context(every(claims.RENEW_SECONDS, self._beat))
        for claim in all_:
            claim.wait_for_fence()

    def _beat(self) -> None:
        """Confirm the claims; where a volume is another run's now, let go of all of them at once."""
        kept = [claim.renew() for claim in self._claims.values()]
        if not all(kept):
            self.stop()
            for volume in self._opened:
                if isinstance(volume, Volume):
                    volume.abandon()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(Protocol):
    """A way to reach the devices of one target."""

    def device(self, disk: str, path: str) -> Device:
        """The device at `path`, which `disk` is written to. Nothing is reached before its `open`."""


class Volume:
    """A volume behind a backup writer: a Destination that cannot be read."""

    readable = False
    far = True
    grains = None

    def __init__(
        self, entry: dict[str, Any], name: str, device: Device, claim: Claim, report: Report
    ) -> None:
        self._entry, self._name, self._device = entry, name, device
        self._claim, self._report = claim, report
        self._lock = Lock()
        self._begun = False
        self._size = 0
        self._stopped = self._abandoned = False

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What the volume holds as its entry says, where that may be believed. See Destination."""
        self._claim.activate()
        base = self._base(disk, size, chunk, full=full)
        self._size = size
        self._device.open()
        return base

    def _base(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        fill = UNKNOWN
        if full:
            pass
        elif _STATE in self._entry:
            kept = self._kept(disk, chunk)
            if kept is not None:
                return kept.resized(size, UNKNOWN)
        elif self._entry.get(_BLANK) is True and self._claim.first_use:
            fill = ZERO
        return Manifest.new(size, chunk, disk, fill)

    def _kept(self, disk: str, chunk: int) -> Manifest | None:
        """The manifest in the entry, if it is one, of this disk, in such chunks."""
        try:
            kept = Manifest.from_json(self._entry[_STATE])
        except InvalidInput as error:
            self._tell(error.message)
            return None
        if not self._claim.current:
            self._tell("the last run did not end well, or its result was lost")
        elif kept.disk != disk:
            self._tell("the volume held another disk")
        elif kept.chunk != chunk:
            self._tell("the chunk size has changed")
        else:
            return kept
        return None

    def _tell(self, why: str) -> None:
        self._report(Notice(f"{self._name} is sent as a whole: {why}"))

    def intend(self, offset: int, length: int) -> None:
        """The volume is about to change; no state of it is believed on return. See Destination."""
        del offset, length
        if self._begun:
            return
        with self._lock:
            if not self._begun:
                self._claim.invalidate()
                self._begun = True

    def write(self, offset: int, data: Content) -> None:
        """Put `data` there. See Destination."""
        self._guard(offset, len(data))
        with self._ours():
            self._device.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros. See Destination."""
        self._guard(offset, length)
        with self._ours():
            self._device.zero(offset, length)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """The block writes; where it fails because the volume is another run's now, that is the reason."""
        try:
            yield
        except DestinationFailed:
            self._claim.wait_for_lease()
            raise
        self._claim.write_ended()

    def stop(self) -> None:
        """Writes under way are the last ones, and are cut off where they take long; from any thread."""
        if not self._stopped:
            self._stopped = True
            later(_LAST_WRITES_SECONDS, self.abandon)

    def abandon(self) -> None:
        """End what is on its way to the device too; from any thread."""
        if not self._abandoned:
            self._abandoned = True
            try:
                self._device.close()
            except CoriolisAzureError as error:
                LOG.warning("%s", error)

    def _guard(self, offset: int, length: int) -> None:
        """A volume may be larger than the disk: what is beyond the disk is not ours. Nor is what another run took."""
        self._claim.wait_for_lease()
        if self._stopped:
            raise DestinationFailed(f"{self._name} was given up", disk=self._name, offset=offset)
        if not 0 <= offset <= offset + length <= self._size:
            text = f"{self._name}: {length} bytes at offset {offset} lie beyond the disk's end"
            raise DestinationFailed(text, disk=self._name, offset=offset)

    def read(self, offset: int, length: int) -> bytes:
        """Not possible: the protocols only write. See Destination."""
        del length
        raise DestinationFailed(f"{self._name} cannot be read back", disk=self._name, offset=offset)

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """Nothing: what a run that fails has written is sent again. See Destination."""

    def flush(self) -> None:
        """See Device."""
        self._device.flush()

    @property
    def checkable(self) -> bool:
        """See Destination."""
        return self._device.checkable

    def check(self) -> bool | None:
        """See Destination."""
        return self._device.check()

    def commit(self, manifest: Manifest) -> None:
        """Record what the volume holds, and put it into the entry; it is no blank volume any more. See Destination."""
        state = {**manifest.to_json(), "record": self._claim.id}
        self._claim.commit(claims.state_name(state))
        self._entry[_STATE] = state
        if _BLANK in self._entry:
            self._entry[_BLANK] = False

    def close(self) -> None:
        """See Device."""
        if self._begun and not self._device.quiet():
            self._claim.note_in_flight()
        self._device.close()

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class VolumeMedium(FileMedium):
    """A file or a block device that is handed over anew in each run, so nothing is kept beside a device."""

    foreign_remedy = (
        "Hand over another volume, or empty this one if nothing in it is needed: truncate -s 0 FILE"
    )

    @property
    def grains(self) -> Grains | None:
        """See Medium."""
        return None if self.is_device else self._grains

    def refuse_foreign(self, kept: Stamp | None) -> None:
        """See Medium. A device was made for this."""
        if not self.is_device:
            super().refuse_foreign(kept)

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """See Medium."""
        return None if self.is_device else super().load(document, ours=ours)

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """See Medium."""
        if not self.is_device:
            super().save(document, pieces)

    def close(self) -> None:
        """See Medium."""
        super().close()
        if self._mark is not None:
            self._mark.end()
            self._mark = None

    def _store(self, fd: int, path: Path) -> FileStore:
        store = super()._store(fd, path)
        if not store.is_device and self._mark is None:
            self._mark = RunMark(self.path.with_name(self.path.name + ".run"), fd)
            self._mark.take()
        return store


class FileVolume(Replica):
    """A volume that is a file or a block device of this host, written in place.

    The state beside a file must be the one in the entry, else nothing of it is believed and the file is read. A device
    has another name in each run, so nothing is kept beside it: it is read.
    """

    def __init__(self, entry: dict[str, Any], report: Report = silent) -> None:
        self._file = VolumeMedium(Path(entry[_DEVICE]))
        super().__init__(self._file, report, in_place=True)
        self._entry = entry

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What the volume holds: nothing is known without a state in its entry."""
        return super().known(disk, size, chunk, full=full or not self._entry.get(_STATE))

    def commit(self, manifest: Manifest) -> None:
        """Keep the manifest beside the volume and in its entry."""
        super().commit(manifest)
        self._entry[_STATE] = manifest.to_json()

    def _load(self, *, ours: bool = True) -> Kept | None:
        """The state that is both in the entry and beside the volume; of a device, the one in the entry."""
        try:
            given = Manifest.from_json(self._entry[_STATE]) if self._entry.get(_STATE) else None
        except InvalidInput as error:
            self._report(Notice(f"{self._file.where}: {error.message}"))
            given = None
        if self._file.is_device:
            return None if given is None else Kept(given, {})
        kept = super()._load(ours=ours)
        if kept is None or kept.manifest == given:
            return kept
        if given is not None:
            self._report(Notice(f"{self._file.where} is not as the state in its entry says"))
        return None


def touched(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a volume that is not, or no longer, as the destination has made it."""
    return {**entry, _BLANK: False} if _BLANK in entry else dict(entry)


def forgotten(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry without what we know of its volume."""
    return {key: value for key, value in touched(entry).items() if key not in (_STATE, VHD)}


def record_ids(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The ids of the records of volumes that entries name."""
    return [id for entry in entries if (id := claims.record_id(entry.get(_STATE)))]


def backend(
    target: dict[str, Any],
    report: Report = silent,
    *,
    compress: bool = False,
    clock: Clock | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Backend | None:
    """The backend that `target` names; None for files and devices of this host.

    `compress`: whether data is compressed; runs of zeros always are. `patience`: seconds of silence after which the
    other side counts as gone. InvalidInput or Unsupported if `target` cannot be used.
    """
    clock = clock or Clock()
    name, details = target.get("backend"), target.get("connection_details") or {}
    if name == "file_backup_writer":
        return None
    # Each of them brings in what it speaks through: loaded where it is used.
    if name == "ssh_backup_writer":
        from . import ssh_writer

        return ssh_writer.Target(details, compress=compress, clock=clock, patience=patience)
    if name == "http_backup_writer":
        from . import http_writer

        return http_writer.Target(details, report, compress=compress, clock=clock, patience=patience)
    raise Unsupported(
        f"the backup writer {name!r} is not known",
        remedy="Use the ssh_backup_writer, the http_backup_writer or the file_backup_writer.",
    )
