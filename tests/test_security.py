"""Nobody is let in and nothing secret gets out: a whole run is searched for every secret there is in it."""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import AzureExportProvider, agent, errors
from coriolis_azure.agent import wire
from coriolis_azure.events import Event, Notice
from coriolis_azure.readers import channel, keys, ssh
from coriolis_azure.replica.manifest import KEY, Manifest
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness import orchestrator_logs
from harness.battles import MIB, served
from harness.pipes import Pipes

CHUNK = 65536


class Spy:
    """Learns the secrets of a run as they are made, and searches what others can see while it goes on."""

    def __init__(self, azure: Sandbox, monkeypatch: pytest.MonkeyPatch, journals: Path) -> None:
        principal = azure.connection_info()["service_principal_credentials"]
        self.secrets: dict[str, str] = {"client secret": principal["client_secret"]}
        self.looked = 0
        self.found: list[str] = []
        self._journals = journals
        for name in ("client_key", "host_key"):
            monkeypatch.setattr(keys, name, self._watched(name, getattr(keys, name)))
        identity = channel._identity

        def certified(name: str) -> tuple[str, str]:
            public, private = identity(name)
            self.secrets[f"TLS key of {name}"] = private.split("\n")[1]
            return public, private

        monkeypatch.setattr(channel, "_identity", certified)
        azure.intercept = self

    def _watched(self, name: str, make: Callable[[], tuple[str, str]]) -> Callable[[], tuple[str, str]]:
        def made() -> tuple[str, str]:
            private, public = make()
            self.secrets[name] = "".join(private.split("\n")[2:-2])[:60]
            self.secrets[f"{name}, a line"] = private.split("\n")[2]
            return private, public

        return made

    def __call__(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        """The sandbox's intercept."""
        _, _, token = (request.header("Authorization") or "").partition(" ")
        if token:
            self.secrets["token"] = token
        if request.method in ("PUT", "PATCH", "DELETE"):
            self.look()
        return answer(request)

    def look(self) -> None:
        """Search the process list, the journals, and the `repr` of everything of ours that lives."""
        self.looked += 1
        for process in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                self.search(f"{name} of a process", text_of(process / name))
        for path in self._journals.rglob("*"):
            self.search("the journal", text_of(path))
        for thing in gc.get_objects():
            module = str(type(thing).__module__)
            if module.startswith("coriolis_azure") and "sandbox" not in module:
                self.search(f"repr of a {type(thing).__name__}", repr(thing))

    def search(self, where: str, text: str) -> None:
        """Note the secrets that `text` holds."""
        self.found += [f"{name} in {where}" for name, secret in self.secrets.items() if secret in text]


def text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("latin-1")
    except OSError:
        return ""


@pytest.fixture
def spy(azure: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Spy:
    return Spy(azure, monkeypatch, tmp_path / "state")


def manifest_secrets(folder: Path) -> dict[str, str]:
    """The key and the digests of every manifest in a folder, in the forms in which they could be written."""
    secrets = {}
    for path in folder.glob("*.manifest"):
        document = json.loads(path.read_text())
        manifest = Manifest.from_json(document)
        assert len(manifest.key) == KEY
        secrets[f"digests of {path.name}"] = document["chunks"]
        secrets[f"key of {path.name} in hex"] = manifest.key.hex()
        secrets[f"key of {path.name} in base64"] = base64.b64encode(manifest.key).decode().rstrip("=")
        secrets[f"key of {path.name}"] = manifest.key.decode("latin-1")
    return secrets


@pytest.mark.slow
def test_no_secret_of_a_whole_run_can_be_seen_anywhere(
    azure: Sandbox,
    source: Source,
    spy: Spy,
    told: list[Event],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Logs of all libraries at DEBUG, events, process list and environment, journal, repr, files that stay."""
    content, images = tmp_path / "content", tmp_path / "images"
    content.write_bytes(random.Random(1).randbytes(2 * MIB))
    azure.add_vm("web", content)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "azure"):
        source.replicate("web", images)
        content.write_bytes(random.Random(2).randbytes(MIB) + content.read_bytes()[MIB:])
        azure.write("web", "os", content)
        source.replicate("web", images)
    assert {"client secret", "token", "client_key", "host_key"} <= spy.secrets.keys()
    assert {"TLS key of coriolis-azure host", "TLS key of coriolis-azure worker"} <= spy.secrets.keys()
    spy.secrets |= manifest_secrets(images)
    assert len(caplog.records) > 100
    for record in caplog.records:
        spy.search(f"the log of {record.name}", record.getMessage())
    spy.search("the log", caplog.text)
    spy.search("the events", repr(told))
    spy.search("the output", "".join(capfd.readouterr()))
    spy.look()
    for path in tmp_path.rglob("*"):
        of_the_sandbox = tmp_path / "azure" in path.parents and "guests" not in path.parts
        if path.is_file() and not of_the_sandbox and path.suffix not in (".manifest", ".raw"):
            spy.search(f"the file {path.name}", text_of(path))
    assert spy.looked >= 10
    assert sorted(set(spy.found)) == []


@pytest.mark.slow
def test_no_secret_is_in_what_the_orchestrator_logs_and_shows_of_a_transfer_and_a_pool(
    azure: Sandbox, spy: Spy, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Every result goes to the logs of two services. With a pool, what is kept of its worker is shown too."""
    content = tmp_path / "content"
    content.write_bytes(random.Random(1).randbytes(MIB))
    azure.add_vm("web", content)
    environment, provider = azure.environment(), AzureExportProvider(None)
    target = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
    with served(azure) as connection, caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "azure"):
        info = provider.get_replica_instance_info(None, connection, environment, "web")
        volumes = [{"disk_id": info["devices"]["disks"][0]["id"], "volume_dev": str(tmp_path / "volume")}]
        made = provider.deploy_replica_source_resources(None, connection, info, environment)
        shared = provider.set_up_pool_shared_resources(None, connection, environment, "pool")
        minion = provider.create_minion(None, connection, environment, "pool", "linux", shared, "minion")
        for resources, reached in (
            (made["migr_resources"], made["connection_info"]),
            (minion["minion_provider_properties"], minion["connection_info"]),
        ):
            copied = provider.replicate_disks(
                None, connection, environment, "web", resources, reached, target, volumes, True
            )
            for result in (
                {"source_resources": resources, "source_resources_connection_info": reached},
                {"minion_provider_properties": resources, "minion_connection_info": reached},
                {"volumes_info": copied},
            ):
                spy.search("the orchestrator's log", repr(orchestrator_logs.logged(result)))
            spy.search("its REST API", repr(orchestrator_logs.shown(resources, reached)))
    assert {"client secret", "token", "client_key"} <= spy.secrets.keys()
    spy.search("the log", caplog.text)
    assert sorted(set(spy.found)) == []


@pytest.mark.slow
def test_no_secret_is_in_the_error_of_a_run_that_fails(
    azure: Sandbox, source: Source, spy: Spy, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    content = tmp_path / "content"
    content.write_bytes(random.Random(1).randbytes(MIB))
    azure.add_vm("web", content)

    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/disks/coriolis" in request.path:
            body = b'{"error": {"code": "RequestDisallowedByPolicy", "message": "Not here."}}'
            return Response(403, {"Content-Type": "application/json"}, body)
        return spy(request, answer)

    azure.intercept = refuse
    with caplog.at_level(logging.DEBUG), pytest.raises(errors.Denied) as caught:
        source.replicate("web", tmp_path / "images")
    error: BaseException | None = caught.value
    while error is not None:
        spy.search("a traceback", "".join(traceback.format_exception(error)))
        spy.search("an error", repr(error) + repr(vars(error)))
        error = error.__cause__ or error.__context__
    spy.search("the error as JSON", json.dumps(caught.value.to_json(), default=str))
    spy.search("the log", caplog.text)
    assert sorted(set(spy.found)) == []


@pytest.mark.slow
def test_what_a_run_keeps_is_for_its_owner_only(azure: Sandbox, source: Source, tmp_path: Path) -> None:
    content, images = tmp_path / "content", tmp_path / "images"
    content.write_bytes(random.Random(1).randbytes(MIB))
    azure.add_vm("web", content)
    before = os.umask(0)
    try:
        source.replicate("web", images)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o077 for path in [images, *images.iterdir()]}
    assert {name for name, mode in modes.items() if mode} <= {".vm"}


@pytest.mark.slow
def test_what_a_run_makes_lets_nobody_in(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path
) -> None:
    """Nobody can export snapshots and clones; the worker takes no password and may do nothing in Azure."""
    made: dict[str, list[dict[str, Any]]] = {"snapshots": [], "disks": [], "virtualMachines": []}

    def note(request: Request, answer: Callable[[Request], Response]) -> Response:
        kind, _, name = request.path.rpartition("/")
        if request.method == "PUT" and name.startswith("coriolis-"):
            made.setdefault(kind.rpartition("/")[2], []).append(json.loads(request.body))
        return answer(request)

    azure.add_vm("web", image("os", MIB), [image("data", MIB)])
    azure.intercept = note
    source.replicate("web", tmp_path / "images")
    assert [len(made[kind]) for kind in ("snapshots", "disks", "virtualMachines")] == [2, 2, 1]
    for body in made["snapshots"] + made["disks"]:
        assert body["properties"]["networkAccessPolicy"] == "DenyAll"
        assert body["properties"]["publicNetworkAccess"] == "Disabled"
    (vm,) = made["virtualMachines"]
    profile = vm["properties"]["osProfile"]
    assert profile["linuxConfiguration"]["disablePasswordAuthentication"] is True
    assert "adminPassword" not in profile
    assert "identity" not in vm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({}, True),
        ({"export_worker_allowed_addresses": ["0.0.0.0/0"]}, True),
        ({"export_worker_allowed_addresses": ["127.0.0.0/8"]}, False),
        ({"export_worker_use_fip": False, "export_network": "sandbox-vnet/default"}, False),
    ],
)
def test_a_worker_that_everybody_can_reach_is_told_of(
    azure: Sandbox,
    connect: Callable[..., Source],
    told: list[Event],
    tmp_path: Path,
    settings: dict[str, Any],
    is_told: bool,
) -> None:
    content = tmp_path / "content"
    content.write_bytes(bytes(MIB))
    azure.add_vm("web", content)
    source = connect(environment=settings)
    run, _ = source.prepare("web")
    assert source.finish(run) == []
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert any("export_worker_allowed_addresses" in text for text in notices) == is_told


def test_the_agent_has_the_disk_open_for_reading_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * 100 * CHUNK)
    base = Manifest.new(100 * CHUNK, CHUNK, "", bytes(wire.DIGEST - 1) + b"\1")
    with Pipes() as pipes:
        pipes.start(disk, base, leaf=4096)  # it asks for leaves now and waits
        pipes.document(wire.READY)
        descriptors = Path(f"/proc/{pipes.process.pid}/fd")
        open_for = {
            str(each.readlink()): int((descriptors.parent / "fdinfo" / each.name).read_text().split()[3], 8)
            for each in descriptors.iterdir()
        }
    assert open_for[str(disk)] & os.O_ACCMODE == os.O_RDONLY


@pytest.mark.parametrize(
    ("altered", "status", "words"),
    [
        (lambda source: source, 0, ""),
        (lambda source: source[:-1] + b"#", 1, "the agent was damaged on its way to the worker"),
        (lambda source: source[:-1], 0, ""),  # the host is gone
    ],
    ids=["as sent", "altered", "cut off"],
)
def test_the_worker_runs_only_what_was_sent(
    altered: Callable[[bytes], bytes], status: int, words: str
) -> None:
    source = agent.program()
    command = [sys.executable, *ssh.agent_words(source), "127.0.0.1"]
    ended = subprocess.run(command, input=altered(source), capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (status, b"")
    assert ended.stderr.decode().strip() == words
