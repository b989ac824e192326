"""Keyed digests of chunks, and the hashes that can compute them.

A chunk's digest is the digest of the digests of its grains (GRAIN bytes each); a chunk of one grain has that grain's
digest. Zeros have the digest ZERO on every level.
"""

import ctypes
import functools
import hashlib
import importlib
import itertools
import os
import threading
import time
from typing import Any, Callable, List

from .wire import DIGEST, GRAIN, MAX_CHUNK, ZERO, Failure

SHORT = 16 << 10  # up to this many bytes are hashed without releasing the GIL

_NOTHING = bytes(MAX_CHUNK)
Mac = Callable[[Any, int], List[bytes]]  # (buffer, piece size) -> a keyed digest of DIGEST bytes per piece


def is_zero(data: Any) -> bool:
    """Whether `data`, at most MAX_CHUNK bytes, is all zeros: one memcmp without a copy, for any buffer."""
    return _NOTHING.startswith(data)


def piecewise(digest: Callable[[memoryview], bytes]) -> Mac:
    """Make a Mac from a function that digests one piece."""

    def mac(data: Any, size: int) -> List[bytes]:
        view = memoryview(data)
        return [digest(view[at : at + size]) for at in range(0, len(view), size)]

    return mac


def _blake2b(key: bytes) -> Mac:
    keyed = functools.partial(hashlib.blake2b, digest_size=DIGEST, key=key)
    return piecewise(lambda data: keyed(data).digest())


def _blake3(key: bytes) -> Mac:
    blake3 = importlib.import_module("blake3").blake3  # type: Any
    return piecewise(lambda data: blake3(data, key=key).digest(DIGEST))


@functools.lru_cache(None)
def _libcrypto(loader: Any) -> Any:
    """OpenSSL's C library, loaded by `loader`; OSError if there is none."""
    for name in ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so.10", "libcrypto.so.1.0.0"):
        try:
            library = loader(name)
            library.EVP_CIPHER_CTX_new.restype = library.EVP_aes_128_gcm.restype = ctypes.c_void_p
        except (OSError, AttributeError):
            continue
        return library
    raise OSError("there is no libcrypto")


def _gmac(key: bytes) -> Mac:
    """AES-128-GMAC with a fixed nonce: a keyed universal hash, fast, and strong as long as key and tags are secret."""
    # PyDLL keeps the GIL: for a call of a microsecond, releasing and taking it back would take longer.
    library, without_gil = _libcrypto(ctypes.PyDLL), _libcrypto(ctypes.CDLL)
    init, short, long = library.EVP_EncryptInit_ex, library.EVP_EncryptUpdate, without_gil.EVP_EncryptUpdate
    final, control = library.EVP_EncryptFinal_ex, library.EVP_CIPHER_CTX_ctrl
    pointer, nonce, local = ctypes.c_void_p, ctypes.create_string_buffer(key[16:28], 12), threading.local()

    def parts() -> Any:
        # Made once per thread. The functions have no declared types: checking them takes as long as hashing a leaf.
        context, cipher = pointer(library.EVP_CIPHER_CTX_new()), pointer(library.EVP_aes_128_gcm())
        if not context or init(context, cipher, None, key[:16], nonce) != 1:
            raise OSError("libcrypto has no AES-128-GCM")
        local.parts = context, pointer(), ctypes.create_string_buffer(DIGEST), ctypes.byref(ctypes.c_int())
        return local.parts

    def mac(data: Any, size: int) -> List[bytes]:
        context, piece, tag, done = getattr(local, "parts", None) or parts()
        view, digests = memoryview(data), []  # type: memoryview, List[bytes]
        if view.readonly:
            view = memoryview(bytearray(view))
        start, length = ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view)
        update = long if size > SHORT else short
        for at in range(0, length, size):
            piece.value = start + at
            if (
                init(context, None, None, None, nonce) != 1
                or update(context, None, done, piece, min(size, length - at)) != 1
                or final(context, tag, done) != 1
                or control(context, 16, DIGEST, tag) != 1  # EVP_CTRL_GCM_GET_TAG
            ):
                raise Failure("libcrypto failed")
            digests.append(tag.raw)
        return digests

    return mac


# Functions from a key of 32 bytes to a Mac.
HASHES = {"gmac": _gmac, "blake3": _blake3, "blake2b": _blake2b}
_KNOWN = {"gmac": "21c2eb20cd2214dbdf34c9b82ecb"}  # the digest of 16 zeros under a key of zeros


@functools.lru_cache(None)
def usable(name: str) -> bool:
    """Whether this hash is available here and computes the right digests."""
    try:
        digest = HASHES[name](bytes(32))(bytes(16), 16)[0]
    except (KeyError, ImportError, OSError, AttributeError, TypeError, ValueError):
        return False
    return _KNOWN.get(name, digest.hex()) == digest.hex()


def fastest(names: List[str], seconds: float = 0.05) -> str:
    """The fastest usable hash of `names`, measured for `seconds` in all; "" if none is usable."""
    data = bytearray(os.urandom(GRAIN))
    speeds = [(0.0, "")]
    for name in filter(usable, names):
        mac, done, began = HASHES[name](bytes(32)), 0, time.perf_counter()
        mac(data, GRAIN)  # the first call pays for the set-up
        began = time.perf_counter()
        while time.perf_counter() < began + seconds / len(names):
            mac(data, GRAIN)
            done += 1
        speeds.append((done / (time.perf_counter() - began), name))
    return max(speeds)[1]


class Digester:
    """Computes the digests of leaves, grains and chunks with one keyed `mac`."""

    def __init__(self, mac: Mac) -> None:
        self._mac = mac
        # The mac of `size` zeros: comparing with it is cheaper than checking each leaf for zeros first.
        self._zeros = functools.lru_cache(None)(lambda size: mac(bytes(size), size)[0])

    def leaf(self, data: Any) -> bytes:
        """The digest of a leaf or a grain."""
        return ZERO if is_zero(data) else self._mac(data, len(data))[0]

    def leaves(self, data: Any, size: int) -> List[bytes]:
        """The digests of a grain's leaves of `size` bytes."""
        zeros = {self._zeros(size), self._zeros(len(data) % size or size)}
        return [ZERO if digest in zeros else digest for digest in self._mac(data, size)]

    def grains(self, data: Any) -> List[bytes]:
        """The digests of the grains of a chunk."""
        view, digests = memoryview(data), []  # type: memoryview, List[bytes]
        starts = range(0, len(view), GRAIN)
        for zeros, run in itertools.groupby(starts, lambda start: is_zero(view[start : start + GRAIN])):
            group = list(run)  # consecutive grains with data, hashed in one call of the mac
            digests += [ZERO] * len(group) if zeros else self._mac(view[group[0] : group[-1] + GRAIN], GRAIN)
        return digests

    def of(self, grains: List[bytes]) -> bytes:
        """The digest of a chunk from those of its grains."""
        return grains[0] if len(grains) == 1 else self.leaf(b"".join(grains))

    def __call__(self, data: Any) -> bytes:
        """The digest of a chunk."""
        return self.of(self.grains(data))


def root(size: int, chunk: int, name: str) -> Any:
    """A hash object to update with the digests of all chunks in order; its hexdigest identifies the whole disk."""
    return hashlib.blake2b("{} {} {}\n".format(size, chunk, name).encode(), digest_size=16)
