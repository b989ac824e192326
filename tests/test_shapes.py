"""Each shape of a VM, provoked on the sandbox and read over the SDKs: sizes are right, and what matters is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors
from coriolis_azure.machine import export_info
from coriolis_azure.model import Machine
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.constants import MIB

SIZES = {"os": 3 * MIB, "data-0": MIB, "data-1": 2 * MIB}


@pytest.fixture
def vm(azure: Sandbox, image: Callable[..., Path]) -> str:
    """The name of a VM of three disks."""
    azure.add_vm("web", image("os"), [image("one", MIB), image("two", 2 * MIB)], VmSpec(zone="1"))
    return "web"


def told(machine: Machine) -> str:
    assert {disk.name: disk.size_bytes for disk in machine.disks} == SIZES
    return " ".join(machine.caveats)


def tweak(azure: Sandbox, suffix: str, change: Callable[[Any], None]) -> None:
    """Answers to a GET of a path with this end are changed on their way."""

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "GET" and request.path.endswith(suffix) and response.status == 200:
            document = json.loads(response.body)
            change(document)
            return replace(response, body=json.dumps(document).encode())
        return response

    azure.intercept = look


def test_a_deallocated_vm_is_sized_by_its_disks(azure: Sandbox, source: Source, vm: str) -> None:
    """Its own document has lost sizes and SKUs."""
    source.deallocate(source.inspect(vm))
    machine = source.inspect(vm)
    assert machine.power_state == "deallocated"
    assert machine.zones == ("1",)
    assert [disk.sku for disk in machine.disks] == ["Premium_LRS", "StandardSSD_LRS", "StandardSSD_LRS"]
    assert "billed" not in told(machine)


def test_a_vm_that_its_guest_has_stopped_is_still_billed(azure: Sandbox, source: Source, vm: str) -> None:
    tweak(
        azure,
        "/virtualMachines/web",
        lambda found: found["properties"]["instanceView"]["statuses"][1].update(code="PowerState/stopped"),
    )
    assert "still billed" in told(source.inspect(vm))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "spot": ({"priority": "Spot", "evictionPolicy": "Deallocate"}, "may evict it"),
    "trusted launch": ({"securityProfile": {"securityType": "TrustedLaunch"}}, "virtual TPM is not copied"),
    "licence of azure": ({"licenseType": "SLES_STANDARD"}, "SLES_STANDARD is paid for through Azure"),
    "failed": ({"provisioningState": "Failed"}, "last operation on the VM failed"),
    "nothing known": ({"priority": "Cosmic", "evictionPolicy": "Shatter", "newer": {"than": ["this"]}}, ""),
}


@pytest.mark.parametrize("shape", CHANGES)
def test_what_a_vm_says_of_itself_is_told(azure: Sandbox, source: Source, vm: str, shape: str) -> None:
    changes, words = CHANGES[shape]
    tweak(azure, "/virtualMachines/web", lambda found: found["properties"].update(changes))
    machine = source.inspect(vm)
    assert words in told(machine)
    assert machine.firmware == "EFI"


DISKS: dict[str, tuple[dict[str, Any], str, str]] = {
    "shared": ({"maxShares": 3}, "Premium_LRS", "shared between VMs"),
    "customer-managed keys": (
        {"encryption": {"type": "EncryptionAtRestWithCustomerKey", "diskEncryptionSetId": "/x/des"}},
        "Premium_LRS",
        "customer-managed keys",
    ),
    "encrypted in the guest": (
        {"encryptionSettingsCollection": {"enabled": True}},
        "Premium_LRS",
        "will not boot",
    ),
    "ultra with large sectors": (
        {"creationData": {"createOption": "Empty", "logicalSectorSize": 4096}},
        "UltraSSD_LRS",
        "4096-byte sectors",
    ),
    "of a kind that comes later": ({"diskState": "Levitating", "tier": "P999"}, "PremiumV9_ZRS", ""),
}


@pytest.mark.parametrize("shape", DISKS)
def test_what_a_disk_says_of_itself_is_told(azure: Sandbox, source: Source, vm: str, shape: str) -> None:
    properties, sku, words = DISKS[shape]

    def change(disk: Any) -> None:
        disk["sku"]["name"] = sku
        disk["properties"].update(properties)

    tweak(azure, "/disks/web-data-1", change)
    machine = source.inspect(vm)
    assert words in told(machine)
    assert machine.disks[2].sku == sku


def test_a_confidential_vm_and_an_ephemeral_disk_are_refused_before_anything_is_made(
    azure: Sandbox, source: Source, vm: str, tmp_path: Path
) -> None:
    before = azure.resources()

    def confidential(vm: dict[str, Any]) -> None:
        vm["properties"]["securityProfile"] = {"securityType": "ConfidentialVM"}

    def ephemeral(vm: dict[str, Any]) -> None:
        vm["properties"]["storageProfile"]["osDisk"]["diffDiskSettings"] = {"option": "Local"}

    for change, reason in ((confidential, "confidential"), (ephemeral, "nothing to snapshot")):
        tweak(azure, "/virtualMachines/web", change)
        with pytest.raises(errors.Unsupported, match=reason):
            source.replicate(vm, tmp_path / "images")
    assert azure.resources() == before


def test_luns_with_holes_out_of_order_and_on_their_way_out(azure: Sandbox, source: Source, vm: str) -> None:
    def shuffle(found: Any) -> None:
        one, two = found["properties"]["storageProfile"]["dataDisks"]
        one["lun"], two["lun"], two["toBeDetached"] = 40, 3, True
        found["properties"]["storageProfile"]["dataDisks"] = [one, two]

    tweak(azure, "/virtualMachines/web", shuffle)
    machine = source.inspect(vm)
    assert [(disk.name, disk.lun) for disk in machine.disks] == [("os", None), ("data-40", 40)]
    assert any("web-data-1 is being detached" in caveat for caveat in machine.caveats)


def test_several_addresses_of_both_kinds(azure: Sandbox, source: Source, vm: str) -> None:
    def more(nic: Any) -> None:
        first = nic["properties"]["ipConfigurations"][0]["properties"]
        six = {**first, "primary": False, "privateIPAddress": "fd00::5", "privateIPAddressVersion": "IPv6"}
        del six["publicIPAddress"]
        nic["properties"]["ipConfigurations"].insert(0, {"name": "six", "properties": six})

    tweak(azure, "/networkInterfaces/web-nic", more)
    (nic,) = source.inspect(vm).nics
    assert nic.private_addresses[1] == "fd00::5"
    assert nic.public_address
    assert export_info.export_info(source.inspect(vm))["devices"]["nics"][0]["ip_addresses"][1] == "fd00::5"


def test_a_vm_made_from_an_existing_os_disk_has_no_os_profile(
    azure: Sandbox, source: Source, vm: str
) -> None:
    tweak(azure, "/virtualMachines/web", lambda found: found["properties"].pop("osProfile"))
    machine = source.inspect(vm)
    assert told(machine) is not None
    assert machine.os_type == "linux"


def test_ids_with_the_group_in_capitals_are_the_same(azure: Sandbox, source: Source, vm: str) -> None:
    """Azure's own listings shout; what is asked for by such an id is the same machine."""
    (listed,) = source.list_vms()
    assert "/resourceGroups/SANDBOX/" in listed["id"]
    assert told(source.inspect(listed["id"])) == told(source.inspect(vm))


def test_encryption_inside_the_guest_is_told_before_anything_is_made(
    azure: Sandbox, source: Source, vm: str
) -> None:
    """A stopped VM shows it by its extension only."""
    extension = {"name": "ade", "properties": {"type": "AzureDiskEncryptionForLinux", "publisher": "p"}}
    tweak(azure, "/virtualMachines/web", lambda found: found.update(resources=[extension]))
    assert told(source.inspect(vm)).startswith("Azure Disk Encryption is on")
    checked = source.check(vm)
    assert any("Azure Disk Encryption" in finding.text for finding in checked.findings)
