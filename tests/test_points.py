"""Earlier points in time: what `--keep` keeps can be given back, byte for byte, whatever became of the runs between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.clock import Clock
from coriolis_azure.errors import CorruptChunk, DestinationFailed, IncompleteReplica, InvalidInput
from coriolis_azure.events import Report, silent
from coriolis_azure.replica import places, points, sets
from coriolis_azure.replica.destinations import Place
from coriolis_azure.replica.files import POINTS
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.manifest import DIGEST
from coriolis_azure.replica.replica import Replica as OneDisk
from coriolis_azure.replica.status import status
from coriolis_azure.restoring import restore
from coriolis_azure.sandbox import Sandbox
from harness.block_devices import command, loop, mounted
from harness.dying import FOR_GOOD, dying_child
from harness.image_runs import Told, bring
from harness.replicas import AzuriteOnly, BlobPlace, SandboxPlace
from harness.spoiling import LOSSES, lose

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # Azurite ends with a connection open
]

CHUNK = 8192
SIZE = 9 * CHUNK + 512
GROWN = SIZE + 3 * CHUNK
A, B, C, D = (letter * CHUNK for letter in (b"A", b"B", b"C", b"D"))
HALF = b"A" * 4096 + b"H" * 4096
Content = dict[str, dict[int, bytes]]
RUNS: list[Content] = [
    {"os": {0: A, 1: A, 5: A, 9: A}, "data-0": {2: A, 7: A}},
    {"os": {0: B, 2: B, 5: HALF, 9: B}, "data-0": {2: A, 7: A}},
    {"os": {0: A, 3: C, 5: HALF}, "data-0": {0: C, 7: C}},
    {"os": {0: D, 1: D, 3: C, 9: D}, "data-0": {}},
]


class Here:
    """A replica in a folder of this host."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, report: Report = silent, *, existing: bool = False) -> Place:
        return ImageFolder(self.path, report, existing=existing)

    def holds(self, content: Content, size: int = SIZE) -> bool:
        return all(
            (self.path / f"{name}.raw").read_bytes() == bytes_of(chunks, size)
            for name, chunks in content.items()
        )


class InStorage:
    """A replica in Blob storage."""

    def __init__(self, blobs: BlobPlace) -> None:
        self.blobs = blobs

    def open(self, report: Report = silent, *, existing: bool = False) -> Place:
        return places.open(self.blobs.url, report, self.blobs.storage, existing=existing)

    def holds(self, content: Content, size: int = SIZE) -> bool:
        return all(
            self.blobs.blob(f"{name}.vhd").read(0, size + -size % 512)[:size] == bytes_of(chunks, size)
            for name, chunks in content.items()
        )


Replica = Here | InStorage


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("btrfs", "xfs", "blob", "azurite")]


@pytest.fixture(params=["undo", *_SLOW])
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Replica]:
    """One in each kind of place: file systems without clones and with them, and Blob storage."""
    if request.param == "undo":
        yield Here(tmp_path / "replica")
    elif request.param == "blob":
        with Sandbox(tmp_path / "azure") as sandbox:
            yield InStorage(SandboxPlace(sandbox))
    elif request.param == "azurite":
        azurite: AzuriteOnly = request.getfixturevalue("azurite")
        yield InStorage(azurite.place(f"points/{request.node.name}"))
    else:
        medium = tmp_path / "medium"
        with medium.open("wb") as file:
            file.truncate(320 << 20)
        with loop(medium) as device:
            command(f"mkfs.{request.param}", "-q", device)
            with mounted(device, tmp_path / "mounted") as folder:
                yield Here(folder / "replica")


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path / "replica")


@pytest.fixture
def told() -> Told:
    return Told()


def run(
    replica: Replica,
    number: int,
    content: Content,
    *,
    keep: int | None = 9,
    size: int = SIZE,
    report: Report = silent,
    **options: Any,
) -> None:
    """Run `number`, which is the one of its minute, brings all disks and publishes them."""
    with replica.open(report) as place:
        place.claim("vm")
        place.reserve(list(content))
        begun = sets.Begun(f"run-{number}", time_of(number), tuple(content))
        record, roots = sets.begin(place, "vm", begun, keep), {}
        for name, chunks in content.items():
            with place.disk(name) as image:
                _, manifest = bring(image, chunks, size=size, chunk=CHUNK, **options)
            roots[name] = manifest.root()
        sets.complete(place, record, roots)


def time_of(number: int) -> str:
    return f"2026-01-01T00:{number:02}:00Z"


def restored(replica: Replica, time: str, to: Path) -> Here:
    with replica.open(existing=True) as place:
        restore(place, time, lambda: ImageFolder(to), silent, Clock())
    return Here(to)


def bytes_of(chunks: dict[int, bytes], size: int) -> bytes:
    return b"".join(chunks.get(index, bytes(CHUNK)) for index in range(-(-size // CHUNK)))[:size]


def points_of(replica: Replica) -> tuple[str, ...]:
    with replica.open(existing=True) as place:
        return status(place).points


def test_each_point_that_was_kept_can_be_given_back(replica: Replica, tmp_path: Path) -> None:
    for number, content in enumerate(RUNS):
        run(replica, number, content)
    assert points_of(replica) == tuple(map(time_of, range(3)))
    for number, content in enumerate(RUNS):
        assert restored(replica, time_of(number), tmp_path / str(number)).holds(content)
    assert replica.holds(RUNS[-1])
    assert restored(replica, "latest", tmp_path / "latest").holds(RUNS[-1])


def test_disks_that_grow_come_or_go_are_as_they_were(replica: Replica, tmp_path: Path) -> None:
    more: Content = RUNS[1] | {"data-1": {4: C}}
    run(replica, 0, RUNS[0])
    run(replica, 1, more, size=GROWN)
    run(replica, 2, {"os": RUNS[2]["os"]}, size=GROWN)
    run(replica, 3, RUNS[3], size=GROWN)
    first = restored(replica, time_of(0), tmp_path / "0")
    assert first.holds(RUNS[0])
    assert not (first.path / "data-1.raw").exists()
    assert restored(replica, time_of(1), tmp_path / "1").holds(more, GROWN)
    third = restored(replica, time_of(2), tmp_path / "2")
    assert third.holds({"os": RUNS[2]["os"]}, GROWN)
    assert not (third.path / "data-0.raw").exists()


def test_what_is_sent_anew_as_a_whole_keeps_the_points(replica: Replica, tmp_path: Path) -> None:
    run(replica, 0, RUNS[0])
    run(replica, 1, RUNS[1])
    run(replica, 2, RUNS[2], full=True)
    run(replica, 3, RUNS[3], disk="another disk of that name")
    for number in range(3):
        assert restored(replica, time_of(number), tmp_path / str(number)).holds(RUNS[number])


def test_as_many_are_kept_as_was_last_asked_for(replica: Replica) -> None:
    run(replica, 0, RUNS[0], keep=None)
    run(replica, 1, RUNS[1], keep=None)
    assert points_of(replica) == ()
    run(replica, 2, RUNS[2], keep=2)
    run(replica, 3, RUNS[3], keep=None)
    assert points_of(replica) == (time_of(1), time_of(2))
    run(replica, 4, RUNS[0], keep=None)
    assert points_of(replica) == (time_of(2), time_of(3))
    run(replica, 5, RUNS[1], keep=1)
    assert points_of(replica) == (time_of(4),)
    run(replica, 6, RUNS[2], keep=0)
    assert points_of(replica) == ()
    if isinstance(replica, Here):
        assert not (replica.path / POINTS).exists()


@pytest.mark.parametrize("moment", ["before publish", "after publish", "before prune"])
def test_points_that_a_dead_run_was_to_keep_no_longer_do_not_count(
    here: Here, tmp_path: Path, moment: str
) -> None:
    """What the last switch changed was not kept, so they can no longer be given back."""
    for number in range(2):
        run(here, number, RUNS[number])

    def work() -> None:
        real = OneDisk.publish

        def publish(disk: OneDisk) -> None:
            if moment != "before publish":
                real(disk)
            os._exit(9)

        if moment == "before prune":
            FOR_GOOD.setattr(points, "prune", lambda *_: os._exit(9))
        else:
            FOR_GOOD.setattr(OneDisk, "publish", publish)
        run(here, 2, RUNS[2], keep=0)

    assert dying_child(work, 0, False, False)
    assert points_of(here) == ()
    with pytest.raises(InvalidInput, match="there is no point in time"):
        restored(here, time_of(0), tmp_path / "to")
    run(here, 3, RUNS[3], keep=5)
    assert points_of(here) == (time_of(2),)
    assert restored(here, time_of(2), tmp_path / "to").holds(RUNS[2])
    assert len(list((here.path / POINTS).iterdir())) == 1


def test_points_that_a_run_was_to_keep_no_longer_count_until_its_switch(here: Here, tmp_path: Path) -> None:
    for number in range(2):
        run(here, number, RUNS[number])
    with here.open() as place:
        sets.begin(place, "vm", sets.Begun("run-2", time_of(2), ("os",)), 0)
    with here.open():
        pass
    assert points_of(here) == (time_of(0),)
    assert restored(here, time_of(0), tmp_path / "to").holds(RUNS[0])


def test_a_lost_record_takes_no_point_along(here: Here, tmp_path: Path) -> None:
    for number in range(3):
        run(here, number, RUNS[number], keep=2)
    (here.path / sets.NAME).write_bytes(b"{")
    run(here, 3, RUNS[3], keep=None)
    for number in range(2):
        assert restored(here, time_of(number), tmp_path / str(number)).holds(RUNS[number])
    run(here, 4, RUNS[0], keep=None)
    run(here, 5, RUNS[1], keep=None)
    assert points_of(here) == (time_of(3), time_of(4))
    assert len(list((here.path / POINTS).iterdir())) == 2


def test_an_undo_log_has_only_what_changed(here: Here) -> None:
    run(here, 0, {"os": dict.fromkeys(range(9), A)})
    run(here, 1, {"os": dict.fromkeys(range(8), A) | {8: HALF}})
    (undo,) = here.path.glob(f"{POINTS}/*/os.raw.undo")
    assert undo.stat().st_size == SIZE
    assert undo.stat().st_blocks * 512 == CHUNK


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize("full", [False, True], ids=["changes", "full"])
def test_dying_at_any_step_loses_no_point(memory: Path, full: bool, power: bool) -> None:
    here, at, died, switched = Here(memory / "replica"), 0, True, 0
    while died:
        at += 1
        shutil.rmtree(here.path, ignore_errors=True)
        for number in range(2):
            run(here, number, RUNS[number], keep=2)
        died = dying_child(lambda: run(here, 2, RUNS[2], keep=2, full=full), at, True, power)
        last = int(json.loads((here.path / sets.NAME).read_text())["point"]["time"][14:16])
        assert points_of(here) == tuple(map(time_of, range(last))), at
        with here.open():  # ends what the dead run has begun
            pass
        assert points_of(here) == tuple(map(time_of, range(last))), at
        switched += last == 2
        for number in range(last + 1):
            to = memory / f"{number} at {at}"
            assert restored(here, time_of(number), to).holds(RUNS[number]), at
            shutil.rmtree(to)
        run(here, 3, RUNS[3], keep=2)
        assert points_of(here) == tuple(map(time_of, (last - 1, last))), at
        for number in (last - 1, last):
            to = memory / f"{number} later than {at}"
            assert restored(here, time_of(number), to).holds(RUNS[number]), at
            shutil.rmtree(to)
    assert switched > 3


def test_no_room_for_what_is_kept_ends_the_run_before_anything_changes(tmp_path: Path) -> None:
    old: Content = {"os": dict.fromkeys(range(9), A)}
    new: Content = {"os": dict.fromkeys(range(9), B)}
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=224k") as small:
        here = Here(small / "replica")
        run(here, 0, old)
        with pytest.raises(DestinationFailed, match="No space left") as raised:
            run(here, 1, new)
        assert "Free space" in raised.value.remedy
        assert here.holds(old)
        assert points_of(here) == ()
        assert not list(here.path.glob(f"{POINTS}/*"))
        run(here, 1, new, keep=0)  # there is room for the one log
        assert here.holds(new)


@pytest.mark.parametrize("part", ["undo", "index", "manifest"])
def test_damage_of_what_was_kept_is_found_and_nothing_made_of_it(
    here: Here, tmp_path: Path, part: str
) -> None:
    for number in range(2):
        run(here, number, RUNS[number])
    (kept,) = here.path.glob(f"{POINTS}/*/os.raw.{part}")
    content = bytearray(kept.read_bytes())
    blocks = 5 * (DIGEST + 1) + DIGEST  # in the index, which has one byte of them after each digest
    content[{"undo": 5 * CHUNK + 5000, "index": blocks, "manifest": len(content) // 2}[part]] ^= 2
    kept.write_bytes(content)
    with pytest.raises((CorruptChunk, IncompleteReplica, InvalidInput)) as raised:
        restored(here, time_of(0), tmp_path / "to")
    assert raised.value.remedy
    assert not list((tmp_path / "to").glob("*.raw"))
    assert here.holds(RUNS[1])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1', b"changed"])
def test_a_point_whose_manifest_was_cut_off_is_refused(here: Here, tmp_path: Path, content: bytes) -> None:
    for number in range(2):
        run(here, number, RUNS[number])
    (kept,) = here.path.glob(f"{POINTS}/*/os.raw.manifest")
    kept.write_bytes(
        kept.read_bytes().replace(b'"size": ', b'"size": 1') if content == b"changed" else content
    )
    with pytest.raises(InvalidInput, match="kept at the point") as raised:
        restored(here, time_of(0), tmp_path / "to")
    assert "Choose another point" in raised.value.remedy


def test_a_point_whose_image_a_stranger_changed_is_told_and_not_kept(
    here: Here, tmp_path: Path, told: Told
) -> None:
    run(here, 0, RUNS[0])
    with (here.path / "os.raw").open("r+b") as file:
        file.write(b"stranger")
    run(here, 1, RUNS[1], report=told)
    assert any("no longer what the last run had left" in text for text in told)
    assert points_of(here) == ()
    with pytest.raises(InvalidInput, match="there is no point in time"):
        restored(here, time_of(0), tmp_path / "to")


def test_a_point_that_is_not_there_is_named_with_those_that_are(here: Here, tmp_path: Path) -> None:
    for number in range(2):
        run(here, number, RUNS[number])
    with pytest.raises(InvalidInput, match="no point in time 'yesterday'") as raised:
        restored(here, "yesterday", tmp_path / "to")
    assert f"{time_of(0)}, {time_of(1)}" in raised.value.remedy
    assert not (tmp_path / "to").exists()


def test_a_replica_is_not_restored_over(here: Here, tmp_path: Path) -> None:
    other = Here(tmp_path / "other")
    for number in range(2):
        run(here, number, RUNS[number])
        run(other, number, RUNS[number])
    for to in (here, other):
        with pytest.raises(InvalidInput) as raised:
            restored(here, time_of(0), to.path)
        assert raised.value.remedy
        assert to.holds(RUNS[1])


@pytest.mark.parametrize("below", [POINTS, f"{POINTS}/{{}}", f"{POINTS}/{{}}/os"])
def test_a_point_is_no_place_for_a_replica(replica: Replica, below: str) -> None:
    """It would be replaced, or deleted with the point."""
    for number in range(3):
        run(replica, number, RUNS[number])
    with replica.open(existing=True) as place:
        below = below.format(next(iter(place.points.records())))
    within: Replica
    if isinstance(replica, Here):
        within = Here(replica.path / below)
    else:
        within = InStorage(BlobPlace(replica.blobs.storage, replica.blobs.account, ""))
        within.blobs.prefix = f"{replica.blobs.prefix}/{below}"
    with pytest.raises(InvalidInput, match="keeps its earlier points in time") as raised:
        within.open()
    assert raised.value.remedy
    assert points_of(replica) == tuple(map(time_of, range(2)))


def test_a_restored_point_is_a_replica_to_go_on_with(here: Here, tmp_path: Path) -> None:
    for number in range(2):
        run(here, number, RUNS[number])
    to = restored(here, time_of(0), tmp_path / "to")
    with to.open() as place, place.disk("os") as image:
        sent, _ = bring(image, RUNS[0]["os"], size=SIZE, chunk=CHUNK)
    assert sent == []


@pytest.mark.slow
def test_points_of_a_place_below_are_not_touched(tmp_path: Path) -> None:
    """In Blob storage one prefix may lie below another; the snapshots there carry labels like those here."""
    with Sandbox(tmp_path / "azure") as sandbox:
        above, below = SandboxPlace(sandbox), SandboxPlace(sandbox)
        above.prefix, below.prefix = "replicas", "replicas/web-1"
        for place in (InStorage(above), InStorage(below)):
            for number in range(2):
                run(place, number, RUNS[number])
        run(InStorage(above), 2, RUNS[2], keep=0)
        assert points_of(InStorage(above)) == ()
        assert restored(InStorage(below), time_of(0), tmp_path / "0").holds(RUNS[0])


@pytest.mark.slow
def test_the_draft_of_a_disk_that_leaves_storage_is_deleted(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as sandbox:
        place, told = InStorage(SandboxPlace(sandbox)), Told()
        run(place, 0, RUNS[0])
        with place.open() as folder, folder.disk("data-0") as image:
            bring(image, RUNS[2]["data-0"], size=SIZE, chunk=CHUNK)
        run(place, 1, {"os": RUNS[1]["os"]}, report=told)
        assert any("data-0.vhd and not published is deleted" in text for text in told)
        container = sandbox.storage.account("sandboxstorage").containers["images"]
        assert not [name for name in container.blobs if name.endswith((".draft", ".redo", ".index"))]


@pytest.mark.slow
def test_removing_a_replica_in_storage_removes_its_points(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as sandbox:
        place = SandboxPlace(sandbox)
        for number in range(3):
            run(InStorage(place), number, RUNS[number])
        with place.folder() as folder:
            folder.remove(["os", "data-0"])
        container = sandbox.storage.account("sandboxstorage").containers["images"]
        assert not container.blobs
        assert not container.snapshots


def test_many_snapshots_of_one_blob_have_names_of_their_own(tmp_path: Path) -> None:
    """Azure names them by moments of 100 ns."""
    with Sandbox(tmp_path / "azure") as sandbox:
        place = SandboxPlace(sandbox)
        with place.folder():
            blob = place.blob(".vm")
            assert len({blob.take_snapshot({}).snapshot for _ in range(40)}) == 40


def test_what_lies_among_the_points_and_is_none_is_left_alone(here: Here, tmp_path: Path) -> None:
    """A link, a file called like a point, a folder within one."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "document").write_text("mine")
    (precious / sets.NAME).write_text("mine")
    for number in range(2):
        run(here, number, RUNS[number], keep=1)
    points = here.path / POINTS
    (points / "000009-link").symlink_to(precious)
    (points / "000008-file").write_text("mine")
    (next(points.glob("*/os.raw.manifest")).parent / "found").mkdir()
    run(here, 2, RUNS[2], keep=1)
    run(here, 3, RUNS[3], keep=0)
    assert points_of(here) == ()
    assert {path.name for path in precious.iterdir()} == {"document", sets.NAME}
    assert (points / "000008-file").read_text() == "mine"
    assert here.holds(RUNS[3])


@pytest.mark.parametrize("lost", ["os.raw", "os.raw.manifest", "replica.json"])
@pytest.mark.parametrize("how", LOSSES)
def test_a_point_is_given_back_without_what_the_replica_is_now(
    here: Here, tmp_path: Path, lost: str, how: str
) -> None:
    """Where what it was is in its undo log as a whole."""
    run(here, 0, {"os": dict.fromkeys(range(10), A)})
    run(here, 1, {"os": dict.fromkeys(range(10), B)})
    lose(here.path / lost, how)
    assert restored(here, time_of(0), tmp_path / "to").holds({"os": dict.fromkeys(range(10), A)})
