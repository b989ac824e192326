"""Two runs that no lock keeps apart: one ends with an error before it commits, and the replica is right."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure.errors import CorruptChunk, DestinationFailed
from coriolis_azure.plugin.writer import FileVolume
from coriolis_azure.replica import runmark
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.manifest import ZERO, Manifest
from coriolis_azure.replica.replica import Replica
from harness.block_devices import command
from harness.image_runs import CHUNK, SIZE, A, B, Told, holds, run
from harness.processes import Forked


@contextmanager
def through_fuse(folder: Path, place: Path) -> Iterator[Path]:
    """The folder through a FUSE file system of its own, which keeps its locks to itself, as one on another host."""
    place.mkdir()
    command("bindfs", "--no-allow-other", folder, place)
    try:
        yield place
    finally:
        command("fusermount3", "-u", place)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """One folder as two hosts have it that do not see each other's locks."""
    folder = tmp_path / "images"
    folder.mkdir(mode=0o700)
    with ExitStack() as ending:
        one, other = (
            ending.enter_context(through_fuse(folder, tmp_path / name)) for name in ("one", "other")
        )
        with (one / "probe").open("w") as held, (other / "probe").open() as tried:
            fcntl.flock(held, fcntl.LOCK_EX)
            fcntl.flock(tried, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody keeps us out
        (one / "probe").unlink()
        yield one, other


def begun(image: Replica, data: bytes) -> Manifest:
    """A run that has written chunk 0, and the manifest it would commit."""
    base = image.known("id", SIZE, CHUNK, full=False)
    digests = base.digests.copy()
    digests.put(0, base.digester()(data))
    image.intend(0, CHUNK)
    image.write(0, data)
    return replace(base, digests=digests)


def test_the_first_of_two_runs_ends_before_it_commits(sides: tuple[Path, Path]) -> None:
    one, other = sides
    told = Told()
    with ImageFolder(one) as first, first.disk("os") as image:
        manifest = begun(image, A)
        with ImageFolder(other, told) as second, second.disk("os") as later:
            found = later.known("id", SIZE, CHUNK, full=False)
            assert found.digest(0) == ZERO
            acts: list[Callable[[], None]] = [lambda: image.write(0, B), lambda: image.commit(manifest)]
            for act in acts:
                with pytest.raises(DestinationFailed, match="another run has begun to write") as ended:
                    act()
            assert "one run at a time" in ended.value.remedy
            later.flush()
            later.commit(found)
            later.publish()
    with ImageFolder(one) as third, third.disk("os") as image:
        assert image.known("id", SIZE, CHUNK, full=False).digest(0) == ZERO
    assert holds(one / "os.raw", {})


@pytest.mark.slow
def test_what_the_first_run_writes_too_late_is_found_before_the_second_commits(
    sides: tuple[Path, Path],
) -> None:
    """A write that was under way: the file system of the first host holds it back for as long as it likes."""
    one, other = sides
    (one / "volume").touch()
    first = FileVolume({"disk_id": "id", "volume_dev": str(one / "volume")})
    second = FileVolume({"disk_id": "id", "volume_dev": str(other / "volume")})
    with first, second:
        begun(first, A)
        found = second.known("id", SIZE, CHUNK, full=False)
        second.intend(CHUNK, CHUNK)
        second.write(CHUNK, B)
        digests = found.digests.copy()
        digests.put(1, found.digester()(B))
        first._store().write(0, B)
        second.flush()
        with pytest.raises(CorruptChunk, match="offset 0 was changed by another run"):
            second.commit(replace(found, digests=digests))


@contextmanager
def contesting(sides: tuple[Path, Path]) -> Iterator[tuple[Replica, Replica, Manifest]]:
    """Two runs at work on an image: that of each, and what the second one knows of it."""
    one, other = sides
    run(one / "os.raw", {0: A})
    with ImageFolder(one) as first, first.disk("os") as image:
        image.known("id", SIZE, CHUNK, full=False)
        with ImageFolder(other) as second, second.disk("os") as later:
            yield image, later, later.known("id", SIZE, CHUNK, full=False)


@pytest.mark.slow
def test_a_second_run_that_finds_nothing_to_do_reads_again_before_it_ends(
    sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host of the second one may have the times of the image cached."""
    with contesting(sides) as (_, later, found):
        seen = later._stamp
        monkeypatch.setattr(FileMedium, "stamp", lambda medium: seen)
        with (sides[0] / "os.raw").open("r+b") as late:
            late.write(B)
        with pytest.raises(CorruptChunk, match="offset 0 was changed by another run"):
            later.commit(found)


def published(image: Replica) -> None:
    image.check_publishable()
    image.publish()


@pytest.mark.slow
def test_what_the_first_run_publishes_too_late_stops_the_second(sides: tuple[Path, Path]) -> None:
    """The first one's image is the second's too: what it writes shows before the second one switches."""
    with contesting(sides) as (image, later, found):
        later.intend(CHUNK, CHUNK)
        later.write(CHUNK, B)
        digests = found.digests.copy()
        digests.put(1, found.digester()(B))
        manifest = replace(found, digests=digests)
        later.settle(manifest, 1, 1)
        later.flush()
        later.commit(manifest)
        written_late = image._medium.open("image")
        assert written_late is not None
        written_late.write(0, B)
        # What this host has in its cache of the image's times may be a second old: then the content tells.
        with pytest.raises((DestinationFailed, CorruptChunk), match="changed by"):
            published(later)
    with ImageFolder(sides[0]) as third, third.disk("os") as image:
        known = image.known("id", SIZE, CHUNK, full=False)
        assert known.digest(0) == known.digester()(B)


def dies_in(folder: Path) -> None:
    ImageFolder(folder)
    os._exit(9)


def test_after_a_run_that_was_killed_the_mark_costs_nothing(tmp_path: Path) -> None:
    """The lock is proof that it is dead, so nobody waits for it or reads anything for its sake."""
    folder = tmp_path / "images"
    with ImageFolder(folder):
        pass
    with Forked(dies_in, folder) as killed:
        assert killed.wait(30) == 9
    assert (folder / ".run").exists()
    with ImageFolder(folder) as images:
        assert images._mark is not None
        assert not images._mark.contested
    assert not (folder / ".run").exists()


def test_a_damaged_mark_may_be_that_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runmark, "_FENCE_SECONDS", 0)
    with ImageFolder(tmp_path / "images"):
        pass
    (tmp_path / "images/.run").write_bytes(b"[" * 100_000)
    with ImageFolder(tmp_path / "images") as images:
        assert images._mark is not None
        assert images._mark.contested


@pytest.mark.slow
def test_volumes_of_the_file_writer_are_marked_too(sides: tuple[Path, Path]) -> None:
    one, other = sides
    (one / "volume").touch()
    first = FileVolume({"disk_id": "id", "volume_dev": str(one / "volume")})
    second = FileVolume({"disk_id": "id", "volume_dev": str(other / "volume")})
    with first, second:
        begun(first, A)
        second.known("id", SIZE, CHUNK, full=False)
        with pytest.raises(DestinationFailed, match="another run has begun to write"):
            first.write(SIZE - 512, bytes(512))
    assert sorted(path.name for path in one.iterdir()) == ["volume", "volume.manifest"]


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP", "no effect"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses to lock, or says that it has locked and keeps nobody out."""

    def lock(*arguments: object) -> bytes:
        if code := getattr(errno, request.param, 0):
            raise OSError(code, os.strerror(code))
        return struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(fcntl, "fcntl", lock)


@pytest.mark.slow
@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_mark_is_never_taken_for_that_of_a_dead_run(tmp_path: Path) -> None:
    """Two runs of one host: file, mount and kernel are the same, and no lock has held the second one out."""
    folder = tmp_path / "images"
    with ImageFolder(folder) as first, first.disk("os") as image:
        begun(image, A)
        with ImageFolder(folder) as second:
            assert second._mark is not None
            assert second._mark.contested
            with pytest.raises(DestinationFailed, match="another run has begun to write"):
                image.write(SIZE - 512, bytes(512))


@pytest.mark.slow
@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_mark_beside_a_volume_is_not_either(tmp_path: Path) -> None:
    (tmp_path / "volume").touch()
    entry = {"disk_id": "id", "volume_dev": str(tmp_path / "volume")}
    second = FileVolume(entry)
    with FileVolume(entry) as first, second:
        begun(first, A)
        second.known("id", SIZE, CHUNK, full=False)
        assert second._file.contested


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_is_written_to(tmp_path: Path) -> None:
    with ImageFolder(tmp_path / "images") as images:
        images.reserve(["os"])
    run(tmp_path / "images/os.raw", {0: A})
    assert holds(tmp_path / "images/os.raw", {0: A})
