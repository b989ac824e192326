"""A destination, read again and compared with its own manifests. Nothing of it is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ..clock import Clock
from ..errors import DestinationFailed, InvalidInput
from ..events import Progress, Report, Step
from ..model import Json
from . import comparison, sets
from .destinations import Kept, Place
from .manifest import UNKNOWN, Manifest

_SET = "replica"
_MISSING = "its image is missing"
_BESIDE = "not of the last run, which had no such disk or left it out"
_UNRECORDED = (
    "which disks belong together is not written down: an older version made it. Replicate to it once more, which sends "
    "only what has changed"
)


@dataclass(frozen=True)
class Verdict:
    """What was found of one disk.

    `verified`: True where all of it is as the manifest says; False where something is not, at `bad_offset` first;
    None where that cannot be told, with the `reason`. `unknown_bytes`: what an interrupted run was writing.
    `of_set`: whether this is of the disks together and not of what one of them holds: one is missing, or, with the
    name "replica", they are not of one run.
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
    """Read every disk at `place` as a whole, and tell whether they belong together; InvalidInput when there is none."""
    names = place.names()
    try:
        record, damage = sets.read(place), ""
    except InvalidInput as error:
        record, damage = None, f"{error.message}. {error.remedy}"
    if not names and record is None:
        raise InvalidInput("there is no replica at this destination", remedy="Replicate a VM to it first.")
    found = [_verdict(name, place.disk(name), report, clock) for name in names]
    if record is None:
        return [*found, Verdict(_SET, None, reason=damage or _UNRECORDED, of_set=True)]
    return _as_set(record, found, place.unpublished())


def _as_set(record: sets.Record, found: list[Verdict], unpublished: list[str]) -> list[Verdict]:
    """The verdicts on the disks that were found and on those that were not; at last that on them as a set, if bad."""
    point, begun = record.point, record.begun
    expected = list(point.roots) if point else list(begun.disks if begun else ())
    by_name = {verdict.name: verdict for verdict in found}
    missing = [
        Verdict(name, verified=False, reason=_MISSING, of_set=True)
        for name in expected
        if name not in by_name
    ]
    told = [each if each.name in expected else _beside(each) for each in found]
    whole = sorted([*told, *missing], key=lambda verdict: verdict.name)
    unfinished = f"the run that began at {begun.time} has not ended well" if begun else ""
    if point is None:
        return [
            *whole,
            Verdict(_SET, verified=False, reason=f"{unfinished}: this is no replica yet", of_set=True),
        ]
    if unpublished:
        return [*whole, Verdict(_SET, verified=False, reason=_unpublished(point, unpublished), of_set=True)]
    there = [by_name[name] for name in expected if name in by_name]
    other = [each.name for each in there if each.root not in (None, point.roots[each.name])]
    if other:
        reason = f"{', '.join(other)}: not of the run of {point.time}, which the other disks are of"
        return [
            *whole,
            Verdict(_SET, verified=False, reason="; ".join(filter(None, (reason, unfinished))), of_set=True),
        ]
    return whole


def _unpublished(point: sets.Point, names: list[str]) -> str:
    """A run has died in the middle of the switch. Replicating to a place ends that first."""
    return (
        f"the run of {point.time} died while it brought {', '.join(sorted(names))} to what it had fetched: replicate "
        "again, which does that first"
    )


def _beside(verdict: Verdict) -> Verdict:
    """The verdict on a disk that is none of the set: one the VM no longer has, or that was left out."""
    return replace(verdict, reason="; ".join(filter(None, (_BESIDE, verdict.reason))))


def _verdict(name: str, kept: Kept, report: Report, clock: Clock) -> Verdict:
    report(Step("verify", name))
    with kept:
        try:
            manifest = kept.stored()
        except InvalidInput as error:
            return Verdict(name, None, reason=error.message)
        except DestinationFailed as error:
            return Verdict(name, verified=False, bad_offset=error.offset, reason=error.message)
        found = Verdict(name, verified=True, size_bytes=manifest.size, root=manifest.root())
        unknown = sum(manifest.span(i)[1] for i in range(manifest.count) if manifest.digest(i) == UNKNOWN)
        bad, reason = _first_bad(kept, manifest, name, report, clock)
    if reason:
        return replace(found, verified=False, bad_offset=bad, unknown_bytes=unknown, reason=reason)
    if unknown:
        reason = "the last run did not end well, and what it was writing is not known"
        return Verdict(name, None, found.size_bytes, None, None, unknown, reason)
    return found


def _first_bad(
    kept: Kept, manifest: Manifest, name: str, report: Report, clock: Clock
) -> tuple[int | None, str]:
    """Offset of the first chunk that is not as the manifest says, and the reason; ("", None) when all are."""
    progress = Progress(name, manifest.size, report, clock)

    def known() -> Iterator[int]:
        for index in range(manifest.count):
            if manifest.digest(index) != UNKNOWN:
                progress.show(manifest.span(index)[0], 0)
                yield index

    try:
        for index in comparison.differing(kept, manifest, known()):
            offset = manifest.span(index)[0]
            return offset, f"the chunk at offset {offset} is not what was replicated"
    except DestinationFailed as error:
        return error.offset, error.message
    progress.last(0)
    return None, ""
