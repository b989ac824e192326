"""Data disks of a VM: checks, attaching, detaching."""

from __future__ import annotations

import uuid

from coriolis_azure.sandbox import catalog
from coriolis_azure.sandbox.compute.machine_parts import free_disk, implicit_disk, implicit_sku
from coriolis_azure.sandbox.relations import reference, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import Json, bad_request, invalid, not_allowed
from coriolis_azure.sandbox.world import World


def data_disks_allowed(size: catalog.Size, entries: list[Json]) -> None:
    """Refuse invalid or repeated LUNs, a repeated disk, or more disks than the size allows."""
    luns = []
    for entry in entries:
        lun = entry.get("lun")
        if not isinstance(lun, int) or not 0 <= lun <= 63:
            raise invalid(
                f"The value '{lun}' of parameter dataDisk.lun is out of range: 0 to 63.", "dataDisk.lun"
            )
        if lun in luns:
            raise invalid(f"A disk at LUN {lun} already exists.", "dataDisk.lun")
        luns.append(lun)
    ids = [
        str(reference(entry, "managedDisk")).lower() for entry in entries if reference(entry, "managedDisk")
    ]
    for repeated in {id for id in ids if ids.count(id) > 1}:
        raise invalid(f"Disk '{repeated}' is specified more than once.", "dataDisks")
    if len(luns) > size.data_disks:
        raise not_allowed(
            "The maximum number of data disks allowed to be attached to a VM of this size is "
            f"{size.data_disks}.",
            "dataDisks",
        )


def attachable(world: World, machine: Resource, size: catalog.Size, entry: Json) -> None:
    """Refuse an entry that cannot be attached."""
    option = str(entry.get("createOption") or "")
    if option == "Attach":
        free_disk(world, machine, size, reference(entry, "managedDisk"))
    elif option == "Empty":
        if not entry.get("diskSizeGB"):
            raise invalid(
                "Required parameter 'dataDisk.diskSizeGB' is missing (null).", "dataDisk.diskSizeGB"
            )
        implicit_sku(world, machine, size, str(entry.get("name") or ""), entry)
    else:
        raise bad_request(f"The sandbox does not imitate createOption '{option}' of a data disk.")


def attach(world: World, machine: Resource, entry: Json) -> None:
    """Add a checked entry to the VM and its disk to the guest."""
    disk_id = reference(entry, "managedDisk")
    disk = world.state.find(disk_id or "")
    if disk is None:
        size = catalog.SIZES[machine.properties["hardwareProfile"]["vmSize"].lower()]
        name = str(entry.get("name") or f"{machine.name}_disk{entry['lun'] + 2}_{uuid.uuid4().hex}")
        properties = {"creationData": {"createOption": "Empty"}}
        disk = implicit_disk(world, machine, size, {**entry, "name": name}, properties)
    machine.properties["storageProfile"]["dataDisks"].append(
        {
            "lun": entry["lun"],
            "name": disk.name,
            "createOption": entry["createOption"],
            "caching": entry.get("caching") or "None",
            "managedDisk": {"id": disk.id},
            "deleteOption": entry.get("deleteOption") or "Detach",
            "toBeDetached": False,
        }
    )
    if world.guests.known(machine.id):
        world.guests.attach(machine.id, entry["lun"], world.private_content(disk))


def replace_data_disks(world: World, machine: Resource, size: catalog.Size, entries: list[Json]) -> None:
    """Replace the VM's list of data disks; detach those that are not in the new one."""
    present = machine.properties["storageProfile"]["dataDisks"]
    target = [entry for entry in entries if not entry.get("toBeDetached")]
    data_disks_allowed(size, target)
    retained: list[tuple[Json, Json]] = []
    new: list[Json] = []
    for entry in target:
        old = next(
            (
                candidate
                for candidate in present
                if _same_disk(entry, candidate) and not candidate["toBeDetached"]
            ),
            None,
        )
        if old is None:
            new.append(entry)
        elif old["lun"] != entry["lun"]:
            raise invalid(f"Changing the LUN of data disk '{old['name']}' is not allowed.", "dataDisk.lun")
        else:
            retained.append((old, entry))
    for entry in new:
        attachable(world, machine, size, entry)
    remaining = [old for old, _ in retained]
    for old in [entry for entry in present if entry not in remaining]:
        detach(world, machine, old)
    for old, entry in retained:
        old.update({name: entry[name] for name in ("caching", "deleteOption") if entry.get(name)})
    for entry in new:
        attach(world, machine, entry)


def _same_disk(requested: Json, present: Json) -> bool:
    disk_id = reference(requested, "managedDisk")
    if disk_id is not None:
        return same(disk_id, reference(present, "managedDisk"))
    return same(requested.get("name"), present["name"])


def detach(world: World, machine: Resource, entry: Json) -> None:
    """Remove the disk from the guest. The VM keeps its entry until the operation ends."""
    entry["toBeDetached"] = True
    world.guests.detach(machine.id, entry["lun"])
