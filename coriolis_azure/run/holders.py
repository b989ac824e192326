"""What a resource is in use by: while it is there, Azure does not delete the resource.

Read from the resource's own document, where Azure names each user by its id; messages name them too, for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..azure import names
from ..model import Json, at

# Where a document of a kind names what uses it: an id, or references.
_USED_BY: Mapping[str, tuple[str, ...]] = {
    "disk": ("managedBy", "managedByExtended"),
    "nic": ("properties.virtualMachine", "properties.privateEndpoint", "properties.privateLinkService"),
    "ip": ("properties.ipConfiguration", "properties.natGateway"),
    "nsg": ("properties.networkInterfaces", "properties.subnets"),
}
# The same in each subnet of a network; a service of Azure's is linked by a part of the subnet.
_SUBNET_USED_BY = (
    "ipConfigurations",
    "ipConfigurationProfiles",
    "applicationGatewayIPConfigurations",
    "privateEndpoints",
    "resourceNavigationLinks",
    "serviceAssociationLinks",
)


def holders(document: Json) -> list[str]:
    """The ids of the resources that hold a resource of one of `names.TYPES`, each once."""
    kind = names.kind_of(document["id"])
    found = [at(document, place) for place in _USED_BY.get(kind, ())]
    if kind == "vnet":
        subnets = at(document, "properties.subnets", [])
        found = [at(subnet, f"properties.{place}") for subnet in subnets for place in _SUBNET_USED_BY]
    ids = [names.resource_of(id) for each in found for id in _ids(each)]
    return list({id.lower(): id for id in ids}.values())


def _ids(found: Any) -> Iterator[str]:
    if isinstance(found, list):
        for each in found:
            yield from _ids(each)
    elif isinstance(found, dict):
        yield from _ids(at(found, "properties.link") or found.get("id"))
    elif found:
        yield str(found)
