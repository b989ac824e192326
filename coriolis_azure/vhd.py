"""The footer of a fixed VHD: 512 bytes after the content that give its type and size.

Pure. Layout: Virtual Hard Disk Image Format Specification 1.0, big endian. Azure accepts fixed VHDs whose size is a
multiple of 1 MiB. The size in bytes is authoritative; the geometry (cylinders, heads, sectors) cannot express most
sizes and is present only because the format requires it.
"""

from __future__ import annotations

import struct
import uuid
from datetime import datetime, timezone

from .errors import Unsupported

FOOTER = 512
ALIGNMENT = 1 << 20
_LAYOUT = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_COOKIE = b"conectix"
_FIXED = 2
_RESERVED, _VERSION, _NO_OFFSET = 2, 0x00010000, 0xFFFFFFFFFFFFFFFF
_EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)
# With Hyper-V as the creator, readers rely on the size instead of the geometry.
_CREATOR, _CREATOR_VERSION, _CREATOR_HOST = b"win ", 0x000A0000, b"Wi2k"
_CHECKSUM = slice(64, 68)
_KINDS = {3: "a dynamic", 4: "a differencing"}


def rounded(size: int) -> int:
    """`size`, rounded up to a multiple of 1 MiB."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def footer(size: int, identity: uuid.UUID, made: datetime) -> bytes:
    """The footer of a fixed VHD of `size` bytes."""
    fields = [_COOKIE, _RESERVED, _VERSION, _NO_OFFSET, int((made - _EPOCH).total_seconds())]
    fields += [_CREATOR, _CREATOR_VERSION, _CREATOR_HOST, size, size, *_geometry(size), _FIXED]
    unsigned = _LAYOUT.pack(*fields, 0, identity.bytes, 0)
    return _LAYOUT.pack(*fields, _checksum(unsigned), identity.bytes, 0)


def content_size(last: bytes, length: int, name: str) -> int:
    """The size of the disk in a fixed VHD of `length` bytes that ends with `last`; `name` is for messages.

    Raises Unsupported if it is not a fixed VHD, or if its footer is damaged or gives another size.
    """
    if len(last) != FOOTER or last[:8] != _COOKIE:
        raise _unusable(name, "it does not end with a VHD footer")
    if int.from_bytes(last[_CHECKSUM], "big") != _checksum(last):
        raise _unusable(name, "its VHD footer is damaged: the checksum does not match")
    fields = _LAYOUT.unpack(last)
    size, kind = fields[9], fields[13]
    if kind != _FIXED:
        raise _unusable(name, f"it is {_KINDS.get(kind, 'another kind of')} VHD, not a fixed one")
    if size != length - FOOTER:
        raise _unusable(name, f"its VHD footer gives a size of {size} bytes, but it holds {length - FOOTER}")
    if size == 0 or size % FOOTER:
        raise _unusable(name, f"{size} bytes is not a valid disk size")
    return int(size)


def _checksum(data: bytes) -> int:
    """The complement of the sum of all bytes except those of the checksum itself."""
    return ~(sum(data) - sum(data[_CHECKSUM])) & 0xFFFFFFFF


def _geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track, by the specification's algorithm."""
    sectors = min(size // 512, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    per_track, heads = 17, max(4, (sectors // 17 + 1023) // 1024)
    tracks = sectors // 17
    if tracks >= heads * 1024 or heads > 16:
        per_track, heads, tracks = 31, 16, sectors // 31
    if tracks >= heads * 1024:
        per_track, heads, tracks = 63, 16, sectors // 63
    return tracks // heads, heads, per_track


def _unusable(name: str, why: str) -> Unsupported:
    return Unsupported(
        f"{name} cannot be read as a disk: {why}",
        remedy="Repair or replace the blob, or leave the disk out with exclude_disks.",
    )
