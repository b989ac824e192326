"""The plugin's calls, each in a freshly started process, everything passed through JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import vhd
from coriolis_azure.errors import (
    CleanupIncomplete,
    CoriolisAzureError,
    Denied,
    DestinationFailed,
    InvalidInput,
)
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.battles import served
from harness.constants import MIB
from harness.plugin_errors import raised
from harness.processes import Forked

pytestmark = pytest.mark.slow


def task(text: str) -> None:
    """A process: one call of the plugin."""
    method, arguments = json.loads(text)
    print(json.dumps(getattr(AzureExportProvider(None), method)(None, *arguments)))


def started(method: str, *arguments: Any) -> Forked:
    """One call of the plugin in a process of its own."""
    return Forked(task, json.dumps([method, arguments]))


def call(method: str, *arguments: Any) -> Any:
    """What such a call gives back; RuntimeError with its last line when it raises."""
    with started(method, *arguments) as process:
        out, errors = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(errors.strip().splitlines()[-1])
    return json.loads(out)


def called_here(method: str, *arguments: Any) -> Any:
    """The same in this process, for what surrounds the call that a test is about: it takes a tenth of the time."""
    through = json.loads(json.dumps(arguments))
    return json.loads(json.dumps(getattr(AzureExportProvider(None), method)(None, *through)))


def volumes(info: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What a destination plugin makes: an empty volume a disk."""
    folder.mkdir(exist_ok=True)
    made = []
    for number, disk in enumerate(info["devices"]["disks"]):
        path = folder / f"volume-{number}"
        path.touch()
        made.append({"disk_id": disk["id"], "volume_dev": str(path)})
    return made


@pytest.fixture
def target() -> dict[str, Any]:
    return {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}


def execute(
    connection: Any,
    environment: Any,
    target: Any,
    volumes_info: Any,
    *,
    shutdown: bool,
    call: Callable[..., Any] = call,
) -> Any:
    """One execution, in the orchestrator's order; the source resources are deleted however it ends."""
    info = call("get_replica_instance_info", connection, environment, "web")
    deployed = call("deploy_replica_source_resources", connection, info, environment)
    try:
        if shutdown:
            call("shutdown_instance", connection, environment, "web")
        resources, reached = deployed["migr_resources"], deployed["connection_info"]
        return call(
            "replicate_disks", connection, environment, "web", resources, reached, target, volumes_info, True
        )
    finally:
        call("delete_replica_source_resources", connection, environment, deployed["migr_resources"])


def test_two_executions_and_a_failed_one_in_between(
    azure: Sandbox, image: Callable[..., Path], tmp_path: Path, target: dict[str, Any]
) -> None:
    os_disk, data = image("os", 3 * MIB, seed=1), image("data", 2 * MIB, seed=2)
    azure.add_vm("web", os_disk, [data])
    before, environment = azure.resources(), azure.environment()
    with served(azure) as connection:
        info = call("get_replica_instance_info", connection, environment, "web")
        entries = volumes(info, tmp_path / "volumes")
        entries = execute(connection, environment, target, entries, shutdown=False)
        assert [Path(entry["volume_dev"]).read_bytes() for entry in entries] == [
            os_disk.read_bytes(),
            data.read_bytes(),
        ]
        assert all(set(entry["replica_state"]) >= {"chunks", "size"} for entry in entries)

        broken = [{**entries[0], "volume_dev": str(tmp_path / "no/such/folder/volume")}, entries[1]]
        with pytest.raises(RuntimeError, match=rf"{raised(DestinationFailed).__name__}.* cannot be opened"):
            execute(connection, environment, target, broken, shutdown=False)
        assert azure.resources() == before

        changed = bytearray(data.read_bytes())
        changed[4096:8192] = bytes(4096)
        data.write_bytes(changed)
        azure.write("web", 0, data)
        skipped = [{**entries[0], "replicate_disk_data": False}, entries[1]]
        after = execute(connection, environment, target, skipped, shutdown=True)
        assert after[0] == skipped[0]
        assert Path(after[1]["volume_dev"]).read_bytes() == changed
        assert (
            call("get_replica_instance_info", connection, environment, "web")["power_state"] == "deallocated"
        )
        forgotten = call("delete_replica_source_snapshots", connection, environment, after)
        assert [entry["disk_id"] for entry in forgotten] == [entry["disk_id"] for entry in after]
        assert not any("replica_state" in entry for entry in forgotten)
    assert azure.resources() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("step", ["/snapshots/coriolis", "/disks/coriolis", "PATCH"])
def test_a_cancelled_or_killed_copy_is_cleaned_up_by_the_orchestrators_next_task(
    azure: Sandbox,
    image: Callable[..., Path],
    tmp_path: Path,
    target: dict[str, Any],
    step: str,
    number: signal.Signals,
) -> None:
    azure.add_vm("web", image("os"), [image("data", seed=2)])
    before, environment = azure.resources(), azure.environment()
    with served(azure) as connection:
        info = called_here("get_replica_instance_info", connection, environment, "web")
        deployed = called_here("deploy_replica_source_resources", connection, info, environment)
        entries = volumes(info, tmp_path / "volumes")
        resources, reached = deployed["migr_resources"], deployed["connection_info"]
        worker_alone = azure.resources()
        running = started(
            "replicate_disks", connection, environment, "web", resources, reached, target, entries, True
        )
        strikes: list[str] = []

        def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
            if ((request.method == "PUT" and step in request.path) or request.method == step) and not strikes:
                strikes.append(request.path)
                running.send_signal(number)
            return answer(request)

        azure.intercept = strike
        _, errors = running.communicate(timeout=60)
        azure.intercept = None
        assert strikes
        assert running.returncode == -number, errors
        if number == signal.SIGINT:
            assert "KeyboardInterrupt" in errors
            assert azure.resources() == worker_alone
        called_here("delete_replica_source_resources", connection, environment, resources)
        called_here("delete_replica_source_resources", connection, environment, resources)
    assert azure.resources() == before


def test_a_cancelled_deployment_undoes_itself(azure: Sandbox, image: Callable[..., Path]) -> None:
    """Nobody calls the delete method when deploying has not returned."""
    azure.add_vm("web", image("os"))
    before, environment = azure.resources(), azure.environment()
    with served(azure) as connection:
        info = called_here("get_replica_instance_info", connection, environment, "web")
        running = started("deploy_replica_source_resources", connection, info, environment)

        def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.method == "PUT" and "/networkInterfaces/coriolis" in request.path:
                running.send_signal(signal.SIGINT)
            return answer(request)

        azure.intercept = strike
        running.communicate(timeout=60)
        azure.intercept = None
    assert azure.resources() == before


def test_a_shutdown_that_fails_or_is_cancelled_is_followed_by_the_clean_up(
    azure: Sandbox, image: Callable[..., Path]
) -> None:
    """Deleting is refused once, too: what stayed is named, and the same task run again deletes it."""
    azure.add_vm("web", image("os"))
    before, environment = azure.resources(), azure.environment()
    with served(azure) as connection:
        info = call("get_replica_instance_info", connection, environment, "web")
        deployed = call("deploy_replica_source_resources", connection, info, environment)
        azure.intercept = lambda request, answer: (
            failure(409, "OperationNotAllowed", "Not now.")
            if request.path.endswith("/deallocate")
            else answer(request)
        )
        with pytest.raises(RuntimeError, match=r"OperationNotAllowed: Not now\."):
            call("shutdown_instance", connection, environment, "web")

        running = started("shutdown_instance", connection, environment, "web")

        def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.path.endswith("/deallocate"):
                running.send_signal(signal.SIGINT)
            return answer(request)

        azure.intercept = strike
        _, errors = running.communicate(timeout=60)
        assert "KeyboardInterrupt" in errors

        azure.intercept = lambda request, answer: (
            failure(409, "ScopeLocked", "The scope is locked.")
            if request.method == "DELETE" and "/networkInterfaces/" in request.path
            else answer(request)
        )
        resources = deployed["migr_resources"]
        with pytest.raises(RuntimeError, match=rf"{raised(CleanupIncomplete).__name__}.*coriolis-.*-nic"):
            call("delete_replica_source_resources", connection, environment, resources)
        azure.intercept = None
        call("delete_replica_source_resources", connection, environment, resources)
    assert azure.resources() == before


def failure(status: int, code: str, message: str) -> Response:
    """An error as ARM tells it."""
    return Response.of(status, {"error": {"code": code, "message": message}})


def test_a_cancelled_worker_of_a_pool_undoes_itself(azure: Sandbox) -> None:
    """Nobody deletes a worker that was never reported; what its pool shares stays."""
    before, environment = azure.resources(), azure.environment()
    pool, name = "0f6f1c1e-1111-4222-8333-444455556666", "9a7b6c5d-aaaa-4bbb-8ccc-ddddeeeeffff"
    with served(azure) as connection:
        shared = called_here("set_up_pool_shared_resources", connection, environment, pool)
        alone = azure.resources()
        running = started("create_minion", connection, environment, pool, "linux", shared, name)

        def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.method == "PUT" and "/virtualMachines/coriolis" in request.path:
                running.send_signal(signal.SIGINT)
            return answer(request)

        azure.intercept = strike
        _, errors = running.communicate(timeout=60)
        azure.intercept = None
        assert "KeyboardInterrupt" in errors
        assert azure.resources() == alone
        called_here("tear_down_pool_shared_resources", connection, environment, shared)
    assert azure.resources() == before


def test_the_cancelled_network_of_a_pool_undoes_itself(azure: Sandbox) -> None:
    before, environment = azure.resources(), azure.environment()
    with served(azure) as connection:
        running = started("set_up_pool_shared_resources", connection, environment, "0f6f1c1e-1111")

        def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
            response = answer(request)
            if request.method == "PUT" and "/virtualNetworks/coriolis" in request.path:
                running.send_signal(signal.SIGINT)
            return response

        azure.intercept = strike
        _, errors = running.communicate(timeout=60)
        azure.intercept = None
        assert "KeyboardInterrupt" in errors
    assert azure.resources() == before


def test_a_deployment_that_azure_refuses_leaves_nothing_and_says_why(
    azure: Sandbox, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"))
    before, environment = azure.resources(), azure.environment()
    with served(azure) as connection:
        info = call("get_replica_instance_info", connection, environment, "web")
        azure.intercept = lambda request, answer: (
            failure(409, "SkuNotAvailable", "Sold out.")
            if request.method == "PUT" and "/virtualMachines/coriolis" in request.path
            else answer(request)
        )
        with pytest.raises(RuntimeError, match=r"SkuNotAvailable: Sold out\. \(tried .+\)\. [A-Z]\w+ "):
            call("deploy_replica_source_resources", connection, info, environment)
        azure.intercept = None
    assert azure.resources() == before


def test_a_connection_is_validated(azure: Sandbox) -> None:
    with served(azure) as connection:
        assert call("validate_connection", connection) is None
        principal = {**connection["service_principal_credentials"], "client_secret": "wrong"}
        denied = raised(Denied, connection=True).__name__
        with pytest.raises(RuntimeError, match=f"{denied}.*AADSTS7000215"):
            call("validate_connection", {**connection, "service_principal_credentials": principal})
    with pytest.raises(raised(InvalidInput, connection=True), match="subscription_id is missing"):
        AzureExportProvider(None).validate_connection(None, {})


@pytest.mark.parametrize("settings", [None, True, 5, "text", [{}]])
def test_settings_that_are_no_objects_are_refused(settings: Any) -> None:
    """Whatever the orchestrator's client sent in their place."""
    provider, good = AzureExportProvider(None), {"subscription_id": "s"}
    refused: list[Callable[[], object]] = [
        lambda: provider.validate_connection(None, settings),
        lambda: provider.validate_replica_export_input(None, settings, "web", {}),
        lambda: provider.validate_replica_export_input(None, good, "web", settings),
        lambda: provider.validate_minion_pool_environment_options(None, good, settings),
        lambda: provider.check_update_source_environment_params(None, good, "web", [], settings, {}),
        lambda: provider.check_update_source_environment_params(None, good, "web", [], {}, settings),
    ]
    for act in refused:
        kinds = raised(InvalidInput), raised(InvalidInput, connection=True)
        with pytest.raises(kinds, match="must be of type object, not"):
            act()


def test_the_class_has_the_orchestrators_shape() -> None:
    assert AzureExportProvider.platform == "azure"
    assert AzureExportProvider(None).get_os_morphing_tools("linux", {}) == []
    provider = AzureExportProvider(None)
    for schema in (provider.get_connection_info_schema(), provider.get_source_environment_schema()):
        assert json.loads(json.dumps(schema))["properties"]


def test_importing_the_plugin_imports_no_sdk() -> None:
    """The orchestrator imports every plugin at each look-up. It has some imported itself."""
    code = """
import contextlib, sys
with contextlib.suppress(ImportError):
    import coriolis.exception, coriolis.providers.base
before = set(sys.modules)
import coriolis_azure.plugin.provider
print([module for module in set(sys.modules) - before if module.split(".")[0] in ("azure", "paramiko")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_vm_on_vhd_blobs_goes_through_the_same_tasks(
    azure: Sandbox, image: Callable[..., Path], tmp_path: Path, target: dict[str, Any]
) -> None:
    """With an interim copy in the container of the settings, which is made, and left empty."""
    disk = image("os", 3 * MIB, seed=1)
    azure.add_vm("web", disk, spec=VmSpec(unmanaged="oldstorage"))
    azure.storage.refuse_snapshot_imports()
    before = azure.resources()
    place = {"storage_account_name": "sandboxstorage", "storage_container_name": "interim"}
    environment = {**azure.environment(), **place}
    with served(azure) as connection:
        info = call("get_replica_instance_info", connection, environment, "web")
        assert info["devices"]["disks"][0]["size_bytes"] == 3 * MIB
        entries = volumes(info, tmp_path / "volumes")
        entries = execute(connection, environment, target, entries, shutdown=False)
    assert Path(entries[0]["volume_dev"]).read_bytes() == disk.read_bytes()
    assert azure.resources() == before
    assert azure.storage.account("sandboxstorage").containers["interim"].blobs == {}
    assert azure.storage.account("oldstorage").containers["vhds"].snapshots == []


PLACE = {"storage_account_name": "sandboxstorage", "storage_container_name": "replicas"}


def kept_in(azure: Sandbox, entry: dict[str, Any]) -> bytes:
    """What the VHD holds that an entry names, without its footer."""
    found = azure.storage.blob("sandboxstorage/" + entry["vhd_url"].partition("/sandboxstorage/")[2])
    assert found is not None
    assert found.metadata["coriolis_state"] == "complete"
    whole = azure.storage.content(found)
    assert vhd.content_size(whole[-512:], len(whole), "it") == len(whole) - 512
    return whole[:-512]


def verified(connection: dict[str, Any], environment: dict[str, Any]) -> dict[str, bool | None]:
    """What `verify` says of the VHDs, one by one and, where that is not well, together."""
    with Source(connection, environment) as source:
        return {each.name: each.verified for each in source.verify("blob://sandboxstorage/replicas/web")}


def test_vhds_of_an_execution_that_failed_half_way_are_no_replica(
    azure: Sandbox, image: Callable[..., Path], target: dict[str, Any]
) -> None:
    """One of two is complete by itself: only the record of both tells."""
    azure.add_vm("web", image("os", MIB), [image("data", MIB)])
    environment = {**azure.environment(), **PLACE}

    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.path.endswith("/data-0.vhd") and request.query.get("comp") == "page":
            return Response(403, {"x-ms-error-code": "AuthorizationFailure"}, b"")
        return answer(request)

    with served(azure) as connection:
        info = called_here("get_replica_instance_info", connection, environment, "web")
        given = [{"disk_id": disk["id"], "volume_dev": ""} for disk in info["devices"]["disks"]]
        azure.intercept = refuse
        with pytest.raises(raised(CoriolisAzureError)):
            execute(connection, environment, target, given, shutdown=False, call=called_here)
        azure.intercept = None
        told = verified(connection, environment)
        assert told.pop("replica") is False
        assert not all(told.values())
        execute(connection, environment, target, given, shutdown=False, call=called_here)
        assert verified(connection, environment) == {"data-0": True, "os": True}


def test_volumes_without_a_device_are_kept_in_the_container_of_the_settings(
    azure: Sandbox, image: Callable[..., Path], tmp_path: Path, target: dict[str, Any]
) -> None:
    """A first execution, one that fails, an incremental one, and the deletion of the transfer's disks."""
    os_disk, data = image("os", 3 * MIB, seed=1), image("data", 2 * MIB, seed=2)
    azure.add_vm("web", os_disk, [data])
    before, environment = azure.resources(), {**azure.environment(), **PLACE}
    containers = azure.storage.account("sandboxstorage").containers
    with served(azure) as connection:
        info = called_here("get_replica_instance_info", connection, environment, "web")
        given = [{"disk_id": disk["id"], "volume_dev": ""} for disk in info["devices"]["disks"]]
        assert "replicas" not in containers
        entries = execute(connection, environment, target, given, shutdown=False, call=called_here)
        assert [set(entry) for entry in entries] == [{"disk_id", "volume_dev", "vhd_url"}] * 2
        assert [kept_in(azure, entry) for entry in entries] == [os_disk.read_bytes(), data.read_bytes()]
        assert verified(connection, environment) == {"data-0": True, "os": True}
        containers["replicas"].blobs["web/notes.txt"] = replace(
            containers["replicas"].blobs["web/.vm"], name="web/notes.txt"
        )

        data.write_bytes(b"x" * 4096 + data.read_bytes()[4096:])
        azure.write("web", 0, data)
        written: list[str] = []

        def seen(request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.query.get("comp") == "page" and request.header("x-ms-page-write") == "update":
                written.append(request.path)
            return answer(request)

        azure.intercept = seen
        entries = execute(connection, environment, target, entries, shutdown=False, call=called_here)
        azure.intercept = None
        # The grain that changed, in the log with its record and then in the VHD, whose footer comes last.
        vhd = "/sandboxstorage/replicas/web/data-0.vhd"
        assert sorted(written) == [vhd, vhd, f"{vhd}.grains", f"{vhd}.index", f"{vhd}.redo"]
        assert [kept_in(azure, entry) for entry in entries] == [os_disk.read_bytes(), data.read_bytes()]
        assert verified(connection, environment) == {"data-0": True, "os": True}
        assert azure.resources() == before

        update = ("check_update_source_environment_params", connection, "web", entries, environment)
        with pytest.raises(raised(InvalidInput), match="storage_container_name cannot change"):
            called_here(*update, {"storage_container_name": "elsewhere"})
        assert called_here(*update, {"chunk_size_kib": 256}) == entries

        bare = call("delete_replica_source_snapshots", connection, environment, entries)
        assert bare == given
        assert sorted(containers["replicas"].blobs) == ["web/notes.txt"]
        assert called_here("delete_replica_source_snapshots", connection, environment, entries) == given
    assert azure.resources() == before


def test_volumes_with_and_without_a_device_go_side_by_side(
    azure: Sandbox, image: Callable[..., Path], tmp_path: Path, target: dict[str, Any]
) -> None:
    os_disk, data = image("os", 3 * MIB, seed=1), image("data", 2 * MIB, seed=2)
    azure.add_vm("web", os_disk, [data])
    environment = {**azure.environment(), **PLACE}
    with served(azure) as connection:
        info = called_here("get_replica_instance_info", connection, environment, "web")
        entries = volumes(info, tmp_path / "volumes")
        entries[1]["volume_dev"] = ""
        entries = execute(connection, environment, target, entries, shutdown=False, call=called_here)
        assert verified(connection, environment) == {"data-0": True}
    assert Path(entries[0]["volume_dev"]).read_bytes() == os_disk.read_bytes()
    assert kept_in(azure, entries[1]) == data.read_bytes()
    assert "vhd_url" not in entries[0]
    assert "replica_state" not in entries[1]
