"""Ranges of pages: packed tightly, and the same as a plain list of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coriolis_azure.azure.pages import PAGE, Pages, uncovered
from coriolis_azure.errors import Unreadable
from harness import memory

# Pages between ranges and in them: small ones, ones at the edge of two bytes, and ones that need more.
NUMBERS = st.one_of(st.integers(1, 40), st.integers(0xFFFD, 0x10002), st.integers(1 << 32, 1 << 33))
RANGES = st.lists(st.tuples(st.one_of(st.just(0), NUMBERS), NUMBERS), max_size=70)


def placed(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end of ranges from the gaps between them and their lengths, in pages."""
    ranges, end = [], 0
    for gap, length in steps:
        start = end + gap * PAGE
        end = start + length * PAGE
        ranges.append((start, end))
    return ranges


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges with adjacent ones joined, as offset and length."""
    whole: list[tuple[int, int]] = []
    for start, end in ranges:
        if whole and sum(whole[-1]) == start:
            whole[-1] = (whole[-1][0], end - whole[-1][0])
        else:
            whole.append((start, end - start))
    return whole


@given(RANGES, st.integers(0, 80), st.integers(0, 40), st.integers(-3, 3))
def test_they_are_what_was_put_in(steps: list[tuple[int, int]], number: int, count: int, beside: int) -> None:
    ranges = placed(steps)
    pages, expected = Pages(ranges), joined(ranges)
    assert list(pages) == expected
    assert bool(pages) == bool(expected)
    assert pages.total == sum(length for _, length in expected)
    assert pages.span() == ((ranges[0][0], ranges[-1][1]) if ranges else (0, 0))
    edges = [0, *(edge for each in ranges for edge in each)]
    low = max(0, edges[number % len(edges)] + beside * PAGE)
    high = max(low, edges[(number + count) % len(edges)])
    parts = [(max(at, low), min(at + length, high)) for at, length in expected]
    inside = [(start, end - start) for start, end in parts if start < end]
    assert list(pages.within(low, high - low)) == inside
    assert pages.is_empty(low, high - low) == (not inside)


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 512), (2048, 4096), (4095, 8192), (4096, 8191), (8192, 8192), (9216, 8192)],
)
def test_what_does_not_fit_behind_the_others_is_refused(start: int, end: int) -> None:
    pages = Pages([(1024, 4096)])
    with pytest.raises(Unreadable, match="do not fit behind"):
        pages.append(start, end)


FEW = st.sets(st.integers(0, 12))


@given(FEW, FEW, FEW)
def test_the_first_page_that_no_list_has_is_found(wanted: set[int], one: set[int], other: set[int]) -> None:
    def ranges(numbers: set[int]) -> Pages:
        return Pages((number * PAGE, (number + 1) * PAGE) for number in sorted(numbers))

    missing = min(wanted - one - other, default=None)
    expected = None if missing is None else missing * PAGE
    assert uncovered(ranges(wanted), ranges(one), ranges(other)) == expected


@pytest.mark.slow
def test_many_take_little_memory() -> None:
    """Five bytes for each, and what a growing list holds in reserve."""
    assert memory.peak(fragmented, 100_000) < 7 * 100_000


def fragmented(count: int) -> None:
    """One page in each 389 KiB, as on a disk that is very fragmented."""
    pages = Pages((at, at + PAGE) for at in range(0, count * 389 << 10, 389 << 10))
    assert sum(1 for _ in pages) == count
