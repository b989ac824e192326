"""The orchestrator's backup writers: our clients against real servers, whole copies with the real agent."""

from __future__ import annotations

import ast
import gc
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import paramiko
import pytest
from paramiko import common

from coriolis_azure import transfer
from coriolis_azure.clock import Clock
from coriolis_azure.errors import (
    ConnectionLost,
    CorruptChunk,
    DestinationFailed,
    DisksChanged,
    HostKeyChanged,
    InvalidInput,
    StreamEnded,
    Unsupported,
)
from coriolis_azure.model import Disk
from coriolis_azure.plugin import claims, ssh_writer, write_data, writer
from coriolis_azure.readers import keys, ssh
from coriolis_azure.readers.conversation import Job
from coriolis_azure.replica.destinations import Destination
from harness.clocks import Held
from harness.constants import DEADLINE
from harness.copies import by_agent
from harness.image_runs import Told
from harness.pipes import Pipes, old_python
from harness.record_files import RecordFiles
from harness.waiting import eventually, together
from harness.writer_targets import SSH_PORT, HttpsTarget, SshTarget

pytestmark = pytest.mark.slow

CHUNK = 65536
Json = dict[str, Any]
ID = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/disks/os"


class Dying(Pipes):
    """An agent that is killed once it has said so many bytes, and what was to arrive has arrived."""

    last = 1 << 60
    arrived: Callable[[], bool]

    def read(self, size: int, /) -> bytes:
        if len(self.heard) + size > self.last:
            eventually(self.arrived)
            self.close()
            raise StreamEnded("killed")
        return super().read(size)


class Target(Protocol):
    """The other end of a writer."""

    @property
    def info(self) -> Json: ...


Other = TypeVar("Other", bound=Target)


@dataclass
class Bench(Generic[Other]):
    """A disk, a device that is a little larger, a target, and what the orchestrator keeps."""

    disk: Path
    device: Path
    target: Other
    records: RecordFiles
    told: Told
    heard: bytearray = field(default_factory=bytearray)

    def entry(self, **more: object) -> Json:
        return {"disk_id": ID, "volume_dev": str(self.device), "volume_id": "v1", **more}

    def volumes(self, entries: list[Json], disks: list[Disk] | None = None, **options: Any) -> writer.Volumes:
        backend = writer.backend(self.target.info, self.told, **{"patience": 60.0, **options})
        claimant = self.claimant(options.get("clock"))
        return writer.Volumes(backend, entries, disks or [self.azure()], claimant)

    def claimant(self, clock: Clock | None = None) -> claims.Claimant:
        return claims.Claimant("run", self.records, self.told, clock or Clock())

    def azure(self) -> Disk:
        return Disk(ID, "os", None, self.disk.stat().st_size, "unique", "Premium_LRS", "None")

    def run(
        self,
        entries: list[Json],
        *,
        chunk: int = CHUNK,
        unique: str = "unique",
        full: bool = False,
        dies: int | None = None,
        **options: Any,
    ) -> tuple[transfer.Outcome, list[Json]]:
        """One run with the real agent; `dies`: bytes after which the agent is killed."""
        size = self.disk.stat().st_size
        job = Job((str(self.disk),), size, wait=0.0)
        with self.volumes(entries, **options) as volumes, Dying() as pipes, volumes.disk("os") as volume:
            base = volume.known(unique, size, chunk, full=full)
            self.heard = pipes.heard
            if dies is not None:
                pipes.last, pipes.arrived = dies, self.first_chunk_arrived
            outcome = by_agent(lambda: pipes, job, base, volume)
            return outcome, json.loads(json.dumps(volumes.to_json()))

    def first_chunk_arrived(self) -> bool:
        return self.device.read_bytes()[:CHUNK] == self.disk.read_bytes()[:CHUNK]

    @property
    def right(self) -> bool:
        content = self.device.read_bytes()
        size = self.disk.stat().st_size
        return content[:size] == self.disk.read_bytes() and content[size:] == b"\xee" * (len(content) - size)


@pytest.fixture(scope="module")
def ssh_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshTarget]:
    target = SshTarget(tmp_path_factory.mktemp("ssh"))
    yield target
    target.close()


@pytest.fixture
def http_target(tmp_path: Path) -> Iterator[HttpsTarget]:
    target = HttpsTarget(tmp_path / "https")
    yield target
    target.flowing.set()
    target.close()


def made(tmp_path: Path, target: Other) -> Bench[Other]:
    chance = random.Random(1)
    disk, device = tmp_path / "disk", tmp_path / "device"
    parts = [chance.randbytes(CHUNK), bytes(2 * CHUNK), b"text " * 13107 + b"!", bytes(20000), b"a" * 45536]
    disk.write_bytes(b"".join(parts) + chance.randbytes(1536))
    device.write_bytes(b"\xee" * (disk.stat().st_size + 5000))
    return Bench(disk, device, target, RecordFiles(tmp_path / "records"), Told())


@pytest.fixture
def over_ssh(tmp_path: Path, ssh_target: SshTarget) -> Iterator[Bench[SshTarget]]:
    yield made(tmp_path, ssh_target)
    for path in (*ssh_target.home.iterdir(), ssh_target.synced):
        path.unlink(missing_ok=True)


@pytest.fixture
def no_receiver_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orchestrator whose package brings none, whether or not another one is installed."""
    package = tmp_path / "bare" / "coriolis"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "coriolis", raising=False)
    monkeypatch.syspath_prepend(package.parent)


@pytest.fixture
def over_https(tmp_path: Path, http_target: HttpsTarget) -> Bench[HttpsTarget]:
    return made(tmp_path, http_target)


@pytest.fixture(params=["over_ssh", "over_https"])
def bench(request: pytest.FixtureRequest) -> Any:
    """A bench of either protocol."""
    return request.getfixturevalue(request.param)


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# Good runs


@pytest.mark.parametrize("compress", [False, True])
def test_a_first_run_sends_everything_and_the_next_what_changed(bench: Bench[Any], compress: bool) -> None:
    first, entries = bench.run([bench.entry()], compress=compress)
    assert bench.right
    assert first.full
    assert first.verified is (True if isinstance(bench.target, HttpsTarget) else None)
    second, entries = bench.run(entries, compress=compress)
    assert (second.full, second.sent_bytes, second.verified) == (False, 0, None)
    change(bench.disk, 3 * CHUNK, b"new")
    change(bench.disk, 0, bytes(CHUNK))
    third, after = bench.run(entries, compress=compress)
    assert bench.right
    assert (third.sent_bytes, third.zero_bytes) == (CHUNK, CHUNK)
    (record,) = bench.records.all()
    assert (record.writer, record.holds) == ("", claims.state_name(after[0]["replica_state"]))
    assert bench.told == []


def test_what_the_orchestrator_gets_back_is_its_list_with_states(over_ssh: Bench[SshTarget]) -> None:
    other = {"disk_id": ID + "-shared", "volume_dev": "", "replicate_disk_data": False}
    entries = [other, over_ssh.entry(zeroed=True, anything={"a": 1})]
    _, after = over_ssh.run(entries)
    assert after[0] == other
    assert after[1].pop("replica_state")["disk"] == "unique"
    assert after[1] == {**entries[1], "zeroed": False}
    assert "replica_state" not in entries[1]


def test_a_password_and_a_key_object_sign_in_too(over_ssh: Bench[SshTarget]) -> None:
    info = over_ssh.target.info
    key = paramiko.RSAKey.from_private_key(io.StringIO(info["connection_details"]["pkey"]))
    info["connection_details"]["pkey"] = key
    entries, disks, claimant = [over_ssh.entry()], [over_ssh.azure()], over_ssh.claimant()
    with writer.Volumes(writer.backend(info), entries, disks, claimant) as volumes:
        volumes.disk("os").known("unique", 1000, CHUNK, full=False)
    info["connection_details"] = {**info["connection_details"], "pkey": None, "password": "secret"}
    with writer.Volumes(writer.backend(info, clock=Held()), entries, disks, claimant) as volumes:
        with pytest.raises(DestinationFailed, match=r"refuses our (key|password)") as failure:
            volumes.disk("os").known("unique", 1000, CHUNK, full=False)
        assert "secret" not in str(failure.value) + repr(volumes.__dict__)


def test_new_keys_are_agreed_upon_on_the_way(
    ssh_target: SshTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ssh, "_REKEY_BYTES", CHUNK)
    data = random.Random(1).randbytes(16 * CHUNK)

    def keys_were_changed(times: int) -> bool:
        return caplog.text.count("Switch to new keys") == times

    host = ssh.Target(ssh.Login(ssh_target.address, SSH_PORT, "user", ssh_target.private))
    with host.connect() as connection, caplog.at_level("DEBUG", "paramiko.transport"):
        # Its first answer tells that it runs: while keys are agreed upon, nobody may ask for anything else.
        program = connection.start(f"head -c 1; cat > {tmp_path / 'sent'}", DEADLINE)
        program.send(b"x")
        assert program.receive(1) == b"x"
        for times in (1, 2):
            program.send(data)
            eventually(partial(keys_were_changed, times))
        program.finish()
        assert program.status(DEADLINE) == 0
    assert (tmp_path / "sent").read_bytes() == 2 * data


def test_the_target_gets_our_receiver_only_if_it_has_none(
    over_ssh: Bench[SshTarget], no_receiver_of_theirs: None
) -> None:
    over_ssh.run([over_ssh.entry()])
    assert [path.name for path in over_ssh.target.home.iterdir()] == [".coriolis-azure-write-data.py"]
    assert not over_ssh.target.synced.exists()
    over_ssh.target.program("write_data", SHEBANG + Path(write_data.__file__).read_text())
    (over_ssh.target.home / ".coriolis-azure-write-data.py").unlink()
    over_ssh.run([over_ssh.entry()])
    assert [path.name for path in over_ssh.target.home.iterdir()] == ["write_data"]
    assert over_ssh.target.synced.read_text() == "\n"


def test_the_orchestrators_receiver_is_put_there_where_its_package_brings_one(
    over_ssh: Bench[SshTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "path" / "coriolis" / "resources" / "bin" / "write_data"
    binary.parent.mkdir(parents=True)
    binary.write_text(SHEBANG + Path(write_data.__file__).read_text())
    (tmp_path / "path" / "coriolis" / "__init__.py").write_text("raise ImportError('slow')")
    monkeypatch.syspath_prepend(tmp_path / "path")
    over_ssh.run([over_ssh.entry()])
    assert over_ssh.right
    assert [path.name for path in over_ssh.target.home.iterdir()] == ["write_data"]


def test_a_sync_that_fails_is_an_error(over_ssh: Bench[SshTarget]) -> None:
    over_ssh.target.program("write_data", SHEBANG + Path(write_data.__file__).read_text())
    sync = over_ssh.target.synced.with_name("bin") / "sync"
    kept = sync.read_text()
    try:
        sync.write_text("#!/bin/sh\nexit 5\n")
        with pytest.raises(DestinationFailed, match="sync ended with status 5"):
            over_ssh.run([over_ssh.entry()])
    finally:
        sync.write_text(kept)
    assert [(record.holds, record.writer) for record in over_ssh.records.all()] == [("", "")]


def test_disks_side_by_side(over_ssh: Bench[SshTarget], tmp_path: Path) -> None:
    """The receiver is put there once, the host key is pinned by the first."""
    disks = [replace(over_ssh.azure(), id=f"{ID}-{lun}", name=f"data-{lun}") for lun in range(4)]
    entries = []
    for disk in disks:
        device = tmp_path / disk.name
        device.write_bytes(bytes(3 * CHUNK))
        entries.append({"disk_id": disk.id.upper(), "volume_dev": str(device)})
    failures = []
    with over_ssh.volumes(entries, disks) as volumes:

        def write(disk: Disk) -> None:
            try:
                volume = volumes.disk(disk.name)
                volume.known("unique", 3 * CHUNK, CHUNK, full=False)
                volume.intend(0, 3 * CHUNK)
                volume.write(CHUNK, disk.name.encode() * 100)
                volume.flush()
            except DestinationFailed as error:
                failures.append(error)

        together([partial(write, disk) for disk in disks])
    assert failures == []
    for disk in disks:
        assert (tmp_path / disk.name).read_bytes()[CHUNK:].startswith(disk.name.encode() * 100 + b"\0")


@pytest.mark.parametrize(
    ("sessions", "threads", "receivers"), [(10, 1, 1), (10, 3, 3), (10, 8, 6), (2, 8, 2), (1, 8, 1)]
)
def test_threads_that_write_at_a_time_get_receivers_of_their_own(
    tmp_path: Path, sessions: int, threads: int, receivers: int
) -> None:
    """As many as the target allows; all that they wrote is there, and each of them has ended."""
    target = SshTarget(tmp_path / "ssh", sessions=sessions)
    with closing(target):
        bench = made(tmp_path, target)
        # Each says that it is there, and waits for its first message until as many are there as are expected.
        counting = "#!/bin/sh\nmkdir -p there && touch there/$$\n"
        counting += f"while [ $(ls there | wc -l) -lt {receivers} ]; do sleep 0.01; done\n"
        counting += f"{sys.executable} receiver.py && touch ended.$$\n"
        target.program("write_data", counting)
        target.program("receiver.py", Path(write_data.__file__).read_text())
        piece = os.urandom(1 << 20)
        count = 16 * threads
        bench.device.write_bytes(bytes(count * len(piece)))
        with bench.volumes([bench.entry()]) as volumes:
            one = volumes.disk("os")
            one.known("unique", count * len(piece), CHUNK, full=False)
            one.intend(0, count * len(piece))

            def write(part: int) -> None:
                for index in range(part, count, threads):
                    one.write(index * len(piece), piece[index:] + piece[:index])

            together([partial(write, part) for part in range(threads)])
            one.flush()
        held = bench.device.read_bytes()
        for index in range(count):
            assert held[index * len(piece) : (index + 1) * len(piece)] == piece[index:] + piece[:index]
        assert len(list((target.home / "there").iterdir())) == receivers
        assert len(list(target.home.glob("ended.*"))) == receivers


def test_a_target_without_a_session_to_spare_is_an_error_that_says_so(tmp_path: Path) -> None:
    with closing(SshTarget(tmp_path / "ssh", sessions=0)) as target:
        failure = fails(made(tmp_path, target))
    assert "no more sessions (MaxSessions)" in str(failure)


class Odd:
    """Content of which there turns out to be none."""

    def __len__(self) -> int:
        return 9


def test_a_receiver_that_was_sent_part_of_a_message_is_never_sent_another(
    ssh_target: SshTarget, tmp_path: Path
) -> None:
    """It would take the content of a disk for the rest of that one, and for messages after it."""
    path = tmp_path / "device"
    path.write_bytes(bytes(CHUNK))
    details = ssh_target.info["connection_details"]
    target = ssh_writer.Target(details, compress=False, clock=Clock(), patience=DEADLINE)
    no_bytes: Any = Odd()
    device = target.device("os", str(path))
    with closing(device):
        device.open()
        with pytest.raises(TypeError):
            device.write(0, no_bytes)
        with pytest.raises(DestinationFailed, match="could not be sent: TypeError"):
            device.write(100, b"x" * 100)
        with pytest.raises(DestinationFailed, match="could not be sent: TypeError"):
            device.flush()
    assert path.read_bytes() == bytes(CHUNK)


class Mute(paramiko.ServerInterface):
    """Lets everybody in and everything begin, then says what it is made to say, or nothing."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.says: Callable[[], None] | None = None

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return common.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        if self.says is not None:
            self.says()
        return common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.over.wait()
        return False


@pytest.fixture
def mute() -> Iterator[tuple[Mute, paramiko.Transport, ssh.Connection]]:
    """A server's rules, its side and ours of a connection."""
    rules = Mute()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found: list[paramiko.Transport] = []

        def serve() -> None:
            found.append(paramiko.Transport(listener.accept()[0]))
            found[0].add_server_key(paramiko.RSAKey.generate(2048))
            found[0].start_server(server=rules)

        server = threading.Thread(target=serve)
        server.start()
        login = ssh.Login("127.0.0.1", listener.getsockname()[1], "user", keys.client_key()[0])
        connection = ssh.Target(login).connect()
        server.join()
        with connection, closing(found[0]):
            yield rules, found[0], connection
            rules.over.set()


def test_a_command_whose_start_is_never_answered_is_given_up(
    mute: tuple[Mute, paramiko.Transport, ssh.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_CONNECT_SECONDS", 0.2)
    with pytest.raises(StreamEnded):
        mute[2].start("true", DEADLINE)
    with pytest.raises(ConnectionLost):
        mute[2].start_agent()


def test_what_a_server_says_out_of_turn_breaks_the_connection_and_no_more(
    mute: tuple[Mute, paramiko.Transport, ssh.Connection],
) -> None:
    """The thread that reads the connection dies of a KeyError, which is raised wherever another waits for it."""
    server: Any
    rules, server, connection = mute
    message = paramiko.Message()
    message.add_byte(bytes([199]))
    rules.says = lambda: server._send_message(message)
    with pytest.raises(StreamEnded, match="199"):
        connection.start("true", DEADLINE)


def test_another_host_key_than_at_first_is_refused(tmp_path: Path) -> None:
    first = SshTarget(tmp_path / "first")
    host = ssh.Target(ssh.Login(first.address, SSH_PORT, "user", first.private))
    host.connect().close()
    host.connect().close()
    first.close()
    second = SshTarget(tmp_path / "second", first.address)
    try:
        with pytest.raises(HostKeyChanged):
            host.connect()
    finally:
        second.close()


# The state, and whether it is believed


@pytest.mark.parametrize("lost", [False, True], ids=["dies in the middle", "its answer is lost"])
def test_a_chunk_that_goes_back_to_what_it_was_is_right_after_a_run_that_died(
    bench: Bench[Any], lost: bool
) -> None:
    """A, then B by a run whose end the orchestrator never hears of, then A again: nothing seems changed."""
    _, entries = bench.run([bench.entry()])
    content = bench.disk.read_bytes()
    change(bench.disk, 0, b"B" * CHUNK)
    change(bench.disk, 5 * CHUNK, random.Random(2).randbytes(1536))
    if lost:
        bench.run(entries)
    else:
        with pytest.raises(StreamEnded):
            bench.run(entries, dies=CHUNK + 1000)
    assert bench.device.read_bytes()[:CHUNK] == b"B" * CHUNK
    bench.disk.write_bytes(content)
    outcome, entries = bench.run(entries)
    assert bench.right
    assert outcome.full
    assert "the last run failed" in bench.told[-1]
    assert bench.run(entries)[0].sent_bytes == 0


# What is given


def test_a_disk_without_a_volume_ends_the_run_before_anything_is_claimed(
    over_https: Bench[HttpsTarget],
) -> None:
    """It was attached after the orchestrator had asked for the VM's disks: the replica would lack it."""
    extra = replace(over_https.azure(), id=ID + "2", name="data-0")
    with pytest.raises(DisksChanged, match=r"data-0 .* has no volume") as error:
        over_https.volumes([over_https.entry()], [over_https.azure(), extra])
    assert error.value.facts["disks"] == ["data-0"]
    assert "Execute the transfer again" in error.value.remedy


def test_a_volume_without_a_disk_is_told_of(over_https: Bench[HttpsTarget]) -> None:
    gone = {**over_https.entry(), "disk_id": ID + "2"}
    with over_https.volumes([over_https.entry(), gone]) as volumes:
        assert volumes.names() == ["os"]
    assert len(over_https.told) == 1
    assert "the volume of os2 is not changed" in over_https.told[0]


def test_what_cannot_be_used_is_refused_by_name(over_https: Bench[HttpsTarget]) -> None:
    def refused(target: Json) -> str:
        with pytest.raises((InvalidInput, Unsupported)) as failure:
            writer.backend(target)
        return str(failure.value)

    good = over_https.target.info["connection_details"]
    assert "'carrier_pigeon'" in refused({"backend": "carrier_pigeon", "connection_details": {}})
    http = "http_backup_writer"
    assert "no port" in refused({"backend": http, "connection_details": {"ip": "127.0.0.1"}})
    for name in ("client_crt", "client_key", "ca_crt"):
        left = {key: value for key, value in good["certificates"].items() if key != name}
        assert f"no {name}" in refused(
            {"backend": http, "connection_details": {**good, "certificates": left}}
        )
        bad = {**good["certificates"], name: "no certificate"}
        assert "cannot be used" in refused(
            {"backend": http, "connection_details": {**good, "certificates": bad}}
        )
    details = {"ip": "127.0.0.1", "port": 22, "username": "user"}
    shell = "ssh_backup_writer"
    assert "neither pkey nor password" in refused({"backend": shell, "connection_details": details})
    assert "private key" in refused({"backend": shell, "connection_details": {**details, "pkey": "no key"}})
    assert "no username" in refused({"backend": shell, "connection_details": {**details, "username": ""}})
    with (
        pytest.raises(InvalidInput, match="no volume_dev") as error,
        over_https.volumes([{"disk_id": ID, "volume_dev": ""}]),
    ):
        pass
    assert "storage_container_name" in error.value.remedy


def test_files_of_this_host_keep_their_state_beside_them(tmp_path: Path) -> None:
    bench = made(tmp_path, FileTarget())
    size = bench.disk.stat().st_size
    os.truncate(bench.device, 0)
    os.truncate(bench.device, size)
    first, entries = bench.run([bench.entry()])
    second, _ = bench.run(entries)
    assert (first.full, first.verified, second.full, second.sent_bytes) == (True, True, False, 0)
    assert bench.device.read_bytes() == bench.disk.read_bytes()
    assert bench.records.updates == 0


class FileTarget:
    info: Json = {"backend": "file_backup_writer", "connection_details": {}}


# Faults over SSH

UNHEARD = "nothing was heard"  # what is said where nothing but time has told of a failure
SHEBANG = f"#!{sys.executable}\n"
FAULTY = (
    SHEBANG
    + """
import os, signal, struct, sys, time
source, answers = sys.stdin.buffer, sys.stdout.buffer
def message():
    number, length = struct.unpack("<II", source.read(8))
    return number, len(source.read(4 + length)) if length else 0
count = 0
while True:
    number, length = message()
    count += 1
    {fault}
    answers.write(struct.pack("<I", number))
    answers.flush()
    if not length:
        break
"""
)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("if count == 3: os.kill(os.getpid(), signal.SIGKILL)", "ended"),
        ("if count == 3: sys.exit(7)", "status 7: it could not write to the device"),
        ("sys.exit(13)", "status 13: compressed data arrived damaged"),
        ("if count == 3: sys.exit('words of its own')", "words of its own"),
        ("number += count == 3", "answered message 3 instead of 2"),
        ("if count == 3: sys.exit(0)", "it ended"),
        ("if not length: sys.exit(8)", "status 8: it could not close the device"),
    ],
    ids=["killed", "status 7", "at once", "with words", "wrong answer", "ended well", "at the end"],
)
def test_a_receiver_that_fails_is_an_error_that_says_why(
    over_ssh: Bench[SshTarget], monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    """There is but one, which is given all messages: the faults count them."""
    monkeypatch.setattr(ssh_writer, "RECEIVERS", 1)
    # The status of one that has ended comes; of one that has not there is none to wait for.
    monkeypatch.setattr(ssh_writer, "_LAST_WORDS_SECONDS", 0 if "answered" in said else DEADLINE)
    over_ssh.target.program("write_data", FAULTY.replace("{fault}", fault))
    failure = fails(over_ssh)
    assert said in str(failure)
    if "at the end" not in said and "close" not in said:
        assert isinstance(failure.facts["offset"], int)


def test_a_receiver_that_says_nothing_is_given_up(
    over_ssh: Bench[SshTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its patience ends with the second message: how long all that comes before takes does not matter."""
    monkeypatch.setattr(ssh_writer, "RECEIVERS", 1)
    monkeypatch.setattr(ssh_writer, "_LAST_WORDS_SECONDS", 0)
    over_ssh.target.program("write_data", FAULTY.replace("{fault}", "if count == 2: signal.pause()"))
    with over_ssh.volumes([over_ssh.entry()]) as volumes:
        one = begun(volumes)
        assert isinstance(one, writer.Volume)
        device: Any = one._device
        (receiver,) = device._receivers
        receiver.drain()
        receiver.program.wait_up_to(0.2)
        one.write(CHUNK, b"x" * CHUNK)
        with pytest.raises(DestinationFailed, match=r"nothing was heard for 0\.2 seconds") as failure:
            one.flush()
    assert failure.value.facts == {"disk": "os", "offset": CHUNK}


def test_a_device_that_is_too_small_is_an_error_that_names_the_offset(bench: Bench[Any]) -> None:
    os.truncate(bench.device, 3 * CHUNK)
    failure = fails(bench)
    assert failure.facts["offset"] >= 3 * CHUNK
    assert ("status 15" in str(failure)) or ("status 400" in str(failure))
    assert [record.holds for record in bench.records.all()] == [""]


def begun(volumes: writer.Volumes) -> Destination:
    """A volume that the first chunk was written to."""
    one = volumes.disk("os")
    one.known("unique", 4 * CHUNK, CHUNK, full=False)
    one.intend(0, 4 * CHUNK)
    one.write(0, b"x" * CHUNK)
    return one


def test_a_run_that_is_given_up_leaves_no_claim_where_all_it_has_sent_is_written(bench: Bench[Any]) -> None:
    with bench.volumes([bench.entry()]) as volumes:
        begun(volumes)
        volumes.stop()
    assert [record.writer for record in bench.records.all()] == [""]


def test_a_request_without_an_answer_keeps_the_claim_though_the_next_attempt_was_answered(
    over_https: Bench[HttpsTarget],
) -> None:
    over_https.target.faults = [0]
    with over_https.volumes([over_https.entry()]) as volumes:
        begun(volumes)
    assert [record.writer for record in over_https.records.all()] != [""]


def test_a_device_that_is_not_there_is_an_error(
    over_ssh: Bench[SshTarget], no_receiver_of_theirs: None
) -> None:
    over_ssh.device.unlink()
    assert "could not open the device" in str(fails(over_ssh))


def test_a_target_that_dies_is_an_error(tmp_path: Path) -> None:
    target = SshTarget(tmp_path / "ssh")
    bench = made(tmp_path, target)
    try:
        size = bench.disk.stat().st_size
        with bench.volumes([bench.entry()]) as volumes:
            one = volumes.disk("os")
            one.known("unique", size, CHUNK, full=False)
            one.intend(0, size)
            one.write(0, b"x" * CHUNK)
            target.kill()
            with pytest.raises(DestinationFailed) as failure:
                one.flush()
            with pytest.raises(DestinationFailed):
                one.write(2 * CHUNK, b"x")
            assert failure.value.facts["disk"] == "os"
            assert UNHEARD not in str(failure.value)
        (record,) = bench.records.all()
        assert record.writer  # it may still be writing what it was sent
        bench.records.delete(record.id)
        with bench.volumes([bench.entry()], clock=(clock := Held())) as volumes:
            with pytest.raises(DestinationFailed, match="does not answer"):
                volumes.disk("os").known("unique", size, CHUNK, full=False)
            assert clock.moment == 4.0
    finally:
        target.close()


HOLDING = (
    SHEBANG
    + """
import select, struct, sys
source, answers = sys.stdin.buffer.raw, sys.stdout.buffer
def read(size):
    data = b""
    while len(data) < size:
        data += source.read(size - len(data))
    return data
held, size, most = [], 0, 0
while True:
    number, length = struct.unpack("<II", read(8))
    read(4 + length if length else 0)
    held.append(number)
    size += length
    most = max(most, size)
    if not length or not select.select([source], [], [], 0.3)[0]:
        for number in held:
            answers.write(struct.pack("<I", number))
        answers.flush()
        held, size = [], 0
    if not length:
        break
print(most, file=open("most", "a"))
"""
)


def test_what_is_not_answered_is_bounded(over_ssh: Bench[SshTarget]) -> None:
    """The receivers hold their answers back until nothing more comes."""
    over_ssh.target.program("write_data", HOLDING)
    piece = 2 << 20
    data = os.urandom(piece)
    with over_ssh.volumes([over_ssh.entry()]) as volumes:
        one = volumes.disk("os")
        one.known("unique", 40 * piece, CHUNK, full=False)
        one.intend(0, 40 * piece)

        def write(part: int) -> None:
            for index in range(part, 40, 4):
                one.write(index * piece, data)

        together([partial(write, part) for part in range(4)])
        one.flush()
    most = [int(line) for line in (over_ssh.target.home / "most").read_text().split()]
    assert ssh_writer.IN_FLIGHT - piece < max(most) <= ssh_writer.IN_FLIGHT


def test_writers_that_wait_are_all_woken_when_the_receiver_dies(over_ssh: Bench[SshTarget]) -> None:
    """It reads nothing any more, then it is killed from outside: nobody stays blocked."""
    stuck = "import threading; open('pid', 'w').write(str(os.getpid())); threading.Event().wait()"
    over_ssh.target.program("write_data", FAULTY.replace("{fault}", stuck))
    piece = os.urandom(4 << 20)
    failures: list[DestinationFailed] = []
    with over_ssh.volumes([over_ssh.entry()]) as volumes:
        one = volumes.disk("os")
        one.known("unique", 64 * len(piece), CHUNK, full=False)
        one.intend(0, 64 * len(piece))

        def write(part: int) -> None:
            try:
                for index in range(part, 64, 4):
                    one.write(index * len(piece), piece)
            except DestinationFailed as error:
                failures.append(error)

        def kill() -> None:
            pid = over_ssh.target.home / "pid"
            eventually(lambda: pid.exists() and pid.read_text())
            os.kill(int(pid.read_text()), 9)

        together([*(partial(write, part) for part in range(4)), kill])
    assert len(failures) == 4
    assert not [failure for failure in failures if UNHEARD in str(failure)]
    assert {failure.facts["disk"] for failure in failures} == {"os"}
    assert {failure.facts["offset"] % len(piece) for failure in failures} == {0}


# Faults over HTTPS


@pytest.mark.parametrize("status", [500, 503, 0])
def test_what_may_pass_is_tried_again(over_https: Bench[HttpsTarget], status: int) -> None:
    over_https.target.faults = [status, status]
    clock = Held()
    outcome, _ = over_https.run([over_https.entry()], clock=clock)
    assert over_https.right
    assert outcome.verified
    assert clock.moment > 0
    assert over_https.target.holder == {}


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (403, 1), (500, 4), (0, 4)])
def test_what_does_not_pass_is_an_error(over_https: Bench[HttpsTarget], status: int, tries: int) -> None:
    over_https.target.faults = [status] * 100
    with over_https.volumes([over_https.entry()], clock=Held()) as volumes:
        one = volumes.disk("os")
        one.known("unique", 3 * CHUNK, CHUNK, full=False)
        one.intend(0, CHUNK)
        with pytest.raises(DestinationFailed) as failure:
            one.write(CHUNK, b"x" * CHUNK)
    assert failure.value.facts == {"disk": "os", "offset": CHUNK}
    assert over_https.target.posts == tries
    if status:
        assert f"status {status}" in str(failure.value)
        assert "out of luck" in str(failure.value)
    over_https.target.faults = []
    assert over_https.target.holder == {}


def test_a_server_that_is_killed_is_an_error(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.flowing.clear()

    def kill() -> None:
        assert over_https.target.waiting.acquire(timeout=DEADLINE)
        over_https.target.kill()

    failures: list[DestinationFailed] = []
    together([lambda: failures.append(fails(over_https, clock=Held())), kill])
    assert isinstance(failures[0].facts["offset"], int)
    assert any("may still be locked" in text for text in over_https.told)


def test_a_server_that_goes_before_the_handshake_leaves_no_socket_to_the_collector(
    over_https: Bench[HttpsTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was not let in yet when a listener closes is reset."""
    connect = socket.create_connection

    def reset(address: tuple[str, int], *options: Any) -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return connect(listener.getsockname(), *options)

    monkeypatch.setattr(socket, "create_connection", reset)
    assert "reset by peer" in str(fails(over_https, clock=Held()))
    gc.collect()  # what it finds open is a warning, and so an error


def test_a_server_that_says_nothing_is_an_error(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.flowing.clear()
    failure = fails(over_https, patience=0.2, clock=Held())
    assert "timed out" in str(failure)
    assert isinstance(failure.facts["offset"], int)


def test_a_slow_server_holds_the_run_up_and_nothing_else(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.flowing.clear()

    def go_on() -> None:
        for _ in range(4):
            assert over_https.target.waiting.acquire(timeout=DEADLINE)
        over_https.target.flowing.set()

    together([lambda: over_https.run([over_https.entry()]), go_on])
    assert over_https.right
    assert len(over_https.target.connections) <= 16


def test_a_device_in_use_by_another_is_an_error(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.holder[str(over_https.device)] = "another"
    assert 'status 409: {"error": "in use by another client"}' in str(fails(over_https))
    assert over_https.target.holder == {str(over_https.device): "another"}


def test_a_server_of_another_authority_is_not_spoken_to(
    over_https: Bench[HttpsTarget], tmp_path: Path
) -> None:
    other = HttpsTarget(tmp_path / "other")
    try:
        over_https.target.pems["ca_crt"] = other.pems["ca_crt"]
        assert "certificate verify failed" in str(fails(over_https, clock=Held()))
        assert over_https.target.posts == 0
    finally:
        other.close()


def test_what_the_target_holds_is_checked(over_https: Bench[HttpsTarget]) -> None:
    outcome, _ = over_https.run([over_https.entry()])
    assert outcome.verified is True
    assert over_https.target.made_jobs == over_https.target.posts
    assert over_https.target.jobs == {}


def test_rot_at_the_target_is_found(over_https: Bench[HttpsTarget]) -> None:
    with over_https.volumes([over_https.entry()]) as volumes:
        one = volumes.disk("os")
        one.known("unique", 6 * CHUNK, CHUNK, full=False)
        one.intend(0, 6 * CHUNK)
        for index in range(5):
            one.write(index * CHUNK, os.urandom(CHUNK))
        assert one.check()
        change(over_https.device, 3 * CHUNK + 17, b"rot")
        with pytest.raises(CorruptChunk) as failure:
            one.check()
    assert failure.value.facts == {"disk": "os", "offset": 3 * CHUNK}
    assert over_https.target.jobs == {}


def test_a_server_without_checksums_is_not_called_verified(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.checksums = ""
    outcome, _ = over_https.run([over_https.entry()])
    assert over_https.right
    assert outcome.verified is None


def test_a_checksum_job_that_fails_is_an_error(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.checksums = "failed"
    assert "its checksum job failed: the medium is bad" in str(fails(over_https))
    assert over_https.target.jobs == {}


def test_an_answer_that_no_parser_understands_is_an_error(over_https: Bench[HttpsTarget]) -> None:
    over_https.target.checksums = "nested"
    assert "is not a JSON object" in str(fails(over_https))


def test_memory_is_bounded_while_the_server_stalls(over_https: Bench[HttpsTarget]) -> None:
    over_https.disk.write_bytes(os.urandom(80 << 20))
    os.truncate(over_https.device, 80 << 20)
    over_https.target.flowing.clear()

    def look() -> None:
        for _ in range(16):
            assert over_https.target.waiting.acquire(timeout=DEADLINE)
        # What the test keeps of the agent's words is not the client's; the server's bodies are counted in.
        seen.append(tracemalloc.get_traced_memory()[0] - len(over_https.heard))
        over_https.target.flowing.set()

    seen: list[int] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        together([lambda: over_https.run([over_https.entry()], chunk=1 << 20), look])
    finally:
        tracemalloc.stop()
    assert seen[0] - before < 44 << 20
    assert over_https.right


# Our receiver


def test_the_receiver_is_written_for_old_pythons() -> None:
    source = Path(write_data.__file__).read_text()
    ast.parse(source, feature_version=(3, 5))
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported <= sys.stdlib_module_names


def message(number: int, payload: bytes, inflated: int = 0) -> bytes:
    return struct.pack("<III", number, len(payload), inflated) + payload


def received(said: bytes, python: str = sys.executable) -> tuple[int, bytes]:
    done = subprocess.run([python, write_data.__file__], input=said, capture_output=True, timeout=60)
    assert done.stderr == b""
    return done.returncode, done.stdout


def test_the_receiver_writes_answers_and_ends(tmp_path: Path) -> None:
    device = tmp_path / "device"
    for python in filter(None, [sys.executable, old_python()]):
        device.write_bytes(bytes(100))
        head = os.fsencode(device) + b"\0"
        packed = head + struct.pack("<Q", 50) + b"b" * 50
        said = (
            message(0, head + struct.pack("<Q", 0) + b"a" * 10)
            + message(7, zlib.compress(packed), len(packed))
            + struct.pack("<II", 9, 0)
        )
        assert received(said, python) == (0, struct.pack("<III", 0, 7, 9))
        assert device.read_bytes() == b"a" * 10 + bytes(40) + b"b" * 50


def test_the_receiver_ends_with_the_statuses_of_the_protocol(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(bytes(100))
    head = os.fsencode(device) + b"\0"
    good = head + struct.pack("<Q", 0) + b"a"
    packed = zlib.compress(good)
    for said, status in {
        b"": 11,
        b"\0" * 5: 11,
        b"\0\0\0\0\5\0\0\0\0": 1,
        message(0, b"12345678"): 2,
        struct.pack("<III", 0, (100 << 20) + 1, 0): 2,
        message(0, packed, 5): 12,
        message(0, packed, (100 << 20) + 1): 12,
        message(0, packed, len(good) + 1): 13,
        message(0, packed, len(good) - 1): 13,
        message(0, packed[:-1], len(good)): 13,
        message(0, b"x" * 50, 50): 13,
        message(0, b"x" * 50): 4,
        message(0, head + b"1234567"): 4,
        message(0, b"\0" + struct.pack("<Q", 0) + b"a"): 4,
        message(0, good)[:-1]: 5,
        message(0, b"/nonexistent" + good[len(head) - 1 :]): 5,
        message(0, head + struct.pack("<Q", 100) + b"a"): 15,
        message(0, head + struct.pack("<Q", 1 << 63) + b"a"): 15,
    }.items():
        assert received(said) == (status, b""), said
    assert device.read_bytes() == bytes(100)


@pytest.mark.parametrize("length", [1, 512, CHUNK, 4 << 20])
def test_zeros_are_packed_without_being_gone_through(length: int) -> None:
    prefix = b"/dev/sdb\0" + struct.pack("<Q", 12345678901)
    packed = ssh_writer._packed_zeros(prefix, length)
    assert zlib.decompress(packed) == prefix + bytes(length)
    assert len(packed) < 5000


# Means


def fails(bench: Bench[Any], **options: Any) -> DestinationFailed:
    """A run that must fail and leave no thread behind."""
    threads = threading.active_count()
    with pytest.raises(DestinationFailed) as failure:
        bench.run([bench.entry()], **options)
    eventually(lambda: threading.active_count() <= threads or isinstance(bench.target, HttpsTarget))
    assert failure.value.facts["disk"] == "os"
    return failure.value
