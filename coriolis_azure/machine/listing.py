"""Lists VMs by resource group and location, and finds the VM that a name refers to."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..azure.client import Azure
from ..errors import AzureError, InvalidInput, NotFound
from ..events import counted
from ..model import Json, canonical_location

LOG = logging.getLogger(__name__)


def machines(azure: Azure, settings: Mapping[str, Any]) -> list[Json]:
    """The documents of the VMs in the settings' resource group and location, in a stable order.

    Raises InvalidInput if there are none because Azure has no such location.
    """
    group, location = settings.get("resource_group"), settings.get("location")
    listed = azure.resources("vm", group) if group else azure.everywhere("vm")
    matches = [
        vm
        for vm in listed
        if not location or canonical_location(vm["location"]) == canonical_location(location)
    ]
    if location and not matches:
        check_location(location, _locations(azure))
    return sorted(matches, key=lambda vm: str(vm["id"]).lower())


def check_location(location: str, offered: Collection[str]) -> None:
    """Raise InvalidInput, with the nearest match, if `location` is not `offered`. Nothing `offered` means unknown."""
    canonical = canonical_location(location)
    if not offered or canonical in offered:
        return
    near = difflib.get_close_matches(canonical, offered, n=1)
    raise InvalidInput(
        f"{location} is not a location where this subscription can have VMs",
        remedy=f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(offered)}.",
    )


def _locations(azure: Azure) -> list[str]:
    """The subscription's locations; empty if Azure does not tell, which is no reason to fail a listing."""
    try:
        return azure.locations()
    except AzureError as error:
        LOG.info("cannot list the locations: %s", error)
        return []


def called(vms: Iterable[Json], name: str) -> Json:
    """The one VM that a user refers to as `name`: its name or its ARM id.

    Raises NotFound if there is none, InvalidInput if VMs in several resource groups have that name.
    """
    matches = [vm for vm in vms if name.lower() in (str(vm["name"]).lower(), str(vm["id"]).lower())]
    if not matches:
        raise NotFound(f"there is no VM {name}")
    if len(matches) > 1:
        ids = " or ".join(str(vm["id"]) for vm in matches)
        raise InvalidInput(
            f"{counted(len(matches), 'VM')} are called {name}",
            remedy=f"Set resource_group, or give the ARM id of the VM that is meant: {ids}.",
        )
    return matches[0]
