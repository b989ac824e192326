"""Documents of VMs become machines; what Azure leaves out, re-orders or re-cases changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.errors import InvalidInput, Unreadable, Unsupported
from coriolis_azure.machine import export_info, inspection, suitability
from coriolis_azure.machine.inspection import chosen
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source

GROUP = "/subscriptions/s/resourceGroups/g/providers"


def disk_id(name: str) -> str:
    return f"{GROUP}/Microsoft.Compute/disks/{name}"


def disk(name: str, **properties: Any) -> dict[str, Any]:
    given = {"diskSizeBytes": 1 << 30, "diskSizeGB": 1, "uniqueId": f"u-{name}", **properties}
    return {"id": disk_id(name), "name": name, "sku": {"name": "Premium_LRS"}, "properties": given}


def vm(**changes: Any) -> dict[str, Any]:
    """A VM's document with LUNs out of order, and a disk on its way out."""
    storage = {
        "osDisk": {"osType": "Linux", "caching": "ReadWrite", "managedDisk": {"id": disk_id("os")}},
        "dataDisks": [
            {"lun": 5, "caching": "None", "managedDisk": {"id": disk_id("five").upper()}},
            {"lun": 1, "caching": "ReadOnly", "managedDisk": {"id": disk_id("one")}},
            {"lun": 3, "toBeDetached": True, "managedDisk": {"id": disk_id("three")}},
        ],
    }
    properties = {
        "hardwareProfile": {"vmSize": "Standard_D2s_v5"},
        "storageProfile": storage,
        "networkProfile": {"networkInterfaces": [{"id": f"{GROUP}/Microsoft.Network/networkInterfaces/n"}]},
        "instanceView": {
            "statuses": [{"code": "ProvisioningState/succeeded"}, {"code": "PowerState/running"}]
        },
        **changes,
    }
    return {
        "id": f"{GROUP}/Microsoft.Compute/virtualMachines/web",
        "name": "web",
        "location": "West Europe",
        "properties": properties,
    }


NIC = {
    "id": f"{GROUP}/Microsoft.Network/networkInterfaces/n",
    "name": "n",
    "properties": {
        "macAddress": "00-0D-3A-01-02-03",
        "ipConfigurations": [
            {"properties": {"privateIPAddress": "10.0.0.5"}},
            {
                "properties": {
                    "primary": True,
                    "privateIPAddress": "10.0.0.4",
                    "subnet": {"id": f"{GROUP}/Microsoft.Network/virtualNetworks/net/subnets/sub"},
                    "publicIPAddress": {"id": f"{GROUP}/Microsoft.Network/publicIPAddresses/ip"},
                }
            },
        ],
    },
}
ADDRESS = {
    "id": f"{GROUP}/Microsoft.Network/PublicIPAddresses/IP",
    "properties": {"ipAddress": "203.0.113.9"},
}
DISKS = [
    disk("one"),
    disk("os", hyperVGeneration="V2", diskSizeBytes=64 << 30, diskSizeGB=64),
    disk("five", maxShares=2),
]


def test_disks_come_in_order_of_their_luns_without_those_on_their_way_out() -> None:
    machine = inspection.machine(vm(), DISKS, [NIC], [ADDRESS], (2, 8192))
    assert [(disk.name, disk.lun, disk.size_bytes) for disk in machine.disks] == [
        ("os", None, 64 << 30),
        ("data-1", 1, 1 << 30),
        ("data-5", 5, 1 << 30),
    ]
    assert machine.disks[2].shareable
    assert machine.firmware == "EFI"
    assert machine.location == "westeurope"
    assert machine.power_state == "running"
    assert machine.hostname == ""


def test_nics_tell_network_addresses_and_mac() -> None:
    nic = inspection.machine(vm(), DISKS, [NIC], [ADDRESS], (2, 8192)).nics[0]
    assert nic.network == "net/sub"
    assert nic.private_addresses == ("10.0.0.4", "10.0.0.5")
    assert nic.public_address == "203.0.113.9"
    assert nic.primary


@pytest.mark.parametrize(("made", "size"), [("Empty", 3 << 30), ("FromImage", 0), ("Copy", 0)])
def test_without_its_bytes_only_the_size_of_a_disk_made_empty_is_sure(made: str, size: int) -> None:
    """Disks of marketplace images have been seen with 30 GiB and one MiB, and told as 30."""
    creation = {"createOption": made}
    documents = [disk("one", diskSizeBytes=None, diskSizeGB=3, creationData=creation), *DISKS[1:]]
    assert inspection.machine(vm(), documents, [NIC], [], (1, 1)).disks[1].size_bytes == size


@pytest.mark.parametrize(
    "sizes",
    [
        {"diskSizeBytes": 1 << 30, "diskSizeGB": 3},
        {"diskSizeBytes": (1 << 30) + 1, "diskSizeGB": 1},
        {"diskSizeBytes": -512, "diskSizeGB": None},
    ],
)
def test_impossible_sizes_are_not_believed(sizes: dict[str, Any]) -> None:
    with pytest.raises(Unreadable, match="impossible size"):
        inspection.machine(vm(), [disk("one", **sizes), *DISKS[1:]], [NIC], [], (1, 1))


@pytest.mark.parametrize(
    "twice",
    [
        [
            {"lun": 1, "managedDisk": {"id": disk_id("one")}},
            {"lun": 1, "managedDisk": {"id": disk_id("five")}},
        ],
        [
            {"lun": 1, "managedDisk": {"id": disk_id("one")}},
            {"lun": 2, "managedDisk": {"id": disk_id("ONE")}},
        ],
    ],
)
def test_a_lun_or_a_disk_that_is_named_twice_is_not_believed(twice: list[dict[str, Any]]) -> None:
    storage = {"osDisk": {"managedDisk": {"id": disk_id("os")}}, "dataDisks": twice}
    with pytest.raises(Unreadable, match="twice"):
        inspection.machine(vm(storageProfile=storage), DISKS, [NIC], [], (1, 1))


def test_export_info_has_no_nulls_but_where_they_are_allowed_and_all_six_lists() -> None:
    info = export_info.export_info(inspection.machine(vm(), DISKS, [NIC], [ADDRESS], (2, 8192)))
    assert set(info["devices"]) == {"disks", "nics", "controllers", "cdroms", "floppies", "serial_ports"}
    assert "hostname" not in info
    assert info["public_ip_address"] == "203.0.113.9"
    assert info["devices"]["nics"][0]["mac_address"] == "00:0d:3a:01:02:03"
    assert [disk["unit_number"] for disk in info["devices"]["disks"]] == [0, 2, 6]
    assert not any(value is None for disk in info["devices"]["disks"] for value in disk.values())


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        ([{"code": "PowerState/deallocated"}, {"code": "ProvisioningState/succeeded"}], "deallocated"),
        ([{"code": "ProvisioningState/creating/osProvisioningInProgress"}], "unknown"),
        ([{"code": "PowerState/stopped"}], "stopped"),
        ([], "unknown"),
    ],
)
def test_the_power_state_is_found_wherever_it_stands(statuses: list[dict[str, str]], state: str) -> None:
    assert suitability.power_state(vm(instanceView={"statuses": statuses})) == state


@pytest.mark.parametrize(
    ("os_disk", "reason"),
    [
        ({"diffDiskSettings": {"option": "Local"}}, "ephemeral"),
    ],
)
def test_what_cannot_be_moved_is_refused_with_the_reason(os_disk: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        suitability.refuse(vm(storageProfile={"osDisk": os_disk, "dataDisks": []}))


def states(*codes: str) -> dict[str, Any]:
    """A VM's instance view with these states beside its power state."""
    return {"instanceView": {"statuses": [{"code": code} for code in ("PowerState/deallocated", *codes)]}}


@pytest.mark.parametrize(
    ("change", "disks", "words"),
    [
        (
            {"instanceView": {"disks": [{"name": "os", "encryptionSettings": [{"enabled": True}]}]}},
            DISKS,
            "Azure Disk Encryption is on for os",
        ),
        ({}, [disk("os", encryptionSettingsCollection={"enabled": True})], "will not boot elsewhere"),
        ({}, [disk("os", encryption={"diskEncryptionSetId": "des"})], "customer-managed keys"),
        ({"securityProfile": {"securityType": "TrustedLaunch"}}, [], "virtual TPM is not copied"),
        ({}, [disk("data", maxShares=2)], "shared between VMs"),
        ({}, DISKS[:2], "The VM is running and has several disks"),
        ({"instanceView": {"statuses": [{"code": "PowerState/stopped"}]}}, [], "still billed"),
        ({}, [disk("data", creationData={"logicalSectorSize": 4096})], "4096-byte sectors"),
        ({"priority": "Spot"}, [], "Spot VM"),
        ({"priority": "low"}, [], "Spot VM"),
        ({"priority": "SpotPlus"}, [], "Spot VM"),
        ({"provisioningState": "Failed"}, [], "last operation on the VM failed"),
        (states("HibernationState/Hibernated"), [], "and so the replica, holds the content of its memory"),
        (states("OSState/generalized"), [], "generalized"),
        ({"securityProfile": {"securityType": "trustedlaunch"}}, [], "virtual TPM is not copied"),
        ({}, [disk("os", securityProfile={"securityType": "TrustedLaunch"})], "virtual TPM is not copied"),
        ({"storageProfile": {"osDisk": {}, "diskControllerType": "nvme"}}, [], "as NVMe"),
        ({"storageProfile": {"osDisk": {"writeAcceleratorEnabled": True}}}, [], "uses Write Accelerator"),
    ],
)
def test_what_should_be_known_is_told(
    change: dict[str, Any], disks: list[dict[str, Any]], words: str
) -> None:
    told = suitability.caveats(vm(**change), disks)
    assert any(words in caveat for caveat in told)
    assert all(caveat.endswith(".") for caveat in told)


def image(publisher: str, offer: str) -> dict[str, str]:
    return {"publisher": publisher, "offer": offer, "sku": "gen2", "version": "latest"}


def made_from(publisher: str, offer: str) -> dict[str, Any]:
    """A disk made from an image, by which Azure names it where the VM does not."""
    kinds = f"Publishers/{publisher}/ArtifactTypes/VMImage/Offers/{offer}/Skus/gen2/Versions/1"
    id = f"/Subscriptions/0/Providers/Microsoft.Compute/Locations/westeurope/{kinds}"
    return disk("os", creationData={"createOption": "FromImage", "imageReference": {"id": id}})


@pytest.mark.parametrize("where", ["vm", "disk"])
@pytest.mark.parametrize(
    ("system", "publisher", "offer", "license_type", "words"),
    [
        ("Windows", "MicrosoftWindowsServer", "WindowsServer", None, "Windows is licensed through Azure"),
        ("Windows", "MicrosoftWindowsServer", "WindowsServer", "None", "Windows is licensed through Azure"),
        ("Windows", "MicrosoftWindowsServer", "WindowsServer", "Windows_Server", ""),
        ("windows", "MicrosoftWindowsDesktop", "windows-11", "windows_client", ""),
        ("Linux", "RedHat", "RHEL", None, "Red Hat subscription is paid for through Azure"),
        ("Linux", "RedHat", "RHEL", "None", "Red Hat subscription is paid for through Azure"),
        ("Linux", "RedHat", "RHEL", "RHEL_BYOS", ""),
        ("Linux", "RedHat", "rhel-byos", None, ""),
        ("Linux", "RedHat", "rhel-byos", "RHEL_BASE", "RHEL_BASE is paid for through Azure"),
        ("Linux", "SUSE", "sles-15-sp5", None, "SUSE subscription is paid for through Azure"),
        ("Linux", "SUSE", "sles-sap-15-sp5-byos", None, ""),
        ("Linux", "SUSE", "openSUSE-Leap-15-5", None, ""),
        ("Linux", "SUSE", "sles-15-sp5", "SLES_BYOS", ""),
        ("Linux", "Canonical", "ubuntu-24_04-lts", None, ""),
        ("Linux", "Canonical", "ubuntu-24_04-lts", "UBUNTU_PRO", "UBUNTU_PRO is paid for through Azure"),
    ],
)
def test_a_licence_that_stays_in_azure_is_told_and_one_of_the_customers_own_is_not(
    where: str, system: str, publisher: str, offer: str, license_type: str | None, words: str
) -> None:
    reference = image(publisher, offer) if where == "vm" else None
    storage = {"osDisk": {"osType": system}, "imageReference": reference}
    machine = vm(storageProfile=storage, **({"licenseType": license_type} if license_type else {}))
    disks = [made_from(publisher, offer)] if where == "disk" else []
    (told,) = suitability.caveats(machine, disks) or ("",)
    assert words in told
    assert bool(told) is bool(words)
    assert suitability.licence(machine) == ("" if license_type == "None" else license_type or "")


def test_a_machine_in_an_edge_zone_is_told() -> None:
    edge = {**vm(), "extendedLocation": {"name": "microsoftlosangeles1", "type": "EdgeZone"}}
    assert any("edge zone microsoftlosangeles1" in caveat for caveat in suitability.caveats(edge, []))


def test_an_uploaded_disk_is_smaller_than_its_vhd_by_the_footer() -> None:
    creation = {"createOption": "Upload", "uploadSizeBytes": (1 << 30) + 512}
    uploaded = disk("one", diskSizeBytes=None, diskSizeGB=None, creationData=creation)
    machine = inspection.machine(vm(), [uploaded, *DISKS[1:]], [NIC], [], (1, 1))
    assert machine.disks[1].size_bytes == 1 << 30


def test_an_ordinary_machine_of_one_disk_has_no_caveats() -> None:
    os_disk = {"osType": "Linux", "managedDisk": {"id": disk_id("os")}}
    assert suitability.caveats(vm(storageProfile={"osDisk": os_disk}), DISKS[1:2]) == ()


@pytest.mark.parametrize("where", ["vm", "disk"])
@pytest.mark.parametrize(
    "type_", ["ConfidentialVM", "confidentialVM", "ConfidentialVM_NonPersistedTPM", "ConfidentialVM_New"]
)
def test_confidential_machines_are_refused_however_azure_tells_of_them(where: str, type_: str) -> None:
    profile = {"securityProfile": {"securityType": type_}}
    told = (vm(**profile), []) if where == "vm" else (vm(), [disk("os", **profile)])
    with pytest.raises(Unsupported, match="confidential VM"):
        suitability.refuse(*told)


def test_a_confidential_os_disk_is_refused() -> None:
    profile = {"securityEncryptionType": "DiskWithVMGuestState"}
    os_disk = {"managedDisk": {"id": disk_id("os"), "securityProfile": profile}}
    confidential = vm(securityProfile={"securityType": "ConfidentialVM"}, storageProfile={"osDisk": os_disk})
    with pytest.raises(Unsupported, match="virtual TPM"):
        suitability.refuse(confidential)


@pytest.mark.parametrize("word", ["data-1", "DATA-1"])
def test_a_word_that_names_two_disks_is_refused_with_both(
    azure: Sandbox, source: Source, image: Callable[..., Path], word: str
) -> None:
    """The disk at LUN 0 is called data-1, which is also what the disk at LUN 1 is called here."""
    azure.add_vm("web", image("os"), [image("zero"), image("one")])
    machine = source.inspect("web")
    named = replace(machine.disks[1], id=machine.disks[1].id.rpartition("/")[0] + "/data-1")
    machine = replace(machine, disks=(machine.disks[0], named, machine.disks[2]))
    with pytest.raises(
        InvalidInput, match=r"matches 2 disks of web: data-0 \(data-1\), data-1 \("
    ) as refusal:
        chosen(machine, [word])
    for disk in machine.disks[1:]:
        assert disk.id in refusal.value.remedy
        assert disk not in chosen(machine, [disk.id.upper()])
        assert len(chosen(machine, [disk.id])) == 2


def test_a_disk_may_be_named_twice(azure: Sandbox, source: Source, image: Callable[..., Path]) -> None:
    azure.add_vm("web", image("os"), [image("zero")])
    machine = source.inspect("web")
    assert chosen(machine, ["data-0", machine.disks[1].id]) == machine.disks[:1]
