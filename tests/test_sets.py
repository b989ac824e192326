"""Which disks belong together: `verify` names what is missing, and what is of another run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.errors import CoriolisAzureError, InvalidInput
from coriolis_azure.replica import sets
from coriolis_azure.replica.verification import Verdict
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.constants import MIB
from harness.lanes import slow
from harness.processes import completed

BLOB = "blob://sandboxstorage/images/web"


class Replica:
    """A replica of the VM `web` with four disks, in a folder or in Blob storage."""

    def __init__(self, azure: Sandbox, source: Source, to: str, folder: Path) -> None:
        self.azure, self.source, self.to, self.folder = azure, source, to, folder
        self._names = ("os", "data-0", "data-1", "data-2")
        azure.add_vm("web", self._content(0), [self._content(number) for number in (1, 2, 3)])

    def _content(self, seed: int) -> Path:
        path = self.folder / "content.raw"
        path.write_bytes(random.Random(seed).randbytes(MIB // 4))
        return path

    def change(self) -> None:
        """Another content of every disk."""
        disks: tuple[str | int, ...] = ("os", 0, 1, 2)
        for number, disk in enumerate(disks):
            self.azure.write("web", disk, self._content(10 + number))

    def verdicts(self) -> dict[str, Verdict]:
        return {verdict.name: verdict for verdict in self.source.verify(self.to)}

    def code(self) -> int:
        """What the command ends with, where a process reaches the replica."""
        return completed(["verify", self.to, "--json"]).returncode

    # What is done to it

    def path(self, name: str) -> Path:
        return Path(self.to) / name

    def blobs(self) -> dict[str, Any]:
        return self.azure.storage.account("sandboxstorage").containers["images"].blobs

    def block(self, name: str) -> None:
        """Something that is no image of ours stands where the image would be."""
        if self.to == BLOB:
            container = self.source.storage.account("sandboxstorage").container("images")
            container.ensure()
            container.blob(f"web/{name}.vhd").put(b"somebody's")
        else:  # from the first snapshot on: what is there before that is refused before anything is made

            def stand_in_the_way(request: Request, answer: Callable[[Request], Response]) -> Response:
                if request.method == "PUT" and "/snapshots/" in request.path:
                    self.path(f"{name}.raw").mkdir(exist_ok=True)
                return answer(request)

            self.azure.intercept = stand_in_the_way

    def unblock(self, name: str) -> None:
        if self.to == BLOB:
            self.source.storage.account("sandboxstorage").container("images").blob(f"web/{name}.vhd").delete()
        else:
            self.azure.intercept = None
            self.path(f"{name}.raw").rmdir()

    def lose(self, name: str) -> None:
        if self.to == BLOB:
            del self.blobs()[f"web/{name}"]
        else:
            self.path(name).unlink()


@pytest.fixture(params=["folder", slow("blob")])
def replica(request: pytest.FixtureRequest, azure: Sandbox, source: Source, tmp_path: Path) -> Replica:
    return Replica(azure, source, BLOB if request.param == "blob" else str(tmp_path / "web"), tmp_path)


def image_of(replica: Replica, name: str) -> str:
    return f"{name}.vhd" if replica.to == BLOB else f"{name}.raw"


@pytest.mark.slow
def test_a_whole_replica_says_when_it_is_of_and_of_what(replica: Replica) -> None:
    done = replica.source.replicate("web", replica.to)
    assert [verdict.verified for verdict in replica.verdicts().values()] == [True] * 4
    with opened(replica) as place:
        record = sets.read(place)
    assert record is not None
    assert record.begun is None
    assert record.point is not None
    assert record.point.roots == {disk.name: disk.root for disk in done.disks}
    assert record.point.time.endswith("Z")


def opened(replica: Replica) -> Any:
    from coriolis_azure.events import silent
    from coriolis_azure.replica import places

    return places.open(replica.to, silent, replica.source.storage, existing=True)


@pytest.mark.slow
def test_a_missing_image_is_named(replica: Replica) -> None:
    replica.source.replicate("web", replica.to)
    replica.lose(image_of(replica, "data-1"))
    found = replica.verdicts()
    assert (found["data-1"].verified, found["data-1"].reason) == (False, "its image is missing")
    assert [found[name].verified for name in ("os", "data-0", "data-2")] == [True] * 3
    if replica.to != BLOB:
        assert replica.code() == 5
    replica.source.replicate("web", replica.to)
    assert [verdict.verified for verdict in replica.verdicts().values()] == [True] * 4


@pytest.mark.slow
def test_a_first_run_that_failed_is_no_replica_whatever_disks_it_has_brought(replica: Replica) -> None:
    replica.block("data-2")
    with pytest.raises(CoriolisAzureError):
        replica.source.replicate("web", replica.to)
    replica.unblock("data-2")
    found = replica.verdicts()
    assert (found["data-2"].verified, found["data-2"].reason) == (False, "its image is missing")
    assert found["replica"].verified is False
    assert "has not succeeded: there is no complete replica yet" in found["replica"].reason
    if replica.to != BLOB:
        failed = completed(["verify", replica.to, "--json"])
        error = json.loads(failed.stderr.splitlines()[-1])
        assert failed.returncode == error["exit_code"] == 5
        assert error["error"] == "IncompleteReplica"
    replica.source.replicate("web", replica.to)
    assert [verdict.verified for verdict in replica.verdicts().values()] == [True] * 4


@pytest.mark.slow
def test_disks_of_two_runs_are_no_replica(azure: Sandbox, source: Source, tmp_path: Path) -> None:
    """Each image is right by its own manifest."""
    replica = Replica(azure, source, str(tmp_path / "web"), tmp_path)
    source.replicate("web", replica.to)
    shutil.copytree(replica.to, tmp_path / "older")
    replica.change()
    source.replicate("web", replica.to)
    for name in ("data-0.raw", "data-0.raw.manifest"):
        shutil.copy(tmp_path / "older" / name, replica.path(name))
    found = replica.verdicts()
    assert [found[name].verified for name in ("os", "data-0", "data-1", "data-2")] == [True] * 4
    assert found["replica"].verified is False
    assert found["replica"].reason.startswith("data-0: not from the run of ")
    assert replica.code() == 5
    source.replicate("web", replica.to)
    assert replica.code() == 0


@pytest.mark.slow
def test_a_run_that_failed_over_some_disks_leaves_no_set(replica: Replica) -> None:
    """The second run brings what it can of the other disks and fails over one."""
    replica.source.replicate("web", replica.to)
    replica.change()
    replica.lose(image_of(replica, "data-2"))
    replica.block("data-2")
    with pytest.raises(CoriolisAzureError):
        replica.source.replicate("web", replica.to)
    replica.unblock("data-2")
    found = replica.verdicts()
    assert found["data-2"].verified is False
    with opened(replica) as place:
        record = sets.read(place)
    assert record is not None
    assert record.begun is not None
    assert record.point is not None
    assert set(record.point.roots) == {"os", "data-0", "data-1", "data-2"}


@pytest.mark.slow
def test_a_run_that_failed_before_it_changed_anything_takes_nothing_back(
    azure: Sandbox, replica: Replica
) -> None:
    replica.source.replicate("web", replica.to)
    azure.faults.add("policy", method="PUT", path="/snapshots/", times=0)
    with pytest.raises(CoriolisAzureError):
        replica.source.replicate("web", replica.to)
    assert [verdict.verified for verdict in replica.verdicts().values()] == [True] * 4


@pytest.mark.slow
def test_what_was_left_out_is_not_missing(
    azure: Sandbox, connect: Callable[..., Source], tmp_path: Path
) -> None:
    source = connect({"exclude_disks": ["data-1"]})
    replica = Replica(azure, source, str(tmp_path / "web"), tmp_path)
    source.replicate("web", replica.to)
    assert sorted(replica.verdicts()) == ["data-0", "data-2", "os"]
    assert replica.code() == 0
    connect().replicate("web", replica.to)
    source.replicate("web", replica.to)
    found = replica.verdicts()
    assert (found["data-1"].verified, found["data-1"].reason) == (
        True,
        "not part of the last run: the VM no longer had this disk, or it was excluded",
    )
    assert replica.code() == 0


@pytest.mark.slow
def test_a_replica_of_an_older_version_says_so_and_is_mended_by_a_run(replica: Replica) -> None:
    replica.source.replicate("web", replica.to)
    replica.lose("replica.json")
    found = replica.verdicts()
    assert found["replica"].verified is None
    assert "an older version made this replica. Replicate to it once more" in found["replica"].reason
    if replica.to != BLOB:
        assert replica.code() == 2
    replica.source.replicate("web", replica.to)
    assert "replica" not in replica.verdicts()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 1, "vm": 5, "begun": null, "point": null}', "is damaged"),
        ('{"version": 1, "vm": "x", "begun": null, "point": {"roots": 1}}', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"version": 3}', "has version 3"),
    ],
    ids=["empty", "list", "number", "roots", "deep", "newer"],
)
def test_a_record_that_cannot_be_used_is_named(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        sets.Record.of(text.encode())


def test_a_record_comes_back_as_it_was() -> None:
    record = sets.Record(
        "/vm",
        sets.Begun("run", "2026-01-01T00:00:00Z", ("os",)),
        sets.Point("r", "t", {"os": "aa"}, ("data-0",)),
    )
    assert sets.Record.of(record.text()) == record
