"""The shapes of change maps and timelines, as numbers for templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ...change_map import ChangeMap, Kind
from ...timeline import BOTTLENECKS, Rates, RunReport, StepTaken

UNIT = 10  # of a drawing, for each side of a cell
_LEAST = 2  # units that a part of a mixed cell has at least
# From the top of a mixed cell to its bottom.
_STACK: tuple[Kind, ...] = ("zero", "same", "relied", "checked", "changed")

MEANINGS: dict[Kind, str] = {
    "changed": "written by this run",
    "checked": "unchanged, checked: read although Azure says so",
    "relied": "unchanged, relied on: not read, because Azure says so",
    "same": "unchanged: read",
    "zero": "only zeros",
}
WORDS: dict[Kind, str] = {
    "changed": "written",
    "checked": "checked",
    "relied": "relied on",
    "same": "unchanged",
    "zero": "zeros",
}


@dataclass(frozen=True)
class Drawing:
    """A map as a drawing. `paths`: by kind.

    `cell_bytes`: what a cell stands for. `mixed`: how many cells are of several kinds.
    """

    columns: int
    rows: int
    cells: int
    cell_bytes: int
    mixed: int
    paths: dict[Kind, str]

    @property
    def width(self) -> int:
        """In units."""
        return self.columns * UNIT

    @property
    def height(self) -> int:
        """In units."""
        return self.rows * UNIT


def drawing(disk: ChangeMap, columns: int, most: int = 1 << 30) -> Drawing:
    """A map in rows of `columns` cells, at most `most` of them; neighbours are joined as far as that takes."""
    per = -(-disk.cells // most)
    cells = [_cell(disk, range(at, min(at + per, disk.cells))) for at in range(0, disk.cells, per)]
    columns = min(columns, len(cells))
    paths: dict[Kind, list[str]] = {kind: [] for kind in _STACK}
    for row in range(0, len(cells), columns):
        at = 0
        for parts, group in groupby(cells[row : row + columns]):
            count = len(list(group))
            for kind, top, height in parts:
                y = row // columns * UNIT + top
                paths[kind].append(f"M{at * UNIT} {y}h{count * UNIT}v{height}h-{count * UNIT}z")
            at += count
    return Drawing(
        columns,
        -(-len(cells) // columns),
        len(cells),
        disk.cell_bytes * per,
        sum(len(parts) > 1 for parts in cells),
        {kind: "".join(shapes) for kind, shapes in paths.items() if shapes},
    )


Part = tuple[Kind, int, int]  # kind, top, height


def _cell(disk: ChangeMap, joined: range) -> tuple[Part, ...]:
    """The parts of a cell that stands for these cells of the map; each kind that occurs can be seen."""
    sums = {kind: sum(disk.shares[kind][at] for at in joined) for kind in _STACK}
    there = {kind: share for kind, share in sums.items() if share}
    whole = sum(there.values())
    heights = {kind: max(_LEAST, round(UNIT * share / whole)) for kind, share in there.items()}
    while sum(heights.values()) != UNIT and heights:
        largest = max(heights, key=lambda kind: heights[kind])
        heights[largest] += 1 if sum(heights.values()) < UNIT else -1
    parts, top = [], 0
    for kind, height in heights.items():
        parts.append((kind, top, height))
        top += height
    return tuple(parts)


@dataclass(frozen=True)
class Bar:
    """A step in a timeline: where its bar begins and how wide it is, and how much of it were waits; all in percent."""

    step: StepTaken
    left: float
    width: float
    waited: float


def bars(report: RunReport) -> list[Bar]:
    """The steps of a run as bars."""
    whole = max([report.seconds, *(step.end for step in report.steps)], default=0.0) or 1.0
    return [
        Bar(
            step,
            round(100 * step.begin / whole, 2),
            round(100 * step.seconds / whole, 2),
            round(min(100.0, 100 * sum(waited for _, waited in step.waits) / (step.seconds or 1.0)), 1),
        )
        for step in report.steps
    ]


@dataclass(frozen=True)
class Chart:
    """Rates as areas in a drawing of `width` by `height`. `bands`: bottleneck, where it begins, and how wide it is."""

    width: int
    height: int
    compared: str
    sent: str
    peak: float
    mean: float
    bands: Sequence[tuple[str, float, float]]


def chart(rates: Rates, width: int = 600, height: int = 100) -> Chart | None:
    """The rates of a copy; None if nothing was copied."""
    count = len(rates.done)
    highest = max(rates.done, default=0)
    if not highest:
        return None
    step = width / count

    def area(values: Sequence[int]) -> str:
        tops = [round(height - height * min(1.0, value / highest), 1) for value in values]
        points = [f"L{round(at * step, 1)} {top}H{round((at + 1) * step, 1)}" for at, top in enumerate(tops)]
        return f"M0 {height}{''.join(points)}V{height}z"

    seconds = rates.seconds
    return Chart(
        width,
        height,
        area(rates.done),
        area(rates.sent),
        highest / seconds,
        sum(rates.done) / (count * seconds),
        [(name, round(first * step, 1), round(length * step, 1)) for name, first, length in _bands(rates)],
    )


def _bands(rates: Rates) -> Iterator[tuple[str, int, int]]:
    at = 0
    for letter, group in groupby(rates.bottlenecks):
        count = len(list(group))
        yield BOTTLENECKS[letter], at, count
        at += count


def percent(part: float, whole: float) -> str:
    """A share for people: nothing that is there is 0 %, and nothing that is not all is 100 %."""
    share = 100 * part / whole if whole else 0.0
    if not part:
        return "0 %"
    if share < 1:
        return "< 1 %"
    return "> 99 %" if 99 < share < 100 else f"{share:.0f} %"
