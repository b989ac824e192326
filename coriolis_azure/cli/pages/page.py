"""Renders pages from their templates."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ... import __version__
from ...clock import moment
from ...errors import cleaned
from ...events import aged, amount, counted, span
from ...replica.survey import Surveyed
from ...timeline import RunReport
from . import graphics

_IN_FULL = 20  # so many replicas are shown with large maps and whole timelines
_MAPS = 8  # small maps of a replica
_COLUMNS, _STRIP = 32, 64  # cells in a row of a large map, and in a small one
_ORDER = ("damaged", "incomplete", "unfinished", "running", "good")
STATES = {
    "good": ("✓", "good"),
    "running": ("▶", "run in progress"),
    "unfinished": ("◐", "unfinished run"),
    "incomplete": ("○", "no replica yet"),
    "damaged": ("✕", "damaged"),
    "done": ("✓", "done"),
    "failed": ("✕", "failed"),
    "interrupted": ("◐", "interrupted"),
}
BOTTLENECKS = {"source": "source", "destination": "destination", "limit": "bandwidth limit", "": "none"}


def of_replicas(found: Sequence[Surveyed], now: datetime) -> str:
    """The page about these replicas: those that need attention first, then the oldest."""

    def key(one: Surveyed) -> tuple[int, float, str]:
        return _ORDER.index(one.state), -(one.age(now) or 0.0), one.name

    ages = [(age, one) for one in found if (age := one.age(now)) is not None]
    return _rendered(
        "replicas.html",
        now,
        replicas=sorted(found, key=key),
        oldest=max(ages, key=lambda each: each[0]) if ages else None,
        in_full=len(found) <= _IN_FULL,
        attention=sum(one.state in ("damaged", "incomplete", "unfinished") for one in found),
    )


def of_runs(reports: Sequence[RunReport], now: datetime) -> str:
    """The page about these runs."""
    return _rendered("runs.html", now, reports=reports)


def _rendered(template: str, now: datetime, **values: Any) -> str:
    return _environment().get_template(template).render(now=now, **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("coriolis_azure.cli.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "amount": amount,
        "aged": aged,
        "span": span,
        "took": _took,
        "utc": _utc,
        "since": _since,
        "percent": graphics.percent,
    }
    environment.globals |= {
        "states": STATES,
        "bottlenecks": BOTTLENECKS,
        "meanings": graphics.MEANINGS,
        "words": graphics.WORDS,
        "most_maps": _MAPS,
        "drawing": graphics.drawing,
        "bars": graphics.bars,
        "chart": graphics.chart,
        "counted": counted,
        "columns": _COLUMNS,
        "strip": _STRIP,
        "version": __version__,
    }
    return environment


def _finalized(value: object) -> object:
    """A value for a page, cleaned; jinja2 escapes it afterwards, unless it is markup of a template."""
    return cleaned(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _utc(time: str | datetime | None) -> str:
    """A time for people; what is none, as it is."""
    found = moment(time) if isinstance(time, str) else time
    if found is None:
        return str(time or "-")
    return found.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _took(seconds: float) -> str:
    """A time span; of a short one, tenths of seconds matter."""
    return span(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _since(now: datetime, time: str) -> str:
    """How long ago a time was."""
    then = moment(time)
    return f"{aged(max(0.0, (now - then).total_seconds()))} ago" if then else time[:20]
