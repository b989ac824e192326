"""What is read from snapshots at a time: requests by the rate of their host, and bytes by how many disks are read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coriolis_azure.azure.pace import Pace, Rate
from coriolis_azure.events import Copied, Event
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.constants import MIB


def settled(at_once: int, most: int = 32) -> list[int]:
    """The limits, round by round, at a host that serves no more than `at_once` requests at a time."""
    rate, limits = Rate(most), list[int]()
    for _ in range(100):
        limits.append(rate.limit)
        rate.judge(float(min(rate.limit, at_once)))
    return limits


@pytest.mark.parametrize("at_once", [3, 8, 11, 20, 27])
def test_the_number_grows_as_long_as_it_pays_and_stays_near_what_the_host_serves(at_once: int) -> None:
    limits = settled(at_once)
    assert max(limits) <= max(8, at_once) * 1.25**2
    after = limits[20:]
    assert sum(after) / len(after) >= 0.9 * at_once
    tries = sum(after[at] != after[at - 1] for at in range(1, len(after)))
    assert tries <= 10  # it rests between the tries


def test_the_number_does_not_exceed_the_most() -> None:
    assert settled(1000)[-1] == 32
    assert set(settled(1000, most=4)) == {4}


def test_busy_halves_the_number_down_to_two_and_no_try_follows_at_once() -> None:
    rate = Rate(32)
    for expected in (4, 2, 2):
        rate.busy()
        assert rate.limit == expected
    for _ in range(20):
        rate.judge(1.0)
        assert rate.limit == 2
    rate.judge(1.0)
    assert rate.limit == 3


def test_requests_beyond_the_number_wait_and_busy_counts_once_a_round() -> None:
    pace, released = Pace(Held(), 32), threading.Event()
    under_way, lock, most = [0], threading.Lock(), [0]
    eight = threading.Semaphore(0)

    def request(_: int) -> None:
        with pace.request(4096):
            with lock:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            eight.release()
            released.wait()
            with lock:
                under_way[0] -= 1

    with ThreadPoolExecutor(20) as pool:
        requests = [pool.submit(request, number) for number in range(20)]
        for _ in range(8):
            assert eight.acquire(timeout=20)
        pace.busy()
        pace.busy()
        released.set()
        for each in requests:
            each.result(20)
    assert most[0] == 8
    assert pace.limit == 4


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_requests_at_a_host_that_is_busy(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The host refuses what goes beyond three reads at a time. The library's retries wait a second and more."""
    disk = image("os", 24 * MIB, seed=1)
    azure.add_vm("web", disk)
    reads, refused = threading.Semaphore(3), [0]

    def serve(request: Request, answer: Callable[[Request], Response]) -> Response:
        if not (request.path.startswith("/md-") and request.method == "GET" and "comp" not in request.query):
            return answer(request)
        if not reads.acquire(blocking=False):
            refused[0] += 1
            return Response(503, {"x-ms-error-code": "ServerBusy"}, b"")
        try:
            return answer(request)
        finally:
            reads.release()

    azure.intercept = serve
    (report,) = (
        connect(environment={"replica_export_mechanism": "snapshots"})
        .replicate("web", tmp_path / "images")
        .disks
    )
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert report.verified
    assert 0 < refused[0] < 24  # once the number is down, few are refused


def read_at(request: Request) -> int | None:
    """Where a request reads the content of a snapshot, in MiB; None if it does something else."""
    if not request.path.startswith("/md-") or request.method != "GET" or "comp" in request.query:
        return None
    return int(str(request.header("x-ms-range")).removeprefix("bytes=").partition("-")[0]) // MIB


@pytest.mark.slow
def test_a_disk_whose_neighbours_have_ended_has_all_bytes_to_itself(
    azure: Sandbox, image: Callable[..., Path], tmp_path: Path
) -> None:
    """Three disks share 6 MiB. Of the large one, two chunks are read at a time; six, once the others have ended."""
    disk = image("os", 24 * MIB, seed=1)
    azure.add_vm("web", disk, [image("a", MIB), image("b", MIB)])
    small_ended, changed = threading.Event(), threading.Condition()
    ended, under_way, most = set[str](), [0], {"shared": 0, "alone": 0}

    def report(event: Event) -> None:
        if isinstance(event, Copied) and event.done == event.total and event.disk != "os":
            ended.add(event.disk)
            if len(ended) == 2:
                small_ended.set()

    def serve(request: Request, answer: Callable[[Request], Response]) -> Response:
        at = read_at(request)
        if not at:  # the small disks are read at 0 only
            return answer(request)
        with changed:
            under_way[0] += 1
            share = "alone" if small_ended.is_set() else "shared"
            most[share] = max(most[share], under_way[0])
            changed.notify_all()
            if at >= 16:
                changed.wait_for(lambda: most["alone"] >= 6, 20)
        try:
            if at < 3:
                assert small_ended.wait(20)
            return answer(request)
        finally:
            with changed:
                under_way[0] -= 1

    azure.intercept = serve
    settings = {**azure.environment(), "replica_export_mechanism": "snapshots"}
    with Source(azure.connection_info(), settings, report=report, transport=azure.transport()) as source:
        source.replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert most == {"shared": 2, "alone": 6}


def test_the_largest_disks_are_copied_first_and_reported_in_the_order_of_the_vm(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Callable[..., Path],
    told: list[Event],
    tmp_path: Path,
) -> None:
    """With chunks of 4 MiB, one disk is read from its snapshot at a time."""
    sizes = {"os": 2, "data-0": 1, "data-1": 5, "data-2": 2}
    os, *data = (image(name, size * MIB) for name, size in sizes.items())
    azure.add_vm("web", os, data)
    source = connect(environment={"replica_export_mechanism": "snapshots", "chunk_size_kib": 4096})
    result = source.replicate("web", tmp_path / "images")
    copied = [event.disk for event in told if isinstance(event, Copied) and event.done == event.total]
    assert list(dict.fromkeys(copied)) == ["data-1", "os", "data-2", "data-0"]
    assert [disk.name for disk in result.disks] == list(sizes)
