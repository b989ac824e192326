"""The results of a replication, as callers get them and as the history of a replica keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from .mechanisms.target import Read
from .model import Disk, Json
from .transfer import Outcome


@dataclass(frozen=True)
class DiskReport:
    """The result of one disk.

    All sizes are bytes of the disk: each byte was sent, found to be zero, or skipped because it had not changed.
    `read_bytes`: those that had to be read to know this. `full`: whether nothing was known of the destination's
    content. `verified`: whether the destination was read back; None if it cannot be. `root`: the digest over all
    digests, which `replica.json` records; it proves nothing of bytes that were relied on. `mechanism` and what follows:
    see `mechanisms.target.Read`.
    """

    name: str
    id: str
    size_bytes: int
    read_bytes: int
    sent_bytes: int
    zero_bytes: int
    skipped_bytes: int
    full: bool
    verified: bool | None
    root: str
    mechanism: str
    tier: str
    reason: str
    listed_bytes: int
    relied_bytes: int
    checked_bytes: int


@dataclass(frozen=True)
class Replicated:
    """The result of a replication.

    `started` and `point` are times in UTC, in the format of RFC 3339. The replica contains everything that the VM had
    written before `point`: the snapshots were taken right after it. `seconds` is the duration of the run,
    `copy_seconds` that from `point` until the replica was complete, less the wait for a worker that was still booting,
    `outage_seconds` that from the shutdown of the VM until then; None if the run did not shut it down. `left_behind`
    are the ids of temporary resources that could not be deleted.
    """

    vm: str
    mechanism: str
    disks: tuple[DiskReport, ...]
    started: str
    point: str
    seconds: float
    copy_seconds: float
    outage_seconds: float | None
    left_behind: tuple[str, ...]

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def of_disks(
    disks: Sequence[Disk], outcomes: Sequence[Outcome], read: Mapping[str, Read]
) -> tuple[DiskReport, ...]:
    """The reports of these disks; `read` tells by their names how they were read."""
    pairs = zip(disks, outcomes, strict=True)
    return tuple(_of_disk(disk, outcome, read.get(disk.name, Read())) for disk, outcome in pairs)


def _of_disk(disk: Disk, outcome: Outcome, read: Read) -> DiskReport:
    return DiskReport(
        name=disk.name,
        id=disk.id,
        size_bytes=disk.size_bytes,
        read_bytes=outcome.read_bytes,
        sent_bytes=outcome.sent_bytes,
        zero_bytes=outcome.zero_bytes,
        skipped_bytes=outcome.skipped_bytes,
        full=outcome.full,
        verified=outcome.verified,
        root=outcome.manifest.root(),
        mechanism=read.mechanism,
        tier=read.tier,
        reason=read.reason,
        listed_bytes=read.listed_bytes,
        relied_bytes=read.relied_bytes,
        checked_bytes=read.checked_bytes,
    )
