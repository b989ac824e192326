"""The switch from one point in time to the next: all disks of a replica, or none.

The record (see `sets`) is what decides. Until it is replaced the replica is what it was; from then on it is what was
committed, and whoever opens the place brings the images there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from ..errors import CoriolisAzureError
from . import points, sets
from .destinations import Place
from .replica import Replica


def publish(place: Place, replicas: Iterable[Replica], record: bytes) -> None:
    """Make what these have committed the replica, as `record` says, and keep the point that it was.

    DestinationFailed where that cannot be: before the record is replaced nothing has changed, afterwards the next run
    goes on with it.
    """
    committed = list(replicas)
    for replica in committed:
        replica.ready()
    now, keep = sets.usable(place), sets.Record.of(record).keep
    earlier, keep = points.preserve(place.points, now, committed, keep)
    try:
        for replica in committed:
            replica.reserve()
        for replica in committed:
            replica.ready()  # all that may have taken its time
        place.keep_record(record)
    except BaseException:
        _call_off(place, committed)
        raise
    _each(committed, Replica.publish)
    points.prune(place.points, earlier, keep)


def sweep(drafts: Iterable[Replica], record: bytes) -> None:
    """See to the drafts of disks that are none of the replica's, now that this is what `record` says."""
    point = sets.Record.of(record).point
    for replica in drafts:
        if point is not None and replica.name not in point.roots:
            replica.sweep(left_out=replica.name in point.left_out)


def _each(replicas: Iterable[Replica], bring: Callable[[Replica], None]) -> None:
    """Bring all there: one that cannot be does not keep the others. The first error is raised at the end."""
    errors = []
    for replica in replicas:
        try:
            bring(replica)
        except CoriolisAzureError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _call_off(place: Place, committed: Iterable[Replica]) -> None:
    """The switch does not come: what was made for it would only take room. The error that says why counts."""
    for replica in committed:
        with suppress(CoriolisAzureError):
            replica.give_back()
    with suppress(CoriolisAzureError):
        points.tidy(place.points, sets.usable(place))


def unpublished(place: Place, drafts: Collection[Replica]) -> list[Replica]:
    """Those of the drafts that are the replica by the record, and whose images are not yet."""
    if not drafts:
        return []
    record = sets.usable(place)
    roots = record.point.roots if record is not None and record.point is not None else {}
    return [
        replica for replica in drafts if replica.name in roots and replica.is_unpublished(roots[replica.name])
    ]


def recover(place: Place, drafts: Collection[Replica]) -> None:
    """Bring a switch to its end that a dead run has begun: the images, and what is kept of earlier points."""

    def bring(replica: Replica) -> None:
        with replica:
            replica.recover()

    _each(unpublished(place, drafts), bring)
    record = sets.usable(place)
    if record is not None and not record.keeps_points:
        points.prune(place.points, points.kept(place.points, None), 0)
