"""What the sandbox's regions offer: sizes, disk types, images. Only tables, a selection of Azure's real ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from coriolis_azure.errors import InvalidInput
from coriolis_azure.sandbox.wire import Json

LOCATIONS = {
    "westeurope": ("West Europe", ("1", "2", "3")),
    "northeurope": ("North Europe", ("1", "2", "3")),
    "westus": ("West US", ()),
}


@dataclass(frozen=True)
class VmSpec:
    """What kind of VM to make. `os_type`: linux or windows. `data_sku`: the account type of the data disks.

    With `unmanaged`, the name of a storage account (made if missing), its disks are VHD blobs there, and the VM is
    deallocated, like all such VMs here.
    """

    size: str = "Standard_D2s_v5"
    os_type: str = "linux"
    zone: str | None = None
    data_sku: str = "StandardSSD_LRS"
    unmanaged: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system not in ("Linux", "Windows"):
            raise InvalidInput(f"OS type {self.os_type!r} is unknown; use linux or windows")

    @property
    def system(self) -> str:
        """The OS type as Azure writes it."""
        return self.os_type.capitalize()


@dataclass(frozen=True)
class Size:
    """A VM size: its capabilities, and where it is unavailable."""

    name: str
    family: str
    cores: int
    memory_gib: float
    data_disks: int
    bytes_per_second: int
    premium: bool = True
    controllers: str = "SCSI"
    generations: str = "V1,V2"
    architecture: str = "x64"
    accelerated: bool = True
    temporary_mib: int = 0
    closed_in: tuple[str, ...] = field(default=())
    # Zones without this size in any location. Azure shows that only in `locationInfo`, not in the restrictions.
    closed_zones: tuple[str, ...] = field(default=())

    def zones(self, location: str) -> list[str]:
        """The zones of a location in which the size is available."""
        return [zone for zone in LOCATIONS[location][1] if zone not in self.closed_zones]

    def capabilities(self) -> list[Json]:
        """The capabilities as in the SKU list, where all values are strings."""
        values = {
            "MaxResourceVolumeMB": str(self.temporary_mib),
            "OSVhdSizeMB": "1047552",
            "vCPUs": str(self.cores),
            "MemoryPreservingMaintenanceSupported": "True",
            "HyperVGenerations": self.generations,
            "DiskControllerTypes": self.controllers,
            "MemoryGB": f"{self.memory_gib:g}",
            "MaxDataDiskCount": str(self.data_disks),
            "CpuArchitectureType": self.architecture,
            "LowPriorityCapable": "True",
            "PremiumIO": str(self.premium),
            "VMDeploymentTypes": "IaaS",
            "vCPUsAvailable": str(self.cores),
            "vCPUsPerCore": "2",
            "UncachedDiskIOPS": str(self.cores * 1875),
            "UncachedDiskBytesPerSecond": str(self.bytes_per_second),
            "EphemeralOSDiskSupported": str(self.temporary_mib > 0),
            "EncryptionAtHostSupported": "True",
            "AcceleratedNetworkingEnabled": str(self.accelerated),
            "RdmaEnabled": "False",
            "MaxNetworkInterfaces": "2",
        }
        return [{"name": name, "value": value} for name, value in values.items()]


_MB = 1_000_000
_SIZES = (
    Size("Standard_D2s_v5", "standardDSv5Family", 2, 8, 4, 85 * _MB),
    Size("Standard_D4s_v5", "standardDSv5Family", 4, 16, 8, 145 * _MB),
    Size("Standard_D8s_v5", "standardDSv5Family", 8, 32, 16, 290 * _MB),
    Size("Standard_D2as_v5", "standardDASv5Family", 2, 8, 4, 82 * _MB, closed_zones=("3",)),
    Size(
        "Standard_D2s_v3",
        "standardDSv3Family",
        2,
        8,
        4,
        48 * _MB,
        temporary_mib=16384,
        closed_in=("northeurope",),
        closed_zones=("3",),
    ),
    Size("Standard_D2s_v4", "standardDSv4Family", 2, 8, 4, 48 * _MB, closed_zones=("3",)),
    Size("Standard_D2_v5", "standardDv5Family", 2, 8, 4, 85 * _MB, premium=False),
    Size("Standard_D2s_v6", "standardDsv6Family", 2, 8, 8, 106 * _MB, controllers="NVMe", generations="V2"),
    Size(
        "Standard_D2ps_v5", "standardDPSv5Family", 2, 8, 4, 85 * _MB, generations="V2", architecture="Arm64"
    ),
    Size("Standard_B2ms", "standardBSFamily", 2, 8, 4, 22 * _MB, accelerated=False, temporary_mib=16384),
    Size("Standard_B1s", "standardBSFamily", 1, 1, 2, 10 * _MB, accelerated=False, temporary_mib=4096),
    Size(
        "Standard_DS2_v2", "standardDSv2Family", 2, 7, 8, 96 * _MB, temporary_mib=14336, closed_zones=("3",)
    ),
    Size(
        "Standard_F2s_v2", "standardFSv2Family", 2, 4, 4, 47 * _MB, temporary_mib=16384, closed_zones=("3",)
    ),
    Size("Standard_E2s_v5", "standardESv5Family", 2, 16, 4, 85 * _MB),
    Size("Standard_E4s_v5", "standardESv5Family", 4, 32, 8, 145 * _MB),
)
SIZES = {size.name.lower(): size for size in _SIZES}

DISK_SKUS = {
    "Standard_LRS": "Standard",
    "StandardSSD_LRS": "Standard",
    "StandardSSD_ZRS": "Standard",
    "Premium_LRS": "Premium",
    "Premium_ZRS": "Premium",
    "UltraSSD_LRS": "Ultra",
    "PremiumV2_LRS": "Premium",
}
# For data disks only, without caching; their snapshots are incremental and copied in the background.
FILLED_LATER = {"UltraSSD_LRS", "PremiumV2_LRS"}
SNAPSHOT_SKUS = {"Standard_LRS": "Standard", "Premium_LRS": "Premium", "Standard_ZRS": "Standard"}


@dataclass(frozen=True)
class Image:
    """A marketplace image."""

    publisher: str
    offer: str
    sku: str
    versions: tuple[str, ...]
    os_type: str = "Linux"
    generation: str = "V2"
    disk_gib: int = 30
    architecture: str = "x64"
    os_name: str = "ubuntu"
    os_version: str = "24.04"

    def document(self) -> Json:
        """The properties of one version in the image API."""
        return {
            "osDiskImage": {"operatingSystem": self.os_type},
            "dataDiskImages": [],
            "hyperVGeneration": self.generation,
            "architecture": self.architecture,
            "automaticOSUpgradeProperties": {"automaticOSUpgradeSupported": False},
            "features": [{"name": "DiskControllerTypes", "value": "SCSI, NVMe"}]
            if self.generation == "V2"
            else [],
        }


IMAGES = (
    Image("Canonical", "ubuntu-24_04-lts", "server", ("24.04.202606100", "24.04.202607220")),
    Image("Canonical", "ubuntu-24_04-lts", "server-gen1", ("24.04.202607220",), generation="V1"),
    Image("Canonical", "ubuntu-24_04-lts", "server-arm64", ("24.04.202607220",), architecture="Arm64"),
    Image(
        "Canonical",
        "0001-com-ubuntu-server-jammy",
        "22_04-lts-gen2",
        ("22.04.202607150",),
        os_version="22.04",
    ),
    Image(
        "Debian",
        "debian-12",
        "12-gen2",
        ("0.20260601.2300", "0.20260714.2350"),
        os_name="debian",
        os_version="12",
    ),
    Image("Debian", "debian-13", "13-gen2", ("0.20260714.2350",), os_name="debian", os_version="13"),
    Image(
        "MicrosoftWindowsServer",
        "WindowsServer",
        "2022-datacenter-g2",
        ("20348.2700.260701",),
        os_type="Windows",
        disk_gib=127,
        os_name="Windows Server 2022 Datacenter",
        os_version="10.0.20348",
    ),
)


def image(publisher: str, offer: str, sku: str) -> Image | None:
    """The image with these names, ignoring case."""
    names = (publisher.lower(), offer.lower(), sku.lower())
    return next(
        (
            candidate
            for candidate in IMAGES
            if (candidate.publisher.lower(), candidate.offer.lower(), candidate.sku.lower()) == names
        ),
        None,
    )


def skus(location: str | None) -> list[Json]:
    """The SKU list of one location, or of all."""
    regions = [name for name in LOCATIONS if location is None or name == location.lower()]
    rows = []
    for region in regions:
        rows += [_size_sku(size, region) for size in _SIZES]
        rows += [_disk_sku(name, tier, region) for name, tier in DISK_SKUS.items()]
    return rows


def _size_sku(size: Size, location: str) -> Json:
    series, _, number = size.name.removeprefix("Standard_").partition("_")
    restrictions = []
    if location in size.closed_in:
        restrictions.append(
            {
                "type": "Location",
                "values": [location],
                "restrictionInfo": {"locations": [location]},
                "reasonCode": "NotAvailableForSubscription",
            }
        )
    return {
        "resourceType": "virtualMachines",
        "name": size.name,
        "tier": "Standard",
        "size": f"{series}_{number}" if number else series,
        "family": size.family,
        "locations": [location],
        "locationInfo": [{"location": location, "zones": size.zones(location), "zoneDetails": []}],
        "capabilities": size.capabilities(),
        "restrictions": restrictions,
    }


def _disk_sku(name: str, tier: str, location: str) -> Json:
    return {
        "resourceType": "disks",
        "name": name,
        "tier": tier,
        "locations": [location],
        "locationInfo": [{"location": location, "zones": list(LOCATIONS[location][1]), "zoneDetails": []}],
        "capabilities": [],
        "restrictions": [],
    }
