"""Publishes a new point in time: switches all disks of a replica to it, or none.

The record (see `sets`) decides. Until it is replaced, the replica is at the older point; from then on, at the new one.
If a run dies before all images are updated, the next one that opens the place completes that (`recover`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from ..errors import CoriolisAzureError
from . import points, sets
from .destinations import Place
from .replica import Replica


def publish(place: Place, replicas: Iterable[Replica], record: bytes) -> None:
    """Switch to the point in `record`, which consists of what `replicas` have committed; keep the older point.

    Raises DestinationFailed if that fails: either nothing has changed, or, if the record was already replaced, the
    next run completes it.
    """
    committed = list(replicas)
    for replica in committed:
        replica.check_publishable()
    current, keep = sets.usable(place), sets.Record.of(record).keep
    earlier, keep = points.preserve(place.points, current, committed, keep)
    try:
        for replica in committed:
            replica.reserve_space()
        for replica in committed:
            replica.check_publishable()  # again, because preserving a point may have taken long
        place.keep_record(record)
    except BaseException:
        _undo(place, committed)
        raise
    _for_each(committed, Replica.publish)
    points.prune(place.points, earlier, keep)


def sweep(drafts: Iterable[Replica], record: bytes) -> None:
    """Delete or report the drafts of disks that are not part of the replica, according to its new `record`."""
    point = sets.Record.of(record).point
    for replica in drafts:
        if point is not None and replica.name not in point.roots:
            replica.sweep(left_out=replica.name in point.left_out)


def _for_each(replicas: Iterable[Replica], action: Callable[[Replica], None]) -> None:
    """Do this for all disks, even if it fails for one. The first error is raised at the end."""
    errors = []
    for replica in replicas:
        try:
            action(replica)
        except CoriolisAzureError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _undo(place: Place, committed: Iterable[Replica]) -> None:
    """Free the space that was taken for a switch that failed. Errors are dropped: the one that made it fail counts."""
    for replica in committed:
        with suppress(CoriolisAzureError):
            replica.release_space()
    with suppress(CoriolisAzureError):
        points.tidy(place.points, sets.usable(place))


def unpublished(place: Place, drafts: Collection[Replica]) -> list[Replica]:
    """The disks among `drafts` whose draft belongs to the current point: the record has it, the image does not yet."""
    if not drafts:
        return []
    record = sets.usable(place)
    roots = record.point.roots if record is not None and record.point is not None else {}
    return [
        replica for replica in drafts if replica.name in roots and replica.is_unpublished(roots[replica.name])
    ]


def recover(place: Place, drafts: Collection[Replica]) -> None:
    """Complete a switch during which a run died: update the images, and drop earlier points if none are to be kept."""

    def publish(replica: Replica) -> None:
        with replica:
            replica.recover()

    _for_each(unpublished(place, drafts), publish)
    record = sets.usable(place)
    if record is not None and not record.keeps_points:
        points.prune(place.points, points.earlier(place.points, None), 0)
