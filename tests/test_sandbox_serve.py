"""A sandbox as people use it: served in the foreground, changed by other processes."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.sandbox import Response, VmSpec, add_vm, resources, serve, write
from coriolis_azure.sandbox.server.https import Server
from harness.clients import Body, Clients, serving
from harness.constants import DEADLINE

pytestmark = pytest.mark.slow


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(4096))
    return path


def test_the_settings_lie_ready_and_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "azure"
    with serving(directory) as info:
        assert set(info) == {
            "subscription_id",
            "tenant",
            "service_principal_credentials",
            "default_resource_group",
            "cloud_profile",
            "custom_cloud_properties",
            "ca_bundle",
        }
        environment = json.loads((directory / "environment.json").read_text())
        assert environment["location"] == "westeurope"
        assert environment["export_worker_ssh_port"] > 1024
        for name in ("connection.json", "environment.json", "ca.key", "server.key", "state.json"):
            assert (directory / name).stat().st_mode & 0o777 == 0o600


def test_other_processes_make_and_change_vms(tmp_path: Path, raw: Path) -> None:
    directory = tmp_path / "azure"
    with serving(directory) as info:
        before = resources(directory)
        vm = add_vm(directory, "web", raw, [raw], VmSpec(size="Standard_B2ms", os_type="windows"))
        raw.write_bytes(os.urandom(8192))
        write(directory, "web", 0, raw)
        rows = resources(directory)
        assert vm in [row["id"] for row in rows]
        assert rows == sorted(rows, key=lambda row: row["id"].lower())
        assert all(set(row) == {"id", "type", "tags"} for row in rows)
        assert len(rows) == len(before) + 6
        clients = Clients(info)
        assert clients.compute.disks.get("sandbox", "web-data-0").disk_size_bytes == 8192
        clients.close()
        with pytest.raises(errors.InvalidInput, match="'other' does not exist"):
            write(directory, "other", "os", raw)
        with pytest.raises(errors.InvalidInput, match="exists"):
            add_vm(directory, "web", raw)


def test_the_same_directory_is_served_again(tmp_path: Path, raw: Path) -> None:
    directory = tmp_path / "azure"
    with serving(directory) as first:
        add_vm(directory, "web", raw)
        before = resources(directory)
    with pytest.raises(errors.InvalidInput, match="no sandbox is serving") as refusal:
        resources(directory)
    assert f"coriolis-azure sandbox serve {directory}" in refusal.value.remedy
    with serving(directory) as second:
        assert second == first, "same address, same credentials: settings that were copied stay good"
        assert resources(directory) == before


@pytest.mark.parametrize("name", ["connection.json", "environment.json"])
def test_settings_of_a_real_azure_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("real")
    with pytest.raises(errors.InvalidInput, match=f"{name} is not of a sandbox") as refused:
        serve(tmp_path)
    assert "new folder" in refused.value.remedy
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "real"}


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.InvalidInput, match=str(port)):
            serve(tmp_path / "azure", port=port)


def test_a_client_that_says_nothing_holds_up_nobody(tmp_path: Path) -> None:
    with serving(tmp_path / "azure") as info, socket.create_connection(("127.0.0.1", _port(info))):
        assert resources(tmp_path / "azure")


def test_a_client_that_goes_before_the_handshake_leaves_no_socket_to_the_collector(tmp_path: Path) -> None:
    with Server(lambda request: Response.of(200, {}), tmp_path, 0) as server:
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close resets
        with pytest.raises(ConnectionResetError):
            server.get_request()
    gc.collect()  # what it finds open is a warning, and so an error


def test_long_request_lines_are_taken_and_longer_ones_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "azure") as info:
        context = ssl.create_default_context(cafile=info["ca_bundle"])
        for length, status in ((12_000, b"401"), (20_000, b"414")):
            with (
                socket.create_connection(("127.0.0.1", _port(info))) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
            ):
                line = f"GET /subscriptions?x={'y' * length} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
                connection.sendall(line.encode())
                assert connection.recv(100).split()[1] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_serving(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys; from pathlib import Path; from coriolis_azure.sandbox import serve;"
        "serve(Path(sys.argv[1]), ready=lambda: print('ready', flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "azure")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert resources(tmp_path / "azure")
        process.send_signal(number)
        assert process.wait(DEADLINE) == 0


def _port(info: Body) -> int:
    return int(info["custom_cloud_properties"]["endpoints"]["resource_manager_endpoint"].rpartition(":")[2])
