"""Restore point collections on the sandbox, with the official SDK, and beside a recording of Azure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError

from coriolis_azure.sandbox import Sandbox
from harness.clients import GROUP, HERE, Clients, in_process
from harness.exports import blob, listed

COLLECTIONS = "Microsoft.Compute/restorePointCollections"
READ: Any = {"access": "Read", "durationInSeconds": 3600}
K = 4096


@pytest.fixture
def clients(azure: Sandbox, image: Callable[..., Path]) -> Iterator[Clients]:
    """With a VM of two disks, and a collection `c` for it."""
    with in_process(azure) as clients:
        vm = azure.add_vm("vm", image("os"), [image("data")])
        body: Any = {"location": HERE, "properties": {"source": {"id": vm}}, "tags": {"mine": "yes"}}
        clients.compute.restore_point_collections.create_or_update(GROUP, "c", body)
        yield clients


def point(clients: Clients, name: str, mode: str = "CrashConsistent", **properties: Any) -> Any:
    body: Any = {"properties": {"consistencyMode": mode, **properties}}
    return clients.compute.restore_points.begin_create(GROUP, "c", name, body).result()


def disk_of(made: Any, *, data: bool = False) -> str:
    """The name of a disk's restore point."""
    storage = made.source_metadata.storage_profile
    entry = storage.data_disks[0] if data else storage.os_disk
    return str(entry.disk_restore_point.id.rpartition("/")[2])


def grant(clients: Clients, name: str, disk: str) -> str:
    granted = clients.compute.disk_restore_point.begin_grant_access(GROUP, "c", name, disk, READ).result()
    return str(granted.access_sas)


def test_a_restore_point_has_all_disks_at_one_moment(azure: Sandbox, clients: Clients) -> None:
    before = azure.disk("vm").read(0, K)
    made = point(clients, "p")
    azure.disk("vm").write(0, b"later" + bytes(K - 5))
    assert (made.provisioning_state, made.consistency_mode) == ("Succeeded", "CrashConsistent")
    disks = clients.compute.disk_restore_point.list_by_restore_point(GROUP, "c", "p")
    assert sorted(each.name or "" for each in disks) == sorted([disk_of(made), disk_of(made, data=True)])
    shown = clients.compute.disk_restore_point.get(GROUP, "c", "p", disk_of(made))
    assert shown.source_resource_id == azure.disk("vm").id
    assert shown.source_unique_id == clients.compute.disks.get(GROUP, "vm-os").unique_id
    assert shown.family_id
    with blob(clients, grant(clients, "p", disk_of(made))) as client:
        assert client.download_blob(0, K).readall() == before


def test_disks_of_two_points_have_a_difference(azure: Sandbox, clients: Clients) -> None:
    first = point(clients, "p1")
    azure.disk("vm", 0).write(K, b"x" * K)
    second = point(clients, "p2")
    older, newer = (
        grant(clients, name, disk_of(made, data=True)) for name, made in (("p1", first), ("p2", second))
    )
    assert listed(clients, newer, older) == [(K, 2 * K, False)]
    clients.copy("s", azure.disk("vm", 0).id, snapshot=True, incremental=True)
    sas = clients.compute.snapshots.begin_grant_access(GROUP, "s", READ).result().access_sas
    with pytest.raises(HttpResponseError, match="not supported on the previous snapshot"):
        listed(clients, newer, str(sas))


def test_three_points_an_hour_and_mode(azure: Sandbox, clients: Clients) -> None:
    for number in range(3):
        point(clients, f"p{number}")
    path = clients.id(COLLECTIONS, "c/restorePoints/p3")
    answer = clients.arm("PUT", path, {"properties": {"consistencyMode": "CrashConsistent"}})
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0
    point(clients, "p3", "ApplicationConsistent")
    azure.exporting.restore_point_rate = 4
    point(clients, "p4")


def test_a_point_has_a_pending_creation_and_no_second_one(clients: Clients) -> None:
    path = clients.id(COLLECTIONS, "c/restorePoints/p")
    answer = clients.arm("PUT", path, {"properties": {"consistencyMode": "CrashConsistent"}})
    assert answer.status_code == 201
    assert "Azure-AsyncOperation" in answer.headers
    assert "Location" not in answer.headers
    assert answer.json()["properties"]["provisioningState"] == "Creating"
    assert "diskRestorePoint" not in answer.json()["properties"]["sourceMetadata"]["storageProfile"]["osDisk"]
    assert set(answer.json()) == {"name", "id", "properties"}
    assert clients.refused("PUT", path + "2", {})[:2] == (409, "OperationNotAllowed")
    assert clients.refused("PUT", path, {"properties": {}})[:2] == (409, "OperationNotAllowed")


def test_disks_can_be_excluded_and_must_be_where_the_mode_cannot_take_them(
    azure: Sandbox, clients: Clients
) -> None:
    data = azure.disk("vm", 0).id
    clients.arm("PATCH", data, {"properties": {"maxShares": 2}})
    with pytest.raises(HttpResponseError, match="does not support restore points"):
        point(clients, "p")
    made = point(clients, "p", excludeDisks=[{"id": data.upper()}])
    assert made.source_metadata.storage_profile.data_disks[0].disk_restore_point is None
    assert disk_of(made)


def test_a_point_with_access_granted_is_not_deleted_nor_is_its_collection(clients: Clients) -> None:
    disk = disk_of(point(clients, "p"))
    grant(clients, "p", disk)
    for path in ("c", "c/restorePoints/p"):
        refused = clients.refused("DELETE", clients.id(COLLECTIONS, path))
        assert refused[:2] == (409, "DiskRestorePointUsedByCustomer")
    clients.compute.disk_restore_point.begin_revoke_access(GROUP, "c", "p", disk).result()
    point(clients, "p2")
    clients.compute.restore_points.begin_delete(GROUP, "c", "p").result()
    shown = clients.compute.restore_point_collections.get(GROUP, "c", expand="restorePoints")
    assert [each.name for each in shown.restore_points or ()] == ["p2"]
    clients.compute.restore_point_collections.begin_delete(GROUP, "c").result()
    assert list(clients.compute.restore_point_collections.list(GROUP)) == []
    assert clients.arm("DELETE", clients.id(COLLECTIONS, "c")).status_code == 204


def test_only_the_collection_is_listed_and_tagged(azure: Sandbox, clients: Clients) -> None:
    point(clients, "p")
    rows = [row for row in azure.resources() if "restorePoint" in row["id"]]
    assert [(row["type"], row["tags"]) for row in rows] == [(COLLECTIONS, {"mine": "yes"})]


def test_a_disk_is_restored_from_a_point(azure: Sandbox, clients: Clients) -> None:
    before = azure.disk("vm").read(0, K)
    made = point(clients, "p")
    azure.disk("vm").write(0, bytes(K))
    source = made.source_metadata.storage_profile.os_disk.disk_restore_point.id
    creation = {"createOption": "Restore", "sourceResourceId": source}
    body: Any = {"location": HERE, "properties": {"creationData": creation}}
    restored = clients.compute.disks.begin_create_or_update(GROUP, "restored", body).result()
    assert azure.disk(str(restored.id)).read(0, K) == before


def test_points_need_their_own_actions(azure: Sandbox, clients: Clients) -> None:
    disk = disk_of(point(clients, "p"))
    inner = f"{COLLECTIONS}/restorePoints/diskRestorePoints"
    azure.permissions[:] = [{"actions": ["*"], "notActions": [f"{inner}/beginGetAccess/action"]}]
    path = clients.id(COLLECTIONS, f"c/restorePoints/p/diskRestorePoints/{disk}/beginGetAccess")
    assert clients.refused("POST", path, READ)[:2] == (403, "AuthorizationFailed")


RECORDING = Path(__file__).parents[2] / "shared" / "azure-recordings" / "test_restore_point.yaml"


def test_a_point_has_the_shape_that_was_recorded(clients: Clients) -> None:
    yaml = pytest.importorskip("yaml")
    if not RECORDING.exists():
        pytest.skip(f"the recording {RECORDING.name} is not on this machine")
    exchanges = yaml.safe_load(RECORDING.read_text())["interactions"]
    recorded = next(
        yaml.safe_load(each["response"]["body"]["string"])
        for each in exchanges
        if each["request"]["method"] == "GET" and "/restorePoints/" in each["request"]["uri"]
    )
    point(clients, "p")
    shown = clients.arm("GET", clients.id(COLLECTIONS, "c/restorePoints/p")).json()
    assert set(shown) == set(recorded)
    assert set(shown["properties"]) == set(recorded["properties"])
    ours, theirs = (each["properties"]["sourceMetadata"]["storageProfile"] for each in (shown, recorded))
    assert set(ours["osDisk"]) == set(theirs["osDisk"])
