"""Network security groups, and the inbound rules of a guest."""

from __future__ import annotations

import copy
import ipaddress
import re

from coriolis_azure.sandbox.network.common import (
    accepted,
    begin_put,
    capitalised,
    deleting,
    etag,
    given_properties,
    keep,
    patch,
)
from coriolis_azure.sandbox.relations import (
    FIREWALLS,
    primary_configuration,
    reference,
    subnet,
    users_of_firewall,
)
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, World, deleted, no_content

# name, priority, direction, access, source, destination
_DEFAULT_RULES = (
    ("AllowVnetInBound", 65000, "Inbound", "Allow", "VirtualNetwork", "VirtualNetwork"),
    ("AllowAzureLoadBalancerInBound", 65001, "Inbound", "Allow", "AzureLoadBalancer", "*"),
    ("DenyAllInBound", 65500, "Inbound", "Deny", "*", "*"),
    ("AllowVnetOutBound", 65000, "Outbound", "Allow", "VirtualNetwork", "VirtualNetwork"),
    ("AllowInternetOutBound", 65001, "Outbound", "Allow", "*", "Internet"),
    ("DenyAllOutBound", 65500, "Outbound", "Deny", "*", "*"),
)


def put_firewall(world: World, call: Call) -> Response:
    """Create or replace a network security group with its rules."""
    firewall_id, location, existing = begin_put(world, call, FIREWALLS)
    rules = [_rule(firewall_id, rule) for rule in given_properties(call).get("securityRules") or []]
    seen = set()
    for rule in rules:
        key = (rule["properties"]["priority"], rule["properties"]["direction"])
        if key in seen:
            raise ArmError(
                400,
                "SecurityRuleConflict",
                f"Security rule {rule['name']} conflicts with another rule: same priority {key[0]} and "
                f"direction {key[1]}.",
            )
        seen.add(key)
    properties = {"securityRules": rules, "defaultSecurityRules": _default_rules(firewall_id)}
    firewall = keep(world, call, FIREWALLS, firewall_id, location, properties)
    return accepted(world, call, firewall, existed=existing is not None)


def delete_firewall(world: World, call: Call) -> Response:
    """Delete an NSG: 202 or 204; 400 while a NIC or subnet uses it."""
    firewall = deleted(world, call, FIREWALLS)
    if firewall is None:
        return no_content()
    interfaces, subnets = users_of_firewall(world.state, firewall.id)
    users = [capitalised(user) for user in (*interfaces, *subnets)]
    if users:
        raise ArmError(
            400,
            "InUseNetworkSecurityGroupCannotBeDeleted",
            f"Network security group {firewall.id} cannot be deleted because it is in use by the following "
            f"resources: {', '.join(users)}. In order to delete the Network security group, remove the "
            "association with the resource(s). To learn how to do this, see aka.ms/deletensg.",
        )
    return deleting(world, call, firewall)


def _rule(firewall_id: str, requested: Json) -> Json:
    name = str(requested.get("name") or "")
    properties = {**(requested.get("properties") or {})}
    missing = [
        field
        for field in ("protocol", "access", "direction", "priority")
        if properties.get(field) in (None, "")
    ]
    sources = properties.get("sourceAddressPrefix") or properties.get("sourceAddressPrefixes")
    ports = properties.get("destinationPortRange") or properties.get("destinationPortRanges")
    if not name or missing or not sources or not ports:
        fields = ", ".join(missing) or "name, source address prefix or destination port range"
        raise ArmError(
            400, "SecurityRuleParameterMissing", f"Security rule '{name}' lacks a value: {fields}."
        )
    if not 100 <= properties["priority"] <= 4096:
        raise ArmError(
            400,
            "SecurityRuleInvalidPriority",
            f"Security rule '{name}' has invalid Priority. Value provided: {properties['priority']} Allowed "
            "range 100-4096.",
        )
    rule_id = f"{firewall_id}/securityRules/{name}"
    for end in ("source", "destination"):
        _checked_prefixes(rule_id, end.capitalize(), properties, f"{end}AddressPrefix")
    kind = f"{FIREWALLS}/securityRules"
    return {
        "name": name,
        "id": rule_id,
        "etag": etag(),
        "type": kind,
        "properties": {"provisioningState": "Succeeded", **properties},
    }


_TAG = re.compile(r"\*|[A-Za-z]+(\.[A-Za-z0-9]+)?")


def _checked_prefixes(rule_id: str, end: str, properties: Json, field: str) -> None:
    """Refuse addresses as Azure does: tags in a list, host bits, mixed families, overlapping ranges."""
    single, several = properties.get(field), properties.get(f"{field}es") or []
    if single and not _TAG.fullmatch(single):
        several = [single, *several]
    networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for value in several:
        if _TAG.fullmatch(value):
            raise ArmError(
                400,
                "SecurityRuleParameterContainsUnsupportedValue",
                f"Security rule parameter {end}AddressPrefix for rule with Id {rule_id} cannot specify existing "
                f"VIRTUALNETWORK, INTERNET, AZURELOADBALANCER, '*' or system tags. Unsupported value used: {value}.",
            )
        try:
            network = ipaddress.ip_network(value)
        except ValueError:
            raise ArmError(
                400,
                "SecurityRuleInvalidAddressPrefix",
                f"Security rule {rule_id} has invalid Address prefix. Value provided: {value}",
            ) from None
        if any(other.version != network.version for other in networks):
            raise ArmError(
                400,
                "ResourceCannotContainAddressPrefixesFromDifferentAddressFamilies",
                f"{rule_id} contains IP addresses or prefixes that belong to different address families. All IP "
                "addresses or prefixes in the resource should belong to the same address family.",
            )
        if any(other.overlaps(network) for other in networks):
            raise ArmError(
                400,
                "OverlappingSubnetsNotPermittedInSecurityRule",
                f"Security rule parameter {end}AddressPrefix for rule with Id {rule_id} cannot specify overlapping "
                f"prefixes. Overlapping value used: {value}.",
            )
        networks.append(network)


def _default_rules(firewall_id: str) -> list[Json]:
    return [
        {
            "name": name,
            "id": f"{firewall_id}/defaultSecurityRules/{name}",
            "etag": etag(),
            "type": f"{FIREWALLS}/defaultSecurityRules",
            "properties": {
                "provisioningState": "Succeeded",
                "protocol": "*",
                "sourcePortRange": "*",
                "destinationPortRange": "*",
                "sourceAddressPrefix": source,
                "destinationAddressPrefix": destination,
                "access": access,
                "priority": priority,
                "direction": direction,
            },
        }
        for name, priority, direction, access, source, destination in _DEFAULT_RULES
    ]


def view_firewall(world: World, firewall: Resource) -> Json:
    """The NSG with its users."""
    document = copy.deepcopy(firewall.document)
    interfaces, subnets = users_of_firewall(world.state, firewall.id)
    if interfaces:
        document["properties"]["networkInterfaces"] = [{"id": id} for id in interfaces]
    if subnets:
        document["properties"]["subnets"] = [{"id": id} for id in subnets]
    return document


def inbound_rules(world: World, interface: Resource) -> list[list[Json]]:
    """The rule sets, in order of priority, that must all allow a connection to this NIC.

    Connections to a public address come from the internet, those to a private one from its network. A Standard public
    address without a security group is closed: its only set is empty, which denies everything.
    """
    primary = primary_configuration(interface)
    public = reference(primary, "publicIPAddress") is not None
    excluded_source = "virtualnetwork" if public else "internet"
    found_subnet = subnet(world.state, reference(primary, "subnet"))
    ids = [reference(interface.properties, "networkSecurityGroup")]
    if found_subnet is not None:
        ids.append(reference(found_subnet["properties"], "networkSecurityGroup"))
    sets = []
    for firewall in [world.state.find(id) for id in ids if id]:
        if firewall is not None:
            rules = [*firewall.properties["securityRules"], *firewall.properties["defaultSecurityRules"]]
            inbound = [
                rule
                for rule in (document["properties"] for document in rules)
                if rule["direction"] == "Inbound"
                and str(rule.get("sourceAddressPrefix")).lower() != excluded_source
            ]
            sets.append(sorted(inbound, key=lambda rule: int(rule["priority"])))
    return [[]] if public and not sets else sets


HANDLERS = {FIREWALLS: {"PUT": put_firewall, "PATCH": patch(FIREWALLS), "DELETE": delete_firewall}}
VIEWS = {FIREWALLS.lower(): view_firewall}
