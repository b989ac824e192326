"""One disk in Azure and its snapshots, in memory: what `mechanisms.snapshots` needs of Azure, without requests.

It can die at a call, and forget a snapshot. Pages have 512 bytes; what was written or cleared is known page by page.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from coriolis_azure.azure.pages import PAGE, Pages
from coriolis_azure.clock import Clock
from coriolis_azure.errors import NotFound
from coriolis_azure.events import Event
from harness.deaths import Died


@dataclass
class Taken:
    """A snapshot."""

    document: dict[str, Any]
    content: bytes
    allocated: set[int]
    number: int


@dataclass
class Family:
    """A disk that a VM writes to, and Azure's snapshots of it."""

    size: int
    unique_id: str = "disk-1"
    content: bytearray = field(init=False)
    allocated: set[int] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)
    snapshots: dict[str, Taken] = field(default_factory=dict)
    calls_left: int = -1  # the process dies at the call after so many; -1: never
    forgotten: set[int] = field(default_factory=set)  # pages that lists of changes leave out
    _number: int = 0
    _history: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = bytearray(self.size)

    # What the VM and its owner do

    def write(self, offset: int, data: bytes) -> None:
        """Write pages, perhaps with the bytes that they have."""
        self.content[offset : offset + len(data)] = data
        pages = set(range(offset // PAGE, (offset + len(data)) // PAGE))
        self.allocated |= pages
        self.touched |= pages

    def clear(self, offset: int, length: int) -> None:
        """Clear pages."""
        self.content[offset : offset + length] = bytes(length)
        pages = set(range(offset // PAGE, (offset + length) // PAGE))
        self.touched |= pages & self.allocated
        self.allocated -= pages

    def grow(self, size: int) -> None:
        """Grow the disk."""
        self.content += bytes(size - self.size)
        self.size = size

    def swap(self, randomness: random.Random) -> None:
        """Another disk takes its place."""
        self.unique_id = f"disk-{randomness.getrandbits(40):x}"
        self.allocated, self.touched = set(), set()
        self.content = bytearray(self.size)

    def shot(self) -> str:
        """Take a snapshot; its id."""
        self._number += 1
        id = f"/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/snapshots/s{self._number}"
        properties = {
            "incremental": True,
            "uniqueId": f"unique-{self._number}",
            "timeCreated": f"2026-01-01T{self._number // 3600:02}:{self._number // 60 % 60:02}:{self._number % 60:02}Z",
            "incrementalSnapshotFamilyId": f"family of {self.unique_id}",
            "creationData": {"sourceUniqueId": self.unique_id},
            "diskSizeBytes": self.size,
        }
        document = {"id": id, "tags": {}, "properties": properties}
        self.snapshots[id.lower()] = Taken(document, bytes(self.content), set(self.allocated), self._number)
        self._history[self._number] = self.touched
        self.touched = set()
        return id

    def changed_between(self, first: int, last: int) -> set[int]:
        """The pages that were touched after one snapshot and before another, by their numbers."""
        parts = (pages for number, pages in self._history.items() if first < number <= last)
        return set().union(*parts) - self.forgotten

    # What the product asks of Azure

    def report(self, event: Event) -> None:
        """See Azure."""

    def call(self) -> None:
        """One more request."""
        if self.calls_left == 0:
            raise Died
        self.calls_left -= 1

    def now(self, clock: Clock) -> datetime:
        """See Azure."""
        return clock.now()

    def find(self, id: str) -> dict[str, Any] | None:
        """See Azure."""
        self.call()
        taken = self.snapshots.get(id.lower())
        return taken.document if taken is not None else None

    def get(self, id: str) -> dict[str, Any]:
        """See Azure."""
        document = self.find(id)
        if document is None:
            raise NotFound(f"{id} was not found")
        return document

    def patch_snapshot(self, id: str, body: dict[str, Any]) -> dict[str, Any]:
        """See Azure."""
        document = self.get(id)
        document["tags"] = body.get("tags", document["tags"])
        document["properties"] |= body.get("properties", {})
        return document

    def revoke_access(self, id: str) -> None:
        """See Azure."""
        self.call()
        del id

    def resources(self, kind: str, group: str) -> list[dict[str, Any]]:
        """See Azure."""
        self.call()
        del kind, group
        return [taken.document for taken in self.snapshots.values()]

    def delete(self, ids: list[str]) -> list[str]:
        """See Resources."""
        for id in ids:
            self.call()
            self.snapshots.pop(id.lower(), None)
        return []

    def exported(self, context: object, document: dict[str, Any], size: int) -> Export:
        """See mechanisms.snapshots."""
        del context
        self.call()
        id = document["id"]
        taken = self.snapshots.get(id.lower())
        if taken is None:
            raise NotFound(f"{id} was not found")
        assert len(taken.content) == size
        return Export(self, taken, id)


class Export:
    """A snapshot that is read. See azure.exports.Export."""

    def __init__(self, family: Family, taken: Taken, id: str) -> None:
        self._family, self._taken, self.snapshot, self.size = family, taken, id, len(taken.content)

    def fill(self, offset: int, data: memoryview) -> None:
        """See Export."""
        self._family.call()
        data[:] = self._taken.content[offset : offset + len(data)]

    def document(self) -> dict[str, Any]:
        """See Export."""
        return self._family.get(self.snapshot)

    def pages(self) -> Pages:
        """See Export."""
        self._family.call()
        return ranges({*self._taken.allocated, self.size // PAGE})

    def windows(self) -> Iterator[tuple[int, int, Pages]]:
        """See Export."""
        yield 0, self.size + PAGE, self.pages()

    def changes(self, older: Export) -> tuple[Pages, Pages]:
        """See Export. All that was touched in between, also what is as before."""
        self._family.call()
        first, last = older._taken.number, self._taken.number
        touched = self._family.changed_between(first, last)
        if older.size != self.size:
            touched |= {self.size // PAGE}
            gone = {older.size // PAGE} - self._taken.allocated
            touched |= gone
        allocated = {*self._taken.allocated, self.size // PAGE}
        return ranges(touched & allocated), ranges(touched - allocated)


def ranges(pages: set[int]) -> Pages:
    """Pages as ranges of bytes."""
    return Pages((page * PAGE, page * PAGE + PAGE) for page in sorted(pages))
