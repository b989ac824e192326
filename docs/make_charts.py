"""Draws a bar chart of each table of figures in explanation/performance.md into docs/pictures.

    python docs/make_charts.py

A chart has the rows and columns of its table. All bars of one unit have one scale; a cell without a number has no bar.
Numbers that a table has in bold are darker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "explanation" / "performance.md"
# The charts by the first cell of their tables and, where that is empty, of the first row.
CHARTS = {
    "disks": "waiting",
    "ours, TLS: times faster than": "times-tls",
    "ours, SSH: times faster than": "times-ssh",
    "seconds [least-most]": "seconds",
    "MiB on the wire": "wire",
    "SSH, ours": "writers",
    "write, ours": "blobs",
    "over a line of 1 Gbit/s": "distance",
}
_UNITS = ("seconds", "requests", "memory")  # a column that names none has that of the column before
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LABEL, _COLUMN, _LINE, _BAR = 260, 128, 22, 70  # widths and heights in pixels; _BAR: the longest bar
_HEADING = 46


@dataclass(frozen=True)
class Table:
    """A table of a page: the cells of its heading and of its rows."""

    heading: list[str]
    rows: list[list[str]]

    @property
    def key(self) -> str:
        """What names it in CHARTS."""
        return self.heading[0] or self.rows[0][0]


def tables(text: str) -> Iterator[Table]:
    """The tables of a page."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heading, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()
        )
        yield Table(heading, rows)


def drawn(table: Table) -> str:
    """The chart of a table, as SVG."""
    width, height = _LABEL + _COLUMN * (len(table.heading) - 1), _HEADING + _LINE * len(table.rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(8, 30, table.heading[0], weight="bold"),
    ]
    parts += [_text(8, _place(at), row[0].strip("*")) for at, row in enumerate(table.rows)]
    units = _units(table.heading)
    for column, heading in enumerate(table.heading[1:], 1):
        left = _LABEL + _COLUMN * (column - 1)
        parts += [
            _text(left, 16 + 15 * line, part, weight="bold") for line, part in enumerate(_halves(heading))
        ]
        most = max(_numbers(table, [at for at, unit in enumerate(units) if unit == units[column]]))
        for at, row in enumerate(table.rows):
            length = round(_BAR * (_number(row[column]) or 0) / most, 1)
            color = "#1f5f99" if row[column].startswith("**") else "#8fb8de"
            if length:
                place = _place(at)
                parts.append(
                    f'<rect x="{left}" y="{place - 11}" width="{length}" height="14" fill="{color}"/>'
                )
            parts.append(_text(left + length + 4, _place(at), row[column].strip("*").split(" [")[0]))
    return "\n".join([*parts, "</svg>", ""])


def _units(heading: list[str]) -> list[str]:
    """The unit of each column."""
    found = [""]
    for cell in heading[1:]:
        found.append(next((unit for unit in _UNITS if unit in cell), found[-1]))
    return found


def _numbers(table: Table, columns: list[int]) -> Iterator[float]:
    """The numbers in these columns."""
    for row in table.rows:
        yield from filter(None, (_number(row[column]) for column in columns if column))


def _place(at: int) -> int:
    """The base line of a row."""
    return _HEADING + _LINE * at + 12


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y}" font-weight="{weight}" fill="#222222">{escape(text)}</text>'


def _halves(heading: str) -> list[str]:
    """A heading in one line or two."""
    words = heading.split()
    middle = next((at for at in range(1, len(words)) if len(" ".join(words[:at])) > len(heading) / 3), 1)
    return [heading] if len(heading) < 18 else [" ".join(words[:middle]), " ".join(words[middle:])]


def _number(cell: str) -> float | None:
    """The number that a cell begins with."""
    found = _NUMBER.match(cell.lstrip("*"))
    return float(found[0]) if found else None


def charts() -> dict[Path, str]:
    """All charts, by the files that they belong in."""
    found = {table.key: table for table in tables(PAGE.read_text(encoding="utf-8"))}
    return {DOCS / "pictures" / f"{name}.svg": drawn(found[key]) for key, name in CHARTS.items()}


if __name__ == "__main__":
    for path, chart in charts().items():
        path.write_text(chart, encoding="utf-8")
