"""What a subscription has to offer: machines, networks, disk types, and the values that settings may take.

For people who are still choosing: the settings may be incomplete here, and what is missing narrows nothing.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..azure import names
from ..azure.client import Azure
from ..errors import Denied
from ..events import amount
from ..machine import inspection
from ..machine.listing import machines
from ..model import Json, Machine, at, canonical_location
from ..threads import ordered
from ..worker import images, sizes

LOG = logging.getLogger(__name__)


_ACCOUNTS = "Microsoft.Storage/storageAccounts"
# As other plugins of the orchestrator call them; MB and GB are MiB and GiB there.
COLUMNS = (
    *("VM ID", "VM Name", "Guest OS", "Firmware Type", "Num CPUs", "Memory (MB)", "Total Disk Size (GB)"),
    *("Disks", "NIC Count", "NICs", "Resource Group", "Location", "Power State", "VM Size"),
)


def page(
    vms: list[Json], *, after: str | None = None, limit: int | None = None, pattern: str | None = None
) -> list[Json]:
    """At most `limit` of the machines after the one with the id `after`, whose name has `pattern` in it.

    A pattern with * or ? must match the whole name. An `after` that is gone begins where it would have stood.
    """
    wanted = (pattern or "").lower()
    glob = any(letter in wanted for letter in "*?")
    found = [
        vm
        for vm in vms
        if (fnmatchcase(str(vm["name"]).lower(), wanted) if glob else wanted in str(vm["name"]).lower())
        and (after is None or str(vm["id"]).lower() > after.lower())
    ]
    return found[:limit] if limit else found


def instances(azure: Azure, vms: Iterable[Json], everyone: Iterable[Json]) -> list[Json]:
    """The machines as the orchestrator's vm_instance_info.

    `instance_name` is what a user calls it by: its name where that is unique among `everyone`, else its id.
    """
    taken: dict[str, int] = {}
    for vm in everyone:
        taken[str(vm["name"]).lower()] = taken.get(str(vm["name"]).lower(), 0) + 1
    found = []
    for vm in vms:
        told = inspection.summary(vm)
        vcpus, memory = inspection.size_of(azure, canonical_location(vm["location"]), told["size"])
        found.append(
            {
                "id": told["id"],
                "name": told["name"],
                "instance_name": told["name"] if taken[told["name"].lower()] == 1 else told["id"],
                "num_cpu": vcpus,
                "memory_mb": memory,
                "os_type": inspection.os_family(told["os_type"]),
                "flavor_name": told["size"],
            }
        )
    return found


def networks(azure: Azure, settings: Mapping[str, Any]) -> list[Json]:
    """All subnets as vm_network: id is the subnet's ARM id, name is vnet/subnet."""
    group, location = settings.get("resource_group"), settings.get("location")
    vnets = azure.resources("vnet", group) if group else azure.everywhere("vnet")
    found = [
        {"id": subnet["id"], "name": names.network_of(subnet["id"])}
        for vnet in vnets
        if not location or canonical_location(vnet["location"]) == canonical_location(location)
        for subnet in vnet["properties"].get("subnets", [])
        if "id" in subnet
    ]
    return sorted(found, key=lambda network: network["name"])


def disk_types(azure: Azure, settings: Mapping[str, Any]) -> list[str]:
    """The SKUs of the disks there are."""
    group = settings.get("resource_group")
    disks = azure.resources("disk", group) if group else azure.everywhere("disk")
    return sorted({name for disk in disks if (name := at(disk, "sku.name"))})


def options(
    azure: Azure,
    settings: Mapping[str, Any],
    wanted: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[Json]:
    """The values that settings may take, as source_options; all that are known when none is named.

    What depends on a location or a resource group is told once that is chosen; what the identity may not list is left
    out. Of `defaults`, what is taken where
    a setting is left out is told with it.
    """
    location, group = settings.get("location"), settings.get("resource_group")
    tellers: dict[str, Callable[[], list[Any]]] = {
        "location": azure.locations,
        "resource_group": lambda: sorted(found["name"] for found in azure.groups()),
    }
    if location:
        tellers["export_worker_size"] = lambda: sizes.sizes(azure, canonical_location(location))
        tellers["export_worker_image"] = lambda: [
            {"id": str(image), "name": str(image)}
            for image in images.images(azure, canonical_location(location))
        ]
    if group:
        tellers["export_network"] = lambda: networks(azure, settings)
        tellers["storage_account_name"] = lambda: sorted(
            names.name_of(found["id"])
            for found in azure.storage_accounts()
            if names.group_of(found["id"]).lower() == str(group).lower()
        )
    account = settings.get("storage_account_name")
    if group and account:
        id = f"/subscriptions/{azure.subscription}/resourceGroups/{group}/providers/{_ACCOUNTS}/{account}"
        tellers["storage_container_name"] = lambda: sorted(found["name"] for found in azure.containers(id))
    asked = set(wanted or tellers)
    told = []
    for name, values in tellers.items():
        if name in asked:
            try:
                option: Json = {"name": name, "values": values()}
            except Denied as error:
                LOG.info("the values of %s are not told: %s", name, error)
                continue
            if defaults and name in defaults:
                option["config_default"] = defaults[name]
            told.append(option)
    return told


def inventory(azure: Azure, settings: Mapping[str, Any]) -> str:
    """A table of the machines as CSV: a header, one line a machine, sorted by id."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    vms = machines(azure, settings)
    for row in ordered(lambda vm: _row(inspection.any_machine(azure, vm["id"])), vms, threads=4, ahead=8):
        table.writerow(row)
    return text.getvalue()


def _row(machine: Machine) -> list[Any]:
    disks = "; ".join(f"{disk.name} {amount(disk.size_bytes)} {disk.sku}" for disk in machine.disks)
    nics = "; ".join(
        f"{nic.network} {nic.mac} {' '.join(nic.private_addresses)} {nic.public_address}".strip()
        for nic in machine.nics
    )
    return [
        *(machine.id, machine.name, machine.os_type, machine.firmware, machine.vcpus, machine.memory_mb),
        *(f"{sum(disk.size_bytes for disk in machine.disks) / 2**30:g}", disks, len(machine.nics), nics),
        *(machine.group, machine.location, machine.power_state, machine.size),
    ]
