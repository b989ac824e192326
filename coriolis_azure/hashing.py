"""What a destination holds, chunk by chunk, as digests.

Pure. A manifest is never trusted beyond what it says: digest *i* stands there only if the destination's chunk
*i* is known to hold content of that digest; ZERO says that it reads as zeros, UNKNOWN that nothing is known.
The digests are keyed with a secret made for this manifest, so that no guest can write what would collide on
purpose. How they are made is the agent's, which runs where nothing of this package does; docs/performance.md
says why each hash is strong enough.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from . import agent
from .agent import DIGEST, MAX_CHUNK, UNKNOWN, ZERO, Digester, Mac
from .errors import InvalidInput

__all__ = ["DIGEST", "KEY", "MAX_CHUNK", "MIN_CHUNK", "UNKNOWN", "VERSION", "ZERO", "Manifest"]

# 1: digests of 16 bytes over whole chunks. Nothing follows from them for those of now.
VERSION = 2
KEY = 32  # bytes of the secret
MIN_CHUNK = 4096
_FIELDS = {"size": int, "chunk": int, "hash": str, "disk": str, "chunks": str, "check": str}
HASHES = tuple(name for name in agent.HASHES if name == "gmac" or agent.usable(name))  # those of this host
_REMEDY = "Give the document as an earlier run returned it, or none at all: then the whole disk is sent."


@dataclass(frozen=True)
class Manifest:
    """The digests of `size` bytes in chunks of `chunk`; `disk` is the unique id of the Azure disk, or empty.

    `fresh`: nothing was known when it was made, so a run that starts from it is a full one. It is not kept in
    the JSON form.
    """

    size: int
    chunk: int
    hash: str
    key: bytes = field(repr=False)
    digests: bytes = field(repr=False)
    disk: str = ""
    fresh: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """InvalidInput where the parts do not make a manifest."""
        if self.size <= 0:
            raise _wrong(f"the size is {self.size}")
        if not MIN_CHUNK <= self.chunk <= MAX_CHUNK or self.chunk % MIN_CHUNK:
            raise _wrong(f"the chunk size is {self.chunk}, not a multiple of {MIN_CHUNK} up to {MAX_CHUNK}")
        if self.hash not in HASHES:
            raise _wrong(f"hash {self.hash!r} is none of {', '.join(HASHES)}")
        if len(self.key) != KEY or len(self.digests) != DIGEST * self.count:
            raise _wrong(f"it does not hold the {self.count} digests of {self.size} bytes")

    @classmethod
    def new(cls, size: int, chunk: int, disk: str, fill: bytes) -> Manifest:
        """A manifest with a new secret in which every digest is `fill`: ZERO or UNKNOWN."""
        count = -(-size // chunk) if size > 0 and chunk > 0 else 0
        return cls(size, chunk, HASHES[0], secrets.token_bytes(KEY), fill * count, disk, fresh=True)

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return -(-self.size // self.chunk)

    def span(self, index: int) -> tuple[int, int]:
        """Offset and length of a chunk; the last one may be short."""
        offset = index * self.chunk
        return offset, min(self.chunk, self.size - offset)

    def digest(self, index: int) -> bytes:
        """The digest of a chunk, or ZERO, or UNKNOWN."""
        return self.digests[DIGEST * index : DIGEST * (index + 1)]

    def digester(self) -> Digester:
        """What digests this manifest's chunks."""
        return Digester(_gmac(self.key) if self.hash == "gmac" else agent.HASHES[self.hash](self.key))

    def root(self, first: int = 0) -> str:
        """One digest of the chunks from `first` on: what the agent must have computed too. Hex."""
        whole = agent.root(self.size, self.chunk, self.hash)
        whole.update(memoryview(self.digests)[DIGEST * first :])
        return str(whole.hexdigest())

    def rehashed(self, name: str) -> Manifest:
        """What is known when digests are made with the hash `name` from now on: only what reads as zeros."""
        if name == self.hash:
            return self
        zeros = (index for index in range(self.count) if self.digest(index) == ZERO)
        digests = bytearray(UNKNOWN * self.count)
        for index in zeros:
            digests[DIGEST * index : DIGEST * (index + 1)] = ZERO
        return replace(self, hash=name, digests=bytes(digests))

    def resized(self, size: int, tail: bytes) -> Manifest:
        """What is known once the destination has grown or shrunk to `size`.

        Chunks that keep their length keep their digest; the one whose length changed is UNKNOWN; new ones are
        `tail`.
        """
        if size == self.size:
            return self
        count = -(-size // self.chunk)
        kept = min(size, self.size) // self.chunk
        digests = self.digests[: DIGEST * kept]
        if kept < min(count, self.count):
            digests += UNKNOWN
        digests += tail * (count - len(digests) // DIGEST)
        return replace(self, size=size, digests=digests)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON. Secret and digests are inside `chunks`, which callers keep out of logs."""
        deflate = zlib.compressobj(1)
        packed = b"".join([deflate.compress(self.key), deflate.compress(self.digests), deflate.flush()])
        document = {
            "version": VERSION,
            "size": self.size,
            "chunk": self.chunk,
            "hash": self.hash,
            "disk": self.disk,
            "chunks": base64.b64encode(packed).decode(),
        }
        return {**document, "check": _check(document)}

    @classmethod
    def from_json(cls, document: Any) -> Manifest:
        """The manifest of `to_json`; other keys are ignored. InvalidInput that says what is wrong with it."""
        if not isinstance(document, dict) or type(document.get("version")) is not int:
            raise _wrong("it is no such document")
        if document["version"] < VERSION:
            raise _wrong(
                f"it is of version {document['version']}, whose digests are other ones than today's",
                remedy="Nothing needs to be done: all is compared or sent anew, once.",
            )
        if document["version"] > VERSION:
            raise _wrong(
                f"it is of version {document['version']}, this program knows version {VERSION}",
                remedy="Use the newer coriolis-azure that made it, or none: then all is sent anew.",
            )
        for name, kind in _FIELDS.items():
            if type(document.get(name)) is not kind:
                raise _wrong(f"{name!r} is missing or not {'a number' if kind is int else 'text'}")
        if document["check"] != _check(document):
            raise _wrong("it was changed or cut off: its check does not fit")
        size, chunk = document["size"], document["chunk"]
        if size <= 0 or chunk <= 0:
            raise _wrong(f"the size is {size}, the chunk size {chunk}")
        both = _unpacked(document["chunks"], KEY + DIGEST * -(-size // chunk))
        return cls(size, chunk, document["hash"], both[:KEY], both[KEY:], document["disk"])


def _gmac(key: bytes) -> Mac:
    """The agent's GMAC, by the library that is ours here: the tag of a message that is nothing but associated data."""
    cipher, nonce = AESGCM(key[:16]), key[16:28]
    return lambda data: cipher.encrypt(nonce, b"", data)[:DIGEST]


def _unpacked(text: str, size: int) -> bytes:
    """The bytes in `text`, which must be `size`."""
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, binascii.Error, zlib.error, OverflowError) as error:
        raise _wrong("'chunks' is damaged") from error
    if len(data) != size or not inflate.eof or inflate.unused_data:
        raise _wrong("'chunks' does not hold the digests of that many bytes")
    return data


def _check(document: dict[str, Any]) -> str:
    """The digest over all that counts in a manifest's document."""
    whole = [document[name] for name in ("version", "size", "chunk", "hash", "disk", "chunks")]
    return hashlib.blake2b(json.dumps(whole).encode(), digest_size=DIGEST).hexdigest()


def _wrong(why: str, remedy: str = _REMEDY) -> InvalidInput:
    return InvalidInput(f"the manifest of a disk cannot be used: {why}", remedy=remedy)
