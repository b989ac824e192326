"""Checks the worker's network: the subnet of the settings, quotas, and who can reach the worker."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from ..azure import names
from ..events import counted
from ..model import Json, at
from ..worker.network import check_network
from .finding import Finding, ask, error, fine, warning
from .quota import UNLIMITED, remaining
from .subject import Subject

# Azure reserves five addresses in every subnet.
_RESERVED_ADDRESSES = 5
# The quotas for public addresses, which differ between locations; a Standard address counts against each.
_ADDRESS_QUOTAS = (
    *("PublicIPAddresses", "StaticPublicIPAddresses"),
    *("StandardSkuPublicIpAddresses", "IPv4StandardSkuPublicIpAddresses"),
)


def subnet(subject: Subject) -> Iterator[Finding]:
    """Check that the subnet of the settings exists and has room for a NIC."""
    if not subject.context.environment.export_network:
        return
    document = yield from ask(
        "worker", lambda: check_network(subject.context.azure, subject.context.environment)
    )
    if document is None:
        return
    name = names.network_of(document["id"])
    services = [
        at(delegation, "properties.serviceName", "?")
        for delegation in at(document, "properties.delegations", [])
    ]
    if services:
        yield error(
            "worker",
            f"subnet {name} is delegated to {', '.join(services)}: it cannot contain VMs",
            "Choose an export_network that is not delegated.",
        )
    free = _free(document)
    if free < 1:
        # In a subnet with IPv6, Azure does not tell which NICs use an IPv4 address.
        finding = warning if _has_ipv6(document) else error
        yield finding("worker", f"subnet {name} has no free address", "Choose a larger export_network.")
    else:
        yield fine("worker", f"subnet {name} has {counted(free, 'free address', 'free addresses')}")
    firewall = at(document, "properties.networkSecurityGroup.id")
    if firewall:
        port = subject.context.environment.export_worker_ssh_port
        yield warning(
            "worker",
            f"subnet {name} has a firewall of its own ({names.name_of(firewall)}), in addition to the worker's",
            f"Make sure that its rules let this host reach TCP port {port}.",
        )


def quota(subject: Subject) -> Iterator[Finding]:
    """Check the quotas for addresses, NICs and networks."""
    left = yield from remaining(
        lambda: subject.context.azure.network_usages(subject.context.environment.location)
    )
    if left is None:
        return
    needed = ["NetworkInterfaces", "NetworkSecurityGroups"]
    if subject.context.environment.export_worker_use_fip:
        needed += _ADDRESS_QUOTAS
    if not subject.context.environment.export_network:
        needed.append("VirtualNetworks")
    for name in needed:
        if left.get(name.lower(), UNLIMITED) < 1:
            yield error(
                "worker",
                f"the quota of {name} in {subject.context.environment.location} is used up",
                "Delete some, or ask for a higher quota. A run with an export_network and without a public IP needs "
                "less.",
            )


def exposure(subject: Subject) -> Iterator[Finding]:
    """Warn if anybody can reach the worker."""
    if subject.context.environment.worker_is_open_to_all:
        yield warning(
            "worker",
            "the worker's SSH port can be reached from anywhere (signing in needs a key)",
            "Set export_worker_allowed_addresses to the outgoing address of this host.",
        )


def _free(subnet: Json) -> int:
    """The number of free IPv4 addresses in a subnet."""
    usable = sum(
        range_.num_addresses - _RESERVED_ADDRESSES for range_ in _ranges(subnet) if range_.version == 4
    )
    return max(0, usable - len(subnet["properties"].get("ipConfigurations") or ()))


def _has_ipv6(subnet: Json) -> bool:
    return any(range_.version == 6 for range_ in _ranges(subnet))


def _ranges(subnet: Json) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    properties = subnet["properties"]
    prefixes: Sequence[str] = properties.get("addressPrefixes") or [
        properties.get("addressPrefix") or "0.0.0.0/32"
    ]
    return [range_ for prefix in prefixes if (range_ := _range(prefix)) is not None]


def _range(prefix: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(prefix, strict=False)
    except ValueError:
        return None
