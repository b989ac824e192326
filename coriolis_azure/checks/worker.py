"""The worker: its size, what the quotas leave for it, its image, the encryption of its own disk."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from ..azure import names, skus
from ..azure.client import Azure
from ..events import Event, Notice, amount, counted, duration
from ..machine import cloning
from ..model import Json, at
from ..settings import Environment
from ..worker import images, launch, sizes
from .finding import Finding, ask, error, fine, warning
from .quota import UNLIMITED, remaining
from .subject import Subject


def size(subject: Subject) -> Generator[Finding, None, Json | None]:
    """The size that the worker would get, told with rounds and throughput; its description."""
    needed = sizes.needs(subject.machine, subject.disks) if subject.machine else sizes.Needs()
    told: list[Event] = []
    here = subject.context.environment.location
    found = yield from ask(
        "worker",
        lambda: sizes.choose_size(subject.context.azure, needed, subject.context.environment, told.append),
    )
    if found is None:
        return None
    if told:
        why = _why_not(subject.context.azure, subject.context.environment, needed.zone)
        yield warning(
            "worker", f"{_texts(told)} ({why})", "Set export_worker_size to a size that can be used."
        )
    zone = f", zone {needed.zone}" if needed.zone else ""
    yield fine("worker", f"size {found.name} is offered in {here}{zone}")
    if len(subject.disks) > found.slots:
        disks, rounds = len(subject.disks), -(-len(subject.disks) // found.slots)
        held = f"{counted(disks, 'disk')}, the worker holds {found.slots}"
        yield fine("copy", f"{held}: copied in {counted(rounds, 'round')}")
    sku = next(sku for sku in subject.context.azure.sizes(here) if sku["name"] == found.name)
    rate = skus.capability(sku, "UncachedDiskBytesPerSecond")
    total = sum(disk.size_bytes for disk in subject.disks)
    if rate and total:
        yield fine(
            "copy",
            f"{found.name} reads {amount(rate)}/s: {duration(total / rate)} for a full read of {amount(total)}",
        )
    return sku


def capacity(subject: Subject, sku: Json) -> Iterator[Finding]:
    """The cores that the quota leaves."""
    left = yield from remaining(
        lambda: subject.context.azure.compute_usages(subject.context.environment.location)
    )
    if left is None:
        return
    here, cores = subject.context.environment.location, int(skus.capability(sku, "vCPUs")) or 1
    remedy = "Free some, ask for a higher quota, or choose a smaller export_worker_size."
    for name, what in (("cores", "vCPUs of the location"), ("virtualMachines", "VMs of the location")):
        wanted = 1 if name == "virtualMachines" else cores
        if left.get(name.lower(), UNLIMITED) < wanted:
            rest = left[name.lower()]
            # Where some cores are left, a run tries smaller sizes.
            tell = warning if rest > 0 else error
            yield tell("worker", f"the quota of {what} leaves {rest}, the worker needs {wanted}", remedy)
    for name, wanted in _disks_needed(subject, int(skus.capability(sku, "MaxDataDiskCount"))).items():
        if left.get(name.lower(), UNLIMITED) < wanted:
            rest = left[name.lower()]
            yield error(
                "clone",
                f"the quota of {name} in {here} leaves {rest}, a run needs {wanted} at once",
                "Delete unused disks and snapshots, ask for a higher quota, or leave disks out with exclude_disks.",
            )
    family = str(sku.get("family", ""))
    rest = left.get(family.lower(), UNLIMITED)
    if rest < cores:
        yield warning(
            "worker",
            f"the quota of {family} leaves {counted(rest, 'vCPU')}, {sku['name']} needs {cores}: another size will be "
            "tried",
            "Ask for a higher quota, or choose an export_worker_size of another family.",
        )


def _disks_needed(subject: Subject, slots: int) -> dict[str, int]:
    """How many disks and snapshots a run has at once, by the names of their quotas: clones are made in rounds."""
    managed = [disk for disk in subject.disks if not disk.unmanaged]
    kinds = [cloning.clone_sku(disk).removesuffix("_LRS").replace("_", "") for disk in managed]
    needed = {f"{kind}DiskCount": min(kinds.count(kind), slots) for kind in kinds}
    own = "StandardSSDDiskCount" if subject.context.azure.is_modern else "StandardDiskCount"
    needed[own] = needed.get(own, 0) + 1  # the worker's own
    return {**needed, "StandardSnapshotCount": len(managed)} if managed else needed


def image(subject: Subject) -> Iterator[Finding]:
    """The worker's image."""
    told: list[Event] = []
    found = yield from ask(
        "worker", lambda: images.choose_image(subject.context.azure, subject.context.environment, told.append)
    )
    if told:
        yield warning("worker", _texts(told), "Set export_worker_image to an image that exists.")
    if found is not None:
        yield fine("worker", f"image {found} exists")


def encryption(subject: Subject) -> Iterator[Finding]:
    """The disk encryption set of the settings: there, in the location."""
    azure, environment = subject.context.azure, subject.context.environment
    found = yield from ask("worker", lambda: launch.check_encryption(azure, environment))
    if found:
        name = names.name_of(environment.export_worker_disk_encryption_set)
        yield fine("worker", f"disk encryption set {name} can be read, for the worker's own disk")


def _why_not(azure: Azure, environment: Environment, zone: str) -> str:
    """Why the size of the settings cannot be a worker."""
    asked = environment.export_worker_size.lower()
    sku = next((sku for sku in azure.sizes(environment.location) if sku["name"].lower() == asked), None)
    if sku is None:
        return f"{environment.location} does not have it"
    barred = [
        f"{restriction.get('reasonCode', 'restricted')} in {_places(restriction)}"
        for restriction in sku.get("restrictions", [])
        if restriction.get("type") != "Zone" or zone in at(restriction, "restrictionInfo.zones", [])
    ]
    zones = skus.zones_of(sku, environment.location)
    if zone and zones is not None and zone not in zones:
        barred.append(f"sold in {_zones(zones)}, not in zone {zone}")
    told = skus.capabilities(sku)
    return ", ".join(barred) or (
        f"processor {told.get('CpuArchitectureType', 'x64')}, disks {told.get('DiskControllerTypes', 'SCSI')}, "
        f"premium disks {told.get('PremiumIO', 'False')}, generations {told.get('HyperVGenerations', 'V1,V2')}"
    )


def _places(restriction: Json) -> str:
    zones = at(restriction, "restrictionInfo.zones", [])
    return _zones(zones) if zones else ", ".join(restriction.get("values", [])) or "this location"


def _zones(zones: Iterable[str]) -> str:
    """Zones in words; "no zone" for none."""
    return f"zones {', '.join(sorted(zones))}" if zones else "no zone"


def _texts(told: Iterable[Event]) -> str:
    return "; ".join(event.text for event in told if isinstance(event, Notice))
