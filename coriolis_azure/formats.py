"""The formats of disk images that are not raw, told by their magic numbers. Pure.

An image in such a format is a container: its bytes are not those of the disk, and taken for a raw disk it makes a
machine that does not boot. Sources: QEMU's `docs/interop/qcow2.rst`, VMware's Virtual Disk Format 5.0, Microsoft's VHD
1.0 and MS-VHDX specifications, VirtualBox's `VDICore.h`.
"""

from __future__ import annotations

HEAD = 1024  # bytes from the start that are looked at
TAIL = 512  # and from the end
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
    """The format of an image that begins and ends with these bytes; "" where nothing speaks against a raw one.

    A fixed VHD shows only at its end.
    """
    for offset, magic, name in _HEADS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return "VHD" if tail[-TAIL:].startswith(b"conectix") else ""


def remedy(name: str) -> str:
    """What to do with an image in the format that `wrapped` has found."""
    word = {"VHD": "vpc"}.get(name, name.lower())
    return f"Make a raw image of it: qemu-img convert -f {word} -O raw IMAGE IMAGE.raw"
