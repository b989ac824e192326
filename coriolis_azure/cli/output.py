"""Documents and tables on stdout, and the two consoles.

Output is never truncated and never interpreted as markup. In a pipe, a table has one line per record, however wide. On
a terminal that is too narrow for the table, each record becomes a block, and the terminal itself wraps long lines, so
that they can be copied in one piece.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from ..errors import CleanupIncomplete, cleaned

if TYPE_CHECKING:  # rich takes a while to import: not for --help
    from rich.console import Console

_PROSE = {"estimate", "meaning", "reason", "result", "what to do", "why"}  # columns wrapped between words
_PROSE_WIDTH = 24  # the least readable width
_USUAL_WIDTH = 80
_GAP = 2


class Styled(NamedTuple):
    """A cell of a table in a style of rich."""

    text: str
    style: str


Cell = str | Styled


def out(width: int | None = None) -> Console:
    """The console on stdout, which prints text literally."""
    from rich.console import Console

    console = Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=width is None)
    return _wide(console)


def err() -> Console:
    """The console on stderr, which prints text literally."""
    from rich.console import Console

    return _wide(Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True))


def _wide(console: Console) -> Console:
    """The console of a terminal that says that it has no width (COLUMNS=0) is as wide as most are."""
    if console.width < 1:
        console.width = _USUAL_WIDTH
    return console


def show(file: TextIO, prose: str, lead: str = "", style: str = "") -> None:
    """Print prose after a `lead` in `style`. On a terminal it is wrapped between words, never within one."""
    try:
        console = (err if file is sys.stderr else out)() if file.isatty() else None
    except OSError:  # a host without a free descriptor imports nothing any more
        console = None
    if console is None:
        click.echo(lead + prose, file=file)
    else:
        show_on(console, prose, lead, style)


def show_on(console: Console, prose: str, lead: str = "", style: str = "") -> None:
    """`show` on the console of a terminal."""
    from rich.text import Text

    wrap = TextWrapper(console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    text = Text("\n".join(wrapped for line in (lead + prose).splitlines() for wrapped in wrap.wrap(line)))
    text.stylize(style, 0, len(lead))
    console.print(text)


@dataclass(frozen=True)
class Table:
    """Records under named columns."""

    columns: Sequence[str]
    records: Sequence[Sequence[Cell]]
    title: str = ""

    def show(self) -> None:
        """Print the table in the form that fits stdout."""
        rows = [[_cell(cell) for cell in record] for record in self.records]
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        if not on_terminal:
            self._show_lines(rows)
        elif self._least_width(rows) > out().width:
            self._show_blocks(rows)
        else:
            self._show_grid(rows, out().width)

    def _show_grid(self, rows: Iterable[Sequence[Styled]], width: int) -> None:
        from rich import box
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in self.columns:
            grid.add_column(column, no_wrap=column not in _PROSE, overflow="fold")
        for row in rows:
            grid.add_row(*(Text(*cell) for cell in row))
        console = out(width)
        with console.capture() as capture:
            console.print(grid)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        self._show_title()
        click.echo("\n".join(lines).strip("\n"))

    def _show_lines(self, rows: Sequence[Sequence[Styled]]) -> None:
        """As `_show_grid` without a limit, where nothing has to be wrapped or styled: in a pipe it is a lot quicker."""
        from rich.cells import cell_len

        texts = [list(self.columns), *([cell.text for cell in row] for row in rows)]
        widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
        gap = " " * _GAP
        lines = [
            gap.join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            for row in texts
        ]
        lines.insert(1, "─" * (sum(widths) + _GAP * (len(widths) - 1)))
        if self.title:
            click.echo(f"\n{cleaned(self.title)}")
        click.echo("\n".join(f" {line}".rstrip() for line in lines).strip("\n"))

    def _show_blocks(self, rows: Iterable[Sequence[Styled]]) -> None:
        from rich.cells import cell_len
        from rich.text import Text

        self._show_title()
        margin = max(map(cell_len, self.columns)) + _GAP
        for number, row in enumerate(rows):
            if number:
                out().print()
            for column, cell in zip(self.columns, row, strict=True):
                if cell.text not in ("", "-"):
                    out().print(Text.assemble((column.ljust(margin), "bold"), cell))

    def _show_title(self) -> None:
        if self.title:
            out().print()
            out().print(cleaned(self.title), style="italic")

    def _least_width(self, rows: Sequence[Sequence[Styled]]) -> int:
        """The least width of a terminal for the table; prose may be wrapped, but only between words."""
        from rich.cells import cell_len

        widths = []
        for index, column in enumerate(self.columns):
            lengths = [cell_len(column)]
            for row in rows:
                cell = row[index].text
                if column in _PROSE:
                    words = max(map(cell_len, cell.split()), default=0)
                    lengths += [words, min(cell_len(cell), _PROSE_WIDTH)]
                else:
                    lengths.append(cell_len(cell))
            widths.append(max(lengths))
        return sum(widths) + _GAP * (len(widths) + 1)


def _cell(cell: Cell) -> Styled:
    text, style = cell if isinstance(cell, Styled) else (cell, "")
    return Styled(cleaned(text), style)


def raise_left_behind(ids: Any) -> None:
    if ids:
        raise CleanupIncomplete(f"could not delete: {', '.join(ids)}", left_behind=list(ids))


def say(document: Any, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(map(cleaned, text.split("\n"))))


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))
