"""A transfer outlives its connections: what had arrived is kept, what was under way is sent again."""

from __future__ import annotations

import io
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

import paramiko
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coriolis_azure import errors, transfer
from coriolis_azure.agent import wire
from coriolis_azure.azure import names
from coriolis_azure.clock import Clock
from coriolis_azure.events import Event, Notice, Waiting, silent
from coriolis_azure.readers import keys, ssh
from coriolis_azure.replica.medium import Content
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.constants import MIB
from harness.copies import CHUNK, LEAF, Lying, by_agent, change, job, replicate
from harness.images import Image
from harness.pipes import Pipes
from harness.relay import Relay
from harness.waiting import eventually

pytestmark = pytest.mark.slow


class Broken(Pipes):
    """An agent whose connection breaks once it has said so many bytes."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last
        self.first = -1  # the chunk that it was told to begin with

    def read(self, size: int, /) -> bytes:
        if len(self.heard) + size > self._last:
            self.close()
            raise errors.ConnectionLost("the connection broke")
        return super().read(size)

    def write(self, data: bytes, /) -> None:
        kind, _, index, *_ = wire.HEAD.unpack(data[: wire.HEAD.size])
        if self.first < 0 and kind in (wire.BASE, wire.PART):
            self.first = index
        try:
            super().write(data)
        except errors.StreamEnded as error:
            raise errors.ConnectionLost("the connection broke") from error


class Agents:
    """Agents that are started one after the other; each but the last breaks off after so many bytes."""

    def __init__(self, breaks: list[int]) -> None:
        self._breaks = breaks
        self.started: list[Broken] = []

    def __call__(self) -> Pipes:
        number = len(self.started)
        self.started.append(Broken(self._breaks[number] if number < len(self._breaks) else 1 << 60))
        return self.started[-1]

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *error: object) -> None:
        for pipes in self.started:
            pipes.__exit__()

    @property
    def heard(self) -> int:
        """The bytes that have come from all agents."""
        return sum(len(pipes.heard) for pipes in self.started)


class Once(Image):
    """An image in which no byte may be written twice."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []

    def write(self, offset: int, data: Content) -> None:
        self.ranges.append((offset, offset + len(data)))
        super().write(offset, data)

    def twice(self) -> bool:
        return any(one[1] > other[0] for one, other in itertools.pairwise(sorted(self.ranges)))


def copied(disk: Path, path: Path, agents: Agents, told: list[Event] | None = None) -> transfer.Outcome:
    with Once(path) as image:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        report = silent if told is None else told.append
        outcome = by_agent(agents, job(disk), base, image, report)
        assert not image.twice()
    return outcome


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(20 * CHUNK) + bytes(3 * CHUNK) + b"end" * 512)
    return path


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_copy_that_breaks_anywhere_is_the_same_copy(tmp_path: Path, data: st.DataObject) -> None:
    """Full and incremental; the figures are those of a run that did not break, and no byte is written twice."""
    chance = random.Random(data.draw(st.integers(0, 1 << 30)))
    folder = Path(mkdtemp(dir=tmp_path))  # what an earlier example has fetched is of no use to this one
    disk, one, other = folder / "disk", folder / "os.raw", folder / "data-1.raw"
    parts = [chance.choice([bytes(CHUNK), chance.randbytes(CHUNK), b"x" * CHUNK]) for _ in range(12)]
    disk.write_bytes(b"".join(parts) + b"end" * 512)
    for path in (one, other):
        if data.draw(st.booleans(), label="incremental") if path == one else one.exists():
            replicate(disk, path)
    if one.exists():
        for _ in range(8):
            content = chance.choice([bytes(CHUNK), chance.randbytes(100), chance.randbytes(CHUNK)])
            change(disk, chance.randrange(disk.stat().st_size - CHUNK), content)
    with Agents([]) as unbroken:
        expected = copied(disk, one, unbroken)
    breaks = data.draw(st.lists(st.integers(0, 12 * CHUNK), max_size=5))
    fruitless = [at for at in breaks if at < CHUNK + LEAF]  # READY and the heads come on top
    with Agents(breaks) as agents:
        try:
            outcome = copied(disk, other, agents)
        except errors.ConnectionLost:
            assert len(fruitless) >= 3  # those that break before a chunk has come may be too many in a row
            return
        # The agents time their hashes, so READY may name another.
        assert agents.heard <= unbroken.heard + len(breaks) * (20 * CHUNK) + 64
    assert other.read_bytes() == disk.read_bytes()
    figures = ("read_bytes", "sent_bytes", "zero_bytes", "skipped_bytes", "verified", "full")
    assert [getattr(outcome, name) for name in figures] == [getattr(expected, name) for name in figures]


class BreaksAtPatch(Pipes):
    """An agent whose connection breaks as it begins to send a part of a chunk."""

    def read(self, size: int, /) -> bytes:
        said = super().read(size)
        if size == wire.HEAD.size and said[0] == wire.PATCH:
            self.close()
            raise errors.ConnectionLost("the connection broke")
        return said


def test_a_settled_chunk_that_reads_otherwise_after_the_connection_broke_ends_the_run(
    disk: Path, tmp_path: Path
) -> None:
    """Chunk 0 is asked about, chunk 5 is told to be as it was; then the next agent finds another content there."""
    replicate(disk, tmp_path / "os.raw")
    before = (tmp_path / "os.raw").read_bytes()
    change(disk, 0, b"changed")
    with BreaksAtPatch() as first, Pipes() as second:
        agents = iter([first, second])

        def start() -> Pipes:
            agent = next(agents)
            if agent is second:
                change(disk, 5 * CHUNK, b"otherwise")
            return agent

        with Image(tmp_path / "os.raw") as image:
            base = image.known("id", disk.stat().st_size, CHUNK, full=False)
            with pytest.raises(errors.CorruptChunk, match="after the connection was lost") as failure:
                by_agent(start, job(disk), base, image)
    assert failure.value.facts["offset"] == 5 * CHUNK
    assert (tmp_path / "os.raw").read_bytes() == before


def test_what_had_arrived_is_not_sent_again(disk: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    with Agents([]) as unbroken:
        copied(disk, tmp_path / "os.raw", unbroken)
    with Agents([10 * CHUNK]) as agents:
        copied(disk, tmp_path / "data-1.raw", agents, told)
    assert [pipes.first for pipes in agents.started] == [0, 9], "what is settled is not even read again"
    assert agents.heard <= unbroken.heard + CHUNK + LEAF
    assert [event.text for event in told if isinstance(event, Notice)] == [
        f"os: the connection broke; continuing after {9 * CHUNK} of {disk.stat().st_size} bytes"
    ]


def test_what_arrived_before_the_connection_broke_is_read_back_too(disk: Path, tmp_path: Path) -> None:
    with Lying(tmp_path / "os.raw", 1) as image, Agents([10 * CHUNK]) as agents:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        with pytest.raises(errors.CorruptChunk) as failure:
            by_agent(agents, job(disk), base, image)
        assert [pipes.first for pipes in agents.started] == [0, 9]
    assert failure.value.facts == {"disk": "os", "offset": CHUNK}


def test_connections_that_break_without_progress_are_given_up(disk: Path, tmp_path: Path) -> None:
    with Agents([100] * 9) as agents, pytest.raises(errors.ConnectionLost):
        copied(disk, tmp_path / "os.raw", agents)
    assert len(agents.started) == 3


def test_a_connection_that_breaks_before_the_last_word_is_taken_up_for_it(disk: Path, tmp_path: Path) -> None:
    with Agents([]) as unbroken:
        copied(disk, tmp_path / "os.raw", unbroken)
    with Agents([unbroken.heard - 10]) as agents:  # the name of the hash may be a shorter one
        copied(disk, tmp_path / "data-1.raw", agents)
    assert len(agents.started) == 2
    assert (tmp_path / "data-1.raw").read_bytes() == disk.read_bytes()


def test_a_destination_that_fails_is_not_tried_with_another_agent(disk: Path, tmp_path: Path) -> None:
    class Full(Image):
        def write(self, offset: int, data: Content) -> None:
            raise errors.DestinationFailed("full", disk="os", offset=offset)

    with Agents([]) as agents, Full(tmp_path / "os.raw") as image:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        with pytest.raises(errors.DestinationFailed, match="full"):
            by_agent(agents, job(disk), base, image)
    assert len(agents.started) == 1


# A whole run, over a network that fails


class Hasty(Clock):
    """Time that goes twenty times as fast."""

    def monotonic(self) -> float:
        return 20 * time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 20)


@pytest.fixture
def relay(azure: Sandbox) -> Iterator[Relay]:
    with Relay(azure) as relay:
        azure.intercept = relay
        yield relay


@pytest.fixture
def web(azure: Sandbox, tmp_path: Path) -> Path:
    """A VM; the content of its disk."""
    content = tmp_path / "content.raw"
    content.write_bytes(random.Random(7).randbytes(12 * MIB))
    azure.add_vm("web", content)
    return content


def notices(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Notice)]


def gone_on_after(told: list[Event]) -> int:
    """The bytes that were settled when the copy, once, was taken up."""
    (broke,) = (text for text in notices(told) if "continuing after" in text)
    return int(broke.partition("continuing after ")[2].split()[0])


def chunks_are_settled(images: Path) -> None:
    """Wait for the first: what has come so far may still be on its way through the sockets."""
    index = images / "os.raw.index"
    eventually(lambda: index.exists() and index.stat().st_size)


def test_a_network_that_fails_for_a_minute_is_waited_out(
    azure: Sandbox,
    connect: Callable[..., Source],
    relay: Relay,
    web: Path,
    told: list[Event],
    tmp_path: Path,
) -> None:
    clock = Held()
    source, before = connect(clock=clock), azure.resources()

    def fail() -> None:
        chunks_are_settled(tmp_path / "images")
        relay.refuse = 30  # one every two seconds
        relay.cut()

    relay.at(6 * MIB, fail)
    report = source.replicate("web", tmp_path / "images")
    assert relay.refuse == 0
    assert clock.monotonic() >= 60
    assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
    assert report.disks[0].verified
    assert report.disks[0].sent_bytes == 12 * MIB
    settled = gone_on_after(told)
    assert settled > 0
    # Up to the cut 6 MiB; then what was not settled, and some for the frames and SSH.
    assert relay.received < 6 * MIB + (12 * MIB - settled) + MIB
    waits = [(event.what, event.seconds) for event in told if isinstance(event, Waiting)]
    assert ("the worker to answer on SSH", ssh.RECONNECT_SECONDS) in waits
    assert azure.resources() == before


@pytest.mark.parametrize("lost", [2, 3])
def test_a_connection_may_break_before_the_copy_begins(
    azure: Sandbox,
    connect: Callable[..., Source],
    relay: Relay,
    web: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
) -> None:
    """While it is tried whether the agent runs, and while the worker is asked for its boot; not again and again."""
    before, cuts = azure.resources(), []

    def breaking(name: str) -> Callable[[ssh.Connection], object]:
        real, left = getattr(ssh.Connection, name), [lost]

        def ask(connection: ssh.Connection) -> object:
            if left[0]:
                left[0] -= 1
                cuts.append(name)
                relay.cut()
            return real(connection)

        return ask

    for name in ("try_agent", "boot_id"):
        monkeypatch.setattr(ssh.Connection, name, breaking(name))
    source = connect(clock=Held())
    if lost < 3:
        source.replicate("web", tmp_path / "images")
        assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
        assert cuts == ["try_agent"] * 2 + ["boot_id"] * 2
    else:
        with pytest.raises(errors.ConnectionLost):
            source.replicate("web", tmp_path / "images")
        assert cuts == ["try_agent"] * 3
    assert azure.resources() == before


@pytest.mark.parametrize("fault", ["cut", "cut all", "damaged"])
def test_the_direct_channel_may_break_by_itself_or_with_the_rest(
    azure: Sandbox, connect: Callable[..., Source], web: Path, told: list[Event], tmp_path: Path, fault: str
) -> None:
    with Relay(azure, direct=True) as relay:
        azure.intercept = relay
        acts = {"cut": lambda: relay.cut(but_ssh=True), "cut all": relay.cut, "damaged": relay.damage}

        def act() -> None:
            chunks_are_settled(tmp_path / "images")
            acts[fault]()

        relay.at(6 * MIB, act)
        report = connect(clock=Held()).replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
    assert report.disks[0].sent_bytes == 12 * MIB
    assert gone_on_after(told) > 0
    assert not any("over SSH" in text for text in notices(told))


def test_a_direct_channel_that_breaks_again_and_again_is_done_without(
    azure: Sandbox, connect: Callable[..., Source], web: Path, told: list[Event], tmp_path: Path
) -> None:
    """As where something on the way ends what it does not know, once it has seen so much of it."""
    with Relay(azure, direct=True) as relay:
        azure.intercept = relay
        source = connect(clock=Held())
        source.replicate("web", tmp_path / "images")
        azure.disk("web").write(5 * MIB, random.Random(8).randbytes(MIB))
        relay.lasts = 10_000  # the agent has asked, and what it was to send is not complete
        report = source.replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == azure.disk("web").path.read_bytes()
    assert report.disks[0].verified
    (why,) = (text for text in notices(told) if "over SSH" in text)
    assert "the direct channel" in why


def test_damaged_bytes_on_the_way_end_the_connection_and_nothing_else(
    azure: Sandbox, connect: Callable[..., Source], relay: Relay, web: Path, told: list[Event], tmp_path: Path
) -> None:
    def damage() -> None:
        chunks_are_settled(tmp_path / "images")
        relay.damage()

    relay.at(6 * MIB, damage)
    connect(clock=Held()).replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
    assert any("continuing after" in text for text in notices(told))


def test_a_worker_that_reboots_gets_new_clones_and_the_copy_goes_on(
    azure: Sandbox, connect: Callable[..., Source], relay: Relay, web: Path, told: list[Event], tmp_path: Path
) -> None:
    """While it boots it may write to what is attached: a clone that looks like its own root."""
    source, somebody, before = connect(clock=Hasty()), connect(), azure.resources()

    def restart() -> None:
        (vm,) = (vm for vm in somebody.list_vms() if vm["name"].startswith("coriolis-"))
        clone = azure.content(vm["name"], 0)
        somebody.azure._operations("vm").begin_restart(names.group_of(vm["id"]), vm["name"])
        with clone.open("r+b") as file:
            for offset in (0, 2 * MIB, 11 * MIB):
                file.seek(offset)
                file.write(b"mounted by the worker")

    relay.at(6 * MIB, restart)
    report = source.replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
    assert report.disks[0].sent_bytes == 12 * MIB
    assert gone_on_after(told) > 0
    assert any("recreated from the snapshots" in text for text in notices(told))
    assert azure.resources() == before


class Stranger:
    """An SSH server with another host key than the worker's. A context manager."""

    def __init__(self, key: paramiko.PKey) -> None:
        self._key, self._listener = key, socket.create_server(("127.0.0.1", 0))
        self._open: list[paramiko.Transport] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def place(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()
        return host, port

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                transport = paramiko.Transport(self._listener.accept()[0])
                self._open.append(transport)
                transport.add_server_key(self._key)
                with suppress(EOFError, paramiko.SSHException):
                    transport.start_server(server=paramiko.ServerInterface())

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for transport in self._open:
            transport.close()


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_a_worker_that_comes_up_as_another_system_gets_new_clones_at_once(
    azure: Sandbox,
    connect: Callable[..., Source],
    relay: Relay,
    web: Path,
    told: list[Event],
    tmp_path: Path,
    kind: str,
) -> None:
    """It has booted from a clone, whose system keeps its own host key, perhaps of a kind that the worker has not."""
    clock, before = Held(), azure.resources()
    key = (
        paramiko.Ed25519Key.from_private_key(io.StringIO(keys.host_key()[0]))
        if kind == "ed25519"
        else paramiko.ECDSAKey.generate()
    )

    def watch(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.path.endswith("/powerOff"):
            relay.astray = None
        return relay(request, answer)

    with Stranger(key) as stranger:

        def comes_up() -> None:
            relay.astray = stranger.place
            relay.cut()

        azure.intercept = watch
        relay.at(6 * MIB, comes_up)
        report = connect(clock=clock).replicate("web", tmp_path / "images")
    assert relay.astray is None
    assert clock.monotonic() < ssh.RECONNECT_SECONDS / 2
    assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
    assert report.disks[0].sent_bytes == 12 * MIB
    assert any("recreated from the snapshots" in text for text in notices(told))
    assert azure.resources() == before


def test_a_worker_that_reboots_again_and_again_is_given_up(
    azure: Sandbox, connect: Callable[..., Source], relay: Relay, web: Path, tmp_path: Path
) -> None:
    source, somebody, before = connect(clock=Hasty()), connect(), azure.resources()

    def restart() -> None:
        relay.at(MIB, restart)
        (vm,) = (vm for vm in somebody.list_vms() if vm["name"].startswith("coriolis-"))
        somebody.azure._operations("vm").begin_restart(names.group_of(vm["id"]), vm["name"])

    relay.at(2 * MIB, restart)
    with pytest.raises(errors.WorkerRestarted, match="4 times"):
        source.replicate("web", tmp_path / "images")
    assert azure.resources() == before


def test_a_worker_that_somebody_deletes_is_named_and_the_next_run_goes_on_with_another(
    azure: Sandbox, connect: Callable[..., Source], relay: Relay, web: Path, told: list[Event], tmp_path: Path
) -> None:
    clock = Held()
    source, somebody, before = connect(clock=clock), connect(), azure.resources()
    deleted: list[str] = []
    when: list[float] = []

    def delete() -> None:
        relay.refuse = 1000
        (vm,) = (vm for vm in somebody.list_vms() if vm["name"].startswith("coriolis-"))
        somebody.azure.delete(vm["id"])
        deleted.append(vm["name"])
        when.append(clock.monotonic())

    relay.at(6 * MIB, delete)
    with pytest.raises(errors.WorkerGone, match="was deleted while os was being copied") as caught:
        source.replicate("web", tmp_path / "images")
    assert deleted[0] in caught.value.message
    assert clock.monotonic() - when[0] < 60  # where a worker that is there is waited for five minutes
    assert azure.resources() == before

    relay.refuse = 0
    report = connect().replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == web.read_bytes()
    assert report.disks[0].sent_bytes < 12 * MIB  # how much had settled depends on the machine
    assert azure.resources() == before
