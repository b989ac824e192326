"""What is in the storage accounts: containers, blobs, snapshots, leases; page blobs lie in sparse files.

A blob's file is never changed while a snapshot shares it: the next write takes a copy first. Everything but page
writes is kept in one JSON file at once; page writes when the sandbox closes.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from coriolis_azure.sandbox.content import Contents
from coriolis_azure.sandbox.wire import Json

PAGE = 512


@dataclass
class Lease:
    """A lock on a blob: until a moment of the monotonic clock, for ever where that is None."""

    id: str
    seconds: int
    until: float | None

    @property
    def held(self) -> bool:
        """Whether it is in force."""
        return self.until is None or time.monotonic() < self.until


@dataclass
class Blob:
    """One blob, or a snapshot or earlier version of it. `ranges` are its written pages: sorted, apart, end excluded."""

    name: str
    kind: str
    file: str
    size: int = 0
    snapshot: str = ""
    version: str = ""
    etag: str = ""
    modified: str = ""
    made: str = ""
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = field(default_factory=dict)
    ranges: list[list[int]] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    lease: Lease | None = None
    blocks: dict[str, str] = field(default_factory=dict)  # uncommitted, by their id: a content each

    def leased(self) -> Lease | None:
        """The lease in force."""
        return self.lease if self.lease is not None and self.lease.held else None

    def written(self, start: int, end: int) -> list[tuple[int, int]]:
        """The written pages within a range, as ranges."""
        first = max(0, bisect.bisect_left(self.ranges, [start]) - 1)
        found = itertools.takewhile(lambda each: each[0] < end, self.ranges[first:])
        return [(max(low, start), min(high, end)) for low, high in found if high > start]

    def note(self, start: int, end: int, written: bool) -> None:
        """Pages were written, or cleared."""
        first = max(0, bisect.bisect_left(self.ranges, [start]) - 1)
        last = bisect.bisect_right(self.ranges, [end, end])
        kept: list[list[int]] = []
        low, high = start, end
        for each in self.ranges[first:last]:
            if each[1] < start or each[0] > end:
                kept.append(each)
            elif written:
                low, high = min(low, each[0]), max(high, each[1])
            else:
                kept += [part for part in ([each[0], start], [end, each[1]]) if part[0] < part[1]]
        if written:
            kept.append([low, high])
        self.ranges[first:last] = sorted(kept)


@dataclass
class Container:
    """A container. `immutable`: an immutability policy forbids to change or delete blobs."""

    name: str
    etag: str
    modified: str
    metadata: dict[str, str] = field(default_factory=dict)
    immutable: bool = False
    blobs: dict[str, Blob] = field(default_factory=dict)
    snapshots: list[Blob] = field(default_factory=list)
    versions: list[Blob] = field(default_factory=list)
    deleted: list[Blob] = field(default_factory=list)

    def find(self, name: str, snapshot: str = "", version: str = "") -> Blob | None:
        """The blob, or its snapshot of that moment, or that earlier version of it."""
        if version:
            return next((b for b in self.versions if (b.name, b.version) == (name, version)), None)
        if not snapshot:
            return self.blobs.get(name)
        return next((b for b in self.snapshots if (b.name, b.snapshot) == (name, snapshot)), None)

    def all(self) -> list[Blob]:
        """Whatever takes room here."""
        return [*self.blobs.values(), *self.snapshots, *self.versions, *self.deleted]

    def listed(self, included: Collection[str]) -> list[Blob]:
        """All blobs by name, what was before what is; of the lists beside `blobs` those that are `included`."""
        found = list(self.blobs.values())
        for kind in ("snapshots", "versions", "deleted"):
            found += getattr(self, kind) if kind in included else []
        return sorted(found, key=lambda each: (each.name, each.snapshot or each.version or "~"))


@dataclass
class Account:
    """The content of a storage account.

    With `soft_delete` what is deleted is kept as such, with `versioning` what a blob was before it is replaced, gets
    other metadata, is snapshotted or is deleted. Writing pages makes no version.
    """

    containers: dict[str, Container] = field(default_factory=dict)
    soft_delete: bool = False
    versioning: bool = False


class BlobStore:
    """All accounts by name. Whoever works with it holds `lock`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.contents = Contents(directory / "contents")
        self.accounts: dict[str, Account] = {}
        self._path = directory / "state.json"
        self._stamps = itertools.count(time.time_ns())
        if self._path.exists():
            self._load(json.loads(self._path.read_text()))
        self.contents.keep_only(self._in_use())

    def save(self) -> None:
        """Keep everything as it is now."""
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.accounts, default=vars))
        temporary.replace(self._path)

    def _load(self, document: Json) -> None:
        for name, account in document.items():
            containers = {}
            for key, raw in account.pop("containers").items():
                blobs = {each: _blob(found) for each, found in raw.pop("blobs").items()}
                snapshots, versions, gone = (
                    [_blob(found) for found in raw.pop(each, [])]
                    for each in ("snapshots", "versions", "deleted")
                )
                containers[key] = Container(
                    **raw, blobs=blobs, snapshots=snapshots, versions=versions, deleted=gone
                )
            self.accounts[name] = Account(containers, **account)

    def _in_use(self) -> set[str]:
        return {
            name
            for account in self.accounts.values()
            for container in account.containers.values()
            for blob in container.all()
            for name in (blob.file, *blob.blocks.values())
        }

    # etags and moments

    def written(self, account: Account, blob: Blob) -> None:
        """It has become what it is by more than writing pages: where the account keeps versions, this is a new one."""
        blob.version = self.moment() if account.versioning else ""

    def changed(self, thing: Blob | Container) -> None:
        """Give it a new ETag and moment."""
        thing.etag = f'"0x{next(self._stamps):X}"'
        thing.modified = http_date()

    def moment(self) -> str:
        """A snapshot's name: a moment that no other has."""
        seconds, rest = divmod(next(self._stamps), 10**9)
        whole = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{whole}.{rest:09d}"[:26] + f"{rest % 100:01d}"[-1] + "Z"

    # blobs

    def new_blob(self, container: Container, name: str, kind: str, size: int) -> Blob:
        """A fresh blob of zeros in place of whatever was there."""
        old = container.blobs.get(name)
        blob = Blob(name, kind, self.contents.zeros(size), size, made=http_date())
        blob.lease = old.lease if old else None
        container.blobs[name] = blob
        self.changed(blob)
        if old is not None:
            self.release(old)
        return blob

    def own_file(self, blob: Blob) -> Path:
        """The blob's file, which nobody shares: for whoever writes to it."""
        sharers = sum(
            each.file == blob.file
            for account in self.accounts.values()
            for container in account.containers.values()
            for each in container.all()
        )
        if sharers > 1:
            blob.file = self.contents.copied(self.contents.path(blob.file))
        return self.contents.path(blob.file)

    def snapshot(self, container: Container, blob: Blob, metadata: dict[str, str] | None) -> Blob:
        """Freeze a blob as it is."""
        taken = copy.deepcopy(blob)
        taken.snapshot, taken.version, taken.lease, taken.blocks = self.moment(), "", None, {}
        taken.metadata = dict(blob.metadata if metadata is None else metadata)
        container.snapshots.append(taken)
        return taken

    def keep_version(self, account: Account, container: Container, name: str) -> None:
        """What the blob is now will be an earlier version of it, where the account keeps versions."""
        blob = container.blobs.get(name)
        if account.versioning and blob is not None:
            kept = copy.deepcopy(blob)
            kept.version, kept.lease, kept.blocks = blob.version or self.moment(), None, {}
            container.versions.append(kept)

    def remove(self, account: Account, container: Container, blob: Blob) -> None:
        """Delete a blob, a snapshot or an earlier version."""
        current = container.blobs.get(blob.name) is blob
        if current:
            self.keep_version(account, container, blob.name)
            del container.blobs[blob.name]
        else:
            (container.snapshots if blob.snapshot else container.versions).remove(blob)
        if current and account.versioning:
            self.release(blob)
        elif account.soft_delete:
            container.deleted.append(blob)
        else:
            self.release(blob)

    def release(self, blob: Blob) -> None:
        """Delete the files that nobody has any more."""
        used = self._in_use()
        for name in {blob.file, *blob.blocks.values()} - used:
            self.contents.remove(name)

    def write(self, blob: Blob, offset: int, data: bytes) -> None:
        """Write pages."""
        path = self.own_file(blob)
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)
        blob.note(offset, offset + len(data), True)

    def clear(self, blob: Blob, start: int, end: int) -> None:
        """Clear pages. Only what was written needs to become zeros again."""
        for low, high in blob.written(start, end):
            self.write(blob, low, bytes(high - low))
        blob.note(start, end, False)

    def read(self, blob: Blob, offset: int, length: int) -> bytes:
        """Bytes of a blob."""
        descriptor = os.open(self.contents.path(blob.file), os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def resize(self, blob: Blob, size: int) -> None:
        """Cut a page blob, or make it longer with zeros."""
        os.truncate(self.own_file(blob), size)
        blob.note(min(size, blob.size), max(size, blob.size), False)
        blob.size = size


def http_date() -> str:
    """This moment as HTTP writes it."""
    return datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")


def new_id() -> str:
    """A lease or copy id."""
    return str(uuid.uuid4())


def _blob(raw: Json) -> Blob:
    lease = raw.pop("lease")
    # The monotonic clock has begun anew: of the leases only the endless ones are still known.
    kept = Lease(**lease) if lease and lease["until"] is None else None
    return Blob(**raw, lease=kept)
