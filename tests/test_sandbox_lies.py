"""Faults of exported disks: each can be ordered, does what it says, and ends when its count is used up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError, IncompleteReadError
from click.testing import CliRunner

from coriolis_azure.cli.sandbox import sandbox as sandbox_commands
from coriolis_azure.sandbox import Sandbox, fault
from coriolis_azure.sandbox.compute.inside import Inside
from coriolis_azure.sandbox.export_faults import KINDS
from coriolis_azure.sandbox.storage.lies import LIES
from harness.clients import GROUP, Clients, in_process, serving
from harness.exports import VERSION, blob, grant, listed, page, ranges_of, snapshot, vm_disk

K = 4096
GIB = 1 << 30
FOOTER = (GIB, GIB + 512, False)
WRITTEN = [(0, K, False), (2 * K, 3 * K, True), (4 * K, 5 * K, False)]
HALVES = [(4 * K, 5 * K, False), (2 * K, 3 * K, True), (0, K, False)]


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with Sandbox(tmp_path / "azure") as sandbox:
        yield sandbox


@pytest.fixture
def azure(sandbox: Sandbox) -> Iterator[Clients]:
    with in_process(sandbox) as clients:
        yield clients


@pytest.fixture
def disk(sandbox: Sandbox, azure: Clients) -> Inside:
    return vm_disk(sandbox, azure)


@pytest.fixture
def pair(azure: Clients, disk: Inside) -> tuple[str, str]:
    """The SAS of an older and a newer snapshot, whose difference is `WRITTEN`."""
    disk.write(0, b"a" * 8 * K)
    snapshot(azure, "old", disk.id)
    disk.write(0, b"b" * K)
    disk.clear(2 * K, K)
    disk.write(4 * K, b"b" * K)
    snapshot(azure, "new", disk.id)
    return grant(azure, "old"), grant(azure, "new")


def told(azure: Clients, pair: tuple[str, str], **window: str) -> list[tuple[int, int, bool]]:
    """The difference as it stands in the answer, in its order."""
    headers = {"x-ms-version": VERSION, "x-ms-previous-snapshot-url": pair[0], **window}
    text = azure.send("GET", f"{pair[1]}&comp=pagelist", **headers).text
    rows = re.findall(r"<(\w+)Range><Start>(\d+)</Start><End>(\d+)</End>", text)
    return [(int(start), int(end) + 1, kind == "Clear") for kind, start, end in rows]


@pytest.mark.parametrize(
    ("kind", "lie"),
    [
        ("header-ignored", [(0, 2 * K, False), (3 * K, 8 * K, False), FOOTER]),
        ("list-cut", WRITTEN[:1]),
        ("range-left-out", [WRITTEN[0], WRITTEN[2]]),
        ("ranges-unsorted", WRITTEN[::-1]),
        ("ranges-overlapping", [WRITTEN[0], *WRITTEN]),
        ("ranges-beyond-end", [*WRITTEN, (GIB + 512, GIB + 1024, False)]),
        ("ranges-unaligned", [(start + 1, end, gone) for start, end, gone in WRITTEN]),
        ("footer-counted", [*WRITTEN, FOOTER]),
    ],
)
def test_a_difference_is_told_wrong_once(
    sandbox: Sandbox, azure: Clients, pair: tuple[str, str], kind: str, lie: Any
) -> None:
    sandbox.faults.add(kind)
    with blob(azure, pair[1]) as client:
        assert client.get_blob_properties().size == GIB + 512  # asks for no list
    assert told(azure, pair) == lie
    assert told(azure, pair) == WRITTEN


def test_a_window_is_ignored(sandbox: Sandbox, azure: Clients, pair: tuple[str, str]) -> None:
    window = {"x-ms-range": f"bytes=0-{K - 1}"}
    assert told(azure, pair, **window) == WRITTEN[:1]
    sandbox.faults.add("window-ignored")
    assert told(azure, pair, **window) == WRITTEN


def test_a_cut_list_has_no_marker(sandbox: Sandbox, azure: Clients, pair: tuple[str, str]) -> None:
    sandbox.faults.add("list-cut", after=1)
    with blob(azure, pair[1]) as client:
        assert page(client, pair[0], maxresults=2).next_marker
        cut = page(client, pair[0], maxresults=2)
        assert (ranges_of(cut), cut.next_marker) == (WRITTEN[:1], None)


def test_a_single_range_is_told_in_two_halves_in_reverse(
    sandbox: Sandbox, azure: Clients, disk: Inside
) -> None:
    snapshot(azure, "old", disk.id)
    disk.write(0, b"a" * K)
    snapshot(azure, "new", disk.id)
    sandbox.faults.add("ranges-unsorted")
    assert told(azure, (grant(azure, "old"), grant(azure, "new"))) == [(2048, K, False), (0, 2048, False)]


def test_lengths_and_versions_are_told_wrong(sandbox: Sandbox, azure: Clients, pair: tuple[str, str]) -> None:
    sandbox.faults.add("wrong-length", times=3)
    sandbox.faults.add("wrong-version")
    assert azure.send("HEAD", pair[1]).headers["Content-Length"] == str(GIB)
    part = azure.send("GET", pair[1], Range="bytes=0-511")
    assert part.headers["Content-Range"] == f"bytes 0-511/{GIB}"
    lists = [azure.send("GET", f"{pair[1]}&comp=pagelist", **{"x-ms-version": VERSION}) for _ in range(3)]
    assert lists[0].headers["x-ms-blob-content-length"] == str(GIB)
    assert [each.headers["x-ms-version"] for each in lists] == [VERSION, "2018-11-09", VERSION]


def test_a_host_is_busy_or_too_slow_to_list(sandbox: Sandbox, azure: Clients, pair: tuple[str, str]) -> None:
    sandbox.faults.add("server-busy")
    busy = pytest.raises(HttpResponseError, match="Operations per second is over the account limit")
    with blob(azure, pair[1]) as client, busy:
        client.download_blob(0, 512)
    sandbox.faults.add("list-timeout", ranges=1)
    for window, whole in (
        ({}, False),
        ({"offset": 0, "length": 5 * K}, False),
        ({"offset": 0, "length": K}, True),
    ):
        if whole:
            assert listed(azure, pair[1], pair[0], **window) == WRITTEN[:1]
            continue
        with pytest.raises(HttpResponseError, match="permitted time") as slow:
            listed(azure, pair[1], pair[0], maxresults=1, **window)
        assert slow.value.status_code == 500


def test_a_sas_dies_in_the_run_and_is_granted_anew(
    sandbox: Sandbox, azure: Clients, pair: tuple[str, str]
) -> None:
    sandbox.faults.add("sas-expired", after=1)
    with blob(azure, pair[1]) as client:
        client.download_blob(0, 512)
        for _ in range(2):
            with pytest.raises(HttpResponseError) as dead:
                client.download_blob(0, 512)
            assert dead.value.status_code == 403
    again = grant(azure, "new")
    assert again != pair[1]
    assert told(azure, (pair[0], again)) == WRITTEN


def test_a_body_breaks_off_and_a_read_is_slow(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as sandbox, in_process(sandbox) as azure:
        snapshot(azure, "s", vm_disk(sandbox, azure).id)
        sandbox.faults.add("slow-read", seconds=0.01)
        sandbox.faults.add("broken-body")
        with blob(azure, grant(azure, "s")) as client:
            assert client.download_blob(0, 512).readall() == bytes(512)
            # The SDK reads once more on its own; here each reading breaks off.
            sandbox.faults.add("broken-body", times=0)
            with pytest.raises((IncompleteReadError, HttpResponseError)):
                client.download_blob(0, 512).readall()


def test_a_body_breaks_off_over_https(tmp_path: Path) -> None:
    with serving(tmp_path / "azure") as info:
        azure = Clients(info)
        azure.disk("d")
        snapshot(azure, "s", azure.id("Microsoft.Compute/disks", "d"))
        sas = grant(azure, "s")
        fault(tmp_path / "azure", "broken-body")
        with pytest.raises(Exception, match="IncompleteRead"):
            azure.send("GET", sas, Range="bytes=0-1023")
        assert azure.send("GET", sas, Range="bytes=0-1023").content == bytes(1024)
        azure.close()


def test_the_rest_of_a_family_is_closed_after_a_deletion(
    sandbox: Sandbox, azure: Clients, disk: Inside, pair: tuple[str, str]
) -> None:
    snapshot(azure, "gone", disk.id)
    sandbox.faults.add("family-merging", seconds=1000, status=404, code="BlobNotFound")
    azure.compute.snapshots.begin_delete(GROUP, "gone").result()
    answer = azure.send("GET", pair[1], Range="bytes=0-511")
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (404, "BlobNotFound")


def test_a_policy_rewrites_what_a_snapshot_allows(sandbox: Sandbox, azure: Clients, disk: Inside) -> None:
    sandbox.faults.add("network-policy")
    assert snapshot(azure, "closed", disk.id).network_access_policy == "DenyAll"
    assert snapshot(azure, "open", disk.id).network_access_policy == "AllowAll"


def test_a_lost_answer_of_a_host(sandbox: Sandbox, azure: Clients, pair: tuple[str, str]) -> None:
    sandbox.faults.add("lost-answer", path="/md-")
    with pytest.raises(Exception, match="lost the answer"):
        azure.send("GET", pair[1])
    sandbox.faults.add("refuse", path="/md-", status=409, code="BlobOverwritten", about="difference")
    assert azure.send("HEAD", pair[1]).status_code == 200
    answer = azure.send("GET", f"{pair[1]}&comp=pagelist", **{"x-ms-previous-snapshot-url": pair[0]})
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (409, "BlobOverwritten")


def test_every_fault_of_exports_is_ordered_on_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        done = CliRunner().invoke(sandbox_commands, ["fault", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout

    shown = "".join(run("--help").split())  # as lines break at hyphens
    with serving(tmp_path / "azure"):
        for kind in KINDS:
            assert kind in shown
            run(tmp_path / "azure", kind, "--about", "list", "--ranges", 3, "--times", 2)
        rules = json.loads(run(tmp_path / "azure", "--json"))
    assert [rule["kind"] for rule in rules] == list(KINDS)
    assert {(rule["about"], rule["ranges"], rule["times"]) for rule in rules} == {("list", 3, 2)}
    assert set(LIES) < set(KINDS)
