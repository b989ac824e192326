"""Looks at replicas without touching them: one place, or all places below it (DEST/VM), each by its own state.

A survey takes no lock, so it never keeps a run out, and a run does not keep it out. A replica that cannot be read is
one of those found, with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..clock import moment
from ..errors import CoriolisAzureError, InvalidInput
from ..model import Json
from . import history, places, points, sets, statefiles
from .destinations import Points
from .files import POINTS
from .folder import EXPORTS, FolderPoints, disk_names, unusable
from .history import History, Verified

if TYPE_CHECKING:
    from ..azure.blobs import Container, Listed, Storage
    from ..events import Report

State = Literal["damaged", "running", "unfinished", "incomplete", "good"]
_DISK = re.compile(r"(os|data-[0-9]{1,3})\.(?:raw|vhd)")
_DRAFT = re.compile(r"(os|data-[0-9]{1,3})\.(?:raw|vhd)\.(?:draft|partial|redo|index)")
_OWNER, _MARK, _LOCK = ".vm", ".run", ".lock"
_FOOTER = 512  # bytes behind the disk in a fixed VHD
_DEPTH = 2  # folders below a destination that may hold replicas


@dataclass(frozen=True)
class Surveyed:
    """One replica. Times are in UTC, in the format of RFC 3339; sizes are bytes, None if unknown.

    `name`: the folder below the destination, "" for the destination itself. `vm`, `point`, `points`, `disks` and
    `unfinished`: as in Status; `vm` is "" if it is unknown. `size_bytes`: that of the VM's disks. `stored_bytes`: what
    everything at this place takes up. `verified`: when all of it was last read and compared. `running`: whether a
    run is in progress, None if nobody can tell. `drafts`: the disks of which something was fetched and not published.
    `missing`: the disks whose images are not there. `error` and `remedy`: why it cannot be read, and what to do.
    """

    name: str
    place: str
    vm: str = ""
    point: str | None = None
    points: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    unfinished: str | None = None
    size_bytes: int | None = None
    stored_bytes: int | None = None
    verified: Verified | None = None
    running: bool | None = False
    drafts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""
    remedy: str = ""
    history: History = field(default_factory=History, repr=False)

    @property
    def state(self) -> State:
        """What matters most about it."""
        if self.error or self.missing:
            return "damaged"
        if self.running:
            return "running"
        if self.point is None:
            return "incomplete"
        return "unfinished" if self.unfinished or self.unpublished or self.running is None else "good"

    @property
    def unpublished(self) -> bool:
        """Whether a run may have died while it published. What was fetched of a disk that was left out may stay."""
        drafted = not set(self.drafts).isdisjoint(self.disks)
        return drafted and self.unfinished is None and not self.running

    @property
    def vm_name(self) -> str:
        """The name of the VM, or else of the place."""
        return self.vm.rpartition("/")[2] or self.name or self.place.rpartition("/")[2]

    @property
    def group(self) -> str:
        """The VM's resource group; "" if it is unknown."""
        found = re.search("/resourceGroups/([^/]+)", self.vm, re.IGNORECASE)
        return found[1] if found else ""

    def age(self, now: datetime) -> float | None:
        """The seconds since its point in time; None without one. Never negative: clocks of two hosts may differ."""
        then = moment(self.point) if self.point else None
        return max(0.0, round((now - then).total_seconds(), 3)) if then else None

    def advice(self) -> str:
        """What to do next, in the imperative; "" for nothing."""
        failed = self.history.last if self.history.last and self.history.last.outcome == "failed" else None
        if self.error:
            return self.remedy
        if self.missing:
            return f"Put {', '.join(self.missing)} back, or replicate again: all of it is sent."
        if self.running:
            return "Wait for the run to end."
        if self.running is None:
            return "Make sure that no run is in progress on another host, then replicate again."
        if self.unfinished or self.point is None:
            if failed and failed.remedy:
                return failed.remedy
            again = (
                "Replicate again" if self.point else "Do again what was begun there, `replicate` or `restore`"
            )
            return f"{again}: what had arrived is used."
        if self.unpublished:
            return "Replicate again: that completes what a run had begun to publish."
        return ""

    def to_json(self, now: datetime) -> Json:
        """Plain JSON values."""
        last = self.history.last
        document = {
            "vm": self.vm,
            "point": self.point,
            "points": list(self.points),
            "disks": list(self.disks),
            "unfinished": self.unfinished,
            "place": self.place,
            "state": self.state,
            "age_seconds": self.age(now),
            "size_bytes": self.size_bytes,
            "stored_bytes": self.stored_bytes,
            "verified": asdict(self.verified) if self.verified else None,
            "running": self.running,
            "drafts": list(self.drafts),
            "missing": list(self.missing),
            "last_run": last.to_json() if last else None,
            "advice": self.advice(),
        }
        return (
            document
            if not self.error
            else {**document, "error": {"message": self.error, "remedy": self.remedy}}
        )


def survey(url: str, report: Report, storage: Storage | None = None) -> tuple[list[Surveyed], bool]:
    """The replicas at `url`, sorted by name, and whether they are below it rather than at `url` itself.

    A switch that a dead run has begun is completed, as far as that is allowed. Raises InvalidInput if there is no
    replica.
    """
    found = list(_found(url, storage))
    if not found:
        raise InvalidInput("there is no replica at this destination", remedy="Replicate a VM to it first.")
    many = [one.name for one in found] != [""]
    for at, one in enumerate(found):
        if one.unpublished:
            with contextlib.suppress(CoriolisAzureError):  # a read-only place
                below = places.below(url, one.name) if one.name else url
                places.open(below, report, storage, existing=True).close()
                found[at] = next((new for new in _found(url, storage, one.name) if new.name == one.name), one)
    return sorted(found, key=lambda one: one.name), many


def _found(url: str, storage: Storage | None, only: str = "") -> Iterator[Surveyed]:
    """The replicas at and below `url`; with `only`, just that one."""
    if places.is_in_azure(url):
        yield from _in_container(url, places.required(storage, url))
        return
    folder = places.folder(url)
    try:
        folders = [folder / only] if only else list(_folders(folder, _DEPTH))
    except OSError as error:
        raise unusable(folder, error) from error
    for path in folders:
        yield _in_folder(path, "" if path == folder else str(path.relative_to(folder)))


# In a folder


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folders that hold a replica: this one or, if it holds none, some below it. Links are not followed."""
    with os.scandir(folder) as listed:
        entries = list(listed)
    names = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    if names & {sets.NAME, _OWNER, _MARK} or any(map(_DISK.fullmatch, names)):
        yield folder
    elif depth:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    yield from _folders(folder / entry.name, depth - 1)


def _in_folder(path: Path, name: str) -> Surveyed:
    here = Surveyed(name, str(path))
    try:
        return _read_folder(path, here)
    except CoriolisAzureError as error:
        return replace(here, error=error.message, remedy=error.remedy, running=_is_running(path))
    except OSError as error:
        why = unusable(path, error)
        return replace(here, error=why.message, remedy=why.remedy)


def _read_folder(path: Path, here: Surveyed) -> Surveyed:
    with os.scandir(path) as listed:
        entries = {entry.name: entry for entry in listed}
    sizes = {found[1]: _size(entries[found[0]]) for found in filter(None, map(_DISK.fullmatch, entries))}
    if EXPORTS in entries:  # the images are elsewhere
        sizes = dict.fromkeys(disk_names(path, ".raw.manifest"))
    here = replace(here, stored_bytes=sum(_stored(entries.values())))
    if sets.NAME in entries:
        record = sets.Record.of(statefiles.read(path / sets.NAME, ours=False, limit=history.LIMIT))
    else:
        record = sets.Record(_owner(path) if _OWNER in entries else "")
        if sizes and _MARK not in entries:
            raise InvalidInput(
                "there is no record of which disks belong together",
                remedy="Replicate to it once more, which sends only what has changed.",
            )
    kept = History()
    if history.NAME in entries:
        with contextlib.suppress(CoriolisAzureError, OSError):
            text = statefiles.read(path / history.NAME, ours=False, limit=history.LIMIT + 1)
            kept = History.of(text, runs=1)
    running = _is_running(path) if _MARK in entries else False
    drafts = {found[1] for found in filter(None, map(_DRAFT.fullmatch, entries))}
    return _of(here, record, FolderPoints(path / POINTS, None), _Seen(sizes, drafts, kept, running))


@dataclass(frozen=True)
class _Seen:
    """What is at a place beside its record. `sizes`: of the images that are there, None for a device."""

    sizes: Mapping[str, int | None]
    drafts: Iterable[str]
    kept: History
    running: bool | None


def _of(here: Surveyed, record: sets.Record, kept_points: Points, seen: _Seen) -> Surveyed:
    """The replica with this record."""
    sizes, kept = seen.sizes, seen.kept
    disks = tuple(sorted(record.point.roots)) if record.point is not None else ()
    last = {name: each.size for name, each in kept.maps.items()}
    known = [sizes[disk] if sizes.get(disk) is not None else last.get(disk) for disk in disks]
    earlier = points.earlier(kept_points, record).values()
    return replace(
        here,
        vm=record.vm,
        point=record.point.time if record.point is not None else None,
        points=tuple(each.point.time for each in earlier if each.point is not None),
        disks=disks,
        unfinished=record.begun.time if record.begun is not None else None,
        size_bytes=sum(size or 0 for size in known) if disks and None not in known else None,
        verified=kept.verified,
        running=seen.running,
        drafts=tuple(sorted(seen.drafts)),
        missing=tuple(disk for disk in disks if disk not in sizes) if not seen.running else (),
        history=kept,
    )


def _size(entry: os.DirEntry[str]) -> int | None:
    """The size of an image; None for a link to a device."""
    return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None


def _stored(entries: Iterable[os.DirEntry[str]]) -> Iterator[int]:
    """What these files take up, and those in these folders. What is gone by now takes up nothing."""
    waiting = list(entries)  # a stranger's folders may be deeper than calls can be
    while waiting:
        entry = waiting.pop()
        with contextlib.suppress(OSError):
            found = entry.stat(follow_symlinks=False)
            yield found.st_blocks * 512
            if stat.S_ISDIR(found.st_mode):
                with os.scandir(entry.path) as listed:
                    waiting += listed


def _owner(path: Path) -> str:
    return statefiles.read(path / _OWNER, ours=False, limit=4096).decode(errors="replace").strip()


def _is_running(path: Path) -> bool | None:
    """Whether the run whose mark is there is alive; None if its file system has no locks that tell."""
    if not os.path.lexists(path / _MARK):
        return False
    try:
        fd = statefiles.open_existing(path / _LOCK, os.O_RDONLY, ours=False)
    except (OSError, InvalidInput):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        statefiles.close(fd)
    return False


# In Blob storage


def _in_container(url: str, storage: Storage) -> Iterator[Surveyed]:
    account, name, prefix = places.in_storage(url)
    container = storage.account(account).container(name)
    below = f"{prefix}/" if prefix else ""
    blobs = {blob.name: blob for blob in container.blobs(below)} if container.exists() else {}
    found = {path.rpartition("/")[0] for path in blobs if path.rpartition("/")[2] in (_OWNER, sets.NAME)}
    if prefix in found:
        found = {prefix}
    for place in found:
        relative = place.removeprefix(prefix).strip("/")
        if relative.count("/") < _DEPTH:
            yield _at_prefix(container, place, relative, blobs)


def _at_prefix(container: Container, place: str, name: str, blobs: Mapping[str, Listed]) -> Surveyed:
    from .container import BlobPoints

    here = Surveyed(name, f"{container.url}/{place}".rstrip("/"))
    below = f"{place}/" if place else ""
    names = [blob.removeprefix(below) for blob in blobs if blob.startswith(below)]
    sizes: dict[str, int | None] = {}
    for found in filter(None, map(_DISK.fullmatch, names)):
        sizes[found[1]] = max(0, blobs[below + found[0]].size - _FOOTER)
    text = partial(_text, container, below)
    try:
        record_text = text(sets.NAME)
        record = (
            sets.Record.of(record_text)
            if record_text
            else sets.Record((text(_OWNER) or b"").decode(errors="replace"))
        )
        kept = History.of(text(history.NAME), runs=1) if history.NAME in names else History()
        drafts = {found[1] for found in filter(None, map(_DRAFT.fullmatch, names))}
        owner = blobs.get(below + _OWNER)
        kept_points = BlobPoints(container, below, lambda: None)
        running = owner is not None and owner.leased
        return _of(here, record, kept_points, _Seen(sizes, drafts, kept, running))
    except CoriolisAzureError as error:
        return replace(here, error=error.message, remedy=error.remedy)


def _text(container: Container, below: str, name: str) -> bytes | None:
    return container.blob(f"{below}{name}").text()
