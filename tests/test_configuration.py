"""What the orchestrator's configuration file says is honoured: our defaults, its proxy, its password for keys."""

from __future__ import annotations

import base64
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import AzureExportProvider
from coriolis_azure.sandbox import Request, Response, Sandbox
from harness.battles import served

pytestmark = pytest.mark.slow

pytest.importorskip("oslo_config", reason="the options are oslo.config's, which is not installed here")

# As the orchestrator starts a task: its configuration is parsed, then the plugin is loaded and called.
TASK = """
import json, sys
from oslo_config import cfg
from coriolis_azure import AzureExportProvider
cfg.CONF(["--config-file", sys.argv[1]], project="coriolis")
method, arguments = json.load(sys.stdin)
print(json.dumps(getattr(AzureExportProvider(None), method)(*arguments)))
"""
# Of the orchestrator: the module that registers the options of its proxy.
MANAGER = """
from oslo_config import cfg
cfg.CONF.register_opts(
    [cfg.StrOpt(name) for name in ("url", "username", "password")] + [cfg.ListOpt("no_proxy", default=[])],
    "proxy",
)
"""
# Of the orchestrator: the module that registers the password for temporary keys.
TASKS = """
from oslo_config import cfg
cfg.CONF.register_opts([cfg.StrOpt("temp_keypair_password")], "serialization")
"""


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that knows CONNECT, and lets in who says `expected`."""

    daemon_threads = True

    def __init__(self, expected: str) -> None:
        self.expected = "Basic " + base64.b64encode(expected.encode()).decode()
        self.passed: list[str] = []
        super().__init__(("127.0.0.1", 0), Tunnel)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Tunnel(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        _, target, _ = self.rfile.readline().decode().split()
        headers = dict[str, str]()
        while line := self.rfile.readline().decode().strip():
            name, _, headers[name] = line.partition(": ")
        if headers.get("Proxy-Authorization") != self.server.expected:
            self.wfile.write(b"HTTP/1.1 407 Who are you?\r\n\r\n")
            return
        self.server.passed.append(target)
        host, _, port = target.partition(":")
        with socket.create_connection((host, int(port))) as far:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(far, self.connection), daemon=True)
            back.start()
            pump(self.connection, far)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy("us er:p@ss") as server:
        yield server
        server.shutdown()


def task(folder: Path, configuration: str, method: str, *arguments: Any) -> Any:
    """What a call gives back in a process that is configured so; RuntimeError with its last words."""
    packages = folder / "orchestrator"
    for module, text in {"osmorphing.manager": MANAGER, "tasks.base": TASKS}.items():
        source = packages.joinpath("coriolis", *module.split(".")).with_suffix(".py")
        source.parent.mkdir(parents=True, exist_ok=True)
        for package in (source.parent, source.parent.parent):
            (package / "__init__.py").touch()
        source.write_text(text)
    file = folder / "coriolis.conf"
    file.write_text(configuration)
    path = f"{packages}:{Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-c", TASK, str(file)],
        input=json.dumps([method, arguments]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def test_the_groups_options_are_defaults_for_what_an_environment_leaves_out(
    azure: Sandbox, tmp_path: Path
) -> None:
    location, group = azure.environment()["location"], azure.environment()["resource_group"]
    configuration = f"""
[azure_migration_provider]
export_location = {location}
export_worker_size = Standard_D4s_v5
export_worker_image = version: latest, publisher: Canonical, offer: UbuntuServer, sku: 18.04-LTS
export_arm_network_api_version = 2023-09-01
"""
    asked: list[str] = []

    def noted(request: Request, answer: Callable[[Request], Response]) -> Response:
        asked.append(request.url)
        return answer(request)

    azure.intercept = noted
    with served(azure) as connection:
        assert AzureExportProvider().get_source_environment_schema()["required"] == ["location"]
        assert task(tmp_path, configuration, "get_source_environment_schema")["required"] == []
        told = task(tmp_path, configuration, "get_source_environment_options", None, connection)
        options = {option["name"]: option.get("config_default") for option in told}
        assert options["location"] == location
        assert options["export_worker_size"] == "Standard_D4s_v5"
        assert options["export_worker_image"]["offer"] == "UbuntuServer"
        assert options["resource_group"] is None
        asked.clear()
        environment = {"resource_group": group}
        assert task(tmp_path, configuration, "get_networks", None, connection, environment)
        assert all("api-version=2023-09-01" in url for url in asked if "/Microsoft.Network/" in url)
        with pytest.raises(RuntimeError, match="there is no VM"):
            task(tmp_path, configuration, "get_replica_instance_info", None, connection, environment, "web")


def test_an_option_of_another_plugin_with_the_same_name_is_no_error(tmp_path: Path) -> None:
    code = """
from oslo_config import cfg
cfg.CONF.register_opt(cfg.StrOpt("export_location", default="northeurope", help="theirs"), "azure_migration_provider")
from coriolis_azure import AzureExportProvider
assert AzureExportProvider().get_source_environment_schema()["required"] == []
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_azure_is_reached_through_the_orchestrators_proxy_except_where_it_says_otherwise(
    azure: Sandbox, tmp_path: Path, proxy: Proxy
) -> None:
    def configured(no_proxy: str) -> str:
        address = f"http://127.0.0.1:{proxy.server_address[1]}"
        return f"[proxy]\nurl = {address}\nusername = us er\npassword = p@ss\nno_proxy = {no_proxy}\n"

    with served(azure) as connection:
        assert task(tmp_path, configured("example.com"), "validate_connection", None, connection) is None
        assert {target.partition(":")[0] for target in proxy.passed} == {"127.0.0.1"}
        proxy.passed.clear()
        assert task(tmp_path, configured("127.0.0.1"), "validate_connection", None, connection) is None
        assert proxy.passed == []


def test_the_workers_key_travels_encrypted_where_a_password_for_temporary_keys_is_configured(
    azure: Sandbox, tmp_path: Path
) -> None:
    password = "[serialization]\ntemp_keypair_password = between us\n"
    environment = azure.environment()
    with served(azure) as connection:
        shared = task(
            tmp_path, password, "set_up_pool_shared_resources", None, connection, environment, "pool"
        )
        made = task(
            *(tmp_path, password, "create_minion"),
            *(None, connection, environment, "pool", "linux", shared, "minion"),
        )
        reached = made["connection_info"]
        assert reached["password"].startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
        check = "healthcheck_minion", None, connection, made["minion_provider_properties"]
        assert task(tmp_path, password, *check, reached) is None
        for other in ("", password.replace("us", "others")):
            with pytest.raises(RuntimeError, match=r"encrypted with a different .*temp_keypair_password"):
                task(tmp_path, other, *check, reached)
        with pytest.raises(RuntimeError, match=r"no password.*refresh the pool"):
            task(tmp_path, password, *check, {**reached, "password": None})
