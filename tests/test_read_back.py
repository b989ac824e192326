"""What a run writes is read back while it goes on, and only counts if nobody else can have changed it since."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure.clock import Scope
from coriolis_azure.errors import CorruptChunk, DestinationFailed, StreamEnded, WaitEnded
from coriolis_azure.events import Event, Step, silent
from coriolis_azure.replica import comparison
from coriolis_azure.replica.manifest import GRAIN, UNKNOWN, Manifest
from coriolis_azure.replica.medium import Content
from harness.constants import DEADLINE
from harness.copies import CHUNK, by_agent, change, job, replicate
from harness.images import Image
from harness.pipes import Pipes
from harness.waiting import eventually

CHUNKS = 60
LAST = (CHUNKS - 1) * CHUNK


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(CHUNKS * CHUNK))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "os.raw"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_EARLY_BYTES", 4 * CHUNK)


class Watched(Image):
    """An image that holds its last write until the first chunk has been read back, and notes what is read when."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.early, self.late = list[int](), list[int]()
        self._was_read = threading.Event()
        self._is_flushed = False

    def write(self, offset: int, data: Content) -> None:
        if offset == LAST:
            assert self._was_read.wait(DEADLINE)
            self.last()
        super().write(offset, data)

    def last(self) -> None:
        """What happens before the last chunk is written."""

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        (self.late if self._is_flushed else self.early).append(offset // CHUNK)
        self._was_read.set()
        return data

    def flush(self) -> None:
        super().flush()
        self._is_flushed = True

    def intrude(self) -> None:
        """Write to the draft, as somebody does who has opened it and was let in."""
        os.pwrite(self.medium._stores["partial"].fd, b"stranger", 0)


def copy(disk: Path, image: Image, told: list[Event] | None = None) -> bool | None:
    with image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        report = silent if told is None else told.append
        return by_agent(lambda: pipes, job(disk), base, image, report).verified


def test_each_chunk_is_read_back_once_and_most_before_the_end(disk: Path, path: Path) -> None:
    image, told = Watched(path), list[Event]()
    assert copy(disk, image, told)
    assert sorted(image.early + image.late) == list(range(CHUNKS))
    assert image.early
    assert CHUNKS - 1 in image.late
    assert [event for event in told if isinstance(event, Step)] == [Step("verify", "os")]
    assert path.read_bytes() == disk.read_bytes()


def test_a_later_run_reads_back_what_it_has_changed(disk: Path, path: Path) -> None:
    replicate(disk, path)
    disk.write_bytes(os.urandom(30 * CHUNK) + disk.read_bytes()[30 * CHUNK : LAST] + os.urandom(CHUNK))
    image = Watched(path)
    assert copy(disk, image)
    assert {*image.early, *image.late} == {*range(30), CHUNKS - 1}
    assert path.read_bytes() == disk.read_bytes()


def test_what_somebody_writes_to_what_was_read_back_is_found(disk: Path, path: Path) -> None:
    class Intruded(Watched):
        def last(self) -> None:
            with pytest.raises(BlockingIOError):  # kept out for a while, then let in
                os.open(path.with_name("os.raw.partial"), os.O_WRONLY | os.O_NONBLOCK)
            self.intrude()

    image = Intruded(path)
    with pytest.raises(CorruptChunk, match="offset 0 ") as caught:
        copy(disk, image)
    assert caught.value.offset == 0
    assert not path.exists()


def test_where_nothing_tells_who_else_writes_all_is_read_back_at_the_end(
    disk: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("no leases here")

    class Intruded(Watched):
        def last(self) -> None:
            self.intrude()

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.fcntl", refused)
        with pytest.raises(CorruptChunk, match="offset 0 "):
            copy(disk, Intruded(path))
        image = Watched(path)
        assert copy(disk, image)
    assert path.read_bytes() == disk.read_bytes()


class Forgetful(Watched):
    """An image that loses what is written to the first chunk."""

    def write(self, offset: int, data: Content) -> None:
        super().write(offset, bytes(len(data)) if offset == 0 else data)


def test_a_chunk_that_was_lost_is_named_while_the_copy_goes_on(disk: Path, path: Path) -> None:
    image = Forgetful(path)
    with pytest.raises(CorruptChunk, match="read back") as caught:
        copy(disk, image)
    assert (caught.value.disk, caught.value.offset) == ("os", 0)
    assert not image.late


def test_a_flush_that_fails_while_the_copy_goes_on_ends_it(disk: Path, path: Path) -> None:
    class Full(Image):
        def sync(self) -> None:
            raise DestinationFailed("the disk is full", disk="os")

    with pytest.raises(DestinationFailed, match="the disk is full"):
        copy(disk, Full(path))
    assert not path.exists()


def test_a_copy_that_fails_leaves_no_thread_that_reads_back(disk: Path, path: Path) -> None:
    class Broken(Watched):
        def last(self) -> None:
            raise StreamEnded("gone")

    before = threading.active_count()
    with pytest.raises(StreamEnded):
        copy(disk, Broken(path))
    eventually(lambda: threading.active_count() <= before)


def test_what_a_cancelled_run_did_not_read_back_does_not_count(disk: Path, path: Path) -> None:
    run, data = Scope(), disk.read_bytes()[: 4 * CHUNK]

    class Cancelled(Image):
        def sync(self) -> None:
            super().sync()
            run.cancel()

    with run.entered(), Cancelled(path) as image:
        base = image.known("id", len(data), CHUNK, full=False)
        written = replace(base, digests=base.digests.copy())
        image.intend(0, len(data))
        image.write(0, data)
        written.digests.put(
            0, b"".join(base.digester()(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
        )
        with closing(comparison.ReadBack(image, base.digests, 1)) as read_back:
            read_back.add(written, 0, 4)
            eventually(lambda: not read_back._background.busy)
            image.flush()
            with pytest.raises(WaitEnded):
                read_back.finish(written, lambda: None)


class Places(Image):
    """An image that notes which ranges are read after all is written, and may lose what is written to one."""

    def __init__(self, path: Path, lost: int = -1) -> None:
        super().__init__(path)
        self.lost, self.read_back = lost, list[tuple[int, int]]()
        self._is_flushed = False

    def write(self, offset: int, data: Content) -> None:
        super().write(offset, bytes(len(data)) if offset == self.lost else data)

    def read(self, offset: int, length: int) -> bytes:
        if self._is_flushed:
            self.read_back.append((offset, length))
        return super().read(offset, length)

    def flush(self) -> None:
        super().flush()
        self._is_flushed = True


def by_grains(disk: Path, image: Places) -> bool | None:
    with image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, 4 * GRAIN, full=False)
        return by_agent(lambda: pipes, job(disk), base, image).verified


@pytest.fixture
def patched(disk: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk that was replicated in chunks of four grains, and of which two grains of one chunk have changed since."""
    monkeypatch.setattr(comparison, "_EARLY_BYTES", 1 << 30)
    replicate(disk, path, chunk=4 * GRAIN)
    for grain in (1, 3):
        change(disk, (8 + grain) * GRAIN, os.urandom(GRAIN))
    return disk


def test_of_a_chunk_only_the_grains_that_were_written_are_read_back(patched: Path, path: Path) -> None:
    image = Places(path)
    assert by_grains(patched, image)
    assert image.read_back == [(9 * GRAIN, GRAIN), (11 * GRAIN, GRAIN)]
    assert path.read_bytes() == patched.read_bytes()


def test_a_grain_that_was_lost_is_found(patched: Path, path: Path) -> None:
    with pytest.raises(CorruptChunk, match="read back") as caught:
        by_grains(patched, Places(path, lost=11 * GRAIN))
    assert caught.value.offset == 8 * GRAIN
    assert path.read_bytes() != patched.read_bytes()  # nothing was published


@pytest.mark.parametrize("damage", ["forgotten", "of another chunk"])
def test_where_digests_of_grains_do_not_prove_themselves_the_chunk_is_read_back(
    patched: Path, path: Path, damage: str
) -> None:
    class Damaged(Places):
        def flush(self) -> None:
            grains = self.grains
            assert grains is not None
            if damage == "forgotten":
                os.truncate(path.with_name("os.raw.grains"), 0)
            else:
                grains.put(2, grains.get(0, 4))
            super().flush()

    image = Damaged(path)
    assert by_grains(patched, image)
    assert image.read_back == [(8 * GRAIN, 4 * GRAIN)]
    assert path.read_bytes() == patched.read_bytes()


def test_a_chunk_of_which_nothing_was_known_is_read_back_as_a_whole(patched: Path, path: Path) -> None:
    class Forgotten(Places):
        def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
            base = super().known(disk, size, chunk, full=full)
            base.digests.put(2, UNKNOWN)
            return base

    image = Forgotten(path)
    assert by_grains(patched, image)
    assert image.read_back == [(8 * GRAIN, 4 * GRAIN)]
