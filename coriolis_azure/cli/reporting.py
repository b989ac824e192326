"""Writes the page about the runs of a command, however the command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..clock import Clock
from ..errors import InvalidInput, OutputLost
from ..timeline import RunReport
from . import files
from .output import show


@contextmanager
def reporting(path: Path | None) -> Iterator[Callable[[RunReport], None]]:
    """Yield what takes the reports of runs; at the end, write the page about them to `path`, if one is given.

    Raises InvalidInput at once if `path` cannot be written. If that fails only at the end, OutputLost is raised; or, if
    the command has failed, it is said and that command's error stays. So the block shows the command's result, too.
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
    try:
        _write(path, reports)
    except InvalidInput as error:
        raise OutputLost(f"the command succeeded, but {error.message}", remedy=error.remedy) from error


def _write(path: Path | None, reports: list[RunReport]) -> None:
    if path is None or not reports:
        return
    from . import pages

    files.write(path, pages.of_runs(reports, Clock().now()))
