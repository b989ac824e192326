"""When Azure's list of the changes between two snapshots can be believed, and what it says of a disk."""

from __future__ import annotations

from itertools import chain

from ..azure.page_lists import SnapshotBlob
from ..azure.pages import PAGE, Pages, uncovered
from ..errors import AzureError, Unreadable
from ..model import Disk, Json
from ..readers.hint import Hint
from ..run.baselines import Baseline

_SPLIT = 4 << 40  # Azure has no differences between snapshots on both sides of this size


def obstacle(baseline: Baseline, older: Json | None, newer: Json, disk: Disk) -> str:
    """Why the list of changes from a baseline to a newer snapshot of a disk must not be asked for; "" if it may be.

    `older` is Azure's present document of the baseline, None if it is gone. For none of these cases does Azure's
    documentation say whether an error or a wrong list comes.
    """
    if older is None:
        return "the baseline was deleted"
    if (
        older["properties"].get("incremental") is not True
        or newer["properties"].get("incremental") is not True
    ):
        return "one of the snapshots is not incremental"
    now, then = (Baseline.of(each, baseline.stream) for each in (older, newer))
    if not now.is_of(baseline):
        return "the baseline is not the snapshot that the replica was made from"
    if not baseline.family or then.family != baseline.family:
        return "the snapshots belong to different families"
    if not disk.unique_id or {baseline.disk, then.disk} != {disk.unique_id}:
        return "the snapshots are of different disks"
    if not baseline.made or baseline.made >= then.made:
        return "the baseline is not older than the snapshot"
    if then.size < baseline.size or (baseline.size <= _SPLIT < then.size):
        return "the disk has got a size that lists of changes do not reach across"
    if any((each["properties"].get("completionPercent") or 100) < 100 for each in (older, newer)):
        return "Azure has not completed one of the snapshots"
    return ""


def fetch(older: SnapshotBlob, newer: SnapshotBlob, allocated: Pages) -> tuple[Hint, int]:
    """What has changed on a disk from one snapshot to a newer one, whose `allocated` pages are given, and how much.

    Raises Unreadable for a list that contradicts itself or the lists of allocated pages, AzureError if Azure gives
    none.
    """
    if _changed_by_itself(newer):
        raise Unreadable("Azure lists changes from a snapshot to itself")
    written, cleared = newer.changes(older)
    _agree("a page was written that is not allocated", uncovered(written, allocated))
    _agree("a page was cleared that is allocated", cleared.meets(allocated))
    end = 0
    for offset, length, before in older.windows():
        now, then, gone = (pages.within(offset, length) for pages in (allocated, written, cleared))
        _agree("a page is allocated that was neither allocated nor written", uncovered(now, before, then))
        still = allocated.within(offset, length)
        _agree("a page is no longer allocated that was not cleared", uncovered(before, still, gone))
        end = offset + length
    new, then = (pages.within(end, max(0, newer.size + PAGE - end)) for pages in (allocated, written))
    _agree("a page is allocated that was neither allocated nor written", uncovered(new, then))
    tail = [(older.size, newer.size - older.size)] if newer.size > older.size else []
    # What is behind the disk is the footer of the blob.
    hint = Hint(newer.size, chain(written.within(0, newer.size), tail), cleared.within(0, newer.size))
    return hint, written.total + cleared.total


def _changed_by_itself(snapshot: SnapshotBlob) -> bool:
    """Whether Azure lists changes from a snapshot to itself: whoever does ignores what it is to be compared with.

    Storage accounts may refuse to compare a snapshot with one that is no older, and then have understood the question.
    """
    try:
        return any(snapshot.changes(snapshot))
    except AzureError as error:
        if error.code != "PreviousSnapshotCannotBeNewer":
            raise
        return False


def _agree(fault: str, offset: int | None) -> None:
    if offset is not None:
        raise Unreadable(f"the lists of pages contradict each other at offset {offset}: {fault}")
