"""Network security groups, and what they let in to a guest."""

from __future__ import annotations

import copy
import ipaddress
import re

from coriolis_azure.sandbox.network.common import (
    answered,
    begin_put,
    deleting,
    etag,
    given_properties,
    keep,
    patch,
    shouted,
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
    rules = [_rule(firewall_id, each) for each in given_properties(call).get("securityRules") or []]
    seen = set()
    for each in rules:
        key = (each["properties"]["priority"], each["properties"]["direction"])
        if key in seen:
            raise ArmError(
                400,
                "SecurityRuleConflict",
                f"Security rule {each['name']} conflicts with another rule: same priority {key[0]} and "
                f"direction {key[1]}.",
            )
        seen.add(key)
    properties = {"securityRules": rules, "defaultSecurityRules": _default_rules(firewall_id)}
    firewall = keep(world, call, FIREWALLS, firewall_id, location, properties)
    return answered(world, call, firewall, existing is not None)


def delete_firewall(world: World, call: Call) -> Response:
    """Delete an NSG: 202, 204; 400 while a NIC or subnet has it."""
    firewall = deleted(world, call, FIREWALLS)
    if firewall is None:
        return no_content()
    interfaces, subnets = users_of_firewall(world.state, firewall.id)
    users = [shouted(each) for each in (*interfaces, *subnets)]
    if users:
        raise ArmError(
            400,
            "InUseNetworkSecurityGroupCannotBeDeleted",
            f"Network security group {firewall.id} cannot be deleted because it is in use by the following "
            f"resources: {', '.join(users)}. In order to delete the Network security group, remove the "
            "association with the resource(s). To learn how to do this, see aka.ms/deletensg.",
        )
    return deleting(world, call, firewall)


def _rule(firewall_id: str, given: Json) -> Json:
    name = str(given.get("name") or "")
    properties = {**(given.get("properties") or {})}
    missing = [
        field
        for field in ("protocol", "access", "direction", "priority")
        if properties.get(field) in (None, "")
    ]
    sources = properties.get("sourceAddressPrefix") or properties.get("sourceAddressPrefixes")
    ports = properties.get("destinationPortRange") or properties.get("destinationPortRanges")
    if not name or missing or not sources or not ports:
        what = ", ".join(missing) or "name, source address prefix or destination port range"
        raise ArmError(400, "SecurityRuleParameterMissing", f"Security rule '{name}' lacks a value: {what}.")
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
    """Refuse addresses as Azure does: tags in a list, host bits, two families, ranges that overlap."""
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
        if any(each.version != network.version for each in networks):
            raise ArmError(
                400,
                "ResourceCannotContainAddressPrefixesFromDifferentAddressFamilies",
                f"{rule_id} contains IP addresses or prefixes that belong to different address families. All IP "
                "addresses or prefixes in the resource should belong to the same address family.",
            )
        if any(each.overlaps(network) for each in networks):
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
    """The NSG with who uses it."""
    document = copy.deepcopy(firewall.document)
    interfaces, subnets = users_of_firewall(world.state, firewall.id)
    if interfaces:
        document["properties"]["networkInterfaces"] = [{"id": each} for each in interfaces]
    if subnets:
        document["properties"]["subnets"] = [{"id": each} for each in subnets]
    return document


def inbound_rules(world: World, interface: Resource) -> list[list[Json]]:
    """The rule sets, each in order of priority, that all must allow a connection to this NIC.

    Who comes to a public address comes from the internet, who comes to a private one from its network. A
    Standard public address that no security group guards is closed: its one set is empty, which denies.
    """
    primary = primary_configuration(interface)
    public = reference(primary, "publicIPAddress") is not None
    elsewhere = "virtualnetwork" if public else "internet"
    found = subnet(world.state, reference(primary, "subnet"))
    ids = [reference(interface.properties, "networkSecurityGroup")]
    if found is not None:
        ids.append(reference(found["properties"], "networkSecurityGroup"))
    sets = []
    for firewall in [world.state.find(each) for each in ids if each]:
        if firewall is not None:
            rules = [*firewall.properties["securityRules"], *firewall.properties["defaultSecurityRules"]]
            inner = [each["properties"] for each in rules]
            reachable = [
                each
                for each in inner
                if each["direction"] == "Inbound"
                and str(each.get("sourceAddressPrefix")).lower() != elsewhere
            ]
            sets.append(sorted(reachable, key=lambda rule: int(rule["priority"])))
    return [[]] if public and not sets else sets


HANDLERS = {FIREWALLS: {"PUT": put_firewall, "PATCH": patch(FIREWALLS), "DELETE": delete_firewall}}
VIEWS = {FIREWALLS.lower(): view_firewall}
