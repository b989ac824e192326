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


def kept(points: Points, now: sets.Record | None) -> dict[str, sets.Point]:
    """The earlier points by their labels, oldest first; `now` is the record of the replica.

    One whose record is damaged has no time: it cannot be given back, but older ones may need it.
    """
    whole = {label: _point(text) for label, text in sorted(points.records().items()) if text is not None}
    return {label: point for label, point in whole.items() if not (now is not None and point == now.point)}


def preserve(points: Points, now: sets.Record | None, replicas: Iterable[Replica], keep: int | None) -> int:
    """Keep the point that a switch is about to replace, unless none shall be kept; how many shall be.

    `keep`: that number; None for as many as there are. Nothing is left of the point on an error.
    """
    tidy(points, now)
    labels = points.records()
    wanted = len(labels) if keep is None else keep
    now = now or sets.Record("")
    if not wanted or (now.point is None and not labels):
        return wanted  # where only the record of the newest point is lost, older ones need what it had
    last = max((int(label.partition("-")[0]) for label in labels), default=0)
    time = now.point.time if now.point is not None else ""
    label = f"{last + 1:06}-{re.sub('[^0-9A-Za-z]', '', time)[:40] or 'unknown'}"
    try:
        for replica in replicas:
            replica.preserve(label)
        points.complete(label, replace(now, begun=None).text())
    except BaseException:
        points.remove(label)
        raise
    return wanted


def tidy(points: Points, now: sets.Record | None) -> None:
    """Delete what runs have left that died before the switch."""
    for label in points.records().keys() - kept(points, now).keys():
        points.remove(label)


def prune(points: Points, now: sets.Record | None, keep: int) -> None:
    """Delete the oldest points beyond the `keep` newest."""
    labels = list(kept(points, now))
    for label in labels[: max(0, len(labels) - keep)]:
        points.remove(label)


def since(points: Points, now: sets.Record | None, time: str) -> tuple[sets.Point, Sequence[str]]:
    """The point of that time, LATEST for the newest, and the labels of the kept points from it on.

    InvalidInput where there is none.
    """
    earlier = kept(points, now)
    current = now.point if now is not None else None
    if current is not None and time in (LATEST, current.time):
        return current, ()
    labels = list(earlier)
    for at in reversed(range(len(labels))):
        if earlier[labels[at]].time == time and time:
            return earlier[labels[at]], labels[at:]
    times = [point.time for point in earlier.values() if point.time]
    times += [current.time] if current is not None else []
    raise InvalidInput(
        f"there is no point of {time} here",
        remedy=f"Choose one of {', '.join(times)}." if times else "Replicate to it first.",
    )


def _point(record: bytes) -> sets.Point:
    try:
        return sets.Record.of(record).point or sets.Point("", "", {})
    except CoriolisAzureError:
        return sets.Point("", "", {})
