"""Serves a sandbox, and controls it from other processes of this machine.

`serve` is the foreground process. The other functions find it through DIR/connection.json, sign in at its ordinary
token endpoint and use a few routes of its own. They pass files by path; the server reads them.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import requests

from coriolis_azure import errors
from coriolis_azure.sandbox.catalog import VmSpec
from coriolis_azure.sandbox.sandbox import PACE, Sandbox
from coriolis_azure.sandbox.server.https import Server
from coriolis_azure.sandbox.wire import Json

_TIMEOUT = 600.0


def serve(
    directory: Path,
    *,
    port: int = 0,
    api_profile: str = "latest",
    pace: float = PACE,
    ready: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve the sandbox of a directory until `stop` is set or, without it, until SIGINT or SIGTERM.

    `ready` is called once requests are answered and connection.json and environment.json are written. Port 0 means
    the last port used, or any free one. Raises InvalidInput if the directory or the port is in use, or if the
    directory holds settings of another Azure.
    """
    _refuse_foreign(directory)
    with (
        Sandbox(directory, api_profile=api_profile, pace=pace) as sandbox,
        _listening(sandbox, port) as server,
    ):
        _write(sandbox.directory / "environment.json", sandbox.environment())
        _write(sandbox.directory / "connection.json", sandbox.connection_info(server.url))
        if stop is not None:
            ready()
            stop.wait()
            return
        with _stop_signal() as event:
            ready()
            event.wait()


def _refuse_foreign(directory: Path) -> None:
    """Raise InvalidInput if the settings in the directory are not those of a sandbox: they may be the only copy."""
    if (directory / "state.json").exists():
        return
    for name in ("connection.json", "environment.json"):
        if (directory / name).exists():
            raise errors.InvalidInput(
                f"{directory / name} is not of a sandbox, and would be replaced",
                remedy="Give a new folder for the sandbox.",
            )


def add_vm(
    directory: Path,
    name: str,
    os_disk: Path,
    data_disks: Sequence[Path] = (),
    spec: VmSpec | None = None,
) -> str:
    """Make a VM in the sandbox that serves `directory`; see `Sandbox.add_vm`."""
    body = {
        "name": name,
        "os_disk": str(Path(os_disk).absolute()),
        "data_disks": [str(Path(file).absolute()) for file in data_disks],
        "spec": asdict(spec or VmSpec()),
    }
    return str(_request(directory, "POST", "vms", body)["id"])


def write(directory: Path, name: str, disk: str | int, file: Path, offset: int | None = None) -> None:
    """Replace the content of a disk in the sandbox that serves `directory`, or its part at `offset`.

    See `Sandbox.write` and `Sandbox.disk`.
    """
    body = {"name": name, "disk": disk, "file": str(Path(file).absolute()), "offset": offset}
    _request(directory, "POST", "write", body)


def clear(directory: Path, name: str, disk: str | int, offset: int, length: int) -> None:
    """Clear a part of a disk in the sandbox that serves `directory`, as TRIM does."""
    _request(directory, "POST", "clear", {"name": name, "disk": disk, "offset": offset, "length": length})


def fault(directory: Path, kind: str, **details: Any) -> Json:
    """Add a fault rule in the sandbox that serves `directory`, and return it; see `faults.Fault`."""
    rule: Json = _request(directory, "POST", "faults", {"kind": kind, **details})
    return rule


def fault_rules(directory: Path, *, clear: bool = False) -> list[Json]:
    """The active fault rules of the sandbox that serves `directory`; with `clear`, remove all."""
    listed: list[Json] = _request(directory, "DELETE" if clear else "GET", "faults")
    return listed


def permit(directory: Path, roles: Sequence[Json]) -> None:
    """Give the identity of the sandbox that serves `directory` exactly these role definitions."""
    _request(directory, "PUT", "roles", {"roles": list(roles)})


def resources(directory: Path) -> list[Json]:
    """Every resource of the sandbox that serves `directory`; see `Sandbox.resources`."""
    rows: list[Json] = _request(directory, "GET", "resources")
    return rows


@contextmanager
def _listening(sandbox: Sandbox, port: int) -> Iterator[Server]:
    server = _server(sandbox, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _server(sandbox: Sandbox, port: int) -> Server:
    last = _last_port(sandbox.directory) if port == 0 else port
    for candidate in (last, 0) if port == 0 else (port,):
        try:
            return Server(sandbox.handle, sandbox.directory, candidate)
        except OSError as error:
            if candidate == 0 or port != 0:
                raise errors.InvalidInput(
                    f"the sandbox cannot listen on 127.0.0.1:{candidate}: {error.strerror}",
                    remedy="Choose another port, or let the sandbox choose one.",
                ) from None
    raise AssertionError("port 0 either listens or raises")


def _last_port(directory: Path) -> int:
    try:
        base = _connection(directory)["custom_cloud_properties"]["endpoints"]["resource_manager_endpoint"]
        return int(str(base).rpartition(":")[2])
    except (OSError, ValueError, KeyError):
        return 0


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set while the block runs."""
    event = threading.Event()

    def set_event(number: int, frame: FrameType | None) -> None:
        del number, frame
        event.set()

    before = {number: signal.signal(number, set_event) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(path: Path, document: Json) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    temporary.replace(path)


def _connection(directory: Path) -> Json:
    document: Json = json.loads((directory / "connection.json").read_text())
    return document


def _request(directory: Path, method: str, action: str, body: Json | None = None) -> Any:
    """The answer of the sandbox that is being served; InvalidInput if it refuses or there is none."""
    directory = Path(directory)
    try:
        settings = _connection(directory)
        base = settings["custom_cloud_properties"]["endpoints"]["resource_manager_endpoint"]
        with requests.Session() as session:
            session.trust_env = False
            session.verify = settings["ca_bundle"]
            token = session.post(
                f"{base}/{settings['tenant']}/oauth2/v2.0/token",
                data={"grant_type": "client_credentials", **settings["service_principal_credentials"]},
                timeout=_TIMEOUT,
            ).json()["access_token"]
            answer = session.request(
                method,
                f"{base}/sandbox/{action}",
                json=body,
                headers={"Authorization": f"Bearer {token}"},
                timeout=_TIMEOUT,
            )
            document = answer.json()
    except (OSError, ValueError, KeyError, requests.RequestException):
        raise errors.InvalidInput(
            f"no sandbox is serving {directory}",
            remedy=f"Start it with: coriolis-azure sandbox serve {directory}",
        ) from None
    if answer.status_code >= 400:
        error = document["error"]
        raise errors.InvalidInput(error["message"], remedy=error.get("remedy"))
    return document
