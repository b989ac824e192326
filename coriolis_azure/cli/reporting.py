"""Writes the page about the runs of a command, however the command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..clock import Clock
from ..errors import InvalidInput
from ..timeline import RunReport
from . import files
from .output import show


@contextmanager
def reporting(path: Path | None) -> Iterator[Callable[[RunReport], None]]:
    """Yield what takes the reports of runs; at the end, write the page about them to `path`, if one is given.

    Raises InvalidInput at once if `path` cannot be written. If that fails only at the end of a command that has failed,
    it is said and that command's error stays.
    """
    if path is not None:
        files.refuse_unwritable(path)
    reports: list[RunReport] = []
    try:
        yield reports.append
    except BaseException:
        try:
            _write(path, reports)
        except InvalidInput as error:
            show(sys.stderr, f"{error.message}. {error.remedy}", "the report is not written: ", "yellow")
        raise
    _write(path, reports)


def _write(path: Path | None, reports: list[RunReport]) -> None:
    if path is None or not reports:
        return
    from . import pages

    files.write(path, pages.of_runs(reports, Clock().now()))
