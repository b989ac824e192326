"""Which state of a volume is believed and who may write to it: claims on the records that outlive every task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.azure import names
from coriolis_azure.clock import Clock
from coriolis_azure.errors import DestinationFailed, VolumeTaken
from coriolis_azure.events import Report, silent
from coriolis_azure.model import Record, Run
from coriolis_azure.plugin import claims, writer
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.manifest import DIGEST, UNKNOWN, ZERO, Manifest
from coriolis_azure.replica.medium import Content
from coriolis_azure.run.records import Records
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.image_runs import Told
from harness.record_files import RecordFiles
from harness.waiting import together

CHUNK = 65536
Json = dict[str, Any]
ID = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/disks/os"


# The state, and whether it is believed


class Memory:
    """A writer.Device in memory."""

    checkable = False

    def __init__(self, size: int = 8 * CHUNK) -> None:
        self.content = bytearray(b"\xee" * size)
        self.opened = 0

    def open(self) -> None:
        self.opened += 1

    def write(self, offset: int, data: Content) -> None:
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def flush(self) -> None:
        pass

    def check(self) -> None:
        return None

    def quiet(self) -> bool:
        return True

    def close(self) -> None:
        pass


@pytest.fixture
def records(tmp_path: Path) -> RecordFiles:
    return RecordFiles(tmp_path / "records")


def volume(entry: Json, records: RecordFiles, told: Report = silent) -> writer.Volume:
    return Alone(entry, "os", Memory(), claimed(entry, records), told)


class Alone(writer.Volume):
    """A volume whose claim ends with it, as all of a run do in Volumes."""

    def close(self) -> None:
        super().close()
        self._claim.release()


def claimed(
    entry: Json, records: claims.Records, run: str = "run", clock: Clock | None = None
) -> claims.Claim:
    """A claim as Volumes makes it; time passes where somebody sleeps."""
    given = claims.Entry(ID, "os", entry.get("replica_state"))
    claim = claims.Claim(records, run, given, silent, clock or Held())
    claim.acquire()
    return claim


def kept_in(records: claims.Records, manifest: Manifest) -> Json:
    """A state as a run has returned it that ended well."""
    state = {**manifest.to_json(), "record": "0123456789abcdef"}
    record = Record(state["record"], claims.digest(ID.lower()), claims.state_name(state))
    records.update(record.id, lambda _: record)
    return state


def state(size: int = 4 * CHUNK, chunk: int = CHUNK, disk: str = "unique") -> Manifest:
    return replace(
        Manifest.new(size, chunk, disk, ZERO), digests=Digests(b"d" * DIGEST * (size // chunk)), fresh=False
    )


def test_a_good_state_is_believed_and_resized(records: RecordFiles) -> None:
    kept = state()
    entry = {"disk_id": ID, "replica_state": kept_in(records, kept), "zeroed": True}
    with volume(entry, records) as one:
        assert one.known("unique", 4 * CHUNK, CHUNK, full=False) == kept
    with volume(entry, records) as one:
        grown = one.known("unique", 6 * CHUNK, CHUNK, full=False)
    assert grown.digests == Digests(kept.digests.span(0, kept.count) + UNKNOWN * 2)
    assert not grown.fresh


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (None, "it is not a manifest"),
        ({}, "it is not a manifest"),
        ("text", "it is not a manifest"),
        ({**state().to_json(), "chunks": "AAAA"}, "its check value does not match"),
        ({**state().to_json(), "version": 3}, "version 3"),
        (state(), "the last run failed"),
        (state(disk="another"), "another disk"),
        (state(chunk=2 * CHUNK), "chunk size"),
    ],
)
def test_a_state_that_cannot_be_used_means_a_full_run_with_a_notice(
    records: RecordFiles, kept: Any, why: str
) -> None:
    told = Told()
    if isinstance(kept, Manifest):
        kept = kept.to_json() if "run failed" in why else kept_in(records, kept)
    entry = {"disk_id": ID, "replica_state": kept, "zeroed": True}
    base = volume(entry, records, told).known("unique", 4 * CHUNK, CHUNK, full=False)
    assert base.fresh
    assert base.digests == Digests(UNKNOWN * 4)
    assert len(told) == 1
    assert why in told[0]


@pytest.mark.parametrize("record", ["gone", "of another state", "of none", "malformed"])
def test_a_state_that_its_record_does_not_name_is_not_believed(records: RecordFiles, record: str) -> None:
    told = Told()
    entry: Json = {"disk_id": ID, "replica_state": kept_in(records, state()), "zeroed": True}
    (found,) = records.all()
    if record == "gone":
        records.delete(found.id)
    elif record == "malformed":
        entry["replica_state"]["record"] = "../" + found.id
    else:
        other = replace(found, holds="" if record == "of none" else "f" * 16)
        records.update(found.id, lambda _: other)
    base = volume(entry, records, told).known("unique", 4 * CHUNK, CHUNK, full=False)
    assert base.digests == Digests(UNKNOWN * 4)
    assert "the last run failed" in told[0]


@pytest.mark.parametrize(
    ("entry", "fill"),
    [
        ({"zeroed": True}, ZERO),
        ({"zeroed": False}, UNKNOWN),
        ({"zeroed": 1}, UNKNOWN),
        ({"zeroed": "true"}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_only_a_volume_that_is_said_to_be_blank_counts_as_zeros(
    records: RecordFiles, entry: Json, fill: bytes
) -> None:
    entry = {"disk_id": ID, **entry}
    with volume(entry, records) as one:
        base = one.known("unique", 4 * CHUNK, CHUNK, full=False)
        assert base.digests == Digests(fill * 4)
        assert base.fresh
    assert records.all() == [], "nothing was written, so nothing needs to be remembered"
    with volume(entry, records) as one:
        assert one.known("unique", 4 * CHUNK, CHUNK, full=True).digests == Digests(UNKNOWN * 4)


@pytest.mark.parametrize("ended", ["well", "badly", "after it was forgotten"])
def test_a_volume_is_not_blank_once_a_run_had_to_do_with_its_disk(records: RecordFiles, ended: str) -> None:
    """Whatever the destination goes on saying; it may hand over a new entry for the old volume, too."""
    entry = {"disk_id": ID, "zeroed": True}
    with volume(entry, records) as one:
        one.known("unique", 4 * CHUNK, CHUNK, full=False)
        one.intend(0, CHUNK)
        if ended != "badly":
            one.commit(state())
    if ended == "after it was forgotten":
        (record,) = records.all()
        assert writer.record_ids([entry]) == [record.id]
        records.delete(record.id)
        assert writer.forgotten(entry) == {"disk_id": ID, "zeroed": False}
        entry = writer.forgotten(entry)
    else:
        entry = {"disk_id": ID, "zeroed": True, "volume_id": "attached anew"}
    with volume(entry, records) as again:
        assert again.known("unique", 4 * CHUNK, CHUNK, full=False).digests == Digests(UNKNOWN * 4)


def test_the_record_names_no_state_from_before_the_first_write_until_the_commit(records: RecordFiles) -> None:
    entry = {"disk_id": ID, "replica_state": kept_in(records, state())}
    before = claims.state_name(entry["replica_state"])
    one = volume(entry, records)
    one.known("unique", 4 * CHUNK, CHUNK, full=False)
    assert [record.holds for record in records.all()] == [before]
    updates = records.updates
    together([lambda: one.intend(0, CHUNK)] * 8)
    assert records.updates == updates + 1
    assert [(record.holds, record.writer) for record in records.all()] == [("", "run")]
    one.commit(replace(state(), digests=Digests(b"e" * (4 * DIGEST))))
    after = claims.state_name(entry["replica_state"])
    assert [(record.holds, record.writer) for record in records.all()] == [(after, "run")]
    assert after != before
    one.close()
    assert [(record.holds, record.writer) for record in records.all()] == [(after, "")]


def test_destinations_that_hand_volumes_over_anew_leave_a_few_records_only(records: RecordFiles) -> None:
    for _ in range(9):
        entry = {"disk_id": ID, "zeroed": True}
        with volume(entry, records) as one:
            one.known("unique", 4 * CHUNK, CHUNK, full=False)
            one.intend(0, CHUNK)
            one.commit(state())
    assert len(records.all()) == 4


# Who may write


def test_a_run_that_takes_a_volume_over_waits_until_the_other_has_stopped(records: RecordFiles) -> None:
    """The other finds out when it next confirms its claim, and has not written unconfirmed for as long as the wait."""
    clock = Held()
    entry = {"disk_id": ID, "replica_state": kept_in(records, state())}
    first = claimed(entry, records, "first", clock)
    first.activate()
    first.invalidate()
    second = claimed(entry, records, "second", clock)
    assert (second.current, second.fenced) == (False, ["first"])
    taken = clock.moment
    assert first.renew() is False
    for act in (first.wait_for_lease, first.invalidate, lambda: first.commit("s")):
        with pytest.raises(VolumeTaken, match="taken over its volume"):
            act()
    first.release()
    second.activate()
    assert clock.moment >= taken + claims.FENCE_SECONDS
    second.commit("f" * 16)
    second.release()
    assert [(record.holds, record.writer) for record in records.all()] == [("f" * 16, "")]


def test_a_run_that_said_its_end_is_not_waited_for(records: RecordFiles) -> None:
    clock = Held()
    entry = {"disk_id": ID, "replica_state": kept_in(records, state())}
    claimed(entry, records, "first", clock).release()
    second = claimed(entry, records, "second", clock)
    second.activate()
    assert (clock.moment, second.current, second.fenced) == (0.0, True, [])


def test_a_claim_that_cannot_be_confirmed_is_not_written_under(records: RecordFiles) -> None:
    """Azure is away for longer than a lease: the run pauses, goes on when Azure is back, and fails in the end."""
    clock = Held()
    entry = {"disk_id": ID}
    claim = claimed(entry, records, "run", clock)
    claim.activate()
    claim.invalidate()
    clock.sleep(claims.LEASE_SECONDS + 1)
    back = clock.moment + 60
    slept = clock.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if clock.moment >= back:
            assert claim.renew()

    clock.sleep = sleep  # type: ignore[method-assign]
    claim.wait_for_lease()
    assert back <= clock.moment < back + 1
    clock.sleep = slept  # type: ignore[method-assign]
    clock.sleep(claims.LEASE_SECONDS + 1)
    with pytest.raises(DestinationFailed, match="could not be reached"):
        claim.wait_for_lease()
    records.delete(claim.id)
    assert claim.renew() is False
    with pytest.raises(VolumeTaken, match="record was deleted"):
        claim.wait_for_lease()


def test_a_run_that_was_held_up_and_wrote_too_late_has_the_volume_sent_anew(records: RecordFiles) -> None:
    """Its host slept in the middle of a write; what it wrote then may lie in what its successor has written."""
    clock = Held()
    entry = {"disk_id": ID, "replica_state": kept_in(records, state())}
    first = claimed(entry, records, "first", clock)
    first.activate()
    first.invalidate()
    clock.sleep(claims.FENCE_SECONDS + 1)
    second = claimed(entry, records, "second", clock)
    second.activate()
    second.commit("f" * 16)
    first.write_ended()
    assert first.renew() is False
    assert [(record.holds, record.writer) for record in records.all()] == [("", "")]


def test_without_a_state_a_living_run_of_the_disk_is_refused_and_a_dead_one_outlasted(
    records: RecordFiles,
) -> None:
    """Nothing tells whether it writes to the same volume."""
    clock = Held()
    first = claimed({"disk_id": ID}, records, "first", clock)
    first.activate()
    first.invalidate()
    slept = clock.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        assert first.renew()

    clock.sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(VolumeTaken, match="first is writing"):
        claimed({"disk_id": ID}, records, "second", clock)
    assert [record.writer for record in records.all()] == ["first"]
    clock.sleep = slept  # type: ignore[method-assign]
    began = clock.moment
    third = claimed({"disk_id": ID}, records, "third", clock)
    assert clock.moment >= began + claims.FENCE_SECONDS
    assert (third.fenced, third.first_use) == (["first"], False)
    assert first.renew() is False, "it finds out, should it still live"


def test_a_state_committed_at_the_moment_its_writer_is_removed_is_kept(
    azure: Sandbox, source: Source
) -> None:
    """The writer was held up for longer than others wait, and ends between the last look at it and its removal."""
    run = Run("r", source.azure.subscription, "sandbox", "westeurope", "", "web")
    records = Records(source.azure, run, {}, Held())
    entry = {"disk_id": ID, "replica_state": kept_in(records, state())}
    first = claimed(entry, records, "first")
    steps: list[str] = []

    def first_ends(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and names.resource(first.id, "volume") in request.path and not steps:
            steps.append("the writer is about to be removed")
            first.invalidate()
            first.commit("f" * 16)
            first.release()
        return answer(request)

    clock = Held()
    azure.intercept = first_ends
    second = claimed({"disk_id": ID}, records, "second", clock)
    assert steps
    assert clock.moment >= claims.FENCE_SECONDS
    assert second.first_use is False
    kept = records.find(first.id)
    assert kept is not None
    assert (kept.holds, kept.writer) == ("f" * 16, "")
    assert claimed(entry, records, "third").current is False, "the state of before is no longer in the volume"


def test_bytes_beyond_the_disk_are_never_written(records: RecordFiles) -> None:
    one = volume({"disk_id": ID}, records)
    one.known("unique", 4 * CHUNK, CHUNK, full=False)
    one.write(3 * CHUNK, b"x" * CHUNK)
    acts: list[Callable[[], None]] = [
        lambda: one.write(4 * CHUNK - 1, b"xx"),
        lambda: one.zero(3 * CHUNK, CHUNK + 1),
    ]
    for refused in acts:
        with pytest.raises(DestinationFailed, match="beyond") as failure:
            refused()
        assert failure.value.facts["disk"] == "os"
    with pytest.raises(DestinationFailed, match="read back"):
        one.read(0, 1)
