"""What a subscription offers: machines, networks, disk types, and the possible values of settings.

These functions serve users who are still choosing, so settings may be incomplete; a missing one filters nothing.
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
from ..settings import MECHANISMS, WORKER
from ..threads import ordered
from ..worker import images, sizes

LOG = logging.getLogger(__name__)


_ACCOUNTS = "Microsoft.Storage/storageAccounts"
# Named as in other plugins of the orchestrator, where MB and GB mean MiB and GiB.
COLUMNS = (
    *("VM ID", "VM Name", "Guest OS", "Firmware Type", "Num CPUs", "Memory (MB)", "Total Disk Size (GB)"),
    *("Disks", "NIC Count", "NICs", "Resource Group", "Location", "Power State", "VM Size"),
)


def page(
    vms: list[Json], *, after: str | None = None, limit: int | None = None, pattern: str | None = None
) -> list[Json]:
    """At most `limit` machines after the id `after` whose names contain `pattern`.

    A pattern with * or ? must match the whole name. If the machine `after` is gone, the page starts where it would
    have been.
    """
    wanted = (pattern or "").lower()
    glob = any(letter in wanted for letter in "*?")
    matching = [
        vm
        for vm in vms
        if (fnmatchcase(str(vm["name"]).lower(), wanted) if glob else wanted in str(vm["name"]).lower())
        and (after is None or str(vm["id"]).lower() > after.lower())
    ]
    return matching[:limit] if limit else matching


def instances(azure: Azure, vms: Iterable[Json], everyone: Iterable[Json]) -> list[Json]:
    """The machines as the orchestrator's vm_instance_info.

    `instance_name`, by which users refer to a machine, is its name if that is unique in `everyone`, else its id.
    """
    uses: dict[str, int] = {}
    for vm in everyone:
        uses[str(vm["name"]).lower()] = uses.get(str(vm["name"]).lower(), 0) + 1
    infos = []
    for vm in vms:
        summary = inspection.summary(vm)
        vcpus, memory = inspection.size_of(azure, canonical_location(vm["location"]), summary["size"])
        infos.append(
            {
                "id": summary["id"],
                "name": summary["name"],
                "instance_name": summary["name"] if uses[summary["name"].lower()] == 1 else summary["id"],
                "num_cpu": vcpus,
                "memory_mb": memory,
                "os_type": inspection.os_family(summary["os_type"]),
                "flavor_name": summary["size"],
            }
        )
    return infos


def networks(azure: Azure, settings: Mapping[str, Any]) -> list[Json]:
    """All subnets as vm_network: the id is the subnet's ARM id, the name is vnet/subnet."""
    group, location = settings.get("resource_group"), settings.get("location")
    vnets = azure.resources("vnet", group) if group else azure.everywhere("vnet")
    subnets = [
        {"id": subnet["id"], "name": names.network_of(subnet["id"])}
        for vnet in vnets
        if not location or canonical_location(vnet["location"]) == canonical_location(location)
        for subnet in vnet["properties"].get("subnets", [])
        if "id" in subnet
    ]
    return sorted(subnets, key=lambda subnet: subnet["name"])


def disk_types(azure: Azure, settings: Mapping[str, Any]) -> list[str]:
    """The SKUs of all existing disks."""
    group = settings.get("resource_group")
    disks = azure.resources("disk", group) if group else azure.everywhere("disk")
    return sorted({name for disk in disks if (name := at(disk, "sku.name"))})


def options(
    azure: Azure,
    settings: Mapping[str, Any],
    wanted: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[Json]:
    """The possible values of the settings `wanted`, or of all settings, as source_options.

    Values that depend on a location or a resource group appear once that is chosen; values that the identity may not
    list are left out. A setting in `defaults` has its default with its values.
    """
    location, group = settings.get("location"), settings.get("resource_group")
    listings: dict[str, Callable[[], list[Any]]] = {
        "location": azure.locations,
        "resource_group": lambda: sorted(document["name"] for document in azure.groups()),
        # An Azure Stack Hub has no signed URLs for snapshots.
        "replica_export_mechanism": lambda: list(MECHANISMS if azure.is_modern else [WORKER]),
    }
    if location:
        listings["export_worker_size"] = lambda: sizes.sizes(azure, canonical_location(location))
        listings["export_worker_image"] = lambda: [
            {"id": str(image), "name": str(image)}
            for image in images.images(azure, canonical_location(location))
        ]
    if group:
        listings["export_network"] = lambda: networks(azure, settings)
        listings["storage_account_name"] = lambda: sorted(
            names.name_of(document["id"])
            for document in azure.storage_accounts()
            if names.group_of(document["id"]).lower() == str(group).lower()
        )
    account = settings.get("storage_account_name")
    if group and account:
        id = f"/subscriptions/{azure.subscription}/resourceGroups/{group}/providers/{_ACCOUNTS}/{account}"
        listings["storage_container_name"] = lambda: sorted(
            document["name"] for document in azure.containers(id)
        )
    selected = set(wanted or listings)
    listed = []
    for name, values in listings.items():
        if name in selected:
            try:
                option: Json = {"name": name, "values": values()}
            except Denied as error:
                LOG.info("the values of %s are left out: %s", name, error)
                continue
            if defaults and name in defaults:
                option["config_default"] = defaults[name]
            listed.append(option)
    return listed


def inventory(azure: Azure, settings: Mapping[str, Any]) -> str:
    """A table of the machines as CSV: a header, then one line per machine, sorted by id."""
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
