"""Virtual networks and their subnets, which are part of the network's document."""

from __future__ import annotations

import copy
import ipaddress

from coriolis_azure.sandbox.network.common import (
    STATE_ONLY,
    accepted,
    begin_put,
    capitalised,
    deleting,
    etag,
    given_properties,
    keep,
    patch,
    referenced,
)
from coriolis_azure.sandbox.relations import FIREWALLS, NETWORKS, configurations_in_subnet, reference, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, World, deleted, no_content

_SUBNETS = f"{NETWORKS}/subnets"


def put_network(world: World, call: Call) -> Response:
    """Create or replace a virtual network with its subnets."""
    network_id, location, existing = begin_put(world, call, NETWORKS)
    requested = given_properties(call)
    prefixes = _prefixes((requested.get("addressSpace") or {}).get("addressPrefixes"), "addressSpace")
    subnets = [
        _subnet(world, network_id, str(subnet.get("name") or ""), subnet.get("properties") or {}, prefixes)
        for subnet in requested.get("subnets") or []
    ]
    _check_disjoint(subnets)
    retained = {subnet["id"].lower() for subnet in subnets}
    for old in existing.properties["subnets"] if existing else []:
        if old["id"].lower() not in retained:
            _check_unused(world, old)
    properties = {
        "addressSpace": {"addressPrefixes": [str(prefix) for prefix in prefixes]},
        "subnets": subnets,
        "virtualNetworkPeerings": [],
        "enableDdosProtection": False,
    }
    network = keep(world, call, NETWORKS, network_id, location, properties)
    return accepted(world, call, network, existed=existing is not None)


def delete_network(world: World, call: Call) -> Response:
    """Delete a network: 202 or 204; 400 while a subnet is in use."""
    network = deleted(world, call, NETWORKS)
    if network is None:
        return no_content()
    for subnet in network.properties["subnets"]:
        _check_unused(world, subnet)
    return deleting(world, call, network)


def put_subnet(world: World, call: Call) -> Response:
    """Create or change one subnet."""
    network, name = _network_of(world, call)
    prefixes = [ipaddress.IPv4Network(text) for text in network.properties["addressSpace"]["addressPrefixes"]]
    subnet = _subnet(world, network.id, name, given_properties(call), prefixes)
    others = [other for other in network.properties["subnets"] if not same(other["name"], name)]
    existed = len(others) < len(network.properties["subnets"])
    _check_disjoint([*others, subnet])
    network.properties["subnets"] = [*others, subnet]
    headers = world.begin(call, "network", network.location, "network-settled", network.id, STATE_ONLY)
    return Response.of(200 if existed else 201, _view_subnet(world, subnet), headers)


def get_subnet(world: World, call: Call) -> Response:
    """Show one subnet; 404 if there is none."""
    network, name = _network_of(world, call)
    subnet = next(
        (candidate for candidate in network.properties["subnets"] if same(candidate["name"], name)), None
    )
    if subnet is None:
        raise ArmError(404, "NotFound", f"Resource {network.id}/subnets/{name} not found.")
    return Response.of(200, _view_subnet(world, subnet))


def list_subnets(world: World, call: Call) -> Response:
    """The subnets of a network."""
    network, _ = _network_of(world, call)
    return Response.of(
        200, {"value": [_view_subnet(world, subnet) for subnet in network.properties["subnets"]]}
    )


def delete_subnet(world: World, call: Call) -> Response:
    """Delete one subnet: 202 or 204; 400 while it is in use."""
    network, name = _network_of(world, call)
    subnet = next(
        (candidate for candidate in network.properties["subnets"] if same(candidate["name"], name)), None
    )
    if subnet is None:
        return no_content()
    world.unlocked(subnet["id"], "delete")
    _check_unused(world, subnet)
    network.properties["subnets"].remove(subnet)
    headers = world.begin(call, "network", network.location, "network-settled", network.id)
    return Response(202, headers)


def _network_of(world: World, call: Call) -> tuple[Resource, str]:
    world.group(call)
    network = world.state.find(call.id_of(NETWORKS))
    if network is None:
        raise ArmError(
            404,
            "ParentResourceNotFound",
            f"Can not perform requested operation on nested resource. Parent resource '{call.part['name']}' "
            "not found.",
        )
    return network, call.part.get("child", "")


def _prefixes(texts: list[str] | None, where: str) -> list[ipaddress.IPv4Network]:
    if not texts:
        raise ArmError(
            400, "InvalidRequestFormat", f"Cannot parse the request: {where} has no address prefix."
        )
    return [_prefix(text) for text in texts]


def _prefix(text: object) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(str(text))
    except ValueError:
        raise ArmError(
            400, "InvalidCIDRNotation", f"The address prefix {text} has invalid CIDR notation."
        ) from None


def _subnet(
    world: World, network_id: str, name: str, requested: Json, prefixes: list[ipaddress.IPv4Network]
) -> Json:
    if not name:
        raise ArmError(400, "InvalidRequestFormat", "Cannot parse the request: a subnet has no name.")
    texts = requested.get("addressPrefixes") or [requested.get("addressPrefix")]
    prefix = _prefix(texts[0])
    if not any(prefix.subnet_of(outer) for outer in prefixes):
        raise ArmError(
            400,
            "NetcfgSubnetRangeOutsideVnet",
            f"Subnet '{name}' is not valid because its IP address range is outside the IP address range of "
            f"virtual network '{network_id.rpartition('/')[2]}'.",
        )
    if prefix.prefixlen > 29:
        raise ArmError(400, "NetcfgSubnetRangeTooSmall", f"Subnet '{name}' is smaller than /29.")
    properties: Json = {
        "provisioningState": "Updating",
        "addressPrefix": str(prefix),
        "delegations": [],
        "privateEndpointNetworkPolicies": "Disabled",
        "privateLinkServiceNetworkPolicies": "Enabled",
    }
    if "defaultOutboundAccess" in requested:
        properties["defaultOutboundAccess"] = requested["defaultOutboundAccess"]
    firewall = reference(requested, "networkSecurityGroup")
    if firewall:
        properties["networkSecurityGroup"] = {"id": referenced(world, firewall, FIREWALLS, network_id).id}
    subnet_id = f"{network_id}/subnets/{name}"
    return {"name": name, "id": subnet_id, "etag": etag(), "properties": properties, "type": _SUBNETS}


def _check_disjoint(subnets: list[Json]) -> None:
    ranges = [ipaddress.IPv4Network(subnet["properties"]["addressPrefix"]) for subnet in subnets]
    for index, prefix in enumerate(ranges):
        for other, other_prefix in zip(subnets[:index], ranges[:index], strict=True):
            if prefix.overlaps(other_prefix):
                raise ArmError(
                    400,
                    "NetcfgSubnetRangesOverlap",
                    f"Subnet '{subnets[index]['name']}' is not valid because its IP address range overlaps "
                    f"with that of an existing subnet '{other['name']}'.",
                )


def _check_unused(world: World, subnet: Json) -> None:
    used = configurations_in_subnet(world.state, subnet["id"])
    if used:
        raise ArmError(
            400,
            "InUseSubnetCannotBeDeleted",
            f"Subnet {subnet['name']} is in use by {capitalised(used[0]['id'])} and cannot be deleted. In order "
            "to delete the subnet, delete all the resources within the subnet. See aka.ms/deletesubnet.",
        )


def _view_subnet(world: World, subnet: Json) -> Json:
    document = copy.deepcopy(subnet)
    used = configurations_in_subnet(world.state, subnet["id"])
    if used:
        document["properties"]["ipConfigurations"] = [{"id": configuration["id"]} for configuration in used]
    return document


def view_network(world: World, network: Resource) -> Json:
    """The network with the users of its subnets."""
    document = copy.deepcopy(network.document)
    document["properties"]["subnets"] = [
        _view_subnet(world, subnet) for subnet in network.properties["subnets"]
    ]
    return document


HANDLERS = {NETWORKS: {"PUT": put_network, "PATCH": patch(NETWORKS), "DELETE": delete_network}}
VIEWS = {NETWORKS.lower(): view_network}
