"""Scattered changes on their way to Blob storage: only grains that differ are sent, and no content is read back."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import transfer
from coriolis_azure.azure.blobs import Blob
from coriolis_azure.replica import comparison
from coriolis_azure.replica.manifest import DIGEST, GRAIN
from coriolis_azure.sandbox import Request, Response, Sandbox
from harness.copies import by_agent, change, job
from harness.pipes import Pipes
from harness.replicas import AzuriteOnly, BlobPlace, SandboxPlace

WIDE = 4 * GRAIN
COUNT = 40
SIZE = COUNT * WIDE + GRAIN + 512
pytestmark = pytest.mark.slow

NAME = "os.vhd.grains"
ENTRY = WIDE // GRAIN * DIGEST
Watch = Callable[[Request, Callable[[Request], Response]], Response]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of 40 chunks and a short one, more than are asked for in one message."""
    disk = tmp_path / "disk"
    disk.write_bytes(random.Random(7).randbytes(SIZE))
    return disk


@pytest.fixture
def here(azure: Sandbox) -> SandboxPlace:
    return SandboxPlace(azure)


@pytest.fixture(params=["sandbox", "azurite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> BlobPlace:
    if request.param == "sandbox":
        return SandboxPlace(request.getfixturevalue("azure"))
    server: AzuriteOnly = request.getfixturevalue("azurite")
    return server.place(f"grains/{tmp_path.name}")


def compare(disk: Path, place: BlobPlace, *, full: bool = False, **options: Any) -> transfer.Outcome:
    """A run, after which the VHD has the disk's content."""
    with place.open() as image, Pipes() as pipes:
        base = image.known("id", SIZE, WIDE, full=full)
        outcome = by_agent(lambda: pipes, job(disk, **options), base, image)
    assert place.content(SIZE) == disk.read_bytes()
    return outcome


def scatter(disk: Path, turn: int, chunks: range = range(COUNT)) -> int:
    """Change one leaf of each of these chunks; return the bytes of the grains that they are in."""
    for index in chunks:
        change(disk, index * WIDE + 2 * GRAIN + 100, random.Random(turn).randbytes(8))
    return len(chunks) * GRAIN


def test_of_a_chunk_that_changed_only_the_grains_that_differ_are_sent(disk: Path, place: BlobPlace) -> None:
    compare(disk, place)
    found = place.blob(NAME).find()
    assert found is not None
    size = (COUNT + 1) * ENTRY  # that of a short chunk is as long
    assert found.size == size + -size % 512
    for turn in (1, 2):  # what a PATCH leaves behind is as good as what DATA did
        changed = scatter(disk, turn)
        assert compare(disk, place).sent_bytes == changed


def test_grains_that_become_zeros_are_cleared_and_those_that_were_zeros_are_sent(
    disk: Path, place: BlobPlace
) -> None:
    change(disk, WIDE, bytes(2 * GRAIN))
    compare(disk, place)
    change(disk, WIDE, b"x" * 600)
    change(disk, 3 * WIDE + GRAIN, bytes(GRAIN))
    change(disk, 5 * WIDE, bytes(WIDE))
    change(disk, COUNT * WIDE + GRAIN, b"end" * 100)
    assert compare(disk, place).sent_bytes == GRAIN + 512


def test_leaves_larger_than_a_chunk_s_grains_send_it_as_a_whole(disk: Path, here: SandboxPlace) -> None:
    compare(disk, here)
    scatter(disk, 1, range(3))
    assert compare(disk, here, leaf=0).sent_bytes == 3 * WIDE
    changed = scatter(disk, 2)
    assert compare(disk, here).sent_bytes == changed


@contextmanager
def watching(azure: Sandbox, watch: Watch) -> Iterator[None]:
    azure.intercept = watch
    try:
        yield
    finally:
        azure.intercept = None


def test_nothing_of_the_vhd_is_read_to_send_less(azure: Sandbox, disk: Path, here: SandboxPlace) -> None:
    """And the digests of all grains are read in few requests."""
    compare(disk, here)
    scatter(disk, 1)
    asked = list[tuple[str, str]]()

    def watch(request: Request, answer: Callable[[Request], Response]) -> Response:
        asked.append((request.method, request.path.rpartition("/")[2]))
        return answer(request)

    with here.open() as image, Pipes() as pipes:
        base = image.known("id", SIZE, WIDE, full=False)
        with watching(azure, watch):
            by_agent(lambda: pipes, job(disk), base, image, verify=False)
    assert ("GET", "os.vhd") not in asked
    assert ("PUT", "os.vhd.redo") in asked
    assert [method for method, name in asked if name == NAME] == ["HEAD", "GET"]


def test_neighbours_that_are_replaced_are_written_together(
    azure: Sandbox, disk: Path, here: SandboxPlace
) -> None:
    compare(disk, here)
    change(disk, 0, random.Random(1).randbytes(16 * WIDE))
    written = list[str]()

    def watch(request: Request, answer: Callable[[Request], Response]) -> Response:
        if (
            request.method == "PUT"
            and request.path.endswith("redo")
            and "page" in request.query.get("comp", "")
        ):
            written.append(request.headers["x-ms-range"])
        return answer(request)

    with watching(azure, watch):
        assert compare(disk, here).sent_bytes == 16 * WIDE
    assert written == [f"bytes=0-{16 * WIDE - 1}"]


def test_a_run_in_which_nothing_has_changed_does_not_ask_for_them(
    azure: Sandbox, disk: Path, here: SandboxPlace
) -> None:
    compare(disk, here)
    asked = list[str]()

    def watch(request: Request, answer: Callable[[Request], Response]) -> Response:
        asked.append(request.path)
        return answer(request)

    with watching(azure, watch):
        assert compare(disk, here).sent_bytes == 0
    assert asked
    assert not [path for path in asked if path.endswith(".grains")]


def made_by_a_stranger(blob: Blob) -> None:
    blob.delete()
    blob.create_pages(512, {"owner": "somebody"})


def made_a_text(blob: Blob) -> None:
    blob.delete()
    blob.put(b"text")


SPOILT: dict[str, Callable[[Blob], object]] = {
    "absent": Blob.delete,
    "noise": lambda blob: blob.write(0, os.urandom(2560)),
    "zeros": lambda blob: blob.clear(0, 2560),
    "short": lambda blob: blob.resize(1024),
    "a stranger's": made_by_a_stranger,
    "a text": made_a_text,
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_where_they_are_not_of_the_content_whole_chunks_are_sent(
    disk: Path, place: BlobPlace, spoilt: str
) -> None:
    compare(disk, place)
    SPOILT[spoilt](place.blob(NAME))
    changed = scatter(disk, 1)
    sent = compare(disk, place).sent_bytes
    assert sent == COUNT * WIDE if spoilt != "short" else changed < sent < COUNT * WIDE
    foreign = spoilt in ("a stranger's", "a text")
    changed = scatter(disk, 2)
    assert compare(disk, place).sent_bytes == (COUNT * WIDE if foreign else changed)
    found = place.blob(NAME).find()
    assert found is not None
    assert (found.metadata == {"owner": "somebody"}) == (spoilt == "a stranger's")
    assert (found.kind == "BlockBlob") == (spoilt == "a text")


@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT"])
def test_where_they_cannot_be_used_the_run_goes_on_without_them(
    azure: Sandbox, disk: Path, here: SandboxPlace, method: str
) -> None:
    """A service that refuses is not asked for every chunk: only by threads that were asking already."""
    compare(disk, here)
    scatter(disk, 1)
    refused = 0

    def watch(request: Request, answer: Callable[[Request], Response]) -> Response:
        nonlocal refused
        if request.path.endswith(".grains") and request.method == method:
            refused += 1
            return Response(403, {"x-ms-error-code": "AuthorizationFailure"})
        return answer(request)

    with watching(azure, watch):
        compare(disk, here)
    assert 1 <= refused <= comparison._FAR_THREADS < COUNT
    scatter(disk, 2)
    assert compare(disk, here).sent_bytes == COUNT * WIDE  # those that are there are of an older content
    changed = scatter(disk, 3)
    assert compare(disk, here).sent_bytes == changed


def test_an_image_that_is_written_anew_has_no_older_ones(disk: Path, place: BlobPlace) -> None:
    compare(disk, place)
    made = place.blob(NAME).find()
    place.blob("os.vhd").delete()
    compare(disk, place)
    again = place.blob(NAME).find()
    assert made is not None
    assert again is not None
    assert made.metadata != again.metadata
    changed = scatter(disk, 1)
    assert compare(disk, place).sent_bytes == changed


def test_they_are_deleted_with_the_replica(disk: Path, here: SandboxPlace) -> None:
    compare(disk, here)
    with here.folder() as folder:
        folder.remove(["os"])
    assert [blob.name for blob in here.storage.account("sandboxstorage").container("images").blobs()] == []


def test_what_a_stranger_has_in_their_place_is_not_deleted_with_the_replica(
    disk: Path, here: SandboxPlace
) -> None:
    compare(disk, here)
    made_by_a_stranger(here.blob(NAME))
    with here.folder() as folder:
        folder.remove(["os"])
    assert here.blob(NAME).find() is not None
