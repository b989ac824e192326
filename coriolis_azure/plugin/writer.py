"""The volumes that the orchestrator hands over, written through one of its backup writers.

The state of a volume travels in its entry of `volumes_info`, under `replica_state` (`states`). The orchestrator returns
it only if the answer of the run that produced it arrived, so it may be older than the volume. The volume's record
(`claims`), which the state names, tells whether the state may be trusted and whether this run may write.

An entry without a state means that nothing is known about its volume, unless the destination says that it created the
volume blank (`zeroed`). Some destinations say so even of volumes that they only attach, and the flag is never reset.
So it is trusted only while no run has ever used a volume of the disk; the first state that is stored clears it.

A volume without a device (`volume_dev` is empty) is stored in Blob storage, in the container of the settings. Its
state is beside it, so its entry gets only the VHD's URL (`vhd_url`), and it has no record.
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
from ..model import Disk, Json
from ..replica.destinations import Content, Destination
from ..replica.documents import Saved
from ..replica.file_store import FileStore
from ..replica.files import FileMedium
from ..replica.grains import Grains
from ..replica.manifest import UNKNOWN, ZERO, Manifest
from ..replica.medium import Document, Stamp
from ..replica.replica import Replica
from ..replica.runmark import RunMark
from ..run.baselines import Owner
from ..threads import Lock, every, later, ordered
from . import claims, states
from .claims import Claim, Claimant
from .states import BLANK, STATE, VHD

if TYPE_CHECKING:
    from ..replica.container import BlobFolder

LOG = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0  # after so long without an answer, the other side counts as gone
_LAST_WRITES_SECONDS = 5.0  # how long data in flight may still arrive when a run is stopped
_DEVICE = "volume_dev"


class Device(Protocol):
    """A device at the other end of a backup writer's protocol.

    One thread calls `open`, then several threads call `write` and `zero`, then one calls `flush`, `check` and `close`.
    Failures are raised as DestinationFailed, with the disk and, if it is known, the offset.
    """

    @property
    def checkable(self) -> bool:
        """See Destination."""

    def open(self) -> None:
        """Connect to the device."""

    def write(self, offset: int, data: Content) -> None:
        """Write `data` at `offset`. A failure may be raised only by a later call."""

    def zero(self, offset: int, length: int) -> None:
        """Write `length` zeros at `offset`."""

    def flush(self) -> None:
        """Wait until everything written has arrived and, as far as the protocol can tell, is on the medium."""

    def check(self) -> bool | None:
        """See Destination."""

    def quiet(self) -> bool:
        """Whether all data sent was either written or lost; waits some seconds for data in flight."""

    def close(self) -> None:
        """Disconnect, in any state. May be repeated."""


class Volumes:
    """The volumes of one VM, as a destinations.Folder. `disks` are those that the VM has now.

    `backend` connects to their devices; None if they are files or devices of this host. `container` opens the place in
    Blob storage for volumes without a device. Raises DisksChanged if a disk has no volume. Entering the context claims
    every volume for `claimant`; raises VolumeTaken if another run may be writing to one.
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
            # A shared disk is copied by the tasks of one VM only; for the others, the destination sets this flag.
            if entry.get("replicate_disk_data") is not False:
                self._by_name[disk.name] = entry
        # As the entries are now: a run changes them.
        self._owners = {name: owner(entry) for name, entry in self._by_name.items()}
        self._opened: dict[str, FileVolume | Volume] = {}
        self._vhds: BlobFolder | None = None

    def _matched(self, disks: Sequence[Disk]) -> Iterator[tuple[Disk, dict[str, Any]]]:
        """Yield each disk with its volume; DisksChanged if one has none. Volumes without a disk are reported."""
        by_id = {str(entry["disk_id"]).lower(): entry for entry in self._entries}
        for disk in disks:
            entry = by_id.pop(disk.id.lower(), None)
            if entry is None:
                raise DisksChanged(
                    f"{disk.name} ({names.name_of(disk.id)}) has no volume at the destination: it was attached to the "
                    "VM after the execution began",
                    remedy="Execute the transfer again; it starts with the disks that the VM has then. To leave out a "
                    "disk, name it in exclude_disks.",
                    disks=[disk.name],
                )
            yield disk, entry
        for id in by_id:
            self._report(
                Notice(
                    f"the volume of {names.name_of(id)} is not changed: the VM has no such disk, or it is excluded"
                )
            )

    def names(self) -> list[str]:
        """The names of the disks to replicate."""
        return list(self._by_name)

    def vhds(self) -> tuple[BlobFolder | None, list[str]]:
        """The place in Blob storage (None if no volume is a VHD) and the disks whose volumes are VHDs there."""
        return self._vhds, [name for name, entry in self._by_name.items() if not entry.get(_DEVICE)]

    def owners(self) -> dict[str, Owner]:
        """Whose the baselines of these volumes are, by disk name."""
        return self._owners

    def disk(self, name: str) -> Destination:
        """The destination of the disk `name`."""
        entry = self._by_name[name]
        if self._vhds is not None and not entry.get(_DEVICE):
            vhd = self._vhds.disk(name)
            entry[VHD] = vhd.where
            return vhd
        if name not in self._opened:
            self._opened[name] = self._volume(name, entry)
        return self._opened[name]

    def _volume(self, name: str, entry: dict[str, Any]) -> FileVolume | Volume:
        if self._backend is None:
            return FileVolume(entry, self._report)
        device = self._backend.device(name, entry[_DEVICE])
        return Volume(entry, name, device, self._claims[name], self._report)

    def reserve(self, disks: Collection[str]) -> None:
        """Open the volumes that are files or devices of this host for this run exclusively. See Folder."""
        if self._backend is None:
            for name in disks:
                volume = self.disk(name) if self._by_name[name].get(_DEVICE) else None
                if isinstance(volume, FileVolume):
                    volume.take()

    def claim(self, vm: str) -> None:
        """Do nothing: the orchestrator knows whose volumes these are."""

    def stop(self) -> None:
        """Make everything in progress on the volumes end soon."""
        for claim in self._claims.values():
            claim.stop()
        for volume in (*self._opened.values(), *([self._vhds] if self._vhds is not None else [])):
            volume.stop()

    def tell_removed(self, disks: Collection[str]) -> None:
        """Do nothing: the orchestrator keeps the list of volumes."""

    @property
    def fenced(self) -> set[str]:
        """The ids of the runs from which volumes were taken over; what they created for them is orphaned."""
        return {writer.partition("-")[0] for claim in self._claims.values() for writer in claim.fenced}

    def to_json(self) -> list[dict[str, Any]]:
        """All of `volumes_info`, with the states that were committed."""
        return self._entries

    def close(self) -> None:
        """Close all volumes, then release the claims on them."""
        for volume in self._opened.values():
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
                claimed = claims.Entry(str(entry["disk_id"]), name, entry.get(STATE))
                self._claims[name] = self._claimant.claim(claimed, attempt)
        all_ = list(self._claims.values())
        list(ordered(Claim.acquire, all_, threads=4, ahead=8, abort=self.stop))
        self._ending.enter_context(every(claims.RENEW_SECONDS, self._beat))
        for claim in all_:
            claim.wait_for_fence()

    def _beat(self) -> None:
        """Renew the claims; if another run has taken over a volume, abandon all volumes at once."""
        held = [claim.renew() for claim in self._claims.values()]
        if not all(held):
            self.stop()
            for volume in list(self._opened.values()):
                if isinstance(volume, Volume):
                    volume.abandon()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(Protocol):
    """A connection to the devices of one target."""

    def device(self, disk: str, path: str) -> Device:
        """The device at `path`, to which `disk` is written. It is not connected before its `open`."""


class Volume:
    """A volume behind a backup writer: a Destination that cannot be read back."""

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
        self._opened = self._stopped = self._abandoned = False
        self._based: tuple[Manifest, Json] | None = None
        self._ask_baseline: Callable[[], Json | None] = lambda: None

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What the volume holds according to its entry, if that can be trusted. See Destination.

        Once this run has written, nothing is known any more.
        """
        self._claim.activate()
        self._based = None
        base = self._base(disk, size, chunk, full=full or self._begun)
        self._size = size
        if not self._opened:
            self._device.open()
            self._opened = True
        return base

    @property
    def baseline(self) -> tuple[Manifest, Json] | None:
        """See Based."""
        return self._based

    def left(self) -> Json | None:
        """See Based."""
        return states.baseline_in(self._entry.get(STATE))

    def leave(self, baseline: Callable[[], Json | None]) -> None:
        """See Based."""
        self._ask_baseline = baseline

    def _base(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        fill = UNKNOWN
        if full:
            pass
        elif STATE in self._entry:
            stored = self._stored(disk, chunk)
            if stored is not None:
                self._based = based(stored, self._entry[STATE], self._name, self._report)
                return stored.resized(size, UNKNOWN)
        elif self._entry.get(BLANK) is True and self._claim.first_use:
            fill = ZERO
        return Manifest.new(size, chunk, disk, fill)

    def _stored(self, disk: str, chunk: int) -> Manifest | None:
        """The manifest in the entry, if it is valid, current, of this disk, and has chunks of this size."""
        try:
            stored = Manifest.from_json(self._entry[STATE])
        except InvalidInput as error:
            self._tell(error.message)
            return None
        if not self._claim.current:
            self._tell("the last run failed, or its result was lost")
        elif stored.disk != disk:
            self._tell("the volume held another disk")
        elif stored.chunk != chunk:
            self._tell("the chunk size has changed")
        else:
            return stored
        return None

    def _tell(self, why: str) -> None:
        self._report(Notice(f"all of {self._name} is sent: {why}"))

    def intend(self, offset: int, length: int) -> None:
        """Before the first change, record that the volume's content is unknown. See Destination."""
        del offset, length
        if self._begun:
            return
        with self._lock:
            if not self._begun:
                self._claim.invalidate()
                self._begun = True

    def write(self, offset: int, data: Content) -> None:
        """Write `data` at `offset`. See Destination."""
        self._guard(offset, len(data))
        with self._writing():
            self._device.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros. See Destination."""
        self._guard(offset, length)
        with self._writing():
            self._device.zero(offset, length)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """If a write in the block fails after another run took over the volume, raise that as the reason."""
        try:
            yield
        except DestinationFailed:
            self._claim.wait_for_lease()
            raise
        self._claim.write_ended()

    def stop(self) -> None:
        """Accept no more writes, and disconnect if those in progress take long. Any thread may call this."""
        if not self._stopped:
            self._stopped = True
            later(_LAST_WRITES_SECONDS, self.abandon)

    def abandon(self) -> None:
        """Disconnect at once, even with data in flight. Any thread may call this."""
        if not self._abandoned:
            self._abandoned = True
            try:
                self._device.close()
            except CoriolisAzureError as error:
                LOG.warning("%s", error)

    def _guard(self, offset: int, length: int) -> None:
        """Refuse writes after a stop, without a lease, or beyond the disk's end: the volume may be larger."""
        self._claim.wait_for_lease()
        if self._stopped:
            raise DestinationFailed(f"{self._name} was stopped", disk=self._name, offset=offset)
        if not 0 <= offset <= offset + length <= self._size:
            text = f"{self._name}: {length} bytes at offset {offset} lie beyond the disk's end"
            raise DestinationFailed(text, disk=self._name, offset=offset)

    def read(self, offset: int, length: int) -> bytes:
        """Raise DestinationFailed: the protocols can only write. See Destination."""
        del length
        raise DestinationFailed(f"{self._name} cannot be read back", disk=self._name, offset=offset)

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """Do nothing: what a failed run has written is sent again. See Destination."""

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
        """Record what the volume holds, and store it in the entry, no longer marked as blank. See Destination."""
        state = {**manifest.to_json(), "record": self._claim.id}
        state = states.with_baseline(state, self._ask_baseline())
        self._claim.commit(claims.state_name(state))
        self._entry[STATE] = state
        if BLANK in self._entry:
            self._entry[BLANK] = False

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
    """A file or a block device. The path of a device differs in each run, so no state is kept beside a device."""

    foreign_remedy = (
        "Provide another volume, or empty this one if nothing in it is needed: truncate -s 0 FILE"
    )

    @property
    def grains(self) -> Grains | None:
        """See Medium."""
        return None if self.is_device else self._grains

    def refuse_foreign(self, stamp: Stamp | None) -> None:
        """See Medium. A device was created for this purpose, so it is never refused."""
        if not self.is_device:
            super().refuse_foreign(stamp)

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

    The state beside a file is trusted only if it equals the one in the entry; otherwise the file is read. A device is
    always read: its path differs in each run, so no state is kept beside it.
    """

    def __init__(self, entry: dict[str, Any], report: Report = silent) -> None:
        self._file = VolumeMedium(Path(entry[_DEVICE]))
        super().__init__(self._file, report, in_place=True)
        self._entry = entry

    @property
    def baseline(self) -> tuple[Manifest, Json] | None:
        """See Based. What the volume holds is known by then; the entry tells what the baseline held."""
        in_entry = self._in_entry()
        return based(in_entry, self._entry[STATE], self._file.name, self._report) if in_entry else None

    def left(self) -> Json | None:
        """See Based."""
        return states.baseline_in(self._entry.get(STATE))

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What the volume holds. Nothing is known without a state in its entry. See Destination."""
        return super().known(disk, size, chunk, full=full or not self._entry.get(STATE))

    def commit(self, manifest: Manifest) -> None:
        """Store the manifest beside the volume and in its entry. See Destination."""
        super().commit(manifest)
        self._entry[STATE] = states.with_baseline(manifest.to_json(), self._baseline)

    def _in_entry(self) -> Manifest | None:
        """The manifest in the entry."""
        try:
            return Manifest.from_json(self._entry[STATE]) if self._entry.get(STATE) else None
        except InvalidInput as error:
            self._report(Notice(f"{self._file.where}: {error.message}"))
            return None

    def _load(self, *, ours: bool = True) -> Saved | None:
        """The state, if it is the same in the entry and beside the volume; for a device, the one in the entry."""
        in_entry = self._in_entry()
        if self._file.is_device:
            return None if in_entry is None else Saved(in_entry, {})
        beside = super()._load(ours=ours)
        if beside is None or beside.manifest == in_entry:
            return beside
        if in_entry is not None:
            self._report(Notice(f"{self._file.where} differs from the state in its entry"))
        return None


def based(manifest: Manifest, state: Json, name: str, report: Report) -> tuple[Manifest, Json] | None:
    """The manifest of a state with its baseline; None without one."""
    baseline = states.baseline_in(state)
    if baseline is None and states.has_baseline(state):
        report(Notice(f"{name}: the baseline in its state is not used: it is damaged, or of another state"))
    return (manifest, baseline) if baseline is not None else None


def owner(entry: dict[str, Any]) -> Owner:
    """Whose the baselines of an entry's volume are."""
    baseline = states.baseline_in(entry.get(STATE)) or {}
    return Owner(str(entry["disk_id"]), str(baseline.get("stream") or ""), states.description(entry))


def no_longer_blank(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, with the mark removed that the destination created its volume blank."""
    return {**entry, BLANK: False} if BLANK in entry else dict(entry)


def forgotten(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry without the state of its volume."""
    return {key: value for key, value in no_longer_blank(entry).items() if key not in (STATE, VHD)}


def record_ids(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The ids of the records that the states in the entries name."""
    return [id for entry in entries if (id := claims.record_id(entry.get(STATE)))]


def backend(
    target: dict[str, Any],
    report: Report = silent,
    *,
    compress: bool = False,
    clock: Clock | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Backend | None:
    """The backend that `target` names; None for files and devices of this host.

    `compress`: whether to compress data; runs of zeros are always compressed. `patience`: the seconds without an answer
    after which the other side counts as gone. Raises InvalidInput or Unsupported if `target` cannot be used.
    """
    clock = clock or Clock()
    name, details = target.get("backend"), target.get("connection_details") or {}
    if name == "file_backup_writer":
        return None
    # Imported only if used: each module loads its protocol's library.
    if name == "ssh_backup_writer":
        from . import ssh_writer

        return ssh_writer.Target(details, compress=compress, clock=clock, patience=patience)
    if name == "http_backup_writer":
        from . import http_writer

        return http_writer.Target(details, report, compress=compress, clock=clock, patience=patience)
    raise Unsupported(
        f"the backup writer {name!r} is unknown",
        remedy="Use the ssh_backup_writer, the http_backup_writer or the file_backup_writer.",
    )
