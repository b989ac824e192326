"""The domain model: frozen values that convert to JSON and back, so that any process can resume another's work.

Secrets are kept out of `repr`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import Unreadable

Json = dict[str, Any]


def canonical_location(name: str) -> str:
    """A location in canonical form: "West Europe" and "westeurope" are the same to ARM."""
    return name.replace(" ", "").lower()


def at(document: Json, path: str, default: Any = None) -> Any:
    """The value at a dotted path of a document; `default` if a part is missing or null."""
    value: Any = document
    for part in path.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            return default
        value = value[part]
    return value


def must(document: Json, path: str) -> Any:
    """The value at a dotted path of Azure's document. Raises Unreadable if it is missing, null or ""."""
    value = at(document, path)
    if value is None or value == "":
        raise Unreadable(f"Azure's document of {document.get('id') or 'a resource'} lacks {path}")
    return value


@dataclass(frozen=True)
class Disk:
    """A disk of a VM. `name` is its role in the VM: `os`, or `data-<lun>`. Sizes are in bytes.

    `bytes_per_second` is Azure's throughput limit for it, 0 if unknown. An `unmanaged` disk is a VHD blob, whose URL is
    its id.
    """

    id: str
    name: str
    lun: int | None
    size_bytes: int
    unique_id: str
    sku: str
    caching: str
    zones: tuple[str, ...] = ()
    shareable: bool = False
    sector_bytes: int = 512
    encryption_set: str = ""
    encryption_type: str = ""
    bytes_per_second: int = 0
    unmanaged: bool = False

    @classmethod
    def from_json(cls, raw: Json) -> Disk:
        """The disk of a machine's `to_json`."""
        return cls(**{**raw, "zones": tuple(raw["zones"])})


@dataclass(frozen=True)
class Image:
    """Where other programs find the image of a disk: an absolute path, or the name of a file that is downloaded first.

    `format` is QEMU's name for it: `raw`, or `vpc` for a VHD. `is_device`: whether it is a block device.
    """

    path: str
    format: str = "raw"
    is_device: bool = False


@dataclass(frozen=True)
class Nic:
    """A network interface of a VM. `network` is `vnet/subnet`; `mac` is in Azure's format, "" before the first boot."""

    id: str
    name: str
    mac: str
    network: str
    subnet_id: str
    private_addresses: tuple[str, ...]
    public_address: str
    primary: bool

    @classmethod
    def from_json(cls, raw: Json) -> Nic:
        """The NIC of a machine's `to_json`."""
        return cls(**{**raw, "private_addresses": tuple(raw["private_addresses"])})


@dataclass(frozen=True)
class Machine:
    """A VM as Azure describes it. The OS disk comes first, data disks follow by LUN. `memory_mb` is in MiB.

    `caveats` are what users should know before they move it; `plan` is a marketplace plan, publisher:product:name.
    """

    id: str
    name: str
    group: str
    location: str
    zones: tuple[str, ...]
    size: str
    vcpus: int
    memory_mb: int
    os_type: str
    firmware: str
    secure_boot: bool
    hostname: str
    power_state: str
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    security: str = "Standard"
    plan: str = ""
    licence: str = ""
    caveats: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Json) -> Machine:
        """The inverse of `to_json`."""
        return cls(
            **{
                **raw,
                "zones": tuple(raw["zones"]),
                "disks": tuple(Disk.from_json(disk) for disk in raw["disks"]),
                "nics": tuple(Nic.from_json(nic) for nic in raw["nics"]),
                "caveats": tuple(raw["caveats"]),
            }
        )


@dataclass(frozen=True)
class Run:
    """What all temporary resources of a run have in common: enough to find and delete them from any host.

    `pool` is set for resources that outlive transfers: a reusable worker, or what such workers share.
    """

    id: str
    subscription: str
    group: str
    location: str
    zone: str
    instance: str
    pool: str = ""

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Json) -> Run:
        """The inverse of `to_json`."""
        return cls(**raw)


@dataclass(frozen=True)
class Record:
    """What is recorded, outside the orchestrator, about a volume that its writers cannot read back.

    `disk` is a digest of the id of the source disk. `holds` names the state that the volume holds, "" if unknown.
    `writer` is the run that may write to it, "" for none. `beat` changes with each sign of life of the writer.
    """

    id: str
    disk: str
    holds: str = ""
    writer: str = ""
    beat: str = ""

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Worker:
    """Everything that another process needs to reach a running worker and attach disks to it.

    `rate`: its read throughput in bytes per second, 0 if that is unknown. `shared`: clones of other runs are attached
    to it, too, so it is not stopped for this one.
    """

    vm: str
    address: str
    port: int
    username: str
    host_key: str
    slots: int
    private_key: str = field(repr=False)
    rate: float = 0.0
    shared: bool = False
