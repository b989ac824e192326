"""What the last runs to a place did, and what they found where: a small document beside the replica, for people.

    {"version": 1, "runs": [...], "mapped": ..., "maps": {"os": ...}, "verified": {"run", "point", "time"}}

No run relies on it: a damaged document counts as none, and one that cannot be written is reported. `runs`: the last
ones, oldest first. `maps`: by disk, what the run that made the point `mapped` found (see `change_map`). `verified`: the
last time that all of the replica was read and compared, as of which point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from ..change_map import ChangeMap
from ..errors import CoriolisAzureError
from ..events import Notice, Report
from ..timeline import Recorder, RunReport

NAME = "history.json"
VERSION = 1
LIMIT = 1 << 20  # bytes; a larger document is not ours
_RUNS = 5
_DISKS = 80
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@runtime_checkable
class Chronicle(Protocol):
    """A place that stores a history. Failures are raised as CoriolisAzureErrors."""

    def history(self) -> bytes | None:
        """The document; None if there is none."""

    def keep_history(self, text: bytes) -> None:
        """Replace the document atomically. Only while a run holds the place."""


@dataclass(frozen=True)
class Verified:
    """At `time`, all of the replica was read and was as the run that made `point` had left it."""

    point: str
    time: str


@dataclass(frozen=True)
class History:
    """The last runs, oldest first, the maps of the disks as of the point `mapped`, and the last verification."""

    runs: tuple[RunReport, ...] = ()
    mapped: str = ""
    maps: Mapping[str, ChangeMap] = field(default_factory=dict)
    verified: Verified | None = None

    @property
    def last(self) -> RunReport | None:
        """The last run; None if none is recorded."""
        return self.runs[-1] if self.runs else None

    def after(self, run: RunReport) -> History:
        """The history with one more run. If it failed, the maps of the last good one stay."""
        runs = (*self.runs, run)[-_RUNS:]
        if run.outcome != "done":
            return replace(self, runs=runs)
        return replace(self, runs=runs, mapped=run.point, maps=dict(list(run.maps.items())[:_DISKS]))

    def text(self) -> bytes:
        """The document, within the limit."""
        text = json.dumps(
            {
                "version": VERSION,
                "runs": [run.to_json() for run in self.runs],
                "mapped": self.mapped,
                "maps": {name: each.to_json() for name, each in self.maps.items()},
                "verified": asdict(self.verified) if self.verified else None,
            }
        ).encode()
        if len(text) <= LIMIT:
            return text
        return (replace(self, runs=self.runs[1:]) if self.runs else History()).text()

    @classmethod
    def of(cls, text: bytes | None, *, runs: int = _RUNS) -> History:
        """The inverse of `text`, with the last `runs`; an empty history if there is no document, or a damaged one."""
        if text is None or len(text) > LIMIT:
            return cls()
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                return cls()
            maps = list(document["maps"].items())[:_DISKS]
            return cls(
                tuple(RunReport.from_json(run) for run in document["runs"][-runs:]),
                str(document["mapped"]),
                {str(name): ChangeMap.from_json(each) for name, each in maps},
                _verified(document["verified"]),
            )
        except _DAMAGED:
            return cls()


def read(place: object) -> History:
    """The history of a place; an empty one if it has none that can be read."""
    if not isinstance(place, Chronicle):
        return History()
    try:
        return History.of(place.history())
    except CoriolisAzureError:
        return History()


@contextmanager
def kept(place: object, recorder: Recorder, report: Report) -> Iterator[None]:
    """Add the run of the block to the history of `place`, however the block ends. Raises nothing of its own."""
    try:
        yield
    except BaseException as error:
        recorder.failed(error)
        raise
    finally:
        _save(place, read(place).after(recorder.report()), report)


def verified(place: object, point: str, time: str, report: Report) -> None:
    """Record that all of the replica at `place` was verified; only if it has a history."""
    history = read(place)
    if history.runs:
        _save(place, replace(history, verified=Verified(point, time)), report)


def _save(place: object, history: History, report: Report) -> None:
    if not isinstance(place, Chronicle):
        return
    try:
        place.keep_history(history.text())
    except CoriolisAzureError as error:
        report(Notice(f"what this run did is not recorded: {error.message}"))


def _verified(document: Any) -> Verified | None:
    return Verified(str(document["point"]), str(document["time"])) if document is not None else None
