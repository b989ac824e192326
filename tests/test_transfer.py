"""One disk, copied: the real agent over pipes, real files as disk and destination."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coriolis_azure import agent, transfer
from coriolis_azure.agent import wire
from coriolis_azure.agent.tls import Stripes, Tls
from coriolis_azure.clock import Clock, Scope
from coriolis_azure.errors import (
    AgentFailed,
    CoriolisAzureError,
    CorruptChunk,
    DestinationFailed,
    InvalidInput,
    StreamEnded,
    TransferError,
    WaitEnded,
    WorkerError,
)
from coriolis_azure.events import Copied, Event, Notice, Step, silent
from coriolis_azure.readers import rate_limiter
from coriolis_azure.readers.agents import COMPRESSION
from coriolis_azure.readers.conversation import Job
from coriolis_azure.replica import comparison
from coriolis_azure.replica.manifest import UNKNOWN, ZERO, Manifest
from coriolis_azure.replica.medium import Content
from harness.clocks import Held
from harness.constants import DEADLINE
from harness.copies import CHUNK, LEAF, Lying, by_agent, change, job, replicate
from harness.images import Image
from harness.lanes import slow
from harness.pipes import AGENT, Pipes
from harness.waiting import eventually

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GRAIN = wire.GRAIN


def balanced(outcome: transfer.Outcome) -> bool:
    return outcome.read_bytes == outcome.sent_bytes + outcome.zero_bytes + outcome.skipped_bytes


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    chance = random.Random(1)
    parts = [chance.randbytes(CHUNK), bytes(2 * CHUNK), b"text " * 13107 + b"!", chance.randbytes(1536)]
    path.write_bytes(b"".join(parts))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "os.raw"


class Voice:
    """A stream that says what it is told to, whatever it hears; then it ends."""

    def __init__(self, says: bytes) -> None:
        self._says, self._at = says, 0

    def read(self, size: int, /) -> bytes:
        part = self._says[self._at : self._at + size]
        self._at += size
        if len(part) < size:
            raise StreamEnded("the voice ends")
        return part

    def write(self, data: bytes, /) -> None:
        pass

    def close(self) -> None:
        self._says = b""


# Good runs


def test_a_first_run_sends_what_is_there_and_the_next_nothing(disk: Path, path: Path) -> None:
    first = replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()
    assert (first.full, first.verified) == (True, True)
    assert (first.sent_bytes, first.zero_bytes, first.skipped_bytes) == (2 * CHUNK + 1536, 2 * CHUNK, 0)
    second = replicate(disk, path)
    assert (second.full, second.verified) == (False, True)
    assert (second.sent_bytes, second.zero_bytes, second.skipped_bytes) == (0, 0, first.read_bytes)
    assert second.manifest.root() == first.manifest.root()
    assert second.manifest == first.manifest


def test_a_small_change_sends_its_leaves_only(disk: Path, path: Path) -> None:
    replicate(disk, path)
    change(disk, 5000, b"new")
    change(disk, 3 * CHUNK, bytes(2 * LEAF))
    second = replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()
    assert (second.sent_bytes, second.zero_bytes) == (LEAF, 2 * LEAF)
    assert balanced(second)


def test_a_small_change_among_zeros_sends_its_leaves_only(disk: Path, path: Path) -> None:
    replicate(disk, path)
    change(disk, CHUNK + 3 * LEAF, b"new")
    second = replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()
    assert second.sent_bytes == LEAF
    assert balanced(second)


def test_without_leaves_a_change_sends_its_chunk(disk: Path, path: Path) -> None:
    replicate(disk, path)
    change(disk, 5000, b"new")
    second = replicate(disk, path, leaf=0)
    assert path.read_bytes() == disk.read_bytes()
    assert second.sent_bytes == CHUNK


def test_a_chunk_that_became_zeros_becomes_a_hole(disk: Path, path: Path) -> None:
    replicate(disk, path)
    change(disk, 0, bytes(CHUNK))
    second = replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()
    assert (second.sent_bytes, second.zero_bytes) == (0, CHUNK)
    assert path.stat().st_blocks * 512 == 2 * CHUNK - CHUNK + LEAF


@pytest.mark.parametrize("compress", COMPRESSION)
@pytest.mark.parametrize("fill", [ZERO, UNKNOWN])
def test_zeros_inside_a_chunk_are_cleared_where_nothing_is_known(
    tmp_path: Path, path: Path, fill: bytes, compress: str
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(GRAIN) + b"a" * GRAIN + bytes(GRAIN) + os.urandom(GRAIN) + b"b" * 512)
    path.write_bytes(b"old!" * GRAIN if fill == UNKNOWN else b"")
    os.truncate(path, disk.stat().st_size)
    with Image(path, adopt=True) as image, Pipes() as pipes:
        image.known("id", disk.stat().st_size, 4 * GRAIN, full=False)
        base = Manifest.new(disk.stat().st_size, 4 * GRAIN, "id", fill)
        task = job(disk, compress=compress)
        outcome = by_agent(lambda: pipes, task, base, image)
    assert path.read_bytes() == disk.read_bytes()
    assert (outcome.sent_bytes, outcome.zero_bytes) == (2 * GRAIN + 512, 2 * GRAIN)


def test_compression_makes_the_stream_smaller_and_nothing_else(disk: Path, path: Path) -> None:
    heard = []
    for compress in ("none", "always"):
        with Image(path) as image, Pipes() as pipes:
            base = image.known("id", disk.stat().st_size, CHUNK, full=True)
            task = job(disk, compress=compress)
            outcome = by_agent(lambda: pipes, task, base, image)
            heard.append(len(pipes.heard))
        assert path.read_bytes() == disk.read_bytes()
        assert outcome.sent_bytes == 2 * CHUNK + 1536
    assert heard[1] < heard[0] - CHUNK // 2


def test_progress_is_told_a_few_times_a_second_and_at_the_end(tmp_path: Path, path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(100 * CHUNK))
    told: list[Event] = []
    began = time.monotonic()
    replicate(disk, path, report=told.append)
    copied = [event for event in told if isinstance(event, Copied)]
    assert len(copied) <= 2 + 5 * (time.monotonic() - began)
    assert copied[-1] == Copied("os", 100 * CHUNK, 100 * CHUNK, 100 * CHUNK)
    assert all(one.done < other.done for one, other in itertools.pairwise(copied))
    assert told[-1] == Step("verify", "os")


def test_a_destination_that_cannot_be_read_gets_chunks_and_is_not_called_verified(
    disk: Path, path: Path
) -> None:
    class Sink(Image):
        readable = False
        checkable = False

    outcomes = []
    for _ in range(2):
        with Sink(path) as image, Pipes() as pipes:
            base = image.known("id", disk.stat().st_size, CHUNK, full=False)
            task = job(disk)
            outcomes.append(by_agent(lambda: pipes, task, base, image))
        change(disk, 0, b"x")
    assert [outcome.verified for outcome in outcomes] == [None, None]
    assert outcomes[1].sent_bytes == CHUNK


@pytest.mark.slow
def test_more_chunks_change_than_may_be_asked_for_at_a_time(tmp_path: Path, path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(100 * CHUNK))
    replicate(disk, path)
    for index in range(100):
        change(disk, index * CHUNK + 100, b"changed")
    second = replicate(disk, path)
    assert second.sent_bytes == 100 * LEAF
    assert path.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("rate", [3 * CHUNK, 10_000, 100])
def test_the_rate_is_kept_also_where_it_is_less_than_a_chunk(disk: Path, path: Path, rate: int) -> None:
    clock = Held()
    with Image(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        by_agent(
            lambda: pipes,
            job(disk),
            base,
            image,
            silent,
            clock=clock,
            verify=True,
            limiter=rate_limiter.RateLimiter(rate, clock),
        )
        least = len(pipes.heard) / rate
    assert least - 0.5 <= clock.moment <= least + 0.5
    assert path.read_bytes() == disk.read_bytes()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_image_is_the_disk_after_every_good_run(tmp_path: Path, data: st.DataObject) -> None:
    """Random content, changes, growth, runs that die in the middle: the next good run puts it right."""
    where = tmp_path / str(next(_numbers))
    where.mkdir()
    disk, path = where / "disk", where / "os.raw"
    unit = 512
    size = data.draw(st.integers(1, 1500)) * unit
    disk.write_bytes(bytes(size))
    leaf = data.draw(st.sampled_from([0, 4096, 16384, 65536]))
    options: dict[str, Any] = {"leaf": leaf, "compress": data.draw(st.sampled_from(COMPRESSION))}
    chance = random.Random(data.draw(st.integers(0, 1 << 30)))
    for _ in range(3):
        if data.draw(st.booleans()):
            size += data.draw(st.integers(1, 400)) * unit
            os.truncate(disk, size)
        for _ in range(data.draw(st.integers(0, 6))):
            length = chance.choice([1, 512, LEAF, CHUNK, 3 * CHUNK])
            content = chance.choice([bytes(length), chance.randbytes(length), b"A" * length])
            change(disk, chance.randrange(size), content)
            os.truncate(disk, size)
        if data.draw(st.booleans()):
            content = disk.read_bytes()
            change(disk, 0, chance.randbytes(min(size, 2 * CHUNK)))
            with contextlib.suppress(TransferError):
                dies_after(chance.randrange(4 * CHUNK), disk, path, **options)
            disk.write_bytes(content)
        outcome = replicate(disk, path, full=data.draw(st.integers(0, 4)) == 0, **options)
        assert path.read_bytes() == disk.read_bytes()
        assert balanced(outcome)
        assert outcome.verified


_numbers = itertools.count()


class Dying(Pipes):
    """An agent that is killed once it has said so many bytes."""

    last = 1 << 60

    def read(self, size: int, /) -> bytes:
        if len(self.heard) + size > self.last:
            self.close()
            raise StreamEnded("killed")
        return super().read(size)


def dies_after(said: int, disk: Path, path: Path, **options: Any) -> None:
    with Image(path) as image, Dying() as pipes:
        pipes.last = said
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        by_agent(lambda: pipes, job(disk, **options), base, image)


# Bad runs


def test_an_agent_that_is_killed_is_an_error_and_nothing_is_committed(disk: Path, path: Path) -> None:
    replicate(disk, path)
    kept = path.with_name("os.raw.manifest").read_bytes()
    change(disk, 0, b"x" * 2 * CHUNK)
    with pytest.raises(StreamEnded):
        dies_after(2000, disk, path)
    assert path.with_name("os.raw.manifest").read_bytes() == kept
    replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()


def test_a_disk_of_another_size_is_an_error_that_names_both(disk: Path, path: Path) -> None:
    size = disk.stat().st_size
    task = replace(job(disk), size=size + 512)
    with Image(path) as image, Pipes() as pipes:
        base = image.known("id", size + 512, CHUNK, full=False)
        with pytest.raises(
            AgentFailed, match=f"{disk} has {size} bytes, the disk to be read has {size + 512}"
        ):
            by_agent(lambda: pipes, task, base, image)


def test_a_disk_that_does_not_appear_is_an_error(disk: Path, path: Path) -> None:
    task = replace(job(disk), devices=("/nonexistent/lun0",), wait=0.2)
    with Image(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        with pytest.raises(AgentFailed, match="no device appeared"):
            by_agent(lambda: pipes, task, base, image)


def test_an_agent_that_never_starts_is_an_error(disk: Path, path: Path) -> None:
    with Image(path) as image, Pipes(program=["/nonexistent"]) as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        with pytest.raises(StreamEnded):
            by_agent(lambda: pipes, job(disk), base, image)


class Failing(Image):
    """A destination in which one kind of step fails."""

    step = ""

    def _maybe(self, step: str) -> None:
        if step == self.step:
            raise DestinationFailed(f"{step} failed", disk="os", offset=7)

    def intend(self, offset: int, length: int) -> None:
        self._maybe("expect")
        super().intend(offset, length)

    def write(self, offset: int, data: Content) -> None:
        self._maybe("write")
        super().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._maybe("zero")
        super().zero(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        self._maybe("read")
        return super().read(offset, length)

    def flush(self) -> None:
        self._maybe("flush")
        super().flush()


@pytest.mark.slow
@pytest.mark.parametrize("step", [slow("expect"), "write", slow("zero"), "read", "flush"])
def test_a_failing_destination_ends_the_run_at_once_with_its_own_error(
    tmp_path: Path, path: Path, step: str
) -> None:
    """Also where the agent is waiting for leaves that will never come."""
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(100 * CHUNK))
    replicate(disk, path)
    for index in range(0, 100, 2):
        change(disk, index * CHUNK, b"x" if index % 4 else bytes(CHUNK))
    with Failing(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        image.step = step
        threads = threading.active_count()
        with pytest.raises(DestinationFailed, match=f"{step} failed"):
            by_agent(lambda: pipes, job(disk), base, image)
        eventually(lambda: threading.active_count() <= threads)
    replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()


def test_an_agent_that_waits_for_leaves_is_not_waited_for(tmp_path: Path, path: Path) -> None:
    """Fewer chunks may be asked for than frames be in flight: only the failing thread can wake the reader."""
    disk, chunk = tmp_path / "disk", wire.MAX_CHUNK
    disk.write_bytes(b"a" * 5 * chunk)
    replicate(disk, path, chunk=chunk)
    disk.write_bytes(b"b" * 5 * chunk)
    with Failing(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, chunk, full=False)
        image.step = "read"
        too_late = threading.Timer(20, pipes.close)
        too_late.start()
        with pytest.raises(DestinationFailed, match="read failed"):
            by_agent(lambda: pipes, job(disk), base, image)
        assert too_late.is_alive()
        too_late.cancel()
        too_late.join()


def test_a_report_that_is_interrupted_ends_the_agent(tmp_path: Path, path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(400 * CHUNK))

    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with Image(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        with pytest.raises(KeyboardInterrupt):
            by_agent(lambda: pipes, job(disk), base, image, interrupted)
        assert pipes.process.wait(DEADLINE) < 0


@pytest.fixture
def without_gmac() -> list[str]:
    """The agent on a worker that has no usable libcrypto."""
    source = agent.program().decode()
    assert '"gmac": _gmac, ' in source
    return ["-c", source.replace('"gmac": _gmac, ', "")]


@pytest.mark.parametrize("run", ["first", "incremental", "with another hash"])
def test_what_reads_back_wrong_is_not_committed(
    disk: Path, path: Path, without_gmac: list[str], run: str
) -> None:
    if run != "first":
        replicate(disk, path)
    if run == "incremental":
        change(disk, 3 * CHUNK + 4 * LEAF, b"new")
    with Lying(path, 3) as image, Pipes(program=without_gmac if "hash" in run else AGENT) as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        with pytest.raises(CorruptChunk) as failure:
            by_agent(lambda: pipes, job(disk), base, image)
    assert failure.value.facts == {"disk": "os", "offset": 3 * CHUNK}
    replicate(disk, path)
    assert path.read_bytes() == disk.read_bytes()


def test_a_worker_with_another_hash_compares_everything_and_is_sent_nothing_twice(
    disk: Path, path: Path, without_gmac: list[str]
) -> None:
    told: list[Event] = []
    with Image(path) as image, Pipes() as pipes:
        base = replace(image.known("id", disk.stat().st_size, CHUNK, full=False), hash="gmac")
        by_agent(lambda: pipes, job(disk), base, image)
    done = replicate(disk, path, report=told.append, stream=Pipes(program=without_gmac))
    (notice,) = (event.text for event in told if isinstance(event, Notice))
    assert notice.startswith("os: this worker cannot compute gmac, so everything is compared anew, with bla")
    assert (done.sent_bytes, done.verified, done.manifest.hash != "gmac") == (0, True, True)
    assert path.read_bytes() == disk.read_bytes()


def test_differing_finds_what_is_not_as_it_should_be(disk: Path, path: Path) -> None:
    manifest = replicate(disk, path).manifest
    with Image(path) as image:
        assert image.stored() == manifest
        assert list(comparison.differing(image, manifest, range(manifest.count))) == []
        change(path, 2 * CHUNK, b"rot")
        assert list(comparison.differing(image, manifest, range(manifest.count))) == [2]
        digests = manifest.digests.copy()
        digests.put(0, UNKNOWN)
        manifest = replace(manifest, digests=digests)
        assert list(comparison.differing(image, manifest, range(manifest.count))) == [0, 2]


def test_a_leaf_that_cannot_be_is_refused(disk: Path, path: Path) -> None:
    with pytest.raises(InvalidInput, match="leaf"):
        replicate(disk, path, leaf=1000)


def test_a_copy_that_is_cancelled_at_its_end_is_not_committed(disk: Path, path: Path) -> None:
    """Even if nothing waits from then on."""
    with Scope().entered() as work:

        class Cancelled(Image):
            def flush(self) -> None:
                super().flush()
                work.cancel()

        with Cancelled(path) as image, Pipes() as pipes:
            base = image.known("id", disk.stat().st_size, CHUNK, full=False)
            with pytest.raises(WaitEnded, match="the copy was cancelled"):
                by_agent(lambda: pipes, job(disk), base, image, verify=False)
            assert image.committed is None
    assert not path.exists()


# Digests of grains beside the image

WIDE = 4 * GRAIN


class Counted(Image):
    """An image that counts what is read of it."""

    read_bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        self.read_bytes += length
        return super().read(offset, length)


def compare(disk: Path, path: Path) -> tuple[transfer.Outcome, int]:
    """A run with chunks of four grains, not read back: its outcome and how many bytes were read of the image."""
    with Counted(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, WIDE, full=False)
        image.read_bytes = 0
        outcome = by_agent(lambda: pipes, job(disk), base, image, verify=False)
        return outcome, image.read_bytes


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A disk of 40 chunks and a short one, more than are asked for in one message."""
    disk = tmp_path / "wide"
    disk.write_bytes(random.Random(7).randbytes(40 * WIDE + GRAIN + 512))
    return disk


@pytest.mark.slow
def test_of_a_chunk_that_changed_only_the_grains_that_differ_are_read(wide: Path, path: Path) -> None:
    compare(wide, path)
    record = wire.DIGEST * WIDE // GRAIN
    assert (path.parent / "os.raw.grains").stat().st_size == 40 * record + 2 * wire.DIGEST
    for turn in (b"once", b"more"):  # what a PATCH leaves behind is as good as what DATA did
        for index in range(40):
            change(wide, index * WIDE + 2 * GRAIN + 100, turn)
        outcome, read = compare(wide, path)
        assert outcome.sent_bytes == 40 * LEAF
        assert read == 40 * 2 * GRAIN  # to digest its leaves, and once more to put them together
        assert path.read_bytes() == wide.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoilt",
    ["absent", slow("empty"), "short", slow("noise"), "stale", slow("of another key"), "unreadable"],
)
def test_records_that_are_not_of_the_content_cost_reads_and_nothing_else(
    wide: Path, path: Path, spoilt: str
) -> None:
    records = path.parent / "os.raw.grains"
    compare(wide, path)
    stale = records.read_bytes()
    changed = list(range(0, 40, 3))
    for turn in (b"one", b"two"):
        if turn == b"two":
            good = records.read_bytes()
            if spoilt in ("absent", "unreadable"):
                records.unlink()
            if spoilt == "unreadable":
                records.mkdir()
            other = Manifest.new(wide.stat().st_size, WIDE, "id", ZERO).digester()
            content = {
                "empty": b"",
                "short": good[: len(good) // 2 + 5],
                "noise": random.Random(1).randbytes(len(good)),
                "stale": stale,
                "of another key": b"".join(other.grains(bytearray(path.read_bytes()))),
            }
            if spoilt in content:
                records.write_bytes(content[spoilt])
        for index in changed:
            change(wide, index * WIDE + GRAIN, turn)
        outcome, read = compare(wide, path)
        assert outcome.sent_bytes == len(changed) * LEAF
        assert path.read_bytes() == wide.read_bytes()
    few, all_of_them = 2 * GRAIN * len(changed), (WIDE + 2 * GRAIN) * len(changed)
    assert few < read <= all_of_them
    assert (read == all_of_them) == (spoilt != "short")


def test_an_image_that_is_written_anew_has_no_older_records(wide: Path, path: Path) -> None:
    compare(wide, path)
    wide.write_bytes(bytes(40 * WIDE + GRAIN + 512))
    path.unlink()
    compare(wide, path)
    assert (path.parent / "os.raw.grains").stat().st_size == 0


# A hostile agent


class Guarded(Image):
    """An image that notices every write outside of the disk, and a commit."""

    was_committed = False
    size = 0

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        self.size = size
        return super().known(disk, size, chunk, full=full)

    def _inside(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size

    def write(self, offset: int, data: Content) -> None:
        self._inside(offset, len(data))
        super().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._inside(offset, length)
        super().zero(offset, length)

    def commit(self, manifest: Manifest) -> None:
        self.was_committed = True
        super().commit(manifest)


Recorded = tuple[bytes, bytes, Manifest, bytes]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """An incremental run with every kind of message: what was there, what the disk is, the base, what was said."""
    where = tmp_path_factory.mktemp("recorded")
    disk, path = where / "disk", where / "os.raw"
    chance = random.Random(3)
    disk.write_bytes(
        b"".join([chance.randbytes(3 * CHUNK), bytes(3 * CHUNK), b"t" * CHUNK, b"short" * 100 + bytes(12)])
    )
    replicate(disk, path)
    before = path.read_bytes()
    change(disk, 100, b"patched")
    change(disk, CHUNK, bytes(CHUNK))
    change(disk, 4 * CHUNK, chance.randbytes(CHUNK))
    change(disk, 6 * CHUNK, b"text" * 100)
    with Image(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        by_agent(lambda: pipes, job(disk, compress="always"), base, image, silent)
        said = bytes(pipes.heard)
    kinds = {kind for kind, _ in messages(said)}
    assert kinds >= {wire.READY, wire.SAME, wire.ZEROS, wire.DATA, wire.ASK, wire.PATCH, wire.END}
    return before, disk.read_bytes(), base, said


def messages(said: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages in a recorded stream: kind and all of its bytes."""
    at = 0
    while at < len(said):
        kind, _, _, _, length, _ = wire.HEAD.unpack_from(said, at)
        yield kind, said[at : at + wire.HEAD.size + length]
        at += wire.HEAD.size + length


class Past(Voice):
    """The way past the stream, as Direct and as its only connection: says the same, in pieces of their own sizes."""

    def offer(self, slot: int) -> dict[str, int]:
        return {"port": 7}

    def connect(self, port: int) -> Stripes:
        return Stripes([cast("Tls", self)])

    def give_up(self, why: str) -> None:
        pass

    def read_into(self, view: memoryview) -> int:
        part = self._says[self._at : self._at + min(len(view), 1 + self._at * 7919 % 5000)]
        if not part:
            raise EOFError
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


def hears(path: Path, before: bytes, base: Manifest, says: bytes, direct: bool = False) -> bool:
    """A run in which the agent says this. Whether it was committed; all errors are of the promised kinds.

    `direct`: all but its READY, which is a good one then, comes past the stream.
    """
    path.write_bytes(before)
    past: Any = None
    if direct:
        ready = {"size": base.size, "hash": base.hash, "port": 7}
        past, says = Past(says), document(wire.READY, ready)
    with Guarded(path, adopt=True) as image:
        image.known("id", base.size, CHUNK, full=False)
        task = Job(("/dev/x",), base.size, leaf=LEAF)
        try:
            by_agent(lambda: Voice(says), task, base, image, silent, direct=past)
        except (TransferError, WorkerError):
            assert not image.was_committed
        assert path.stat().st_size == base.size
        return image.was_committed


@pytest.mark.parametrize("direct", [False, True])
def test_the_recorded_stream_is_good(recorded: Recorded, path: Path, direct: bool) -> None:
    before, after, base, said = recorded
    assert hears(path, before, base, said[len(next(messages(said))[1]) :] if direct else said, direct)
    assert path.read_bytes() == after


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_stream_is_never_taken_for_a_good_one(
    recorded: Recorded, tmp_path: Path, data: st.DataObject
) -> None:
    before, after, base, said = recorded
    direct = data.draw(st.booleans())
    if direct:
        said = said[len(next(messages(said))[1]) :]
    heads = list(itertools.accumulate((len(whole) for _, whole in messages(said)), initial=0))
    at = data.draw(
        st.integers(0, len(said) - 1)
        | st.sampled_from(heads[:-1]).flatmap(lambda head: st.integers(head, head + wire.HEAD.size - 1))
    )
    damage = data.draw(st.sampled_from(["flip", "cut", "drop", "double", "insert"]))
    rest = said[at + 1 :]
    says = {
        "flip": said[:at] + bytes([said[at] ^ data.draw(st.integers(1, 255))]) + rest,
        "cut": said[:at],
        "drop": said[:at] + rest,
        "double": said[: at + 1] + said[at:],
        "insert": said[:at] + data.draw(st.binary(min_size=1, max_size=64)) + said[at:],
    }[damage]
    if hears(tmp_path / "os.raw", before, base, says, direct):
        assert (tmp_path / "os.raw").read_bytes() == after


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_messages_in_another_order_are_never_taken_for_a_good_run(
    recorded: Recorded, tmp_path: Path, data: st.DataObject
) -> None:
    before, after, base, said = recorded
    parts = [whole for _, whole in messages(said)]
    chosen = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=2 * len(parts)))
    direct = data.draw(st.booleans())
    says = (b"" if direct else parts[0]) + b"".join(parts[index] for index in chosen)
    if hears(tmp_path / "os.raw", before, base, says, direct):
        assert (tmp_path / "os.raw").read_bytes() == after


def message(
    kind: int,
    index: int = 0,
    count: int = 0,
    payload: bytes = b"",
    digest: bytes = ZERO,
    packing: int = wire.RAW,
    length: int | None = None,
) -> bytes:
    size = len(payload) if length is None else length
    return wire.HEAD.pack(kind, packing, index, count, size, digest) + payload


def document(kind: int, content: object) -> bytes:
    return message(kind, payload=json.dumps(content).encode())


TINY = replace(Manifest.new(3 * CHUNK + 512, CHUNK, "", UNKNOWN), fresh=False)


def ask(index: int, count: int = 1) -> bytes:
    return message(wire.ASK, index, count, bytes(wire.DIGEST * count))


class Drip:
    """An agent that says one byte at a time."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._rest = message(wire.READY, payload=b" " * 60000)

    def read(self, size: int) -> bytes:
        del size
        if self.closed.wait(0.01):
            raise StreamEnded("closed")
        first, self._rest = self._rest[:1], self._rest[1:]
        return first

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        self.closed.set()


def test_an_agent_that_is_never_ready_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coriolis_azure.readers.conversation.SILENCE_SECONDS", 0.3)
    with Guarded(path) as image:
        image.known("id", TINY.size, CHUNK, full=False)
        with pytest.raises(StreamEnded):
            by_agent(Drip, Job(("/dev/x",), TINY.size, wait=0.0), TINY, image)


READY = document(wire.READY, {"size": TINY.size, "hash": TINY.hash})
DATA_DIGEST = TINY.digester()(b"d" * CHUNK)


@pytest.mark.parametrize(
    ("says", "error"),
    {
        "not ready": (document(wire.END, {}), StreamEnded),
        "another disk": (document(wire.READY, {"size": 1, "hash": "blake2b"}), StreamEnded),
        "no JSON": (message(wire.READY, payload=b"\xff"), StreamEnded),
        "deep JSON": (message(wire.READY, payload=b"[" * 60000), StreamEnded),
        "long number": (message(wire.READY, payload=b"9" * 60000), StreamEnded),
        "a list": (document(wire.READY, []), StreamEnded),
        "endless": (message(wire.READY, length=1 << 31), StreamEnded),
        "unknown kind": (READY + message(99), StreamEnded),
        "a job": (READY + message(wire.JOB), StreamEnded),
        "endless run": (READY + message(wire.SAME, length=1), StreamEnded),
        "empty run": (READY + message(wire.ZEROS, 0, 0), StreamEnded),
        "run past the end": (READY + message(wire.ZEROS, 0, 5), StreamEnded),
        "huge run": (READY + message(wire.ZEROS, 0, (1 << 32) - 1), StreamEnded),
        "out of order": (READY + message(wire.ZEROS, 1, 1), StreamEnded),
        "patch unasked": (READY + message(wire.PATCH, 0, 0), StreamEnded),
        "too many asks": (
            READY + b"".join(map(ask, range(4))) + ask(4),
            StreamEnded,
        ),
        "asks past the end": (READY + ask(0, 5), StreamEnded),
        "no ask": (READY + message(wire.ASK), StreamEnded),
        "short ask": (READY + message(wire.ASK, 0, 2, bytes(wire.DIGEST)), StreamEnded),
        "long ask": (READY + message(wire.ASK, 0, 1, bytes(wire.DIGEST * 2)), StreamEnded),
        "end too early": (READY + message(wire.ZEROS, 0, 1) + document(wire.END, {}), StreamEnded),
        "end unpatched": (
            READY + message(wire.ZEROS, 0, 3) + ask(3) + document(wire.END, {}),
            StreamEnded,
        ),
        "no root": (READY + message(wire.ZEROS, 0, 4) + document(wire.END, {"root": 1}), StreamEnded),
        "wrong root": (
            READY + message(wire.ZEROS, 0, 4) + document(wire.END, {"root": ""}),
            CorruptChunk,
        ),
        "unknown said to be same": (READY + message(wire.SAME, 0, 4), CorruptChunk),
        "gave up": (
            READY + document(wire.ERROR, {"message": "bad\n\x1b[31m block", "offset": 512}),
            AgentFailed,
        ),
        "gave up strangely": (READY + document(wire.ERROR, {"message": [], "offset": "x"}), AgentFailed),
        "too much data": (READY + message(wire.DATA, 0, 1, length=2 * CHUNK), StreamEnded),
        "fewer pieces": (READY + message(wire.DATA, 0, 1), CorruptChunk),
        "many pieces": (READY + message(wire.DATA, 0, (1 << 32) - 1, b"x"), CorruptChunk),
        "bytes over": (READY + message(wire.DATA, 0, 0, b"x"), CorruptChunk),
        "piece outside": (
            READY + message(wire.DATA, 0, 1, wire.PIECE.pack(CHUNK, 1, False) + b"x"),
            CorruptChunk,
        ),
        "piece too long": (
            READY + message(wire.DATA, 0, 1, wire.PIECE.pack(0, 2, False) + b"x"),
            CorruptChunk,
        ),
        "huge piece": (READY + message(wire.DATA, 0, 1, wire.PIECE.pack(0, 1 << 31, True)), CorruptChunk),
        "empty piece": (READY + message(wire.DATA, 0, 1, wire.PIECE.pack(0, 0, False)), CorruptChunk),
        "pieces that overlap": (
            READY + message(wire.DATA, 0, 2, wire.PIECE.pack(0, 9, True) + wire.PIECE.pack(8, 9, True)),
            CorruptChunk,
        ),
        "wrong digest": (
            READY + message(wire.DATA, 0, 1, wire.PIECE.pack(0, CHUNK, False) + b"e" * CHUNK, DATA_DIGEST),
            CorruptChunk,
        ),
        "content called zeros": (
            READY + message(wire.DATA, 0, 1, wire.PIECE.pack(0, CHUNK, False) + b"e" * CHUNK),
            CorruptChunk,
        ),
        "unknown packing": (READY + message(wire.DATA, 0, 0, b"", packing=7), CorruptChunk),
        "damaged packing": (READY + message(wire.DATA, 0, 0, b"zip", packing=wire.ZLIB), CorruptChunk),
        "nothing more": (READY, StreamEnded),
        "nothing": (b"", StreamEnded),
    }.values(),
)
def test_what_is_not_in_the_protocol_is_refused(
    path: Path, says: bytes, error: type[CoriolisAzureError]
) -> None:
    with Guarded(path) as image:
        image.known("", TINY.size, CHUNK, full=False)
        task = Job(("/dev/x",), TINY.size, leaf=LEAF)
        with pytest.raises(error) as failure:
            by_agent(lambda: Voice(says), task, TINY, image)
        assert not image.was_committed
    assert failure.value.message.isprintable()


LONG = {
    "READY": message(wire.READY, length=1 << 31),
    "ERROR": message(wire.ERROR, length=(1 << 32) - 1),
    "SAME": READY + message(wire.SAME, 0, 1, length=1),
    "ASK": READY + message(wire.ASK, 0, 1, length=wire.DIGEST * (wire.RUNS[wire.ASK] + 1)),
    "DATA": READY + message(wire.DATA, 0, 1, length=2 * CHUNK),
    "PATCH": READY + ask(0) + message(wire.PATCH, 0, 1, length=1 << 31),
}


@pytest.mark.parametrize("says", LONG.values(), ids=LONG)
def test_a_message_that_is_too_long_is_refused_before_it_is_received(path: Path, says: bytes) -> None:
    with Guarded(path) as image:
        image.known("", TINY.size, CHUNK, full=False)
        task = Job(("/dev/x",), TINY.size, leaf=LEAF)
        with pytest.raises(StreamEnded, match=r"message \d+ of \d+ bytes"):
            by_agent(lambda: Voice(says), task, TINY, image)


@pytest.mark.parametrize(
    ("packing", "packed"), [(wire.ZLIB, zlib.compress), (wire.ZSTD, zstd.compress)], ids=["zlib", "zstd"]
)
def test_a_bomb_is_not_unpacked_further_than_a_chunk_may_be(
    path: Path, packing: int, packed: Callable[[bytes], bytes]
) -> None:
    bomb = packed(bytes(50 << 20))
    assert len(bomb) < CHUNK
    says = READY + message(wire.DATA, 0, 1, bomb, packing=packing)
    with Guarded(path) as image:
        image.known("", TINY.size, CHUNK, full=False)
        task = Job(("/dev/x",), TINY.size, leaf=LEAF)
        tracemalloc.start()
        try:
            with pytest.raises(CorruptChunk):
                by_agent(lambda: Voice(says), task, TINY, image)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert most < 25 << 20  # what threads of earlier tests hold is counted in


def test_a_chunk_that_is_not_due_is_refused_as_such_and_nothing_is_written(path: Path) -> None:
    with Guarded(path) as image:
        image.known("", TINY.size, CHUNK, full=False)
        says = READY + message(wire.ZEROS, 1, 1)
        task = Job(("/dev/x",), TINY.size, leaf=LEAF)
        with pytest.raises(StreamEnded, match="where chunk 0 is due"):
            by_agent(lambda: Voice(says), task, TINY, image)
    assert not list(path.parent.glob("os.raw*"))


def test_asking_is_only_for_a_host_that_offered_leaves(path: Path) -> None:
    with Guarded(path) as image:
        image.known("", TINY.size, CHUNK, full=False)
        task = Job(("/dev/x",), TINY.size, leaf=0)
        with pytest.raises(StreamEnded, match="one too many"):
            by_agent(
                lambda: Voice(READY + ask(0)),
                task,
                TINY,
                image,
                silent,
                clock=Clock(),
                verify=False,
            )


# Size

LARGE = """
import re, sys
from pathlib import Path
from typing import Any
sys.path[:0] = [{tests!r}, {root!r}]
from harness.pipes import Pipes
from harness.clocks import Held
from harness.copies import by_agent
from harness.images import Image
from coriolis_azure.readers.conversation import Job

def peak(process):
    # Not getrusage: that begins with what the parent had when it started the process.
    found = re.search("VmHWM:\\s*(\\d+) kB", Path(f"/proc/{{process}}/status").read_text())
    return int(found[1]) >> 10 if found else 0  # a process that has just ended has no memory

class Watched(Pipes):
    peak = 0

    def read(self, size):
        self.peak = max(self.peak, peak(self.process.pid))
        data = super().read(size)
        self.heard.clear()
        return data

disk = Path({disk!r})
size = disk.stat().st_size
imported = peak("self")
with Image(Path({image!r})) as image, Watched() as pipes:
    base = image.known("id", size, {chunk}, full=False)
    job = Job((str(disk),), size)
    outcome = by_agent(lambda: pipes, job, base, image)
    pipes.process.wait(30)
print(outcome.sent_bytes, outcome.read_bytes, peak("self") - imported, pipes.peak)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mostly empty disk of 4 GiB. One for all tests: the first reading of so many holes takes seconds."""
    disk = tmp_path_factory.mktemp("large") / "disk"
    with disk.open("wb") as file:
        file.truncate(4 << 30)
    return disk


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1 << 20, 4 << 20], ids=["1 MiB", "4 MiB"])
def test_memory_does_not_grow_with_the_disk(tmp_path: Path, large: Path, chunk: int) -> None:
    image = tmp_path / "os.raw"
    program = textwrap.dedent(LARGE).format(
        tests=str(Path(__file__).parent),
        root=str(Path(agent.__file__).parent.parent.parent),
        disk=str(large),
        image=str(image),
        chunk=chunk,
    )
    for run in ("first", "incremental"):
        change(large, 2 << 30, os.urandom(64 << 20))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        sent, read, host, worker = map(int, done.stdout.split())
        assert (sent, read) == (64 << 20, 4 << 30)
        print(f"{run}: host {host} MiB besides what it has imported, agent {worker} MiB")
        assert host < 64, f"{run}: the host needed {host} MiB"
        assert worker < 64, f"{run}: the agent needed {worker} MiB"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_full_destination_ends_the_run_and_says_so(disk: Path, path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * CHUNK + 100, hard))
        try:
            replicate(disk, path)
        except DestinationFailed as failure:
            os._exit(0 if "file size limit" in failure.remedy else 2)
        except BaseException:  # noqa: BLE001
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
