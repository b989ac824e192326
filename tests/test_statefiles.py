"""The files beside images: never through a link, for their owner only, and what a reader leaves: nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coriolis_azure.clock import Clock
from coriolis_azure.errors import InvalidInput
from coriolis_azure.events import silent
from coriolis_azure.replica import places, sets, statefiles
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.status import status
from coriolis_azure.replica.survey import survey
from coriolis_azure.replica.verification import verify
from harness.block_devices import command
from harness.image_runs import CHUNK, SIZE, A, B, Told, holds, run

VM = "/subscriptions/s/vm-1"
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the image of a disk."""
    path = tmp_path / "images"
    with ImageFolder(path) as images:
        images.claim(VM)
        record = sets.begin(images, VM, sets.Begun("run", "2026-01-01T00:00:00Z", ("os",)))
        run(path / "os.raw", {0: A})
        sets.complete(images, record, {"os": images.disk("os").stored().root()})
    return path


def whole_run(folder: Path) -> None:
    """All that a run does in a folder of images, with a change."""
    with ImageFolder(folder) as images:
        images.claim(VM)
        sets.begin(images, VM, sets.Begun("run", "2026-01-02T00:00:00Z", ("os",)))
        images.reserve(["os"])
    run(folder / "os.raw", {0: B})


READ = [".lock", ".run", ".vm", "os.raw", "os.raw.manifest", "os.raw.draft"]
# or done without
REPLACED = [
    ".vm.new",
    "os.raw.manifest.new",
    "os.raw.grains",
    "os.raw.redo",
    "os.raw.index",
    "replica.json.new",
]


@pytest.mark.parametrize("name", READ + REPLACED)
@pytest.mark.parametrize("to", ["a file", "nothing", "itself"])
def test_no_link_is_followed(folder: Path, name: str, to: str) -> None:
    victim = folder / name if to == "itself" else folder.parent / "victim"
    if to == "a file":
        victim.write_text("precious")
    kept = folder.parent / "kept"
    if (folder / name).exists():
        (folder / name).rename(kept)
    (folder / name).symlink_to(victim)
    if name in REPLACED:
        whole_run(folder)
    else:
        with pytest.raises(InvalidInput, match="is a link") as refused:
            whole_run(folder)
        assert str(folder / name) in refused.value.message
        assert "Remove it" in refused.value.remedy
        (folder / name).unlink()
        if kept.exists():
            kept.rename(folder / name)
        whole_run(folder)
    assert holds(folder / "os.raw", {0: B})
    assert to != "a file" or victim.read_text() == "precious"
    assert to != "nothing" or not victim.exists()


def test_a_folder_behind_links_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for folder in (tmp_path / "circle", tmp_path / "circle/images"):
        with pytest.raises(InvalidInput, match="cannot be used as a destination") as refused:
            ImageFolder(folder)
        assert refused.value.remedy


def test_of_a_state_file_that_is_too_large_only_so_much_is_read(folder: Path) -> None:
    """So much as no host has in memory."""
    for name in ("replica.json", ".vm", ".run"):
        (folder / name).touch(mode=0o600)
        os.truncate(folder / name, 1 << 40)
        if name == ".vm":
            with pytest.raises(InvalidInput, match="another VM"):
                whole_run(folder)
            (folder / name).unlink()
        else:
            whole_run(folder)
            assert holds(folder / "os.raw", {0: B})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
@pytest.mark.parametrize(
    ("left", "said"), [(None, "it is too long"), (150, "it was cut off"), (0, "it is too long")]
)
def test_a_manifest_that_was_extended_without_end_is_damaged_and_not_read_to_it(
    folder: Path, left: int | None, said: str
) -> None:
    """A file with a hole costs a stranger nothing, wherever the hole begins."""
    manifest = folder / "os.raw.manifest"
    os.truncate(manifest, manifest.stat().st_size if left is None else left)
    os.truncate(manifest, 1 << 42)
    told = Told()
    assert run(folder / "os.raw", {0: A}, report=told) == []
    assert f"os.raw.manifest is not used: the manifest of a disk cannot be used: {said}" in told[0]


@pytest.mark.parametrize("name", [".run.new", "replica.json.new", "os.raw.draft.new", "os.raw.manifest.new"])
def test_a_folder_in_the_place_of_a_file_to_be_written_is_named(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    with pytest.raises(InvalidInput, match="is not a regular file") as refused:
        whole_run(folder)
    assert name in refused.value.message
    assert "Remove it" in refused.value.remedy
    (folder / name).rmdir()
    whole_run(folder)
    assert holds(folder / "os.raw", {0: B})


@pytest.mark.parametrize("name", [".lock", ".vm", "os.raw", "os.raw.manifest"])
def test_a_file_of_another_user_is_not_taken_for_ours(folder: Path, name: str) -> None:
    os.chown(folder / name, NOBODY, NOBODY)
    with pytest.raises(InvalidInput, match="belongs to another user") as refused:
        whole_run(folder)
    assert holds(folder / "os.raw", {0: A})
    command(*refused.value.remedy.rpartition(": ")[2].split())
    whole_run(folder)


@pytest.mark.parametrize("name", [".lock", ".vm", "os.raw", "os.raw.manifest"])
def test_a_file_that_others_may_write_is_not_taken_for_ours(folder: Path, name: str) -> None:
    (folder / name).chmod(0o666)
    with pytest.raises(InvalidInput, match="other users may write") as refused:
        whole_run(folder)
    assert holds(folder / "os.raw", {0: A})
    command(*refused.value.remedy.rpartition(": ")[2].split())
    whole_run(folder)


@pytest.mark.parametrize("mask", [0, 0o027, 0o777])
def test_all_files_are_for_their_owner_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = tmp_path / "images"
        with ImageFolder(path) as images:
            images.claim(VM)
            with images.disk("os") as image:
                image.known("id", SIZE, CHUNK, full=False)
                image.intend(0, CHUNK)
                image.write(0, B)
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    finally:
        os.umask(before)
    assert modes.keys() >= {".lock", ".run", ".vm", "os.raw.partial", "os.raw.index", "os.raw.draft"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK], ids=["pipe", "socket"])
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(folder: Path, kind: int) -> None:
    for name in (".vm", "replica.json", "os.raw.draft"):
        (folder / name).unlink(missing_ok=True)
        os.mknod(folder / name, kind | 0o600)
        with pytest.raises(InvalidInput, match=f"{name} is not a regular file") as refused:
            whole_run(folder)
        assert "Remove it" in refused.value.remedy
        (folder / name).unlink()


def test_a_file_system_that_cannot_make_names_durable_is_no_error() -> None:
    """/proc says so to fsync of its folders; some network file systems do."""
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc", os.O_RDONLY))
    statefiles.sync_folder(Path("/proc"))


# Who only reads


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder on a mount that takes no writes."""
    place = folder.parent / "read-only"
    place.mkdir()
    command("mount", "--bind", folder, place)
    try:
        command("mount", "-o", "remount,bind,ro", place)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_verify_and_status_need_no_right_to_write(folder: Path) -> None:
    with read_only(folder) as place, places.open(str(place), silent, existing=True) as images:
        assert [verdict.verified for verdict in verify(images, silent, Clock())] == [True]
        assert status(images).disks == ("os",)
        assert [one.state for one in survey(str(place), silent)[0]] == ["good"]


def test_verify_leaves_nothing_behind_and_changes_nothing(folder: Path) -> None:
    (folder / ".lock").unlink()
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in folder.iterdir()}
    made = folder.stat().st_mtime_ns
    line = [sys.executable, "-m", "coriolis_azure", "verify", str(folder), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {
        file.name: (file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in folder.iterdir()
    } == before
    assert folder.stat().st_mtime_ns == made


def test_verify_and_a_run_keep_each_other_out(folder: Path) -> None:
    with ImageFolder(folder), pytest.raises(InvalidInput, match="another run"):
        places.open(str(folder), silent, existing=True)
    with places.open(str(folder), silent, existing=True) as reader:
        places.open(str(folder), silent, existing=True).close()
        with pytest.raises(InvalidInput, match="another run"):
            ImageFolder(folder)
        reader.close()
    ImageFolder(folder).close()
