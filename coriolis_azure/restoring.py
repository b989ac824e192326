"""Restores a point in time of a replica as a new replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from . import handoff, transfer
from .clock import Clock
from .errors import CorruptChunk, DestinationFailed, IncompleteReplica, InvalidInput
from .events import Progress, Report, Step
from .model import Json
from .readers.flow import Flow
from .readers.pages import PageReader
from .replica import points, sets
from .replica.destinations import Destination, Place
from .replica.manifest import ZERO, Manifest
from .replica.medium import Readable, read_padded

_REMEDY = "Choose another point; `coriolis-azure status` lists them. This one is damaged."


@dataclass(frozen=True)
class RestoredDisk:
    """The result of one disk. `sent_bytes`: the bytes that are not zeros; `verified`: as in DiskReport."""

    name: str
    size_bytes: int
    sent_bytes: int
    verified: bool | None


@dataclass(frozen=True)
class Restored:
    """The result of restoring a point in time: all disks of `vm`, an ARM id, as of `point` (RFC 3339, UTC)."""

    vm: str
    point: str
    disks: tuple[RestoredDisk, ...]

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def restore(
    place: Place, time: str, destination: Callable[[], Place], report: Report, clock: Clock
) -> Restored:
    """Make a new replica from the point in time `time` of the one at `place` ("latest": the newest point).

    `place` is not changed. Every chunk is compared with its digest at that time. `destination` opens the new place; it
    is called only if the point exists. Raises InvalidInput if there is no such point, or if the new place is not empty;
    CorruptChunk or IncompleteReplica if the point is damaged, and then nothing is published.
    """
    vm, point, labels = points.since(place.points, sets.usable(place, report), time)
    with ExitStack() as opened:
        disks = {}
        for name in sorted(point.roots):
            opened.enter_context(disk := place.disk(name))
            manifest, content = opened.enter_context(disk.at(labels))
            if manifest.root() != point.roots[name]:
                raise IncompleteReplica(
                    f"{name}: what was kept does not belong to the point of {point.time}",
                    remedy=_REMEDY,
                    disk=name,
                )
            disks[name] = _Kept(name, manifest, content)
        with destination() as to:
            if there := to.names():
                raise InvalidInput(
                    f"the destination already holds images: {', '.join(there)}",
                    remedy="Give a new or empty one.",
                )
            restored = _copy(point, vm, disks, to, report, clock)
            handoff.pass_on(place, to, point.time, tuple(disks), report)
            return restored


def _copy(
    point: sets.Point, vm: str, disks: dict[str, _Kept], to: Place, report: Report, clock: Clock
) -> Restored:
    to.claim(vm)
    to.reserve(list(disks))
    record = sets.begin(to, vm, sets.Begun(point.run, point.time, tuple(disks), point.left_out))
    done, roots = [], {}
    for name, kept in disks.items():
        report(Step("restore", name))
        with to.disk(name) as destination:
            outcome = kept.copy(destination, report, clock)
        roots[name] = outcome.manifest.root()
        done.append(RestoredDisk(name, kept.manifest.size, outcome.sent_bytes, outcome.verified))
    sets.complete(to, record, roots)
    return Restored(vm, point.time, tuple(done))


class _Kept:
    """A disk at a point in time: its content and extents. Each chunk is compared with the manifest of that time."""

    def __init__(self, name: str, manifest: Manifest, content: Readable) -> None:
        self.manifest, self._name, self._content = manifest, name, content
        self._digest = manifest.digester()

    def copy(self, destination: Destination, report: Report, clock: Clock) -> transfer.Outcome:
        """Copy the disk to the destination."""
        name, manifest = self._name, self.manifest
        reader = PageReader(self, Flow(name, report, clock), lambda _: self)
        base = destination.known(manifest.disk, manifest.size, manifest.chunk, full=False)
        progress = Progress(name, manifest.size, report, clock)
        return transfer.copy(reader, base, destination, progress, verify=True)

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The whole chunk, unless it is zeros. See Extents."""
        if self.manifest.digest(offset // self.manifest.chunk) != ZERO:
            yield offset, length

    def fill(self, offset: int, data: memoryview) -> None:
        """Fill `data` with one chunk. Raises CorruptChunk if it does not have its digest."""
        try:
            data[:] = read_padded(self._content, offset, len(data), self._content.read)
        except DestinationFailed as error:
            error.remedy = _REMEDY
            raise
        if self._digest(data) != self.manifest.digest(offset // self.manifest.chunk):
            raise CorruptChunk(
                f"{self._name}: the chunk at offset {offset} differs from what it was at that point",
                remedy=_REMEDY,
                disk=self._name,
                offset=offset,
            )
