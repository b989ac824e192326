"""Poor workers and poor lines: slower, but right, and the progress says why."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coriolis_azure.agent import wire
from coriolis_azure.clock import Clock
from coriolis_azure.events import Copied, Event, Notice, Waiting, silent
from coriolis_azure.readers import rate_limiter
from coriolis_azure.readers.agents import AgentReader
from coriolis_azure.readers.channel import Direct
from coriolis_azure.readers.conversation import Job
from coriolis_azure.readers.flow import Flow
from coriolis_azure.readers.reader import Data
from coriolis_azure.replica import manifest
from harness.clocks import Held
from harness.copies import replicate
from harness.direct import ADDRESS, Worker, copied
from harness.pipes import AGENT, Pipes
from loads import Watched

pytestmark = pytest.mark.slow

MIB = 1 << 20
LINE = 125_000  # bytes a second of 1 Mbit/s

# Each question for the time of day is answered with another year than the one before, or all with another one.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static time_t jump(void) {
    static unsigned asked;
    static const int years[] = {YEARS};
    return (time_t)years[__atomic_fetch_add(&asked, 1, __ATOMIC_RELAXED) % 5] * 365 * 24 * 3600;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (!failed && id == CLOCK_REALTIME) now->tv_sec += jump();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *place) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (place) *place = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(3).randbytes(24 * MIB) + bytes(3 * MIB) + b"text " * 20000)
    return path


class Poor(Watched):
    """An agent on one core, that may have 1.75 GiB of addresses."""

    _CONFINED = (
        "import os, resource, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "resource.setrlimit(resource.RLIMIT_AS, (1792 << 20, 1792 << 20)); os.execv(sys.executable, sys.argv[1:])"
    )

    def __init__(self) -> None:
        super().__init__(program=["-c", self._CONFINED, sys.executable, *AGENT])


@contextmanager
def one_core() -> Iterator[None]:
    """This thread, and those that it starts, share one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("chunk", [1 << 20, 4 << 20])
def test_one_core_on_both_sides_and_little_memory_are_enough(disk: Path, chunk: int) -> None:
    for sent in (24 * MIB, 4096):
        worker = Poor()
        with one_core():
            outcome = replicate(disk, disk.with_name("os.raw"), stream=worker, chunk=chunk, compress="auto")
        assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
        assert outcome.verified
        assert sent <= outcome.sent_bytes <= sent + (3 * wire.GRAIN if outcome.full else 0)
        assert 0 < worker.most <= 64
        with disk.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"changed")


@pytest.mark.parametrize("years", ["-50, -50, -50, -50, -50", "50, 50, 50, 50, 50", "0, -30, 50, -50, 10"])
def test_a_worker_whose_clock_is_wrong_or_jumps_does_not_notice(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: str
) -> None:
    """By decades, before and after any certificate was made; also on the direct channel."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler: cc or gcc")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK.replace("YEARS", years))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    program = [sys.executable, "-c", "import time; print(*(time.gmtime().tm_year for _ in range(5)))"]
    told: list[Event] = []
    with socket.create_server((ADDRESS, 0)) as listener:
        port = int(listener.getsockname()[1])
    direct = Direct(ADDRESS, port, told.append)
    for change in (b"", b"new"):
        with disk.open("r+b") as file:
            file.write(change)
        with monkeypatch.context() as patched:
            patched.setenv("LD_PRELOAD", str(library))
            seen = subprocess.run(program, check=True, capture_output=True).stdout.split()
            assert len(set(seen)) == len(set(years.split(", ")))
            assert set(seen) - {str(time.gmtime().tm_year).encode()}
            worker = Worker()
        copied(disk, worker, direct, told)
        assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
        assert len(worker.heard) < 1000  # the rest came over the direct channel
    assert not [event for event in told if isinstance(event, Notice)]


class Slow(Pipes):
    """An agent at the end of a line of 1 Mbit/s, in the time of `clock`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def read(self, size: int, /) -> bytes:
        data = super().read(min(size, 4096))
        self._clock.sleep(len(data) / LINE)
        return data


def test_on_a_line_of_1_mbit_the_progress_says_that_it_is_the_worker_or_the_line(disk: Path) -> None:
    told: list[Event] = []
    clock = Held()
    replicate(
        *(disk, disk.with_name("os.raw")),
        report=told.append,
        chunk=MIB,
        compress="auto",
        stream=Slow(clock),
        clock=clock,
    )
    assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
    assert 24 * MIB / LINE < clock.monotonic() < 1.05 * 24 * MIB / LINE
    progress = [event for event in told if isinstance(event, Copied)]
    assert len(progress) > 10
    assert {event.bottleneck for event in progress[1:-1]} == {"source"}


@pytest.mark.parametrize("what", ["destination", "limit", ""])
def test_the_progress_says_what_else_holds_it_up(disk: Path, what: str) -> None:
    """Nothing where two things take as long."""
    clock = Held()
    size = disk.stat().st_size
    limiter = rate_limiter.RateLimiter(LINE, clock) if what != "destination" else None
    base = manifest.Manifest.new(size, MIB, "id", wire.ZERO)
    job = Job((str(disk),), size, wait=0.0)
    with Pipes() as pipes:
        flow = Flow("os", silent, clock, limiter)
        reader = AgentReader(lambda: pipes, job, flow)
        reader.begin(base, unit=0)
        assert reader.bottleneck() == ""
        said = []
        for chunk in reader.scan():
            if what == "destination":
                clock.sleep(3.0)
            elif not what:
                flow._spent = dict.fromkeys(flow._spent, 1.0)
            if isinstance(chunk, Data):
                chunk.done()
            said.append(reader.bottleneck())
    assert set(said[1:]) == {what}


class Stalling(Pipes):
    """An agent of which, once it has said 4 MiB, nothing comes until `told` of that has been called."""

    def __init__(self) -> None:
        super().__init__()
        self._stalls, self._goes_on = threading.Event(), threading.Event()

    def told(self, event: Event) -> list[Waiting]:
        """`event` if it is of the stall, after which it goes on."""
        if self._stalls.is_set() and isinstance(event, Waiting) and "stalls" in event.what:
            self._goes_on.set()
            return [event]
        return []

    def read(self, size: int, /) -> bytes:
        if len(self.heard) > 4 * MIB:
            self._stalls.set()
            assert self._goes_on.wait(60)
        return super().read(size)


def test_a_line_that_stalls_is_waited_for_and_the_progress_says_so(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coriolis_azure.readers.flow._QUIET_SECONDS", 0.1)
    told: list[Waiting] = []
    stream = Stalling()

    def report(event: Event) -> None:
        told.extend(stream.told(event))

    replicate(disk, disk.with_name("os.raw"), stream=stream, report=report, chunk=MIB)
    assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
    assert told[0].what.startswith("os: data from the worker: its disk or the network stalls, for ")
    assert told[0].seconds is not None
    assert 200 < told[0].seconds < 300
