"""Later runs read what Azure says has changed since the baseline, and notice where it lies."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from coriolis_azure.azure import names
from coriolis_azure.events import Event, Notice
from coriolis_azure.readers.changed import WINDOW
from coriolis_azure.replica import sets
from coriolis_azure.results import DiskReport
from coriolis_azure.run import resources
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.constants import MIB
from harness.deaths import Died, dying

pytestmark = pytest.mark.slow  # several runs each; test_histories.py is the fast lane's

Image = Callable[..., Path]
Connect = Callable[..., Source]
KEPT = {"keep_baseline": True, "chunk_size_kib": 64}
SIZE = 8 * MIB


class Replica:
    """A VM of one disk, its replica, and runs that bring the one up to the other."""

    def __init__(self, azure: Sandbox, connect: Connect, image: Image, folder: Path, mechanism: str) -> None:
        azure.add_vm("web", image("os", SIZE, seed=1))
        self.azure, self.folder, self._connect, self.mechanism = azure, folder, connect, mechanism
        self.disk = azure.disk(connect().inspect("web").disks[0].id)
        self.resources = azure.resources()

    def run(self, **environment: object) -> DiskReport:
        """A run; the image is compared with the disk."""
        (report,) = self.source(**environment).replicate("web", self.folder).disks
        assert (self.folder / "os.raw").read_bytes() == self.disk.path.read_bytes()
        assert len(self.baselines()) <= 1
        assert self.exposed() == []
        assert len(self.azure.resources()) == len(self.resources) + len(self.baselines())
        return report

    def source(self, **environment: object) -> Source:
        """What runs with the settings of these tests."""
        settings = {**KEPT, "replica_export_mechanism": self.mechanism, **environment}
        return self._connect(environment=settings)

    def write(self, chunk: int, seed: int = 7) -> None:
        """Change 4 KiB in a chunk."""
        self.disk.write(chunk * 64 * 1024 + 8192, random.Random(seed).randbytes(4096))

    def exposed(self) -> list[str]:
        """The snapshots that can be read, or that a URL could be had for."""
        source = self._connect()
        snapshots = source.azure.resources("snapshot", source.environment.resource_group)
        closed = {"networkAccessPolicy": "DenyAll", "diskState": "Unattached"}
        return [each["id"] for each in snapshots if not closed.items() <= each["properties"].items()]

    def baselines(self) -> list[str]:
        """The ids of the baselines in Azure."""
        source = self._connect()
        listed = source.azure.resources("snapshot", source.environment.resource_group)
        return [str(each["id"]) for each in listed if names.BASELINE_TAG in names.tags_of(each)]


@pytest.fixture(params=["snapshots"])
def replica(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, request: pytest.FixtureRequest
) -> Replica:
    return Replica(azure, connect, image, tmp_path / "images", request.param)


both = pytest.mark.parametrize("replica", ["snapshots", "hybrid"], indirect=True)


@both
def test_the_second_run_proves_the_list_and_the_third_reads_what_changed(replica: Replica) -> None:
    first = replica.run()
    assert (first.tier, first.relied_bytes) == ("allocated", 0)
    replica.write(3)
    second = replica.run()
    assert (second.tier, second.listed_bytes) == ("allocated", 4096)
    assert second.checked_bytes == SIZE - 64 * 1024
    replica.write(100)
    third = replica.run()
    assert third.tier == "changed"
    sent = 64 * 1024 if replica.mechanism == "snapshots" else 4096  # an agent sends leaves
    assert (third.sent_bytes, third.listed_bytes) == (sent, 4096)
    chunks = SIZE // (64 * 1024)
    assert third.read_bytes <= (1 + -(-chunks // WINDOW)) * 64 * 1024
    assert third.relied_bytes + third.read_bytes == SIZE


@both
def test_only_touched_grains_are_read_and_sent(replica: Replica) -> None:
    for _ in range(2):
        replica.run(chunk_size_kib=1024)
    replica.write(35)
    replica.write(36)
    report = replica.run(chunk_size_kib=1024)
    assert report.tier == "changed"
    assert report.sent_bytes == 2 * (65536 if replica.mechanism == "snapshots" else 4096)
    assert report.read_bytes == 2 * 65536 + report.checked_bytes


@both
def test_only_touched_grains_are_read_and_sent_to_blob_storage(replica: Replica) -> None:
    where = "blob://sandboxstorage/replicas/web"
    source = replica.source(chunk_size_kib=1024)
    for _ in range(2):
        source.replicate("web", where)
    replica.write(35)
    replica.write(36)
    (report,) = source.replicate("web", where).disks
    assert report.tier == "changed"
    assert report.sent_bytes == 2 * 65536
    assert report.read_bytes == 2 * 65536 + report.checked_bytes
    vhd = replica.azure.storage.blob("sandboxstorage/replicas/web/os.vhd")
    assert vhd is not None
    assert replica.azure.storage.content(vhd)[:SIZE] == replica.disk.path.read_bytes()


def test_of_chunks_that_are_read_as_a_whole_only_grains_that_differ_are_written(replica: Replica) -> None:
    replica.run(chunk_size_kib=1024)
    replica.write(35)
    replica.write(36)
    report = replica.run(chunk_size_kib=1024)
    assert report.tier == "allocated"
    assert report.sent_bytes == 2 * 65536


def test_every_so_many_runs_all_is_read(replica: Replica) -> None:
    tiers = [replica.run(full_every=3).tier for _ in range(8)]
    assert tiers == [
        "allocated",
        "allocated",
        "changed",
        "allocated",
        "changed",
        "changed",
        "allocated",
        "changed",
    ]


@both
def test_cleared_pages_become_zeros_unread(replica: Replica) -> None:
    replica.run()
    replica.run()
    replica.disk.clear(2 * MIB, MIB)
    report = replica.run()
    assert 0 < report.zero_bytes <= report.listed_bytes == MIB
    assert report.read_bytes == report.checked_bytes


@both
def test_a_disk_that_has_grown_is_read_where_it_grew(replica: Replica, tmp_path: Path) -> None:
    replica.run()
    replica.run()
    grown = tmp_path / "grown.raw"
    grown.write_bytes(replica.disk.path.read_bytes() + random.Random(5).randbytes(MIB))
    replica.azure.write("web", "os", grown)
    report = replica.run()
    assert report.sent_bytes >= MIB
    assert report.size_bytes == SIZE + MIB


def test_between_runs_nobody_can_read_a_baseline_and_it_has_an_end(
    replica: Replica, connect: Connect
) -> None:
    replica.run(baseline_days=3)
    source = connect()
    (id,) = replica.baselines()
    document = source.azure.get(id)
    assert document["properties"]["networkAccessPolicy"] == "DenyAll"
    assert document["properties"]["diskState"] == "Unattached"
    tags = names.tags_of(document)
    assert names.RUN_TAG not in tags
    made, until = names.moment(tags[names.MADE_TAG]), names.moment(tags[names.UNTIL_TAG])
    assert made is not None
    assert until is not None
    assert (until - made).days == 3


@both
@pytest.mark.parametrize("rewritten", ["upper", "gone"])
def test_what_a_policy_takes_the_tags_from_is_no_baseline(
    replica: Replica, told: list[Event], rewritten: str
) -> None:
    """It is deleted with the run or, if nothing shows any more that it is ours, told as left behind."""

    def rewrite(request: Request, answer: Callable[[Request], Response]) -> Response:
        document = json.loads(request.body) if request.method == "PATCH" and request.body else {}
        if names.BASELINE_TAG in document.get("tags", {}):
            kept = document["tags"] if rewritten == "upper" else {}
            document["tags"] = {name: value.upper() for name, value in kept.items()}
            request = replace(request, body=json.dumps(document).encode())
        return answer(request)

    replica.azure.intercept = rewrite
    done = replica.source().replicate("web", replica.folder)
    replica.azure.intercept = None
    left = sorted(
        {each["id"] for each in replica.azure.resources()} - {each["id"] for each in replica.resources}
    )
    assert list(done.left_behind) == left
    assert bool(left) is (rewritten == "gone")
    assert replica.baselines() == []
    assert any(
        "is not kept as a baseline: its tags" in event.text for event in told if isinstance(event, Notice)
    )


def test_without_the_setting_no_baseline_is_left_and_an_older_one_is_deleted(replica: Replica) -> None:
    replica.run()
    assert replica.baselines()
    report = replica.run(keep_baseline=False)
    assert replica.baselines() == []
    assert report.sent_bytes == 0


@both
def test_an_image_that_was_changed_by_hand_is_healed_although_nothing_is_listed(replica: Replica) -> None:
    replica.run()
    replica.run()
    with (replica.folder / "os.raw").open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"by hand")
    report = replica.run()
    assert report.sent_bytes + report.zero_bytes > 0
    assert report.tier == "changed"


def test_clean_up_lists_baselines_and_deletes_those_that_are_over_or_that_it_is_told_to(
    replica: Replica, connect: Connect
) -> None:
    replica.run()
    source = connect()
    (listed,) = source.baselines()
    assert (listed.instance, listed.disk) == ("web", "os")
    assert source.retire([listed]) == ([], [])
    assert source.retire([listed], every=True, dry_run=True) == ([listed], [])
    assert len(replica.baselines()) == 1
    over = replace(listed, until="2020-01-01T00:00:00Z")
    assert source.retire([over]) == ([over], [])
    assert replica.baselines() == []
    assert replica.run().tier == "allocated"
    assert source.retire(source.baselines(), every=True)[1] == []
    assert replica.baselines() == []


LOST = {
    "deleted": lambda source, snapshot: source.azure.delete(snapshot),
    "stripped of its tags": lambda source, snapshot: source.azure.tag(snapshot, {}),
}


@both
@pytest.mark.parametrize("lose", LOST.values(), ids=list(LOST))
def test_a_baseline_that_is_lost_costs_a_whole_read(
    replica: Replica, connect: Connect, told: list[Event], lose: Callable[[Source, str], None]
) -> None:
    replica.run()
    replica.run()
    (id,) = replica.baselines()
    lose(connect(), id)
    kept = replica.baselines()
    replica.resources = [each for each in replica.azure.resources() if each["id"] not in kept]
    replica.write(9)
    report = replica.run()
    assert (report.tier, report.reason) == ("allocated", "the baseline was deleted")
    assert any("what has changed is not known" in event.text for event in told if isinstance(event, Notice))


Intercept = Callable[[Request, Callable[[Request], Response]], Response]


def rewritten(change: Callable[[bytes], bytes]) -> Intercept:
    """A service that changes the lists of changes, but for those from a snapshot to itself."""

    def intercept(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        previous = request.header("x-ms-previous-snapshot-url")
        if not previous or Request("GET", previous).query["snapshot"] == request.query["snapshot"]:
            return response
        return replace(response, body=change(response.body))

    return intercept


def refusing(status: int, code: str) -> Intercept:
    """A service that refuses lists of changes."""

    def intercept(request: Request, answer: Callable[[Request], Response]) -> Response:
        if not request.header("x-ms-previous-snapshot-url"):
            return answer(request)
        body = (
            f"<?xml version='1.0' encoding='utf-8'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        )
        return Response(status, {"x-ms-error-code": code, "Content-Type": "application/xml"}, body.encode())

    return intercept


def drop_last(body: bytes) -> bytes:
    """Without the last range."""
    return re.sub(rb"(.*)<PageRange>.*?</PageRange>", rb"\1", body, flags=re.DOTALL)


def ranges(*pairs: tuple[int, int]) -> Callable[[bytes], bytes]:
    """These ranges, with inclusive ends, in place of what is there."""
    told = b"".join(b"<PageRange><Start>%d</Start><End>%d</End></PageRange>" % pair for pair in pairs)
    return lambda body: b"<?xml version='1.0' encoding='utf-8'?><PageList>%s</PageList>" % told


# Those that the sandbox knows no fault for: see test_guards.py.
LIES: dict[str, tuple[Intercept, str]] = {
    "written, not allocated": (
        rewritten(ranges((SIZE - 65536, SIZE - 65025))),
        "a page was written that is not",
    ),
    "refused": (refusing(409, "BlobOverwritten"), "BlobOverwritten"),
    "forbidden": (refusing(403, "AuthenticationFailed"), "AuthenticationFailed"),
}


@both
@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_cannot_be_right_is_not_used(replica: Replica, lie: str, told: list[Event]) -> None:
    replica.disk.clear(SIZE - MIB, MIB)
    replica.run()
    replica.run()
    replica.write(3)
    replica.write(SIZE // 65536 - 8)  # where nothing was allocated
    replica.azure.intercept, reason = LIES[lie]
    report = replica.run()
    replica.azure.intercept = None
    assert report.tier in ("allocated", "whole")
    assert reason in report.reason or any(reason in each.text for each in told if isinstance(each, Notice))
    replica.write(5)
    assert replica.run().tier == "allocated"  # what was proved has to be proved anew
    assert replica.run().tier == "changed"


@both
def test_a_change_that_is_not_listed_is_found_by_the_proof(replica: Replica, told: list[Event]) -> None:
    replica.run()
    replica.write(3)
    replica.write(50)
    replica.azure.intercept = rewritten(drop_last)
    replica.run()
    offset = 50 * 65536
    assert any(f"change at offset {offset}" in event.text for event in told if isinstance(event, Notice))
    replica.azure.intercept = None
    assert replica.run().tier == "allocated"  # nothing was proved


@both
def test_a_change_that_is_not_listed_is_found_within_so_many_runs(
    replica: Replica, told: list[Event]
) -> None:
    replica.run()
    replica.run()
    replica.write(3)
    replica.write(50)
    replica.azure.intercept = rewritten(drop_last)
    source, runs = replica.source(full_every=1000), 0
    while (replica.folder / "os.raw").read_bytes() != replica.disk.path.read_bytes():
        source.replicate("web", replica.folder)
        replica.azure.intercept, runs = None, runs + 1
    assert 1 < runs <= WINDOW
    assert any("leaves out a change" in event.text for event in told if isinstance(event, Notice))


def refusing_to_end_access(times: int) -> Callable[[Request, Callable[[Request], Response]], Response]:
    """An Azure that is busy with each snapshot so many times when the access to it is ended."""
    asked: Counter[str] = Counter()

    def intercept(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.path.endswith("/endGetAccess"):
            asked[request.path] += 1
            if asked[request.path] <= times:
                body = {"error": {"code": "AnotherOperationInProgress", "message": "busy"}}
                return Response.of(409, body)
        return answer(request)

    return intercept


@pytest.mark.parametrize(("times", "patience"), [(1, 60), (10**6, 0)])
def test_what_can_still_be_read_is_no_baseline(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, times: int, patience: int
) -> None:
    """If ending the access fails for good, the snapshot is not kept: a URL would outlive the run."""
    monkeypatch.setattr(resources, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(resources, "PATIENCE_SECONDS", patience)
    replica.run()
    before = set(replica.baselines())
    replica.azure.intercept = refusing_to_end_access(times)
    report = replica.source().replicate("web", replica.folder)
    new = set(replica.baselines()) - before
    if times == 1:
        assert len(new) == 1
        assert replica.exposed() == []
    else:
        assert new == set()
        assert {id.lower() for id in report.left_behind} == {id.lower() for id in replica.exposed()} - {
            id.lower() for id in before
        }
    replica.azure.intercept = None
    replica.run()


@pytest.mark.parametrize("method", ["PATCH", "POST"])
def test_a_clean_up_closes_the_baseline_that_a_dead_run_was_reading(replica: Replica, method: str) -> None:
    replica.run()
    old = replica.baselines()[0].lower()
    killed = False

    def dying_while_it_is_open(request: Request, answer: Callable[[Request], Response]) -> Response:
        nonlocal killed
        if killed:
            raise Died
        response = answer(request)
        killed = request.method == method and request.path.lower().startswith(old)
        if killed:
            raise Died
        return response

    replica.azure.intercept = dying_while_it_is_open
    with pytest.raises(Died):
        replica.source().replicate("web", replica.folder)
    replica.azure.intercept = None
    assert old in {id.lower() for id in replica.exposed()}
    replica.source().sweep(timedelta(hours=2), dry_run=True)
    assert old in {id.lower() for id in replica.exposed()}
    replica.source().sweep(timedelta(hours=2))
    assert replica.exposed() == []
    assert [id.lower() for id in replica.baselines()] == [old]
    replica.run()


def test_a_clean_up_leaves_the_baseline_open_that_a_living_run_reads(replica: Replica) -> None:
    replica.run()
    seen: list[int] = []

    def sweeping(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.path.endswith("/beginGetAccess") and not seen:
            seen.append(0)
            seen[0] = len(replica.exposed())
            replica.source().sweep(timedelta(hours=2))
            assert len(replica.exposed()) == seen[0]
        return response

    replica.azure.intercept = sweeping
    replica.run()
    assert seen[0] > 0


@pytest.mark.parametrize(
    ("replica", "part", "step"),
    [*(("snapshots", part, 4) for part in range(4)), ("hybrid", 0, 15)],  # a worker takes seconds
    indirect=["replica"],
)
def test_whatever_a_run_dies_of_the_next_one_is_right_and_leaves_one_baseline(
    replica: Replica, part: int, step: int
) -> None:
    replica.run()
    replica.run()
    chunks, at = random.Random(part), part
    while True:
        at += step
        replica.write(chunks.randrange(SIZE // 65536), seed=at)
        replica.azure.intercept = dying(at)
        try:
            replica.source().replicate("web", replica.folder)
        except Died:
            pass
        else:
            break  # it needs fewer requests
        finally:
            replica.azure.intercept = None
        if chunks.random() < 0.5:
            replica.source().sweep(timedelta(hours=2))
            assert replica.exposed() == []
        if chunks.random() < 0.5:
            replica.write(chunks.randrange(SIZE // 65536), seed=-at)
        replica.run()
    assert at > 40


@pytest.mark.parametrize("before", ["nothing", "a replica without a baseline"])
def test_a_first_baseline_that_no_image_names_yet_goes_with_the_next_run(
    replica: Replica, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before != "nothing":
        replica.run(keep_baseline=False)
    record_point = sets.complete

    def die(*arguments: object) -> None:
        del arguments
        replica.azure.intercept = dying(0)
        raise Died

    for _ in range(2):
        monkeypatch.setattr(sets, "complete", die)
        with pytest.raises(Died):
            replica.source().replicate("web", replica.folder)
        replica.azure.intercept = None
    assert len(replica.baselines()) == 2
    monkeypatch.setattr(sets, "complete", record_point)
    replica.run()
    assert len(replica.baselines()) == 1
    replica.run(keep_baseline=False)
    assert replica.baselines() == []
