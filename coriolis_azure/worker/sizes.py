"""Chooses the worker's VM size from those that the location offers to the subscription."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from ..azure import skus
from ..azure.client import Azure
from ..errors import InvalidInput
from ..events import Notice, Report
from ..model import Disk, Json, Machine
from ..settings import Environment

# More read throughput than this (bytes per second) is of no use: the network to the destination is slower.
ENOUGH = 600_000_000
_AT_A_TIME = 4  # disks: each is read by a process of its own, and the worker has little memory
# In order of preference. Two vCPUs reach the throughput limit of their size; larger sizes are for machines with more or
# faster disks.
SIZES = tuple(
    f"Standard_{size}"
    for size in (
        *("D2s_v5", "D2as_v5", "D2s_v4", "D2s_v3", "DS2_v2", "F2s_v2", "B2ms"),
        *("D4s_v5", "D4as_v5", "D4s_v4", "D4s_v3", "D8s_v5", "D8as_v5", "D8s_v4", "D8s_v3"),
        *("D16s_v5", "D16as_v5", "D16s_v3", "D32s_v5", "D32as_v5", "D32s_v3"),
    )
)
# With less memory a Linux image may not boot. Only for sizes that are in neither the settings nor SIZES.
_MEMORY_GIB = 2


@dataclass(frozen=True)
class Size:
    """A VM size for a worker: `slots` is how many clones it can attach, `rate` its read throughput in bytes per second.

    `rate`, `vcpus` and `memory_gib` are 0 if Azure does not tell them.
    """

    name: str
    slots: int
    rate: float = field(default=0, compare=False)
    vcpus: float = field(default=0, compare=False)
    memory_gib: float = field(default=0, compare=False)
    family: str = field(default="", compare=False)


@dataclass(frozen=True)
class Needs:
    """What the worker must support: the number of disks, premium disks, and the zone ("" for none).

    `rate` is the read throughput, in bytes per second, of as many of the disks as are read at a time.
    """

    disks: int = 1
    premium: bool = False
    zone: str = ""
    rate: int = 0
    host_encryption: bool = False


def at_a_time(rates: Sequence[int], chunk: int) -> int:
    """How many disks a worker reads at a time: those with these `rates` (bytes per second, 0 if unknown).

    Two keep a small worker busy. If Azure limits the disks to less than that, up to four are read. Of chunks larger
    than 1 MiB only one disk is, since each disk takes memory for several.
    """
    if chunk > 1 << 20:
        return 1
    most = max(1, min(_AT_A_TIME, len(rates)))
    total = sum(rates)
    return min(most, max(2, -(-ENOUGH * len(rates) // total))) if total else min(2, most)


def threads_each(disks: int) -> int:
    """How many threads read and hash each of so many `disks` that are read at a time; each has chunks in memory."""
    return 2 if disks <= 2 else 1


def needs(machine: Machine, disks: Sequence[Disk], environment: Environment) -> Needs:
    """The needs of a worker that is to read these disks of `machine`."""
    premium = any(disk.sku.startswith(("Premium", "Ultra")) for disk in disks)
    rates = sorted((disk.bytes_per_second for disk in disks), reverse=True)
    rate = sum(rates[: at_a_time(rates, environment.chunk_size_kib << 10)])
    return Needs(len(disks), premium, machine.zones[0] if machine.zones else "", rate)


@dataclass(frozen=True)
class Barred:
    """Sizes that Azure has no capacity for, by lower-case name, and their families."""

    names: Set[str] = frozenset()
    families: Set[str] = frozenset()


def choose_size(
    azure: Azure,
    needed: Needs,
    environment: Environment,
    report: Report,
    barred: Barred = Barred(),
) -> Size:
    """The size of the settings if the location and zone offer it, else the first of `SIZES` that suits the disks.

    A size suits if it holds all disks and reads as fast as they do, up to `ENOUGH`. If there is none, the fastest that
    holds all disks is chosen, else the one that holds most. Sizes outside `SIZES` come after them, those of a barred
    family last. Raises InvalidInput if no size can be used for a worker.
    """
    offered = _offered(azure, environment.location, _with_settings(needed, environment))
    offered = {name: size for name, size in offered.items() if name not in barred.names}
    configured = environment.export_worker_size
    if configured.lower() in offered:
        return offered[configured.lower()]
    candidates = _preferred(offered, barred.families)
    if not candidates:
        zone = f" zone {needed.zone}" if needed.zone else ""
        raise InvalidInput(
            f"{environment.location}{zone} offers this subscription no VM size that a worker can use",
            remedy="Ask for access to a general purpose size (Dsv5, Dsv3, ...) in that location and zone.",
        )
    chosen = _suited(candidates, needed)
    if configured and configured.lower() not in barred.names:
        report(
            Notice(
                f"export_worker_size {configured} cannot be used in {environment.location} (retired, restricted or "
                f"unsuitable): using {chosen.name} instead"
            )
        )
    return chosen


def _preferred(offered: Mapping[str, Size], families: Set[str]) -> list[Size]:
    """The best group of sizes: those of `SIZES` outside the barred families, else the next best.

    A family that has no capacity for one size rarely has it for another: they share the same hosts.
    """
    listed = [offered[size.lower()] for size in SIZES if size.lower() in offered]
    others = sorted(
        (size for size in offered.values() if size not in listed),
        key=lambda size: (size.memory_gib < _MEMORY_GIB, size.vcpus, size.slots, size.name),
    )
    not_barred = [[size for size in group if size.family not in families] for group in (listed, others)]
    return next((group for group in (*not_barred, listed, others) if group), [])


def _suited(candidates: Sequence[Size], needed: Needs) -> Size:
    """The first of the candidates that suits the disks: see `choose_size`."""
    largest = max(candidates, key=lambda size: size.slots)
    holding = [size for size in candidates if size.slots >= needed.disks] or [largest]
    fast = [size for size in holding if size.rate >= min(needed.rate, ENOUGH)]
    return fast[0] if fast else max(holding, key=lambda size: size.rate)


def as_large(azure: Azure, needed: Needs, environment: Environment, size: Size, barred: Barred) -> set[str]:
    """The sizes with at least as many vCPUs as `size`, for which the quota is too small.

    Empty if no smaller size of `SIZES` is left: then all of them are worth a try.
    """
    offered = _offered(azure, environment.location, _with_settings(needed, environment))
    ours = {name.lower() for name in SIZES} - barred.names
    smaller = {name for name, other in offered.items() if name in ours and other.vcpus < size.vcpus}
    return {name for name in offered if name not in smaller} if smaller else set()


def sizes(azure: Azure, location: str) -> list[str]:
    """The sizes that a worker can use in `location`, those of `SIZES` first."""
    offered = _offered(azure, location, Needs())
    ours = [offered.pop(size.lower()).name for size in SIZES if size.lower() in offered]
    return ours + sorted(size.name for size in offered.values())


def _with_settings(needed: Needs, environment: Environment) -> Needs:
    """The needs of the disks, with what the settings require."""
    return replace(needed, host_encryption=environment.export_worker_encryption_at_host)


def _offered(azure: Azure, location: str, needed: Needs) -> dict[str, Size]:
    """The usable sizes of `location`, by lower-case name."""
    usable = (_usable(sku, location, needed) for sku in azure.sizes(location))
    return {size.name.lower(): size for size in usable if size is not None}


def _usable(sku: Json, location: str, needed: Needs) -> Size | None:
    """The size of a SKU; None if a worker cannot use it."""
    capabilities = skus.capabilities(sku)
    slots = int(skus.capability(sku, "MaxDataDiskCount"))
    zones = skus.zones_of(sku, location)
    fits = (
        slots > 0
        and capabilities.get("CpuArchitectureType", "x64") == "x64"
        and "SCSI" in capabilities.get("DiskControllerTypes", "SCSI")
        and "V2" in capabilities.get("HyperVGenerations", "V1,V2")
        and (capabilities.get("PremiumIO", "False") == "True" or not needed.premium)
        and (capabilities.get("EncryptionAtHostSupported", "False") == "True" or not needed.host_encryption)
        and not capabilities.get("ConfidentialComputingType")  # such sizes accept only confidential VMs
        and (not needed.zone or zones is None or needed.zone in zones)
        and not any(skus.bars(restriction, needed.zone) for restriction in sku.get("restrictions", []))
    )
    rate, vcpus, memory = (
        skus.capability(sku, name) for name in ("UncachedDiskBytesPerSecond", "vCPUs", "MemoryGB")
    )
    return Size(sku["name"], slots, rate, vcpus, memory, str(sku.get("family", ""))) if fits else None
