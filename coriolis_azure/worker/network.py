"""The worker's network: an existing subnet or a new network, its address, and its firewall rules."""

from __future__ import annotations

from ..azure import names
from ..azure.client import Azure
from ..errors import InvalidInput
from ..model import Json, at, canonical_location, must
from ..readers import channel
from ..run.resources import Resources
from ..settings import Environment
from ..threads import ordered

_NETWORK, _SUBNET = "10.117.0.0/24", "10.117.0.0/26"
_SUBNET_TYPE = f"{names.TYPES['vnet']}/subnets".lower()


def check_network(azure: Azure, environment: Environment) -> Json | None:
    """The subnet of the settings; None if a network is created for the run.

    Raises an error if the subnet does not exist or is in another location.
    """
    if not environment.export_network:
        return None
    subnet = subnet_id(azure.subscription, environment)
    vnet_id, _, name = subnet.partition("/subnets/")
    vnet = azure.get(vnet_id)
    if canonical_location(must(vnet, "location")) != environment.location:
        raise InvalidInput(
            f"the network {names.name_of(vnet_id)} is in {vnet['location']}, not in {environment.location}",
            remedy="Choose an export_network in the location of the VMs.",
        )
    subnets: dict[str, Json] = {
        document["name"]: {"properties": {}, **document, "id": f"{vnet_id}/subnets/{document['name']}"}
        for document in at(vnet, "properties.subnets", [])
        if "name" in document
    }
    for subnet_name, document in subnets.items():
        if subnet_name.lower() == name.lower():
            return document
    raise InvalidInput(
        f"the network {names.name_of(vnet_id)} has no subnet {name}",
        remedy=f"Choose one of its subnets: {', '.join(sorted(subnets)) or 'there are none'}.",
    )


def connect(resources: Resources, environment: Environment) -> tuple[Json, str]:
    """Create the worker's NIC and what it needs; return the NIC's document, and the IP address to reach it at."""
    wanted = [("nsg", _nsg(environment))]
    if environment.export_worker_use_fip:
        wanted.append(("ip", _ip(resources.azure)))
    if not environment.export_network:
        wanted.append(("vnet", _vnet()))

    def make(part: tuple[str, Json]) -> tuple[str, Json]:
        kind, body = part
        return kind, resources.create(kind, kind, body)

    made = dict(ordered(make, wanted, threads=3, ahead=3))
    configuration: Json = {
        "subnet": {"id": _subnet(resources, environment)},
        "privateIPAllocationMethod": "Dynamic",
    }
    if environment.export_worker_use_fip:
        configuration["publicIPAddress"] = {"id": resources.id("ip", "ip")}
    nic = resources.create(
        "nic",
        "nic",
        {
            "properties": {
                "ipConfigurations": [{"name": "worker", "properties": configuration}],
                "networkSecurityGroup": {"id": resources.id("nsg", "nsg")},
            }
        },
    )
    if "ip" in made:
        return nic, str(must(made["ip"], "properties.ipAddress"))
    configurations = must(nic, "properties.ipConfigurations")
    return nic, str(must(configurations[0], "properties.privateIPAddress"))


def _subnet(resources: Resources, environment: Environment) -> str:
    """The ARM id of the worker's subnet."""
    if not environment.export_network:
        return resources.id("vnet", "vnet") + "/subnets/worker"
    return subnet_id(resources.run.subscription, environment)


def subnet_id(subscription: str, environment: Environment) -> str:
    """The ARM id of the subnet that the settings name."""
    setting = environment.export_network
    id = names.ArmId.parsed(setting)
    if id is not None:
        return _own_subnet(subscription, id)
    match setting.split("/"):
        case [network, subnet] if network and subnet:
            vnet = names.resource_id(subscription, environment.resource_group, "vnet", network)
            return f"{vnet}/subnets/{subnet}"
    raise InvalidInput(
        f"export_network {setting!r} does not name a subnet",
        remedy="Write it as vnet/subnet, or as the ARM id of a subnet.",
    )


def _own_subnet(subscription: str, id: names.ArmId) -> str:
    """`id`, if it is a subnet in this subscription: Azure connects VMs only to networks of the same subscription."""
    if id.type != _SUBNET_TYPE:
        raise InvalidInput(
            f"export_network {id} is not the ARM id of a subnet",
            remedy="Write it as vnet/subnet, or as the complete ARM id of a subnet.",
        )
    if not names.same(id.subscription, subscription):
        raise InvalidInput(
            f"export_network is in subscription {id.subscription}, the VMs are in {subscription}: Azure connects a VM "
            "only to networks of its own subscription",
            remedy="Choose a subnet in the subscription of the VMs; its network may be peered with the other one.",
        )
    return id


def _nsg(environment: Environment) -> Json:
    rule = {
        "access": "Allow",
        "direction": "Inbound",
        "sourcePortRange": "*",
        "destinationAddressPrefix": "*",
    }
    allowed = environment.export_worker_allowed_addresses
    source: Json = (
        {"sourceAddressPrefix": allowed[0]} if len(allowed) == 1 else {"sourceAddressPrefixes": list(allowed)}
    )
    ssh_only = {
        **rule,
        **source,
        "protocol": "Tcp",
        "priority": 100,
        "destinationPortRange": str(environment.export_worker_ssh_port),
    }
    rules = [{"name": "ssh", "properties": ssh_only}]
    first = environment.export_worker_data_port
    if first:
        ports = {"priority": 110, "destinationPortRange": f"{first}-{first + channel.PORTS - 1}"}
        rules.append({"name": "data", "properties": {**ssh_only, **ports}})
    # Azure's default rules would admit the whole virtual network.
    nothing_else = {
        **rule,
        "access": "Deny",
        "protocol": "*",
        "priority": 4096,
        "sourceAddressPrefix": "*",
        "destinationPortRange": "*",
    }
    rules.append({"name": "nothing-else", "properties": nothing_else})
    return {"properties": {"securityRules": rules}}


def _ip(azure: Azure) -> Json:
    properties = {"publicIPAllocationMethod": "Static"}
    return {"sku": {"name": "Standard" if azure.is_modern else "Basic"}, "properties": properties}


def network(resources: Resources) -> str:
    """Create a network for several workers; return the ARM id of its subnet."""
    resources.create("vnet", "vnet", _vnet())
    return resources.id("vnet", "vnet") + "/subnets/worker"


def _vnet() -> Json:
    return {
        "properties": {
            "addressSpace": {"addressPrefixes": [_NETWORK]},
            "subnets": [{"name": "worker", "properties": {"addressPrefix": _SUBNET}}],
        }
    }
