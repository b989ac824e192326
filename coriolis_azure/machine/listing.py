"""The VMs there are, by resource group and location, and the one that a name means."""

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

    InvalidInput where there are none because Azure has no such location.
    """
    group, location = settings.get("resource_group"), settings.get("location")
    listed = azure.resources("vm", group) if group else azure.everywhere("vm")
    here = [
        vm
        for vm in listed
        if not location or canonical_location(vm["location"]) == canonical_location(location)
    ]
    if location and not here:
        check_location(location, _locations(azure))
    return sorted(here, key=lambda vm: str(vm["id"]).lower())


def check_location(location: str, offered: Collection[str]) -> None:
    """InvalidInput where `location` is none of those that are `offered`, with the nearest; fine if none are known."""
    wanted = canonical_location(location)
    if not offered or wanted in offered:
        return
    near = difflib.get_close_matches(wanted, offered, n=1)
    raise InvalidInput(
        f"{location} is not a location where this subscription can have VMs",
        remedy=f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(offered)}.",
    )


def _locations(azure: Azure) -> list[str]:
    """The subscription's locations; empty where Azure does not tell, which is no reason to refuse a listing."""
    try:
        return azure.locations()
    except AzureError as error:
        LOG.info("the locations are not known: %s", error)
        return []


def called(vms: Iterable[Json], name: str) -> Json:
    """The one machine that a user calls `name`: its name or its ARM id.

    NotFound where there is none, InvalidInput where machines of several resource groups have the name.
    """
    found = [vm for vm in vms if name.lower() in (str(vm["name"]).lower(), str(vm["id"]).lower())]
    if not found:
        raise NotFound(f"there is no VM {name}")
    if len(found) > 1:
        ids = " or ".join(str(vm["id"]) for vm in found)
        raise InvalidInput(
            f"{counted(len(found), 'VM')} are called {name}",
            remedy=f"Set resource_group, or give the ARM id of the VM that is meant: {ids}.",
        )
    return found[0]
