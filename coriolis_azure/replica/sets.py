"""Which disks belong together: one small document a replica, beside its images, and what it says.

A replica is a set of images and a point in time. Each image has a manifest, which says what that image holds and
nothing of the others. So a run writes down, before it copies, which disks it is going to bring, and, once all of them
are committed, what each holds: the root of its manifest. Until then the document keeps what it said of the last run
that ended well, so that a run which failed before it changed anything takes nothing back.

    {"version": 1, "vm": ..., "begun": {"run", "time", "disks", "left_out"},
                              "point": {"run", "time", "roots", "left_out"}, "keep": ...}

Times are RFC 3339, in UTC; either part may be null. `keep`: how many earlier points are to be kept, null for as many as
there are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput, Unsupported
from ..events import Notice, Report, silent

if TYPE_CHECKING:
    from .destinations import Place

NAME = "replica.json"
VERSION = 2  # 1 knew no drafts: what is committed and recorded, it would not have published


@dataclass(frozen=True)
class Begun:
    """A run that has begun to copy, and has not ended well since; `time` is before its snapshots were taken."""

    run: str
    time: str
    disks: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """The last run that ended well: what each disk held then, by name."""

    run: str
    time: str
    roots: Mapping[str, str]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What is written down of a replica."""

    vm: str
    begun: Begun | None = None
    point: Point | None = None
    keep: int | None = None

    @property
    def keeps_points(self) -> bool:
        """Whether earlier points may count: a run that was to keep none has made what there was before it worthless."""
        return self.keep != 0 or self.begun is not None

    def text(self) -> bytes:
        """The document."""
        return (json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def of(cls, text: bytes) -> Record:
        """The record that `text` has written. InvalidInput where it is damaged, Unsupported where it is a newer one."""
        try:
            document = json.loads(text)
            if document["version"] > VERSION:
                raise Unsupported(
                    f"the record of the replica is of version {document['version']}, this program knows {VERSION}",
                    remedy="Use the newer coriolis-azure that wrote it.",
                )
            return cls(
                _text(document["vm"]),
                _begun(document["begun"]),
                _point(document["point"]),
                _number(document.get("keep")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(
                "the record of the replica is damaged",
                remedy="Replicate to it again: what is there is used, and a new record written.",
            ) from error


def read(place: Place) -> Record | None:
    """What is written down at `place`; None where nothing is. InvalidInput where it cannot be used."""
    text = place.record()
    return Record.of(text) if text is not None else None


def usable(place: Place, report: Report = silent) -> Record | None:
    """What is written down at `place`; None where nothing is, or what is damaged. Unsupported for a newer record.

    What cannot be read now is not damaged: whoever took it for that would replace it. That is raised.
    """
    text = place.record()
    try:
        return Record.of(text) if text is not None else None
    except Unsupported:
        raise
    except InvalidInput as error:
        report(Notice(error.message))
        return None


def begin(place: Place, vm: str, begun: Begun, keep: int | None = None) -> Record:
    """Write down that a run is about to copy; durable on return. What was said of the last good run stays.

    `keep`: how many earlier points are to be kept from now on; None for as many as before.
    """
    before = usable(place)
    if before is None or before.vm.lower() != vm.lower():
        before = Record(vm)
    record = Record(vm, begun, before.point, before.keep if keep is None else keep)
    place.keep_record(record.text())
    return record


def complete(place: Place, record: Record, roots: Mapping[str, str]) -> None:
    """Publish what the run that `begin` has recorded has committed; `roots` are those of its manifests."""
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
