"""What Azure says of a VM size: capabilities, zones, restrictions."""

from __future__ import annotations

from ..model import Json, canonical_location


def capabilities(sku: Json) -> dict[str, str]:
    """What a VM size can do, by capability name."""
    pairs = sku.get("capabilities", [])
    return {pair["name"]: pair["value"] for pair in pairs if "name" in pair and "value" in pair}


def capability(sku: Json, name: str) -> float:
    """A number that a VM size has, which Azure tells as text; 0 where it does not."""
    try:
        return float(capabilities(sku).get(name, 0))
    except ValueError:
        return 0


def zones_of(sku: Json, location: str) -> set[str] | None:
    """The zones of `location` in which a SKU is sold, by `locationInfo`; None where Azure does not tell."""
    told = [
        info
        for info in sku.get("locationInfo", [])
        if canonical_location(info.get("location", location)) == location
    ]
    return {zone for info in told for zone in info.get("zones", [])} if told else None


def bars(restriction: Json, zone: str) -> bool:
    """Whether a restriction of a size keeps it from being used in `zone`; in no zone where that is ""."""
    if restriction.get("type") == "Zone":
        return bool(zone) and zone in restriction.get("restrictionInfo", {}).get("zones", [])
    return True
