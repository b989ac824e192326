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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from . import agent
from .agent import DIGEST, GRAIN, MAX_CHUNK, UNKNOWN, ZERO, Digester, Mac
from .errors import InvalidInput

__all__ = ["DIGEST", "KEY", "MAX_CHUNK", "MIN_CHUNK", "UNKNOWN", "VERSION", "ZERO", "Digests", "Manifest"]

# 1: digests of 16 bytes over whole chunks. Nothing follows from them for those of now.
VERSION = 2
KEY = 32  # bytes of the secret
MIN_CHUNK = 4096
_FIELDS = {"size": int, "chunk": int, "hash": str, "disk": str, "chunks": str, "check": str}
HASHES = tuple(name for name in agent.HASHES if name == "gmac" or agent.usable(name))  # those of this host
_REMEDY = "Give the document as an earlier run returned it, or none at all: then the whole disk is sent."


_PAGE = 4096  # digests
_ZEROS = ZERO * _PAGE
_TEXT = 1 << 16  # letters of base64 that are looked at at a time
_CHECK_END = b'"]'


def grain_count(length: int) -> int:
    """How many grains a chunk of `length` bytes has."""
    return -(-length // GRAIN)


class Digests:
    """The digests of many chunks, in order.

    Those of 4 TiB in chunks of 1 MiB take 56 MiB, so they are kept in pages. Copies share what is not changed in
    one of them, and pages of nothing but ZERO, which a sparse disk has many of, are all the same one.
    """

    def __init__(self, digests: bytes = b"") -> None:
        if len(digests) % DIGEST:
            raise ValueError(f"{len(digests)} bytes are no digests of {DIGEST}")
        self._pages: list[
            bytes | bytearray
        ] = []  # bytes where others may have it too, else of this object alone
        self._count = 0
        for at in range(0, len(digests), DIGEST * _PAGE):
            self._add(digests[at : at + DIGEST * _PAGE])

    @classmethod
    def filled(cls, fill: bytes, count: int) -> Digests:
        """`count` times the digest `fill`."""
        new = cls(fill * (count % _PAGE))
        new._pages[:0] = [_shared(fill * _PAGE)] * (count // _PAGE)
        new._count = count
        return new

    def _add(self, page: bytes) -> None:
        """Append a page, which only the last one may not fill."""
        self._pages.append(_shared(page))
        self._count += len(page) // DIGEST

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __getitem__(self, index: int) -> bytes:
        """That of one chunk."""
        page, at = divmod(index, _PAGE)
        return bytes(self._pages[page][DIGEST * at : DIGEST * (at + 1)])

    def span(self, first: int, last: int) -> bytes:
        """Those of the chunks from `first` up to but without `last`."""
        return b"".join(self.pages(first, last))

    def pages(self, first: int = 0, last: int | None = None) -> Iterator[memoryview]:
        """The same in pieces."""
        last = self._count if last is None else min(last, self._count)
        while first < last:
            page, at = divmod(first, _PAGE)
            count = min(_PAGE - at, last - first)
            yield memoryview(self._pages[page])[DIGEST * at : DIGEST * (at + count)]
            first += count

    def put(self, index: int, digests: bytes) -> None:
        """Replace those from chunk `index` on."""
        rest = memoryview(digests)
        while rest:
            number, at = divmod(index, _PAGE)
            page = self._pages[number]
            if isinstance(page, bytes):
                page = self._pages[number] = bytearray(page)
            part = rest[: len(page) - DIGEST * at]
            page[DIGEST * at : DIGEST * at + len(part)] = part
            index, rest = index + len(part) // DIGEST, rest[len(part) :]

    def copy(self) -> Digests:
        """The same, to be changed by itself."""
        for number, page in enumerate(self._pages):
            if isinstance(page, bytearray):
                self._pages[number] = _shared(page)
        new = Digests()
        new._pages, new._count = self._pages.copy(), self._count
        return new

    def resized(self, count: int, fill: bytes) -> Digests:
        """The first `count` of them, followed by as many of `fill` as are missing."""
        kept = min(count, self._count)
        whole = kept // _PAGE
        new = Digests.filled(fill, count)
        new._pages[:whole] = self.copy()._pages[:whole]
        new.put(whole * _PAGE, self.span(whole * _PAGE, kept))
        return new

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digests) and self._count == other._count and self._pages == other._pages

    __hash__ = None  # type: ignore[assignment]


def _shared(page: bytes | bytearray | memoryview) -> bytes:
    return _ZEROS if page == _ZEROS else bytes(page)


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
        letters = b"".join(_packed(self.key, self.digests)).decode()
        document = {**self._head(), "chunks": letters}
        return {**document, "check": _check(document)}

    def text(self, beside: dict[str, Any]) -> Iterator[bytes]:
        """The JSON text of `to_json` and what stands `beside` it, in pieces: the whole of it is large."""
        head = self._head()
        check = _check_begun(head)
        yield f'{json.dumps(head)[:-1]}, "chunks": "'.encode()
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
        key, digests = _unpacked(document["chunks"], -(-size // chunk))
        return cls(size, chunk, document["hash"], key, digests, document["disk"])


def _gmac(key: bytes) -> Mac:
    """The agent's GMAC, by the library that is ours here: the tag of a message that is nothing but associated data."""
    cipher, nonce = AESGCM(key[:16]), key[16:28]
    return agent.each(lambda data: cipher.encrypt(nonce, b"", data)[:DIGEST])


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


def _unpacked(text: str, count: int) -> tuple[bytes, Digests]:
    """The key and the `count` digests in `text`, which holds nothing else; page by page, as the whole is large."""
    packed = (base64.b64decode(text[at : at + _TEXT], validate=True) for at in range(0, len(text), _TEXT))
    inflate = zlib.decompressobj()

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
            page = take(DIGEST * min(_PAGE, count - len(digests)))
            if not page or len(page) % DIGEST:
                break
            digests._add(page)
        ended = not take(1) and inflate.eof and not inflate.unused_data and not next(packed, b"")
    except (ValueError, binascii.Error, zlib.error, OverflowError) as error:
        raise _wrong("'chunks' is damaged") from error
    if len(digests) != count or not ended:
        raise _wrong("'chunks' does not hold the digests of that many bytes")
    return key, digests


def _check(document: dict[str, Any]) -> str:
    """The digest over all that counts in a manifest's document: a list of it in JSON."""
    whole = _check_begun(document)
    text = document["chunks"]
    for at in range(0, len(text), _TEXT):  # nothing in it is written in another way in JSON
        whole.update(text[at : at + _TEXT].encode("ascii", "backslashreplace"))
    whole.update(_CHECK_END)
    return whole.hexdigest()


def _check_begun(head: dict[str, Any]) -> hashlib.blake2b:
    """That digest up to where the letters of `chunks` come."""
    listed = json.dumps([head[name] for name in ("version", "size", "chunk", "hash", "disk")])
    return hashlib.blake2b(f'{listed[:-1]}, "'.encode(), digest_size=DIGEST)


def _wrong(why: str, remedy: str = _REMEDY) -> InvalidInput:
    return InvalidInput(f"the manifest of a disk cannot be used: {why}", remedy=remedy)
