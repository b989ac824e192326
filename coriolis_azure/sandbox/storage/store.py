"""The contents of the storage accounts: containers, blobs, snapshots, leases. Blobs are sparse files.

A blob's file never changes while a snapshot shares it: the next write copies it first. Every change is saved at once
to one JSON file, except page writes, which are saved when the sandbox closes.
"""

from __future__ import annotations

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
from typing import Any

from coriolis_azure.sandbox.content import Contents
from coriolis_azure.sandbox.pages import PAGE as PAGE
from coriolis_azure.sandbox.pages import Pages, Range, merged
from coriolis_azure.sandbox.wire import Json


@dataclass
class Lease:
    """A lease on a blob, until a time of the monotonic clock; infinite if that is None."""

    id: str
    seconds: int
    until: float | None

    @property
    def held(self) -> bool:
        """Whether the lease is active."""
        return self.until is None or time.monotonic() < self.until


@dataclass
class Blob:
    """A blob, a snapshot or an earlier version.

    `pages`: what was written and cleared. Each snapshot ends a `generation` of changes. `life`: a blob that is replaced
    as a whole begins another, and has no differences to snapshots of the one before.
    """

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
    pages: Pages = field(default_factory=lambda: Pages(0))
    generation: int = 1
    life: str = ""
    copied: dict[str, str] = field(default_factory=dict)
    lease: Lease | None = None
    blocks: dict[str, str] = field(default_factory=dict)  # uncommitted blocks: id -> content

    def leased(self) -> Lease | None:
        """The active lease, if any."""
        return self.lease if self.lease is not None and self.lease.held else None

    def written(self, start: int, end: int) -> list[tuple[int, int]]:
        """The written pages within a range, as ranges."""
        return [(low, high) for low, high, _ in self.pages.allocated(start, end)]

    def changed(self, older: Blob, start: int, end: int) -> list[Range]:
        """What was written or cleared within a range since `older`, a snapshot of this blob."""
        spans = self.pages.spans(start, end, older.generation)
        return list(merged(Range(low, high, cleared) for low, high, _, cleared in spans))

    def note(self, start: int, end: int, *, written: bool) -> None:
        """Record that pages were written or cleared."""
        self.pages.note(start, end, self.generation, cleared=not written)

    def same(self) -> Blob:
        """A blob like this one, without its lease and uncommitted blocks."""
        alike = copy.copy(self)
        alike.pages, alike.metadata, alike.copied = self.pages.copy(), dict(self.metadata), dict(self.copied)
        alike.lease, alike.blocks = None, {}
        return alike


@dataclass
class Container:
    """A container. `immutable`: an immutability policy forbids changing or deleting blobs."""

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
        """The blob, or its snapshot or earlier version with this name."""
        if version:
            return next(
                (blob for blob in self.versions if (blob.name, blob.version) == (name, version)), None
            )
        if not snapshot:
            return self.blobs.get(name)
        return next((blob for blob in self.snapshots if (blob.name, blob.snapshot) == (name, snapshot)), None)

    def all(self) -> list[Blob]:
        """Everything that takes space in this container."""
        return [*self.blobs.values(), *self.snapshots, *self.versions, *self.deleted]

    def listed(self, included: Collection[str]) -> list[Blob]:
        """All blobs by name, older states first, with the `included` kinds: snapshots, versions, deleted."""
        blobs = list(self.blobs.values())
        for kind in ("snapshots", "versions", "deleted"):
            blobs += getattr(self, kind) if kind in included else []
        return sorted(blobs, key=lambda blob: (blob.name, blob.snapshot or blob.version or "~"))


@dataclass
class Account:
    """The contents of a storage account.

    With `soft_delete`, deleted blobs are retained. With `versioning`, a version is kept whenever a blob is replaced,
    gets new metadata, is snapshotted or deleted; writing pages makes no version.
    """

    containers: dict[str, Container] = field(default_factory=dict)
    soft_delete: bool = False
    versioning: bool = False


class BlobStore:
    """All accounts by name. Its users must hold `lock`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.contents = Contents(directory / "contents")
        self.accounts: dict[str, Account] = {}
        self._path = directory / "state.json"
        self._stamps = itertools.count(time.time_ns() // 100)
        if self._path.exists():
            self._load(json.loads(self._path.read_text()))
        self.contents.keep_only(self._in_use())

    def save(self) -> None:
        """Save the present state."""
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.accounts, default=_plain))
        temporary.replace(self._path)

    def _load(self, document: Json) -> None:
        for name, account in document.items():
            containers = {}
            for key, raw in account.pop("containers").items():
                blobs = {blob_name: _blob(record) for blob_name, record in raw.pop("blobs").items()}
                snapshots, versions, removed = (
                    [_blob(record) for record in raw.pop(kind, [])]
                    for kind in ("snapshots", "versions", "deleted")
                )
                containers[key] = Container(
                    **raw, blobs=blobs, snapshots=snapshots, versions=versions, deleted=removed
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
        """Start a new version after any change other than writing pages, if the account has versioning."""
        blob.version = self.moment() if account.versioning else ""

    def changed(self, item: Blob | Container) -> None:
        """Give it a new ETag and modification time."""
        item.etag = f'"0x{next(self._stamps):X}"'
        item.modified = http_date()

    def moment(self) -> str:
        """A unique point in time, as the name of a snapshot or version."""
        seconds, ticks = divmod(next(self._stamps), 10**7)
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{ticks:07d}Z"

    # blobs

    def new_blob(self, container: Container, name: str, kind: str, size: int) -> Blob:
        """Make a blob of zeros, replacing any blob with this name."""
        old = container.blobs.get(name)
        blob = Blob(name, kind, self.contents.zeros(size), size, made=http_date(), life=new_id())
        blob.lease = old.lease if old else None
        container.blobs[name] = blob
        self.changed(blob)
        if old is not None:
            self.release(old)
        return blob

    def own_file(self, blob: Blob) -> Path:
        """The blob's file, after making sure that it is not shared, so that it may be written to."""
        users = sum(
            other.file == blob.file
            for account in self.accounts.values()
            for container in account.containers.values()
            for other in container.all()
        )
        if users > 1:
            blob.file = self.contents.copied(self.contents.path(blob.file))
        return self.contents.path(blob.file)

    def snapshot(self, container: Container, blob: Blob, metadata: dict[str, str] | None) -> Blob:
        """Take a snapshot of a blob."""
        snapshot = blob.same()
        blob.generation += 1
        snapshot.snapshot, snapshot.version = self.moment(), ""
        snapshot.metadata = dict(blob.metadata if metadata is None else metadata)
        container.snapshots.append(snapshot)
        return snapshot

    def keep_version(self, account: Account, container: Container, name: str) -> None:
        """Keep the present blob as an earlier version, if the account has versioning."""
        blob = container.blobs.get(name)
        if account.versioning and blob is not None:
            version = blob.same()
            version.version = blob.version or self.moment()
            container.versions.append(version)

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
        """Delete the blob's files that nothing uses any more."""
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
        blob.note(offset, offset + len(data), written=True)

    def clear(self, blob: Blob, start: int, end: int) -> None:
        """Clear pages. Only written pages have to be overwritten with zeros."""
        for low, high in blob.written(start, end):
            self.write(blob, low, bytes(high - low))
            blob.note(low, high, written=False)

    def read(self, blob: Blob, offset: int, length: int) -> bytes:
        """Read bytes of a blob."""
        descriptor = os.open(self.contents.path(blob.file), os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def resize(self, blob: Blob, size: int) -> None:
        """Truncate a page blob, or extend it with zeros."""
        os.truncate(self.own_file(blob), size)
        for low, high in blob.written(size, blob.size):
            blob.note(low, high, written=False)
        blob.size = size


def http_date() -> str:
    """The present time in HTTP's format."""
    return datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")


def new_id() -> str:
    """A new id of a lease or a copy."""
    return str(uuid.uuid4())


def _blob(raw: Json) -> Blob:
    lease, pages = raw.pop("lease"), raw.pop("pages", None)
    # The monotonic clock has restarted, so only infinite leases survive.
    endless = Lease(**lease) if lease and lease["until"] is None else None
    known = Pages.from_json(pages) if pages else Pages(0)
    for start, end in raw.pop("ranges", ()):  # as earlier versions saved them
        known.note(start, end, 0)
    return Blob(**raw, lease=endless, pages=known)


def _plain(item: Any) -> Json:
    """What is saved of an account, a container, a blob, or a part of one."""
    return item.to_json() if isinstance(item, Pages) else vars(item)
