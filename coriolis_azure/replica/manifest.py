"""What a destination holds, chunk by chunk, as digests.

A manifest is never trusted beyond what it says: digest *i* stands there only if the destination's chunk
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

# 1: digests of 16 bytes over whole chunks. Nothing follows from them for those of now.
VERSION = 2
KEY = 32  # bytes of the secret
MIN_CHUNK = 4096
_FIELDS = {"size": int, "chunk": int, "hash": str, "disk": str, "chunks": str, "check": str}
HASHES = tuple(name for name in agent.HASHES if name == "gmac" or agent.usable(name))  # those of this host
_REMEDY = "Give the document as an earlier run returned it, or none at all: then the whole disk is sent."
_TEXT = 1 << 16  # letters of base64 that are looked at at a time
_CHUNKS = b'"chunks": "'  # what comes before those letters in a text
_CHECK_END = b'"]'


def grain_count(length: int) -> int:
    """How many grains a chunk of `length` bytes has."""
    return -(-length // GRAIN)


@dataclass(frozen=True)
class Manifest:
    """The digests of `size` bytes in chunks of `chunk`; `disk` is the unique id of the Azure disk, or empty.

    The digests in a manifest are not changed: what changes is a copy of them. `fresh`: nothing was known when it
    was made, so a run that starts from it is a full one. It is not kept in the JSON form.
    """

    size: int
    chunk: int
    hash: str
    key: bytes = field(repr=False)
    digests: Digests = field(repr=False)
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
        if len(self.key) != KEY or len(self.digests) != self.count:
            raise _wrong(f"it does not hold the {self.count} digests of {self.size} bytes")

    @classmethod
    def new(cls, size: int, chunk: int, disk: str, fill: bytes) -> Manifest:
        """A manifest with a new secret in which every digest is `fill`: ZERO or UNKNOWN."""
        count = -(-size // chunk) if size > 0 and chunk > 0 else 0
        return cls(
            size, chunk, HASHES[0], secrets.token_bytes(KEY), Digests.filled(fill, count), disk, fresh=True
        )

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
        return self.digests[index]

    def digester(self) -> Digester:
        """What digests this manifest's chunks."""
        return Digester(_gmac(self.key) if self.hash == "gmac" else agent.HASHES[self.hash](self.key))

    def root(self, first: int = 0) -> str:
        """One digest of the chunks from `first` on: what the agent must have computed too. Hex."""
        whole = agent.root(self.size, self.chunk, self.hash)
        for page in self.digests.pages(first):
            whole.update(page)
        return str(whole.hexdigest())

    def rehashed(self, name: str) -> Manifest:
        """What is known when digests are made with the hash `name` from now on: only what reads as zeros."""
        if name == self.hash:
            return self
        digests = self.digests.copy()
        for index in range(self.count):
            if self.digest(index) != ZERO:
                digests.put(index, UNKNOWN)
        return replace(self, hash=name, digests=digests)

    def resized(self, size: int, tail: bytes) -> Manifest:
        """What is known once the destination has grown or shrunk to `size`.

        Chunks that keep their length keep their digest; the one whose length changed is UNKNOWN; new ones are
        `tail`.
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
        """The manifest as JSON. Secret and digests are inside `chunks`, which callers keep out of logs."""
        head, letters = self._head(), b"".join(_packed(self.key, self.digests))
        return {**head, "chunks": letters.decode(), "check": _check(head, [letters])}

    def text(self, beside: dict[str, Any]) -> Iterator[bytes]:
        """The JSON text of `to_json` and what stands `beside` it, in pieces: the whole of it is large."""
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
        """The manifest of `to_json`; other keys are ignored. InvalidInput that says what is wrong with it."""

        def letters() -> Iterator[bytes]:
            text = document["chunks"]
            for at in range(0, len(text), _TEXT):  # nothing in it is written in another way in JSON
                yield text[at : at + _TEXT].encode("ascii", "backslashreplace")

        return cls._from(document, letters)

    @classmethod
    def read(cls, file: IO[bytes]) -> tuple[Manifest, dict[str, Any]]:
        """The manifest of a `text`, taken in piece by piece as well, and what else stands in its JSON.

        InvalidInput as from `from_json`; ValueError or RecursionError where it is no JSON.
        """
        begun = file.read(_TEXT)
        at = begun.find(_CHUNKS) + len(_CHUNKS)
        if at < len(_CHUNKS):
            document = json.loads(begun + file.read())
            return cls.from_json(document), document

        def letters() -> Iterator[bytes]:
            """Leaves the file at the quote that ends them."""
            file.seek(at)
            while piece := file.read(_TEXT):
                part, quote, rest = piece.partition(b'"')
                yield part
                if quote:
                    file.seek(-len(quote + rest), os.SEEK_CUR)
                    return
            raise _wrong("it was cut off")

        for _ in letters():
            pass
        document = json.loads(begun[:at] + file.read())
        return cls._from(document, letters), document

    @classmethod
    def _from(cls, document: Any, letters: Callable[[], Iterator[bytes]]) -> Manifest:
        """The manifest of a document, whose `chunks` are `letters`."""
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
        if document["check"] != _check(document, letters()):
            raise _wrong("it was changed or cut off: its check does not fit")
        size, chunk = document["size"], document["chunk"]
        if size <= 0 or chunk <= 0:
            raise _wrong(f"the size is {size}, the chunk size {chunk}")
        key, digests = _unpacked(letters(), -(-size // chunk))
        return cls(size, chunk, document["hash"], key, digests, document["disk"])


def _gmac(key: bytes) -> Mac:
    """The agent's GMAC, by the library that is ours here: the tag of a message that is nothing but associated data."""
    cipher, nonce = AESGCM(key[:16]), key[16:28]
    return agent.piecewise(lambda data: cipher.encrypt(nonce, b"", data)[:DIGEST])


def _packed(key: bytes, digests: Digests) -> Iterator[bytes]:
    """What `_unpacked` takes, in pieces."""
    deflate = zlib.compressobj(1)
    packed = bytearray(deflate.compress(key))
    for page in digests.pages():
        packed += deflate.compress(page)
        whole = len(packed) // 3 * 3  # which four letters each stand for
        yield base64.b64encode(packed[:whole])
        del packed[:whole]
    yield base64.b64encode(packed + deflate.flush())


def _unpacked(letters: Iterator[bytes], count: int) -> tuple[bytes, Digests]:
    """The key and the `count` digests in `letters`, which hold nothing else; page by page, as the whole is large."""
    inflate = zlib.decompressobj()
    packed = (base64.b64decode(piece, validate=True) for piece in _in_fours(letters))

    def take(size: int) -> bytes:
        """The next `size` bytes, or what there is."""
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
        raise _wrong("'chunks' does not hold the digests of that many bytes")
    return key, digests


def _in_fours(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of whole fours, but for the last: four letters of base64 stand for three bytes."""
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
    """The digest over all that counts in a manifest's document: a list of it in JSON."""
    whole = _check_begun(document)
    for piece in letters:
        whole.update(piece)
    whole.update(_CHECK_END)
    return whole.hexdigest()


def _check_begun(head: dict[str, Any]) -> hashlib.blake2b:
    """That digest up to where the letters of `chunks` come."""
    listed = json.dumps([head[name] for name in ("version", "size", "chunk", "hash", "disk")])
    return hashlib.blake2b(f'{listed[:-1]}, "'.encode(), digest_size=DIGEST)


def _wrong(why: str, remedy: str = _REMEDY) -> InvalidInput:
    return InvalidInput(f"the manifest of a disk cannot be used: {why}", remedy=remedy)
