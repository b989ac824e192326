"""Page lists and differences of exported snapshots, with the official SDKs, checked against contents."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from click.testing import CliRunner, Result

from coriolis_azure.cli.sandbox import sandbox as commands
from coriolis_azure.errors import InvalidInput
from coriolis_azure.sandbox import Sandbox, add_vm
from coriolis_azure.sandbox.compute.inside import Inside
from coriolis_azure.sandbox.pages import Pages, Range, merged
from harness.clients import GROUP, Clients, in_process, serving
from harness.constants import MIB
from harness.exports import VERSION, blob, grant, listed, page, ranges_of, revoke, snapshot, vm_disk

K = 4096
GIB = 1 << 30
FOOTER = (GIB, GIB + 512, False)


@pytest.fixture
def disk(azure: Sandbox, clients: Clients) -> Inside:
    return vm_disk(azure, clients)


def shot(clients: Clients, disk: Inside, name: str) -> str:
    """Take a snapshot and open it."""
    snapshot(clients, name, disk.id)
    return grant(clients, name)


def code(clients: Clients, sas: str, previous: str = "", **options: Any) -> str:
    """The code of a refused list."""
    with pytest.raises(HttpResponseError) as refused:
        listed(clients, sas, previous, **options)
    error: Any = refused.value
    return f"{error.status_code} {getattr(error.error_code, 'value', error.error_code)}"


def raw(clients: Clients, sas: str, previous: str = "", query: str = "", **headers: str) -> Any:
    more = {"x-ms-previous-snapshot-url": previous} if previous else {}
    return clients.send("GET", f"{sas}&comp=pagelist{query}", **{"x-ms-version": VERSION, **more, **headers})


def test_a_list_has_what_is_allocated_and_the_footer(clients: Clients, disk: Inside) -> None:
    disk.write(K, b"a" * K)
    disk.write(3 * K, b"b" * 512)
    assert listed(clients, shot(clients, disk, "s")) == [
        (K, 2 * K, False),
        (3 * K, 3 * K + 512, False),
        FOOTER,
    ]


def test_a_difference_mixes_written_and_cleared_ranges_in_order(clients: Clients, disk: Inside) -> None:
    disk.write(0, b"a" * 8 * K)
    old = shot(clients, disk, "s1")
    disk.write(0, b"b" * K)
    disk.clear(2 * K, K)
    disk.write(5 * K, b"c" * 1024)
    new = shot(clients, disk, "s2")
    told = [(0, K, False), (2 * K, 3 * K, True), (5 * K, 5 * K + 1024, False)]
    assert listed(clients, new, old) == told
    text = raw(clients, new, old).text
    assert text == (
        '\ufeff<?xml version="1.0" encoding="utf-8"?><PageList>'
        "<PageRange><Start>0</Start><End>4095</End></PageRange>"
        "<ClearRange><Start>8192</Start><End>12287</End></ClearRange>"
        "<PageRange><Start>20480</Start><End>21503</End></PageRange></PageList>"
    )


def test_what_was_written_again_is_listed_and_nothing_else(clients: Clients, disk: Inside) -> None:
    disk.write(0, b"a" * 4 * K)
    old = shot(clients, disk, "s1")
    assert listed(clients, shot(clients, disk, "same"), old) == []
    disk.write(K, b"a" * K)
    new = shot(clients, disk, "s2")
    assert listed(clients, new, old) == [(K, 2 * K, False)]
    assert listed(clients, new, new) == []
    assert raw(clients, new, new).text.endswith("<PageList />")


def test_any_older_snapshot_serves_whichever_between_is_gone(clients: Clients, disk: Inside) -> None:
    disk.write(0, b"a" * K)
    first = shot(clients, disk, "s1")
    disk.write(K, b"b" * K)
    snapshot(clients, "s2", disk.id)
    disk.write(3 * K, b"c" * K)
    clients.compute.snapshots.begin_delete(GROUP, "s2").result()
    last = shot(clients, disk, "s3")
    assert listed(clients, last, first) == [(K, 2 * K, False), (3 * K, 4 * K, False)]


def test_content_replaced_as_a_whole_is_compared(azure: Sandbox, clients: Clients, tmp_path: Path) -> None:
    file = tmp_path / "os.raw"
    content = bytearray(random.Random(1).randbytes(MIB))
    file.write_bytes(content)
    azure.add_vm("vm", file)
    disk = azure.disk("vm")
    old = shot(clients, disk, "s1")
    content[8 * K + 5] ^= 1
    file.write_bytes(content)
    azure.write("vm", "os", file)
    disk.write(0, bytes(content[:512]))  # and once more, the same
    new = shot(clients, disk, "s2")
    assert listed(clients, new, old) == [(0, 512, False), (8 * K, 8 * K + 512, False)]
    disk.clear(16 * K, K)
    assert listed(clients, shot(clients, disk, "s3"), new) == [(16 * K, 17 * K, True)]


def test_a_disk_that_grew_lists_its_footer_and_the_new_tail(clients: Clients, disk: Inside) -> None:
    old = shot(clients, disk, "s1")
    disk.grow(2)
    disk.write(GIB + K, b"t" * K)
    tail = (GIB + K, GIB + 2 * K, False)
    assert listed(clients, shot(clients, disk, "s2"), old) == [tail, (2 * GIB, 2 * GIB + 512, False)]


def test_lists_come_in_pages_and_windows(azure: Sandbox, clients: Clients, disk: Inside) -> None:
    old = shot(clients, disk, "s1")
    disk.write_all((2 * K * number, b"x" * K) for number in range(20))
    new = shot(clients, disk, "s2")
    whole = [(2 * K * number, 2 * K * number + K, False) for number in range(20)]
    assert listed(clients, new, old, maxresults=3) == whole
    azure.storage.page_ranges(7)
    with blob(clients, new) as client:
        first = page(client, old, maxresults=5000)
        assert (len(ranges_of(first)), bool(first.next_marker)) == (7, True)
    window = listed(clients, new, old, offset=512, length=5 * K, maxresults=1)
    assert window == [(512, K, False), (2 * K, 3 * K, False), (4 * K, 5 * K, False)]
    assert listed(clients, new, offset=GIB - K, length=K + 512) == [FOOTER]


@pytest.mark.slow
def test_the_usual_cap_is_ten_thousand_ranges(clients: Clients, disk: Inside) -> None:
    disk.write_all((2 * K * number, b"x" * 512) for number in range(10_001))
    with blob(clients, shot(clients, disk, "s")) as client:
        body = page(client)
        assert (len(ranges_of(body)), bool(body.next_marker)) == (10_000, True)
        rest = page(client, marker=body.next_marker)
        assert (ranges_of(rest), rest.next_marker) == (
            [(2 * K * 10_000, 2 * K * 10_000 + 512, False), FOOTER],
            None,
        )


def test_both_fronts_tell_the_same_list_in_chunks(tmp_path: Path) -> None:
    with serving(tmp_path / "azure") as info:
        clients = Clients(info)
        clients.disk("d")
        snapshot(clients, "s", clients.id("Microsoft.Compute/disks", "d"))
        sas = grant(clients, "s")
        answer = raw(clients, sas)
        assert answer.headers["Transfer-Encoding"] == "chunked"
        assert answer.headers["x-ms-blob-content-length"] == str(GIB + 512)
        assert listed(clients, sas) == [FOOTER]
        assert listed(clients, sas, sas) == []
        clients.close()


def test_differences_outlast_a_restart(tmp_path: Path) -> None:
    for turn in range(3):
        with Sandbox(tmp_path / "azure") as azure, in_process(azure) as clients:
            if turn == 0:
                disk = vm_disk(azure, clients)
                disk.write(0, b"a" * K)
                snapshot(clients, "s1", disk.id)
            if turn == 1:
                disk = azure.disk(clients.id("Microsoft.Compute/disks", "d"))
                disk.write(0, b"a" * K)
                snapshot(clients, "s2", disk.id)
            if turn == 2:
                assert listed(clients, grant(clients, "s2"), grant(clients, "s1")) == [(0, K, False)]


def test_refused_differences(azure: Sandbox, clients: Clients, disk: Inside) -> None:
    first, second = (shot(clients, disk, name) for name in ("s1", "s2"))
    other = shot(clients, vm_disk(azure, clients, "other"), "o")
    clients.copy("full", disk.id, snapshot=True)
    full = grant(clients, "full")
    assert code(clients, first, second) == "400 PreviousSnapshotCannotBeNewer"
    assert code(clients, second, other) == "409 PreviousSnapshotOperationNotSupported"
    assert code(clients, second, full) == "409 PreviousSnapshotOperationNotSupported"
    assert code(clients, full, first) == "409 PreviousSnapshotOperationNotSupported"
    assert code(clients, second, first.replace("sig=", "sig=A")) == "403 AuthenticationFailed"
    revoke(clients, "s1")
    assert code(clients, second, first) == "403 AuthenticationFailed"
    clients.compute.snapshots.begin_delete(GROUP, "s1").result()
    assert code(clients, second, first) == "409 PreviousSnapshotNotFound"
    assert code(clients, second, offset=GIB + 512, length=512) == "416 InvalidRange"
    assert (
        raw(clients, second, **{"x-ms-range": "bytes=1-512"}).headers["x-ms-error-code"] == "InvalidPageRange"
    )
    for query in ("&maxresults=0", "&maxresults=-1"):
        assert raw(clients, second, query=query).status_code == 400
    assert raw(clients, second, query="&marker=x").status_code == 400
    answer = raw(clients, second, query="&prevsnapshot=https%3A%2F%2Fmd-x")
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (400, "InvalidQueryParameterValue")


def test_there_is_no_difference_across_4_tb(azure: Sandbox, clients: Clients) -> None:
    disk = vm_disk(azure, clients, gib=4096)
    old = shot(clients, disk, "s1")
    disk.grow(4097)
    new = shot(clients, disk, "s2")
    assert code(clients, new, old) == "409 BlobOverwritten"
    assert listed(clients, shot(clients, disk, "s3"), new) == []


def test_old_versions_ignore_the_header_and_markers_in_silence(clients: Clients, disk: Inside) -> None:
    disk.write(0, b"a" * K)
    disk.write(2 * K, b"a" * K)
    sas = shot(clients, disk, "s")
    assert "<Start>0<" in raw(clients, sas, sas, **{"x-ms-version": "2019-02-02"}).text
    assert (
        raw(clients, sas, query="&maxresults=1", **{"x-ms-version": "2020-08-04"}).text.count("<Start>") == 3
    )


def test_an_ordinary_account_refuses_the_header(clients: Clients, azure: Sandbox, disk: Inside) -> None:
    sas = shot(clients, disk, "s")
    token = clients.credential.get_token("https://storage.azure.com/.default").token
    account = f"{clients.base}/sandboxstorage/vhds"
    for path, query in (("", "?restype=container"), ("/b", "")):
        headers = {"x-ms-blob-type": "PageBlob", "x-ms-blob-content-length": "512", "x-ms-version": VERSION}
        answer = clients.send("PUT", account + path + query, **headers, Authorization=f"Bearer {token}")
        assert answer.status_code == 201
    answer = clients.send(
        "GET",
        f"{account}/b?comp=pagelist",
        **{"x-ms-previous-snapshot-url": sas, "x-ms-version": VERSION},
        Authorization=f"Bearer {token}",
    )
    assert answer.headers["x-ms-error-code"] == "UnsupportedHeaderForNonManagedDisksAccount"
    assert "<HeaderName>x-ms-previous-snapshot-url</HeaderName>" in answer.text


@pytest.mark.parametrize("seed", range(8))
def test_differences_agree_with_the_contents(clients: Clients, disk: Inside, seed: int) -> None:
    """The guards that a reader may use hold, and old content plus the difference is new content."""
    rng, size = random.Random(seed), 64 * 512
    contents, allocations = [], []
    for number in range(4):
        for _ in range(rng.randrange(8)):
            offset, length = rng.randrange(48) * 512, rng.randrange(1, 16) * 512
            if rng.random() < 0.4:
                disk.clear(offset, length)
            else:
                disk.write(offset, rng.choice((b"\0", b"a", b"b")) * length)
        contents.append(disk.read(0, size))
        allocations.append(
            pages_of(listed(clients, shot(clients, disk, f"s{number}"), length=size, offset=0))
        )
    older, newer = sorted(rng.sample(range(4), 2))
    told = listed(clients, grant(clients, f"s{newer}"), grant(clients, f"s{older}"), offset=0, length=size)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(told))
    written = pages_of(each for each in told if not each[2])
    cleared = pages_of(each for each in told if each[2])
    assert allocations[newer] - allocations[older] <= written <= allocations[newer]
    assert allocations[older] - allocations[newer] <= cleared
    assert not cleared & allocations[newer]
    rebuilt = bytearray(contents[older])
    for start, end, gone in told:
        rebuilt[start:end] = bytes(end - start) if gone else contents[newer][start:end]
    assert rebuilt == contents[newer]


def pages_of(ranges: Any) -> set[int]:
    return {number for start, end, _ in ranges for number in range(start // 512, end // 512)}


def test_a_map_of_pages_is_as_one_of_single_pages() -> None:
    rng, size = random.Random(7), 200 * MIB
    known, single = Pages(0), dict[int, tuple[int, bool]]()
    for generation in range(60):
        start = rng.randrange(size // MIB) * MIB
        end = min(size, start + rng.randrange(1, 90) * MIB)
        cleared = rng.random() < 0.3
        known.note(start, end, generation, cleared=cleared)
        single |= dict.fromkeys(range(start, end, MIB), (generation, cleared))
    spans = {
        at: (span.generation, span.cleared) for span in known.spans(0, size) for at in range(*span[:2], MIB)
    }
    assert spans == single
    late = {at: when for at, (when, _) in single.items() if when > 40}
    assert {at: span.generation for span in known.spans(0, size, 40) for at in range(*span[:2], MIB)} == late
    assert {at for low, high, _ in known.allocated(0, size) for at in range(low, high, MIB)} == {
        at for at, (_, cleared) in single.items() if not cleared
    }


def test_a_part_of_a_disk_is_written_and_cleared_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "os.raw").write_bytes(b"a" * MIB)
    (tmp_path / "part.raw").write_bytes(b"b" * K)
    with serving(tmp_path / "azure") as info:
        clients = Clients(info)
        add_vm(tmp_path / "azure", "vm", tmp_path / "os.raw")
        disk = clients.id("Microsoft.Compute/disks", "vm-os")
        snapshot(clients, "s1", disk)

        def run(*arguments: object) -> Result:
            place = [tmp_path / "azure", "vm", "os"]
            return CliRunner().invoke(commands, [*map(str, (arguments[0], *place, *arguments[1:]))])

        assert run("write", tmp_path / "part.raw", "--offset", 2 * K).exit_code == 0
        assert run("clear", 5 * K, 512).exit_code == 0
        refused = run("write", tmp_path / "part.raw", "--offset", 7)
        assert isinstance(refused.exception, InvalidInput)
        snapshot(clients, "s2", disk)
        told = listed(clients, grant(clients, "s2"), grant(clients, "s1"))
        assert told == [(2 * K, 3 * K, False), (5 * K, 5 * K + 512, True)]
        clients.close()


def test_neighbours_of_one_kind_are_one_range() -> None:
    told = [Range(0, 1), Range(1, 2), Range(2, 3, cleared=True), Range(3, 4, cleared=True), Range(5, 6)]
    assert list(merged(told)) == [Range(0, 2), Range(2, 4, cleared=True), Range(5, 6)]
