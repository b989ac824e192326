"""Turns Azure's description of a VM into a `Machine`; rejects a VM that cannot be moved, with the reason.

Requests and parsing are separate: `read` sends the requests, `machine` builds the value from documents. The documents
of real VMs lack what one would expect: a deallocated VM has no disk sizes (they are read from the disks), a VM created
from an existing OS disk has no osProfile, ids change their case, and enum values appear that are newer than this code.
What is only displayed may be missing; what the copying depends on (disks, LUNs, sizes) is accepted only if it is
complete and consistent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .. import vhd
from ..azure import names, skus
from ..azure.blobs import Storage
from ..azure.client import Azure
from ..errors import AzureError, InvalidInput, NotFound, Unreadable, Unsupported
from ..events import counted
from ..model import Disk, Json, Machine, Nic, at, canonical_location, must
from ..threads import ordered
from . import unmanaged
from .suitability import caveats, leaving, licence, power_state, refuse, security_type

LOG = logging.getLogger(__name__)


_GIB = 1 << 30
# The cloud has no listing of sizes, or the identity may not read it: no reason to fail the whole inspection.
_SIZES_UNAVAILABLE = {400, 403, 404}
_UNKNOWN_SIZE = "Azure no longer describes the size of this VM: its vCPUs and memory are reported as 0."


def read(
    azure: Azure,
    group: str,
    location: str,
    name: str,
    storage: Storage | None = None,
    excluded: Iterable[str] = (),
) -> Machine:
    """Read the VM `name` (a name in `group`, or an ARM id). `storage` gives access to disks that are VHD blobs.

    Disks that are `excluded` (see `chosen`) are not checked: they need not even be readable.

    Raises NotFound if there is no such VM, InvalidInput if it is in another location, Unsupported if it cannot be
    moved.
    """
    id = vm_id(azure.subscription, group, name)
    vm = _vm(azure, group, id)
    if canonical_location(must(vm, "location")) != location:
        raise InvalidInput(
            f"VM {names.name_of(id)} is in {vm['location']}, not in {location}",
            remedy=f"Set the location of the source environment to {vm['location']}.",
        )
    related = _related(azure, vm)
    refuse(vm, related.disks)
    if vhds := [entry for entry in _disk_entries(vm) if entry.get("vhd")]:
        if storage is None:
            raise Unsupported(
                f"VM {names.name_of(id)} has unmanaged disks (VHD blobs in a storage account)",
                remedy="Give access to Blob storage.",
            )
        needed = _entries_not_excluded(vm, vhds, excluded)
        related = related._replace(disks=[*related.disks, *unmanaged.documents(storage, needed)])
    value = machine(vm, *related)
    needed_disks = not_excluded(value, excluded)
    missing = [disk.name for disk in needed_disks if not disk.unique_id]
    if missing:
        raise NotFound(
            f"VM {value.name} refers to disks that do not exist in Azure: {', '.join(missing)}",
            remedy="Detach them from the VM, or wait until an operation on them has ended, then run again.",
        )
    if unsized := [disk.name for disk in needed_disks if not disk.size_bytes]:
        raise Unreadable(f"Azure does not tell the size of disks of VM {value.name}: {', '.join(unsized)}")
    return value


def chosen(machine: Machine, excluded: Iterable[str]) -> tuple[Disk, ...]:
    """The disks that are not excluded. `excluded` lists roles, names or ARM ids.

    Raises InvalidInput if an entry matches no disk or several disks, or if no disk is left.
    """
    excluded_disks = {_named(machine, name).name for name in excluded}
    remaining = tuple(disk for disk in machine.disks if disk.name not in excluded_disks)
    if not remaining:
        raise InvalidInput(f"exclude_disks leaves out every disk of {machine.name}")
    return remaining


def not_excluded(machine: Machine, excluded: Iterable[str]) -> list[Disk]:
    """The disks that are not excluded; unlike in `chosen`, an entry may match no disk."""
    lowered = {name.lower() for name in excluded}
    return [disk for disk in machine.disks if _names_for(disk).isdisjoint(lowered)]


def _names_for(disk: Disk) -> set[str]:
    """The names by which users may refer to a disk, in lower case."""
    return {disk.name, disk.id.lower(), names.name_of(disk.id).lower()}


def _entries_not_excluded(vm: Json, entries: Sequence[Json], excluded: Iterable[str]) -> list[Json]:
    """Those of a VM's disk `entries` that are not excluded."""
    lowered = {name.lower() for name in excluded}
    by_lun = _by_lun(vm, _disk_entries(vm))
    return [
        entry
        for lun, entry in by_lun
        if entry in entries and _names_for(_disk(lun, entry, {})).isdisjoint(lowered)
    ]


def _named(machine: Machine, name: str) -> Disk:
    """The one disk that a user refers to as `name`."""
    matches = [disk for disk in machine.disks if name.lower() in _names_for(disk)]
    if not matches:
        raise InvalidInput(
            f"exclude_disks: {machine.name} has no disk {name}",
            remedy=f"Its disks are {', '.join(disk.name for disk in machine.disks)}.",
        )
    if len(matches) > 1:
        raise InvalidInput(
            f"exclude_disks: {name} matches {counted(len(matches), 'disk')} of {machine.name}: "
            + ", ".join(f"{disk.name} ({names.name_of(disk.id)})" for disk in matches),
            remedy=f"Give the ARM id of the disk that is meant: {' or '.join(disk.id for disk in matches)}.",
        )
    return matches[0]


def vm_id(subscription: str, group: str, name: str) -> str:
    """The ARM id of the VM that a user refers to as `name`: a name in `group`, or an ARM id in `subscription`."""
    remedy = "Give the VM's name, or its ARM id in the subscription of the connection."
    id = names.ArmId.parsed(name)
    if id is None:
        if not re.fullmatch(r"[^/\\\s][^/\\]{0,79}", name):
            raise InvalidInput(f"{name!r} is not a valid VM name, and not an ARM id", remedy=remedy)
        return names.resource_id(subscription, group, "vm", name)
    if id.type != names.TYPES["vm"].lower():
        raise InvalidInput(f"{id} is not the ARM id of a VM", remedy=remedy)
    if not names.same(id.subscription, subscription):
        raise InvalidInput(f"{id} is not in the subscription {subscription}", remedy=remedy)
    return id


def any_machine(azure: Azure, id: str) -> Machine:
    """The VM `id` for a listing, even if it cannot be moved; VHD blobs are not read."""
    vm = azure.get(id, expand="instanceView")
    return machine(vm, *_related(azure, vm))


class _Related(NamedTuple):
    """What describes a VM besides its own document; `size` is its vCPUs and memory in MiB."""

    disks: list[Json]
    nics: list[Json]
    addresses: list[Json]
    size: tuple[int, int]


def _related(azure: Azure, vm: Json) -> _Related:
    entries = [entry for entry in _disk_entries(vm) if at(entry, "managedDisk.id")]
    disks = _existing(azure, "disk", [entry["managedDisk"]["id"] for entry in entries])
    references = [must(nic, "id") for nic in at(vm, "properties.networkProfile.networkInterfaces", [])]
    nics = {id.lower(): {"id": id} for id in references}
    # A NIC that is being replaced does not exist for a moment: only its id is known.
    nics |= {nic["id"].lower(): nic for nic in _existing(azure, "nic", references)}
    addresses = _existing(azure, "ip", [id for nic in nics.values() for id in _public_ids(nic)])
    return _Related(disks, list(nics.values()), addresses, _size_of_vm(azure, vm))


def _existing(azure: Azure, kind: str, ids: Sequence[str]) -> list[Json]:
    """The documents of the resources that exist, each with the id that it was requested by."""
    for id in ids:
        if names.kind_of(id) != kind:
            raise Unreadable(f"{id} is referred to as a {names.TYPES[kind]}")
    documents = ordered(azure.find, ids, threads=4, ahead=8)
    return [
        document if names.same(document.get("id", ""), id) else {**document, "id": id}
        for id, document in zip(ids, documents, strict=True)
        if document is not None
    ]


def _size_of_vm(azure: Azure, vm: Json) -> tuple[int, int]:
    """The vCPUs and memory in MiB of a VM, which may have fewer vCPUs than its size."""
    size = at(vm, "properties.hardwareProfile.vmSize", "")
    vcpus, memory = size_of(azure, canonical_location(must(vm, "location")), size)
    return at(vm, "properties.hardwareProfile.vmSizeProperties.vCPUsAvailable", vcpus), memory


def machine(
    vm: Json, disks: Sequence[Json], nics: Sequence[Json], addresses: Sequence[Json], size: tuple[int, int]
) -> Machine:
    """The `Machine` that these documents describe; `size` is its vCPUs and memory in MiB."""
    entries = _disk_entries(vm)
    by_id = {disk["id"].lower(): disk for disk in disks}
    ip_by_id = {address["id"].lower(): at(address, "properties.ipAddress", "") for address in addresses}

    def document(entry: Json) -> Json:
        return by_id.get(str(at(entry, "managedDisk.id") or at(entry, "vhd.uri", "")).lower(), {})

    disks_read = [_disk(lun, entry, document(entry)) for lun, entry in _by_lun(vm, entries)]
    os_disk = document(entries[0])
    generation = at(os_disk, "properties.hyperVGeneration") or at(
        vm, "properties.instanceView.hyperVGeneration", ""
    )
    security = security_type(vm, disks)
    references = at(vm, "properties.networkProfile.networkInterfaces", [])
    primary = {ref["id"].lower() for ref in references if at(ref, "properties.primary", len(references) == 1)}
    return Machine(
        id=must(vm, "id"),
        name=vm.get("name") or names.name_of(vm["id"]),
        group=names.group_of(vm["id"]),
        location=canonical_location(must(vm, "location")),
        zones=tuple(vm.get("zones") or ()),
        size=at(vm, "properties.hardwareProfile.vmSize", ""),
        vcpus=size[0],
        memory_mb=size[1],
        os_type=(entries[0].get("osType") or at(os_disk, "properties.osType", "other")).lower(),
        firmware="EFI" if generation.upper() == "V2" or security != "Standard" else "BIOS",
        secure_boot=bool(at(vm, "properties.securityProfile.uefiSettings.secureBootEnabled", default=False)),
        hostname=at(vm, "properties.osProfile.computerName")
        or at(vm, "properties.instanceView.computerName", ""),
        power_state=power_state(vm),
        disks=tuple(disks_read),
        nics=tuple(_nic(nic, ip_by_id, primary=nic["id"].lower() in primary) for nic in nics),
        security=security,
        plan=":".join(at(vm, f"plan.{part}", "") for part in ("publisher", "product", "name")).strip(":"),
        licence=licence(vm),
        caveats=(*caveats(vm, disks), *([] if size[0] else [_UNKNOWN_SIZE])),
    )


def summary(vm: Json) -> Json:
    """The entry of a VM in a listing, from the VM's own document alone."""
    return {
        "name": vm.get("name") or names.name_of(vm["id"]),
        "id": vm["id"],
        "size": at(vm, "properties.hardwareProfile.vmSize", ""),
        "os_type": at(vm, "properties.storageProfile.osDisk.osType", "other").lower(),
        "disks": len(_disk_entries(vm)),
        "zones": list(vm.get("zones") or ()),
    }


def size_of(azure: Azure, location: str, size: str) -> tuple[int, int]:
    """The vCPUs and memory in MiB of a VM size; (0, 0) if Azure no longer describes it."""
    try:
        for sku in azure.sizes(location):
            if sku.get("name", "").lower() == size.lower():
                # Constrained sizes such as Standard_E4-2s_v3 have fewer vCPUs available than vCPUs.
                vcpus = skus.capability(sku, "vCPUsAvailable") or skus.capability(sku, "vCPUs")
                return int(vcpus), round(skus.capability(sku, "MemoryGB") * 1024)
        for old in azure.retired_sizes(location):
            if old.get("name", "").lower() == size.lower():
                return old.get("numberOfCores", 0), old.get("memoryInMB", 0)
    except AzureError as error:
        if error.status not in _SIZES_UNAVAILABLE:
            raise
        LOG.warning("cannot find out the vCPUs and memory of a %s: %s", size, error)
    return 0, 0


def os_family(os_type: str) -> str:
    """The orchestrator's name for an OS type of Azure."""
    return os_type if os_type in {"linux", "windows"} else "other"


def _vm(azure: Azure, group: str, id: str) -> Json:
    try:
        return azure.get(id, expand="instanceView")
    except NotFound as error:
        if error.code == "ResourceGroupNotFound":
            remedy = "Correct the resource_group of the source environment."
        else:
            existing = sorted(vm.get("name", "?") for vm in azure.resources("vm", group))
            remedy = f"Choose one of the VMs in {group}: {', '.join(existing[:20]) or 'there are none'}."
        text = f"there is no VM {names.name_of(id)} in resource group {group}"
        raise error.reworded(text, remedy=remedy) from error


def _disk_entries(vm: Json) -> list[Json]:
    """The VM's own list of its disks, the OS disk first, without those that are being detached."""
    data = [entry for entry in at(vm, "properties.storageProfile.dataDisks", []) if not leaving(entry)]
    return [must(vm, "properties.storageProfile.osDisk"), *data]


def _by_lun(vm: Json, entries: Sequence[Json]) -> list[tuple[int | None, Json]]:
    """The entries with their LUNs: first the OS disk, which has none, then the others by LUN.

    Raises Unreadable if a LUN or a disk occurs twice.
    """
    data = sorted(((must(entry, "lun"), entry) for entry in entries[1:]), key=lambda pair: int(pair[0]))
    luns = [lun for lun, _ in data]
    used = [id.lower() for entry in entries if (id := at(entry, "managedDisk.id") or at(entry, "vhd.uri"))]
    if len(set(luns)) < len(luns) or len(set(used)) < len(used) or any(lun < 0 for lun in luns):
        raise Unreadable(f"Azure's document of {vm.get('id')} has a LUN or a disk twice, or a negative LUN")
    return [(None, entries[0]), *data]


def _disk(lun: int | None, entry: Json, disk: Json) -> Disk:
    """A disk from the VM's `entry` for it and its own document; {} if it has none."""
    properties = disk.get("properties", {})
    return Disk(
        id=disk.get("id") or at(entry, "managedDisk.id") or at(entry, "vhd.uri", ""),
        name="os" if lun is None else f"data-{lun}",
        lun=lun,
        size_bytes=_size_bytes(entry, disk),
        unique_id=_unique_id(disk),
        sku=at(disk, "sku.name", ""),
        caching=entry.get("caching", "None"),
        zones=tuple(disk.get("zones") or ()),
        shareable=int(properties.get("maxShares") or 1) > 1,
        sector_bytes=int(at(disk, "properties.creationData.logicalSectorSize") or 512),
        encryption_set=at(disk, "properties.encryption.diskEncryptionSetId", ""),
        encryption_type=at(disk, "properties.encryption.type", ""),
        bytes_per_second=at(disk, "properties.diskMBpsReadWrite", 0) * 1_000_000,
        unmanaged=bool(at(entry, "vhd.uri") and not at(entry, "managedDisk.id")),
    )


def _size_bytes(entry: Json, disk: Json) -> int:
    """The size of a disk; 0 if it cannot be known. Raises Unreadable if the document contradicts itself.

    A disk created from an image may be a MiB larger than the whole GiB that Azure reports: without a size in bytes,
    only the size of a disk that was created empty is certain.
    """
    exact, gigabytes = at(disk, "properties.diskSizeBytes", 0), at(disk, "properties.diskSizeGB", 0)
    if not exact and (uploaded := at(disk, "properties.creationData.uploadSizeBytes", 0)):
        exact = uploaded - vhd.FOOTER  # the upload was a VHD with its footer
    if (
        min(exact, gigabytes) < 0
        or exact % 512
        or (exact and gigabytes and abs(exact / _GIB - gigabytes) >= 1)
    ):
        raise Unreadable(f"{disk['id']} has an impossible size: {exact} bytes, {gigabytes} GiB")
    certain = not disk or at(disk, "properties.creationData.createOption") == "Empty"
    return int(exact or (certain and (gigabytes or entry.get("diskSizeGB") or 0) * _GIB))


def _unique_id(disk: Json) -> str:
    """An id that distinguishes a disk from an earlier one of the same name; "" if there is no disk."""
    fallback = "@".join([disk.get("id", "").lower(), at(disk, "properties.timeCreated", "")]).strip("@")
    return str(at(disk, "properties.uniqueId") or fallback)


def _nic(nic: Json, addresses: Mapping[str, str], *, primary: bool) -> Nic:
    # The network is that of the primary IP configuration, which is not always the first.
    configurations = sorted(
        at(nic, "properties.ipConfigurations", []),
        key=lambda item: not at(item, "properties.primary", default=False),
    )
    subnet = next((id for item in configurations if (id := at(item, "properties.subnet.id", ""))), "")
    public = [addresses.get(id.lower(), "") for id in _public_ids(nic)]
    return Nic(
        id=nic["id"],
        name=nic.get("name") or names.name_of(nic["id"]),
        mac=at(nic, "properties.macAddress", ""),
        network=names.network_of(subnet) if subnet else "",
        subnet_id=subnet,
        private_addresses=tuple(
            address for item in configurations if (address := at(item, "properties.privateIPAddress", ""))
        ),
        public_address=next((address for address in public if address), ""),
        primary=primary,
    )


def _public_ids(nic: Json) -> list[str]:
    configurations = at(nic, "properties.ipConfigurations", [])
    return [id for item in configurations if (id := at(item, "properties.publicIPAddress.id", ""))]
