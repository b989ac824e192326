"""What Azure tells of a snapshot's pages: which are allocated, and which changed since an older one of its family.

What was written through the sandbox is known page by page, also where the same bytes were written again. Where content
was replaced as a whole, or a guest wrote to it, the two contents are compared.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache

from coriolis_azure.sandbox.content import Contents
from coriolis_azure.sandbox.pages import PAGE, Range, merged
from coriolis_azure.sandbox.state import Resource

_PIECE = 1 << 20


def allocated(contents: Contents, disk: Resource, start: int, end: int) -> Iterator[Range]:
    """The allocated pages of a disk or snapshot within a range, in order."""
    return contents.pages(disk.hidden["content"]).allocated(start, end)


def changed(contents: Contents, newer: Resource, older: Resource, start: int, end: int) -> Iterator[Range]:
    """What was written or cleared between two snapshots of a family, in order."""
    name, since = newer.hidden["content"], older.hidden["generation"]
    pages = contents.pages(name)
    if since < pages.since and name != older.hidden["content"]:
        return _clipped(_compared(contents, name, older.hidden["content"], since), start, end)
    return _recorded(contents, name, since, start, end)


def _recorded(contents: Contents, name: str, since: int, start: int, end: int) -> Iterator[Range]:
    spans = contents.pages(name).spans(start, end, since)
    return merged(Range(low, high, cleared) for low, high, _, cleared in spans)


@lru_cache(maxsize=16)
def _compared(contents: Contents, newer: str, older: str, since: int) -> tuple[Range, ...]:
    """What differs between two contents, which never change, and what is known to have been written."""
    size = max(contents.size(newer), contents.size(older))
    new, old = (contents.pages(name).allocated(0, size) for name in (newer, older))
    found: list[Range] = []
    for start, end, in_new, in_old in _sides(new, old):
        if in_new and in_old:
            found += _different(contents, newer, older, start, end)
        else:
            found.append(Range(start, end, cleared=in_old))
    found += _recorded(contents, newer, since, 0, size)
    return tuple(merged(sorted(found)))


def _sides(new: Iterable[Range], old: Iterable[Range]) -> Iterator[tuple[int, int, bool, bool]]:
    """The pieces that are in at least one of two lists of ranges, and in which."""
    inside, last = [False, False], 0
    for position, side, entered in heapq.merge(_edges(new, 0), _edges(old, 1)):
        if any(inside) and position > last:
            yield last, position, inside[0], inside[1]
        inside[side], last = entered, position


def _edges(ranges: Iterable[Range], side: int) -> Iterator[tuple[int, int, bool]]:
    for start, end, _ in ranges:
        yield start, side, True
        yield end, side, False


def _different(contents: Contents, newer: str, older: str, start: int, end: int) -> Iterator[Range]:
    """The pages with different bytes."""
    with contents.path(newer).open("rb") as new, contents.path(older).open("rb") as old:
        for low in range(start, end, _PIECE):
            length = min(_PIECE, end - low)
            one, other = os.pread(new.fileno(), length, low), os.pread(old.fileno(), length, low)
            for page in range(0, length if one != other else 0, PAGE):
                if one[page : page + PAGE] != other[page : page + PAGE]:
                    yield Range(low + page, low + page + PAGE)


def _clipped(ranges: Iterable[Range], start: int, end: int) -> Iterator[Range]:
    for low, high, cleared in ranges:
        if high > start and low < end:
            yield Range(max(low, start), min(high, end), cleared)
