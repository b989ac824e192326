"""Recognizes disk image formats other than raw by their magic numbers. Pure.

An image in such a format is a container: its bytes are not those of the disk, and a machine that uses it as a raw disk
does not boot. Sources: QEMU's `docs/interop/qcow2.rst`, VMware's Virtual Disk Format 5.0, Microsoft's VHD 1.0 and
MS-VHDX specifications, VirtualBox's `VDICore.h`.
"""

from __future__ import annotations

HEAD = 1024  # bytes to inspect at the start
TAIL = 512  # and at the end
_HEADS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
)


def wrapped(head: bytes, tail: bytes = b"") -> str:
    """The format of an image that starts and ends with these bytes; "" if it may be raw.

    A fixed VHD can be recognized only by its end.
    """
    for offset, magic, name in _HEADS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return "VHD" if tail[-TAIL:].startswith(b"conectix") else ""


def remedy(name: str) -> str:
    """The remedy for an image in a format that `wrapped` has recognized."""
    qemu_name = {"VHD": "vpc"}.get(name, name.lower())
    return f"Convert it to a raw image: qemu-img convert -f {qemu_name} -O raw IMAGE IMAGE.raw"
