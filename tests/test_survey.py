"""`status` of one replica and of many: what is seen of each, without touching any of them."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from coriolis_azure.cli import files, pages, prometheus
from coriolis_azure.cli.reporting import reporting
from coriolis_azure.errors import InvalidInput
from coriolis_azure.events import silent
from coriolis_azure.replica import history, places, sets, several
from coriolis_azure.replica.history import History
from coriolis_azure.replica.manifest import ZERO
from coriolis_azure.replica.survey import Surveyed, survey
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from coriolis_azure.timeline import RunReport
from harness.constants import MIB
from harness.processes import completed

NOW = datetime(2026, 11, 29, 12, tzinfo=timezone.utc)
POINT = "2026-11-29T10:00:00Z"
FOREIGN = 'web<script>alert(1)</script>\x1b[31m\u202e"\\'


def arm_id(name: str) -> str:
    return f"/subscriptions/s/resourceGroups/Production/providers/Microsoft.Compute/virtualMachines/{name}"


def replica(folder: Path, vm: str = "web", **options: int) -> Path:
    """A replica of 3 MiB as a run leaves it."""
    with places.open(str(folder), silent) as place:
        place.claim(arm_id(vm))
        record = sets.begin(place, arm_id(vm), sets.Begun("run", POINT, ("os",)), options.get("keep"))
        with place.disk("os") as disk:
            manifest = disk.known("id", 3 * MIB, MIB, full=False)
            disk.intend(0, MIB)
            disk.write(0, b"a" * MIB)
            digests = manifest.digests.copy()
            digests.put(0, manifest.digester()(b"a" * MIB))
            changed = type(manifest)(manifest.size, MIB, manifest.hash, manifest.key, digests, "id")
            disk.settle(changed, 0, 1)
            assert changed.digest(1) == ZERO
            disk.flush()
            disk.commit(changed)
        sets.complete(place, record, {"os": changed.root()})
        run = RunReport(vm, POINT, 60.0, "done", point=POINT)
        place.keep_history(History().after(run).text())  # type: ignore[attr-defined]
    return folder


def found(folder: Path) -> dict[str, Surveyed]:
    return {one.name: one for one in survey(str(folder), silent)[0]}


def test_a_replica_is_described(tmp_path: Path) -> None:
    replica(tmp_path / "web")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "web").iterdir()}
    (one,), many = survey(str(tmp_path / "web"), silent)
    assert not many
    assert (one.vm_name, one.group, one.point, one.disks, one.state) == (
        "web",
        "Production",
        POINT,
        ("os",),
        "good",
    )
    assert one.size_bytes == 3 * MIB
    assert one.stored_bytes is not None
    assert MIB <= one.stored_bytes < 2 * MIB
    assert (one.age(NOW), one.advice(), one.verified, one.running) == (7200, "", None, False)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "web").iterdir()} == before


def test_many_replicas_are_described_each_by_its_own_state(tmp_path: Path) -> None:
    for name in ("good", "group/deep", "damaged", "lost", "dead"):
        replica(tmp_path / name)
    (tmp_path / "damaged/replica.json").write_text("{")
    (tmp_path / "lost/os.raw").unlink()
    (tmp_path / "dead/os.raw.redo").touch()
    (tmp_path / "dead/.run").write_text("{}")
    record = json.loads((tmp_path / "dead/replica.json").read_text())
    record["begun"] = {"run": "r", "time": "2026-11-29T11:00:00Z", "disks": ["os"], "left_out": []}
    (tmp_path / "dead/replica.json").write_text(json.dumps(record))
    (tmp_path / "new/.vm").parent.mkdir()
    (tmp_path / "new/.vm").write_text(arm_id("new"))
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "good")
    with places.open(str(replica(tmp_path / "busy")), silent):
        states = {name: one.state for name, one in found(tmp_path).items()}
    assert states == {
        "good": "good",
        "group/deep": "good",
        "damaged": "damaged",
        "lost": "damaged",
        "dead": "unfinished",
        "new": "incomplete",
        "busy": "running",
    }
    seen = found(tmp_path)
    assert "damaged" in seen["damaged"].error
    assert (seen["lost"].missing, seen["dead"].drafts, seen["busy"].state) == (("os",), ("os",), "good")
    assert all(one.advice() for name, one in seen.items() if name not in ("good", "busy", "group/deep"))
    # Nothing tells whether a run or a `restore` has died there: what is done again must be what was begun.
    assert seen["new"].advice().startswith("Do again what was begun there, `replicate` or `restore`")
    assert "restore" not in seen["dead"].advice()


def test_what_was_fetched_of_a_disk_that_is_left_out_is_nothing_to_complete(tmp_path: Path) -> None:
    """It stays for a run that does not exclude the disk: replicating again would not change that."""
    replica(tmp_path)
    (tmp_path / "data-0.raw.redo").touch()
    ((_, one),) = found(tmp_path).items()
    assert (one.drafts, one.unpublished, one.state, one.advice()) == (("data-0",), False, "good", "")
    (tmp_path / "os.raw.redo").touch()
    ((_, one),) = found(tmp_path).items()
    assert (one.unpublished, one.state) == (True, "unfinished")


def test_a_replica_is_not_put_beside_those_that_it_would_hide(tmp_path: Path) -> None:
    """Another one in the folder of a replica hides none that was seen before."""
    replica(tmp_path / "all/web")
    with pytest.raises(InvalidInput, match="the place of several VMs") as refused:
        replica(tmp_path / "all", "db")
    assert set(found(tmp_path / "all")) == {"web"}
    instead = re.search("one VM, ([^,]*),", refused.value.remedy)
    assert instead is not None
    replica(Path(instead[1].replace("NAME", "db")), "db")
    replica(tmp_path / "all/web/inside")
    assert set(found(tmp_path / "all")) == {"db", "web"}


@pytest.mark.parametrize("name", ["os.raw", "data-0.raw", "replica.json"])
def test_a_vm_may_be_called_as_a_file_of_a_replica_is(tmp_path: Path, name: str) -> None:
    for vm in (name, "web"):
        replica(tmp_path / vm, vm)
    assert {path: one.state for path, one in found(tmp_path).items()} == {name: "good", "web": "good"}
    with places.open(str(tmp_path), silent, existing=True) as place:
        assert place.names() == []
    with pytest.raises(InvalidInput, match="the place of several VMs"):
        replica(tmp_path, "db")
    replica(tmp_path / "points", "points")  # keeps no earlier points of the others


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 100, b"[" * 10_000])
def test_a_damaged_history_takes_nothing_from_the_rest(tmp_path: Path, damage: bytes) -> None:
    replica(tmp_path / "web")
    (tmp_path / "web" / history.NAME).write_bytes(damage)
    one = found(tmp_path)["web"]
    assert (one.state, one.history) == ("good", History())


def test_folders_deeper_than_calls_can_be_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(replica(tmp_path / "web"))
    for _ in range(sys.getrecursionlimit()):
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    assert found(tmp_path / "web")[""].state == "good"
    for _ in range(sys.getrecursionlimit()):  # pytest cannot remove them either
        os.chdir("..")
        os.rmdir("d")  # noqa: PTH106


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file"])
def test_where_there_is_no_replica_that_is_said(tmp_path: Path, there: str) -> None:
    dest = tmp_path / "x"
    if there == "a file":
        dest.touch()
    elif there != "nothing":
        dest.mkdir()
    with pytest.raises(InvalidInput, match="no replica" if there == "an empty folder" else "cannot be used"):
        survey(str(dest), silent)
    assert list(tmp_path.iterdir()) == ([] if there == "nothing" else [dest])


def test_replicas_in_blob_storage_are_described_too(azure: Sandbox, source: Source, tmp_path: Path) -> None:
    for name in ("web", "db"):
        with places.open(f"blob://sandboxstorage/replicas/all/{name}", silent, source.storage) as place:
            place.claim(arm_id(name))
            sets.begin(place, arm_id(name), sets.Begun("run", POINT, ("os",)))
            if name == "web":
                states = {
                    one.name: one.state
                    for one in survey("blob://sandboxstorage/replicas", silent, source.storage)[0]
                }
                assert states == {"all/web": "running"}
    seen, many = survey("blob://sandboxstorage/replicas/all", silent, source.storage)
    assert many
    assert [(one.name, one.vm_name, one.state, one.stored_bytes) for one in seen] == [
        ("db", "db", "incomplete", None),
        ("web", "web", "incomplete", None),
    ]
    with pytest.raises(InvalidInput, match="no replica"):
        survey("blob://sandboxstorage/replicas/al", silent, source.storage)
    with pytest.raises(InvalidInput, match="the place of several VMs"):
        places.open("blob://sandboxstorage/replicas/all", silent, source.storage)
    with (
        pytest.raises(InvalidInput, match="the place of one VM"),
        several.held("blob://sandboxstorage/replicas/all/web", source.storage),
    ):
        pass
    assert len(survey("blob://sandboxstorage/replicas/all", silent, source.storage)[0]) == len(seen)


def test_metrics_are_in_the_format_of_the_collector(tmp_path: Path) -> None:
    replica(tmp_path / "all/web")
    replica(tmp_path / "all/db", vm=FOREIGN)
    for name in ("bad", "\x1b", "\\x1b"):
        (tmp_path / "all" / name).mkdir()
        (tmp_path / "all" / name / "replica.json").write_text("{")
    told = prometheus.text(found(tmp_path / "all").values(), NOW)
    names = set()
    sample = re.compile(
        r'([a-z_]+)(\{[a-z_]+="(?:[^"\\\n]|\\["\\])*"(?:,[a-z_]+="(?:[^"\\\n]|\\["\\])*")*\})? (\d+(?:\.\d+)?)'
    )
    for line in told.splitlines():
        if line.startswith("# TYPE "):
            names.add(line.split()[2])
            assert line.endswith(" gauge")
        elif not line.startswith("# HELP "):
            match = sample.fullmatch(line)
            assert match, line
            assert match[1] in names
    assert told.isprintable() or set(filter(lambda letter: not letter.isprintable(), told)) == {"\n"}
    assert (
        'coriolis_azure_replica_point_timestamp_seconds{replica="web",vm="web",resource_group="Production"} 1795946400'
        in told
    )
    assert 'coriolis_azure_replica_readable{replica="bad",vm="bad",resource_group=""} 0' in told
    assert 'point_timestamp_seconds{replica="bad"' not in told
    assert len(set(told.splitlines())) == len(told.splitlines())
    page = (Path(__file__).parent.parent / "docs/howto/schedules.md").read_text()
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_what_the_command_is_asked_for_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    replica(tmp_path / "all/web")
    (tmp_path / "all/bad").mkdir()
    (tmp_path / "all/bad/replica.json").write_text("{")
    metrics = tmp_path / "metrics.prom"
    page = tmp_path / "page.html"
    line = ["status", str(tmp_path / "all"), "--json", "--prometheus", str(metrics), "--html", str(page)]
    done = completed(line)
    assert done.returncode == 2
    assert "bad" in done.stderr
    listed = json.loads(done.stdout)["replicas"]
    assert [(one["name"], one["state"], "error" in one) for one in listed] == [
        ("bad", "damaged", True),
        ("web", "good", False),
    ]
    assert metrics.read_text().count("\ncoriolis_azure_replica_readable{") == 2
    assert metrics.stat().st_mode & 0o444 == 0o444
    assert "2 replicas" in page.read_text()
    people = completed(["status", str(tmp_path / "all")])
    assert [line.split()[0] for line in people.stdout.splitlines()[2:]] == ["bad", "web"]
    one = completed(["status", str(tmp_path / "all/web"), "--json"])
    assert json.loads(one.stdout)["point"] == POINT
    before = sorted(tmp_path.iterdir())
    for file in (tmp_path / "none/metrics.prom", tmp_path / "all"):
        failed = completed(["status", str(tmp_path / "all/web"), "--prometheus", str(file)])
        assert (failed.returncode, failed.stdout) == (2, "")
        assert f"{file} cannot be written" in failed.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    file.write_text("<!DOCTYPE html>old")
    file.chmod(0o640)

    def full(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(InvalidInput, match="No space left"):
            files.write(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("page.html", "<!DOCTYPE html>old")
    ]
    files.write(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o640)
    files.write(Path("/dev/null"), "new")
    files.refuse_unwritable(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["os.raw", "replica.json", "link.html"])
def test_a_page_takes_the_place_of_nothing_but_a_page(tmp_path: Path, name: str) -> None:
    """Not of an image, nor of what belongs to it, by whatever name; a device is no file to write text to."""
    web = replica(tmp_path / "web")
    (web / "link.html").symlink_to("os.raw")
    before = {path.name: path.read_bytes() for path in web.iterdir()}
    for option in ("--html", "--prometheus"):
        refused = completed(["status", str(web), option, str(web / name)])
        assert refused.returncode == 2
        assert f"{web / name} holds something else than a page or metrics" in refused.stderr
    with pytest.raises(InvalidInput, match="holds something else"), reporting(web / name):
        raise AssertionError("begun")
    with pytest.raises(InvalidInput, match="holds something else"):  # it came to be during the run
        files.write(web / name, "new")
    assert {path.name: path.read_bytes() for path in web.iterdir()} == before


def test_a_file_of_ours_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    replica(tmp_path / "web")
    now = next(iter(found(tmp_path).values()))
    for text in (prometheus.text([now], NOW), pages.of_replicas([now], NOW), ""):
        (tmp_path / "file").write_text(text)
        files.write(tmp_path / "file", "new")
        assert (tmp_path / "file").read_text() == "new"


def test_a_file_behind_links_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for path in (tmp_path / "circle", tmp_path / "circle/page.html"):
        for attempt in (files.refuse_unwritable, lambda path: files.write(path, "new")):
            with pytest.raises(InvalidInput, match="Too many levels of symbolic links") as refused:
                attempt(path)
            assert refused.value.remedy


def test_an_age_is_told_in_one_unit() -> None:
    from coriolis_azure.events import aged

    ages = [timedelta(seconds=5), timedelta(minutes=12), timedelta(hours=5), timedelta(days=9)]
    assert [aged(age.total_seconds()) for age in ages] == ["5 s", "12 min", "5 h", "9 days"]
