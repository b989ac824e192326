"""Finds the holders of a resource: the resources that use it and that keep Azure from deleting it.

They are read from the resource's own document, which contains their ids. Azure's messages contain them too, but are
meant for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..azure import names
from ..model import Json, at

# The properties of each kind that refer to its users: an id, or references.
_USED_BY: Mapping[str, tuple[str, ...]] = {
    "disk": ("managedBy", "managedByExtended"),
    "nic": ("properties.virtualMachine", "properties.privateEndpoint", "properties.privateLinkService"),
    "ip": ("properties.ipConfiguration", "properties.natGateway"),
    "nsg": ("properties.networkInterfaces", "properties.subnets"),
}
# The same for the subnets of a network. Azure services are linked by child resources of the subnet.
_SUBNET_USED_BY = (
    "ipConfigurations",
    "ipConfigurationProfiles",
    "applicationGatewayIPConfigurations",
    "privateEndpoints",
    "resourceNavigationLinks",
    "serviceAssociationLinks",
)


def holders(document: Json) -> list[str]:
    """The ids of the resources that hold a resource of one of `names.TYPES`, without duplicates."""
    kind = names.kind_of(document["id"])
    references = [at(document, path) for path in _USED_BY.get(kind, ())]
    if kind == "vnet":
        subnets = at(document, "properties.subnets", [])
        references = [at(subnet, f"properties.{path}") for subnet in subnets for path in _SUBNET_USED_BY]
    ids = [names.resource_of(id) for reference in references for id in _ids(reference)]
    return list({id.lower(): id for id in ids}.values())


def _ids(reference: Any) -> Iterator[str]:
    """Yield the ids in a reference: an id, an object with an id or a link, or a list of these."""
    if isinstance(reference, list):
        for item in reference:
            yield from _ids(item)
    elif isinstance(reference, dict):
        yield from _ids(at(reference, "properties.link") or reference.get("id"))
    elif reference:
        yield str(reference)
