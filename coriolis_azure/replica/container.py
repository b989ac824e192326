"""A prefix in a container of Blob storage: the place of a VM's replica there.

The lease on `.vm`, beside the VHDs, is its lock. A run that died keeps the next one waiting for a minute at most.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from types import TracebackType

from ..azure.blobs import Blob, Container, Listed, Storage
from ..errors import AzureError, Conflict, CoriolisAzureError, DestinationFailed, InvalidInput
from ..events import Notice, Report
from ..threads import every
from . import publishing, sets
from .page_store import translated
from .points import LABEL
from .replica import Replica
from .vhd_past import POINT
from .vhds import IMAGE, POINTS, VhdMedium, lease

_RENEW_SECONDS = 15
_NAME = re.compile(r"os|data-[0-9]{1,3}")
_DRAFT = re.compile(rf"({_NAME.pattern})\.vhd\.(?:draft|redo|index)")


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
        self._mediums: dict[str, VhdMedium] = {}
        self._replicas: dict[str, Replica] = {}
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
        lease(self._owner, self.url, storage.clock, report)
        self._ending.callback(self._owner.release)
        # Leased as long as the place is ours: who has lost the place cannot replace it any more.
        self._record = self._container.blob(f"{self._prefix}{sets.NAME}")
        self._ending.callback(self._record.release)
        self._ending.enter_context(every(_RENEW_SECONDS, self._renew))
        try:
            if not existing:
                publishing.recover(self, self._drafts())
        except BaseException:
            self.close()
            raise

    def disk(self, name: str) -> Replica:
        """The VHD of the disk `name`: "os" or "data-<lun>"."""
        self._medium(name)
        return self._replicas[name]

    def _medium(self, name: str) -> VhdMedium:
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is no name of a disk", remedy="Use os, or data-<lun>.")
        if name not in self._mediums:
            path = f"{self._prefix}{name}.vhd"
            medium = VhdMedium(self._container, path, self._storage, self._report, self._hold)
            self._mediums[name], self._replicas[name] = medium, Replica(medium, self._report)
        return self._mediums[name]

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

    def publish(self, record: bytes) -> None:
        """Make what was committed the replica. See Place."""
        publishing.publish(self, self._replicas.values(), record)
        publishing.sweep(self._drafts(), record)

    @property
    def points(self) -> BlobPoints:
        """The earlier points that are kept. See Place."""
        return BlobPoints(self._container, self._prefix, self._hold)

    def _hold(self) -> None:
        """AzureError where the place is lost."""
        self._owner.renew()

    def unpublished(self) -> list[str]:
        """The disks of the replica whose images are not yet what its record says. See Place."""
        return [replica.name for replica in publishing.unpublished(self, self._drafts())]

    def _drafts(self) -> list[Replica]:
        """The disks of which there is a draft, or what may be a part of one."""
        names = (blob.name[len(self._prefix) :] for blob in self._container.blobs(self._prefix))
        found = filter(None, map(_DRAFT.fullmatch, names))
        return [self.disk(name) for name in sorted({part[1] for part in found})]

    def keep_record(self, text: bytes) -> None:
        """Replace that document, while the place is ours. See Place."""
        try:
            if not self._record.lease_id:
                with contextlib.suppress(Conflict):
                    self._record.put(b"", new=True)
                lease(self._record, self._record.url, self._storage.clock, self._report)
                self._owner.renew()
            self._record.put(text)
        except AzureError as error:
            raise DestinationFailed(
                f"{self._record.url} cannot be written: {error}", remedy=error.remedy
            ) from error

    def stop(self) -> None:
        """Whatever is under way on the VHDs ends soon."""
        for replica in self._replicas.values():
            replica.stop()

    def names(self) -> list[str]:
        """The disks there is a VHD of."""
        ours = (
            found.name[len(self._prefix) :].removesuffix(".vhd")
            for found in self._container.blobs(self._prefix)
            if found.name.endswith(".vhd") and IMAGE in found.metadata
        )
        return sorted(name for name in ours if _NAME.fullmatch(name))

    def remove(self, disks: Collection[str]) -> None:
        """Delete the VHDs of these disks with their state, and with the last VHD what this place is locked by."""
        for label in self.points.records():
            self.points.remove(label)
        for name in disks:
            medium = self._medium(name)
            medium.delete()
            medium.close()
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
        for replica in self._replicas.values():
            replica.close()
        self._mediums, self._replicas = {}, {}
        self._ending.close()

    def __enter__(self) -> BlobFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _renew(self) -> None:
        """One that cannot be renewed is told by the next write."""
        for renew in (
            self._owner.renew,
            self._record.renew,
            *(medium.renew for medium in list(self._mediums.values())),
        ):
            with contextlib.suppress(CoriolisAzureError):
                renew()


class BlobPoints:
    """The earlier points below a prefix: a folder of blobs each, and snapshots of the VHDs. See Points.

    `hold` raises AzureError where the place is lost.
    """

    def __init__(self, container: Container, prefix: str, hold: Callable[[], None]) -> None:
        self._container, self._prefix, self._hold = container, prefix, hold
        self._points = f"{prefix}{POINTS}/"

    def records(self) -> dict[str, bytes | None]:
        """See Points. Snapshots that no manifest names, as a run leaves them that dies here, are points as well."""
        with self._translated("cannot be read"):
            labels = {listed.name.removeprefix(self._points).partition("/")[0] for listed in self._listed()}
            labels |= {snapshot for snapshot, _ in self._snapshots()}
            found = {label: self._record(label).text() for label in labels if LABEL.fullmatch(label)}
        return {label: text or None for label, text in found.items()}

    def complete(self, label: str, record: bytes) -> None:
        """See Points."""
        with self._translated("cannot be written"):
            self._hold()
            self._record(label).put(record)

    def remove(self, label: str) -> None:
        """See Points."""
        with self._translated("cannot be deleted"):
            self._hold()
            self._record(label).delete()
            for other, snapshot in list(self._snapshots()):
                if other == label:
                    snapshot.delete()
            for listed in list(self._listed(f"{label}/")):
                self._container.blob(listed.name).delete()

    def _record(self, label: str) -> Blob:
        return self._container.blob(f"{self._points}{label}/{sets.NAME}")

    def _listed(self, below: str = "") -> Iterator[Listed]:
        return self._container.blobs(f"{self._points}{below}")

    def _snapshots(self) -> Iterator[tuple[str, Blob]]:
        """The snapshots of VHDs that are of points: the label of each, and itself."""
        for listed in self._container.blobs(self._prefix, past=True):
            ours = "/" not in listed.name.removeprefix(self._prefix)  # else it is of a place below this one
            if ours and listed.snapshot and POINT in listed.metadata:
                yield listed.metadata[POINT], self._container.blob(listed.name, listed.snapshot)

    def _translated(self, what: str) -> contextlib.AbstractContextManager[None]:
        return translated(f"{self._container.url}/{self._points}", what, "")
