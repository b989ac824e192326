"""The record of a replica: a small document beside its images that says which disks belong together.

A replica is a set of images and a point in time, but the manifest of an image describes only that image. So before a
run copies anything, it records which disks it is going to copy (`begun`). Once all of them are committed, it records
the root of each manifest (`point`). Until then the record keeps the point of the last successful run, so a run that
fails changes nothing.

    {"version": 1, "vm": ..., "begun": {"run", "time", "disks", "left_out"},
                              "point": {"run", "time", "roots", "left_out"}, "keep": ..., "stream": ...}

Times are in UTC, in the format of RFC 3339. `begun` and `point` may be null. `keep`: how many earlier points to keep;
null if no run has said so, then as many as there are. `stream`: a random name by which the baselines of the replica's
disks are found, even if no manifest names them yet; "" if no run has kept any.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput, Unsupported
from ..events import Notice, Report, silent

if TYPE_CHECKING:
    from .destinations import Place

NAME = "replica.json"
VERSION = 2  # programs that know only version 1 know no drafts, so they would not complete a switch


@dataclass(frozen=True)
class Begun:
    """A run that has begun to copy and has not succeeded. `time`: a moment before its snapshots were taken."""

    run: str
    time: str
    disks: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """The point in time of the last successful run. `roots`: by disk, the root of the manifest of its image."""

    run: str
    time: str
    roots: Mapping[str, str]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The record of a replica. `vm`: its ARM id."""

    vm: str
    begun: Begun | None = None
    point: Point | None = None
    keep: int | None = None
    stream: str = ""

    @property
    def keeps_points(self) -> bool:
        """Whether earlier points are valid: once a run with `keep` 0 has published, those before it are worthless."""
        return self.keep != 0 or self.begun is not None

    def text(self) -> bytes:
        """The document."""
        return (json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def of(cls, text: bytes) -> Record:
        """The inverse of `text`. Raises InvalidInput if it is damaged, Unsupported if it has a newer version."""
        try:
            document = json.loads(text)
            if document["version"] > VERSION:
                raise Unsupported(
                    f"the record of the replica has version {document['version']}, this program knows only {VERSION}",
                    remedy="Use the newer coriolis-azure that wrote it.",
                )
            return cls(
                _text(document["vm"]),
                _begun(document["begun"]),
                _point(document["point"]),
                _number(document.get("keep")),
                _text(document.get("stream", "")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(
                "the record of the replica is damaged",
                remedy="Replicate to it again: the images are used, and a new record is written.",
            ) from error


def read(place: Place) -> Record | None:
    """The record at `place`; None if there is none. Raises InvalidInput if it is damaged."""
    text = place.record()
    return Record.of(text) if text is not None else None


def usable(place: Place, report: Report = silent) -> Record | None:
    """The record at `place`; None if there is none, or if it is damaged, which is reported.

    Raises Unsupported if it has a newer version, and DestinationFailed if it cannot be read now: a record that is taken
    for damaged is replaced.
    """
    text = place.record()
    try:
        return Record.of(text) if text is not None else None
    except Unsupported:
        raise
    except InvalidInput as error:
        report(Notice(error.message))
        return None


def begin(
    place: Place, vm: str, begun: Begun, keep: int | None = None, *, keep_baseline: bool = False
) -> Record:
    """Record that a run is about to copy, and return the record; durable on return. The point stays as it was.

    `keep`: how many earlier points to keep from now on; None for as many as before. `keep_baseline`: whether the run is
    going to keep baselines.
    """
    before = usable(place)
    if before is None or before.vm.lower() != vm.lower():
        before = Record(vm)
    stream = before.stream or (secrets.token_hex(8) if keep_baseline else "")
    record = Record(vm, begun, before.point, before.keep if keep is None else keep, stream)
    place.keep_record(record.text())
    return record


def complete(place: Place, record: Record, roots: Mapping[str, str]) -> None:
    """Publish what a run has committed. `record`: as `begin` returned it. `roots`: by disk, the root of the manifest.

    Raises ValueError if these are not the disks that the run began with, DestinationFailed like `publishing.publish`.
    """
    begun = record.begun
    if begun is None or set(roots) != set(begun.disks):
        raise ValueError("these are not the disks that the run began with")
    point = Point(begun.run, begun.time, dict(roots), begun.left_out)
    place.publish(replace(record, begun=None, point=point).text())


def _begun(document: Any) -> Begun | None:
    if document is None:
        return None
    return Begun(
        _text(document["run"]), _text(document["time"]), _names(document["disks"]), _left_out(document)
    )


def _point(document: Any) -> Point | None:
    if document is None:
        return None
    roots = {_text(name): _text(root) for name, root in dict(document["roots"]).items()}
    return Point(_text(document["run"]), _text(document["time"]), roots, _left_out(document))


def _left_out(document: Mapping[str, Any]) -> tuple[str, ...]:
    return _names(document["left_out"])


def _names(found: Collection[Any]) -> tuple[str, ...]:
    return tuple(_text(name) for name in found)


def _number(found: Any) -> int | None:
    if found is not None and (type(found) is not int or found < 0):
        raise TypeError
    return found


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError
    return found
