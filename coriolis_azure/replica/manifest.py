"""Describes what a destination holds, as a digest per chunk.

A manifest is never trusted beyond what it says: digest *i* is in it only if the destination's chunk *i* is known to
have that digest. ZERO means that the chunk reads as zeros, UNKNOWN that nothing is known about it. Digests are keyed
with a secret that is made for the manifest, so that no guest can prepare content that collides. The agent defines how
digests are computed; docs/explanation/performance.md says why each hash is strong enough.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .. import agent
from ..agent import DIGEST, GRAIN, MAX_CHUNK, UNKNOWN, ZERO, Digester, Mac
from ..errors import InvalidInput
from .digests import PAGE, Digests

__all__ = ["DIGEST", "GRAIN", "KEY", "MAX_CHUNK", "MIN_CHUNK", "UNKNOWN", "VERSION", "ZERO", "Manifest"]

# Version 1 had digests of 16 bytes over whole chunks, from which those of version 2 cannot be derived.
VERSION = 2
KEY = 32  # bytes of the secret
MIN_CHUNK = 4096
_FIELDS = {"size": int, "chunk": int, "hash": str, "disk": str, "chunks": str, "check": str}
HASHES = tuple(name for name in agent.HASHES if name == "gmac" or agent.usable(name))  # those of this host
_REMEDY = "Pass the document as an earlier run returned it, or none: then the whole disk is sent."
_TEXT = 1 << 16  # letters of base64 processed at a time
_MOST = 64 << 20  # bytes of a text beside these letters
_CHUNKS = b'"chunks": "'  # what precedes these letters in a text
_CHECK_END = b'"]'


def grain_count(length: int) -> int:
    """The number of grains in a chunk of `length` bytes."""
    return -(-length // GRAIN)


@dataclass(frozen=True)
class Manifest:
    """The digests of `size` bytes in chunks of `chunk` bytes; `disk` is the unique id of the Azure disk, or empty.

    The digests of a manifest are never changed, only copies of them. `fresh`: nothing was known when the manifest was
    made, so a run that starts from it is a full one; the JSON form does not include it.
    """

    size: int
    chunk: int
    hash: str
    key: bytes = field(repr=False)
    digests: Digests = field(repr=False)
    disk: str = ""
    fresh: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Raise InvalidInput if the parts are not a valid manifest."""
        if self.size <= 0:
            raise _wrong(f"the size is {self.size}")
        if not MIN_CHUNK <= self.chunk <= MAX_CHUNK or self.chunk % MIN_CHUNK:
            raise _wrong(f"the chunk size is {self.chunk}, not a multiple of {MIN_CHUNK} up to {MAX_CHUNK}")
        if self.hash not in HASHES:
            raise _wrong(f"the hash {self.hash!r} is not one of {', '.join(HASHES)}")
        if len(self.key) != KEY or len(self.digests) != self.count:
            raise _wrong(f"it does not contain the {self.count} digests of {self.size} bytes")

    @classmethod
    def new(cls, size: int, chunk: int, disk: str, fill: bytes) -> Manifest:
        """A fresh manifest with a new secret, in which every digest is `fill`: ZERO or UNKNOWN."""
        count = -(-size // chunk) if size > 0 and chunk > 0 else 0
        return cls(
            size, chunk, HASHES[0], secrets.token_bytes(KEY), Digests.filled(fill, count), disk, fresh=True
        )

    @property
    def count(self) -> int:
        """The number of chunks."""
        return -(-self.size // self.chunk)

    def span(self, index: int) -> tuple[int, int]:
        """The offset and length of a chunk, in bytes; the last one may be shorter."""
        offset = index * self.chunk
        return offset, min(self.chunk, self.size - offset)

    def digest(self, index: int) -> bytes:
        """The digest of a chunk; ZERO or UNKNOWN."""
        return self.digests[index]

    def digester(self) -> Digester:
        """What computes the digests of this manifest's chunks."""
        return Digester(_gmac(self.key) if self.hash == "gmac" else agent.HASHES[self.hash](self.key))

    def root(self, first: int = 0) -> str:
        """The digest over the digests of the chunks from `first` on, in hex. The agent must compute the same one."""
        whole = agent.root(self.size, self.chunk, self.hash)
        for page in self.digests.pages(first):
            whole.update(page)
        return str(whole.hexdigest())

    def rehashed(self, name: str) -> Manifest:
        """What remains known if digests are computed with the hash `name` from now on: only chunks of zeros."""
        if name == self.hash:
            return self
        digests = self.digests.copy()
        for index in range(self.count):
            if self.digest(index) != ZERO:
                digests.put(index, UNKNOWN)
        return replace(self, hash=name, digests=digests)

    def resized(self, size: int, tail: bytes) -> Manifest:
        """What remains known if the destination has grown or shrunk to `size`.

        Chunks that keep their length keep their digest, one whose length changes is UNKNOWN, and new ones are `tail`.
        """
        if size == self.size:
            return self
        count = -(-size // self.chunk)
        kept = min(size, self.size) // self.chunk
        digests = self.digests.resized(count, tail)
        if kept < min(count, self.count):
            digests.put(kept, UNKNOWN)
        return replace(self, size=size, digests=digests)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON. Secret and digests are in `chunks`, which callers must keep out of logs."""
        head, letters = self._head(), b"".join(_packed(self.key, self.digests))
        return {**head, "chunks": letters.decode(), "check": _check(head, [letters])}

    def text(self, beside: dict[str, Any]) -> Iterator[bytes]:
        """Yield the JSON text of `to_json` and the keys of `beside` in pieces, because all of it would be large."""
        head = self._head()
        check = _check_begun(head)
        yield json.dumps(head)[:-1].encode() + b", " + _CHUNKS
        for letters in _packed(self.key, self.digests):
            check.update(letters)
            yield letters
        check.update(_CHECK_END)
        yield f'", {json.dumps({"check": check.hexdigest(), **beside})[1:]}'.encode()

    def _head(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "size": self.size,
            "chunk": self.chunk,
            "hash": self.hash,
            "disk": self.disk,
        }

    @classmethod
    def from_json(cls, document: Any) -> Manifest:
        """The inverse of `to_json`; other keys are ignored. Raises InvalidInput, which says what is wrong."""

        def letters() -> Iterator[bytes]:
            text = document["chunks"]
            for at in range(0, len(text), _TEXT):  # JSON needs no escapes in base64
                yield text[at : at + _TEXT].encode("ascii", "backslashreplace")

        return cls._from(document, letters)

    @classmethod
    def read(cls, file: IO[bytes]) -> tuple[Manifest, dict[str, Any]]:
        """Read a `text` piece by piece; return the manifest and the JSON document without `chunks`.

        Raises InvalidInput like `from_json`; ValueError or RecursionError if it is not JSON.
        """

        def rest() -> bytearray:
            """What is left of the file, of which a stranger may have made one without end."""
            text = bytearray()
            while piece := file.read(_TEXT):
                text += piece
                if len(text) > _MOST:
                    raise _wrong("it is too long")
            return text

        begun = file.read(_TEXT)
        at = begun.find(_CHUNKS) + len(_CHUNKS)
        if at < len(_CHUNKS):
            document = json.loads(begun + rest())
            return cls.from_json(document), document

        def letters() -> Iterator[bytes]:
            """Yield the letters, and leave the file at the quote after them."""
            file.seek(at)
            while piece := file.read(_TEXT):
                part, quote, more = piece.partition(b'"')
                if b"\0" in part:  # a hole, however long it is
                    break
                yield part
                if quote:
                    file.seek(-len(quote + more), os.SEEK_CUR)
                    return
            raise _wrong("it was cut off")

        for _ in letters():
            pass
        document = json.loads(begun[:at] + rest())
        return cls._from(document, letters), document

    @classmethod
    def _from(cls, document: Any, letters: Callable[[], Iterator[bytes]]) -> Manifest:
        """The manifest of a document, with `letters` for its `chunks`."""
        if not isinstance(document, dict) or type(document.get("version")) is not int:
            raise _wrong("it is not a manifest")
        if document["version"] < VERSION:
            raise _wrong(
                f"it has version {document['version']}, which had other digests",
                remedy="Nothing needs to be done: everything is compared or sent anew, once.",
            )
        if document["version"] > VERSION:
            raise _wrong(
                f"it has version {document['version']}, but this program knows only version {VERSION}",
                remedy="Use the newer coriolis-azure that wrote it, or pass none: then everything is sent anew.",
            )
        for name, kind in _FIELDS.items():
            if type(document.get(name)) is not kind:
                raise _wrong(f"{name!r} is missing or not {'a number' if kind is int else 'text'}")
        if document["check"] != _check(document, letters()):
            raise _wrong("it was changed or truncated: its check value does not match")
        size, chunk = document["size"], document["chunk"]
        if size <= 0 or chunk <= 0:
            raise _wrong(f"the size is {size}, the chunk size {chunk}")
        key, digests = _unpacked(letters(), -(-size // chunk))
        return cls(size, chunk, document["hash"], key, digests, document["disk"])


def _gmac(key: bytes) -> Mac:
    """The agent's GMAC, computed by our library: the AES-GCM tag of a message with only associated data."""
    cipher, nonce = AESGCM(key[:16]), key[16:28]
    return agent.piecewise(lambda data: cipher.encrypt(nonce, b"", data)[:DIGEST])


def _packed(key: bytes, digests: Digests) -> Iterator[bytes]:
    """Yield, in pieces, the text that `_unpacked` reads."""
    deflate = zlib.compressobj(1)
    packed = bytearray(deflate.compress(key))
    for page in digests.pages():
        packed += deflate.compress(page)
        whole = len(packed) // 3 * 3  # four letters encode three bytes
        yield base64.b64encode(packed[:whole])
        del packed[:whole]
    yield base64.b64encode(packed + deflate.flush())


def _unpacked(letters: Iterator[bytes], count: int) -> tuple[bytes, Digests]:
    """The key and the `count` digests in `letters`, which contain nothing else; unpacked page by page."""
    inflate = zlib.decompressobj()
    packed = (base64.b64decode(piece, validate=True) for piece in _in_fours(letters))

    def take(size: int) -> bytes:
        """The next `size` bytes, or as many as there are."""
        data, more = b"", True
        while len(data) < size and more and not inflate.eof:
            waiting = inflate.unconsumed_tail or next(packed, b"")
            part = inflate.decompress(waiting, size - len(data))
            data, more = data + part, bool(part or waiting)
        return data

    key, digests = b"", Digests()
    try:
        key = take(KEY)
        while len(digests) < count:
            page = take(DIGEST * min(PAGE, count - len(digests)))
            if not page or len(page) % DIGEST:
                break
            digests.append(page)
        ended = not take(1) and inflate.eof and not inflate.unused_data and not next(packed, b"")
    except (ValueError, binascii.Error, zlib.error, OverflowError) as error:
        raise _wrong("'chunks' is damaged") from error
    if len(digests) != count or not ended:
        raise _wrong("'chunks' does not contain the digests of that many bytes")
    return key, digests


def _in_fours(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of a multiple of four, except the last: base64 has four letters for three bytes."""
    rest = b""
    for piece in pieces:
        whole = (len(rest) + len(piece)) // 4 * 4 - len(rest)
        if whole > 0:
            yield rest + piece[:whole]
            rest = piece[whole:]
        else:
            rest += piece
    if rest:
        yield rest


def _check(document: dict[str, Any], letters: Iterable[bytes]) -> str:
    """The check value of a manifest's document: a digest over the JSON list of its values."""
    whole = _check_begun(document)
    for piece in letters:
        whole.update(piece)
    whole.update(_CHECK_END)
    return whole.hexdigest()


def _check_begun(head: dict[str, Any]) -> hashlib.blake2b:
    """The state of that digest before the letters of `chunks`."""
    listed = json.dumps([head[name] for name in ("version", "size", "chunk", "hash", "disk")])
    return hashlib.blake2b(f'{listed[:-1]}, "'.encode(), digest_size=DIGEST)


def _wrong(why: str, remedy: str = _REMEDY) -> InvalidInput:
    return InvalidInput(f"the manifest of a disk cannot be used: {why}", remedy=remedy)
