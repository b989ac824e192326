"""What a list of changes says of chunks, against a model that looks at every byte's page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coriolis_azure.readers.hint import Hint
from coriolis_azure.replica.manifest import GRAIN

PAGE = 512
RANGES = st.lists(
    st.tuples(st.integers(0, 64 * GRAIN // PAGE), st.integers(1, 5 * GRAIN // PAGE)), max_size=12
)


def in_order(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The ranges of pages as offsets and lengths of bytes: in order, disjoint, adjacent ones as one."""
    pages = sorted({page for first, count in ranges for page in range(first, first + count)})
    found: list[list[int]] = []
    for page in pages:
        if page * PAGE >= size:
            break
        if found and found[-1][1] == page * PAGE:
            found[-1][1] += PAGE
        else:
            found.append([page * PAGE, page * PAGE + PAGE])
    return [(start, min(end, size) - start) for start, end in found]


def pages_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {
        page for offset, length in ranges for page in range(offset // PAGE, -(-(offset + length) // PAGE))
    }


@given(
    size=st.integers(1, 64 * GRAIN // PAGE),
    written=RANGES,
    cleared=RANGES,
    first=st.integers(0, 63),
    count=st.integers(1, 16),
)
def test_a_hint_never_says_less_than_the_list(
    size: int, written: list[tuple[int, int]], cleared: list[tuple[int, int]], first: int, count: int
) -> None:
    size *= PAGE
    were_written = in_order(written, size)
    not_written = [(page, 1) for page in pages_of(in_order(cleared, size)) - pages_of(were_written)]
    were_cleared = in_order(not_written, size)
    hint = Hint(size, were_written, were_cleared)
    offset = first * GRAIN
    length = min(count * GRAIN, size - offset)
    if length <= 0:
        return
    there = set(range(offset // PAGE, -(-(offset + length) // PAGE)))
    changed = pages_of(were_written) | pages_of(were_cleared)
    assert hint.touched(offset, length) == bool(there & changed)
    if hint.zero(offset, length):
        assert there <= pages_of(were_cleared)
    if there <= pages_of(were_cleared):
        assert hint.zero(offset, length)


def test_nothing_listed_is_nothing_touched() -> None:
    hint = Hint(10 * GRAIN + 1, [], [])
    assert not hint.touched(0, 10 * GRAIN + 1)
    assert not hint.zero(10 * GRAIN, 1)
