"""What is not proved is read: strangers who write, flushes that fail, devices that are others than they were."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import clock
from coriolis_azure.errors import DestinationFailed, InvalidInput
from coriolis_azure.events import Event, Step
from coriolis_azure.plugin.writer import FileVolume
from coriolis_azure.replica import devices as lasting
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.manifest import ZERO, Manifest
from coriolis_azure.replica.medium import Content, Stamp
from coriolis_azure.replica.replica import Replica
from harness.block_devices import command, fresh, loop, mounted
from harness.image_runs import CHUNK, REGION, SIZE, A, B, Told, dies_after_writing, holds, put, run
from harness.images import Image

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "os.raw"


FAR = 2 * REGION // CHUNK  # a chunk in another region than chunk 0


# Strangers


def killed_after_writing(path: Path, index: int, data: bytes) -> None:
    """A run that dies at once: nothing is noted at its end."""
    child = os.fork()
    if not child:
        image = Image(path)
        put(image, image.known("id", SIZE, CHUNK, full=False), index, data)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(FAR * CHUNK)
        file.write(B)


def edit_and_put_the_time_back(path: Path) -> None:
    before = path.stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def restore_over_it(path: Path) -> None:
    """cp --preserve of an older backup: the file stays the same, and gets the backup's time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(A + bytes(SIZE - CHUNK))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut_and_grow(path: Path) -> None:
    before = path.stat()
    os.truncate(path, FAR * CHUNK)
    os.truncate(path, SIZE)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def clone_over_it(path: Path) -> None:
    """cp --reflink=auto into the file that is there."""
    other = path.with_name("other")
    other.write_bytes(A + bytes(SIZE - CHUNK))
    command("cp", "--reflink=auto", "--no-preserve=all", other, path)
    other.unlink()


@pytest.mark.parametrize(
    "stranger", [edit, edit_and_put_the_time_back, restore_over_it, cut_and_grow, clone_over_it]
)
@pytest.mark.parametrize("last", ["ended well", "failed", "was killed"])
def test_what_a_stranger_writes_after_a_run_is_seen(
    path: Path, last: str, stranger: Callable[[Path], None]
) -> None:
    content = {0: A, FAR: A}
    run(path, content)
    if last == "failed":
        dies_after_writing(path, 0, B)
    elif last == "was killed":
        killed_after_writing(path, 0, B)
    stranger(path)
    run(path, content)
    assert holds(path, content)


def test_a_change_that_a_file_system_lets_hide_is_found_by_reading(tmp_path: Path, told: Told) -> None:
    """exFAT keeps no ctime: its driver shows the mtime in its place, so putting that back puts back both."""
    medium = tmp_path / "medium"
    with medium.open("wb") as file:
        file.truncate(32 << 20)
    content = {0: A, FAR: A}
    with loop(medium) as device:
        command("mkfs.exfat", device)
        (tmp_path / "exfat").mkdir()
        command("mount.exfat-fuse", device, tmp_path / "exfat")
        try:
            path = tmp_path / "exfat" / "os.raw"
            run(path, content)
            before = path.stat()
            edit_and_put_the_time_back(path)
            assert path.stat().st_ctime_ns == before.st_ctime_ns
            run(path, content, report=told)
            assert holds(path, content)
            assert "does not reveal every change of a file" in told[0]
        finally:
            command("umount", tmp_path / "exfat")


def test_what_is_stored_through_a_mapping_from_before_the_end_of_a_run_is_seen(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store into a page that is dirty already changes no time of the file: in tmpfs, not one after the first."""
    content = {0: A, FAR: A}
    mapped: list[mmap.mmap] = []
    real = FileMedium.seal

    def mapping(medium: FileMedium, seen: Stamp) -> Stamp:
        """Somebody maps the image, and stores into it, as the run takes its last look."""
        if not mapped:
            with medium.path.open("r+b") as file:
                mapped.append(mmap.mmap(file.fileno(), 0))
            mapped[0][FAR * CHUNK] = A[0]
        return real(medium, seen)

    with mounted("tmpfs", tmp_path / "tmpfs", "-t", "tmpfs") as folder:
        path = folder / "os.raw"
        run(path, {0: B, FAR: A})
        monkeypatch.setattr(FileMedium, "seal", mapping)
        run(path, content)
        before = path.stat()
        mapped[0][FAR * CHUNK] = A[0] ^ 1
        mapped[0].close()
        assert path.stat().st_ctime_ns == before.st_ctime_ns
        run(path, content, report=told)
        assert holds(path, content)


@pytest.mark.parametrize("dies", [dies_after_writing, killed_after_writing], ids=["fails", "is killed"])
def test_of_a_run_that_was_not_published_only_what_it_had_fetched_is_read(
    path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, dies: Callable[[Path, int, bytes], None]
) -> None:
    run(path, {0: A, 1: A, FAR: A})
    dies(path, 1, B)
    read: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        read.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    with Image(path, told) as image:
        base = image.known("id", SIZE, CHUNK, full=False)
        assert base.digest(1) == base.digester()(B)
    assert sorted(set(read)) == [CHUNK]
    assert "had fetched" in told[0]


def test_a_clean_image_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, {0: A, FAR: A})

    def refused(*arguments: object) -> bytes:
        raise AssertionError("nothing had to be read")

    monkeypatch.setattr(os, "preadv", refused)
    monkeypatch.setattr(os, "pread", refused)
    with Image(path) as image:
        image.known("id", SIZE, CHUNK, full=False)


def written(path: Path) -> None:
    """In a chunk that the run does not change."""
    with path.open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"stranger")


def renamed_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.rename(path)


ACTS = {"written": written, "removed": Path.unlink, "replaced": renamed_over}


def finish(image: Image, base: Manifest, then: Callable[[], object]) -> None:
    """The rest of a run, with something in the middle of it."""
    put(image, base, FAR, B)
    then()
    digests = base.digests.copy()
    digests.put(FAR, base.digester()(B))
    image.commit(replace(base, digests=digests))


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("moment", ["before the first write", "after the first write"])
def test_who_changes_the_image_while_a_run_is_at_work_ends_it(
    path: Path, act: Callable[[Path], None], moment: str
) -> None:
    run(path, {0: A, 1: A})
    with Image(path) as image:
        base = image.known("id", SIZE, CHUNK, full=False)
        first = moment == "before the first write"
        if first:
            act(path)
        with pytest.raises(DestinationFailed, match="another program"):
            finish(image, base, lambda: None if first else act(path))
    run(path, {0: A, 1: A, FAR: B})
    assert holds(path, {0: A, 1: A, FAR: B})


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_who_changes_the_image_while_it_is_read_as_a_whole_ends_the_run(
    path: Path, act: Callable[[Path], None]
) -> None:
    run(path, {0: A, 1: A})
    path.with_name("os.raw.manifest").write_text("{}")

    def report(event: Event) -> None:
        if event == Step("read back", "os"):
            act(path)

    with pytest.raises(DestinationFailed, match="another program"):
        run(path, {0: A, 1: B}, report=report)
    run(path, {0: A, 1: B})
    assert holds(path, {0: A, 1: B})


def test_who_opens_the_image_while_it_is_published_ends_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept waiting, and what it does then is seen by the next run."""
    run(path, {0: A})
    with Image(path) as image:
        base = image.known("id", SIZE, CHUNK, full=False)
        store = image.medium.open("image")
        assert store is not None
        write = store.write

        def disturbed(offset: int, data: Content) -> None:
            with pytest.raises(BlockingIOError):
                os.open(path, os.O_RDWR | os.O_NONBLOCK)
            write(offset, data)

        monkeypatch.setattr(store, "write", disturbed)
        with pytest.raises(DestinationFailed, match="another program opened"):
            finish(image, base, lambda: None)
    told = Told()
    run(path, {0: A, FAR: B}, report=told)
    assert "read as a whole" in told[0]
    assert holds(path, {0: A, FAR: B})


def test_after_a_start_of_the_host_the_image_is_read_once(
    path: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash loses the times of a file that was edited and not flushed, but not always its content."""
    run(path, {0: A, 1: A})
    before = path.stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest = path.with_name("os.raw.manifest")
    text = manifest.read_text()
    manifest.write_text(  # ctime cannot be set
        text.replace(f'"ctime_ns": {before.st_ctime_ns}', f'"ctime_ns": {path.stat().st_ctime_ns}')
    )
    other = tmp_path / "boot_id"
    other.write_text("another")
    monkeypatch.setattr(clock, "_BOOT_ID", other)
    assert run(path, {0: A, 1: A}, report=told) == [FAR]
    assert told[0] == f"the host was booted since the last run; {path} is read as a whole"
    assert run(path, {0: A, 1: A}, report=told) == []
    assert len(told) == 1
    assert holds(path, {0: A, 1: A})


def test_a_manifest_of_an_earlier_build_is_read_and_the_image_as_a_whole(path: Path, told: Told) -> None:
    """It has no ctime, so it does not prove that nobody has written since."""
    run(path, {0: A, FAR: A})
    manifest = path.with_name("os.raw.manifest")
    text = manifest.read_text()
    at = text.index(', "ctime_ns"')
    manifest.write_text(text[:at] + text[text.index(",", at + 2) :])
    assert run(path, {0: A, FAR: A}, report=told) == []
    assert "read as a whole" in told[0]


# Flushes


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A loop device of 48 MiB over a file system that has room for 4, and that file system."""
    with mounted("none", tmp_path / "small", "-t", "tmpfs", "-o", "size=4m") as small:
        backing = small / "backing"
        backing.touch()
        os.truncate(backing, 48 << 20)
        with loop(backing) as device:
            yield device, small


BIG = 12 << 20


def big(letter: bytes) -> dict[int, bytes]:
    return dict.fromkeys(range(BIG // CHUNK), letter * CHUNK)


@pytest.mark.parametrize("held", [False, True], ids=["alone", "held open by somebody"])
def test_what_a_failed_flush_has_lost_is_sent_again(
    tmp_path: Path, thin: tuple[Path, Path], held: bool
) -> None:
    """The pages whose writing failed look clean, and say what is on no medium."""
    device, small = thin
    image = tmp_path / "os.raw"
    image.symlink_to(device)
    somebody = os.open(device, os.O_RDONLY) if held else -1
    run(image, {0: A}, size=BIG)
    with pytest.raises(DestinationFailed, match="cannot be flushed") as failure:
        run(image, big(b"B"), size=BIG)
    assert failure.value.remedy
    command("mount", "-o", "remount,size=64m", small)
    run(image, big(b"B"), size=BIG)
    if held:
        os.close(somebody)
    assert fresh(device)[:BIG] == b"B" * BIG


def test_what_a_failed_flush_of_an_image_has_lost_is_sent_again(
    tmp_path: Path, thin: tuple[Path, Path]
) -> None:
    device, small = thin
    command("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", device)
    with mounted(device, tmp_path / "fs") as place:
        image = place / "os.raw"
        run(image, {0: A}, size=BIG)
        with pytest.raises(DestinationFailed):
            run(image, big(b"B"), size=BIG)
        command("mount", "-o", "remount,size=64m", small)
        run(image, big(b"B"), size=BIG)
        assert fresh(image) == b"B" * BIG


def test_what_another_program_could_not_flush_is_not_taken_for_held(
    tmp_path: Path, thin: tuple[Path, Path]
) -> None:
    """The cache says that the device holds the disk's content already; the medium holds other bytes."""
    device, small = thin
    image = tmp_path / "os.raw"
    image.symlink_to(device)
    run(image, {0: A}, size=BIG)
    with device.open("r+b", buffering=0) as somebody:
        somebody.write(b"B" * BIG)
        with pytest.raises(OSError, match="error"):
            os.fsync(somebody.fileno())
        command("mount", "-o", "remount,size=64m", small)
        run(image, big(b"B"), size=BIG)
    assert fresh(device)[:BIG] == b"B" * BIG


# Block devices


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Path]]:
    """Two empty devices."""
    backing = [tmp_path / "first", tmp_path / "second"]
    for file in backing:
        file.touch()
        os.truncate(file, SIZE + REGION)
    with loop(backing[0]) as first, loop(backing[1]) as second:
        yield [first, second]


def volume_run(entry: dict[str, Any], content: dict[int, bytes], device: Path) -> None:
    """What a run does to a volume of the file writer."""
    volume = FileVolume({**entry, "volume_dev": str(device)})
    with volume:
        base = volume.known("id", SIZE, CHUNK, full=False)
        digest = base.digester()
        digests = b""
        for index in range(base.count):
            offset, length = base.span(index)
            new = digest(content[index][:length]) if index in content else ZERO
            digests += new
            if new == base.digest(index):
                continue
            volume.intend(offset, length)
            if new == ZERO:
                volume.zero(offset, length)
            else:
                volume.write(offset, content[index][:length])
        volume.flush()
        volume.commit(replace(base, digests=Digests(digests), fresh=False))
        entry["replica_state"] = volume._entry["replica_state"]


def disk_of(content: dict[int, bytes]) -> bytes:
    return b"".join(content.get(index, b"").ljust(CHUNK, b"\0") for index in range(-(-SIZE // CHUNK)))[:SIZE]


@pytest.mark.parametrize("order", [(0, 1, 0), (0, 0, 0), (0, 1, 1)])
def test_a_volume_gets_another_device_in_each_run(devices: list[Path], order: tuple[int, ...]) -> None:
    """A, B, A: what stands beside a name, or in the entry, says nothing of the device that has the name now."""
    entry: dict[str, Any] = {"disk_id": "id"}
    before = set(Path("/dev").iterdir())
    for number, content in zip(order, ({0: A, FAR: A}, {0: B}, {0: A, FAR: A}), strict=True):
        volume_run(entry, content, devices[number])
        assert fresh(devices[number])[:SIZE] == disk_of(content)
    assert not any("loop" in path.name for path in set(Path("/dev").iterdir()) - before)


def test_two_volumes_get_one_device_name_in_turn(devices: list[Path]) -> None:
    one: dict[str, Any] = {"disk_id": "one"}
    other: dict[str, Any] = {"disk_id": "other"}
    volume_run(one, {0: A}, devices[0])
    volume_run(other, {0: B}, devices[0])
    volume_run(one, {0: A}, devices[0])
    assert fresh(devices[0])[:SIZE] == disk_of({0: A})


def test_a_device_that_was_written_between_two_good_runs_is_put_right(
    tmp_path: Path, devices: list[Path]
) -> None:
    told = Told()
    image = tmp_path / "os.raw"
    image.symlink_to(devices[0])
    run(image, {0: A, FAR: A})
    with devices[0].open("r+b") as file:
        file.seek(FAR * CHUNK)
        file.write(B)
    assert run(image, {0: A, FAR: A}, report=told) == [FAR]
    assert "was changed since the last run" in told[0]
    assert fresh(devices[0])[:SIZE] == disk_of({0: A, FAR: A})


def test_a_device_that_was_swapped_is_refused_unless_it_is_empty(tmp_path: Path, devices: list[Path]) -> None:
    image = tmp_path / "os.raw"
    image.symlink_to(devices[0])
    run(image, {0: A})
    image.unlink()
    image.symlink_to(devices[1])
    run(image, {0: A})
    assert fresh(devices[1])[:SIZE] == disk_of({0: A})
    image.unlink()
    image.symlink_to(devices[0])
    with pytest.raises(InvalidInput, match="another device than in the last run"):
        run(image, {0: B})
    assert fresh(devices[0])[:SIZE] == disk_of({0: A})
    assert run(image, {0: A, 1: B}, adopt=True) == [1]


def test_without_a_usable_manifest_no_device_is_taken_for_that_of_the_last_run(
    tmp_path: Path, devices: list[Path]
) -> None:
    image = tmp_path / "os.raw"
    image.symlink_to(devices[0])
    run(image, {0: A})
    (tmp_path / "os.raw.manifest").write_text("cut off")
    with pytest.raises(InvalidInput, match="may be another device than in the last run"):
        run(image, {0: B})
    assert fresh(devices[0])[:SIZE] == disk_of({0: A})
    assert run(image, {0: A, 1: B}, adopt=True) == [1]
    assert run(image, {0: A, 1: B}) == []


@pytest.mark.parametrize(
    ("where", "text", "known"),
    [
        ("device/wwid", "naa.60022480c9e8", "device naa.60022480c9e8"),
        ("wwid", "eui.0025385b71b0", "disk eui.0025385b71b0"),
        ("serial", "volume-7", "disk volume-7"),
        ("device/serial", "S5GX", "device S5GX"),
        ("dm/uuid", "LVM-qF3v", "dm LVM-qF3v"),
        ("md/uuid", "8e0e6b1c", "md 8e0e6b1c"),
        ("queue/rotational", "1", ""),
    ],
)
@pytest.mark.parametrize("partition", [False, True])
def test_a_device_is_known_by_what_the_kernel_says_of_it_and_not_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, text: str, known: str, partition: bool
) -> None:
    """As the kernel shows it in /sys/dev/block, under the number of the device."""
    disk = tmp_path / "devices/sda"
    (disk / where).parent.mkdir(parents=True, exist_ok=True)
    (disk / where).write_text(f"{text}\n")
    (disk / "sda2").mkdir(parents=True)
    (disk / "sda2/partition").write_text("2\n")
    (disk / "sda2/start").write_text("206848\n")
    (tmp_path / "8:2").symlink_to(disk / "sda2" if partition else disk)
    monkeypatch.setattr(lasting, "_NUMBERS", tmp_path)
    suffix = ", partition at 206848" if partition and known else ""
    assert lasting.identity(os.makedev(8, 2)) == known + suffix


def test_a_device_that_is_not_there_is_waited_for_by_nobody_and_its_link_stays(
    tmp_path: Path, devices: list[Path]
) -> None:
    """An LV that is inactive: without its link, the next run would create a file in its place."""
    image = tmp_path / "os.raw"
    image.symlink_to("/dev/no-group/volume")
    with pytest.raises(InvalidInput, match="leads to /dev/no-group/volume, which does not exist") as refused:
        run(image, {0: A})
    assert "Attach or activate" in refused.value.remedy
    image.unlink()
    image.symlink_to(devices[0])
    run(image, {0: A})


def test_a_state_that_is_not_the_one_in_the_entry_is_not_believed(tmp_path: Path) -> None:
    """The answer of the second run was lost: the caller hands over the state of the first."""
    volume = tmp_path / "volume"
    volume.touch()
    entry: dict[str, Any] = {"disk_id": "id"}
    volume_run(entry, {0: A}, volume)
    first = dict(entry)
    volume_run(entry, {0: B}, volume)
    volume_run(first, {0: A}, volume)
    assert holds(volume, {0: A})


# Who else uses it


def test_a_mounted_device_is_refused_and_its_file_system_stays(tmp_path: Path, devices: list[Path]) -> None:
    command("mkfs.ext4", "-q", devices[0])
    image = tmp_path / "os.raw"
    image.symlink_to(devices[0])
    with mounted(devices[0], tmp_path / "fs") as place:
        (place / "file").write_text("precious")
        for adopt, full in ((False, False), (True, False), (False, True)):
            with pytest.raises(InvalidInput, match="in use") as refused:
                run(image, {0: A}, adopt=adopt, full=full)
        assert "lsblk" in refused.value.remedy
        with pytest.raises(InvalidInput, match="in use"):
            volume_run({"disk_id": "id"}, {0: A}, devices[0])
    with mounted(devices[0], tmp_path / "fs") as place:
        assert (place / "file").read_text() == "precious"


def test_an_image_that_is_mounted_through_a_loop_device_is_refused(path: Path) -> None:
    run(path, {0: A})
    with loop(path), pytest.raises(InvalidInput, match="in use") as refused:
        run(path, {0: B})
    assert refused.value.remedy
    assert holds(path, {0: A})
    read_only = command("losetup", "--read-only", "--find", "--show", path)
    try:
        with pytest.raises(InvalidInput, match=f"{read_only} uses it") as refused:
            run(path, {0: B})
    finally:
        command("losetup", "--detach", read_only)
    assert f"losetup -d {read_only}" in refused.value.remedy
    run(path, {0: B})


def test_a_device_below_a_loop_device_is_refused(devices: list[Path], tmp_path: Path) -> None:
    image = tmp_path / "os.raw"
    image.symlink_to(devices[0])
    run(image, {0: A})
    with loop(devices[0]) as above:
        command("mkfs.ext4", "-q", "-F", above)
        with mounted(above, tmp_path / "fs") as place:
            (place / "file").write_text("precious")
            with pytest.raises(InvalidInput, match="in use") as refused:
                run(image, {0: B}, adopt=True)
        assert f"losetup -d {above}" in refused.value.remedy
        with mounted(above, tmp_path / "fs") as place:
            assert (place / "file").read_text() == "precious"
    run(image, {0: B})


def test_a_device_that_is_read_only_is_refused_before_anything_is_read_for_it(
    devices: list[Path], tmp_path: Path
) -> None:
    image = tmp_path / "os.raw"
    image.symlink_to(devices[0])
    run(image, {0: A})
    command("blockdev", "--setro", devices[0])
    remedy = f"blockdev --setrw {devices[0]}"
    try:
        with (
            Replica(FileMedium(image)) as replica,
            pytest.raises(InvalidInput, match="is read-only") as refused,
        ):
            replica.take()
    finally:
        command(*remedy.split())  # the next device of this name would be read-only, too
    assert f"`{remedy}`" in refused.value.remedy
    run(image, {0: B})


@pytest.mark.parametrize("by", ["QEMU", "loop"])
def test_a_device_over_a_file_that_is_used_in_another_way_is_refused(
    devices: list[Path], tmp_path: Path, by: str
) -> None:
    """The loop device, or a mapping over it, is free; the file below it is not."""
    image, number = tmp_path / "os.raw", devices[0].name
    backing = Path(Path(f"/sys/block/{number}/loop/backing_file").read_text().rstrip())
    image.symlink_to(devices[0])
    run(image, {0: A})
    with (
        opened_by_qemu(backing) if by == "QEMU" else loop(backing),
        pytest.raises(InvalidInput, match="in use") as refused,
    ):
        run(image, {0: B}, adopt=True)
    assert str(backing) in refused.value.message
    run(image, {0: B})


@pytest.mark.parametrize("whole", [False, True], ids=["its partition", "its disk"])
@pytest.mark.parametrize("by", ["QEMU", "loop"])
def test_a_device_that_shares_bytes_with_one_in_use_is_refused(
    devices: list[Path], tmp_path: Path, whole: bool, by: str
) -> None:
    disk = devices[0]
    command("addpart", disk, "1", "2048", str(SIZE // 512))
    partition = Path(f"{disk}p1")
    target, used = (partition, disk) if whole else (disk, partition)
    image = tmp_path / "os.raw"
    image.symlink_to(target)
    try:
        run(image, {0: A})
        with (
            opened_by_qemu(used) if by == "QEMU" else loop(used),
            pytest.raises(InvalidInput, match="in use"),
        ):
            run(image, {0: B})
        run(image, {0: B})
    finally:
        command("delpart", disk, "1")


def test_an_image_that_another_program_writes_to_is_refused(path: Path) -> None:
    run(path, {0: A})
    with path.open("r+b"), pytest.raises(InvalidInput, match="in use"):
        run(path, {0: B})
    with path.open("rb"):  # reading it harms nobody
        run(path, {0: B})
    assert holds(path, {0: B})


@contextmanager
def opened_by_qemu(path: Path, *options: str) -> Iterator[None]:
    command("qemu-io", "--version")
    line = ["qemu-io", *options, "-f", "raw", str(path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write("read 0 512\n")
        qemu.stdin.flush()
        while "read 512/512" not in qemu.stdout.readline():
            pass
        yield
        qemu.stdin.close()


@pytest.mark.parametrize("options", [[], ["-r"]], ids=["for writing", "for reading"])
@pytest.mark.parametrize("device", [False, True], ids=["file", "device"])
def test_an_image_that_qemu_has_open_is_refused(tmp_path: Path, device: bool, options: list[str]) -> None:
    with place(tmp_path, device) as path:
        run(path, {0: A})
        with opened_by_qemu(path, *options), pytest.raises(InvalidInput, match="QEMU"):
            run(path, {0: B})
        run(path, {0: B})


@pytest.mark.parametrize("device", [False, True], ids=["file", "device"])
def test_qemu_does_not_open_an_image_that_a_run_writes_to(tmp_path: Path, device: bool) -> None:
    command("qemu-io", "--version")
    with place(tmp_path, device) as path:
        run(path, {0: A})
        with Image(path) as image:
            image.known("id", SIZE, CHUNK, full=False)
            line = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", str(path)]
            done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode
        assert "lock" in done.stderr


@contextmanager
def place(folder: Path, device: bool) -> Iterator[Path]:
    """A new image, or an empty device."""
    if not device:
        yield folder / "os.raw"
        return
    with (folder / "medium").open("wb") as file:
        file.truncate(SIZE)
    with loop(folder / "medium") as found:
        yield found


def test_two_runs_on_one_image_or_volume_of_this_host_are_refused(path: Path) -> None:
    entry = {"disk_id": "id", "volume_dev": str(path)}
    with FileVolume(entry) as one, FileVolume(entry) as other:
        one.known("id", SIZE, CHUNK, full=False)
        with pytest.raises(InvalidInput, match="in use"):
            other.known("id", SIZE, CHUNK, full=False)


# Whose it is


def test_an_image_that_no_run_has_made_is_refused_unless_it_is_adopted(path: Path, told: Told) -> None:
    path.write_bytes(disk_of({0: A, FAR: B}))
    for full in (False, True):
        with pytest.raises(InvalidInput, match="no run of ours has made it") as refused:
            run(path, {0: A}, full=full)
        assert "--adopt" in refused.value.remedy
    assert holds(path, {0: A, FAR: B})
    assert run(path, {0: A, FAR: A}, report=told, adopt=True) == [FAR]
    assert "read as a whole" in told[0]
    assert run(path, {0: A, FAR: A}) == []


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (["-f", "qcow2"], "qcow2"),
        (["-f", "vmdk"], "VMDK"),
        (["-f", "vpc"], "VHD"),
        (["-f", "vpc", "-o", "subformat=fixed"], "VHD"),
        (["-f", "vhdx"], "VHDX"),
    ],
)
def test_an_image_in_another_format_is_named(path: Path, options: list[str], form: str) -> None:
    command("qemu-img", "create", "-q", *options, path, "4M")
    for adopt in (False, True):
        with pytest.raises(InvalidInput, match=f"is a {form} image") as refused:
            run(path, {0: A}, adopt=adopt)
    assert "qemu-img convert" in refused.value.remedy


@pytest.mark.parametrize("kind", ["of no length", "of holes", "of zeros"])
def test_an_empty_file_is_anybodys(path: Path, kind: str) -> None:
    path.write_bytes(bytes(SIZE) if kind == "of zeros" else b"")
    if kind == "of holes":
        os.truncate(path, SIZE)
    run(path, {0: A})
    assert holds(path, {0: A})


def test_a_volume_with_foreign_data_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.write_bytes(B)
    with pytest.raises(InvalidInput, match="no run of ours") as refused:
        volume_run({"disk_id": "id"}, {0: A}, volume)
    assert volume.read_bytes() == B
    command(*refused.value.remedy.rpartition(": ")[2].replace("FILE", str(volume)).split())
    volume_run({"disk_id": "id"}, {0: A}, volume)
    assert holds(volume, {0: A})


def test_an_image_with_another_name_is_refused(path: Path) -> None:
    """A backup of hard links would change with it."""
    run(path, {0: A})
    backup = path.with_name("backup")
    backup.hardlink_to(path)
    with pytest.raises(InvalidInput, match="hard links"):
        run(path, {0: B})
    assert holds(backup, {0: A})
