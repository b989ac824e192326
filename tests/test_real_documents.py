"""Documents of real Azure are read right, and spoilt ones never wrong: a `Machine`, or an error of ours.

They go the whole way: HTTP, the SDKs, the door that checks their form, inspection.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.checks.preflight import check
from coriolis_azure.machine import export_info, inspection
from coriolis_azure.model import Machine, canonical_location
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness import real_azure
from harness.constants import GROUP
from harness.real_azure import Json, answering, examples, machine_documents, needs_openapi, needs_recordings
from harness.spoiling import QUICK, spoilt

GIB = 1 << 30


def provider(kind: str, name: str) -> str:
    return f"/subscriptions/s/resourceGroups/{GROUP}/providers/{kind}/{name}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandbox, Source]]:
    """A sandbox and a source on it, for all tests here: they only read."""
    with Sandbox(tmp_path_factory.mktemp("real") / "azure") as sandbox:
        source = Source(sandbox.connection_info(), sandbox.environment(), transport=sandbox.transport())
        source.azure.groups()  # sign in
        yield sandbox, source
        source.close()


def read(place: tuple[Sandbox, Source], vm: Json, *others: Json) -> Machine:
    """The machine that inspection makes of a VM's document, with those of its disks, NICs and addresses."""
    sandbox, source = place
    answering(sandbox, [*others, vm])
    location = canonical_location(vm["location"])
    return inspection.read(source.azure, names.group_of(vm["id"]), location, names.name_of(vm["id"]))


def outcome(place: tuple[Sandbox, Source], vm: Json, *others: Json) -> Machine | errors.CoriolisAzureError:
    """The same, or the error that it ends with; whatever is no error of ours is raised."""
    try:
        return read(place, vm, *others)
    except errors.CoriolisAzureError as error:
        return error


def expected(vm: Json) -> str | None:
    """Why a VM cannot be moved, in a word of the reason; None for one that can."""
    storage = vm["properties"]["storageProfile"]
    if storage["osDisk"].get("diffDiskSettings"):
        return "nothing to snapshot"
    if any("vhd" in entry for entry in entries(vm)):
        return "unmanaged"
    if vm["properties"].get("securityProfile", {}).get("securityType") == "ConfidentialVM":
        return "confidential"
    # A VM that is only being made has no disks yet.
    return None if all(map(disk_of, entries(vm))) else "do not exist"


def disk_of(entry: Json) -> str:
    return str(entry.get("managedDisk", {}).get("id", ""))


def agrees(told: Machine | errors.CoriolisAzureError, vm: Json, disks: list[Json]) -> None:
    """Every disk is there with its own size, or the reason why not is told."""
    reason = expected(vm)
    if reason:
        assert isinstance(told, errors.CoriolisAzureError)
        assert reason in told.message
    else:
        assert isinstance(told, Machine), told
        assert {disk.name: disk.size_bytes for disk in told.disks} == true_sizes(vm, disks)
        exported = export_info.export_info(told)
        assert json.loads(json.dumps(exported)) == exported


def entries(vm: Json) -> list[Json]:
    storage = vm["properties"]["storageProfile"]
    return [storage["osDisk"], *(e for e in storage.get("dataDisks", []) if not e.get("toBeDetached"))]


def stand_in(entry: Json) -> Json:
    """The document of a disk that was not recorded."""
    gigabytes = entry.get("diskSizeGB") or 30
    sizes = {"diskSizeGB": gigabytes, "diskSizeBytes": gigabytes * GIB, "osType": entry.get("osType")}
    return {"id": entry["managedDisk"]["id"], "sku": {"name": "Premium_LRS"}, "properties": sizes}


def true_sizes(vm: Json, disks: list[Json]) -> dict[str, int]:
    """By role, the size that the disk's own document tells."""
    told = {disk["id"].lower(): disk["properties"] for disk in disks}
    return {
        f"data-{entry['lun']}" if "lun" in entry else "os": properties.get("diskSizeBytes")
        or properties["diskSizeGB"] * GIB
        for entry in entries(vm)
        if (properties := told[entry["managedDisk"]["id"].lower()])
    }


RECORDED = [
    pytest.param(recording, n, id=f"{recording.partition('.')[0]}-{n}")
    for recording in real_azure.recordings()
    for n in range(len(machine_documents(recording)))
]


@pytest.mark.parametrize("machine", real_azure.machines().values(), ids=real_azure.machines())
def test_a_vm_as_azure_tells_it_is_read_or_refused_with_the_reason(
    place: tuple[Sandbox, Source], machine: Json
) -> None:
    vm, *others = machine["documents"]
    assert (expected(vm) or "") == machine["reason"]
    told = outcome(place, vm, *others)
    agrees(told, vm, [each for each in others if "/disks/" in each["id"]])
    if isinstance(told, Machine):
        nics = vm["properties"]["networkProfile"]["networkInterfaces"]
        first = [nic["id"] for nic in nics if nic.get("properties", {}).get("primary", True)]
        assert [nic.id for nic in told.nics] == [nic["id"] for nic in nics]
        assert [nic.id for nic in told.nics if nic.primary] == first


@pytest.mark.slow
@needs_recordings
@pytest.mark.parametrize(("recording", "n"), RECORDED)
def test_every_recorded_state_of_a_vm_is_read(place: tuple[Sandbox, Source], recording: str, n: int) -> None:
    known, vm = real_azure.documents(recording), machine_documents(recording)[n]
    disks = [known.get(disk_of(e).lower()) or stand_in(e) for e in entries(vm) if disk_of(e)]
    others = [document for document in known.values() if "/Microsoft.Compute/" not in document["id"]]
    told = outcome(place, vm, *others, *disks)
    agrees(told, vm, disks)
    if isinstance(told, Machine):
        assert [nic.id.lower() for nic in told.nics] == [
            nic["id"].lower() for nic in vm["properties"]["networkProfile"]["networkInterfaces"]
        ]


DISK: Json = {"id": "", "properties": {"diskSizeGB": 10, "diskSizeBytes": 10 * GIB}}
VMS = [
    pytest.param(vm, id=f"{name}-{n}")
    for n, (name, vm) in enumerate(examples("VirtualMachine_*"))
    if "storageProfile" in vm.get("properties", {})
]


@pytest.mark.slow
@needs_openapi
@pytest.mark.parametrize("vm", VMS)
def test_every_official_example_of_a_vm_is_read_or_refused_with_the_reason(
    place: tuple[Sandbox, Source], vm: Json
) -> None:
    vm = {"id": provider("Microsoft.Compute/virtualMachines", "vm"), **vm}
    disks = [{**DISK, "id": disk_of(entry)} for entry in entries(vm) if disk_of(entry)]
    agrees(outcome(place, vm, *disks), vm, disks)


@pytest.mark.parametrize("disk", real_azure.written("disks"), ids=lambda disk: disk["shows"])
def test_a_disk_is_sized_as_it_tells_or_refused(place: tuple[Sandbox, Source], disk: Json) -> None:
    os_disk = {"osType": "Linux", "managedDisk": {"id": provider("Microsoft.Compute/disks", "os")}}
    id = provider("Microsoft.Compute/disks", "data")
    vm = machine_with(os_disk, [{"lun": 3, "managedDisk": {"id": id}}])
    told = outcome(place, vm, {"id": id, "properties": disk["properties"]}, stand_in(os_disk))
    if disk["said"]:
        assert isinstance(told, errors.CoriolisAzureError)
        assert disk["said"] in told.message
    else:
        assert isinstance(told, Machine)
        assert told.disks[1].size_bytes == disk["size_bytes"]


@pytest.mark.slow
@needs_openapi
@pytest.mark.parametrize(
    "disk",
    [
        pytest.param(disk, id=f"{name}-{n}")
        for n, (name, disk) in enumerate(examples("Disk_*"))
        if "location" in disk
    ],
)
def test_every_official_example_of_a_disk_is_sized_right_or_refused(
    place: tuple[Sandbox, Source], disk: Json
) -> None:
    disk = {**disk, "id": provider("Microsoft.Compute/disks", "data")}
    os_disk = {"osType": "Linux", "managedDisk": {"id": provider("Microsoft.Compute/disks", "os")}}
    vm = machine_with(os_disk, [{"lun": 3, "managedDisk": {"id": disk["id"]}}])
    others = [disk, stand_in(os_disk)]
    told = outcome(place, vm, *others)
    size = disk["properties"].get("diskSizeGB")
    uploaded = disk["properties"]["creationData"].get("uploadSizeBytes")
    if disk["properties"].get("securityProfile", {}).get("securityType", "").startswith("Confidential"):
        assert isinstance(told, errors.Unsupported)
    elif uploaded:
        assert isinstance(told, Machine)
        assert told.disks[1].size_bytes == uploaded - 512
    elif size is None or disk["properties"]["creationData"]["createOption"] != "Empty":
        assert isinstance(told, errors.Unreadable)
        assert "does not tell the size" in told.message
    else:
        assert isinstance(told, Machine)
        assert told.disks[1].size_bytes == size * GIB


@pytest.mark.slow
@needs_openapi
@pytest.mark.parametrize(
    "nic",
    [pytest.param(nic, id=f"{name}-{n}") for n, (name, nic) in enumerate(examples("NetworkInterface*"))],
)
def test_every_official_example_of_a_nic_is_read(place: tuple[Sandbox, Source], nic: Json) -> None:
    os_disk = {"osType": "Linux", "managedDisk": {"id": provider("Microsoft.Compute/disks", "os")}}
    vm = machine_with(os_disk)
    nic = {**nic, "id": vm["properties"]["networkProfile"]["networkInterfaces"][0]["id"]}
    told = read(place, vm, stand_in(os_disk), nic).nics[0]
    configurations = nic["properties"]["ipConfigurations"]
    addresses = [each["properties"].get("privateIPAddress") for each in configurations]
    assert told.private_addresses == tuple(address for address in addresses if address)
    assert told.subnet_id == configurations[0]["properties"]["subnet"]["id"]


def machine_with(os_disk: Json, data_disks: list[Json] | None = None) -> Json:
    nic = provider("Microsoft.Network/networkInterfaces", "nic")
    return {
        "id": provider("Microsoft.Compute/virtualMachines", "vm"),
        "name": "vm",
        "location": "westeurope",
        "properties": {
            "hardwareProfile": {"vmSize": "Standard_D2s_v5"},
            "storageProfile": {"osDisk": os_disk, "dataDisks": data_disks or []},
            "networkProfile": {"networkInterfaces": [{"id": nic}]},
        },
    }


# Spoilt documents


def _whole() -> list[Json]:
    """A VM with three disks, a NIC and an address: as Azure would tell them, with all that is read."""
    names_ = ("os", "one", "two")
    ids = [provider("Microsoft.Compute/disks", name) for name in names_]
    vm = machine_with(
        {"osType": "Linux", "caching": "ReadWrite", "managedDisk": {"id": ids[0]}},
        [
            {"lun": 7, "caching": "None", "managedDisk": {"id": ids[1].upper()}},
            {"lun": 2, "toBeDetached": False, "managedDisk": {"id": ids[2]}},
        ],
    )
    vm["zones"], vm["plan"] = ["1"], {"publisher": "p", "product": "o", "name": "n"}
    vm["properties"] |= {
        "securityProfile": {"securityType": "TrustedLaunch", "uefiSettings": {"secureBootEnabled": True}},
        "osProfile": {"computerName": "host"},
        "licenseType": "Windows_Server",
        "priority": "Spot",
        "instanceView": {
            "statuses": [{"code": "ProvisioningState/succeeded"}, {"code": "PowerState/running"}],
            "disks": [{"name": "os", "encryptionSettings": [{"enabled": True}]}],
            "extensions": [{"name": "x", "type": "Microsoft.Azure.Security.AzureDiskEncryption"}],
        },
    }
    disks = []
    for n, id in enumerate(ids):
        disk = copy.deepcopy(stand_in({"managedDisk": {"id": id}, "diskSizeGB": 32 << n, "osType": "Linux"}))
        disk["properties"] |= {
            "uniqueId": f"u{n}",
            "timeCreated": "2026-01-01T00:00:00Z",
            "maxShares": 2,
            "creationData": {"createOption": "Empty", "logicalSectorSize": 4096},
            "encryption": {"type": "EncryptionAtRestWithCustomerKey", "diskEncryptionSetId": "des"},
            "encryptionSettingsCollection": {"enabled": True},
        }
        disks.append(disk)
    address = provider("Microsoft.Network/publicIPAddresses", "ip")
    subnet = provider("Microsoft.Network/virtualNetworks", "net") + "/subnets/sub"
    configuration = {
        "primary": True,
        "privateIPAddress": "10.0.0.4",
        "subnet": {"id": subnet},
        "publicIPAddress": {"id": address},
    }
    nic = {
        "id": vm["properties"]["networkProfile"]["networkInterfaces"][0]["id"],
        "properties": {
            "macAddress": "00-0D-3A-01-02-03",
            "ipConfigurations": [{"name": "i", "properties": configuration}],
        },
    }
    return [vm, *disks, nic, {"id": address, "properties": {"ipAddress": "203.0.113.9"}}]


def _sources() -> list[list[Json]]:
    """Whole sets of documents: ours, and recorded ones where they are."""
    sets = [_whole(), *(vm["documents"] for vm in real_azure.machines().values() if not vm["reason"])]
    for recording in real_azure.recordings():
        known = real_azure.documents(recording)
        for vm in machine_documents(recording)[-1:]:
            if expected(vm) is None:
                disks = [known.get(disk_of(e).lower()) or stand_in(e) for e in entries(vm)]
                sets.append([vm, *disks, *(d for d in known.values() if "/Microsoft.Network/" in d["id"])])
    return sets


SETS = _sources()
# A resource is asked for by its id: without it there is no document to answer with.
SPOILT = st.sampled_from(SETS).flatmap(lambda whole: st.tuples(st.just(whole), spoilt(whole, ("id",))))


@pytest.mark.slow
@QUICK
@given(documents=SPOILT)
def test_spoilt_documents_give_a_machine_or_an_error_of_ours_and_never_a_wrong_size(
    place: tuple[Sandbox, Source], documents: tuple[list[Json], list[Json]]
) -> None:
    (vm, *others), (changed, *changed_others) = documents
    right = true_sizes(vm, [each for each in others if "/disks/" in each["id"].lower()])
    told = outcome(place, {**changed, "location": vm["location"]}, *changed_others)
    if isinstance(told, Machine):
        assert told.disks[0].name == "os"
        assert {disk.name: disk.size_bytes for disk in told.disks}.items() <= right.items()
        assert json.loads(json.dumps(export_info.export_info(told)))
    else:
        assert told.message
        assert told.remedy


@pytest.mark.slow
@settings(QUICK, max_examples=60)
@given(documents=SPOILT)
def test_check_of_spoilt_documents_is_a_list_of_findings(
    place: tuple[Sandbox, Source], documents: tuple[list[Json], list[Json]]
) -> None:
    (vm, *_), (changed, *changed_others) = documents
    sandbox, source = place
    answering(sandbox, [*changed_others, changed])
    assert check(source.context, vm["name"]).findings


LISTED = ("skus", "vmSizes", "usages", "permissions", "locks", "virtualMachines", "resourceGroups")


@pytest.mark.parametrize("what", LISTED)
@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b'{"value": [7, null]}',
        *(
            pytest.param(body, marks=pytest.mark.slow)
            for body in (
                b"[]",
                b"null",
                b"7",
                b"",
                b'{"value": 7}',
                b'{"value": null}',
                b'{"value": [{}]}',
                b'{"value": [{"name": 7}]}',
                b'{"value": [], "nextLink": 7}',
            )
        ),
    ],
)
def test_listings_that_are_none_are_errors_of_ours(
    place: tuple[Sandbox, Source], tmp_path: Path, what: str, body: bytes
) -> None:
    """Whatever answers in Azure's place: the check ends with findings, and never with a trace."""
    sandbox, source = place
    source.azure._skus.clear()
    sandbox.intercept = lambda request, real: (
        replace(real(request), status=200, body=body)
        if request.path.lower().rstrip("/").endswith(what.lower())
        else real(request)
    )
    try:
        assert check(source.context, "nobody").findings
    finally:
        sandbox.intercept = None
        source.azure._skus.clear()
