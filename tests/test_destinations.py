"""Images and the folder they are in: what they hold, what they say of it, and how they survive."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.errors import DestinationFailed, InvalidInput
from coriolis_azure.events import silent
from coriolis_azure.replica import places, sets
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.manifest import UNKNOWN, ZERO
from harness import image_runs
from harness.dying import dying_child
from harness.image_runs import CHUNK, REGION, SIZE, A, B, Told, dies_after_writing, holds, run
from harness.images import Device, Image

# A child is forked only where no thread of ours runs; a test runner's own threads do not matter to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "os.raw"


def state(path: Path) -> set[str]:
    return {found.name for found in path.parent.iterdir()}


def test_a_new_image_is_known_to_be_zeros_and_takes_no_room(path: Path) -> None:
    with Image(path) as image:
        base = image.known("id", 1 << 40, 4 << 20, full=False)
        assert base.fresh
        assert base.digests == Digests(ZERO * base.count)
        image.commit(replace(base, fresh=False))
    assert path.stat().st_size == 1 << 40
    assert path.stat().st_blocks * 512 < 1 << 20


def test_zeros_stay_holes_and_content_becomes_one(path: Path) -> None:
    run(path, dict.fromkeys(range(20), A))
    assert 20 * CHUNK <= path.stat().st_blocks * 512 < 22 * CHUNK
    run(path, {5: A})
    assert path.stat().st_blocks * 512 < 3 * CHUNK
    assert holds(path, {5: A})


def test_zeros_are_written_where_holes_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without holes: fallocate says EOPNOTSUPP."""

    def refused(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    run(path, dict.fromkeys(range(30), A))
    monkeypatch.setattr("coriolis_azure.replica.space.punch", refused)
    run(path, {0: A})
    assert holds(path, {0: A})


def test_the_second_run_sends_what_changed(path: Path, told: Told) -> None:
    last = SIZE // CHUNK
    assert run(path, {0: A, 1: B, 20: A, last: A}, report=told) == [0, 1, 20, last]
    assert run(path, {0: A, 1: A, last: A}, report=told) == [1, 20]
    assert run(path, {0: A, 1: A, last: A}, report=told) == []
    assert holds(path, {0: A, 1: A, last: A})
    assert told == []
    assert state(path) == {"os.raw", "os.raw.manifest"}


def test_its_files_are_for_their_owner_only(path: Path) -> None:
    run(path, {0: A})
    with Image(path) as image:
        image.known("id", SIZE, CHUNK, full=False)
        image.intend(0, 1)
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
        assert len(state(path)) == 5


def test_full_begins_anew(path: Path) -> None:
    run(path, {0: A, 9: B})
    assert run(path, {0: A}, full=True) == [0]
    assert holds(path, {0: A})


def test_another_disk_of_the_same_name_begins_anew(path: Path, told: Told) -> None:
    run(path, {0: A, 9: B})
    assert run(path, {0: A}, disk="another", report=told) == [0]
    assert "another disk" in told[0]
    assert holds(path, {0: A})


def test_an_unknown_id_is_no_other_disk(path: Path) -> None:
    run(path, {0: A}, disk="")
    assert run(path, {0: A}) == []
    assert run(path, {0: A}, disk="") == []
    assert run(path, {0: A}, disk="another") == [0]


@pytest.mark.parametrize("first", [CHUNK, 5 * CHUNK, 5 * CHUNK + 512, SIZE, REGION])
@pytest.mark.parametrize("then", [CHUNK, 5 * CHUNK, 5 * CHUNK + 512, SIZE, REGION])
def test_a_disk_may_grow_and_shrink(path: Path, first: int, then: int, told: Told) -> None:
    content = {0: A, 4: B, 5: A, REGION // CHUNK: B}
    for size in (first, then, first):
        fits = {index: data for index, data in content.items() if index * CHUNK < size}
        run(path, fits, size=size, report=told)
        assert holds(path, fits, size)
    assert told == []


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "empty", "not json", "no image", "deep", "newer", "foreign"]
)
def test_without_a_usable_manifest_the_image_itself_is_read(path: Path, damage: str, told: Told) -> None:
    run(path, {0: A, 9: B})
    kept = path.with_name("os.raw.manifest")
    text = kept.read_text()
    damaged: dict[str, Callable[[], object]] = {
        "cut": lambda: kept.write_text(text[:-20]),
        "changed": lambda: kept.write_text(text.replace('"disk": "id"', '"disk": "xx"')),
        "empty": lambda: kept.write_text(""),
        "not json": lambda: kept.write_bytes(b"\xff\0"),
        "no image": lambda: kept.write_text(json.dumps({**json.loads(text), "image": []})),
        "deep": lambda: kept.write_text("[" * 100000),
        "newer": lambda: kept.write_text(text.replace('"version": 2', '"version": 3')),
        "foreign": lambda: kept.write_text('{"version": "of something else"}'),
    }
    damaged[damage]()
    assert run(path, {0: A, 9: A}, report=told) == [9]
    assert "read as a whole" in told[-1]
    assert holds(path, {0: A, 9: A})
    assert run(path, {0: A, 9: A}) == []


def test_an_image_that_somebody_changed_is_read(path: Path, told: Told) -> None:
    run(path, {0: A, 9: B})
    with path.open("r+b") as file:
        file.write(B)
    os.utime(path, ns=(0, 0))
    assert run(path, {0: A, 9: B}, report=told) == [0]
    assert "was changed since the last run" in told[0]
    assert holds(path, {0: A, 9: B})


def test_an_image_that_was_copied_or_cut_is_read(path: Path, told: Told) -> None:
    run(path, {0: A, 9: B})
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    assert run(path, {0: A, 9: B}, report=told) == []
    os.truncate(path, 9 * CHUNK)
    assert run(path, {0: A, 9: B}, report=told) == [9]
    assert len(told) == 2
    path.unlink()
    assert run(path, {0: A}) == [0]
    assert holds(path, {0: A})


def test_another_chunk_size_keeps_the_content(path: Path, told: Told) -> None:
    run(path, {0: A, 9: B})
    with Image(path, told) as image:
        base = image.known("id", SIZE, 4 * CHUNK, full=False)
        digest = base.digester()
        assert base.digest(0) == digest(A + bytes(3 * CHUNK))
        assert not base.fresh
    assert "chunk size" in told[0]


def test_a_chunk_that_a_dead_run_changed_is_not_taken_for_its_older_self(path: Path, told: Told) -> None:
    """A to B, death, back to A: the manifest that was kept says A all the time."""
    run(path, {0: A})
    dies_after_writing(path, 0, B)
    assert run(path, {0: A}, report=told) == [0]
    assert "had fetched" in told[0]
    assert holds(path, {0: A})


def test_what_a_dead_run_had_brought_is_not_sent_again(path: Path) -> None:
    run(path, {0: A})
    dies_after_writing(path, 3, B)
    assert run(path, {0: A, 3: B}) == []


@pytest.mark.parametrize("part", ["draft", "index", "redo"])
@pytest.mark.parametrize("damage", ["gone", "empty", "torn", "garbage", "zeros"])
def test_a_damaged_draft_costs_what_it_had_fetched_and_nothing_else(
    path: Path, part: str, damage: str
) -> None:
    run(path, {0: A, 30: A})
    dies_after_writing(path, 0, B)
    dies_after_writing(path, 3, B)
    file = path.with_name(f"os.raw.{part}")
    whole = file.read_bytes()
    damaged = {
        "torn": whole[: len(whole) // 2],
        "garbage": b"garbage" * 9 + whole,
        "zeros": bytes(len(whole)),
    }
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(damaged.get(damage, b""))
    assert holds(path, {0: A, 30: A})
    run(path, {0: B, 3: B, 30: A})
    assert holds(path, {0: B, 3: B, 30: A})
    assert state(path) == {"os.raw", "os.raw.manifest"}


def test_an_image_that_was_replaced_after_a_death_is_read(path: Path, told: Told) -> None:
    run(path, {0: A, 20: A})
    dies_after_writing(path, 0, B)
    other = path.with_name("copy")
    other.write_bytes(bytes(SIZE))
    other.replace(path)
    assert run(path, {0: A, 20: A}, report=told) == [0, 20]
    assert "was changed" in told[0]


def test_two_deaths_in_a_row(path: Path) -> None:
    run(path, {0: A, 20: A})
    dies_after_writing(path, 0, B)
    dies_after_writing(path, 20, B)
    assert run(path, {0: A, 20: A}) == [0, 20]
    assert holds(path, {0: A, 20: A})


# Dying anywhere


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("re-created", {"disk": "another"}),
        ("grown", {"size": SIZE + REGION}),
        ("shrunk", {"size": REGION}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dying_at_any_step_never_makes_a_wrong_image(
    memory: Path, kind: str, options: dict[str, Any], power: bool
) -> None:
    path = memory / "os.raw"
    first = {0: A, 1: B, 20: A, 31: A}
    second = {0: B, 2: A, 20: B, 31: A, 40: B}
    size = options.get("size", SIZE)
    at, died = 0, True
    while died:
        at += 1
        for found in path.parent.iterdir():
            found.unlink()
        run(path, first)
        died = dying_child(lambda: run(path, fitting(second, size), **options), at, True, power)
        # The source has gone back to what it was: what the dead run wrote must not be taken for that.
        again = first if size == SIZE else second
        run(path, fitting(again, SIZE), disk=options.get("disk", "id"))
        assert holds(path, fitting(again, SIZE)), f"{kind}: wrong after dying at step {at}"
        assert state(path) == {"os.raw", "os.raw.manifest"}
    assert at > 10


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
def test_dying_at_any_step_never_makes_a_wrong_device(
    memory: Path, monkeypatch: pytest.MonkeyPatch, power: bool
) -> None:
    """A device has no mtime that would tell of writes."""
    path = memory / "os.raw"
    monkeypatch.setattr(image_runs, "Image", Device)
    first, second = {0: A, 1: B, 20: A, 31: A}, {0: B, 2: A, 20: B, 31: A}
    at, died = 0, True
    while died:
        at += 1
        for found in path.parent.iterdir():
            found.unlink()
        path.write_bytes(used_in_the_middle(SIZE))
        run(path, first)
        died = dying_child(lambda: run(path, second), at, True, power)
        run(path, first)
        assert holds(path, first), f"wrong after dying at step {at}"
    assert at > 10


@pytest.mark.slow
def test_what_a_killed_run_left_in_the_cache_is_not_taken_for_kept(memory: Path) -> None:
    """Killed, then run again, then the power fails: what was read back must have been made durable first."""
    path = memory / "os.raw"
    at, died = 0, True
    while died:
        at += 1
        for found in path.parent.iterdir():
            found.unlink()
        run(path, {0: A, 20: A})

        def work() -> None:
            dies_after_writing(path, 0, B)
            run(path, {0: B, 20: B})

        died = dying_child(work, at, after=True, power=True)
        run(path, {0: B, 20: A})
        assert holds(path, {0: B, 20: A}), f"wrong after dying at step {at}"


def used_in_the_middle(size: int) -> bytes:
    """What a device holds that was used once and whose beginning and end were wiped."""
    return bytes(1 << 20) + b"\xaa" * (size - (2 << 20)) + bytes(1 << 20)


def fitting(content: dict[int, bytes], size: int) -> dict[int, bytes]:
    return {index: data for index, data in content.items() if index * CHUNK < size}


@pytest.mark.slow
def test_dying_again_and_again_never_makes_a_wrong_image(memory: Path) -> None:
    path = memory / "os.raw"
    chance = random.Random(5)
    content: dict[int, bytes] = {}
    size = SIZE
    for _ in range(40):
        content = {chance.randrange(36): chance.choice((A, B)) for _ in range(4)} | {0: chance.choice((A, B))}
        size = chance.choice((SIZE, REGION, SIZE + 512))
        work = partial(run, path, fitting(content, size), size=size)
        dying_child(work, chance.randrange(1, 40), bool(chance.getrandbits(1)), False)
    run(path, fitting(content, size), size=size)
    assert holds(path, fitting(content, size), size)


def test_a_full_destination_says_where_and_what_to_do(path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * CHUNK, 5 * CHUNK))
        with Image(path) as image:
            image.known("id", 5 * CHUNK, CHUNK, full=False)
            image.intend(0, 5 * CHUNK)
            with pytest.raises(DestinationFailed) as failure:
                image.write(5 * CHUNK, A)
        assert failure.value.facts == {"disk": "os", "offset": 5 * CHUNK}
        assert "file size limit" in failure.value.remedy

    assert not dying_child(work, 0, False, False)


def test_reading_past_the_end_is_an_error(path: Path) -> None:
    run(path, {0: A}, size=CHUNK)
    medium = FileMedium(path)
    medium.share()
    image = medium.open("image")
    assert image is not None
    with pytest.raises(DestinationFailed) as failure:
        image.read(0, CHUNK + 1)
    medium.close()
    assert failure.value.facts["offset"] == CHUNK


def test_its_manifest_tells_when_it_was_written(path: Path) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    run(path, {0: A})
    written = json.loads(path.with_name("os.raw.manifest").read_text())["written"]
    assert written.endswith("Z")
    assert before <= datetime.fromisoformat(written.replace("Z", "+00:00")) <= datetime.now(timezone.utc)


def test_stored_changes_nothing(path: Path) -> None:
    with Image(path) as image, pytest.raises(InvalidInput, match="no usable"):
        image.stored()
    assert state(path) == set()
    path.write_bytes(A)
    with Image(path) as image, pytest.raises(InvalidInput, match="no usable"):
        image.stored()
    run(path, {0: A}, adopt=True)
    before = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    with Image(path) as image:
        assert image.stored().digest(0) == image.stored().digester()(A)
    assert before == {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}


# Folders


def test_a_folder_is_made_and_gives_disks(tmp_path: Path) -> None:
    for url in (str(tmp_path / "a/b"), f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/c"):
        with places.open(url, silent) as folder, folder.disk("data-63") as disk:
            disk.commit(disk.known("id", CHUNK, CHUNK, full=False))
            assert folder.names() == []
            folder.publish(sets.Record("vm").text())
            assert folder.names() == ["data-63"]
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700
    assert (tmp_path / "a b/data-63.raw").stat().st_size == CHUNK
    assert (tmp_path / "c/data-63.raw").exists()


@pytest.mark.parametrize(
    "url",
    [
        *("", "s3://bucket/x", "FTP://x", "file://host/x", "file://", "file:///x?y", "file:///x%00"),
        *("blob://[x/y", "https://[::1/x", "file://[::1/x"),
    ],
)
def test_what_is_no_destination_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        places.open(url, silent)
    assert re.match("Give|Write", refused.value.remedy)


def test_a_url_names_a_folder_in_any_encoding(tmp_path: Path) -> None:
    with places.open(f"file://{tmp_path}/%ff%5Bx", silent):
        assert [path.name for path in tmp_path.iterdir()] == [os.fsdecode(b"\xff[x")]


def test_an_image_is_no_replica_but_its_folder_is(tmp_path: Path) -> None:
    with ImageFolder(tmp_path / "web"):
        (tmp_path / "web/os.raw").touch()
    with pytest.raises(InvalidInput, match="it is not a folder") as refused:
        places.open(str(tmp_path / "web/os.raw"), silent, existing=True)
    assert "Give the folder that the images are in" in refused.value.remedy
    places.open(str(tmp_path / "web"), silent, existing=True).close()


def test_an_unknown_scheme_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as refused:
        places.open("s3://bucket", silent)
    assert "file://" in refused.value.remedy


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing")):
        with pytest.raises(InvalidInput, match="cannot be used"):
            ImageFolder(path)


def test_two_runs_cannot_use_one_folder(tmp_path: Path) -> None:
    with ImageFolder(tmp_path), pytest.raises(InvalidInput, match="another run is using"):
        ImageFolder(tmp_path)
    with ImageFolder(tmp_path) as folder:
        folder.close()
        folder.close()


@pytest.mark.parametrize("name", ["", "os.raw", "../os", "data-", "data-1/..", "data-x", "OS"])
def test_names_that_are_no_disks_are_refused(tmp_path: Path, name: str) -> None:
    with ImageFolder(tmp_path) as folder, pytest.raises(InvalidInput, match="not the name of a disk"):
        folder.disk(name)


def test_the_image_of_a_removed_disk_is_kept_and_told_of(tmp_path: Path, told: Told) -> None:
    with ImageFolder(tmp_path, told) as folder:
        for name in ("os", "data-3"):
            folder.disk(name).commit(folder.disk(name).known("id", CHUNK, CHUNK, full=False))
        folder.publish(sets.Record("vm").text())
        folder.tell_removed(["os", "data-0"])
    assert len(told) == 1
    assert "data-3.raw is kept" in told[0]
    assert (tmp_path / "data-3.raw").exists()


# Block devices


def test_nothing_is_known_of_a_new_device_and_it_keeps_its_size(path: Path) -> None:
    path.write_bytes(used_in_the_middle(SIZE))
    with Device(path) as device:
        base = device.known("id", 3 * CHUNK, CHUNK, full=False)
        assert base.fresh
        assert base.digests == Digests(UNKNOWN * 3)
        device.intend(0, CHUNK)
        device.write(0, A)
        device.commit(replace(base, digests=Digests(base.digester()(A) + ZERO * 2), fresh=False))
    with Device(path) as device:
        known = device.known("id", 4 * CHUNK, CHUNK, full=False)
        assert known.digests == Digests(known.digester()(A) + ZERO * 2 + UNKNOWN)
        image_runs.put(device, known, 0, B)
    assert path.read_bytes()[:CHUNK] == A
    with Device(path) as device:
        known = device.known("id", 4 * CHUNK, CHUNK, full=False)
        assert known.digest(0) == known.digester()(B)
        assert device.known("id", 4 * CHUNK, CHUNK, full=True).digests == Digests(UNKNOWN * 4)
    assert path.stat().st_size == SIZE


def test_a_device_that_is_too_small_is_refused(path: Path) -> None:
    path.write_bytes(bytes(CHUNK))
    with Device(path) as device, pytest.raises(InvalidInput, match="has 65536 bytes"):
        device.known("id", 2 * CHUNK, CHUNK, full=False)


def test_what_is_no_file_is_refused() -> None:
    with Image(Path("/dev/null")) as image, pytest.raises(InvalidInput, match="neither"):
        image.known("id", CHUNK, CHUNK, full=False)


def test_whose_images_they_are_is_written_once_and_whole(tmp_path: Path) -> None:
    """Also where a run dies over it: the next VM must not take the folder for nobody's."""
    at, died = 0, True
    with ImageFolder(tmp_path / "images") as folder:
        folder.claim("/subscriptions/s/vm-1")

        def again() -> None:
            folder.claim("/SUBSCRIPTIONS/s/vm-1")

        while died:
            at += 1
            died = dying_child(again, at, True, True)
            with pytest.raises(InvalidInput, match="the replica of another VM: /subscriptions/s/vm-1"):
                folder.claim("/subscriptions/s/vm-2")


@pytest.mark.parametrize("damage", [b"/subscr", b"\xff\xfe\0", b"\x1b[31m"])
def test_a_damaged_name_of_the_owner_is_shown_and_nothing_is_overwritten(
    tmp_path: Path, damage: bytes
) -> None:
    with ImageFolder(tmp_path / "images") as folder:
        (folder.path / ".vm").write_bytes(damage)
        with pytest.raises(InvalidInput, match="another VM") as caught:
            folder.claim("/subscriptions/s/vm-1")
    assert ".vm" in caught.value.remedy
    assert caught.value.message.isprintable()
    assert (folder.path / ".vm").read_bytes() == damage


@pytest.mark.parametrize(
    "url", ["host:/x", "me@host:/x", "C:/replicas", "s3:bucket", "blob:account/c/web", "file:/x"]
)
def test_a_place_on_another_host_is_refused_and_no_folder_of_that_name_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="is not a folder of this host") as refusal:
        places.open(url, silent)
    assert list(tmp_path.iterdir()) == []
    remedied = refusal.value.remedy.rpartition(" ")[2]
    with places.open(remedied, silent):
        assert (tmp_path / url).is_dir()
