"""Decides which VMs have a guest and configures it."""

from __future__ import annotations

import base64
import json
from typing import Any

from coriolis_azure.sandbox.guest.guests import Boot
from coriolis_azure.sandbox.network.firewalls import inbound_rules
from coriolis_azure.sandbox.network.interfaces import listening_address
from coriolis_azure.sandbox.relations import MACHINES, disk_entries, interface_entries
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import Json
from coriolis_azure.sandbox.world import World


def boot(world: World, machine: Resource) -> None:
    """Start the VM's guest, if it should have one."""
    if not machine.hidden.get("guest"):
        return
    interface = _primary_interface(world, machine)
    address = listening_address(world, interface) if interface else None
    profile = machine.properties["osProfile"]
    boot = Boot(
        machine=machine.id,
        folder=machine.properties["vmId"],
        user=profile["adminUsername"],
        keys=[key["keyData"] for key in profile["linuxConfiguration"]["ssh"]["publicKeys"]],
        address=address,
        controller=machine.properties["storageProfile"]["diskControllerType"],
        rules=inbound_rules(world, interface) if interface else [],
        cloud_config=_cloud_config(machine.hidden.get("customData")),
    )
    world.guests.prepare(boot)
    for entry in disk_entries(machine):
        disk = world.state.find(entry["managedDisk"]["id"])
        if disk is not None:
            world.guests.attach(machine.id, entry.get("lun"), world.private_content(disk))
    world.guests.start(machine.id)


def _cloud_config(custom_data: str | None) -> Json | str | None:
    """The cloud-config in customData, or a text that says why it is unreadable. Other user data is ignored."""
    if not custom_data:
        return None
    text = base64.b64decode(custom_data).decode(errors="replace")
    if not text.startswith("#cloud-config"):
        return None
    try:
        parsed: Any = json.loads(text.partition("\n")[2] or "{}")
    except ValueError:
        return "the sandbox reads a #cloud-config only if it is written as JSON (which is also YAML)"
    return parsed if isinstance(parsed, dict) else "the #cloud-config is not an object"


def _primary_interface(world: World, machine: Resource) -> Resource | None:
    entries = interface_entries(machine)
    primary = [entry for entry in entries if (entry.get("properties") or {}).get("primary")] or entries
    return world.state.find(primary[0]["id"])


def refresh_guests(world: World) -> None:
    """Update the firewall rules of the running guests."""
    for machine in world.state.of_type(MACHINES):
        interface = _primary_interface(world, machine) if world.guests.known(machine.id) else None
        if interface is not None:
            world.guests.allow(machine.id, inbound_rules(world, interface))


def boot_all(world: World) -> None:
    """Start the guests of all running VMs, when the sandbox itself starts."""
    for machine in world.state.of_type(MACHINES):
        if machine.hidden["power"] == "running" and not world.guests.known(machine.id):
            boot(world, machine)
