"""This process reads the snapshots: as a whole, their allocated pages, or what has changed since a baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..azure import names
from ..azure.context import Context
from ..azure.page_lists import SnapshotBlob
from ..azure.pages import Pages
from ..errors import AzureError, DeadlinePassed
from ..events import Notice, Step
from ..machine import exports
from ..model import Disk, Json, Machine
from ..readers.changed import Changed
from ..readers.extents import Everything, Extents
from ..readers.flow import Flow
from ..readers.pages import AHEAD, PageReader
from ..readers.plan import Known, Proved
from ..readers.reader import Reader
from ..replica.destinations import Based, Destination
from ..replica.manifest import Manifest
from ..run.baselines import Baseline, Baselines
from ..run.resources import Resources
from ..settings import SNAPSHOTS
from ..transfer import Outcome
from . import change_lists
from .freezing import freeze
from .target import Read, Target, listed

Exporter = Callable[[Context, Json, int], SnapshotBlob]

_DISKS = 4  # most disks that are read at a time
_NO_LIST = "the disks of restore points are not compared with each other"


def copy(target: Target, resources: Resources, machine: Machine, disks: Sequence[Disk]) -> list[Outcome]:
    """Copy disks by reading their snapshots in this process."""
    context = target.context
    snapshots = freeze(context, resources, machine, disks, exported=lambda _: "yes")
    with exports.opened(context, disks, snapshots) as contents:
        context.report(Step("copy", listed(disks)))
        return read(target, disks, contents, target.baselines)


def read(
    target: Target,
    disks: Sequence[Disk],
    contents: Mapping[str, SnapshotBlob],
    baselines: Baselines | None,
    exported: Exporter = exports.exported,
) -> list[Outcome]:
    """Copy disks whose snapshots can be read."""
    reading = SnapshotReading(target.context, contents, baselines, target.flow, exported)
    try:
        return target.copied(disks, reading.reader, concurrent=reading.concurrent)
    finally:
        target.read |= reading.read()


class SnapshotReading:
    """The readers of a VM's disks, from the exported content of their snapshots. For threads, one a disk."""

    def __init__(
        self,
        context: Context,
        contents: Mapping[str, SnapshotBlob],
        baselines: Baselines | None,
        flow: Callable[[Disk], Flow],
        exported: Exporter,
    ) -> None:
        self._context, self._contents, self._baselines, self._flow = context, contents, baselines, flow
        self._exported = exported
        self._disks: dict[str, ListedDisk] = {}
        self._readers: dict[str, PageReader] = {}
        # Azure limits each snapshot by itself, so one after the other would take longer.
        most = AHEAD // (context.environment.chunk_size_kib << 10) // 2
        self.concurrent = max(1, min(_DISKS, most, len(contents)))

    def reader(self, disk: Disk, destination: Destination) -> Reader:
        """A reader for a disk, now that `destination` knows what it holds."""
        state = self._disks.setdefault(disk.name, ListedDisk(self._context, disk, self._exported))
        content = self._contents[disk.name]
        state.prepare(destination, self._baselines)
        state.look(content)
        reader = self._readers[disk.name] = PageReader(
            content,
            self._flow(disk),
            state.extents,
            state.changed,
            grains=grains_of(destination),
            sharers=self._sharers,
        )
        return reader

    def _sharers(self) -> int:
        """How many disks are read at the moment, or begin before one of these has ended."""
        ended = sum(reader.ended for reader in list(self._readers.values()))
        return max(1, min(self.concurrent, len(self._contents) - ended))

    def read(self) -> dict[str, Read]:
        """What was read of each disk, by name."""
        return {name: state.read(SNAPSHOTS) for name, state in self._disks.items()}


def grains_of(destination: Destination) -> Proved | None:
    """What gives the digests of the grains that a destination has of a chunk; None if it stores none."""
    return destination.grains.proved if destination.grains is not None else None


class ListedDisk:
    """One disk: what Azure lists of its pages, and the baseline that its replica has and is going to have.

    For one reader after the other: `prepare`, then `look`, then `changed` and `extents`.
    """

    def __init__(self, context: Context, disk: Disk, exported: Exporter) -> None:
        self._context, self._disk, self._exported = context, disk, exported
        self._content: SnapshotBlob | None = None
        self._allocated: Pages | None = None
        self._changed: Changed | None = None
        self._listed, self._reason = 0, ""
        self._baseline: Baseline | None = None  # of the replica that is there
        self._attested: Manifest | None = None  # what was committed with it
        self._baselines: Baselines | None = None
        self._destination: Based | None = None
        self._stream, self._distrusted = "", False

    def prepare(self, destination: Destination, baselines: Baselines | None) -> None:
        """Find the baseline of the replica, now that `destination` knows what it holds."""
        self._distrusted = self._changed is not None and self._changed.unlisted is not None
        self._allocated = self._changed = self._content = None
        if baselines is None or not isinstance(destination, Based):
            return
        self._destination, self._baselines = destination, baselines
        self._baseline, self._attested = self._found(destination)
        self._stream = baselines.begin(self._disk.name, self._baseline)

    def look(self, content: SnapshotBlob) -> None:
        """Have Azure list the allocated pages of the snapshot, which will be kept as a baseline if that is wanted."""
        self._content = content
        self._allocated = self._pages(content)
        wanted = self._context.environment.keep_baseline and not names.is_disk_point(content.snapshot)
        if wanted and self._destination is not None and self._baselines:
            self._destination.leave(partial(self._next, content, self._baselines))

    def unlisted(self, why: str) -> Known:
        """Azure gives no lists, so all of the disk has to be read."""
        self._content = self._allocated = self._changed = None
        self._reason = why
        self._tell(f"all of the disk is read: {why}")
        return Known()

    def _pages(self, content: SnapshotBlob) -> Pages | None:
        """The allocated pages; None if Azure gives no list of them that can be believed."""
        try:
            return content.pages()
        except (AzureError, DeadlinePassed) as error:
            self._reason = error.message
            self._tell(f"all of the snapshot is read: {error.message}")
            return None

    def _found(self, destination: Based) -> tuple[Baseline | None, Manifest | None]:
        """The baseline of the replica, and what was committed with it."""
        left = destination.baseline
        if left is None:
            return None, None
        manifest, document = left
        return Baseline.recorded(document), manifest

    def extents(self, size: int) -> Extents:
        """The pages that may hold something."""
        del size
        return Everything() if self._allocated is None else self._allocated

    def changed(self, base: Manifest) -> Changed | None:
        """What has changed since the baseline; None if no list can be believed."""
        baseline, attested = self._baseline, self._attested
        if self._content is None or self._allocated is None:
            return None
        if names.is_disk_point(self._content.snapshot):
            self._reason = _NO_LIST
            return None
        if base.fresh or baseline is None or attested is None:
            self._reason = "there is no baseline"
            return None
        compare = partial(self._compared, self._content, self._allocated, baseline, attested)
        self._reason = "the list was wrong" if self._distrusted else compare()
        if self._reason and not self._distrusted:
            self._tell(f"what has changed is not known: {self._reason}")
        return self._changed

    def _compared(
        self, content: SnapshotBlob, allocated: Pages, baseline: Baseline, attested: Manifest
    ) -> str:
        """Fetch the list of changes; why that cannot be, else ""."""
        if self._baselines is None:
            return "there is no baseline"
        older = None
        try:
            older = self._baselines.open(baseline)
            newer = content.document()
            why = change_lists.obstacle(baseline, older, newer, self._disk)
            if why or older is None:
                return why
            since = self._exported(self._context, older, baseline.size)
            hint, self._listed = change_lists.fetch(since, content, allocated)
        except (AzureError, DeadlinePassed) as error:
            return error.message
        finally:
            if older is not None:
                self._baselines.close(baseline)
        due = (baseline.turn + 1) % self._context.environment.full_every == 0
        relied = baseline.proved and not due
        self._changed = Changed(self._disk.name, hint, attested, proved=relied, turn=baseline.turn)
        return ""

    def _next(self, content: SnapshotBlob, baselines: Baselines) -> Json | None:
        """The baseline that goes with what is committed; None if Azure does not describe the snapshot."""
        before, changed = self._baseline, self._changed
        if changed is not None and changed.unlisted is not None:
            self._tell(
                f"Azure's list of changes since {before.id if before else 'its baseline'} leaves out a change at "
                f"offset {changed.unlisted}; lists have to be proved anew"
            )
        try:
            snapshot = content.document()
        except (AzureError, DeadlinePassed) as error:
            self._tell(f"it is not kept as a baseline: {error.message}")
            return None
        proved = (
            before is not None
            and changed is not None
            and changed.unlisted is None
            and (before.proved or changed.checked_bytes > 0)
        )
        baseline = Baseline.of(snapshot, self._stream).following(before, proved=proved)
        baselines.leave(self._disk.name, baseline)
        return baseline.to_json()

    def read(self, mechanism: str) -> Read:
        """What was read, and why."""
        changed = self._changed
        if changed is None or self._distrusted:
            tier = "whole" if self._allocated is None else "allocated"
            return Read(tier, self._reason, mechanism=mechanism)
        relied = bool(changed.relied_bytes)
        return Read(
            "changed" if relied else "allocated",
            "" if relied else "Azure's list of changes was compared with all of the disk",
            self._listed,
            changed.relied_bytes,
            changed.checked_bytes,
            mechanism,
        )

    def _tell(self, text: str) -> None:
        snapshot = f" ({names.name_of(self._content.snapshot)})" if self._content is not None else ""
        self._context.report(Notice(f"{self._disk.name}{snapshot}: {text}"))
