"""Shows the progress of runs: live displays on a terminal, occasional lines elsewhere, or JSON lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..clock import Clock
from ..events import Copied, Report, json_lines, logged
from ..threads import every
from . import one_vm, several_vms
from .logs import steps_are_logged
from .output import err


@contextmanager
def watching(*, as_json: bool, many: bool = False) -> Iterator[Report]:
    """A sink for events: JSON lines, a live display on a terminal, or occasional lines elsewhere.

    `many`: of several VMs, each is shown as a whole.
    """
    if as_json:
        yield json_lines(sys.stderr)
    elif steps_are_logged():
        disks = one_vm.Lines(Clock())
        yield lambda event: disks.report(event) if isinstance(event, Copied) else logged(event)
    elif _is_lively():
        from . import screens

        screen = (screens.ManyVms if many else screens.OneVm)(Clock(), err())
        with screen.live:
            yield screen.report
    else:
        lines = (several_vms if many else one_vm).Lines(Clock())
        with every(1.0, lines.tick, optional=True):
            yield lines.report


def _is_lively() -> bool:
    """Whether stderr is a terminal that can rewrite lines, and the environment does not ask for plain text."""
    plain = os.environ.get("TERM") in {"dumb", "unknown"} or "NO_COLOR" in os.environ or "CI" in os.environ
    return sys.stderr.isatty() and not plain
