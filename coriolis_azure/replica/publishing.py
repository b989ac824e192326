"""The switch from one point in time to the next: all disks of a replica, or none.

The record (see `sets`) is what decides. Until it is replaced the replica is what it was; from then on it is what was
committed, and whoever opens the place brings the images there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

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
    for replica in committed:
        replica.ready()  # keeping the point may have taken its time
    place.keep_record(record)
    for replica in committed:
        replica.publish()
    points.prune(place.points, earlier, keep)


def unpublished(place: Place, drafts: Collection[Replica]) -> list[Replica]:
    """Those of the drafts that are the replica by the record, and whose images are not yet."""
    if not drafts:
        return []
    record = sets.usable(place)
    roots = record.point.roots if record is not None and record.point is not None else {}
    return [replica for replica in drafts if replica.is_unpublished(roots.get(replica.name))]
