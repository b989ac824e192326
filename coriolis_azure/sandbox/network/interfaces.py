"""Network interfaces and public addresses.

Addresses must be reachable on this machine, so:
 - a public address is a random loopback address (127.x.y.z), so that concurrent sandboxes do not collide;
 - in a subnet inside 127.0.0.0/8, private addresses are random too; in other subnets they count up from .4.
"""

from __future__ import annotations

import copy
import ipaddress
import itertools
import random

from coriolis_azure.sandbox.network.common import (
    accepted,
    begin_put,
    deleting,
    etag,
    given_properties,
    keep,
    patch,
    reference_missing,
    referenced,
)
from coriolis_azure.sandbox.relations import (
    ADDRESSES,
    FIREWALLS,
    INTERFACES,
    configuration_of_address,
    configurations,
    machine_of_interface,
    primary_configuration,
    reference,
    same,
    subnet,
)
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, World, checked_zones, deleted, no_content

LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


def put_address(world: World, call: Call) -> Response:
    """Create or update a Standard, static public address."""
    address_id, location, existing = begin_put(world, call, ADDRESSES)
    requested = given_properties(call)
    sku = (call.body.get("sku") or {}).get("name", "Basic")
    if sku != "Standard":
        raise ArmError(
            400,
            "IPv4BasicSkuPublicIpCountLimitReached",
            "Cannot create more than 0 IPv4 Basic SKU public IP addresses for this subscription in this "
            "region.",
        )
    method = requested.get("publicIPAllocationMethod", "Dynamic")
    if method != "Static":
        raise ArmError(
            400,
            "PublicIPAndLBSkuDoNotMatch"
            if method not in {"Dynamic"}
            else "StandardSkuPublicIPAddressNotStatic",
            f"Standard sku publicIp {address_id} must have AllocationMethod set to Static.",
        )
    zones = checked_zones(call.body, location)
    address = existing.properties["ipAddress"] if existing else _free_loopback(world)
    properties = {
        "ipAddress": address,
        "publicIPAddressVersion": requested.get("publicIPAddressVersion", "IPv4"),
        "publicIPAllocationMethod": "Static",
        "idleTimeoutInMinutes": requested.get("idleTimeoutInMinutes", 4),
        "ipTags": [],
        "ddosSettings": {"protectionMode": "VirtualNetworkInherited"},
    }
    top: Json = {"sku": {"name": "Standard", "tier": "Regional"}}
    if zones:
        top["zones"] = zones
    resource = keep(world, call, ADDRESSES, address_id, location, properties, **top)
    return accepted(world, call, resource, existed=existing is not None)


def delete_address(world: World, call: Call) -> Response:
    """Delete a public address: 202 or 204; 400 while a NIC uses it."""
    address = deleted(world, call, ADDRESSES)
    if address is None:
        return no_content()
    holder = configuration_of_address(world.state, address.id)
    if holder is not None:
        raise ArmError(
            400,
            "PublicIPAddressCannotBeDeleted",
            f"Public IP address {address.id} can not be deleted since it is still allocated to resource "
            f"{holder['id']}. In order to delete the public IP, disassociate/detach the Public IP address "
            "from the resource.  To learn how to do this, see aka.ms/deletepublicip.",
        )
    return deleting(world, call, address)


def view_address(world: World, address: Resource) -> Json:
    """The address with the IP configuration that uses it."""
    document = copy.deepcopy(address.document)
    holder = configuration_of_address(world.state, address.id)
    if holder is not None:
        document["properties"]["ipConfiguration"] = {"id": holder["id"]}
    return document


def _free_loopback(world: World) -> str:
    used = {address.properties["ipAddress"] for address in world.state.of_type(ADDRESSES)}
    while True:
        # 127.64.0.0/10 is reserved for clients' own subnets, 127.0.0.0/16 for this machine's services.
        candidate = f"127.{random.randint(1, 63)}.{random.randint(0, 255)}.{random.randint(1, 254)}"  # noqa: S311
        if candidate not in used:
            return candidate


def put_interface(world: World, call: Call) -> Response:
    """Create or update a NIC. It exists at once, but as in Azure the answer has an operation."""
    interface_id, location, existing = begin_put(world, call, INTERFACES)
    requested = given_properties(call)
    entries = requested.get("ipConfigurations") or []
    if not entries:
        raise ArmError(
            400,
            "NetworkInterfaceMustHaveAtLeastOneIpConfiguration",
            f"Network interface {interface_id} must have at least one ip configuration.",
        )
    properties: Json = {
        "ipConfigurations": [
            _configuration(world, interface_id, entry, location, index) for index, entry in enumerate(entries)
        ],
        "dnsSettings": {"dnsServers": [], "appliedDnsServers": []},
        "enableAcceleratedNetworking": bool(requested.get("enableAcceleratedNetworking", False)),
        "enableIPForwarding": bool(requested.get("enableIPForwarding", False)),
        "hostedWorkloads": [],
        "tapConfigurations": [],
        "nicType": "Standard",
    }
    firewall = reference(requested, "networkSecurityGroup")
    if firewall:
        group = referenced(world, firewall, FIREWALLS, interface_id, location)
        properties["networkSecurityGroup"] = {"id": group.id}
    interface = keep(world, call, INTERFACES, interface_id, location, properties, kind="Regular")
    interface.hidden.setdefault("mac", _mac())
    interface.properties["provisioningState"] = "Succeeded"
    return accepted(world, call, interface, existed=existing is not None)


def delete_interface(world: World, call: Call) -> Response:
    """Delete a NIC: 202 or 204; 400 while a VM uses it or it is reserved for one."""
    interface = deleted(world, call, INTERFACES)
    if interface is None:
        return no_content()
    user = machine_of_interface(world.state, interface.id)
    if user is not None:
        raise nic_in_use(interface, user)
    world.not_reserved(interface.id)
    return deleting(world, call, interface)


def nic_in_use(interface: Resource, user: Resource) -> ArmError:
    """400 NicInUse."""
    return ArmError(
        400,
        "NicInUse",
        f"Network Interface {interface.id} is used by existing resource {user.id}. In order to delete the "
        "network interface, it must be dissociated from the resource. To learn more, see aka.ms/deletenic.",
    )


def view_interface(world: World, interface: Resource) -> Json:
    """The NIC with its VM. The MAC is shown once a VM has used the NIC."""
    document = copy.deepcopy(interface.document)
    user = machine_of_interface(world.state, interface.id)
    if user is not None:
        document["properties"]["virtualMachine"] = {"id": user.id}
        document["properties"]["primary"] = True
        interface.hidden["allocated"] = True
    if interface.hidden.get("allocated"):
        document["properties"]["macAddress"] = interface.hidden["mac"]
    return document


def _configuration(world: World, interface_id: str, requested: Json, location: str, index: int) -> Json:
    name = str(requested.get("name") or "")
    properties = requested.get("properties") or {}
    if not name:
        raise ArmError(
            400, "InvalidRequestFormat", "Cannot parse the request: an ipConfiguration has no name."
        )
    configuration_id = f"{interface_id}/ipConfigurations/{name}"
    subnet_id = reference(properties, "subnet")
    found_subnet = subnet(world.state, subnet_id)
    if found_subnet is None:
        raise reference_missing(subnet_id or "(none)", configuration_id)
    network = world.state.find(str(found_subnet["id"]).rpartition("/subnets/")[0])
    if network is None or not same(network.location, location):
        raise reference_missing(str(found_subnet["id"]), interface_id)
    built: Json = {
        "provisioningState": "Succeeded",
        "privateIPAddress": _private_address(world, interface_id, name, properties, found_subnet),
        "privateIPAllocationMethod": properties.get("privateIPAllocationMethod", "Dynamic"),
        "subnet": {"id": found_subnet["id"]},
        "primary": bool(properties.get("primary", index == 0)),
        "privateIPAddressVersion": "IPv4",
    }
    address_id = reference(properties, "publicIPAddress")
    if address_id:
        address = referenced(world, address_id, ADDRESSES, configuration_id, location)
        holder = configuration_of_address(world.state, address.id)
        if holder is not None and not same(holder["id"], configuration_id):
            raise ArmError(
                400,
                "PublicIPAddressInUse",
                f"Resource {configuration_id} is referencing public IP address {address.id} that is already "
                f"allocated to resource {holder['id']}.",
            )
        built["publicIPAddress"] = {"id": address.id}
        option = ((properties.get("publicIPAddress") or {}).get("properties") or {}).get("deleteOption")
        if option:
            built["publicIPAddress"]["properties"] = {"deleteOption": option}
    return {
        "name": name,
        "id": configuration_id,
        "etag": etag(),
        "type": f"{INTERFACES}/ipConfigurations",
        "properties": built,
    }


def _private_address(world: World, interface_id: str, name: str, requested: Json, in_subnet: Json) -> str:
    prefix = ipaddress.IPv4Network(in_subnet["properties"]["addressPrefix"])
    holders = {}
    for interface, configuration in configurations(world.state):
        holders[str(configuration["properties"]["privateIPAddress"])] = configuration["id"]
        if same(interface.id, interface_id) and same(configuration["name"], name):
            present = configuration["properties"]
            if same(reference(present, "subnet"), in_subnet["id"]) and not requested.get("privateIPAddress"):
                return str(present["privateIPAddress"])
    address = requested.get("privateIPAddress")
    if address and requested.get("privateIPAllocationMethod") == "Static":
        holder = holders.get(str(address))
        if holder is not None and not same(holder, f"{interface_id}/ipConfigurations/{name}"):
            raise ArmError(
                400,
                "PrivateIPAddressInUse",
                f"IP configuration {interface_id}/ipConfigurations/{name} is using the private IP address "
                f"{address} which is already allocated to resource {holder}.",
            )
        if ipaddress.IPv4Address(address) not in prefix:
            raise ArmError(
                400,
                "PrivateIPAddressNotInSubnet",
                f"Private static IP address {address} does not belong to the range of subnet prefix {prefix}.",
            )
        return str(address)
    return _free_in(prefix, set(holders))


def _free_in(prefix: ipaddress.IPv4Network, used: set[str]) -> str:
    last = prefix.num_addresses - 2  # Azure reserves the first four addresses and the last one
    offsets = range(4, min(last + 1, 70000))
    first = random.randrange(len(offsets)) if prefix.subnet_of(LOOPBACK) and offsets else 0  # noqa: S311
    for offset in itertools.chain(offsets[first:], offsets[:first]):
        candidate = str(prefix.network_address + offset)
        if candidate not in used:
            return candidate
    raise ArmError(400, "SubnetIsFull", f"Subnet with address prefix {prefix} does not have enough capacity.")


def _mac() -> str:
    return "00-0D-3A-" + "-".join(f"{random.randint(0, 255):02X}" for _ in range(3))  # noqa: S311


def listening_address(world: World, interface: Resource) -> str | None:
    """The address of this NIC's VM that is reachable on this machine; None if there is none."""
    primary = primary_configuration(interface)
    address_id = reference(primary, "publicIPAddress")
    if address_id:
        address = world.state.find(address_id)
        return str(address.properties["ipAddress"]) if address else None
    private = str(primary["privateIPAddress"])
    return private if ipaddress.IPv4Address(private) in LOOPBACK else None


HANDLERS = {
    ADDRESSES: {"PUT": put_address, "PATCH": patch(ADDRESSES), "DELETE": delete_address},
    INTERFACES: {"PUT": put_interface, "PATCH": patch(INTERFACES), "DELETE": delete_interface},
}
VIEWS = {ADDRESSES.lower(): view_address, INTERFACES.lower(): view_interface}
