"""Checks the worker: its size, the quotas for it, its image, and the encryption of its own disk."""

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
    """Check the size that the worker would get, with waves and throughput; return its SKU."""
    settings = subject.context.environment
    needed = sizes.needs(subject.machine, subject.disks, settings) if subject.machine else sizes.Needs()
    events: list[Event] = []
    location = subject.context.environment.location
    chosen = yield from ask(
        "worker",
        lambda: sizes.choose_size(subject.context.azure, needed, subject.context.environment, events.append),
    )
    if chosen is None:
        return None
    if events:
        reason = _why_not(subject.context.azure, subject.context.environment, needed.zone)
        yield warning(
            "worker", f"{_texts(events)} ({reason})", "Set export_worker_size to a size that can be used."
        )
    zone = f", zone {needed.zone}" if needed.zone else ""
    yield fine("worker", f"size {chosen.name} is offered in {location}{zone}")
    if len(subject.disks) > chosen.slots:
        waves = -(-len(subject.disks) // chosen.slots)
        yield fine(
            "copy",
            f"{counted(len(subject.disks), 'disk')}, of which the worker can attach {chosen.slots} at a time: copied "
            f"in {counted(waves, 'wave')}",
        )
    sku = next(sku for sku in subject.context.azure.sizes(location) if sku["name"] == chosen.name)
    rate = skus.capability(sku, "UncachedDiskBytesPerSecond")
    total = sum(disk.size_bytes for disk in subject.disks)
    if rate and total:
        yield fine(
            "copy",
            f"{chosen.name} reads {amount(rate)}/s: {duration(total / rate)} for a full read of {amount(total)}",
        )
    return sku


def capacity(subject: Subject, sku: Json) -> Iterator[Finding]:
    """Check the quotas for the worker and for the disks and snapshots of a run."""
    left = yield from remaining(
        lambda: subject.context.azure.compute_usages(subject.context.environment.location)
    )
    if left is None:
        return
    location, cores = subject.context.environment.location, int(skus.capability(sku, "vCPUs")) or 1
    remedy = "Free some, ask for a higher quota, or choose a smaller export_worker_size."
    for name, title in (("cores", "vCPUs of the location"), ("virtualMachines", "VMs of the location")):
        needed = 1 if name == "virtualMachines" else cores
        if left.get(name.lower(), UNLIMITED) < needed:
            rest = left[name.lower()]
            # While some cores are left, a run tries smaller sizes.
            finding = warning if rest > 0 else error
            yield finding(
                "worker", f"{rest} left of the quota of {title}, but the worker needs {needed}", remedy
            )
    for name, needed in _disks_needed(subject, int(skus.capability(sku, "MaxDataDiskCount"))).items():
        if left.get(name.lower(), UNLIMITED) < needed:
            rest = left[name.lower()]
            yield error(
                "clone",
                f"{rest} left of the quota of {name} in {location}, but a run needs {needed} at once",
                "Delete unused disks and snapshots, ask for a higher quota, or leave disks out with exclude_disks.",
            )
    family = str(sku.get("family", ""))
    rest = left.get(family.lower(), UNLIMITED)
    if rest < cores:
        yield warning(
            "worker",
            f"{counted(rest, 'vCPU')} left of the quota of {family}, but {sku['name']} needs {cores}: another size "
            "will be tried",
            "Ask for a higher quota, or choose an export_worker_size of another family.",
        )


def _disks_needed(subject: Subject, slots: int) -> dict[str, int]:
    """How many disks and snapshots a run has at once, by quota name. Clones are created in waves."""
    managed = [disk for disk in subject.disks if not disk.unmanaged]
    kinds = [cloning.clone_sku(disk).removesuffix("_LRS").replace("_", "") for disk in managed]
    needed = {f"{kind}DiskCount": min(kinds.count(kind), slots) for kind in kinds}
    own = "StandardSSDDiskCount" if subject.context.azure.is_modern else "StandardDiskCount"
    needed[own] = needed.get(own, 0) + 1  # the worker's own
    return {**needed, "StandardSnapshotCount": len(managed)} if managed else needed


def image(subject: Subject) -> Iterator[Finding]:
    """Check the worker's image."""
    events: list[Event] = []
    chosen = yield from ask(
        "worker",
        lambda: images.choose_image(subject.context.azure, subject.context.environment, events.append),
    )
    if events:
        yield warning("worker", _texts(events), "Set export_worker_image to an image that exists.")
    if chosen is not None:
        yield fine("worker", f"image {chosen} exists")


def encryption(subject: Subject) -> Iterator[Finding]:
    """Check that the disk encryption set of the settings exists in the location."""
    azure, environment = subject.context.azure, subject.context.environment
    if (yield from ask("worker", lambda: launch.check_encryption(azure, environment))):
        name = names.name_of(environment.export_worker_disk_encryption_set)
        yield fine("worker", f"disk encryption set {name} can be read, for the worker's own disk")


def _why_not(azure: Azure, environment: Environment, zone: str) -> str:
    """Why a worker cannot use the size of the settings."""
    configured = environment.export_worker_size.lower()
    sku = next((sku for sku in azure.sizes(environment.location) if sku["name"].lower() == configured), None)
    if sku is None:
        return f"{environment.location} does not have it"
    obstacles = [
        f"{restriction.get('reasonCode', 'restricted')} in {_places(restriction)}"
        for restriction in sku.get("restrictions", [])
        if restriction.get("type") != "Zone" or zone in at(restriction, "restrictionInfo.zones", [])
    ]
    zones = skus.zones_of(sku, environment.location)
    if zone and zones is not None and zone not in zones:
        obstacles.append(f"sold in {_zones(zones)}, not in zone {zone}")
    has = skus.capabilities(sku)
    return ", ".join(obstacles) or (
        f"processor {has.get('CpuArchitectureType', 'x64')}, disks {has.get('DiskControllerTypes', 'SCSI')}, "
        f"premium disks {has.get('PremiumIO', 'False')}, generations {has.get('HyperVGenerations', 'V1,V2')}"
    )


def _places(restriction: Json) -> str:
    zones = at(restriction, "restrictionInfo.zones", [])
    return _zones(zones) if zones else ", ".join(restriction.get("values", [])) or "this location"


def _zones(zones: Iterable[str]) -> str:
    """A description of the zones; "no zone" for none."""
    return f"zones {', '.join(sorted(zones))}" if zones else "no zone"


def _texts(events: Iterable[Event]) -> str:
    return "; ".join(event.text for event in events if isinstance(event, Notice))
