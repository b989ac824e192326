"""Which pages of a disk were written or cleared, and when: a map that copies cheaply and stays small.

Time is counted in generations: each snapshot ends one. So what changed since a snapshot are the spans of later
generations, whichever snapshots between the two still exist. Content that was replaced by somebody who did not tell is
not in the map; `since` says from which generation on the map is complete.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

PAGE = 512
_WINDOW = 4 << 20  # spans are kept by window of the disk, so that a change touches few of them
_NONE: array[int] = array("Q")


class Span(NamedTuple):
    """Pages that were written, or cleared, in one generation; `end` is exclusive."""

    start: int
    end: int
    generation: int
    cleared: bool


class Range(NamedTuple):
    """A range of a page list; `end` is exclusive."""

    start: int
    end: int
    cleared: bool = False


class Pages:
    """The last change of each page that was ever written. `windows`: flat triples of start, end and mark."""

    def __init__(self, since: int, windows: dict[int, array[int]] | None = None) -> None:
        self.since = since
        self.windows = windows or {}

    def copy(self) -> Pages:
        """A map of its own. Windows are shared, as they never change: `note` replaces them."""
        return Pages(self.since, dict(self.windows))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Pages:
        """The map that `to_json` saved."""
        windows = document["windows"].items()
        return cls(document["since"], {int(index): array("Q", base64.b64decode(w)) for index, w in windows})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        windows = {index: base64.b64encode(window).decode() for index, window in self.windows.items()}
        return {"since": self.since, "windows": windows}

    def note(self, start: int, end: int, generation: int, *, cleared: bool = False) -> None:
        """Record a change of whole pages."""
        for index in range(start // _WINDOW, -(-end // _WINDOW)):
            low, high = max(start, index * _WINDOW), min(end, (index + 1) * _WINDOW)
            change = (low, high, generation << 1 | cleared)
            self.windows[index] = _with(self.windows.get(index, _NONE), change)

    def spans(self, start: int, end: int, after: int = -1) -> Iterator[Span]:
        """The changes within a range, in order, of generations `after` one."""
        first, last = start // _WINDOW, -(-end // _WINDOW)
        sparse = len(self.windows) < last - first
        known = (
            sorted(index for index in self.windows if first <= index < last) if sparse else range(first, last)
        )
        for index in known:
            window = self.windows.get(index, _NONE)
            if max(window[2::3], default=-1) >> 1 <= after:
                continue
            for position in range(0, len(window), 3):
                low, high, mark = window[position : position + 3]
                if high > start and low < end and mark >> 1 > after:
                    yield Span(max(low, start), min(high, end), mark >> 1, bool(mark & 1))

    def allocated(self, start: int, end: int) -> Iterator[Range]:
        """The pages that hold data, in order."""
        return merged(Range(span.start, span.end) for span in self.spans(start, end) if not span.cleared)


def merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """Ranges in order of their starts, with neighbours of one kind as one range."""
    last: Range | None = None
    for current in ranges:
        if last is not None and current.start <= last.end and current.cleared == last.cleared:
            last = last._replace(end=max(last.end, current.end))
            continue
        if last is not None:
            yield last
        last = current
    if last is not None:
        yield last


def _with(window: array[int], change: tuple[int, int, int]) -> array[int]:
    """A window with one more change, which takes up its neighbours of the same mark."""
    start, end, mark = change
    if not window or window[-2] < start:
        return window + array("Q", change)
    before, after = array("Q"), array("Q")
    for position in range(0, len(window), 3):
        low, high, other = window[position : position + 3]
        if other == mark and low <= end and high >= start:
            start, end = min(low, start), max(high, end)
            continue
        if low < start:
            before.extend((low, min(high, start), other))
        if high > end:
            after.extend((max(low, end), high, other))
    return before + array("Q", (start, end, mark)) + after
