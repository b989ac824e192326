"""A test suite for any medium of replicas: what `Replica` relies on, and complete runs over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TypeVar

from .replica.manifest import ZERO, Manifest
from .replica.medium import Medium, Part, Store
from .replica.replica import Replica

__all__ = ["check_medium"]

T = TypeVar("T")

_CHUNK = 65536
_SIZE = 5 * _CHUNK + 512  # a short last chunk
_GROWN = _SIZE + 2 * _CHUNK
_A, _B, _C = (letter * _CHUNK for letter in (b"A", b"B", b"C"))
_Content = dict[int, bytes]
_FIRST: _Content = {0: _A, 1: _A, 3: _B, 5: _A}
_SECOND: _Content = {0: _B, 1: _A, 4: _C}


def check_medium(medium: Callable[[], Medium]) -> None:
    """Test everything that a replica relies on. AssertionError says what does not hold.

    Example, as a test for pytest:

        from pathlib import Path

        from coriolis_azure.replica.files import FileMedium
        from coriolis_azure.testing import check_medium

        def test_my_medium(tmp_path: Path) -> None:
            check_medium(lambda: FileMedium(tmp_path / "os.raw"))

    `medium` returns a new object at each call, always for the same place, as each run does. The place must be empty at
    first, with room for 512 KiB; it is written to, and its final content is of no use. Errors of the medium itself are
    raised as they are.
    """
    _check_stores(medium)
    _check_documents(medium)
    _check_runs(medium)
    _check_resizing(medium)
    _check_points(medium)


# What a medium must do


def _check_stores(medium: Callable[[], Medium]) -> None:
    with _taken(medium) as kept:
        part: Part = "partial" if kept.renames else "redo"
        _equal(kept.open(part), None, f"there is a part {part!r} before one was created")
        if not kept.renames:  # the image must exist first
            kept.make("image", _SIZE)
        store = kept.make(part, _SIZE)
        _equal(store.size, _SIZE, "a new part does not have the requested size")
        _equal(store.read(0, _SIZE), bytes(_SIZE), "a new part does not read as zeros")
        store.write(_CHUNK, _A)
        store.write(3 * _CHUNK, memoryview(_B))
        store.zero(_CHUNK + 4096, 4096)
        store.flush()
        expected = _laid({1: _A[:4096] + bytes(4096) + _A[8192:], 3: _B}, _SIZE)
        _compare(store, expected, "a part that was written")
        with store.uncached() as read:
            _equal(
                bytes(read(0, _SIZE)),
                expected,
                "the content read from the medium itself is not what was written",
            )
        covered = bytearray(_SIZE)
        for offset, length in store.extents(0, _SIZE):
            covered[offset : offset + length] = b"\1" * length
        missed = [at for at, byte in enumerate(expected) if byte and not covered[at]]
        _equal(missed, [], "extents() misses a range that holds data")
    with _taken(medium) as kept:
        again = kept.open(part)
        _compare(
            _there(again, "a part is gone after its medium was closed"),
            expected,
            "a part that was reopened",
        )
        kept.remove(part)
        kept.remove(part)
        _equal(kept.open(part), None, "a part still exists after it was removed")


def _check_documents(medium: Callable[[], Medium]) -> None:
    with _taken(medium) as kept:
        _equal(kept.load("draft"), None, "there is a document before one was saved")
        kept.save("draft", [b"one", b"two"])
        kept.save("draft", [b"three"])
    with _taken(medium) as kept:
        file = kept.load("draft")
        with _there(file, "a document is gone after its medium was closed") as document:
            _equal(document.read(), b"three", "a document was not replaced as a whole")
        kept.forget("draft")
        kept.forget("draft")
        _equal(kept.load("draft"), None, "a document still exists after it was deleted")


# What a replica does with it


def _check_runs(medium: Callable[[], Medium]) -> None:
    if not medium().renames:
        _wipe(medium)
    _run(medium, _FIRST)
    _compare_image(medium, _FIRST, _SIZE)
    _run(medium, _SECOND, publish=False)
    _compare_image(medium, _FIRST, _SIZE)
    sent = _run(medium, _SECOND)
    _equal(sent, [], f"chunks that a run had committed were sent again: {sent}")
    _compare_image(medium, _SECOND, _SIZE)
    _equal(_run(medium, _SECOND), [], "unchanged chunks are sent again")
    with closing(Replica(medium())) as replica:
        _equal(
            replica.stored().root(), replica.stored().root(), "reading a manifest twice gives different ones"
        )


def _check_resizing(medium: Callable[[], Medium]) -> None:
    more = _SECOND | {6: _B}
    with _taken(medium) as kept:
        image = kept.open("image")
        room = image.size if image is not None and not kept.watched else _GROWN
    if room < _GROWN:
        return  # a device cannot be resized
    _run(medium, more, size=_GROWN)
    _compare_image(medium, more, _GROWN)
    _run(medium, _SECOND)
    _compare_image(medium, _SECOND, _SIZE)


def _check_points(medium: Callable[[], Medium]) -> None:
    if not _run(medium, _FIRST, keep="000001-check"):
        raise AssertionError("a run that changes the image sends nothing")
    _run(medium, _SECOND, keep="000002-check")
    for points, content in ((("000002-check",), _FIRST), (("000001-check", "000002-check"), _SECOND)):
        with closing(Replica(medium())) as replica, replica.at(points) as (manifest, disk):
            _equal(
                disk.read(0, manifest.size),
                _laid(content, _SIZE),
                "an earlier point has other content",
            )


# Helpers


def _there(found: T | None, otherwise: str) -> T:
    """`found`; AssertionError if it is None."""
    if found is None:
        raise AssertionError(otherwise)
    return found


def _equal(found: object, expected: object, otherwise: str) -> None:
    """AssertionError if the two differ, also under `python -O`."""
    if found != expected:
        raise AssertionError(otherwise)


@contextmanager
def _taken(medium: Callable[[], Medium]) -> Iterator[Medium]:
    with closing(medium()) as kept:
        kept.take()
        yield kept


def _wipe(medium: Callable[[], Medium]) -> None:
    with _taken(medium) as kept:
        image = kept.open("image")
        if image is not None:
            image.zero(0, image.size)
            image.flush()


def _run(
    medium: Callable[[], Medium],
    content: _Content,
    *,
    size: int = _SIZE,
    publish: bool = True,
    keep: str = "",
) -> list[int]:
    """Do what a run does; return the chunks that it sent. `keep`: the label under which to keep the replaced point."""
    sent = []
    with closing(Replica(medium())) as replica:
        base = replica.known("disk", size, _CHUNK, full=False)
        now = replace(base, digests=base.digests.copy(), fresh=False)
        for index in range(base.count):
            offset, length = base.span(index)
            data = content.get(index, bytes(_CHUNK))[:length]
            digest = base.digester()(data) if any(data) else ZERO
            if digest != base.digest(index):
                sent.append(index)
                replica.intend(offset, length)
                (replica.write(offset, data) if any(data) else replica.zero(offset, length))
                now.digests.put(index, digest)
                replica.settle(now, index, 1)
        replica.flush()
        _compare_all(replica, now, content)
        replica.commit(now)
        if publish:
            replica.check_publishable()
            if keep:
                replica.preserve(keep)
            replica.publish()
    return sent


def _compare_all(replica: Replica, manifest: Manifest, content: _Content) -> None:
    found = replica.read(0, manifest.size)
    _equal(found, _laid(content, manifest.size), "a run does not read back what it wrote")


def _compare_image(medium: Callable[[], Medium], content: _Content, size: int) -> None:
    with closing(medium()) as kept:
        kept.share()
        _compare(_there(kept.open("image"), "the image is not there"), _laid(content, size), "the image")


def _compare(store: Store, expected: bytes, what: str) -> None:
    _equal(store.read(0, len(expected)), expected, f"{what} does not hold what was written")


def _laid(content: _Content, size: int) -> bytes:
    return b"".join(content.get(at, bytes(_CHUNK)) for at in range(-(-size // _CHUNK)))[:size]
