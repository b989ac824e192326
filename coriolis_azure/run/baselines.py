"""The snapshots that outlive runs, so that Azure can list what has changed since.

Of each disk and destination there is one: the snapshot whose content the replica has. Between runs nobody can read it,
it carries an end date, and the tag that names its stream instead of that of a run.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Protocol, runtime_checkable

from ..azure import names
from ..azure.context import Context
from ..errors import AzureError, CoriolisAzureError, DeadlinePassed
from ..events import Notice
from ..model import Json, at
from ..threads import Lock
from .resources import Resources
from .shelves import Managed, Shelf, Vhds, vhds_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """The incremental snapshot whose content a replica of a disk has; kept until the next run.

    `stream`: a random name for the replica of the disk at this destination. `proved`: whether a list of changes in
    this family was compared with all of the disk. `turn`: the number of runs that have relied on lists since.
    """

    stream: str
    id: str
    unique_id: str
    made: str
    family: str
    disk: str
    size: int
    proved: bool = False
    turn: int = 0

    @classmethod
    def of(cls, snapshot: Json, stream: str) -> Baseline:
        """The baseline that a snapshot would be, by Azure's document of it."""
        properties = snapshot["properties"]
        return cls(
            stream=stream,
            id=str(snapshot["id"]),
            unique_id=str(properties.get("uniqueId") or ""),
            made=str(properties.get("timeCreated") or ""),
            family=str(properties.get("incrementalSnapshotFamilyId") or ""),
            disk=str(at(snapshot, "properties.creationData.sourceUniqueId") or ""),
            size=int(properties.get("diskSizeBytes") or 0),
        )

    @classmethod
    def from_json(cls, document: Json) -> Baseline:
        """The baseline of a document that `to_json` made. Raises TypeError or ValueError for any other."""
        baseline = cls(**document)
        if not all(isinstance(getattr(baseline, name), kind) for name, kind in _FIELDS.items()):
            raise TypeError("a field of the baseline has another type")
        return baseline

    @classmethod
    def recorded(cls, document: Json | None) -> Baseline | None:
        """The baseline of a document that a run has left; None if there is none of use."""
        try:
            return cls.from_json(document) if document is not None else None
        except (TypeError, ValueError):
            return None

    def following(self, before: Baseline | None, *, proved: bool) -> Baseline:
        """This one as that of the run after the one that left `before`."""
        return replace(self, proved=proved, turn=before.turn + 1 if before is not None else 0)

    def is_of(self, other: Baseline) -> bool:
        """Whether both are the same snapshot."""
        return replace(self, proved=other.proved, turn=other.turn) == other

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


_FIELDS = dict.fromkeys(("stream", "id", "unique_id", "made", "family", "disk"), str) | {
    "size": int,
    "proved": bool,
    "turn": int,
}


@dataclass(frozen=True)
class Owner:
    """Whose baselines they are, if no manifest tells: a disk of a replica, or the volume of a disk.

    `disk`: the disk's ARM id. `stream`: that of the replica's record or of the state in the volume's entry, "" without
    one. `destination`: a digest of how the orchestrator describes the volume, "" for a replica. Without a stream,
    baselines of the disk that were made for the same words are its own: an execution has left them whose result was
    lost.
    """

    disk: str
    stream: str
    destination: str = ""

    def owns(self, snapshot: Json) -> bool:
        """Whether a snapshot, by Azure's document of it, is one of its baselines."""
        tags = names.tags_of(snapshot)
        stream = tags.get(names.BASELINE_TAG)
        source = str(at(snapshot, "properties.creationData.sourceResourceId") or "")
        if not stream or not names.same(source, self.disk):
            return False
        return stream == self.stream if self.stream else tags.get(names.DESTINATION_TAG) == self.destination


@runtime_checkable
class Owned(Protocol):
    """A folder that knows whose the baselines of its disks are, even if the disks do not."""

    def owners(self) -> Mapping[str, Owner]:
        """The owners, by disk name."""


class Baselines:
    """The baselines of one run: those it begins at, and those that it leaves. For threads.

    `owners`: those of disks whose destinations may not know their streams, by disk name.
    """

    def __init__(
        self, context: Context, resources: Resources, owners: Mapping[str, Owner] | None = None
    ) -> None:
        self._context, self._resources = context, resources
        self._owners = dict(owners or {})
        self._streams: dict[str, str] = {}
        self._older: dict[str, Baseline] = {}
        self._newer: dict[str, Baseline] = {}
        self._lock = Lock()

    def own(self, owners: Mapping[str, Owner]) -> None:
        """Before anything is begun: also the baselines of these owners are those of the run's disks."""
        self._owners |= owners

    def begin(self, disk: str, baseline: Baseline | None) -> str:
        """A disk's replica has this baseline, or none; return the name of its stream."""
        with self._lock:
            if baseline is not None:
                self._older[disk] = baseline
            known = baseline or self._owners.get(disk)
            stream = (known.stream if known is not None else "") or secrets.token_hex(8)
            return self._streams.setdefault(disk, stream)

    def open(self, baseline: Baseline) -> Json | None:
        """Let a baseline be read, and return Azure's document of it; None if it is gone or is no baseline of ours."""
        return self._shelf(baseline.id).open(baseline.id, baseline.stream)

    def close(self, baseline: Baseline) -> None:
        """Let a baseline no longer be read. A failure is only logged: it is deleted when the run ends well."""
        self._shelf(baseline.id).close(baseline.id)

    def leave(self, disk: str, baseline: Baseline) -> None:
        """A disk's new replica is going to have this baseline, a snapshot of this run."""
        with self._lock:
            self._newer[disk] = baseline

    def keep(self) -> None:
        """Make baselines of the snapshots to leave: from now on they outlive the run.

        One that cannot be kept is deleted with the run: then the next run reads all of that disk.
        """
        for disk, baseline in self._newer.items():
            shelf = self._shelf(baseline.id)
            tags = {**self._context.environment.tags, **self.tags(disk, baseline.stream)}
            try:
                shelf.keep(baseline.id, tags)
            except (AzureError, DeadlinePassed) as error:
                self._context.report(
                    Notice(f"{disk}: its snapshot is not kept as a baseline: {error.message}")
                )
            else:
                self._resources.outlives(shelf.journaled(baseline.id, self._resources.run.id))

    def tags(self, disk: str, stream: str) -> dict[str, str]:
        """The tags of a baseline that is made now."""
        context = self._context
        now = context.azure.now(context.clock)
        tags = {
            names.BASELINE_TAG: stream,
            names.INSTANCE_TAG: self._resources.run.instance[:256],
            names.ROLE_TAG: f"baseline-{disk}",
            names.MADE_TAG: names.stamp(now),
            names.UNTIL_TAG: names.stamp(now + timedelta(days=context.environment.baseline_days)),
        }
        if disk in self._owners and (destination := self._owners[disk].destination):
            tags[names.DESTINATION_TAG] = destination
        return tags

    def retire(self) -> None:
        """Delete the baselines that the replica no longer has, and report those that could not be deleted."""
        try:
            remaining = self._resources.delete(self._old())
        except (AzureError, DeadlinePassed) as error:
            self._context.report(Notice(f"older baselines may remain until their end date: {error.message}"))
            return
        for id in remaining:
            self._context.report(Notice(f"the older baseline {id} could not be deleted"))

    def _old(self) -> list[str]:
        """The ids of the baselines of these disks and destinations but for those that are left."""
        kept = {baseline.id.lower() for baseline in self._newer.values()}
        ours = [*self._older.values(), *self._newer.values()]
        streams = {each.stream for each in ours}
        ids = [*(each.id for each in ours), *(owner.disk for owner in self._owners.values())]
        return [
            document["id"]
            for document in _like(self._context, ids)
            if str(document["baseline"]).lower() not in kept
            and (
                names.tags_of(document).get(names.BASELINE_TAG) in streams
                or any(owner.owns(document) for owner in self._owners.values())
            )
        ]

    def _shelf(self, id: str) -> Shelf:
        return Managed(self._context) if _is_managed(id) else Vhds(self._context)


def _like(context: Context, ids: Iterable[str]) -> list[Json]:
    """All baselines on the shelves of these baselines or disks; see `Shelf.of`."""
    managed, vhds = list[str](), list[str]()
    for id in ids:
        (managed if _is_managed(id) else vhds).append(id)
    return [
        *(Managed(context).of(managed) if managed else ()),
        *(Vhds(context).of(vhds) if vhds else ()),
    ]


def _is_managed(id: str) -> bool:
    return names.ArmId.parsed(id) is not None


@dataclass(frozen=True)
class Listed:
    """A baseline in Azure. `until` is its end date as the tag has it."""

    id: str
    instance: str
    disk: str
    made: str
    until: str
    used_bytes: int

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def listed(context: Context) -> list[Listed]:
    """All baselines in the resource group and of its VMs' VHD blobs, by VM and disk."""
    vhds = vhds_of(context.azure.resources("vm", context.environment.resource_group))
    documents = [*Managed(context).of([]), *(each for vhd in vhds for each in _of_vhd(context, vhd))]
    found = [(document, names.tags_of(document)) for document in documents]
    ours = [
        Listed(
            id=document["id"],
            instance=tags.get(names.INSTANCE_TAG, ""),
            disk=tags.get(names.ROLE_TAG, "").removeprefix("baseline-"),
            made=tags.get(names.MADE_TAG, ""),
            until=tags.get(names.UNTIL_TAG, ""),
            used_bytes=int(at(document, "properties.diskSizeBytes") or 0),
        )
        for document, tags in found
    ]
    return sorted(ours, key=lambda each: (each.instance, each.disk, each.made))


def _of_vhd(context: Context, vhd: str) -> list[Json]:
    """The baselines of a VHD. If its account cannot be read, nobody can tell; other VMs must not suffer from that."""
    try:
        return Vhds(context).of([vhd])
    except CoriolisAzureError as error:
        LOG.warning("cannot look for baselines of %s: %s", vhd, error)
        return []


def owned(context: Context, owners: Sequence[Owner]) -> list[str]:
    """The ids of the baselines of these owners."""
    documents = _like(context, [owner.disk for owner in owners])
    return [each["id"] for each in documents if any(owner.owns(each) for owner in owners)]


def expired(context: Context, baselines: Iterable[Listed]) -> list[Listed]:
    """Those whose end date has passed by Azure's clock; one without a date has none."""
    now = context.azure.now(context.clock)
    return [each for each in baselines if (until := names.moment(each.until)) is not None and until <= now]
