"""Reads a destination again and compares it with its own manifests, without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ..clock import Clock, rfc3339
from ..errors import CoriolisAzureError, DestinationFailed, InvalidInput, NoReplica
from ..events import Progress, Report, Step
from ..model import Json
from . import comparison, history, places, sets
from .destinations import Persistent, Place
from .manifest import UNKNOWN, Manifest

if TYPE_CHECKING:
    from ..azure.blobs import Storage

_SET = "replica"
_MISSING = "its image is missing"
_BESIDE = "not part of the last run: the VM no longer had this disk, or it was excluded"
_UNRECORDED = (
    "there is no record of which disks belong together, because an older version made this replica. Replicate to it "
    "once more, which sends only what has changed"
)


@dataclass(frozen=True)
class Verdict:
    """The result for one disk.

    `verified`: True if all of it matches the manifest; False if something does not, first at `bad_offset`; None if the
    disk cannot be checked. `reason`: why it is not True. `unknown_bytes`: what an interrupted run was writing.
    `of_set`: whether this is about the set of disks and not about the content of one: a disk is missing or, with the
    name "replica", the disks do not belong to one run.
    """

    name: str
    verified: bool | None
    size_bytes: int | None = None
    root: str | None = None
    bad_offset: int | None = None
    unknown_bytes: int = 0
    reason: str = ""
    of_set: bool = False

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def verify(place: Place, report: Report, clock: Clock) -> list[Verdict]:
    """Read every disk at `place`, and check that they belong together. Raises NoReplica if there is none."""
    names = place.names()
    try:
        record, damage = sets.read(place), ""
    except InvalidInput as error:
        record, damage = None, f"{error.message}. {error.remedy}"
    if not names and record is None:
        raise NoReplica("there is no replica at this destination")
    found = [_verdict(name, place.disk(name), report, clock) for name in names]
    if record is None:
        return [*found, Verdict(_SET, None, reason=damage or _UNRECORDED, of_set=True)]
    return _as_set(record, found, place.unpublished())


def verify_at(url: str, report: Report, storage: Storage | None, clock: Clock) -> list[Verdict]:
    """`verify` what is at `url`; if all of it is right, record when that was, where there is a history of runs."""
    with places.open(url, report, storage, existing=True) as place:
        found = verify(place, report, clock)
        record = sets.usable(place) if all(verdict.verified for verdict in found) else None
        recorded = record is not None and bool(history.read(place).runs)
    if recorded and record is not None and record.point is not None:
        with suppress(CoriolisAzureError), places.open(url, report, storage) as writable:
            now = sets.usable(writable)
            if now is not None and now.point == record.point:
                history.verified(writable, record.point.time, rfc3339(clock.now()), report)
    return found


def _as_set(record: sets.Record, found: list[Verdict], unpublished: list[str]) -> list[Verdict]:
    """The verdicts on the disks that were found or are missing and, last, that on the set if something is wrong."""
    point, begun = record.point, record.begun
    expected = list(point.roots) if point else list(begun.disks if begun else ())
    by_name = {verdict.name: verdict for verdict in found}
    missing = [
        Verdict(name, verified=False, reason=_MISSING, of_set=True)
        for name in expected
        if name not in by_name
    ]
    present = [verdict if verdict.name in expected else _beside(verdict) for verdict in found]
    whole = sorted([*present, *missing], key=lambda verdict: verdict.name)
    unfinished = f"the run that began at {begun.time} has not succeeded" if begun else ""
    if point is None:
        return [
            *whole,
            Verdict(
                _SET, verified=False, reason=f"{unfinished}: there is no complete replica yet", of_set=True
            ),
        ]
    if unpublished:
        return [*whole, Verdict(_SET, verified=False, reason=_unpublished(point, unpublished), of_set=True)]
    there = [by_name[name] for name in expected if name in by_name]
    other = [each.name for each in there if each.root not in (None, point.roots[each.name])]
    if other:
        reason = f"{', '.join(other)}: not from the run of {point.time} like the other disks"
        return [
            *whole,
            Verdict(_SET, verified=False, reason="; ".join(filter(None, (reason, unfinished))), of_set=True),
        ]
    return whole


def _unpublished(point: sets.Point, names: list[str]) -> str:
    """The reason if a run died while it published. The next run completes that first."""
    return (
        f"the run of {point.time} died while it published {', '.join(sorted(names))}: replicate again, which completes "
        "that first"
    )


def _beside(verdict: Verdict) -> Verdict:
    """The verdict on a disk outside the set: the VM no longer has it, or it was excluded."""
    return replace(verdict, reason="; ".join(filter(None, (_BESIDE, verdict.reason))))


def _verdict(name: str, disk: Persistent, report: Report, clock: Clock) -> Verdict:
    report(Step("verify", name))
    with disk:
        try:
            manifest = disk.stored()
        except InvalidInput as error:
            return Verdict(name, None, reason=error.message)
        except DestinationFailed as error:
            return Verdict(name, verified=False, bad_offset=error.offset, reason=error.message)
        found = Verdict(name, verified=True, size_bytes=manifest.size, root=manifest.root())
        unknown = sum(manifest.span(i)[1] for i in range(manifest.count) if manifest.digest(i) == UNKNOWN)
        bad, reason = _first_bad(disk, manifest, name, report, clock)
    if reason:
        return replace(found, verified=False, bad_offset=bad, unknown_bytes=unknown, reason=reason)
    if unknown:
        reason = "the last run failed, and the content that it was writing is unknown"
        return Verdict(name, None, found.size_bytes, None, None, unknown, reason)
    return found


def _first_bad(
    disk: Persistent, manifest: Manifest, name: str, report: Report, clock: Clock
) -> tuple[int | None, str]:
    """The offset of the first chunk that does not match the manifest, and the reason; (None, "") if all match."""
    progress = Progress(name, manifest.size, report, clock)

    def known() -> Iterator[int]:
        for index in range(manifest.count):
            if manifest.digest(index) != UNKNOWN:
                progress.show(manifest.span(index)[0], 0)
                yield index

    try:
        for index in comparison.differing(disk, manifest, known()):
            offset = manifest.span(index)[0]
            return offset, f"the chunk at offset {offset} is not what was replicated"
    except DestinationFailed as error:
        return error.offset, error.message
    progress.last(0)
    return None, ""
