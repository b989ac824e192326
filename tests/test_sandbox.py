"""What the sandbox's Azure does to disks, VMs and networks, and what it refuses, in Azure's own words."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError

from coriolis_azure import errors
from coriolis_azure.sandbox import Sandbox, VmSpec
from coriolis_azure.sandbox.content import copy_sparse
from harness.clients import GROUP, HERE, Body, Clients, in_process, vm_body

DISKS = "Microsoft.Compute/disks"
SNAPSHOTS = "Microsoft.Compute/snapshots"
MACHINES = "Microsoft.Compute/virtualMachines"
NICS = "Microsoft.Network/networkInterfaces"
ADDRESSES = "Microsoft.Network/publicIPAddresses"
FIREWALLS = "Microsoft.Network/networkSecurityGroups"
NETWORKS = "Microsoft.Network/virtualNetworks"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(64 << 10) + bytes(512))
    return path


def bytes_of(azure: Sandbox, resource_id: str) -> bytes:
    """The first mebibyte of a disk or snapshot."""
    found = azure._world.state.find(resource_id)
    assert found is not None
    with azure._world.contents.path(found.hidden["content"]).open("rb") as file:
        return file.read(1 << 20)


def make_vm(clients: Clients, name: str = "vm", **changes: Any) -> Any:
    body = vm_body(clients.nic(f"{name}-nic").id, **changes)
    return clients.compute.virtual_machines.begin_create_or_update(GROUP, name, body).result()


# ---------------------------------------------------------------- contents


def test_a_vm_is_made_from_raw_files(azure: Sandbox, clients: Clients, raw: Path) -> None:
    azure.add_vm("web", raw, [raw, raw], VmSpec(size="Standard_D4s_v5"))
    vm = clients.compute.virtual_machines.get(GROUP, "web", expand="instanceView")
    assert vm.os_profile.computer_name == "web"
    assert [each.lun for each in vm.storage_profile.data_disks] == [0, 1]
    assert "PowerState/running" in [each.code for each in vm.instance_view.statuses]
    disk = clients.compute.disks.get(GROUP, vm.storage_profile.os_disk.name)
    assert (disk.disk_size_bytes, disk.disk_size_gb, disk.disk_state) == (66048, 1, "Attached")
    assert disk.managed_by == vm.id
    assert disk.hyper_v_generation == "V2"
    assert azure.content("web", 1).read_bytes() == raw.read_bytes()


@pytest.mark.parametrize(
    ("size", "content", "remedy"), [(0, b"", "512"), (513, b"x" * 513, "512"), (-1, None, "Correct")]
)
def test_only_whole_sectors_make_a_disk(
    azure: Sandbox, tmp_path: Path, size: int, content: bytes | None, remedy: str
) -> None:
    file = tmp_path / "bad.raw"
    if content is not None:
        file.write_bytes(content)
    before = azure.resources()
    with pytest.raises(errors.InvalidInput, match=r"bad\.raw") as refusal:
        azure.add_vm("web", file)
    assert remedy in refusal.value.remedy
    assert azure.resources() == before


@pytest.mark.parametrize("unmanaged", ["", "sandboxstorage"])
@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "a\\b",
        "[red]v[/red]",
        "nl\nx",
        "nl\n",
        "rtl\u202eabc",
        "\ud800",
        "é",
        "a b",
        "-a",
        ".a",
        "a-",
        "a.",
        "a" * 65,
    ],
)
def test_what_azure_takes_as_no_name_makes_no_vm(
    azure: Sandbox, raw: Path, tmp_path: Path, name: str, unmanaged: str
) -> None:
    before = azure.resources()
    with pytest.raises(errors.InvalidInput, match="cannot be the name of a VM in Azure") as refusal:
        azure.add_vm(name, raw, spec=VmSpec(unmanaged=unmanaged))
    assert (str(refusal.value) + refusal.value.remedy).isprintable()
    assert azure.resources() == before
    assert list((tmp_path / "azure" / "disks").iterdir()) == []


@pytest.mark.parametrize("name", ["a", "7", "web_1.prod-A", "a_", "a" * 64])
def test_what_azure_takes_as_a_name_is_one(azure: Sandbox, raw: Path, name: str) -> None:
    assert azure.add_vm(name, raw).endswith(f"/{name}")


def test_too_many_disks_make_no_vm_and_leave_nothing(azure: Sandbox, raw: Path, tmp_path: Path) -> None:
    before = azure.resources()
    with pytest.raises(errors.InvalidInput, match="maximum number of data disks"):
        azure.add_vm("web", raw, [raw] * 5)
    assert azure.resources() == before
    assert list((tmp_path / "azure" / "disks").iterdir()) == []


def test_a_snapshot_is_frozen_and_a_clone_is_its_own(azure: Sandbox, clients: Clients, raw: Path) -> None:
    azure.add_vm("web", raw)
    disk: Any = clients.compute.disks.get(GROUP, "web-os")
    first = raw.read_bytes()
    snapshot = clients.copy("s", disk.id, snapshot=True, incremental=True)
    clone = clients.copy("c", snapshot.id)
    raw.write_bytes(os.urandom(128 << 10))
    azure.write("web", "os", raw)
    assert bytes_of(azure, disk.id) == raw.read_bytes()
    assert bytes_of(azure, snapshot.id) == bytes_of(azure, clone.id) == first
    assert clone.unique_id != disk.unique_id
    assert (clone.os_type, clone.hyper_v_generation) == ("Linux", "V2")
    assert clients.compute.disks.get(GROUP, "web-os").disk_size_bytes == 128 << 10
    clients.compute.snapshots.begin_delete(GROUP, "s").result()
    assert bytes_of(azure, clone.id) == first


def test_snapshots_of_one_disk_are_one_family(clients: Clients) -> None:
    disk = clients.disk("d")
    one = clients.copy("s1", disk.id, snapshot=True, incremental=True)
    two = clients.copy("s2", disk.id, snapshot=True, incremental=True)
    assert one.incremental_snapshot_family_id == two.incremental_snapshot_family_id
    assert one.unique_id != two.unique_id


def test_contents_go_with_their_last_owner(
    azure: Sandbox, clients: Clients, raw: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "azure" / "disks"
    disk = clients.disk("d")
    clients.copy("s", disk.id, snapshot=True)
    clients.compute.disks.begin_delete(GROUP, "d").result()
    assert len(list(folder.iterdir())) == 1
    clients.compute.snapshots.begin_delete(GROUP, "s").result()
    assert list(folder.iterdir()) == []


def test_a_copy_may_be_larger_and_is_never_smaller(azure: Sandbox, clients: Clients, raw: Path) -> None:
    azure.add_vm("web", raw)
    source = clients.id(DISKS, "web-os")
    assert clients.copy("same", source, diskSizeGB=1).disk_size_bytes == 66048
    grown = clients.copy("grown", source, diskSizeGB=2)
    assert grown.disk_size_bytes == 2 << 30
    assert bytes_of(azure, grown.id)[:66048] == raw.read_bytes()
    body = {"creationData": {"createOption": "Copy", "sourceResourceId": grown.id}, "diskSizeGB": 1}
    refusal = clients.refused("PUT", clients.id(DISKS, "small"), {"location": HERE, "properties": body})
    assert refusal[1:] == ("InvalidParameter", "Disks or snapshot cannot be resized down.")


def test_copies_keep_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(512 << 20)
        file.write(b"data" * 1024)
    copy_sparse(source, target)
    assert target.stat().st_size == 1 << 30
    assert target.stat().st_blocks * 512 < 1 << 20
    with target.open("rb") as file:
        file.seek(512 << 20)
        assert file.read(4096) == b"data" * 1024


@pytest.mark.parametrize(("name", "disk"), [("none", "os"), ("web", 7), ("web", "root")])
def test_writing_needs_a_known_disk(azure: Sandbox, raw: Path, name: str, disk: str | int) -> None:
    azure.add_vm("web", raw, [raw])
    with pytest.raises(errors.InvalidInput, match=str(disk) if name == "web" else name):
        azure.write(name, disk, raw)


def test_writing_does_not_shrink(azure: Sandbox, raw: Path) -> None:
    azure.add_vm("web", raw)
    content = raw.read_bytes()
    raw.write_bytes(content[:512])
    with pytest.raises(errors.InvalidInput) as refusal:
        azure.write("web", "os", raw)
    assert "larg" in refusal.value.remedy
    assert azure.content("web", "os").read_bytes() == content


# ---------------------------------------------------------------- refusals


def test_a_disk_in_use_cannot_be_deleted(clients: Clients, azure: Sandbox, raw: Path) -> None:
    vm = azure.add_vm("web", raw)
    refusal = clients.refused("DELETE", clients.id(DISKS, "web-os"))
    assert refusal == (409, "OperationNotAllowed", f"Disk web-os is attached to VM {vm}.")


def test_what_a_network_needs_cannot_be_deleted(clients: Clients) -> None:
    address, firewall = clients.address("ip"), clients.firewall("nsg")
    nic = clients.nic("nic", publicIPAddress={"id": address.id})
    body = nic.as_dict() | {"location": HERE}
    body["properties"]["networkSecurityGroup"] = {"id": firewall.id}
    clients.network.network_interfaces.begin_create_or_update(GROUP, "nic", body).result()
    clients.compute.virtual_machines.begin_create_or_update(GROUP, "vm", vm_body(nic.id)).result()
    for kind, name, code in (
        (NICS, "nic", "NicInUse"),
        (ADDRESSES, "ip", "PublicIPAddressCannotBeDeleted"),
        (FIREWALLS, "nsg", "InUseNetworkSecurityGroupCannotBeDeleted"),
        (NETWORKS, "sandbox-vnet", "InUseSubnetCannotBeDeleted"),
        (NETWORKS, "sandbox-vnet/subnets/default", "InUseSubnetCannotBeDeleted"),
    ):
        assert clients.refused("DELETE", clients.id(kind, name))[:2] == (400, code)
    message = clients.refused("DELETE", clients.id(ADDRESSES, "ip"))[2]
    assert f"allocated to resource {nic.id}/ipConfigurations/ipconfig1." in message
    clients.compute.virtual_machines.begin_delete(GROUP, "vm").result()
    clients.network.network_interfaces.begin_delete(GROUP, "nic").result()
    clients.network.public_ip_addresses.begin_delete(GROUP, "ip").result()
    clients.network.network_security_groups.begin_delete(GROUP, "nsg").result()
    clients.network.subnets.begin_delete(GROUP, "sandbox-vnet", "default").result()
    clients.network.virtual_networks.begin_delete(GROUP, "sandbox-vnet").result()


def test_a_nic_is_in_use_until_the_vm_is_really_gone(clients: Clients) -> None:
    make_vm(clients)
    begun = clients.arm("DELETE", clients.id(MACHINES, "vm"))
    assert begun.status_code == 202
    assert clients.refused("DELETE", clients.id(NICS, "vm-nic"))[1] == "NicInUse"
    gone = clients.refused("PUT", clients.id(MACHINES, "vm"), vm_body(clients.id(NICS, "vm-nic")))
    assert gone[:2] == (409, "OperationNotAllowed")
    assert "marked for deletion" in gone[2]
    states = [clients.arm("GET", begun.headers["Azure-AsyncOperation"]).json()["status"] for _ in range(2)]
    assert states == ["InProgress", "Succeeded"]
    assert clients.arm("GET", begun.headers["Location"]).status_code == 200
    assert clients.arm("GET", clients.id(MACHINES, "vm")).status_code == 404
    assert clients.arm("DELETE", clients.id(NICS, "vm-nic")).status_code == 202


def test_deleting_what_is_absent_is_no_error(clients: Clients) -> None:
    for kind in (DISKS, SNAPSHOTS, MACHINES, NICS, ADDRESSES, FIREWALLS, NETWORKS):
        assert clients.arm("DELETE", clients.id(kind, "none")).status_code == 204
    assert (
        clients.refused("DELETE", clients.id(DISKS, "d").replace(GROUP, "none"))[1] == "ResourceGroupNotFound"
    )


def test_a_vm_takes_with_it_what_it_was_told_to(clients: Clients) -> None:
    address = clients.address("ip")
    nic = clients.nic("nic", publicIPAddress={"id": address.id, "properties": {"deleteOption": "Delete"}})
    kept, gone = clients.disk("kept"), clients.disk("gone")
    body = vm_body(nic.id)
    inner = body["properties"]
    inner["networkProfile"]["networkInterfaces"][0]["properties"] = {"deleteOption": "Delete"}
    inner["storageProfile"]["osDisk"]["deleteOption"] = "Delete"
    inner["storageProfile"]["dataDisks"] = [
        {"lun": 0, "createOption": "Attach", "managedDisk": {"id": kept.id}},
        {"lun": 1, "createOption": "Attach", "managedDisk": {"id": gone.id}, "deleteOption": "Delete"},
    ]
    clients.compute.virtual_machines.begin_create_or_update(GROUP, "vm", body).result()
    clients.compute.virtual_machines.begin_delete(GROUP, "vm").result()
    left = [each.name for each in clients.resource.resources.list_by_resource_group(GROUP)]
    assert left == ["sandbox-vnet", "sandboxstorage", "kept"]


def test_disks_are_attached_by_azures_rules(clients: Clients) -> None:
    make_vm(clients)
    disks = [clients.disk(f"d{index}") for index in range(5)]

    def attach(*pairs: tuple[int, Any]) -> Body:
        entries = [{"lun": lun, "createOption": "Attach", "managedDisk": {"id": disk}} for lun, disk in pairs]
        return {"properties": {"storageProfile": {"dataDisks": entries}}}

    def refused(*pairs: tuple[int, Any], vm: str = "vm") -> tuple[int, str, str]:
        return clients.refused("PATCH", clients.id(MACHINES, vm), attach(*pairs))

    everything = [(index, disk.id) for index, disk in enumerate(disks)]
    assert refused(*everything) == (
        409,
        "OperationNotAllowed",
        "The maximum number of data disks allowed to be attached to a VM of this size is 4.",
    )
    assert refused((0, disks[0].id), (0, disks[1].id))[1:] == (
        "InvalidParameter",
        "A disk at LUN 0 already exists.",
    )
    assert refused((64, disks[0].id))[1] == "InvalidParameter"
    assert refused((0, clients.id(DISKS, "none"))) == (404, "NotFound", "Disk none is not found.")
    clients.compute.virtual_machines.begin_update(GROUP, "vm", attach((0, disks[0].id))).result()
    make_vm(clients, "other")
    assert refused((0, disks[0].id), vm="other")[:2] == (409, "ConflictingUserInput")
    moved = clients.compute.virtual_machines.begin_update(GROUP, "vm", attach((1, disks[1].id))).result()
    assert [each.name for each in moved.storage_profile.data_disks] == ["d1"], "an omitted disk is detached"
    assert clients.compute.disks.get(GROUP, "d0").disk_state == "Unattached"


def test_a_detach_takes_until_its_operation_ends(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coriolis_azure.sandbox.world.PATIENCE", 600.0)  # only polls end it
    disk = clients.disk("d")
    entry = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": disk.id}}
    make_vm(clients)
    vm = clients.id(MACHINES, "vm")
    body: Body = {"properties": {"storageProfile": {"dataDisks": [entry]}}}
    clients.compute.virtual_machines.begin_update(GROUP, "vm", body).result()
    begun = clients.arm("POST", f"{vm}/attachDetachDataDisks", {"dataDisksToDetach": [{"diskId": disk.id}]})
    assert begun.status_code == 200
    assert begun.json()["dataDisks"][0]["toBeDetached"] is True
    assert "Location" not in begun.headers
    assert clients.refused("DELETE", disk.id)[1] == "OperationNotAllowed"
    other = clients.nic("other-nic")
    stolen = vm_body(other.id)
    stolen["properties"]["storageProfile"]["dataDisks"] = [entry]
    assert clients.refused("PUT", clients.id(MACHINES, "other"), stolen)[:2] == (
        409,
        "AttachDiskWhileBeingDetached",
    )
    for _ in range(2):
        clients.arm("GET", begun.headers["Azure-AsyncOperation"])
    assert clients.arm("GET", vm).json()["properties"]["storageProfile"]["dataDisks"] == []
    assert clients.arm("DELETE", disk.id).status_code == 202


@pytest.mark.parametrize(
    ("vm_zone", "disk_zone", "words"),
    [
        ("1", None, "because it is not in zone '1'."),
        ("2", "3", "because it is not in the same zone as the VM. VM zone: '2'. Disk zone: '3'."),
        (None, "3", "VM zone: ''. Disk zone: '3'."),
    ],
)
def test_disks_must_be_in_the_vms_zone(
    clients: Clients, vm_zone: str | None, disk_zone: str | None, words: str
) -> None:
    zones: dict[str, Any] = {"zones": [disk_zone]} if disk_zone else {}
    disk = clients.disk("d", **zones)
    body = vm_body(clients.nic("nic").id)
    entry = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": disk.id}}
    body["properties"]["storageProfile"]["dataDisks"] = [entry]
    if vm_zone:
        body["zones"] = [vm_zone]
    status, code, message = clients.refused("PUT", clients.id(MACHINES, "vm"), body)
    assert (status, code) == (400, "BadRequest")
    assert message.endswith(words)
    left = [each["id"] for each in clients.arm("GET", f"{clients.group}/resources").json()["value"]]
    assert len(left) == 4, "a refused VM leaves no OS disk"


def test_a_zone_redundant_disk_goes_to_any_zone(clients: Clients) -> None:
    disk = clients.disk("d", sku={"name": "StandardSSD_ZRS"})
    body = vm_body(clients.nic("nic").id)
    entry = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": disk.id}}
    body["properties"]["storageProfile"]["dataDisks"] = [entry]
    body["zones"] = ["2"]
    vm = clients.compute.virtual_machines.begin_create_or_update(GROUP, "vm", body).result()
    assert clients.compute.disks.get(GROUP, vm.storage_profile.os_disk.name).zones == ["2"]


def changed(path: str, value: Any) -> Any:
    """A change of a VM body: `value` at a dotted path below properties."""

    def change(body: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        inner = body["properties"]
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "status", "code", "words"),
    [
        (
            changed("hardwareProfile.vmSize", "Standard_A1"),
            400,
            "InvalidParameter",
            "Standard_A1 is not available",
        ),
        (changed("hardwareProfile.vmSize", "Standard_D2ps_v5"), 400, "BadRequest", "CPU Architecture"),
        (
            changed("storageProfile.imageReference.sku", "16.04.0-LTS"),
            404,
            "PlatformImageNotFound",
            "Canonical:ubuntu-24_04-lts:16.04.0-LTS:latest",
        ),
        (changed("storageProfile.osDisk.diskSizeGB", 8), 400, "BadRequest", "smaller than the size"),
        (
            changed("storageProfile.osDisk.managedDisk", {"storageAccountType": "Ultra"}),
            400,
            "InvalidParameter",
            "Ultra",
        ),
        (changed("osProfile.adminUsername", "Admin"), 400, "InvalidParameter", "Admin Username"),
        (changed("osProfile.customData", "not base64!"), 400, "InvalidParameter", "Base64"),
        (changed("osProfile.computerName", "x" * 65), 400, "InvalidParameter", "host name"),
        (
            changed(
                "osProfile.linuxConfiguration.ssh.publicKeys",
                [{"path": "/root/.ssh/authorized_keys", "keyData": "ssh-ed25519 AAAA"}],
            ),
            400,
            "InvalidParameter",
            "Destination path for Ssh public keys",
        ),
        (
            changed("networkProfile.networkInterfaces", []),
            400,
            "VirtualMachineMustHaveAtLeastOneNetworkInterface",
            "at least one network interface",
        ),
    ],
)
def test_a_vm_is_checked_before_anything_is_made(
    clients: Clients, azure: Sandbox, change: Any, status: int, code: str, words: str
) -> None:
    body = vm_body(clients.nic("nic").id)
    change(body)
    before = azure.resources()
    refusal = clients.refused("PUT", clients.id(MACHINES, "vm"), body)
    assert refusal[:2] == (status, code)
    assert words in refusal[2]
    assert azure.resources() == before


def test_a_size_may_be_closed_in_a_region(clients: Clients) -> None:
    body = vm_body(clients.nic("nic").id, hardwareProfile={"vmSize": "Standard_D2s_v3"})
    body["location"] = "northeurope"
    clients.resource.resource_groups.create_or_update("north", {"location": "northeurope"})
    vm = clients.id(MACHINES, "vm")
    assert clients.refused("PUT", vm, body)[:2] == (409, "SkuNotAvailable")
    body["properties"]["hardwareProfile"]["vmSize"] = "Standard_D2s_v5"
    assert clients.refused("PUT", vm, body)[:2] == (400, "InvalidResourceReference"), "its NIC is elsewhere"


def test_premium_disks_need_a_premium_size(clients: Clients) -> None:
    disk = clients.disk("d", sku={"name": "Premium_LRS"})
    body = vm_body(clients.nic("nic").id, hardwareProfile={"vmSize": "Standard_D2_v5"})
    entry = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": disk.id}}
    body["properties"]["storageProfile"]["dataDisks"] = [entry]
    refusal = clients.refused("PUT", clients.id(MACHINES, "vm"), body)
    assert refusal[1] == "InvalidParameter"
    assert "does not support the storage account type Premium_LRS" in refusal[2]


def test_sources_must_exist(clients: Clients) -> None:
    for kind in (DISKS, SNAPSHOTS):
        creation = {"createOption": "Copy", "sourceResourceId": clients.id(DISKS, "none")}
        body = {"location": HERE, "properties": {"creationData": creation}}
        assert clients.refused("PUT", clients.id(kind, "new"), body) == (
            404,
            "NotFound",
            "Resource none is not found.",
        )


def test_networks_are_checked(clients: Clients) -> None:
    def network(**subnet: str) -> dict[str, Any]:
        space = {"addressPrefixes": ["10.1.0.0/16"]}
        return {
            "location": HERE,
            "properties": {"addressSpace": space, "subnets": [{"name": "s", "properties": subnet}]},
        }

    path = clients.id(NETWORKS, "v")
    assert (
        clients.refused("PUT", path, network(addressPrefix="10.2.0.0/24"))[1]
        == "NetcfgSubnetRangeOutsideVnet"
    )
    assert clients.refused("PUT", path, network(addressPrefix="10.1.0.7/24"))[1] == "InvalidCIDRNotation"
    basic = {"location": HERE, "properties": {"publicIPAllocationMethod": "Dynamic"}}
    assert (
        clients.refused("PUT", clients.id(ADDRESSES, "ip"), basic)[1]
        == "IPv4BasicSkuPublicIpCountLimitReached"
    )
    lost = {"name": "c", "properties": {"subnet": {"id": path + "/subnets/none"}}}
    nic = {"location": HERE, "properties": {"ipConfigurations": [lost]}}
    assert clients.refused("PUT", clients.id(NICS, "n"), nic)[:2] == (400, "InvalidResourceReference")
    assert clients.arm("PUT", path, network(addressPrefix="10.1.0.0/24")).status_code == 201
    second = {"properties": {"addressPrefix": "10.1.0.128/25"}}
    assert clients.refused("PUT", f"{path}/subnets/t", second)[1] == "NetcfgSubnetRangesOverlap"


def test_locks_protect_resources_and_groups(clients: Clients) -> None:
    disk = clients.disk("d")
    for scope in (disk.id, clients.group):
        lock = f"{scope}/providers/Microsoft.Authorization/locks/keep"
        made = clients.arm("PUT", lock, {"properties": {"level": "CanNotDelete"}})
        assert made.status_code == 201
        assert clients.refused("DELETE", disk.id) == (
            409,
            "ScopeLocked",
            f"The scope '{disk.id}' cannot perform delete operation because following scope(s) are locked: "
            f"'{scope}'. Please remove the lock and try again.",
        )
        assert clients.refused("DELETE", clients.group)[1] == "ScopeLocked"
        assert clients.arm("PATCH", disk.id, {"tags": {"a": "b"}}).status_code == 202
        assert clients.arm("DELETE", lock).status_code == 200
    assert clients.arm("DELETE", disk.id).status_code == 202


def test_a_deallocated_vm_hides_sizes_and_types(clients: Clients) -> None:
    vm = make_vm(clients)
    assert vm.storage_profile.os_disk.disk_size_gb == 30
    assert vm.storage_profile.os_disk.managed_disk.storage_account_type == "Premium_LRS"
    clients.compute.virtual_machines.begin_deallocate(GROUP, "vm").result()
    disk = clients.compute.virtual_machines.get(GROUP, "vm").storage_profile.os_disk
    assert disk.disk_size_gb is None
    assert disk.managed_disk.storage_account_type is None
    assert clients.compute.disks.get(GROUP, disk.name).disk_state == "Reserved"
    clients.compute.virtual_machines.begin_deallocate(GROUP, "vm").result()


def test_what_a_put_made_is_not_ready_before_its_operation_ends(clients: Clients) -> None:
    body = {"location": HERE, "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
    begun = clients.arm("PUT", clients.id(DISKS, "d"), body)
    assert begun.json()["properties"]["provisioningState"] == "Updating"
    assert "uniqueId" not in begun.json()["properties"], "the answer has only what was sent"
    done = clients.arm("GET", begun.headers["Azure-AsyncOperation"]).json()
    assert done["properties"]["output"]["properties"]["provisioningState"] == "Succeeded"
    assert clients.arm("GET", begun.headers["Location"]).json()["name"] == "d"


def test_operations_end_without_their_client(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as azure, in_process(azure) as clients:
        clients.disk("d")
        clients.arm("DELETE", clients.id(DISKS, "d"))
        assert clients.arm("GET", clients.id(DISKS, "d")).status_code == 200
        assert clients.id(DISKS, "d") not in [each["id"] for each in azure.resources()]


def test_everything_survives_a_restart(tmp_path: Path, raw: Path) -> None:
    directory = tmp_path / "azure"
    with Sandbox(directory) as azure, in_process(azure) as clients:
        azure.add_vm("web", raw)
        clients.disk("d", tags={"a": "b"})
        clients.arm("DELETE", clients.id(DISKS, "d"))
        info = azure.connection_info()
        (directory / "disks" / "left-by-a-crash.raw").write_bytes(b"x")
    with Sandbox(directory) as again, in_process(again) as clients:
        assert again.connection_info() == info
        assert clients.id(DISKS, "d") not in [each["id"] for each in again.resources()]
        assert again.content("web", "os").read_bytes() == raw.read_bytes()
        assert len(list((directory / "disks").iterdir())) == 1
        with pytest.raises(errors.InvalidInput, match="another sandbox"):
            Sandbox(directory)


def test_concurrent_changes_of_many_resources(clients: Clients) -> None:
    body: Body = {
        "location": HERE,
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1},
    }
    pollers = [clients.compute.disks.begin_create_or_update(GROUP, f"d{index}", body) for index in range(8)]
    assert sorted(str(each.result().name) for each in pollers) == [f"d{index}" for index in range(8)]


def test_unimitated_options_are_refused_in_clear_words(clients: Clients) -> None:
    body: Body = {"location": HERE, "properties": {"creationData": {"createOption": "Upload"}}}
    with pytest.raises(HttpResponseError, match="does not imitate createOption 'Upload'"):
        clients.compute.disks.begin_create_or_update(GROUP, "d", body).result()


@pytest.mark.parametrize("body", ["text", [1], {"properties": "x"}, {"location": HERE, "tags": "x"}])
def test_a_body_of_the_wrong_shape_is_refused(clients: Clients, body: Any) -> None:
    assert clients.refused("PUT", clients.id(DISKS, "d"), body)[:2] == (400, "InvalidRequestContent")


@pytest.mark.parametrize(
    ("kind", "option", "name"),
    [
        ("qcow2", "", "qcow2"),
        ("qed", "", "QED"),
        ("vmdk", "subformat=monolithicSparse", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK"),
        ("vpc", "subformat=dynamic", "VHD"),
        ("vpc", "subformat=fixed", "VHD"),
        ("vhdx", "", "VHDX"),
        ("vdi", "", "VDI"),
    ],
)
def test_an_image_that_is_not_raw_is_named_and_the_remedy_makes_it_raw(
    azure: Sandbox, raw: Path, kind: str, option: str, name: str
) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
    folder, before = raw.parent, azure.resources()
    options = ["-o", option] if option else []
    command = [program, "convert", "-f", "raw", "-O", kind, *options, raw.name, "image"]
    subprocess.run(command, cwd=folder, check=True)
    with pytest.raises(errors.InvalidInput, match=rf"image is a {name} image, not a raw one") as refusal:
        azure.add_vm("web", folder / "image")
    assert azure.resources() == before
    remedy = refusal.value.remedy.partition("to a raw image: ")[2].replace("IMAGE", "image").split()
    subprocess.run([program, *remedy[1:]], cwd=folder, check=True)
    azure.add_vm("web", folder / "image.raw")
    assert azure.content("web", "os").read_bytes().startswith(raw.read_bytes())
    with pytest.raises(errors.InvalidInput, match=rf"is a {name} image"):
        azure.write("web", "os", folder / "image")


@pytest.mark.parametrize(
    ("prefixes", "code"),
    [
        (["10.0.0.0/8", "VirtualNetwork"], "SecurityRuleParameterContainsUnsupportedValue"),
        (["20.20.20.20/16"], "SecurityRuleInvalidAddressPrefix"),
        (["192.168.0.0/34"], "SecurityRuleInvalidAddressPrefix"),
        (["10.0.0.0/8", "2001:db8::/32"], "ResourceCannotContainAddressPrefixesFromDifferentAddressFamilies"),
        (["10.0.0.0/8", "10.1.0.0/16"], "OverlappingSubnetsNotPermittedInSecurityRule"),
        (["10.0.0.0/8", "192.0.2.1"], None),
    ],
)
def test_security_rules_are_refused_as_azure_refuses_them(
    clients: Clients, prefixes: list[str], code: str | None
) -> None:
    rule = {"protocol": "Tcp", "access": "Allow", "direction": "Inbound", "priority": 100}
    ends = {"sourceAddressPrefixes": prefixes, "destinationAddressPrefix": "*", "destinationPortRange": "22"}
    body = {
        "location": HERE,
        "properties": {"securityRules": [{"name": "r", "properties": {**rule, **ends}}]},
    }
    answer = clients.arm("PUT", clients.id("Microsoft.Network/networkSecurityGroups", "n"), body)
    assert (answer.json().get("error") or {}).get("code") == code


def test_a_nic_is_there_at_once_and_has_an_operation_all_the_same(clients: Clients) -> None:
    """As real Azure answers, 476 times in 486: 201, Succeeded, and an operation that has ended at the first look."""
    subnet = {"id": clients.id("Microsoft.Network/virtualNetworks", "sandbox-vnet") + "/subnets/default"}
    configuration = {"name": "c", "properties": {"subnet": subnet}}
    body = {"location": HERE, "properties": {"ipConfigurations": [configuration]}}
    for status in (201, 200):
        answer = clients.arm("PUT", clients.id("Microsoft.Network/networkInterfaces", "n"), body)
        assert answer.status_code == status
        assert answer.json()["properties"]["provisioningState"] == "Succeeded"
        assert clients.arm("GET", answer.headers["Azure-AsyncOperation"]).json() == {"status": "Succeeded"}
    gone = clients.arm("DELETE", clients.id("Microsoft.Network/networkInterfaces", "n"))
    assert gone.status_code == 202
    assert {"Azure-AsyncOperation", "Location"} <= set(gone.headers)


def test_new_tags_of_a_vm_need_no_operation(clients: Clients) -> None:
    vm = clients.id("Microsoft.Compute/virtualMachines", "vm")
    clients.arm("PUT", vm, vm_body(clients.nic("n").id))
    answer = clients.arm("PATCH", vm, {"tags": {"a": "b"}})
    assert (answer.status_code, answer.json()["tags"]) == (200, {"a": "b"})
    assert "Azure-AsyncOperation" not in answer.headers


def test_refusals_of_the_network_provider_have_details(clients: Clients) -> None:
    nic = clients.nic("n").id
    clients.arm("PUT", clients.id("Microsoft.Compute/virtualMachines", "vm"), vm_body(nic))
    refused = clients.arm("DELETE", nic).json()["error"]
    assert (refused["code"], refused["details"]) == ("NicInUse", [])
    absent = clients.arm("GET", f"{nic}x")
    assert "details" not in absent.json()["error"]
    assert absent.headers["x-ms-failure-cause"] == "gateway"


def test_operations_tell_the_seconds_that_azure_asks_to_wait(tmp_path: Path) -> None:
    """At Azure's own pace; else milliseconds, so that tests need not wait."""
    for pace, seconds in ((1.0, "2"), (10.0, None)):
        with Sandbox(tmp_path / str(pace), pace=pace) as azure, in_process(azure) as clients:
            disk = {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}
            body = {"location": HERE, "properties": disk}
            answer = clients.arm("PUT", clients.id("Microsoft.Compute/disks", "d"), body)
            assert answer.status_code == 202
            assert answer.headers.get("Retry-After") == seconds
            assert ("x-ms-retry-after-ms" in answer.headers) is (seconds is None)
