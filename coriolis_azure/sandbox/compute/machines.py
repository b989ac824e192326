"""Virtual machines: create, change, power, attach and detach disks, delete.

A VM made from a Linux image with an SSH key becomes a guest: a separate process that speaks real SSH (see `guest`).
Other VMs are just documents with disks. What the documents say about a guest (who may log in, where it listens, its
disks) is passed to it whenever it changes.
"""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Callable

from coriolis_azure.sandbox import catalog
from coriolis_azure.sandbox.compute import disks, exports
from coriolis_azure.sandbox.compute.boots import boot
from coriolis_azure.sandbox.compute.data_disks import (
    attach,
    attachable,
    data_disks_allowed,
    detach,
    replace_data_disks,
)
from coriolis_azure.sandbox.compute.machine_parts import (
    checked_controller,
    checked_image,
    checked_interfaces,
    checked_size,
    make_os_disk,
    set_os_profile,
)
from coriolis_azure.sandbox.relations import (
    MACHINES,
    disk_entries,
    interface_entries,
    locks_over,
    reference,
    same,
)
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response, invalid, not_allowed
from coriolis_azure.sandbox.world import (
    Call,
    Polling,
    World,
    checked_tags,
    checked_zones,
    deleted,
    no_content,
    now,
    placed,
)

_POLLED = Polling(polls=1)
_STATE_ONLY = Polling(polls=1, headers=("Azure-AsyncOperation",))
_PATH = re.compile(rf"/subscriptions/[^/]+/resourceGroups/[^/]+/providers/{MACHINES}/[^/]+/?", re.IGNORECASE)
_POWER_NAMES = {
    "running": "VM running",
    "stopped": "VM stopped",
    "deallocated": "VM deallocated",
    "starting": "VM starting",
    "stopping": "VM stopping",
    "deallocating": "VM deallocating",
}
# Outer fields and properties of a VM that are stored as requested.
_TOP_COPIED = ("plan", "identity", "extendedLocation")
_COPIED = (
    "securityProfile",
    "diagnosticsProfile",
    "additionalCapabilities",
    "licenseType",
    "priority",
    "evictionPolicy",
)

# ---------------------------------------------------------------- create and change


def put(world: World, call: Call) -> Response:
    """Create (201) or change (200) a VM."""
    machine_id = world.canonical_id(call, MACHINES)
    existing = world.state.find(machine_id)
    location = placed(world, call, MACHINES, existing)
    if existing is not None:
        return _changed(world, call, existing)
    machine = _created(world, call, machine_id, location)
    headers = _begin(world, call, machine, "machine-settled", _STATE_ONLY)
    return Response.of(201, view(world, machine), headers)


def patch(world: World, call: Call) -> Response:
    """Change a VM: 200."""
    machine = world.existing(call, MACHINES)
    world.unlocked(machine.id, "write")
    return _changed(world, call, machine)


def delete(world: World, call: Call) -> Response:
    """Delete a VM, and with it what has the deleteOption Delete: 202 or 204."""
    machine = deleted(world, call, MACHINES)
    if machine is None:
        return no_content()
    machine.properties["provisioningState"] = "Deleting"
    world.guests.forget(machine.id)
    return Response(202, _begin(world, call, machine, "machine-removed"))


def refused(world: World, request: Request) -> None:
    """Reserve the NICs of a VM that has just been refused, as Azure does for a while."""
    if request.method != "PUT" or not _PATH.fullmatch(request.path) or world.state.find(request.path):
        return
    try:
        entries = json.loads(request.body)["properties"]["networkProfile"]["networkInterfaces"]
        world.reserve([str(entry["id"]) for entry in entries], request.path)
    except (ValueError, KeyError, TypeError):
        return  # the request names no NICs


def _created(world: World, call: Call, machine_id: str, location: str) -> Resource:
    requested = call.body.get("properties") or {}
    name = call.part["name"]
    zones = checked_zones(call.body, location)
    size = checked_size(requested, location, machine_id, zones)
    document: Json = {
        "name": name,
        "id": machine_id,
        "type": MACHINES,
        "location": location,
        "tags": checked_tags(call.body),
        **{key: call.body[key] for key in _TOP_COPIED if key in call.body},
        "etag": '"1"',
        "properties": {
            "vmId": str(uuid.uuid4()),
            "hardwareProfile": {"vmSize": size.name},
            "storageProfile": {"dataDisks": []},
            "networkProfile": {
                "networkInterfaces": checked_interfaces(world, machine_id, location, requested)
            },
            **{key: copy.deepcopy(requested[key]) for key in _COPIED if key in requested},
            "provisioningState": "Creating",
            "timeCreated": now(),
        },
    }
    if zones:
        document["zones"] = zones
    machine = Resource(document, {"power": "running"})
    storage = requested.get("storageProfile") or {}
    image = checked_image(storage, size)
    set_os_profile(machine, requested, image)
    entries = storage.get("dataDisks") or []
    data_disks_allowed(size, entries)
    for entry in entries:
        attachable(world, machine, size, entry)
    machine.properties["storageProfile"]["diskControllerType"] = checked_controller(storage, size)
    # Resources are created from here on, so every refusal must come before.
    machine.properties["storageProfile"]["osDisk"] = make_os_disk(world, machine, size, storage, image)
    world.state.add(machine)
    for entry in entries:
        attach(world, machine, entry)
    boot(world, machine)
    return machine


def _changed(world: World, call: Call, machine: Resource) -> Response:
    _not_deleting(machine, "update")
    match = call.request.header("If-Match")
    if match and match not in ("*", machine.document["etag"]):
        raise ArmError(
            412,
            "PreconditionFailed",
            f"Etag provided in if-match header {match} does not match etag {machine.document['etag']} of resource.",
        )
    if not world.guests.booting(machine.id):
        for operation in world.pending(machine.id):
            world.finish(operation)
    requested = call.body.get("properties") or {}
    if "tags" in call.body:
        machine.document["tags"] = checked_tags(call.body)
    _check_immutable(machine, requested)
    size = catalog.SIZES[machine.properties["hardwareProfile"]["vmSize"].lower()]
    if (requested.get("hardwareProfile") or {}).get("vmSize"):
        size = checked_size(requested, machine.location, machine.id, machine.document.get("zones"))
        data_disks_allowed(size, machine.properties["storageProfile"]["dataDisks"])
        machine.properties["hardwareProfile"]["vmSize"] = size.name
    machine.properties.update({key: copy.deepcopy(requested[key]) for key in _COPIED if key in requested})
    if not requested:  # Azure starts no operation for a change of tags alone
        return Response.of(200, view(world, machine))
    entries = (requested.get("storageProfile") or {}).get("dataDisks")
    if entries is not None:
        replace_data_disks(world, machine, size, entries)
    machine.properties["provisioningState"] = "Updating"
    machine.document["etag"] = f'"{int(machine.document["etag"].strip(chr(34))) + 1}"'
    headers = _begin(world, call, machine, "machine-settled", _STATE_ONLY)
    return Response.of(200, view(world, machine), headers)


def _check_immutable(machine: Resource, requested: Json) -> None:
    old = machine.properties.get("osProfile") or {}
    new = requested.get("osProfile") or {}
    for name in ("adminUsername", "computerName", "customData"):
        if new.get(name) is not None and new[name] != old.get(name, machine.hidden.get(name)):
            raise ArmError(
                409,
                "PropertyChangeNotAllowed",
                f"Changing property 'osProfile.{name}' is not allowed.",
                f"osProfile.{name}",
            )
    interfaces = (requested.get("networkProfile") or {}).get("networkInterfaces")
    if interfaces is not None:
        ids = sorted(str(entry.get("id")).lower() for entry in interfaces)
        if ids != sorted(entry["id"].lower() for entry in interface_entries(machine)):
            raise not_allowed("The sandbox does not imitate adding or removing network interfaces of a VM.")


def _begin(
    world: World, call: Call, machine: Resource, effect: str, polling: Polling = _POLLED
) -> dict[str, str]:
    return world.begin(call, "compute", machine.location, effect, machine.id, polling)


def _not_deleting(machine: Resource, verb: str) -> None:
    if machine.properties["provisioningState"] == "Deleting":
        raise not_allowed(
            f"Operation '{verb}' is not allowed on VM '{machine.name}' since the VM is marked for deletion. "
            "You can only retry the Delete operation (or wait for an ongoing one to complete)."
        )


def attach_detach(world: World, call: Call) -> Response:
    """POST attachDetachDataDisks: 200 with the storage profile during the operation."""
    machine = world.existing(call, MACHINES)
    world.unlocked(machine.id, "write")
    _not_deleting(machine, "attachDetachDataDisks")
    if not world.guests.booting(machine.id):
        for operation in world.pending(machine.id):
            world.finish(operation)
    size = catalog.SIZES[machine.properties["hardwareProfile"]["vmSize"].lower()]
    present = machine.properties["storageProfile"]["dataDisks"]
    leaving = []
    for request in call.body.get("dataDisksToDetach") or []:
        attached = next(
            (old for old in present if same(reference(old, "managedDisk"), request.get("diskId"))), None
        )
        if attached is None:
            raise invalid(f"Disk '{request.get('diskId')}' is not attached to VM '{machine.name}'.", "diskId")
        leaving.append(attached)
    remaining = [old for old in present if old not in leaving]
    new: list[Json] = []
    for request in call.body.get("dataDisksToAttach") or []:
        used_luns = {entry["lun"] for entry in (*remaining, *new)}
        lun = (
            request["lun"]
            if request.get("lun") is not None
            else next(n for n in range(64) if n not in used_luns)
        )
        options = {key: request[key] for key in ("caching", "deleteOption") if request.get(key)}
        new.append(
            {"lun": lun, "createOption": "Attach", "managedDisk": {"id": request.get("diskId")}, **options}
        )
    data_disks_allowed(size, [*remaining, *new])
    for entry in new:
        attachable(world, machine, size, entry)
    for entry in leaving:
        detach(world, machine, entry)
    for entry in new:
        attach(world, machine, entry)
    machine.properties["provisioningState"] = "Updating"
    headers = _begin(world, call, machine, "machine-settled", _STATE_ONLY)
    return Response.of(200, view(world, machine)["properties"]["storageProfile"], headers)


# ---------------------------------------------------------------- power


def _power(verb: str, during: str, effect: str, *, down: bool) -> Callable[[World, Call], Response]:
    def act(world: World, call: Call) -> Response:
        machine = world.existing(call, MACHINES)
        world.unlocked(machine.id, "write")
        _not_deleting(machine, verb)
        for operation in world.pending(machine.id):
            world.finish(operation)
        if during == "starting":
            _not_exported(world, machine)
        if during == "starting" and not down and machine.hidden["power"] == "running":
            return Response(202, _begin(world, call, machine, effect))
        if down:
            world.guests.stop(machine.id)
        machine.hidden["power"] = during
        if during == "starting":
            boot(world, machine)
        return Response(202, _begin(world, call, machine, effect))

    return act


def _not_exported(world: World, machine: Resource) -> None:
    """Refuse to start a VM while one of its disks has access granted."""
    for entry in disk_entries(machine):
        disk = world.state.find(reference(entry, "managedDisk") or "")
        if disk is not None:
            exports.not_exported(world, disk, "starting the VM")


def _powered(state: str) -> Callable[[World, str], None]:
    def effect(world: World, machine_id: str) -> None:
        machine = world.state.find(machine_id)
        if machine is not None:
            machine.hidden["power"] = state

    return effect


# ---------------------------------------------------------------- how operations end


def _settled(world: World, machine_id: str) -> None:
    machine = world.state.find(machine_id)
    if machine is None:
        return
    storage = machine.properties["storageProfile"]
    storage["dataDisks"] = [entry for entry in storage["dataDisks"] if not entry["toBeDetached"]]
    if machine.properties["provisioningState"] == "Deleting":
        return
    failure = world.guests.failure(machine_id)
    interfaces = [str(entry["id"]) for entry in interface_entries(machine)]
    if not failure:
        world.free(interfaces)
    elif machine.properties["provisioningState"] == "Creating":
        world.failed_to_start(machine)
    machine.properties["provisioningState"] = "Failed" if failure else "Succeeded"
    if failure:
        raise ArmError(
            409, "OSProvisioningClientError", f"OS provisioning for VM '{machine.name}' failed: {failure}"
        )


def _removed(world: World, machine_id: str) -> None:
    machine = world.state.find(machine_id)
    if machine is None:
        return
    world.guests.forget(machine.id)
    world.state.remove(machine)
    if machine.hidden.get("never started"):
        # The OS disk of a failed VM is deleted slowly: its name stays taken for a while.
        world.reserve(
            [str(reference(machine.properties["storageProfile"]["osDisk"], "managedDisk"))], machine.id
        )
    for entry in disk_entries(machine):
        if entry.get("deleteOption") == "Delete" and "managedDisk" in entry:
            _delete_with_vm(world, entry["managedDisk"]["id"])
    for entry in interface_entries(machine):
        if (entry.get("properties") or {}).get("deleteOption") == "Delete":
            interface = world.state.find(entry["id"])
            _delete_with_vm(world, entry["id"])
            for configuration in interface.properties["ipConfigurations"] if interface else []:
                address = configuration["properties"].get("publicIPAddress") or {}
                if (address.get("properties") or {}).get("deleteOption") == "Delete":
                    _delete_with_vm(world, address["id"])


def _delete_with_vm(world: World, resource_id: str) -> None:
    resource = world.state.find(resource_id)
    if resource is not None and not locks_over(world.state, resource_id):
        world.drop(resource)


# ---------------------------------------------------------------- views


def get(world: World, call: Call) -> Response:
    """Show the VM; with `$expand=instanceView` also its status."""
    machine = world.existing(call, MACHINES)
    document = view(world, machine)
    if "instanceview" in call.query.get("$expand", "").lower():
        document["properties"]["instanceView"] = instance_view(world, machine)
    return Response.of(200, document)


def get_instance_view(world: World, call: Call) -> Response:
    """Show the VM's status."""
    return Response.of(200, instance_view(world, world.existing(call, MACHINES)))


def view(world: World, machine: Resource) -> Json:
    """The VM's document; the sizes and types of its disks are shown only while it is not deallocated, as in Azure."""
    document = copy.deepcopy(machine.document)
    deallocated = machine.hidden["power"] == "deallocated"
    storage = document["properties"]["storageProfile"]
    for entry in (storage["osDisk"], *storage["dataDisks"]):
        if "vhd" in entry:
            entry["vhd"] = {"uri": f"{world.base}/{entry['vhd']['uri']}"}
            continue
        disk = world.state.find(entry["managedDisk"]["id"])
        if disk is not None and not deallocated:
            entry["managedDisk"]["storageAccountType"] = disk.document["sku"]["name"]
            entry["diskSizeGB"] = disks.gib(world.contents.size(disk.hidden["content"]))
    return document


def instance_view(world: World, machine: Resource) -> Json:
    """Power state, provisioning state, agent and disks."""
    power = machine.hidden["power"]
    state = machine.properties["provisioningState"]
    moment = now()
    storage = machine.properties["storageProfile"]
    reference_ = storage.get("imageReference")
    image = catalog.image(*(reference_[key] for key in ("publisher", "offer", "sku"))) if reference_ else None
    os_disk = world.state.find(reference(storage["osDisk"], "managedDisk") or "")
    document: Json = {
        "hyperVGeneration": (os_disk.properties.get("hyperVGeneration") if os_disk else None) or "V1",
        "disks": [
            {
                "name": entry["name"],
                "statuses": [_status("ProvisioningState/succeeded", "Provisioning succeeded", moment)],
            }
            for entry in disk_entries(machine)
        ],
        "statuses": [
            _status(f"ProvisioningState/{state.lower()}", f"Provisioning {state.lower()}", moment),
            _status(f"PowerState/{power}", _POWER_NAMES[power]),
        ],
    }
    profile = machine.properties.get("osProfile")
    if profile and power == "running":
        document["computerName"] = profile["computerName"]
        if image is not None:
            document |= {"osName": image.os_name, "osVersion": image.os_version}
        status = _status("ProvisioningState/succeeded", "Ready", moment)
        agent = {"vmAgentVersion": "2.11.1.12", "statuses": [status | {"message": "Guest Agent is running"}]}
        document["vmAgent"] = {**agent, "extensionHandlers": []}
    return document


def _status(code: str, display: str, moment: str | None = None) -> Json:
    status = {"code": code, "level": "Info", "displayStatus": display}
    return {**status, "time": moment} if moment else status


HANDLERS = {MACHINES: {"GET": get, "PUT": put, "PATCH": patch, "DELETE": delete}}
ACTIONS = {
    "deallocate": _power("deallocate", "deallocating", "machine-deallocated", down=True),
    "powerOff": _power("powerOff", "stopping", "machine-stopped", down=True),
    "start": _power("start", "starting", "machine-started", down=False),
    "restart": _power("restart", "starting", "machine-started", down=True),
    "attachDetachDataDisks": attach_detach,
}
VIEWS = {MACHINES.lower(): view}
EFFECTS = {
    "machine-settled": _settled,
    "machine-removed": _removed,
    "machine-deallocated": _powered("deallocated"),
    "machine-stopped": _powered("stopped"),
    "machine-started": _powered("running"),
}
