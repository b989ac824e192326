"""The status of a destination: whose replica it holds, as of which point in time, and the earlier points."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import NoReplica
from ..model import Json
from . import points, sets
from .destinations import Place


@dataclass(frozen=True)
class Status:
    """The replica of `vm`, an ARM id. Times are in UTC, in the format of RFC 3339.

    `point`: the point in time of the images; None before the first successful run. `points`: the earlier points that
    can be restored, oldest first. `disks`: their names. `unfinished`: the start of a run that has not succeeded since;
    None if there is none.
    """

    vm: str
    point: str | None
    points: tuple[str, ...]
    disks: tuple[str, ...]
    unfinished: str | None

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def status(place: Place) -> Status:
    """The status of `place`. Raises NoReplica if it holds none."""
    record = sets.read(place)
    if record is None:
        raise NoReplica("there is no replica at this destination")
    earlier = points.earlier(place.points, record).values()
    return Status(
        record.vm,
        record.point.time if record.point is not None else None,
        tuple(each.point.time for each in earlier if each.point is not None),
        tuple(sorted(record.point.roots)) if record.point is not None else (),
        record.begun.time if record.begun is not None else None,
    )
