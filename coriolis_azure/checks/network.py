"""The worker's network: the subnet of the settings, quotas, and who may reach the worker."""

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

# Azure keeps five addresses of every subnet for itself.
_RESERVED_ADDRESSES = 5
# The names that locations use for the quota of public addresses; a Standard address counts in each.
_ADDRESS_QUOTAS = (
    *("PublicIPAddresses", "StaticPublicIPAddresses"),
    *("StandardSkuPublicIpAddresses", "IPv4StandardSkuPublicIpAddresses"),
)


def subnet(subject: Subject) -> Iterator[Finding]:
    """The subnet of the settings: there, with room for a NIC."""
    if not subject.context.environment.export_network:
        return
    found = yield from ask(
        "worker", lambda: check_network(subject.context.azure, subject.context.environment)
    )
    if found is None:
        return
    name = names.network_of(found["id"])
    services = [at(one, "properties.serviceName", "?") for one in at(found, "properties.delegations", [])]
    if services:
        yield error(
            "worker",
            f"subnet {name} is delegated to {', '.join(services)}: no VM can be in it",
            "Choose an export_network that is not delegated.",
        )
    free = _free(found)
    if free < 1:
        # Of a subnet with IPv6, Azure does not tell which of its NICs take an IPv4 address.
        tell = warning if _has_ipv6(found) else error
        yield tell("worker", f"subnet {name} has no free address", "Choose a larger export_network.")
    else:
        yield fine("worker", f"subnet {name} has {counted(free, 'free address', 'free addresses')}")
    firewall = at(found, "properties.networkSecurityGroup.id")
    if firewall:
        port = subject.context.environment.export_worker_ssh_port
        yield warning(
            "worker",
            f"subnet {name} has a firewall of its own ({names.name_of(firewall)}), besides the worker's",
            f"See that its rules let this host reach TCP port {port}.",
        )


def quota(subject: Subject) -> Iterator[Finding]:
    """The addresses, NICs and networks that the quota leaves."""
    left = yield from remaining(
        lambda: subject.context.azure.network_usages(subject.context.environment.location)
    )
    if left is None:
        return
    wanted = ["NetworkInterfaces", "NetworkSecurityGroups"]
    if subject.context.environment.export_worker_use_fip:
        wanted += _ADDRESS_QUOTAS
    if not subject.context.environment.export_network:
        wanted.append("VirtualNetworks")
    for name in wanted:
        if left.get(name.lower(), UNLIMITED) < 1:
            yield error(
                "worker",
                f"the quota of {name} in {subject.context.environment.location} is used up",
                "Delete some, or ask for a higher quota; an export_network and no public IP need less.",
            )


def exposure(subject: Subject) -> Iterator[Finding]:
    """Who may reach the worker."""
    if subject.context.environment.worker_is_open_to_all:
        yield warning(
            "worker",
            "the worker's SSH port can be reached from anywhere (with a key only)",
            "Set export_worker_allowed_addresses to the outgoing address of this host.",
        )


def _free(subnet: Json) -> int:
    """The IPv4 addresses that a subnet has left."""
    room = sum(one.num_addresses - _RESERVED_ADDRESSES for one in _ranges(subnet) if one.version == 4)
    return max(0, room - len(subnet["properties"].get("ipConfigurations") or ()))


def _has_ipv6(subnet: Json) -> bool:
    return any(one.version == 6 for one in _ranges(subnet))


def _ranges(subnet: Json) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    properties = subnet["properties"]
    prefixes: Sequence[str] = properties.get("addressPrefixes") or [
        properties.get("addressPrefix") or "0.0.0.0/32"
    ]
    return [found for prefix in prefixes if (found := _range(prefix)) is not None]


def _range(prefix: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(prefix, strict=False)
    except ValueError:
        return None
