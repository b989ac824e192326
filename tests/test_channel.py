"""The direct channel: the real agent at a port of this host, strangers at it, and no way through."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coriolis_azure.agent import wire
from coriolis_azure.agent.tls import STRIPE, Listener, Stripes, Tls
from coriolis_azure.events import Event, Notice
from coriolis_azure.readers.channel import Direct
from coriolis_azure.readers.conversation import Job
from harness.copies import by_agent
from harness.direct import ADDRESS, CHUNK, Worker, copied
from harness.images import Image


@pytest.fixture
def port() -> int:
    with socket.create_server((ADDRESS, 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(20 * CHUNK) + bytes(3 * CHUNK) + b"end" * 512)
    return path


def test_data_comes_over_tls_and_only_ready_over_the_stream(disk: Path, port: int) -> None:
    told: list[Event] = []
    direct = Direct(ADDRESS, port, told.append)
    for change in (b"", b"new"):
        with disk.open("r+b") as file:
            file.write(change)
        worker = Worker()
        copied(disk, worker, direct, told)
        assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
        kind, _, _, _, length, _ = wire.HEAD.unpack_from(worker.heard)
        assert (kind, len(worker.heard)) == (wire.READY, wire.HEAD.size + length)
    assert not [event for event in told if isinstance(event, Notice)]


def test_a_worker_that_is_far_away_has_several_connections(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coriolis_azure.readers.channel._NEAR_SECONDS", 1e-9)
    disk, told, counted = tmp_path / "disk", list[Event](), list[int]()
    disk.write_bytes(os.urandom(5 * STRIPE + 4096))
    direct = Direct(ADDRESS, port, told.append)
    connect = direct.connect

    def noted(port: int) -> Stripes | None:
        channel = connect(port)
        counted.append(len(channel or []))
        return channel

    monkeypatch.setattr(direct, "connect", noted)
    copied(disk, Worker(), direct, told)
    assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
    assert counted == [4]
    assert not [event for event in told if isinstance(event, Notice)]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_connections_that_cannot_be_had_are_done_without(
    disk: Path, port: int, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    monkeypatch.setattr("coriolis_azure.readers.channel._NEAR_SECONDS", 1e-9)
    told, tried = list[Event](), list[int]()
    direct = Direct(ADDRESS, port, told.append)
    greeted = direct._greeted

    def reset(connection: socket.socket, number: int) -> Tls:
        tried.append(number)
        if number == lost:
            connection.close()
        return greeted(connection, number)

    monkeypatch.setattr(direct, "_greeted", reset)
    copied(disk, Worker(), direct, told)
    assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
    assert tried == list(range(lost + 1))
    assert not [event for event in told if isinstance(event, Notice)]


@given(
    sizes=st.lists(st.integers(1, 3 * STRIPE), max_size=6), takes=st.lists(st.integers(1, STRIPE), min_size=1)
)
def test_a_stream_over_several_connections_arrives_as_it_was_written(
    sizes: list[int], takes: list[int]
) -> None:
    data = random.Random(str(sizes)).randbytes(sum(sizes))
    pipes = [Pipe() for _ in range(3)]
    one, other = Stripes(cast("list[Tls]", pipes)), Stripes(cast("list[Tls]", pipes))
    at, buffers = 0, []
    for size in sizes:
        buffers.append(data[at : at + size])
        at += size
    one.write(buffers[:2])
    for buffer in buffers[2:]:
        one.write([buffer])
    found, turns = bytearray(), itertools.cycle(takes)
    while len(found) < len(data):
        room = bytearray(next(turns))
        found += room[: other.read_into(memoryview(room))]
    assert found == data
    assert all(pipe.laid <= len(data) // 3 + STRIPE for pipe in pipes)


class Pipe:
    """Bytes in order, as a connection carries them."""

    def __init__(self) -> None:
        self._held, self.laid = bytearray(), 0

    def write(self, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            self._held += buffer
            self.laid += len(buffer)

    def read_into(self, view: memoryview) -> int:
        part = self._held[: len(view)]
        del self._held[: len(part)]
        view[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("why", ["nobody listens", "a stranger listens", "no address"])
def test_where_there_is_no_way_data_comes_over_the_stream_and_it_is_said_once(
    disk: Path, port: int, why: str
) -> None:
    told: list[Event] = []
    direct = Direct(ADDRESS, port, told.append)
    if why == "nobody listens":
        direct._address = "127.0.0.2"
    with socket.create_server(("127.0.0.2", port)) as stranger:
        if why == "a stranger listens":
            direct._address = "127.0.0.2"
            direct._context = Silent(stranger)  # type: ignore[assignment]
        else:
            stranger.close()
        worker = Worker("" if why == "no address" else ADDRESS)
        copied(disk, worker, direct, told)
    assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
    assert len(worker.heard) > 20 * CHUNK
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert len(notices) == 1
    assert notices[0].startswith("data comes over SSH")
    assert direct.offer(1) is None


class Silent:
    """A TLS context for a peer that hangs up."""

    def __init__(self, stranger: socket.socket) -> None:
        self._stranger = stranger

    def wrap_bio(self, *arguments: object, **options: object) -> object:
        self._stranger.accept()[0].close()
        raise OSError("it hung up")


def test_a_stranger_who_greets_for_ever_is_hung_up_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte at a time, of a message of TLS that may have 16 KiB."""
    monkeypatch.setattr("coriolis_azure.readers.channel._HANDSHAKE_SECONDS", 0.5)
    told: list[Event] = []

    def drip() -> None:
        connection, _ = stranger.accept()
        with connection, suppress(OSError):
            connection.sendall(b"\x16\x03\x03\x40\x00")
            while not gone.wait(0.05):
                connection.sendall(b"\x02")

    gone = threading.Event()
    with socket.create_server((ADDRESS, port)) as stranger:
        dripping = threading.Thread(target=drip)
        dripping.start()
        assert Direct(ADDRESS, port, told.append).connect(port) is None
        gone.set()
        dripping.join()
    assert [event.text for event in told if isinstance(event, Notice)]


@pytest.mark.parametrize("fault", ["it ended", "timed out"])
def test_a_channel_through_which_nothing_comes_is_not_tried_again(
    disk: Path, port: int, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """As by a firewall that lets connections be made and nothing through, or by a worker that stands still."""
    told: list[Event] = []
    workers: list[Worker] = []
    direct = Direct(ADDRESS, port, told.append)
    monkeypatch.setattr("coriolis_azure.readers.channel.SILENCE_SECONDS", 0.5)
    connect = direct.connect

    def hung_up() -> None:
        raise EOFError

    def faulty(port: int) -> Stripes | None:
        channel = connect(port)
        assert channel is not None
        if fault == "it ended":
            monkeypatch.setattr(
                channel._connections[0], "_fill", hung_up
            )  # our end alone: the agent is to notice nothing yet
        else:
            workers[0].process.send_signal(signal.SIGSTOP)
        return channel

    def start() -> Worker:
        workers.append(Worker())
        return workers[-1]

    monkeypatch.setattr(direct, "connect", faulty)
    size = disk.stat().st_size
    with Image(disk.with_name("os.raw")) as image:
        base = image.known("id", size, CHUNK, full=False)
        job = Job((str(disk),), size, wait=0.0)
        by_agent(start, job, base, image, told.append, direct=direct)
    for worker in workers:
        worker.__exit__()
    assert disk.with_name("os.raw").read_bytes() == disk.read_bytes()
    assert len(workers) == 2
    broke = f"the direct channel to the worker was lost: {fault}"
    assert [event.text for event in told if isinstance(event, Notice)] == [
        f"data comes over SSH, which is slower: {broke}",
        f"os: {broke}; continuing after 0 of {size} bytes",
    ]


def test_each_side_takes_one_certificate_and_no_other(port: int) -> None:
    ours, other = Direct(ADDRESS, port, print), Direct(ADDRESS, port, print)
    offer = ours.offer(0)
    assert offer
    listener = Listener(ADDRESS, offer)
    assert other.connect(port) is None  # it has another certificate, and expects another one
    channel = ours.connect(port)
    assert channel
    theirs = listener.host(1)
    theirs.write([b"hello"])
    room = bytearray(5)
    assert channel.read_into(memoryview(room)) == 5
    assert bytes(room) == b"hello"
    channel.close()
    theirs.close()
