"""The orchestrator's contract: shapes of calls and documents, paging, updates, pools, events, errors."""

from __future__ import annotations

import csv
import inspect
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coriolis_azure import AzureExportProvider, errors
from coriolis_azure.events import Copied, Notice, Step, unfailing
from coriolis_azure.machine import listing
from coriolis_azure.model import Record, Run
from coriolis_azure.plugin import base
from coriolis_azure.plugin.provider import _ProgressUpdates
from coriolis_azure.sandbox import Sandbox, VmSpec
from coriolis_azure.sandbox.storage.store import Container
from coriolis_azure.source import Source
from harness import orchestrator_schemas as schemas
from harness.battles import served
from harness.constants import GROUP, MIB
from harness.orchestrator_logs import logged, shown
from harness.plugin_errors import raised
from harness.writer_targets import SshTarget

CALLS = {
    "validate_connection": "ctxt connection_info",
    "get_instances": "ctxt connection_info source_environment limit last_seen_id instance_name_pattern refresh",
    "get_instance": "ctxt connection_info source_environment instance_name",
    "get_source_environment_options": "ctxt connection_info env option_names",
    "get_networks": "ctxt connection_info env",
    "get_storage": "ctxt connection_info target_environment",
    "export_instance_inventory": "ctxt connection_info source_environment",
    "get_minion_pool_options": "ctxt connection_info env option_names",
    "validate_replica_export_input": "ctxt connection_info instance_name source_environment",
    "get_replica_instance_info": "ctxt connection_info source_environment instance_name",
    "deploy_replica_source_resources": "ctxt connection_info export_info source_environment",
    "delete_replica_source_resources": "ctxt connection_info source_environment migr_resources_dict",
    "replicate_disks": (
        "ctxt connection_info source_environment instance_name source_resources source_conn_info "
        "target_conn_info volumes_info incremental"
    ),
    "delete_replica_source_snapshots": "ctxt connection_info source_environment volumes_info",
    "shutdown_instance": "ctxt connection_info source_environment instance_name",
    "check_update_source_environment_params": (
        "ctxt connection_info instance_name volumes_info old_params new_params"
    ),
    "validate_minion_pool_environment_options": "ctxt connection_info environment_options",
    "set_up_pool_shared_resources": "ctxt connection_info environment_options pool_identifier",
    "tear_down_pool_shared_resources": "ctxt connection_info environment_options pool_shared_resources",
    "create_minion": (
        "ctxt connection_info environment_options pool_identifier pool_os_type pool_shared_resources "
        "new_minion_identifier"
    ),
    "delete_minion": "ctxt connection_info minion_properties",
    "start_minion": "ctxt connection_info minion_properties",
    "shutdown_minion": "ctxt connection_info minion_properties",
    "healthcheck_minion": "ctxt connection_info minion_properties minion_connection_info",
    "attach_volumes_to_minion": (
        "ctxt connection_info minion_properties minion_connection_info volumes_info"
    ),
    "detach_volumes_from_minion": (
        "ctxt connection_info minion_properties minion_connection_info volumes_info"
    ),
    "get_connection_info_schema": "",
    "get_source_environment_schema": "",
    "get_minion_pool_environment_schema": "",
    "get_os_morphing_tools": "os_type osmorphing_info",
    "validate_minion_compatibility_for_transfer": (
        "ctxt connection_info export_info environment_options minion_properties"
    ),
}


@pytest.fixture
def provider() -> AzureExportProvider:
    return AzureExportProvider(None)


@pytest.fixture
def connection(azure: Sandbox) -> Iterator[dict[str, Any]]:
    with served(azure) as found:
        yield found


def valid(document: Any, schema: dict[str, Any]) -> Any:
    """`document` as it is after its way through JSON, which must fit the schema."""
    through = json.loads(json.dumps(document))
    jsonschema.Draft7Validator(schema).validate(through)
    return through


@pytest.mark.parametrize("method", CALLS)
def test_calls_take_their_arguments_in_the_orchestrators_order(method: str) -> None:
    assert (
        list(inspect.signature(getattr(AzureExportProvider, method)).parameters)[1:] == CALLS[method].split()
    )


def test_every_capability_is_inherited(provider: AzureExportProvider) -> None:
    # Under these names are the orchestrator's own classes, where it is installed.
    capabilities = {getattr(base, shape.__name__) for shape in base.CAPABILITIES}
    assert capabilities <= set(AzureExportProvider.__mro__)
    assert AzureExportProvider.platform == "azure"
    assert AzureExportProvider.supports_shared_disks() is False
    assert provider.get_os_morphing_tools("linux", {}) == []


def test_each_call_takes_what_the_orchestrators_own_classes_declare(provider: AzureExportProvider) -> None:
    theirs = pytest.importorskip("coriolis.providers.base", reason="the orchestrator is not installed here")
    declared = [
        (name, getattr(kind, name))
        for shape in base.CAPABILITIES
        for kind in getattr(theirs, shape.__name__).__mro__
        for name in getattr(kind, "__abstractmethods__", ())
        if callable(getattr(kind, name))
    ]
    assert declared
    for name, method in declared:
        wanted = [word for word in inspect.signature(method).parameters if word != "self"]
        given = list(inspect.signature(getattr(provider, name)).parameters)
        assert given[: len(wanted)] == wanted, name


def test_the_schemas_have_what_the_web_ui_dereferences(provider: AzureExportProvider) -> None:
    connection = provider.get_connection_info_schema()["properties"]
    for name in ("user_credentials", "service_principal_credentials"):
        assert connection[name]["properties"]
    assert connection["cloud_profile"]["enum"]
    assert connection["cloud_profile"]["default"] == "AzureCloud"
    assert "allow_untrusted" in connection
    for name in ("endpoints", "suffixes"):
        assert connection["custom_cloud_properties"]["properties"][name]["properties"]
    for schema in (provider.get_source_environment_schema(), provider.get_minion_pool_environment_schema()):
        assert schema["definitions"]["azure_image"]["required"]
        assert "oneOf" not in schema


@pytest.mark.slow
def test_instances_are_paged_in_a_stable_order(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any], image: Callable[..., Path]
) -> None:
    disk = image("os", MIB)
    for number in (3, 1, 5, 2, 4):
        azure.add_vm(f"web-{number}", disk, spec=VmSpec(os_type="windows" if number == 2 else "linux"))
    environment = azure.environment()
    everything = provider.get_instances(None, connection, environment)
    pages, last = [], None
    while True:
        page = provider.get_instances(None, connection, environment, last_seen_id=last, limit=2)
        pages.append(page)
        if len(page) < 2:
            break
        last = page[-1]["id"]
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [vm for page in pages for vm in page] == everything
    for vm in everything:
        valid(vm, schemas.VM_INSTANCE_INFO)
    assert [vm["name"] for vm in everything] == [f"web-{number}" for number in range(1, 6)]
    assert everything[1]["os_type"] == "windows"
    found = provider.get_instances(None, connection, {}, instance_name_pattern="WEB-3", refresh=True)
    assert [vm["instance_name"] for vm in found] == ["web-3"]
    assert len(provider.get_instances(None, connection, {}, instance_name_pattern="web-*")) == 5


@pytest.mark.slow
def test_one_instance_by_name_and_by_id(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any], image: Callable[..., Path]
) -> None:
    id = azure.add_vm("web", image("os"), [image("data")])
    for name in ("web", "WEB", id):
        info = valid(
            provider.get_instance(None, connection, azure.environment(), name), schemas.VM_EXPORT_INFO
        )
        assert len(info["devices"]["disks"]) == 2
    with pytest.raises(raised(errors.NotFound), match="no VM other"):
        provider.get_instance(None, connection, azure.environment(), "other")


def test_a_name_that_machines_of_two_groups_have_is_refused_with_both() -> None:
    vms = [
        {"name": name, "id": f"/groups/{group}/vms/{name}"}
        for group in "ab"
        for name in ("web", f"db-{group}")
    ]
    with pytest.raises(errors.InvalidInput, match="2 VMs are called WEB") as refusal:
        listing.called(vms, "WEB")
    assert "/groups/a/vms/web or /groups/b/vms/web" in refusal.value.remedy
    assert listing.called(vms, "/GROUPS/b/vms/web") is vms[2]
    assert listing.called(vms, "db-b") is vms[3]


@pytest.mark.slow
def test_networks_storage_and_inventory(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any], image: Callable[..., Path]
) -> None:
    azure.add_vm("b", image("os", 3 * MIB), [image("data")])
    azure.add_vm("a", image("os", 3 * MIB))
    for environment in ({}, azure.environment()):
        networks = provider.get_networks(None, connection, environment)
        assert [valid(network, schemas.VM_NETWORK)["name"] for network in networks] == [
            "sandbox-vnet/default"
        ]
        storage = valid(provider.get_storage(None, connection, environment), schemas.VM_STORAGE)
        assert [backend["id"] for backend in storage["storage_backends"]] == [
            "Premium_LRS",
            "StandardSSD_LRS",
        ]
    rows = list(csv.DictReader(io.StringIO(provider.export_instance_inventory(None, connection, {}))))
    assert list(rows[0])[:6] == [
        *("VM ID", "VM Name", "Guest OS", "Firmware Type", "Num CPUs", "Memory (MB)")
    ]
    assert [row["VM Name"] for row in rows] == ["a", "b"]
    assert rows[0]["Num CPUs"] == "2"
    assert rows[0]["NIC Count"] == "1"
    assert rows[1]["Disks"].startswith("os ")


@pytest.mark.slow
def test_options_are_read_from_azure_and_narrowed_by_what_is_chosen(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any]
) -> None:
    def told(env: Any, names: Any = None) -> dict[str, Any]:
        found = valid(
            provider.get_source_environment_options(None, connection, env, names), schemas.SOURCE_OPTIONS
        )
        return {option["name"]: option["values"] for option in found}

    environments: list[Any] = [{}, None]
    for nothing in environments:
        first = told(nothing, {})
        assert set(first) == {"location", "resource_group", "replica_export_mechanism"}
        assert "westeurope" in first["location"]
        assert first["resource_group"] == [GROUP]
        assert first["replica_export_mechanism"] == ["worker", "snapshots", "hybrid", "auto"]
    rest = told({"location": "westeurope", "resource_group": GROUP})
    assert rest["export_worker_size"][0] == "Standard_D2s_v5"
    assert "Standard_D2s_v6" not in rest["export_worker_size"]
    assert rest["export_worker_image"][0]["id"].startswith("Canonical:ubuntu-24_04-lts")
    assert rest["export_network"][0]["name"] == "sandbox-vnet/default"
    assert rest["storage_account_name"] == ["sandboxstorage"]
    azure.storage.account("sandboxstorage").containers["replicas"] = Container("replicas", "etag", "now")
    account = {"resource_group": GROUP, "storage_account_name": "sandboxstorage"}
    assert told(account, ["storage_container_name"]) == {"storage_container_name": ["replicas"]}
    assert set(told({"location": "westeurope"}, ["location"])) == {"location"}
    properties = provider.get_source_environment_schema()["properties"]
    assert set(rest) <= set(properties)
    pool = provider.get_minion_pool_options(None, connection, {"location": "westeurope"}, None)
    assert {option["name"] for option in pool} <= set(
        provider.get_minion_pool_environment_schema()["properties"]
    )


def test_validation_tells_all_findings_and_makes_nothing(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any], image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"))
    before, environment = azure.resources(), azure.environment()
    valid(
        provider.validate_replica_export_input(None, connection, "web", source_environment=environment),
        schemas.VM_EXPORT_INFO,
    )
    wrong = {**environment, "exclude_disks": ["data-9"], "export_network": "sandbox-vnet/none"}
    with pytest.raises(raised(errors.InvalidInput)) as caught:
        provider.validate_replica_export_input(None, connection, "web", source_environment=wrong)
    assert "has no disk data-9" in str(caught.value)
    assert "has no subnet none" in str(caught.value)
    assert azure.resources() == before
    assert not any(
        method in {"PUT", "DELETE", "PATCH"} for method, path in azure.requests if "coriolis" in path
    )


def test_what_may_change_between_executions(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any]
) -> None:
    old = azure.environment()
    volumes = [{"disk_id": "a", "replica_state": {"chunks": "x"}, "volume_id": "v"}]

    def change(**new: Any) -> Any:
        return provider.check_update_source_environment_params(None, connection, "web", volumes, old, new)

    assert change(export_worker_size="Standard_D4s_v5") == volumes
    assert change(chunk_size_kib=256) == volumes
    assert (
        provider.check_update_source_environment_params(None, connection, "web", [], old, {"tags": {}}) == []
    )
    for refused in ({"location": "northeurope"}, {"resource_group": "other"}):
        with pytest.raises(raised(errors.InvalidInput), match="cannot change"):
            change(**refused)
    with pytest.raises(raised(errors.InvalidInput), match="colour"):
        change(colour="red")


def test_records_of_volumes_go_with_the_transfers_disks_even_where_azure_is_gone(
    azure: Sandbox, provider: AzureExportProvider, connection: dict[str, Any]
) -> None:
    """And an update leaves them alone, but has no volume taken for a blank one after it."""
    before, environment = azure.resources(), azure.environment()
    id = "0123456789abcdef"
    volumes = [
        {"disk_id": "a", "replica_state": {"check": "x", "record": id}, "volume_id": "v", "zeroed": True},
        {"disk_id": "b", "zeroed": True},
    ]
    with Source(connection, environment) as source:
        run = Run("0", connection["subscription_id"], GROUP, "westeurope", "", "web")
        source.records(run).update(id, lambda _: Record(id, "d", "x"))
    kept = azure.resources()
    assert kept != before
    touched = [{**volume, "zeroed": False} for volume in volumes]
    change = {"chunk_size_kib": 256}
    update = ("web", volumes, environment, change)
    assert provider.check_update_source_environment_params(None, connection, *update) == touched
    assert azure.resources() == kept
    bare = [{"disk_id": "a", "volume_id": "v", "zeroed": False}, {"disk_id": "b", "zeroed": False}]
    assert provider.delete_replica_source_snapshots(None, connection, environment, volumes) == bare
    assert azure.resources() == before
    gone = {**connection, "ca_bundle": "/no/such/file"}
    assert provider.delete_replica_source_snapshots(None, gone, environment, volumes) == bare


def logged_and_shown(properties: dict[str, Any], reached: dict[str, Any]) -> str:
    """A pool's worker in the orchestrator's logs, and in its REST API."""
    result = {"minion_connection_info": reached, "minion_provider_properties": properties}
    return json.dumps([logged(result), shown(properties, reached)])


_RUN = dict.fromkeys(("id", "subscription", "group", "location", "zone", "instance", "pool"), "x")
_ENVIRONMENT = {"location": "westeurope", "resource_group": "g"}


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("delete_replica_source_resources", (_ENVIRONMENT,), ()),
        ("replicate_disks", (_ENVIRONMENT, "web"), ({}, {}, [], True)),
        ("delete_minion", (), ()),
        ("tear_down_pool_shared_resources", (_ENVIRONMENT,), ()),
    ],
)
@pytest.mark.parametrize(
    "run", [None, {}, "r", {**_RUN, "id": 7}, {**_RUN, "newer": ""}, {**_RUN, "id": ""}, {"id": "r"}]
)
def test_what_another_version_has_returned_is_refused_with_a_remedy(
    provider: AzureExportProvider, method: str, before: tuple[Any, ...], after: tuple[Any, ...], run: Any
) -> None:
    resources = {"run": run, "environment": _ENVIRONMENT}
    with pytest.raises(raised(errors.InvalidInput), match="coriolis-azure cleanup"):
        getattr(provider, method)(None, {"subscription_id": "s"}, *before, resources, *after)


_WORKER = {"vm": "v", "host_key": "k", "slots": 4}
_REACHED = {"ip": "a", "port": 22, "username": "u", "password": "p"}


@pytest.mark.parametrize(
    ("worker", "reached"),
    [
        ({"vm": "v", "host_key": "k"}, _REACHED),
        ({**_WORKER, "slots": "4"}, _REACHED),
        ({**_WORKER, "vm": None}, _REACHED),
        ("worker", _REACHED),
        (_WORKER, {**_REACHED, "password": ["p"]}),
        (_WORKER, {"ip": "a"}),
        (_WORKER, []),
    ],
)
def test_a_worker_of_another_version_is_refused_with_a_remedy(
    provider: AzureExportProvider, worker: Any, reached: Any
) -> None:
    resources = {"run": _RUN, "worker": worker}
    with pytest.raises(raised(errors.InvalidInput), match="coriolis-azure cleanup"):
        provider.replicate_disks(
            None, {"subscription_id": "s"}, _ENVIRONMENT, "web", resources, reached, {}, [], True
        )


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("replicate_disks", (_ENVIRONMENT, "web", {"run": _RUN}, {}, {}), (True,)),
        ("delete_replica_source_snapshots", (_ENVIRONMENT,), ()),
        ("check_update_source_environment_params", ("web",), (_ENVIRONMENT, {})),
    ],
)
@pytest.mark.parametrize("volumes", [None, {}, ["v"], [{}], [{"disk_id": 7}], [{"disk_id": None}]])
def test_volumes_that_are_none_are_refused_before_anything_is_asked_of_azure(
    provider: AzureExportProvider, method: str, before: tuple[Any, ...], after: tuple[Any, ...], volumes: Any
) -> None:
    with pytest.raises(raised(errors.InvalidInput), match="volumes_info is not a list of volumes"):
        getattr(provider, method)(None, {"subscription_id": "s"}, *before, volumes, *after)


@pytest.mark.slow
def test_a_pool_of_warm_workers(
    azure: Sandbox,
    provider: AzureExportProvider,
    connection: dict[str, Any],
    image: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Set up, create, shut down, start, use twice, delete, tear down: all through JSON."""
    os_disk = image("os")
    azure.add_vm("web", os_disk, [image("data", MIB, seed=2)])
    before, environment = azure.resources(), azure.environment()
    provider.validate_minion_pool_environment_options(None, connection, environment)
    pool, name = "0f6f1c1e-1111-4222-8333-444455556666", "9a7b6c5d-aaaa-4bbb-8ccc-ddddeeeeffff"
    shared = json.loads(
        json.dumps(provider.set_up_pool_shared_resources(None, connection, environment, pool))
    )
    made = json.loads(
        json.dumps(provider.create_minion(None, connection, environment, pool, "linux", shared, name))
    )
    properties, reached = made["minion_provider_properties"], made["connection_info"]
    valid(reached, schemas.REPLICATION_WORKER_CONN_INFO)
    assert "PRIVATE" in reached["password"]
    assert "PRIVATE" not in logged_and_shown(properties, reached)
    provider.healthcheck_minion(None, connection, properties, reached)
    provider.shutdown_minion(None, connection, properties)
    with pytest.raises(raised(errors.AzureError)):
        provider.start_minion(
            None, connection, {**properties, "worker": {"vm": properties["worker"]["vm"] + "x"}}
        )
    provider.start_minion(None, connection, properties)
    provider.healthcheck_minion(None, connection, properties, reached)

    info = provider.get_replica_instance_info(None, connection, environment, "web")
    provider.validate_minion_compatibility_for_transfer(None, connection, info, environment, properties)
    with pytest.raises(raised(errors.InvalidInput), match="the VM is in northeurope"):
        provider.validate_minion_compatibility_for_transfer(
            None, connection, {**info, "location": "northeurope"}, environment, properties
        )
    idle = azure.resources()
    target = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
    volumes = [
        {"disk_id": disk["id"], "volume_dev": str(tmp_path / f"volume-{number}")}
        for number, disk in enumerate(info["devices"]["disks"])
    ]
    for _ in range(2):
        volumes = valid(
            provider.replicate_disks(
                None, connection, environment, "web", properties, reached, target, volumes, True
            ),
            schemas.VOLUMES_INFO,
        )
        assert (tmp_path / "volume-0").read_bytes() == os_disk.read_bytes()
        assert azure.resources() == idle
    provider.delete_minion(None, connection, properties)
    provider.delete_minion(None, connection, properties)
    provider.tear_down_pool_shared_resources(None, connection, environment, shared)
    assert azure.resources() == before
    with pytest.raises(raised(errors.InvalidInput), match="worker for windows"):
        provider.create_minion(None, connection, environment, pool, "windows", shared, name)


class Handler:
    """What the orchestrator's event handlers do, kept in lists."""

    def __init__(self, *, broken: bool = False) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.events: list[tuple[str, str]] = []
        self._broken = broken

    def add_progress_update(
        self, message: str, initial_step: int = 0, total_steps: int = 0, return_event: bool = False
    ) -> dict[str, int] | None:
        if self._broken:
            raise RuntimeError("the task is not active")
        self.lines.append(message)
        return {"index": len(self.lines) - 1} if return_event else None

    @classmethod
    def get_progress_update_identifier(cls, progress_update: dict[str, int]) -> int:
        return progress_update["index"]

    def update_progress_update(
        self,
        update_identifier: int,
        new_current_step: int,
        new_total_steps: int | None = None,
        new_message: str | None = None,
        sync: bool = False,
    ) -> None:
        self.steps.append((update_identifier, new_current_step))

    def add_event(self, message: str, level: str = "INFO") -> None:
        self.events.append((level, message))


def test_progress_never_goes_back_and_is_told_a_few_times_a_second_at_most() -> None:
    from harness.clocks import Held

    handler, clock = Handler(), Held()
    told = _ProgressUpdates(handler, clock)
    for done in (0, 100, 50, 300, 600, 1024):
        told(Copied("os", done, 1024, 0))
        clock.sleep(1)
    for done in range(0, 1025, 16):
        told(Copied("data-0", done, 1024, 0))
        clock.sleep(0.01)
    told(Step("snapshot", "os"))
    told(Notice("replaced"))
    assert [step for bar, step in handler.steps if bar == 0] == [9, 29, 58, 100]
    assert [step for bar, step in handler.steps if bar == 1] == [100]
    assert handler.lines == [
        "copying os (1 KiB)",
        "copying data-0 (1 KiB)",
        "snapshot: os",
        "replaced",
    ]
    assert handler.events == []  # which nobody is shown


def test_a_handler_that_fails_breaks_nothing() -> None:
    told = unfailing(_ProgressUpdates(Handler(broken=True)))
    told(Step("snapshot"))
    told(Copied("os", 1, 2, 0))


@pytest.mark.slow
def test_a_run_tells_its_figures_and_verifying_only_where_something_is_verified(
    azure: Sandbox, connection: dict[str, Any], image: Callable[..., Path], tmp_path: Path
) -> None:
    """A person who reads along sees what was read, sent and left alone, and what was found out meanwhile."""
    azure.add_vm("web", image("os", MIB))
    environment, handler = azure.environment(), Handler()
    provider = AzureExportProvider(handler)
    info = provider.validate_replica_export_input(None, connection, "web", environment)
    assert any("SSH port can be reached from anywhere" in text for text in handler.lines)
    made = provider.deploy_replica_source_resources(None, connection, info, environment)
    volume = tmp_path / "volume"
    volume.write_bytes(bytes(MIB))
    entries = [{"disk_id": info["devices"]["disks"][0]["id"], "volume_dev": str(volume)}]
    unread = SshTarget(tmp_path / "target")
    local = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
    told = []
    for target in (local, local, unread.info):
        handler.lines.clear()
        copy = (made["migr_resources"], made["connection_info"], target)
        entries = provider.replicate_disks(None, connection, environment, "web", *copy, entries, True)
        told.append(list(handler.lines))
        assert ("verify: os" in handler.lines) is (len(told) == 1)  # the second has nothing to read back
    unread.close()
    assert told[0][-1].startswith("copied os: 1 MiB read, ")
    assert told[0][-1].endswith(" unchanged, verified")
    assert told[1][-1] == "copied os: 1 MiB read, 0 B sent, 0 B zeros, 1 MiB unchanged, verified"
    assert told[2][-1].endswith(", not verified")
    assert not any(".." in text for text in itertools.chain(*told))


@pytest.mark.slow
def test_azures_sdks_do_not_log_each_request_unless_told_to() -> None:
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO)
if sys.argv[1:]:
    logging.getLogger("azure").setLevel(sys.argv[1])
from coriolis_azure import AzureExportProvider
print(AzureExportProvider.platform, logging.getLogger("azure.core.pipeline").isEnabledFor(logging.INFO))
"""
    for configured, logs in (([], "False"), (["INFO"], "True"), (["DEBUG"], "True")):
        done = subprocess.run([sys.executable, "-c", code, *configured], capture_output=True, text=True)
        assert done.stdout.split() == ["azure", logs], done.stderr


@pytest.mark.slow
def test_inside_the_orchestrator_its_own_classes_are_used(tmp_path: Path) -> None:
    """A stand-in package with the orchestrator's names: bases in the MRO, errors of its own classes."""
    package = tmp_path / "coriolis"
    (package / "providers").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "providers" / "__init__.py").touch()
    kinds = [kind.__name__ for kind in base.CAPABILITIES]
    (package / "providers" / "base.py").write_text("".join(f"class {kind}: pass\n" for kind in kinds))
    (package / "exception.py").write_text(
        "class CoriolisException(Exception): code = 500\n"
        "class ConnectionValidationException(CoriolisException): pass\n"
        "class InvalidInput(CoriolisException): code = 400\n"
    )
    code = """
import coriolis.exception as exception, coriolis.providers.base as base
from coriolis_azure import AzureExportProvider as Provider
kinds = [kind for name, kind in vars(base).items() if name.startswith("Base")]
assert all(kind in Provider.__mro__ for kind in kinds), Provider.__mro__
provider = Provider(None)
for call, kind in (
    (lambda: provider.validate_connection(None, {}), exception.ConnectionValidationException),
    (lambda: provider.get_networks(None, {"subscription_id": 5}, {}), exception.InvalidInput),
):
    try:
        call()
    except exception.CoriolisException as error:
        assert type(error) is kind, type(error)
        assert "subscription_id" in str(error) and "Correct the named setting" in str(error)
    else:
        raise AssertionError("no error")
"""
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:The metaschema specified:DeprecationWarning")  # by its own schemas
@pytest.mark.parametrize(
    "name", ["vm_export_info", "vm_instance_info", "vm_network", "vm_storage", "source_options"]
)
def test_documents_fit_the_orchestrators_own_schemas(
    azure: Sandbox,
    provider: AzureExportProvider,
    connection: dict[str, Any],
    image: Callable[..., Path],
    name: str,
) -> None:
    own = pytest.importorskip("coriolis.schemas", reason="the orchestrator is not installed here")
    azure.add_vm("web", image("os"), [image("data")])
    environment = azure.environment()
    documents: dict[str, Callable[[], Any]] = {
        "vm_export_info": lambda: provider.get_instance(None, connection, environment, "web"),
        "vm_instance_info": lambda: provider.get_instances(None, connection, environment)[0],
        "vm_network": lambda: provider.get_networks(None, connection, environment)[0],
        "vm_storage": lambda: provider.get_storage(None, connection, environment),
        "source_options": lambda: provider.get_source_environment_options(None, connection, environment),
    }
    own.validate_value(documents[name](), own.get_schema("coriolis", f"{name}_schema.json"))
