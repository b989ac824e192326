"""Faults of exported disks: each can be ordered, does what it says, and ends when its count is used up."""

from __future__ import annotations

import json
import re
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
def disk(azure: Sandbox, clients: Clients) -> Inside:
    return vm_disk(azure, clients)


@pytest.fixture
def pair(clients: Clients, disk: Inside) -> tuple[str, str]:
    """The SAS of an older and a newer snapshot, whose difference is `WRITTEN`."""
    disk.write(0, b"a" * 8 * K)
    snapshot(clients, "old", disk.id)
    disk.write(0, b"b" * K)
    disk.clear(2 * K, K)
    disk.write(4 * K, b"b" * K)
    snapshot(clients, "new", disk.id)
    return grant(clients, "old"), grant(clients, "new")


def told(clients: Clients, pair: tuple[str, str], **window: str) -> list[tuple[int, int, bool]]:
    """The difference as it stands in the answer, in its order."""
    headers = {"x-ms-version": VERSION, "x-ms-previous-snapshot-url": pair[0], **window}
    text = clients.send("GET", f"{pair[1]}&comp=pagelist", **headers).text
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
    azure: Sandbox, clients: Clients, pair: tuple[str, str], kind: str, lie: Any
) -> None:
    azure.faults.add(kind)
    with blob(clients, pair[1]) as client:
        assert client.get_blob_properties().size == GIB + 512  # asks for no list
    assert told(clients, pair) == lie
    assert told(clients, pair) == WRITTEN


def test_a_window_is_ignored(azure: Sandbox, clients: Clients, pair: tuple[str, str]) -> None:
    window = {"x-ms-range": f"bytes=0-{K - 1}"}
    assert told(clients, pair, **window) == WRITTEN[:1]
    azure.faults.add("window-ignored")
    assert told(clients, pair, **window) == WRITTEN


def test_a_cut_list_has_no_marker(azure: Sandbox, clients: Clients, pair: tuple[str, str]) -> None:
    azure.faults.add("list-cut", after=1)
    with blob(clients, pair[1]) as client:
        assert page(client, pair[0], maxresults=2).next_marker
        cut = page(client, pair[0], maxresults=2)
        assert (ranges_of(cut), cut.next_marker) == (WRITTEN[:1], None)


def test_a_single_range_is_told_in_two_halves_in_reverse(
    azure: Sandbox, clients: Clients, disk: Inside
) -> None:
    snapshot(clients, "old", disk.id)
    disk.write(0, b"a" * K)
    snapshot(clients, "new", disk.id)
    azure.faults.add("ranges-unsorted")
    assert told(clients, (grant(clients, "old"), grant(clients, "new"))) == [
        (2048, K, False),
        (0, 2048, False),
    ]


def test_lengths_and_versions_are_told_wrong(azure: Sandbox, clients: Clients, pair: tuple[str, str]) -> None:
    azure.faults.add("wrong-length", times=3)
    azure.faults.add("wrong-version")
    assert clients.send("HEAD", pair[1]).headers["Content-Length"] == str(GIB)
    part = clients.send("GET", pair[1], Range="bytes=0-511")
    assert part.headers["Content-Range"] == f"bytes 0-511/{GIB}"
    lists = [clients.send("GET", f"{pair[1]}&comp=pagelist", **{"x-ms-version": VERSION}) for _ in range(3)]
    assert lists[0].headers["x-ms-blob-content-length"] == str(GIB)
    assert [each.headers["x-ms-version"] for each in lists] == [VERSION, "2018-11-09", VERSION]


def test_a_host_is_busy_or_too_slow_to_list(azure: Sandbox, clients: Clients, pair: tuple[str, str]) -> None:
    azure.faults.add("server-busy")
    busy = pytest.raises(HttpResponseError, match="Operations per second is over the account limit")
    with blob(clients, pair[1]) as client, busy:
        client.download_blob(0, 512)
    azure.faults.add("list-timeout", ranges=1)
    for window, whole in (
        ({}, False),
        ({"offset": 0, "length": 5 * K}, False),
        ({"offset": 0, "length": K}, True),
    ):
        if whole:
            assert listed(clients, pair[1], pair[0], **window) == WRITTEN[:1]
            continue
        with pytest.raises(HttpResponseError, match="permitted time") as slow:
            listed(clients, pair[1], pair[0], maxresults=1, **window)
        assert slow.value.status_code == 500


def test_a_sas_dies_in_the_run_and_is_granted_anew(
    azure: Sandbox, clients: Clients, pair: tuple[str, str]
) -> None:
    azure.faults.add("sas-expired", after=1)
    with blob(clients, pair[1]) as client:
        client.download_blob(0, 512)
        for _ in range(2):
            with pytest.raises(HttpResponseError) as dead:
                client.download_blob(0, 512)
            assert dead.value.status_code == 403
    again = grant(clients, "new")
    assert again != pair[1]
    assert told(clients, (pair[0], again)) == WRITTEN


@pytest.mark.slow
def test_a_body_breaks_off_and_a_read_is_slow(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as azure, in_process(azure) as clients:
        snapshot(clients, "s", vm_disk(azure, clients).id)
        azure.faults.add("slow-read", seconds=0.01)
        azure.faults.add("broken-body")
        with blob(clients, grant(clients, "s")) as client:
            assert client.download_blob(0, 512).readall() == bytes(512)
            # The SDK reads once more on its own; here each reading breaks off.
            azure.faults.add("broken-body", times=0)
            with pytest.raises((IncompleteReadError, HttpResponseError)):
                client.download_blob(0, 512).readall()


def test_a_body_breaks_off_over_https(tmp_path: Path) -> None:
    with serving(tmp_path / "azure") as info:
        clients = Clients(info)
        clients.disk("d")
        snapshot(clients, "s", clients.id("Microsoft.Compute/disks", "d"))
        sas = grant(clients, "s")
        fault(tmp_path / "azure", "broken-body")
        with pytest.raises(Exception, match="IncompleteRead"):
            clients.send("GET", sas, Range="bytes=0-1023")
        assert clients.send("GET", sas, Range="bytes=0-1023").content == bytes(1024)
        clients.close()


def test_the_rest_of_a_family_is_closed_after_a_deletion(
    azure: Sandbox, clients: Clients, disk: Inside, pair: tuple[str, str]
) -> None:
    snapshot(clients, "gone", disk.id)
    azure.faults.add("family-merging", seconds=1000, status=404, code="BlobNotFound")
    clients.compute.snapshots.begin_delete(GROUP, "gone").result()
    answer = clients.send("GET", pair[1], Range="bytes=0-511")
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (404, "BlobNotFound")


def test_a_policy_rewrites_what_a_snapshot_allows(azure: Sandbox, clients: Clients, disk: Inside) -> None:
    azure.faults.add("network-policy")
    assert snapshot(clients, "closed", disk.id).network_access_policy == "DenyAll"
    assert snapshot(clients, "open", disk.id).network_access_policy == "AllowAll"


@pytest.mark.slow
def test_a_lost_answer_of_a_host(azure: Sandbox, clients: Clients, pair: tuple[str, str]) -> None:
    azure.faults.add("lost-answer", path="/md-")
    with pytest.raises(Exception, match="lost the answer"):
        clients.send("GET", pair[1])
    azure.faults.add("refuse", path="/md-", status=409, code="BlobOverwritten", about="difference")
    assert clients.send("HEAD", pair[1]).status_code == 200
    answer = clients.send("GET", f"{pair[1]}&comp=pagelist", **{"x-ms-previous-snapshot-url": pair[0]})
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (409, "BlobOverwritten")


@pytest.mark.slow
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
