"""NBD servers as destinations, with real ones: nbdkit and qemu-nbd."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from coriolis_azure.cli.entry import cli
from coriolis_azure.errors import DestinationFailed, InvalidInput, NoReplica, TransferError
from coriolis_azure.events import Copied, Event, Notice, silent
from coriolis_azure.replica import nbd_store, places, several
from coriolis_azure.replica.manifest import UNKNOWN
from coriolis_azure.replica.nbd_medium import NbdMedium
from coriolis_azure.replica.nbd_store import NbdStore
from coriolis_azure.replica.nbd_url import Exports, with_state
from coriolis_azure.replica.replica import Replica
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from coriolis_azure.testing import check_medium
from harness.constants import MIB
from harness.image_runs import A, B, bring
from harness.lanes import slow
from harness.nbd_servers import nbdkit, needs, qcow2, qemu_nbd, serving

Image = Callable[..., Path]
DIRECT = {"replica_export_mechanism": "snapshots"}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The folder of the state, which is there."""
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        yield Path(folder)


@pytest.fixture
def direct(connect: Callable[..., Source]) -> Source:
    """A Source that reads disks without a worker."""
    return connect(environment=DIRECT)


# The medium


@pytest.mark.parametrize("kind", ["memory", slow("nozero"), slow("blocks of 4096"), "qcow2"])
def test_an_export_is_a_medium(tmp_path: Path, state: Path, kind: str) -> None:
    commands = {
        "memory": lambda: nbdkit("memory", "4M"),
        "nozero": lambda: nbdkit("--filter=nozero", "--filter=noextents", "memory", "4M"),
        "blocks of 4096": lambda: nbdkit(
            "--filter=blocksize-policy",
            "memory",
            "4M",
            "blocksize-minimum=4096",
            "blocksize-error-policy=error",
        ),
        "qcow2": lambda: qemu_nbd(qcow2(tmp_path / "os.qcow2", 4 * MIB), "web-1-os"),
    }
    with serving(*commands[kind]()) as server:
        export = Exports.of(server.url(state)).disk("os")
        check_medium(lambda: NbdMedium(export, "os", state, adopt=True))
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in state.iterdir() if file.is_file())


def opened(command: list[str | Path], state: Path, stack: ExitStack) -> NbdStore:
    """The export of a server that runs as long as the stack."""
    server = stack.enter_context(serving(*command))
    store = NbdStore(Exports.of(server.url(state)).disk("os"), "os", lambda: False, write=True)
    stack.callback(store.close)
    return store


@pytest.mark.parametrize("filters", [[], ["--filter=nozero"]], ids=["zero", "nozero"])
def test_zeros_are_cleared_however_the_server_can(tmp_path: Path, filters: list[str]) -> None:
    """Any offsets; and what is cleared takes no space where the server can clear."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * (4 * MIB))
    with ExitStack() as stack:
        store = opened(nbdkit(*filters, "file", backing), tmp_path, stack)
        store.zero(513, 3 * MIB)
        store.flush()
        assert next(store.extents(0, MIB)) in [(0, 513), (0, 4096), (0, MIB)]
    content = backing.read_bytes()
    assert content == b"x" * 513 + bytes(3 * MIB) + b"x" * (MIB - 513)
    if not filters:
        assert backing.stat().st_blocks * 512 < 2 * MIB


_EVAL = ["eval", "get_size=echo 4M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null"]


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["--filter=error", "memory", "4M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"], "Free space"),
        ([*_EVAL, "can_flush=exit 0", "flush=echo EIO >&2; exit 1"], "the server's log"),
    ],
    ids=["write", "flush"],
)
def test_what_the_server_refuses_is_an_error_and_what_it_holds_is_unknown(
    state: Path, command: list[str | Path], remedy: str
) -> None:
    with serving(*nbdkit(*command)) as server:
        export = Exports.of(server.url(state)).disk("os")
        with Replica(NbdMedium(export, "os", state)) as replica, pytest.raises(DestinationFailed) as raised:
            bring(replica, {1: A}, size=MIB)
        assert remedy in raised.value.remedy
        assert raised.value.disk == "os"
        with Replica(NbdMedium(export, "os", state)) as replica:
            stored = replica.stored()
        assert {stored.digest(index) for index in range(stored.count)} == {UNKNOWN}


def test_a_server_that_stalls_or_is_stopped_ends_the_run(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(*nbdkit("memory", "4M")))
        stopped: list[int] = []
        export = Exports.of(server.url(state)).disk("os")
        store, other = (NbdStore(export, "os", lambda: bool(stopped), write=True) for _ in range(2))
        server.process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(nbd_store, "PATIENCE", 0.1)
        with pytest.raises(DestinationFailed, match="has not answered in time"):
            store.read(0, MIB)
        with pytest.raises(DestinationFailed, match="has not answered in time"):
            store.read(0, MIB)
        with pytest.raises(InvalidInput, match="does not answer"):
            NbdStore(export, "os", lambda: False, write=True)
        stopped.append(1)
        with pytest.raises(DestinationFailed, match="was stopped"):
            other.write(0, b"x")


# Runs


def sent(done: Any) -> list[int]:
    return [disk.sent_bytes for disk in done.disks]


def converted(image: Path) -> bytes:
    """What is in a qcow2 image."""
    raw = image.with_suffix(".converted")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


@pytest.mark.slow
def test_a_vm_goes_into_qcow2_images_and_later_only_what_changed(
    azure: Sandbox, direct: Source, image: Image, tmp_path: Path, sockets: Path
) -> None:
    disks = {"os": image("os", 3 * MIB, seed=1), "data-0": image("data", 2 * MIB, seed=2)}
    azure.add_vm("web", disks["os"], [disks["data-0"]])
    state, images = tmp_path / "state", {}
    to = with_state(f"nbd+unix:///?socket={sockets}/{{vm}}-{{disk}}", state)
    with ExitStack() as stack:
        for name, disk in disks.items():
            images[name] = qcow2(tmp_path / f"{name}.qcow2", disk.stat().st_size)
            at = sockets / f"web-{name}"
            stack.enter_context(serving(*qemu_nbd(images[name], f"web-{name}"), at=at))
        first = direct.replicate("web", to)
        assert sum(sent(first)) > 0
        point = direct.status(to).point
        changed = bytearray(disks["data-0"].read_bytes())
        changed[MIB : MIB + 4096] = random.Random(3).randbytes(4096)
        disks["data-0"].write_bytes(changed)
        azure.write("web", 0, disks["data-0"])
        assert sum(sent(direct.replicate("web", to, keep=2))) <= MIB
        assert sent(direct.replicate("web", to)) == [0, 0]
        assert [verdict.verified for verdict in direct.verify(to)] == [True, True]

        def command(*words: str | Path) -> Any:
            line = [str(word) for word in (*words, "--state", state, "--json")]
            done = CliRunner().invoke(cli, line, catch_exceptions=False)
            assert done.exit_code == 0, done.output
            return json.loads(done.stdout)

        url = f"nbd+unix:///?socket={sockets}/{{vm}}-{{disk}}"
        assert [verdict["verified"] for verdict in command("verify", url)] == [True, True]
        told = command("status", url)
        assert (told["disks"], told["missing"]) == (["data-0", "os"], [])
        assert point is not None
        command("restore", url, "--point", point, "--to", tmp_path / "restored")
        # Somebody else writes to it: verify tells, and the next run puts it right.
        other = NbdStore(Exports.of(to).of_vm("web").disk("os"), "os", lambda: False, write=True)
        other.write(MIB, b"stranger")
        other.flush()
        other.close()
        assert [verdict.verified for verdict in direct.verify(to)] == [True, False]
        assert direct.replicate("web", to).disks[0].zero_bytes == MIB
    for name, disk in disks.items():
        assert converted(images[name]) == disk.read_bytes()
    assert (tmp_path / "restored/os.raw").read_bytes() == disks["os"].read_bytes()
    with pytest.raises(InvalidInput, match="state of a replica on an NBD server"):
        places.open(str(state), silent)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["first", "later", "publishing"])
def test_a_server_that_fails_ends_the_run_and_a_later_one_goes_on(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path, sockets: Path, run: str
) -> None:
    disk, backing = image("os", 3 * MIB, seed=1), tmp_path / "backing"
    azure.add_vm("web", disk)
    backing.write_bytes(bytes(3 * MIB))
    source, before = connect(environment=DIRECT), azure.resources()
    to = f"nbd+unix:///web?socket={sockets}/s&state={tmp_path}/state"
    failing = tmp_path / "failing"
    errors = ["error-pwrite=EIO", "error-pwrite-rate=100%", f"error-pwrite-file={failing}"]
    command = nbdkit("--filter=error", "file", backing, *errors)
    if run != "first":
        with serving(*command, at=sockets / "s"):
            source.replicate("web", to)
        disk.write_bytes(random.Random(4).randbytes(MIB) + disk.read_bytes()[MIB:])
        azure.write("web", "os", disk)
    with serving(*command, at=sockets / "s") as server:

        def killing(event: Event) -> None:
            if isinstance(event, Copied) and run != "publishing":
                server.kill()
            elif isinstance(event, Copied):
                failing.touch()

        dying = Source(
            azure.connection_info(),
            {**azure.environment(), **DIRECT},
            report=killing,
            transport=azure.transport(),
        )
        with dying, pytest.raises(TransferError) as raised:
            dying.replicate("web", to)
    assert ("the server's log" if run == "publishing" else "start the server again") in raised.value.remedy
    assert azure.resources() == before
    failing.unlink(missing_ok=True)
    with serving(*command, at=sockets / "s"):
        source.replicate("web", to)
        assert [verdict.verified for verdict in source.verify(to)] == [True]
    assert backing.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["-r", "memory", "8M"], "is read-only"),
        (_EVAL, "cannot flush"),
        (["memory", "1M"], "has 1048576 bytes"),
        (["data", "1 2 3", "size=8M"], "holds data"),
        (["memory", "8M"], "take any name"),
        (
            ["--filter=exportname", "memory", "8M", "exportname-strict=true", "exportname=other"],
            "cannot be used",
        ),
        (["false"], "cannot be used"),
    ],
    ids=["read-only", "no flush", "too small", "foreign", "nameless", "missing", "no server"],
)
def test_an_export_that_cannot_take_the_disk_is_refused_before_anything_is_made(
    azure: Sandbox, direct: Source, image: Image, state: Path, command: list[str], says: str
) -> None:
    azure.add_vm("web", image("os", 3 * MIB), [image("data", MIB)] if says == "take any name" else [])
    asked, words = azure.resources(), nbdkit(*command) if command != ["false"] else ["false"]
    needs()
    with serving(*words) as server, pytest.raises(InvalidInput, match=says) as raised:
        direct.replicate("web", server.url(state))
    assert raised.value.remedy
    assert azure.resources() == asked


def test_a_file_with_an_image_in_it_is_not_overwritten(tmp_path: Path, state: Path) -> None:
    """Even if it may be: the server serves the file, not what is in it."""
    wrapped = qcow2(tmp_path / "os.qcow2", 4 * MIB)
    with serving(*nbdkit("file", wrapped)) as server:
        medium = NbdMedium(Exports.of(server.url(state)).disk("os"), "os", state, adopt=True)
        with pytest.raises(InvalidInput, match="qcow2"):
            Replica(medium).take()


def test_a_server_that_tells_exports_apart_serves_several_disks(tmp_path: Path, state: Path) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    for name in ("web-1-os", "web-1-data-0"):
        (exports / name).write_bytes(bytes(MIB))
    with (
        serving(*nbdkit("file", f"dir={exports}")) as server,
        places.open(server.url(state), silent) as place,
    ):
        place.reserve(["os", "data-0"])
        with pytest.raises(InvalidInput, match="does not list that export"):
            place.reserve(["os", "data-1"])


def test_another_export_than_last_time_is_refused_unless_it_is_empty(tmp_path: Path, state: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * MIB)
    with serving(*nbdkit("file", backing)) as server:
        for name, content in (("one", A), ("two", B)):
            export = Exports.of(server.url(state, name)).disk("os")
            with Replica(NbdMedium(export, "os", state, adopt=True)) as replica:
                bring(replica, {1: content}, size=MIB)
                replica.publish()
        medium = NbdMedium(Exports.of(server.url(state, "one")).disk("os"), "os", state)
        with pytest.raises(InvalidInput, match="is another export than in the last run"):
            Replica(medium).take()
        (state / "os.raw.manifest").write_text("cut off")
        with pytest.raises(InvalidInput, match="may be another export than in the last run"):
            Replica(medium).take()


def test_tls_goes_to_the_server_by_its_url(tmp_path: Path, state: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:" + "0123456789abcdef" * 4 + "\n")
    keys.chmod(0o600)
    with serving(*nbdkit("--tls=require", f"--tls-psk={keys}", "memory", "4M")) as server:
        plain = Exports.of(server.url(state)).disk("os")
        with pytest.raises(InvalidInput, match="TLS"):
            NbdStore(plain, "os", lambda: False, write=True)
        url = f"nbds+unix://alice@/web-1?socket={server.path}&tls-psk-file={keys}&state={state}"
        store = NbdStore(Exports.of(url).disk("os"), "os", lambda: False, write=True)
        store.write(0, b"x")
        assert store.read(0, 1) == b"x"
        store.close()


# Without a server


@pytest.mark.parametrize("module", [None, ModuleType("nbd")], ids=["missing", "another"])
def test_without_the_binding_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, state: Path, module: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "nbd", module)
    url = f"nbd+unix:///x?socket=/nowhere&state={state}"
    with places.open(url, silent) as place, pytest.raises(InvalidInput, match="libnbd") as raised:
        place.reserve(["os"])
    assert "python3-libnbd" in raised.value.remedy


@pytest.mark.parametrize(
    ("url", "export", "server"),
    [
        ("nbd://host/?state=s", "nbd://host/web-os", "host:10809"),
        ("NBD://Host:99/pool/{vm}/{disk}?state=s", "nbd://Host:99/pool/web/os", "host:99"),
        ("nbds://[::1]/img?state=s", "nbds://[::1]/img-os", "::1:10809"),
        (
            "nbd+unix:///a%20b?state=s&socket=/run/{disk}.sock",
            "nbd+unix:///a%20b-os?socket=/run/os.sock",
            "/run/os.sock",
        ),
    ],
)
def test_each_disk_has_an_export_of_its_own(url: str, export: str, server: str) -> None:
    found = Exports.of(url).of_vm("web").disk("os")
    assert (found.uri, found.server, found.state) == (export, server, Path("s"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nbd://host/x", "needs a folder"),
        ("nbd:///x?state=s", "does not name a server"),
        ("nbd+unix:///x?state=s", "does not name a server"),
        ("nbd://host/x?socket=/s&state=s", "does not name a server"),
        ("nbd://host:x/?state=s", "not a valid URL"),
        ("nbd://host/?state=s&sokcet=/s", "sokcet has no meaning"),
        ("nbd://host/?state=s&state=t", "there twice"),
        ("nbd://host/{name}?state=s", "only {vm} and {disk}"),
    ],
)
def test_a_url_that_is_not_one_says_why(url: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        places.open(url, silent)


def test_the_state_is_part_of_the_url_once() -> None:
    assert with_state("nbd://h/x", "a b&c") == "nbd://h/x?state=a%20b%26c"
    assert Exports.of(with_state("nbd://h/x", "a b&c")).state == Path("a b&c")
    for url in ("/srv/replicas", "nbd://h/x?state=s"):
        with pytest.raises(InvalidInput, match="state"):
            with_state(url, "s")


@pytest.mark.parametrize("command", ["replicate", "cutover", "plan", "verify", "status", "restore"])
def test_every_command_with_a_destination_takes_the_state(tmp_path: Path, command: str) -> None:
    """Which is refused for a destination that has no use for it."""
    settings = tmp_path / "settings.json"
    settings.write_text("{}")
    source = ["-c", str(settings), "-e", str(settings)]
    words = {
        **{key: [*source, "web", "--to", "/x"] for key in ["replicate", "cutover", "plan"]},
        **{key: ["/x"] for key in ["verify", "status"]},
        "restore": ["/x", "--point", "latest", "--to", "/y"],
    }
    with pytest.raises(InvalidInput, match="/x takes no --state"):
        CliRunner().invoke(cli, [command, *words[command], "--state", "s"], catch_exceptions=False)


def test_several_vms_have_exports_and_states_of_their_own(tmp_path: Path) -> None:
    with several.held(f"nbd://host/?state={tmp_path}/s") as place:
        found = Exports.of(place("web"))
    assert (found.disk("os").uri, found.state) == ("nbd://host/web-os", tmp_path / "s/web")
    with pytest.raises(InvalidInput, match="same names"), several.held(f"nbd://host/x?state={tmp_path}/s"):
        pass


def test_what_goes_over_a_network_in_the_clear_is_told(tmp_path: Path) -> None:
    told: list[Event] = []
    for number, url in enumerate(("nbd://10.0.0.9/x", "nbd://127.0.0.1/x", "nbds://10.0.0.9/x")):
        places.open(with_state(url, tmp_path / str(number)), told.append).close()
    assert [event.text.partition(" is ")[0] for event in told if isinstance(event, Notice)] == [
        "nbd://10.0.0.9/x-{disk}"
    ]


def test_state_and_images_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "os.raw").touch()
    with pytest.raises(InvalidInput, match="holds images"):
        places.open(f"nbd://127.0.0.1/x?state={tmp_path}", silent)
    with pytest.raises(NoReplica):
        places.open(f"nbd://127.0.0.1/?state={tmp_path}/new", silent, existing=True)
