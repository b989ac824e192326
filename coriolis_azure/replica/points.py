"""Earlier points in time of a replica: what is kept when a newer one takes its place, and how it is read again.

Before the switch to a newer point, each disk keeps what it is about to lose: a clone of the image that shares its
bytes, where the medium can make one (a reflink, a snapshot of a blob), else an undo log. An undo log is read over the
disk at the next newer point, so points are given up from the oldest on.

A point is whole once its record is there. One with the record of what still *is* the replica was made for a switch
that never came. Labels sort in the order in which points were kept, whatever the clocks said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import CoriolisAzureError, InvalidInput
from . import sets
from .destinations import Points
from .replica import Replica

LABEL = re.compile(r"[0-9]{6}-[0-9A-Za-z]{1,40}")
LATEST = "latest"


def kept(points: Points, now: sets.Record | None) -> dict[str, sets.Record]:
    """The records of the earlier points by their labels, oldest first; `now` is that of the replica.

    One that is damaged, or was lost when the point was kept, has no point: older points may need what it has kept.
    """
    if now is not None and not now.keeps_points:
        return {}  # those that are there still miss what the last switch did not keep
    return _earlier(points.records(), now)


def preserve(
    points: Points, now: sets.Record | None, replicas: Iterable[Replica], keep: int | None
) -> tuple[dict[str, sets.Record], int]:
    """Keep the point that a switch is about to replace, unless none shall be kept.

    `keep`: how many shall be; None, where the record was lost, for as many as were asked for when those there are were
    kept. Gives back the earlier points there are then, and that number. What runs have left that died before the
    switch is deleted, and nothing is left of the point on an error.
    """
    earlier, last = tidy(points, now)
    before = [record.keep for record in earlier.values() if record.keep is not None]
    wanted = keep if keep is not None else max(before, default=len(_whole(earlier)))
    now = now or sets.Record("")
    if not wanted or (now.point is None and not earlier):
        # Where only the record of the newest point is lost, older ones need what it had.
        return earlier, wanted
    time = now.point.time if now.point is not None else ""
    label = f"{last + 1:06}-{re.sub('[^0-9A-Za-z]', '', time)[:40] or 'unknown'}"
    try:
        roots = now.point.roots if now.point is not None else {}
        lost = [replica.name for replica in replicas if not replica.preserve(label) and replica.name in roots]
        # Older points may need what was kept even of one that cannot be given back.
        record = replace(now, begun=None, point=None if lost else now.point)
        points.complete(label, record.text())
    except BaseException:
        points.remove(label)
        raise
    return {**earlier, label: record}, wanted


def tidy(points: Points, now: sets.Record | None) -> tuple[dict[str, sets.Record], int]:
    """Delete points that are not whole, or made for a switch that never came.

    Gives back the others, and the last number there was.
    """
    records = points.records()
    earlier = _earlier(records, now)
    for label in records.keys() - earlier.keys():
        points.remove(label)
    return earlier, max((int(label.partition("-")[0]) for label in records), default=0)


def prune(points: Points, earlier: dict[str, sets.Record], keep: int) -> None:
    """Delete what is older than the `keep` newest points that can be given back."""
    whole = _whole(earlier)
    if keep and len(whole) <= keep:
        return
    for label in earlier:
        if not keep or label < whole[-keep]:
            points.remove(label)


def since(points: Points, now: sets.Record | None, time: str) -> tuple[str, sets.Point, Sequence[str]]:
    """The VM, the point of that time, LATEST for the newest, and the labels of the kept points from it on.

    InvalidInput where there is none.
    """
    earlier = kept(points, now)
    if now is not None and now.point is not None and time in (LATEST, now.point.time):
        return now.vm, now.point, ()
    labels = list(earlier)
    for at in reversed(range(len(labels))):
        record = earlier[labels[at]]
        if record.point is not None and record.point.time == time:
            return record.vm, record.point, labels[at:]
    times = [record.point.time for record in (*earlier.values(), now) if record and record.point]
    raise InvalidInput(
        f"there is no point in time {time!r} here" if times else "there is no replica here",
        remedy=f"Choose latest, or one of {', '.join(times)}." if times else "Replicate a VM to it first.",
    )


def _earlier(records: dict[str, bytes | None], now: sets.Record | None) -> dict[str, sets.Record]:
    """What those of whole points say, without the one made for a switch that never came. See `kept`."""
    current = now.point if now is not None else None
    whole = {label: _record(text) for label, text in sorted(records.items()) if text is not None}
    return {
        label: record for label, record in whole.items() if record.point is None or record.point != current
    }


def _whole(earlier: dict[str, sets.Record]) -> list[str]:
    """The labels of those that can be given back."""
    return [label for label, record in earlier.items() if record.point is not None]


def _record(text: bytes) -> sets.Record:
    try:
        return sets.Record.of(text)
    except CoriolisAzureError:
        return sets.Record("")
