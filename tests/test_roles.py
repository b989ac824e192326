"""Each use case runs with exactly the role that the command prints for it: the sandbox denies all else.

test_preflight.py has the same for `check`, the command line's runs and Blob storage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coriolis_azure import AzureExportProvider, errors
from coriolis_azure.azure import permissions
from coriolis_azure.cli.commands import cli
from coriolis_azure.plugin import claims
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.battles import served
from harness.constants import GROUP, MIB
from harness.plugin_errors import raised
from harness.writer_targets import HttpsTarget

Image = Callable[..., Path]
Connect = Callable[..., Source]
PRIVATE = {"export_network": "sandbox-vnet/default", "export_worker_use_fip": False}


def restrict(azure: Sandbox, *options: str, but: str = "") -> None:
    """The identity may do what `coriolis-azure role` with these options prints, but for one action."""
    printed = json.loads(CliRunner().invoke(cli, ["role", *options], catch_exceptions=False).stdout)
    assert not but or but in printed["Actions"]
    actions = [name for name in printed["Actions"] if name != but]
    azure.permissions[:] = [{"actions": actions, "dataActions": printed["DataActions"]}]


class Pool:
    """A pool of one worker, as the orchestrator treats it."""

    def __init__(self, connection: dict[str, Any], environment: dict[str, Any]) -> None:
        self._provider, self._connection, self._environment = (
            AzureExportProvider(None),
            connection,
            environment,
        )

    def live(self, vm: str, volumes: list[dict[str, Any]]) -> None:
        """Its whole life, with a transfer of `vm`."""
        provider, connection, environment = self._provider, self._connection, self._environment
        provider.validate_minion_pool_environment_options(None, connection, environment)
        shared = provider.set_up_pool_shared_resources(None, connection, environment, "pool")
        made = provider.create_minion(None, connection, environment, "pool", "linux", shared, "minion")
        properties, reached = made["minion_provider_properties"], made["connection_info"]
        provider.shutdown_minion(None, connection, properties)
        provider.start_minion(None, connection, properties)
        provider.healthcheck_minion(None, connection, properties, reached)
        info = provider.validate_replica_export_input(None, connection, vm, environment)
        provider.validate_minion_compatibility_for_transfer(None, connection, info, environment, properties)
        target = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
        provider.replicate_disks(
            None, connection, environment, vm, properties, reached, target, volumes, True
        )
        provider.delete_minion(None, connection, properties)
        provider.tear_down_pool_shared_resources(None, connection, environment, shared)


@pytest.fixture
def connection(azure: Sandbox) -> Iterator[dict[str, Any]]:
    with served(azure) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, ["--no-shutdown"]), (PRIVATE, ["--no-shutdown", "--no-public-ip", "--existing-network"])],
    ids=["own network", "existing network"],
)
def test_a_pools_whole_life(
    azure: Sandbox,
    connection: dict[str, Any],
    image: Image,
    tmp_path: Path,
    settings: dict[str, Any],
    options: list[str],
) -> None:
    disk = image("os")
    id = azure.add_vm("web", disk)
    before = azure.resources()
    volumes = [
        {"disk_id": id.replace("virtualMachines/web", "disks/web-os"), "volume_dev": str(tmp_path / "v")}
    ]
    restrict(azure, *options)
    Pool(connection, {**azure.environment(), **settings}).live("web", volumes)
    assert (tmp_path / "v").read_bytes() == disk.read_bytes()
    assert azure.resources() == before


NEEDED = [
    action
    for action in permissions.needed(
        {permissions.WORKER, permissions.PUBLIC_IP, permissions.OWN_NETWORK, permissions.POOL}
    )
    if action.scope not in permissions.OF_THE_VM
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", sorted({action.name for action in NEEDED if not action.optional}), ids=lambda name: name
)
def test_a_pool_that_lacks_an_action_is_refused_before_anything_is_made(
    azure: Sandbox, connection: dict[str, Any], action: str
) -> None:
    restrict(azure, "--no-shutdown", but=action)
    provider, before = AzureExportProvider(None), azure.resources()
    with pytest.raises(raised(errors.InvalidInput), match=action):
        provider.validate_minion_pool_environment_options(None, connection, azure.environment())
    assert azure.resources() == before


@pytest.mark.slow
@pytest.mark.parametrize("action", ["start", "deallocate"])
def test_the_step_of_a_pool_names_the_action_that_it_lacks(
    azure: Sandbox, connection: dict[str, Any], action: str
) -> None:
    provider, environment = AzureExportProvider(None), azure.environment()
    shared = provider.set_up_pool_shared_resources(None, connection, environment, "pool")
    made = provider.create_minion(None, connection, environment, "pool", "linux", shared, "minion")
    restrict(azure, "--no-shutdown", but=f"Microsoft.Compute/virtualMachines/{action}/action")
    call = provider.start_minion if action == "start" else provider.shutdown_minion
    with pytest.raises(raised(errors.Denied), match=f"virtualMachines/{action}/action"):
        call(None, connection, made["minion_provider_properties"])


@pytest.mark.slow
def test_a_transfer_that_shuts_down_and_fails_and_is_tried_again(
    azure: Sandbox, connection: dict[str, Any], image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of volumes are made, read, changed and deleted; that of another volume stays."""
    monkeypatch.setattr(claims, "FENCE_SECONDS", 1.0)  # the first run does not know what has been written
    disk = image("os", MIB)
    azure.add_vm("web", disk)
    before, environment, provider = azure.resources(), azure.environment(), AzureExportProvider(None)
    volume = tmp_path / "volume"
    volume.write_bytes(bytes(MIB))
    restrict(azure, "--no-pool")
    info = provider.validate_replica_export_input(None, connection, "web", environment)
    entries = [{"disk_id": info["devices"]["disks"][0]["id"], "volume_dev": str(volume), "zeroed": True}]
    for broken in (True, False):
        target = HttpsTarget(tmp_path / f"target-{broken}")
        made = provider.deploy_replica_source_resources(None, connection, info, environment)
        provider.shutdown_instance(None, connection, environment, "web")
        copy = (made["migr_resources"], made["connection_info"], target.info)
        wrong = [{**entries[0], "volume_dev": str(tmp_path)}] if broken else entries
        try:
            done = provider.replicate_disks(None, connection, environment, "web", *copy, wrong, True)
        except raised(errors.DestinationFailed):
            assert broken
        finally:
            provider.delete_replica_source_resources(None, connection, environment, made["migr_resources"])
            target.close()
    assert volume.read_bytes() == disk.read_bytes()
    provider.delete_replica_source_snapshots(None, connection, environment, done)
    assert [found for found in azure.resources() if "coriolis-volume" not in found["tags"]] == before


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [False, True], ids=["nothing chosen", "location and group chosen"])
def test_what_a_person_chooses_from(
    azure: Sandbox, connection: dict[str, Any], image: Image, chosen: bool
) -> None:
    """What only Blob storage needs is not told to an identity that has no right to it; nothing else is missing."""
    azure.add_vm("web", image("os"))
    environment, provider = azure.environment() if chosen else {}, AzureExportProvider(None)
    everything = provider.get_source_environment_options(None, connection, environment, None)
    restrict(azure, "--no-shutdown", "--no-pool")
    provider.validate_connection(None, connection)
    (vm,) = provider.get_instances(None, connection, environment)
    assert provider.get_instance(None, connection, environment, vm["instance_name"])["name"] == "web"
    assert provider.get_networks(None, connection, environment)
    assert provider.get_storage(None, connection, environment)["storage_backends"]
    assert "web" in provider.export_instance_inventory(None, connection, environment)
    told = provider.get_source_environment_options(None, connection, environment, None)
    assert told == [option for option in everything if not option["name"].startswith("storage_")]
    restrict(azure, "--no-shutdown", "--no-pool", "--storage", "identity")
    assert provider.get_source_environment_options(None, connection, environment, None) == everything


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["identity", "key"])
def test_a_vm_on_vhd_blobs(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, storage: str
) -> None:
    disk = image("os", MIB)
    azure.add_vm("web", disk, spec=VmSpec(unmanaged="sandboxstorage"))
    before = azure.resources()
    restrict(azure, "--no-shutdown", "--no-pool", "--storage", storage)
    place = {"storage_account_name": "sandboxstorage", "storage_container_name": "interim"}
    source = connect({**place, "storage_use_account_key": storage == "key"})
    assert source.check("web", strict=True, shutdown=False, pool=False).ok
    assert source.replicate("web", tmp_path / "images").left_behind == ()
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert azure.resources() == before


def on(azure: Sandbox, *path: str) -> str:
    """An ARM id in the sandbox's subscription."""
    return "/".join([f"/subscriptions/{azure.connection_info()['subscription_id']}/resourceGroups", *path])


def encrypted(azure: Sandbox, set_id: str) -> None:
    """The OS disk of `web` is encrypted with a customer's key; the set is there for who may read it."""
    encryption = {"type": "EncryptionAtRestWithCustomerKey", "diskEncryptionSetId": set_id}

    def keyed(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if (
            request.path == set_id and response.status == 404
        ):  # the sandbox has none; whoever may not read it gets 403
            return Response.of(200, {"id": set_id, "name": "keys", "location": "westeurope"})
        if request.method == "GET" and request.path.endswith("/disks/web-os"):
            document = json.loads(response.body)
            document["properties"]["encryption"] = encryption
            return Response.of(200, document)
        return response

    azure.intercept = keyed


KEYS = "Microsoft.Compute/diskEncryptionSets/read"


@pytest.mark.slow
@pytest.mark.parametrize("held_at", ["everywhere", "the set", "the group of the VM", "nowhere"])
def test_customer_managed_keys_of_another_group(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, held_at: str
) -> None:
    """What `check` says of the permission for the disks' set is what the run then meets."""
    azure.add_vm("web", image("os", MIB))
    before, set_id = (
        azure.resources(),
        on(azure, "vault", "providers/Microsoft.Compute/diskEncryptionSets/keys"),
    )
    encrypted(azure, set_id)
    if held_at == "everywhere":
        restrict(azure, "--customer-keys")
    else:
        restrict(azure)
        scopes = {"the set": set_id, "the group of the VM": on(azure, GROUP)}
        if held_at in scopes:
            azure.permissions.append({"actions": [KEYS], "scope": scopes[held_at]})
    source = connect({"export_worker_allowed_addresses": ["127.0.0.1"]})
    checked = source.check("web", strict=True)
    if held_at in ("everywhere", "the set"):
        assert [finding.text for finding in checked.errors] == []
        assert source.replicate("web", tmp_path / "images").left_behind == ()
    else:
        (remedy,) = [finding.remedy for finding in checked.errors if f"lacks {KEYS}" in finding.text]
        assert f"{KEYS} on {set_id}" in remedy
        with pytest.raises(errors.Denied, match=KEYS):
            source.replicate("web", tmp_path / "images")
    assert azure.resources() == before


ON_ONE = [
    *(
        (action, "web")
        for action in permissions.needed({permissions.WORKER, permissions.SHUTDOWN})
        if action.scope == permissions.VM
    ),
    *((action, "web-os") for action in permissions.needed(set()) if action.scope == permissions.DISK),
    *((action, "web-os") for action in permissions.needed(set()) if action.name.endswith("/disks/read")),
    *(
        (action, "web")
        for action in permissions.needed(set())
        if action.name.endswith("/virtualMachines/read")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "resource"), ON_ONE, ids=lambda value: getattr(value, "name", value))
def test_an_action_that_is_held_on_the_vm_or_its_disk_alone(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, action: permissions.Action, resource: str
) -> None:
    """It is enough where nothing but the VM needs it, and `check` knows; the worker and the copies may need it, too."""
    azure.add_vm("web", image("os", MIB))
    restrict(azure, "--no-pool", but=action.name)
    kind = action.name.split("/")[1]
    azure.permissions.append(
        {
            "actions": [action.name],
            "scope": on(azure, GROUP, f"providers/Microsoft.Compute/{kind}/{resource}"),
        }
    )
    source = connect({"export_worker_allowed_addresses": ["127.0.0.1"]})
    lacking = [
        finding.text
        for finding in source.check("web", strict=True, pool=False).errors
        if action.name in finding.text
    ]
    if action.scope in permissions.OF_THE_VM:
        assert lacking == []
        assert source.replicate("web", tmp_path / "images", shutdown=True).left_behind == ()
    else:
        assert lacking
        with pytest.raises(errors.CoriolisAzureError, match=action.name):
            source.replicate("web", tmp_path / "images", shutdown=True)


def test_what_may_be_held_on_a_vm_alone_is_a_warning_until_one_is_named(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os", MIB))
    linked = "Microsoft.Compute/disks/beginGetAccess/action"
    restrict(azure, but=linked)
    source = connect({"export_worker_allowed_addresses": ["127.0.0.1"]})
    unnamed = source.check(strict=True)
    assert unnamed.ok
    assert ["on a single VM" in each.text for each in unnamed.findings if linked in each.text] == [True]
    assert [linked in finding.text for finding in source.check("web", strict=True).errors] == [True]


@pytest.mark.parametrize("scope", ["sandbox-vnet", "sandbox-vnet/subnets/default", "elsewhere"])
def test_a_subnet_may_be_joined_by_a_role_on_it_alone(azure: Sandbox, connect: Connect, scope: str) -> None:
    join = "Microsoft.Network/virtualNetworks/subnets/join/action"
    restrict(azure, "--no-public-ip", "--existing-network", but=join)
    azure.permissions.append(
        {"actions": [join], "scope": on(azure, GROUP, "providers/Microsoft.Network/virtualNetworks", scope)}
    )
    checked = connect(PRIVATE).check(strict=True)
    assert [join in finding.text for finding in checked.errors] == ([True] if scope == "elsewhere" else [])


@pytest.mark.parametrize("container", ["replicas", "others"])
def test_blobs_may_be_written_by_a_role_on_the_container_alone(
    azure: Sandbox, connect: Connect, container: str
) -> None:
    settings = {"storage_account_name": "sandboxstorage", "storage_container_name": "replicas"}
    restrict(azure, "--storage", "identity")
    role = azure.permissions[0]
    place = f"providers/Microsoft.Storage/storageAccounts/sandboxstorage/blobServices/default/containers/{container}"
    azure.permissions.append({"dataActions": role.pop("dataActions"), "scope": on(azure, GROUP, place)})
    checked = connect(settings).check(strict=True)
    assert {"on the container" in finding.text for finding in checked.errors} == (
        set() if container == "replicas" else {True}
    )
