"""Page lists of blobs since an older snapshot, with the official SDK, beside Azurite and Microsoft's documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobClient

from coriolis_azure.azure.blobs import Blob, Storage
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.replicas import ACCOUNT, AzuriteOnly

K = 4096
SIZE = 64 * K
Listed = list[tuple[int, int, bool]]


@pytest.fixture
def storage(azure: Sandbox, source: Source) -> Storage:
    return source.storage


def made(storage: Storage, account: str = "sandboxstorage", name: str = "d.vhd") -> Blob:
    """An empty page blob."""
    container = storage.account(account).container("changes")
    container.ensure()
    blob = container.blob(name)
    blob.create_pages(SIZE, {})
    return blob


def shot(blob: Blob) -> str:
    return blob.take_snapshot({}).snapshot


def client(blob: Blob, snapshot: str = "") -> BlobClient:
    """The SDK's own client of a blob or of a snapshot of it."""
    return blob.at(snapshot)._client if snapshot else blob._client


def changes(blob: Blob, newer: str, older: str, **options: Any) -> Listed:
    """All ranges in the order told: start, exclusive end, cleared."""
    ranges = client(blob, newer).list_page_ranges(previous_snapshot=older, **options)
    return [(each.start or 0, (each.end or 0) + 1, bool(each.cleared)) for each in ranges]


def code(blob: Blob, newer: str, older: str) -> str:
    with pytest.raises(HttpResponseError) as refused:
        changes(blob, newer, older)
    error: Any = refused.value
    return f"{error.status_code} {getattr(error.error_code, 'value', error.error_code)}"


def test_written_and_cleared_ranges_are_told_in_order(storage: Storage) -> None:
    blob = made(storage)
    blob.write(0, b"a" * 8 * K)
    older = shot(blob)
    blob.write(0, b"b" * K)
    blob.clear(2 * K, K)
    blob.write(5 * K, b"c" * 1024)
    newer = shot(blob)
    told = [(0, K, False), (2 * K, 3 * K, True), (5 * K, 5 * K + 1024, False)]
    assert changes(blob, newer, older) == told
    blob.write(60 * K, b"later" + bytes(K - 5))
    assert changes(blob, newer, older) == told
    assert changes(blob, "", older) == [*told, (60 * K, 61 * K, False)]


def test_equal_bytes_written_again_are_told_and_pages_that_were_never_written_are_not(
    storage: Storage,
) -> None:
    blob = made(storage)
    blob.write(0, b"a" * K)
    older = shot(blob)
    blob.write(0, b"a" * K)
    blob.clear(8 * K, K)
    assert changes(blob, shot(blob), older) == [(0, K, False)]


def test_any_older_snapshot_will_do_also_when_those_in_between_are_deleted(storage: Storage) -> None:
    blob = made(storage)
    first = shot(blob)
    blob.write(0, b"a" * K)
    second = shot(blob)
    blob.write(K, b"b" * K)
    third = shot(blob)
    blob.at(second).delete()
    assert changes(blob, third, first) == [(0, 2 * K, False)]


def test_a_long_list_comes_in_pages_and_a_window_cuts_it(azure: Sandbox, storage: Storage) -> None:
    blob = made(storage)
    older = shot(blob)
    for page in range(0, 20, 2):
        blob.write(page * K, b"x" * K)
    newer = shot(blob)
    azure.storage.page_ranges(3)
    told = [(page * K, (page + 1) * K, False) for page in range(0, 20, 2)]
    assert changes(blob, newer, older) == told
    assert changes(blob, newer, older, offset=K + 512, length=2 * K) == [(2 * K, 3 * K, False)]


def test_what_cannot_be_compared_is_refused_in_azures_words(storage: Storage) -> None:
    blob = made(storage)
    first = shot(blob)
    second = shot(blob)
    assert code(blob, first, second) == "400 PreviousSnapshotCannotBeNewer"
    assert code(blob, second, second) == "400 PreviousSnapshotCannotBeNewer"
    blob.at(first).delete()
    assert code(blob, second, first) == "409 PreviousSnapshotNotFound"
    blob.create_pages(SIZE, {})
    assert code(blob, shot(blob), second) == "409 BlobOverwritten"


def test_a_sandbox_that_was_closed_knows_what_had_changed(
    azure: Sandbox, storage: Storage, tmp_path: Path
) -> None:
    blob = made(storage)
    older = shot(blob)
    blob.write(3 * K, b"x" * K)
    newer = shot(blob)
    azure.close()
    with Sandbox(tmp_path / "azure") as again:
        stored = again.storage.account("sandboxstorage").containers["changes"]
        found = [stored.find("d.vhd", each) for each in (newer, older)]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0].changed(found[1], 0, SIZE) == [(3 * K, 4 * K, False)]


@pytest.mark.parametrize(
    "lie", ["header-ignored", "list-cut", "range-left-out", "ranges-unsorted", "ranges-beyond-end"]
)
def test_it_can_lie_about_changes_only(azure: Sandbox, storage: Storage, lie: str) -> None:
    blob = made(storage)
    blob.write(0, b"a" * K)
    older = shot(blob)
    blob.write(8 * K, b"b" * K)
    blob.write(16 * K, b"c" * K)
    newer = shot(blob)
    right = [(8 * K, 9 * K, False), (16 * K, 17 * K, False)]
    azure.faults.add(lie, path="/sandboxstorage/", about="difference")
    allocated = [(each.start, each.end) for each in client(blob, newer).list_page_ranges()]
    assert allocated == [(0, K - 1), (8 * K, 9 * K - 1), (16 * K, 17 * K - 1)]
    assert changes(blob, newer, older) != right
    assert changes(blob, newer, older) == right


@pytest.fixture(params=["sandbox", "azurite"])
def either(request: pytest.FixtureRequest) -> Iterator[Blob]:
    """An empty page blob, here and in Azurite."""
    if request.param == "azurite":
        azurite: AzuriteOnly = request.getfixturevalue("azurite")
        yield made(azurite.storage(), ACCOUNT, f"{request.node.name}.vhd")
    else:
        yield made(request.getfixturevalue("source").storage)


@pytest.mark.slow
def test_snapshots_lists_and_metadata_are_as_azurites(either: Blob) -> None:
    """Azurite knows no differences: it ignores the parameter, which is a lie that the product has to notice."""
    either.write(0, b"a" * K)
    old = either.take_snapshot({"coriolis_baseline": "x"})
    either.write(4 * K, b"b" * K)
    new = either.take_snapshot({})
    assert old.pages(SIZE).total == K
    assert new.pages(SIZE).total == 2 * K
    assert old.read(4 * K, K) == bytes(K)
    listed = list(either.account.container(either.container).blobs(either.name, past=True))
    assert {each.snapshot: dict(each.metadata) for each in listed if each.snapshot} == {
        old.snapshot: {"coriolis_baseline": "x"},
        new.snapshot: {},
    }
    told = changes(either, new.snapshot, old.snapshot)
    assert told == ([(4 * K, 5 * K, False)] if either.account.name != ACCOUNT else [(0, K, False), *told[1:]])
