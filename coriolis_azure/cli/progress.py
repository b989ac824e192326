"""What a watcher sees: bars on a terminal, a line now and then elsewhere, or JSON lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import click
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from ..errors import cleaned
from ..events import Copied, Event, Notice, Report, Step, Waiting, json_lines, line, logged
from .logs import steps_are_logged
from .output import amount, err

_HELD_UP = {"": "", "source": "worker/line", "destination": "destination", "limit": "limit"}


@contextlib.contextmanager
def watching(as_json: bool) -> Iterator[Report]:
    """A sink for events: JSON lines, bars on a terminal, a line now and then elsewhere."""
    if as_json:
        yield json_lines(sys.stderr)
    elif steps_are_logged():
        lines = Lines()
        yield lambda event: lines.report(event) if isinstance(event, Copied) else logged(event)
    elif err().is_terminal and not err().is_dumb_terminal:
        bars = Bars()
        with bars.progress:
            yield bars.report
    else:
        yield Lines().report


class Bars:
    """Events on a terminal: a line for each step, a bar with rate and ETA for each disk, and what holds it up."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:>7}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("sent {task.fields[sent]}", markup=False),
            TextColumn("[dim]{task.fields[held_up]}"),
            console=err(),
        )
        self._tasks: dict[str, TaskID] = {}

    def report(self, event: Event) -> None:
        """Show an event."""
        if not isinstance(event, Copied):
            self.progress.console.print(_line(event))
            return
        if event.disk not in self._tasks:
            self._tasks[event.disk] = self.progress.add_task(
                cleaned(event.disk), total=event.total, sent="", held_up=""
            )
        task, sent, held_up = self._tasks[event.disk], amount(event.sent), _HELD_UP[event.held_up_by]
        self.progress.update(task, completed=event.done, total=event.total, sent=sent, held_up=held_up)
        if event.done == event.total:
            del self._tasks[event.disk]


class Lines:
    """Events where nobody looks at a terminal: a line for each step, and for each disk every few seconds."""

    _SECONDS = 5.0

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def report(self, event: Event) -> None:
        """Show an event."""
        if not isinstance(event, Copied):
            click.echo(_line(event), err=True)
            return
        now = time.monotonic()
        began = self._started.setdefault(event.disk, now)
        if event.done < event.total and now - self._told.get(event.disk, began) < self._SECONDS:
            return
        self._told[event.disk] = now
        rate = event.done / max(now - began, 0.001)
        eta = (event.total - event.done) / rate if rate else 0
        click.echo(
            f"  {cleaned(event.disk)}: {amount(event.done)} of {amount(event.total)}, {amount(event.sent)} sent, "
            f"{amount(rate)}/s, ETA {timedelta(seconds=round(eta))}"
            + (f", held up by {_HELD_UP[event.held_up_by]}" if event.held_up_by else ""),
            err=True,
        )
        if event.done == event.total:
            del self._started[event.disk], self._told[event.disk]


_MARKS = {Step: "→ ", Waiting: "  ", Notice: "! "}


def _line(event: Event) -> str:
    return _MARKS.get(type(event), "") + line(event)
