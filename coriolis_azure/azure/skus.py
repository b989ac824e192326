"""Reads Azure's description of a VM size: capabilities, zones, restrictions."""

from __future__ import annotations

from ..model import Json, canonical_location


def capabilities(sku: Json) -> dict[str, str]:
    """The capabilities of a VM size: value by name."""
    pairs = sku.get("capabilities", [])
    return {pair["name"]: pair["value"] for pair in pairs if "name" in pair and "value" in pair}


def capability(sku: Json, name: str) -> float:
    """A numeric capability of a VM size, which Azure gives as text; 0 if it is absent or not a number."""
    try:
        return float(capabilities(sku).get(name, 0))
    except ValueError:
        return 0


def zones_of(sku: Json, location: str) -> set[str] | None:
    """The zones of `location` in which a SKU is sold, from `locationInfo`; None if Azure does not tell."""
    infos = [
        info
        for info in sku.get("locationInfo", [])
        if canonical_location(info.get("location", location)) == location
    ]
    return {zone for info in infos for zone in info.get("zones", [])} if infos else None


def bars(restriction: Json, zone: str) -> bool:
    """Whether a restriction of a size forbids it in `zone`, or without a zone if that is ""."""
    if restriction.get("type") == "Zone":
        return bool(zone) and zone in restriction.get("restrictionInfo", {}).get("zones", [])
    return True
