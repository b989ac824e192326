"""`check_medium` passes for every medium there is, and for one of somebody else's, and finds what is wrong."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import pytest

from coriolis_azure.azure.blobs import Storage
from coriolis_azure.errors import DestinationFailed
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.medium import Content, Document, Medium, Part, PastPart, Stamp, Store
from coriolis_azure.replica.vhds import VhdMedium
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.testing import check_medium
from harness.block_devices import loop
from harness.replicas import ACCOUNT, AzuriteOnly, SandboxPlace

MIB = 1 << 20


class MemoryStore:
    """Bytes in memory."""

    far = False

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self.data):
            raise DestinationFailed("the store ends before")
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: Content) -> None:
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def reflink(self, source: Store, offset: int, length: int) -> bool:
        return False

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield offset, length

    def resize(self, size: int) -> None:
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))

    def flush(self) -> None:
        """Nothing to do."""

    @contextmanager
    def uncached(self) -> Iterator[Callable[[int, int], Content]]:
        yield self.read


class MemoryMedium:
    """A medium of somebody else's: one disk in memory, in a dictionary that outlives it."""

    name = "os"
    where = "memory"
    far = contested = interrupted = False
    renames = watched = True
    joined_bytes = 0
    grains = None

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def take(self) -> None:
        """Nobody else is here."""

    def refuse_foreign(self, stamp: Stamp | None) -> None:
        """Nobody else is here."""

    def share(self) -> None:
        """Nobody else is here."""

    def open(self, part: Part) -> MemoryStore | None:
        return self.parts.get(part)

    def make(self, part: Part, size: int) -> MemoryStore:
        store = self.parts[part] = MemoryStore(size)
        return store

    def remove(self, part: Part) -> None:
        self.parts.pop(part, None)

    def promote(self) -> None:
        self.parts["image"] = self.parts.pop("partial")

    def is_blank(self) -> bool:
        return not any(self.parts["image"].data)

    def unseal(self) -> None:
        """Nothing says what the image is."""

    def seal(self, seen: Stamp) -> Stamp:
        return seen

    def stamp(self, part: Part = "image") -> Stamp | None:
        store = self.parts.get(part)
        return {"content": hash(bytes(store.data))} if store is not None else None

    @contextmanager
    def protected(self, part: Part = "image") -> Iterator[None]:
        yield

    def unshared(self, part: Part) -> AbstractContextManager[Callable[[], bool]]:
        return nullcontext(lambda: True)

    def doubt(self, stamp: Stamp) -> str:
        return "" if self.stamp() == stamp else "somebody has changed it"

    def guard(self, *, now: bool = False) -> None:
        """Nobody else is here."""

    def reserve_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """There always is."""

    def release_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """Nothing was taken."""

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        return io.BytesIO(self.parts[f"{document}."]) if f"{document}." in self.parts else None

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        self.parts[f"{document}."] = b"".join(pieces)

    def forget(self, document: Document) -> None:
        self.parts.pop(f"{document}.", None)

    def past(self, point: str) -> MemoryPast:
        return MemoryPast(self.parts.setdefault(f"past {point}", {}))

    def stop(self) -> None:
        """Nothing takes its time here."""

    def close(self) -> None:
        """Nothing is open."""


class MemoryPast:
    """An earlier point of that."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def snapshot(self) -> bool:
        return False

    def open(self, part: PastPart) -> MemoryStore | None:
        return self.parts.get(part)

    def make(self, part: PastPart, size: int) -> MemoryStore:
        store = self.parts[part] = MemoryStore(size)
        return store

    def load(self) -> IO[bytes] | None:
        return io.BytesIO(self.parts["manifest"]) if "manifest" in self.parts else None

    def save(self, pieces: Iterable[bytes]) -> None:
        self.parts["manifest"] = b"".join(pieces)

    def close(self) -> None:
        """Nothing is open."""


def test_files(tmp_path: Path) -> None:
    check_medium(lambda: FileMedium(tmp_path / "os.raw"))


def test_a_block_device(tmp_path: Path) -> None:
    with (tmp_path / "backing").open("wb") as file:
        file.truncate(4 * MIB)
    with loop(tmp_path / "backing") as device:
        (tmp_path / "os.raw").symlink_to(device)
        check_medium(lambda: FileMedium(tmp_path / "os.raw", adopt=True))


def vhds(storage: Storage, account: str) -> Callable[[], Medium]:
    container = storage.account(account).container("images")
    container.ensure()
    return lambda: VhdMedium(container, "check/os.vhd", storage, lambda event: None, lambda: None)


@pytest.mark.slow
def test_blob_storage(azure: Sandbox) -> None:
    check_medium(vhds(SandboxPlace(azure).storage, "sandboxstorage"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Azurite ends with a connection open
def test_blob_storage_in_azurite(azurite: AzuriteOnly) -> None:
    check_medium(vhds(azurite.storage(), ACCOUNT))


def test_somebody_elses() -> None:
    parts: dict[str, Any] = {}
    check_medium(lambda: MemoryMedium(parts))


class LosesZeros(MemoryStore):
    def zero(self, offset: int, length: int) -> None:
        """It forgets."""


class HidesExtents(MemoryStore):
    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield offset, length // 2


class DropsTails(MemoryStore):
    def write(self, offset: int, data: Content) -> None:
        super().write(offset, bytes(data)[:-1])


class MakesDirt(MemoryStore):
    def __init__(self, size: int) -> None:
        self.data = bytearray(b"\xff" * size)


@pytest.mark.parametrize("store", [LosesZeros, HidesExtents, DropsTails, MakesDirt])
def test_what_a_store_does_wrong_is_found(store: type[MemoryStore]) -> None:
    class Wrong(MemoryMedium):
        def make(self, part: Part, size: int) -> MemoryStore:
            made = self.parts[part] = store(size)
            return made

    parts: dict[str, Any] = {}
    with pytest.raises(AssertionError, match=r"part|extent"):
        check_medium(lambda: Wrong(parts))


class Forgetful(MemoryMedium):
    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """It is not durable."""


class Appending(MemoryMedium):
    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        before = self.parts.get(f"{document}.", b"")
        self.parts[f"{document}."] = before + b"".join(pieces)


class Promoting(MemoryMedium):
    def promote(self) -> None:
        self.parts["image"] = MemoryStore(self.parts.pop("partial").size)


class Blind(MemoryMedium):
    def remove(self, part: Part) -> None:
        """It stays."""


@pytest.mark.parametrize("wrong", [Forgetful, Appending, Promoting, Blind])
def test_what_a_medium_does_wrong_is_found(wrong: type[MemoryMedium]) -> None:
    parts: dict[str, Any] = {}
    with pytest.raises(AssertionError, match=r"\w"):
        check_medium(lambda: wrong(parts))
