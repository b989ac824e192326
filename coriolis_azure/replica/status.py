"""What there is at a destination: whose replica it is, of which point in time, and which earlier ones are kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import InvalidInput
from ..model import Json
from . import points, sets
from .destinations import Place


@dataclass(frozen=True)
class Status:
    """A replica of `vm`, an ARM id. Times are RFC 3339, in UTC.

    `point`: what it is of, None before the first run has ended well; `points`: the earlier ones that can be given
    back, oldest first. `unfinished`: when the run began that has not ended well since, else None.
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
    """What there is at `place`; InvalidInput where there is nothing."""
    record = sets.read(place)
    if record is None:
        raise InvalidInput("there is no replica at this destination", remedy="Replicate a VM to it first.")
    earlier = points.kept(place.points, record).values()
    return Status(
        record.vm,
        record.point.time if record.point is not None else None,
        tuple(kept.point.time for kept in earlier if kept.point is not None),
        tuple(sorted(record.point.roots)) if record.point is not None else (),
        record.begun.time if record.begun is not None else None,
    )
