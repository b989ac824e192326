"""The footer of a fixed VHD: 512 bytes after the content that say what it is and how large it is.

Pure. Layout: Virtual Hard Disk Image Format Specification 1.0, big endian. Azure takes fixed VHDs whose size is
a multiple of 1 MiB. The size in bytes is what counts; the geometry of cylinders, heads and sectors cannot express
most sizes and is there for the format's sake.
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
# Readers take the size, not the geometry, as the truth where Hyper-V names itself as the creator.
_CREATOR, _CREATOR_VERSION, _CREATOR_HOST = b"win ", 0x000A0000, b"Wi2k"
_CHECKSUM = slice(64, 68)
_KINDS = {3: "a dynamic", 4: "a differencing"}


def rounded(size: int) -> int:
    """The size of a VHD that holds `size` bytes: a multiple of 1 MiB."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def footer(size: int, identity: uuid.UUID, made: datetime) -> bytes:
    """The footer of a fixed VHD of `size` bytes."""
    fields = [_COOKIE, _RESERVED, _VERSION, _NO_OFFSET, int((made - _EPOCH).total_seconds())]
    fields += [_CREATOR, _CREATOR_VERSION, _CREATOR_HOST, size, size, *_geometry(size), _FIXED]
    unsigned = _LAYOUT.pack(*fields, 0, identity.bytes, 0)
    return _LAYOUT.pack(*fields, _checksum(unsigned), identity.bytes, 0)


def content_size(last: bytes, length: int, name: str) -> int:
    """The size of the disk in a fixed VHD of `length` bytes that ends with `last`; `name` is for messages.

    Unsupported where it is no such thing, or its footer is damaged or speaks of another size.
    """
    if len(last) != FOOTER or last[:8] != _COOKIE:
        raise _unusable(name, "it does not end with the footer of a VHD")
    if int.from_bytes(last[_CHECKSUM], "big") != _checksum(last):
        raise _unusable(name, "its VHD footer is damaged: the checksum does not fit")
    fields = _LAYOUT.unpack(last)
    size, kind = fields[9], fields[13]
    if kind != _FIXED:
        raise _unusable(name, f"it is {_KINDS.get(kind, 'another kind of')} VHD, not a fixed one")
    if size != length - FOOTER:
        raise _unusable(name, f"its VHD footer speaks of {size} bytes, but {length - FOOTER} are there")
    if size == 0 or size % FOOTER:
        raise _unusable(name, f"a disk of {size} bytes is none")
    return int(size)


def _checksum(data: bytes) -> int:
    """The complement of the sum of all bytes but those of the checksum itself."""
    return ~(sum(data) - sum(data[_CHECKSUM])) & 0xFFFFFFFF


def _geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track, by the specification's own algorithm."""
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
