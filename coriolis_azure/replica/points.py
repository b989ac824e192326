"""Keeps earlier points in time of a replica when a newer one replaces them, and finds them again.

Before the switch to a newer point, each disk keeps the content that will be replaced: as a snapshot that shares the
bytes of the image if the medium can take one (a reflink, a snapshot of a blob), otherwise as an undo log. An undo log
is read over the disk at the next newer point, so the oldest points are deleted first.

A point is complete once it has a record. If that is still the record of the current point, the point was kept for a
switch that failed. Labels sort in the order in which points were kept, whatever the clocks said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import CoriolisAzureError, InvalidInput, NoReplica
from . import sets
from .destinations import Points
from .replica import Replica

LABEL = re.compile(r"[0-9]{6}-[0-9A-Za-z]{1,40}")
LATEST = "latest"


def inside(where: str, replica: str) -> InvalidInput:
    """The error for a place of a run that lies among the earlier points of a replica, one of which it would replace."""
    return InvalidInput(
        f"{where} lies where the replica {replica} keeps its earlier points in time",
        remedy="Give a place of its own, outside of that replica.",
    )


def earlier(points: Points, current: sets.Record | None) -> dict[str, sets.Record]:
    """The records of the earlier points by label, oldest first; `current` is the record of the replica itself.

    A record without a point cannot be restored, because it is damaged or was already lost when it was kept. It is
    listed because older points may be read through what it has kept.
    """
    if current is not None and not current.keeps_points:
        return {}  # any that still exist lack what the last switch replaced
    return _complete(points.records(), current)


def preserve(
    points: Points, current: sets.Record | None, replicas: Iterable[Replica], keep: int | None
) -> tuple[dict[str, sets.Record], int]:
    """Keep the current point, which a switch is about to replace, unless no points are to be kept.

    `keep`: how many points to keep; None if the record that said so was lost: then as many as the records of the
    earlier points say. Returns the earlier points, including this one, and that number. Deletes what was kept for
    switches that failed; if this fails, nothing of the point remains.
    """
    existing, last = tidy(points, current)
    before = [record.keep for record in existing.values() if record.keep is not None]
    wanted = keep if keep is not None else max(before, default=len(_restorable(existing)))
    current = current or sets.Record("")
    if not wanted or (current.point is None and not existing):
        # If only the record of the current point is lost, the older ones still need its content.
        return existing, wanted
    time = current.point.time if current.point is not None else ""
    label = f"{last + 1:06}-{re.sub('[^0-9A-Za-z]', '', time)[:40] or 'unknown'}"
    try:
        roots = current.point.roots if current.point is not None else {}
        lost = [replica.name for replica in replicas if not replica.preserve(label) and replica.name in roots]
        # Older points may need what is kept even of a point that cannot be restored.
        record = replace(current, begun=None, point=None if lost else current.point)
        points.complete(label, record.text())
    except BaseException:
        points.remove(label)
        raise
    return {**existing, label: record}, wanted


def tidy(points: Points, current: sets.Record | None) -> tuple[dict[str, sets.Record], int]:
    """Delete points that are incomplete or were kept for a switch that failed.

    Returns the others, and the highest number that any label had.
    """
    records = points.records()
    complete = _complete(records, current)
    for label in records.keys() - complete.keys():
        points.remove(label)
    return complete, max((int(label.partition("-")[0]) for label in records), default=0)


def prune(points: Points, existing: dict[str, sets.Record], keep: int) -> None:
    """Delete all points that are older than the `keep` newest ones that can be restored."""
    restorable = _restorable(existing)
    if keep and len(restorable) <= keep:
        return
    for label in existing:
        if not keep or label < restorable[-keep]:
            points.remove(label)


def since(points: Points, current: sets.Record | None, time: str) -> tuple[str, sets.Point, Sequence[str]]:
    """The VM, the point at `time` (LATEST: the current one), and the labels of the earlier points from that one on.

    Raises InvalidInput if there is no point at `time`, NoReplica if there is none at all.
    """
    existing = earlier(points, current)
    if current is not None and current.point is not None and time in (LATEST, current.point.time):
        return current.vm, current.point, ()
    labels = list(existing)
    for at in reversed(range(len(labels))):
        record = existing[labels[at]]
        if record.point is not None and record.point.time == time:
            return record.vm, record.point, labels[at:]
    times = [record.point.time for record in (*existing.values(), current) if record and record.point]
    if not times:
        raise NoReplica("there is no replica at this destination")
    raise InvalidInput(
        f"there is no point in time {time!r} here", remedy=f"Choose latest, or one of {', '.join(times)}."
    )


def _complete(records: dict[str, bytes | None], current: sets.Record | None) -> dict[str, sets.Record]:
    """The records of complete points, without the one that was kept for a switch that failed. See `earlier`."""
    point = current.point if current is not None else None
    complete = {label: _record(text) for label, text in sorted(records.items()) if text is not None}
    return {
        label: record for label, record in complete.items() if record.point is None or record.point != point
    }


def _restorable(existing: dict[str, sets.Record]) -> list[str]:
    """The labels of the points that can be restored."""
    return [label for label, record in existing.items() if record.point is not None]


def _record(text: bytes) -> sets.Record:
    try:
        return sets.Record.of(text)
    except CoriolisAzureError:
        return sets.Record("")
