"""A prefix in a container of Blob storage: the place of one VM's replica there.

A lease on the blob `.vm`, beside the VHDs, locks the place. After a run died, the next one waits until that lease has
expired: up to a minute. Who may only read takes no lease, and notices a run by that blob's lease and by the record.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from types import TracebackType

from ..azure.blobs import Blob, Container, Listed, Storage
from ..errors import (
    Conflict,
    CoriolisAzureError,
    Denied,
    InvalidInput,
    NoReplica,
    NotFound,
)
from ..events import Notice, Report
from ..model import Image
from ..threads import every
from . import handed_off, history, points, publishing, sets
from .folder import OWNER, of_several
from .page_store import translated
from .replica import Replica
from .vhd_past import POINT
from .vhds import IMAGE, POINTS, VhdMedium, lease

_RENEW_SECONDS = 15
_NAME = re.compile(r"os|data-[0-9]{1,3}")
_DRAFT = re.compile(rf"({_NAME.pattern})\.vhd\.(?:draft|redo|index)")


class BlobFolder:
    """The fixed VHDs under one prefix of a container, exclusively for one run. See Place.

    A missing container is created, unless the place must be `existing`: then it is only read, if need be without the
    right to write. Raises InvalidInput if another run uses the place, or if there is no replica in an `existing` one;
    AzureError if it cannot be used.
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
        if not existing:
            self._refuse_points(prefix)
        self._owner = self._container.blob(f"{self._prefix}{OWNER}")
        if not self._is_owned():
            if existing:
                raise NoReplica(f"there is no replica at {self.url}")
            self._refuse_several()
            with contextlib.suppress(Conflict):
                self._owner.put(b"", new=True)
        # Leased until the end of the run, so that a run that has lost the place cannot replace it.
        self._record = self._container.blob(f"{self._prefix}{sets.NAME}")
        self._seen: str | None = None  # the version of the record, if runs cannot be kept out
        try:
            lease(self._owner, self.url, storage.clock, report)
        except Denied:
            if not existing:
                raise
            self._seen = self._version()
            self._refuse_runs()
        self._ending.callback(self._owner.release)
        self._ending.callback(self._record.release)
        self._ending.enter_context(every(_RENEW_SECONDS, self._renew))
        try:
            if not existing:
                publishing.recover(self, self._drafts())
        except BaseException:
            self.close()
            raise

    def _is_owned(self) -> bool:
        """Whether it is the place of a VM. If the container does not exist, the place is not there either."""
        try:
            return self._owner.find() is not None
        except NotFound:
            return False

    def _refuse_points(self, prefix: str) -> None:
        """Raise InvalidInput if the prefix lies among the earlier points of a replica."""
        parts = prefix.split("/")
        for number, part in enumerate(parts):
            if part == POINTS:
                above = "".join(f"{part}/" for part in parts[:number])
                if self._container.blob(f"{above}{sets.NAME}").find() is not None:
                    raise points.inside(self.url, f"{self._container.url}/{above}".rstrip("/"))

    def _refuse_several(self) -> None:
        """Raise InvalidInput if a first run would hide the replicas of several VMs below this prefix."""
        for blob in self._container.blobs(self._prefix):
            folder, _, name = blob.name[len(self._prefix) :].rpartition("/")
            if name == OWNER and folder and "/" not in folder:
                raise of_several(self.url, f"{self._container.url}/{self._prefix}{folder}", "prefix")

    def disk(self, name: str) -> Replica:
        """The replica of the disk `name`: "os" or "data-<lun>"."""
        self._medium(name)
        return self._replicas[name]

    def _medium(self, name: str) -> VhdMedium:
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is not the name of a disk", remedy="Use os, or data-<lun>.")
        if name not in self._mediums:
            path = f"{self._prefix}{name}.vhd"
            medium = VhdMedium(self._container, path, self._storage, self._report, self._hold)
            self._mediums[name], self._replicas[name] = medium, Replica(medium, self._report)
        return self._mediums[name]

    def claim(self, vm: str) -> None:
        """See Folder. The VM's id is kept in the blob `.vm`."""
        found = (self._owner.text() or b"").decode("utf-8", "replace").strip()
        if found and found.lower() != vm.lower():
            raise InvalidInput(
                f"{self.url} holds the replica of another VM: {found}",
                remedy="Give each VM a prefix of its own.",
            )
        if not found:
            self._owner.put(vm.encode())

    def record(self) -> bytes | None:
        """See Place."""
        return self._record.text() or None

    def publish(self, record: bytes) -> None:
        """See Place."""
        publishing.publish(self, self._replicas.values(), record)
        publishing.sweep(self._drafts(), record)

    @property
    def points(self) -> BlobPoints:
        """See Place."""
        return BlobPoints(self._container, self._prefix, self._hold)

    def _hold(self) -> None:
        """Raise AzureError if this run has lost the place."""
        self._owner.renew()

    def _version(self) -> str:
        """The version of the record; "" if there is none."""
        found = self._record.find()
        return found.etag if found is not None else ""

    def _refuse_runs(self) -> None:
        """Raise InvalidInput if a run uses the place, or has begun since it was opened without a lease."""
        listed = self._container.blobs(self._owner.name)
        if (
            any(blob.leased for blob in listed if blob.name == self._owner.name)
            or self._version() != self._seen
        ):
            raise InvalidInput(
                f"another run is using {self.url}",
                remedy="Wait until it ends, then read it again. Readers that may write there keep runs out.",
            )

    def unpublished(self) -> list[str]:
        """See Place."""
        if self._seen is not None:
            self._refuse_runs()
        return [replica.name for replica in publishing.unpublished(self, self._drafts())]

    def _drafts(self) -> list[Replica]:
        """The disks that have a draft, or any part of one."""
        names = (blob.name[len(self._prefix) :] for blob in self._container.blobs(self._prefix))
        found = filter(None, map(_DRAFT.fullmatch, names))
        return [self.disk(name) for name in sorted({part[1] for part in found})]

    def keep_record(self, text: bytes) -> None:
        """See Place. Only while this run holds the place."""
        with translated(self._record.url, "cannot be written", ""):
            if not self._record.lease_id:
                with contextlib.suppress(Conflict):
                    self._record.put(b"", new=True)
                lease(self._record, self._record.url, self._storage.clock, self._report)
                self._owner.renew()
            self._record.put(text)

    def history(self) -> bytes | None:
        """See Chronicle."""
        return self.document(history.NAME)

    def keep_history(self, text: bytes) -> None:
        """See Chronicle."""
        self.keep_document(history.NAME, text)

    @property
    def where(self) -> str:
        """See HandedOff."""
        return self.url

    def image(self, disk: str) -> Image:
        """See HandedOff."""
        return Image(f"{disk}.vhd", "vpc")

    def document(self, name: str) -> bytes | None:
        """See HandedOff."""
        return self._container.blob(f"{self._prefix}{name}").text()

    def keep_document(self, name: str, text: bytes) -> None:
        """See HandedOff."""
        blob = self._container.blob(f"{self._prefix}{name}")
        with translated(blob.url, "cannot be written", ""):
            self._hold()
            blob.put(text)

    def stop(self) -> None:
        """See Folder."""
        for replica in self._replicas.values():
            replica.stop()

    def names(self) -> list[str]:
        """The names of the disks that have a VHD."""
        ours = (
            found.name[len(self._prefix) :].removesuffix(".vhd")
            for found in self._container.blobs(self._prefix)
            if found.name.endswith(".vhd") and IMAGE in found.metadata
        )
        return sorted(name for name in ours if _NAME.fullmatch(name))

    def remove(self, disks: Collection[str]) -> None:
        """Delete the earlier points, and the VHDs of `disks` with their state; after the last VHD, also the record."""
        for label in self.points.records():
            self.points.remove(label)
        for name in disks:
            medium = self._medium(name)
            medium.delete()
            medium.close()
        if not self.names():
            for name in (history.NAME, *handed_off.NAMES):
                self._container.blob(f"{self._prefix}{name}").delete()
            self._record.delete()
            self._owner.delete()

    def reserve(self, disks: Collection[str]) -> None:
        """Do nothing: each VHD is leased when it is used. See Folder."""

    def tell_removed(self, disks: Collection[str]) -> None:
        """See Folder."""
        for name in self.names():
            if name not in disks:
                url = f"{self.url}/{name}.vhd"
                self._report(Notice(f"{url} is kept as it is: the VM no longer has the disk {name}"))

    def close(self) -> None:
        """Release all leases. May be repeated."""
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
        """Renew all leases. If one is lost, the next write fails."""
        for renew in (
            self._owner.renew,
            self._record.renew,
            *(medium.renew for medium in list(self._mediums.values())),
        ):
            with contextlib.suppress(CoriolisAzureError):
                renew()


class BlobPoints:
    """The earlier points of a place: for each, blobs under one prefix, and snapshots of the VHDs. See Points.

    `hold`: raises AzureError if this run has lost the place.
    """

    def __init__(self, container: Container, prefix: str, hold: Callable[[], None]) -> None:
        self._container, self._prefix, self._hold = container, prefix, hold
        self._points = f"{prefix}{POINTS}/"

    def records(self) -> dict[str, bytes | None]:
        """See Points. A snapshot that no manifest names counts too: a run died after it took that snapshot."""
        with self._translated("cannot be read"):
            labels = {listed.name.removeprefix(self._points).partition("/")[0] for listed in self._listed()}
            labels |= {snapshot for snapshot, _ in self._snapshots()}
            found = {label: self._record(label).text() for label in labels if points.LABEL.fullmatch(label)}
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
        """Yield the label of the point and the snapshot, for each snapshot of a VHD that belongs to a point."""
        for listed in self._container.blobs(self._prefix, past=True):
            ours = "/" not in listed.name.removeprefix(
                self._prefix
            )  # otherwise it belongs to another place, under this one
            if ours and listed.snapshot and POINT in listed.metadata:
                yield listed.metadata[POINT], self._container.blob(listed.name, listed.snapshot)

    def _translated(self, what: str) -> contextlib.AbstractContextManager[None]:
        return translated(f"{self._container.url}/{self._points}", what, "")
