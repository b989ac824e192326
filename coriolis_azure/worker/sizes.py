"""Which VM size the worker gets, chosen from what the location offers to the subscription."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from ..azure import skus
from ..azure.client import Azure
from ..errors import InvalidInput
from ..events import Notice, Report
from ..model import Disk, Json, Machine
from ..settings import Environment

# A worker that reads faster than this is not chosen for its speed: the network to the destination is slower.
ENOUGH = 600_000_000
# Two vCPUs read as fast as such a size may; larger ones follow for machines with more or faster disks.
SIZES = tuple(
    f"Standard_{size}"
    for size in (
        *("D2s_v5", "D2as_v5", "D2s_v4", "D2s_v3", "DS2_v2", "F2s_v2", "B2ms"),
        *("D4s_v5", "D4as_v5", "D4s_v4", "D4s_v3", "D8s_v5", "D8as_v5", "D8s_v4", "D8s_v3"),
        *("D16s_v5", "D16as_v5", "D16s_v3", "D32s_v5", "D32as_v5", "D32s_v3"),
    )
)
# Of less a Linux image may not boot. It counts only for sizes that nobody asked for.
_MEMORY_GIB = 2


@dataclass(frozen=True)
class Size:
    """A VM size a worker may have; `slots` is how many clones it holds at once, `rate` what it reads: bytes a second.

    `rate`, `vcpus` and `memory_gib` are 0 where Azure does not tell them.
    """

    name: str
    slots: int
    rate: float = field(default=0, compare=False)
    vcpus: float = field(default=0, compare=False)
    memory_gib: float = field(default=0, compare=False)
    family: str = field(default="", compare=False)


@dataclass(frozen=True)
class Needs:
    """What a worker must be able to hold: that many disks, premium ones among them, in that zone ("" for none).

    `rate` is what these disks give together, in bytes a second.
    """

    disks: int = 1
    premium: bool = False
    zone: str = ""
    rate: int = 0
    host_encryption: bool = False


def needs(machine: Machine, disks: Sequence[Disk]) -> Needs:
    """What a worker must be able to hold to read these disks of `machine`."""
    premium = any(disk.sku.startswith(("Premium", "Ultra")) for disk in disks)
    rate = sum(disk.bytes_per_second for disk in disks)
    return Needs(len(disks), premium, machine.zones[0] if machine.zones else "", rate)


@dataclass(frozen=True)
class Barred:
    """Sizes that Azure has no room for, by lower-cased name, and the families that they are of."""

    names: Set[str] = frozenset()
    families: Set[str] = frozenset()


def choose_size(
    azure: Azure,
    needed: Needs,
    environment: Environment,
    report: Report,
    barred: Barred = Barred(),
) -> Size:
    """The size of the settings where the location and zone offer it, else the first of `SIZES` that suits the disks.

    That is: it holds all of them and reads as fast as they give, up to `ENOUGH`; else the fastest that holds all;
    else the one that holds most. Sizes outside `SIZES` come after them, those of a barred family last. InvalidInput
    when there is none that can be a worker.
    """
    offered = _offered(azure, environment.location, _with_settings(needed, environment))
    offered = {name: size for name, size in offered.items() if name not in barred.names}
    asked = environment.export_worker_size
    if asked.lower() in offered:
        return offered[asked.lower()]
    candidates = _preferred(offered, barred.families)
    if not candidates:
        zone = f" zone {needed.zone}" if needed.zone else ""
        raise InvalidInput(
            f"{environment.location}{zone} offers this subscription no VM size that can be a worker",
            remedy="Ask for access to a general purpose size (Dsv5, Dsv3, ...) in that location and zone.",
        )
    chosen = _suited(candidates, needed)
    if asked and asked.lower() not in barred.names:
        report(
            Notice(
                f"export_worker_size {asked} cannot be used in {environment.location} today (retired, restricted or "
                f"unfit): using {chosen.name} instead"
            )
        )
    return chosen


def _preferred(offered: Mapping[str, Size], families: Set[str]) -> list[Size]:
    """The best sizes there are: of `SIZES` and of no barred family, else what comes next.

    A family that has no room for one size rarely has it for another: both run on the same machines.
    """
    listed = [offered[size.lower()] for size in SIZES if size.lower() in offered]
    others = sorted(
        (size for size in offered.values() if size not in listed),
        key=lambda size: (size.memory_gib < _MEMORY_GIB, size.vcpus, size.slots, size.name),
    )
    fresh = [[size for size in sizes if size.family not in families] for sizes in (listed, others)]
    return next((sizes for sizes in (*fresh, listed, others) if sizes), [])


def _suited(candidates: Sequence[Size], needed: Needs) -> Size:
    """The first of the candidates that suits the disks."""
    most = max(candidates, key=lambda size: size.slots)
    holding = [size for size in candidates if size.slots >= needed.disks] or [most]
    fast = [size for size in holding if size.rate >= min(needed.rate, ENOUGH)]
    return fast[0] if fast else max(holding, key=lambda size: size.rate)


def as_large(azure: Azure, needed: Needs, environment: Environment, size: Size, barred: Barred) -> set[str]:
    """The sizes with as many vCPUs as one that a quota was too small for, if smaller ones of `SIZES` are left."""
    offered = _offered(azure, environment.location, _with_settings(needed, environment))
    ours = {name.lower() for name in SIZES} - barred.names
    smaller = {name for name, one in offered.items() if name in ours and one.vcpus < size.vcpus}
    return {name for name in offered if name not in smaller} if smaller else set()


def sizes(azure: Azure, location: str) -> list[str]:
    """The sizes that can be a worker in `location` today, those of our list first."""
    offered = _offered(azure, location, Needs())
    ours = [offered.pop(size.lower()).name for size in SIZES if size.lower() in offered]
    return ours + sorted(size.name for size in offered.values())


def _with_settings(needed: Needs, environment: Environment) -> Needs:
    """What the disks need, and what the settings demand."""
    return replace(needed, host_encryption=environment.export_worker_encryption_at_host)


def _offered(azure: Azure, location: str, needed: Needs) -> dict[str, Size]:
    """The usable sizes of `location`, by lower-cased name."""
    found = (_usable(sku, location, needed) for sku in azure.sizes(location))
    return {size.name.lower(): size for size in found if size is not None}


def _usable(sku: Json, location: str, needed: Needs) -> Size | None:
    """The size as a worker, or None where it cannot be one."""
    told = skus.capabilities(sku)
    slots = int(skus.capability(sku, "MaxDataDiskCount"))
    zones = skus.zones_of(sku, location)
    fits = (
        slots > 0
        and told.get("CpuArchitectureType", "x64") == "x64"
        and "SCSI" in told.get("DiskControllerTypes", "SCSI")
        and "V2" in told.get("HyperVGenerations", "V1,V2")
        and (told.get("PremiumIO", "False") == "True" or not needed.premium)
        and (told.get("EncryptionAtHostSupported", "False") == "True" or not needed.host_encryption)
        and not told.get("ConfidentialComputingType")  # takes confidential VMs only
        and (not needed.zone or zones is None or needed.zone in zones)
        and not any(skus.bars(restriction, needed.zone) for restriction in sku.get("restrictions", []))
    )
    rate, vcpus, memory = (
        skus.capability(sku, name) for name in ("UncachedDiskBytesPerSecond", "vCPUs", "MemoryGB")
    )
    return Size(sku["name"], slots, rate, vcpus, memory, str(sku.get("family", ""))) if fits else None
