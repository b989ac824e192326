"""Queries about the references between resources, answered from the documents themselves."""

from __future__ import annotations

from collections.abc import Iterator

from coriolis_azure.sandbox.state import Resource, State
from coriolis_azure.sandbox.wire import Json

MACHINES = "Microsoft.Compute/virtualMachines"
DISKS = "Microsoft.Compute/disks"
SNAPSHOTS = "Microsoft.Compute/snapshots"
DISK_ACCESSES = "Microsoft.Compute/diskAccesses"
COLLECTIONS = "Microsoft.Compute/restorePointCollections"
POINTS = f"{COLLECTIONS}/restorePoints"
DISK_POINTS = f"{POINTS}/diskRestorePoints"
INTERFACES = "Microsoft.Network/networkInterfaces"
ADDRESSES = "Microsoft.Network/publicIPAddresses"
NETWORKS = "Microsoft.Network/virtualNetworks"
FIREWALLS = "Microsoft.Network/networkSecurityGroups"
STORAGE = "Microsoft.Storage/storageAccounts"
LOCKS = "Microsoft.Authorization/locks"
GROUPS = "Microsoft.Resources/resourceGroups"


def same(one: str | None, other: str | None) -> bool:
    """Whether two ids or names are equal; Azure ignores case."""
    return one is not None and other is not None and one.lower() == other.lower()


def reference(holder: Json, name: str) -> str | None:
    """The id in `holder[name]`, a reference {"id": ...}; None if there is none."""
    value = holder.get(name) or {}
    return value.get("id")


def disk_entries(machine: Resource) -> list[Json]:
    """The VM's disk entries: the OS disk's, then the data disks'."""
    storage = machine.properties["storageProfile"]
    return [storage["osDisk"], *storage["dataDisks"]]


def machine_of_disk(state: State, disk_id: str) -> Resource | None:
    """The VM that has this disk attached."""
    for machine in state.of_type(MACHINES):
        if any(same(reference(entry, "managedDisk"), disk_id) for entry in disk_entries(machine)):
            return machine
    return None


def interface_entries(machine: Resource) -> list[Json]:
    """The VM's references to its NICs."""
    entries: list[Json] = machine.properties["networkProfile"]["networkInterfaces"]
    return entries


def machine_of_interface(state: State, interface_id: str) -> Resource | None:
    """The VM that uses this NIC."""
    for machine in state.of_type(MACHINES):
        if any(same(entry["id"], interface_id) for entry in interface_entries(machine)):
            return machine
    return None


def configurations(state: State) -> Iterator[tuple[Resource, Json]]:
    """Every IP configuration, with its NIC."""
    for interface in state.of_type(INTERFACES):
        for configuration in interface.properties["ipConfigurations"]:
            yield interface, configuration


def configuration_of_address(state: State, address_id: str) -> Json | None:
    """The IP configuration that has this public address."""
    for _, configuration in configurations(state):
        if same(reference(configuration["properties"], "publicIPAddress"), address_id):
            return configuration
    return None


def configurations_in_subnet(state: State, subnet_id: str) -> list[Json]:
    """The IP configurations in this subnet."""
    return [
        configuration
        for _, configuration in configurations(state)
        if same(reference(configuration["properties"], "subnet"), subnet_id)
    ]


def subnets(state: State) -> Iterator[Json]:
    """Every subnet of every network."""
    for network in state.of_type(NETWORKS):
        yield from network.properties["subnets"]


def subnet(state: State, subnet_id: str | None) -> Json | None:
    """The subnet with this id."""
    return next((candidate for candidate in subnets(state) if same(candidate["id"], subnet_id)), None)


def users_of_firewall(state: State, firewall_id: str) -> tuple[list[str], list[str]]:
    """The ids of the NICs, and of the subnets, that use this NSG."""
    interface_ids = [
        interface.id
        for interface in state.of_type(INTERFACES)
        if same(reference(interface.properties, "networkSecurityGroup"), firewall_id)
    ]
    subnet_ids = [
        str(document["id"])
        for document in subnets(state)
        if same(reference(document["properties"], "networkSecurityGroup"), firewall_id)
    ]
    return interface_ids, subnet_ids


def locks_over(state: State, resource_id: str) -> list[Resource]:
    """The locks on this resource or on a scope that contains it."""
    path = resource_id.lower() + "/"
    return [lock for lock in state.of_type(LOCKS) if path.startswith(str(lock.hidden["scope"]).lower() + "/")]


def primary_configuration(interface: Resource) -> Json:
    """The `properties` of the NIC's primary IP configuration."""
    candidates = [configuration["properties"] for configuration in interface.properties["ipConfigurations"]]
    primary: Json = next((candidate for candidate in candidates if candidate["primary"]), candidates[0])
    return primary
