"""The direct channel: the real agent at a port of this host, strangers at it, and no way through."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from coriolis_azure.agent import wire
from coriolis_azure.agent.tls import Listener, Tls
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

    def faulty(port: int) -> Tls | None:
        tls = connect(port)
        assert tls is not None
        if fault == "it ended":
            monkeypatch.setattr(tls, "_fill", hung_up)  # our end alone: the agent is to notice nothing yet
        else:
            workers[0].process.send_signal(signal.SIGSTOP)
        return tls

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
    theirs = listener.host()
    theirs.write([b"hello"])
    room = bytearray(5)
    assert channel.read_into(memoryview(room)) == 5
    assert bytes(room) == b"hello"
    channel.close()
    theirs.close()
