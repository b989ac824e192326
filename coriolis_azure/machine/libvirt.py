"""A domain of libvirt that boots the images of a replica with the hardware that the VM had, as far as there is such.

Pure. Built from the export info (see `export_info`). The disks are on a bus whose driver the system has by itself:

* Linux: virtio-scsi. Kernels for clouds lack AHCI (Debian's has none), but all have virtio, which other clouds use.
* others, such as Windows: AHCI, six disks to a controller. AHCI knows no sectors of 4096 bytes, so disks with those are
  on an LSI SAS controller; Azure boots from none of them.

The name and the UUID are those of the VM and the place together: replicas of one VM at two places are two domains, and
defining the domain of a later run replaces the earlier one.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ..errors import InvalidInput, cleaned
from ..model import Image, Json

DOWNLOADS = (
    "/var/lib/libvirt/images"  # images that are downloaded first are expected there, in a folder of the name
)
UNKNOWN_SIZE = (2, 4096)  # vCPUs and memory in MiB, if Azure no longer describes the VM's size
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")  # libvirt refuses those of multicasts
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_ON_AHCI, _ON_SAS = 6, 8  # disks that one controller takes


def domain(info: Json, images: Mapping[str, Image], where: str) -> bytes:
    """The domain of the VM `info` with these images, by the names of their disks. `where`: the place of the replica.

    Raises InvalidInput if XML cannot hold the path of an image.
    """
    id = uuid.uuid5(uuid.NAMESPACE_URL, f"{info['id'].lower()}\n{where}")
    root = Element("domain", type="kvm")
    name = _name(info["name"], id)
    _text(root, "name", name)
    _text(root, "uuid", str(id))
    _text(root, "title", cleaned(info["name"]))
    missing = [disk["name"] for disk in info["devices"]["disks"] if disk["name"] not in images]
    left_out = f", without {', '.join(missing)}" if missing else ""
    _text(root, "description", cleaned(f"{info['id']} as of {info['point']}{left_out}"))
    # In KiB, as libvirt itself writes it: virt-v2v ignores the unit.
    _text(root, "memory", str((info["memory_mb"] or UNKNOWN_SIZE[1]) << 10), unit="KiB")
    _text(root, "vcpu", str(info["num_cpu"] or UNKNOWN_SIZE[0]))
    _boot(root, is_efi=info["firmware_type"] == "EFI")
    SubElement(root, "cpu", mode="host-passthrough")
    SubElement(root, "clock", offset="utc")
    devices = SubElement(root, "devices")
    is_linux = info["os_type"] == "linux"
    found = [disk for disk in info["devices"]["disks"] if disk["name"] in images]
    _disks(devices, found, {disk: _at(image, name) for disk, image in images.items()}, is_linux=is_linux)
    for nic in info["devices"]["nics"]:
        _nic(devices, nic.get("mac_address") or "", "virtio" if is_linux else "e1000e")
    _console(devices)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return text + b"\n"


def _name(vm: str, id: uuid.UUID) -> str:
    """A name that libvirt, and the file names that it makes of it, can hold."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', vm).strip('-.')[:50] or 'vm'}-{id.hex[:8]}"


def _boot(root: Element, *, is_efi: bool) -> None:
    """The firmware: EFI without secure boot, whose keys and variables are not copied; BIOS is libvirt's default."""
    os = SubElement(root, "os", {"firmware": "efi"} if is_efi else {})
    _text(os, "type", "hvm", arch="x86_64", machine="q35")
    if is_efi:
        firmware = SubElement(os, "firmware")
        SubElement(firmware, "feature", enabled="no", name="enrolled-keys")
        SubElement(firmware, "feature", enabled="no", name="secure-boot")
    features = SubElement(root, "features")
    SubElement(features, "acpi")
    SubElement(features, "apic")


def _disks(devices: Element, disks: list[Json], images: Mapping[str, Image], *, is_linux: bool) -> None:
    """The disks and their controllers. The OS disk is first, and the only one to boot from."""
    used = {"sata": 0, "scsi": 0}
    for number, disk in enumerate(disks):
        bus = "scsi" if is_linux or disk["sector_bytes"] != 512 else "sata"
        element = _disk(images[disk["name"]], _device_name(number), bus)
        devices.append(element)
        if disk["name"] == "os":
            SubElement(element, "boot", order="1")
        if disk["sector_bytes"] != 512:
            size = str(disk["sector_bytes"])
            SubElement(element, "blockio", logical_block_size=size, physical_block_size=size)
        place = used[bus]
        used[bus] += 1
        if bus == "sata":
            at = {"controller": place // _ON_AHCI, "target": 0, "unit": place % _ON_AHCI}
        elif is_linux:
            at = {"controller": 0, "target": place, "unit": 0}
        else:
            at = {"controller": place // _ON_SAS, "target": place % _ON_SAS, "unit": 0}
        numbers = {name: str(value) for name, value in at.items()}
        SubElement(element, "address", {"type": "drive", "bus": "0", **numbers})
    for index in range(-(-used["sata"] // _ON_AHCI)):
        SubElement(devices, "controller", type="sata", index=str(index))
    for index in range(min(1, used["scsi"]) if is_linux else -(-used["scsi"] // _ON_SAS)):
        model = "virtio-scsi" if is_linux else "lsisas1068"
        SubElement(devices, "controller", type="scsi", index=str(index), model=model)


def _disk(image: Image, device: str, bus: str) -> Element:
    element = Element("disk", type="block" if image.is_device else "file", device="disk")
    SubElement(element, "driver", name="qemu", type=image.format)
    SubElement(element, "source", {"dev" if image.is_device else "file": image.path})
    SubElement(element, "target", dev=device, bus=bus)
    return element


def _at(image: Image, domain: str) -> Image:
    """The image with an absolute path."""
    if _CONTROL.search(image.path):
        raise InvalidInput(
            f"the path {image.path} cannot be written in XML",
            remedy="Use a folder whose path is valid UTF-8, without control characters.",
        )
    if image.path.startswith("/"):
        return image
    return Image(f"{DOWNLOADS}/{domain}/{image.path}", image.format)


def _device_name(number: int) -> str:
    """sda to sdz, sdaa and so on."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"sd{letters}"


def _nic(devices: Element, mac: str, model: str) -> None:
    interface = SubElement(devices, "interface", type="network")
    if _MAC.fullmatch(mac):
        SubElement(interface, "mac", address=mac)
    SubElement(interface, "source", network="default")
    SubElement(interface, "model", type=model)


def _console(devices: Element) -> None:
    """A serial console, and a screen that only this host can see."""
    serial = SubElement(devices, "serial", type="pty")
    SubElement(serial, "target", port="0")
    console = SubElement(devices, "console", type="pty")
    SubElement(console, "target", type="serial", port="0")
    SubElement(devices, "graphics", type="vnc", autoport="yes", listen="127.0.0.1")
    SubElement(SubElement(devices, "video"), "model", type="vga")


def _text(parent: Element, tag: str, text: str, **attributes: str) -> None:
    SubElement(parent, tag, attributes).text = text
