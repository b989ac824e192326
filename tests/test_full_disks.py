"""A file system that is full: a run ends before it changes anything, or it is not hindered any more."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coriolis_azure.errors import DestinationFailed
from coriolis_azure.replica import sets
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.replica import Replica
from harness.block_devices import command, loop, mounted
from harness.dying import FOR_GOOD, dying_child
from harness.image_runs import Told
from harness.lanes import slow
from test_publishing import CHUNK, Content, holds, run, there, verified

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SIZE = 8 * CHUNK  # of whole blocks, as disks are
GROWN = SIZE + 200 * CHUNK
A, B = b"A" * CHUNK, b"B" * CHUNK
OLD: Content = {"os": {0: A, 1: A, 5: A}, "data-0": {2: A, 7: A}}
NEW: Content = {  # in what was there, in holes, and beyond the end
    "os": {0: B, 2: B, 5: A, **dict.fromkeys(range(20, 200), B)},
    "data-0": {0: B, 2: B, 7: A, **dict.fromkeys(range(30, 150, 2), B)},
}
SMALL = 320 << 20


@pytest.fixture(params=["tmpfs", "ext4", "xfs", "btrfs"])
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The path for one, on a small file system of this kind."""
    if request.param == "tmpfs":
        with mounted("tmpfs", tmp_path / "mounted", "-t", "tmpfs", "-o", f"size={SMALL}") as folder:
            yield folder / "replica"
        return
    medium = tmp_path / "medium"
    with medium.open("wb") as file:
        file.truncate(SMALL)
    with loop(medium) as device:
        command(f"mkfs.{request.param}", "-q", device)
        with mounted(device, tmp_path / "mounted") as folder:
            yield folder / "replica"


def fill(folder: Path) -> None:
    """Leave no room."""
    with (folder / "filler").open("ab") as file:
        for size in (16 << 20, 1 << 20, 65536, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
        with suppress(OSError):
            while True:
                os.write(file.fileno(), b"x" * 4096)
        with suppress(OSError):
            os.fsync(file.fileno())


def filled_at(monkeypatch: pytest.MonkeyPatch, path: Path, owner: type, moment: str) -> None:
    """The file system is filled as this begins; "keep_record": as the switch has come."""
    real = getattr(owner, moment)

    def filling(*arguments: object) -> object:
        is_switch = moment == "keep_record" and b'"begun": null' in arguments[1]  # type: ignore[operator]
        if moment != "keep_record":
            fill(path.parent)
        result = real(*arguments)
        if is_switch:
            fill(path.parent)
        return result

    monkeypatch.setattr(owner, moment, filling)


def is_btrfs(path: Path) -> bool:
    return command("stat", "--file-system", "--format=%T", path) == "btrfs"


def blocks(path: Path) -> list[int]:
    return [(path / f"{name}.raw").stat().st_blocks for name in OLD]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [None, 2])
def test_a_run_without_room_for_what_it_fetched_changes_nothing(
    replica: Path, monkeypatch: pytest.MonkeyPatch, keep: int | None
) -> None:
    run(replica, OLD, size=SIZE, keep=keep, baseline={"of": "OLD"})
    before = blocks(replica)
    with monkeypatch.context() as patched:
        filled_at(patched, replica, Replica, "reserve_space")
        with pytest.raises(DestinationFailed, match="No space left") as raised:
            run(replica, NEW, size=GROWN, keep=keep, baseline={"of": "NEW"})
    assert "Free space" in raised.value.remedy
    assert holds(replica, OLD, SIZE)
    assert verified(replica)
    assert blocks(replica) == before
    assert not list(replica.glob("points/*"))
    assert not list(replica.glob("*.new"))
    (replica.parent / "filler").unlink()
    with ImageFolder(replica) as folder, folder.disk("os") as image:
        image.known("id", GROWN, CHUNK, full=False)
        assert image.baseline is not None
        assert image.baseline[1] == {"of": "OLD"}
    told = Told()
    assert run(replica, NEW, size=GROWN, keep=keep, report=told) == {"os": [], "data-0": []}
    assert not [text for text in told if "is read as a whole" in text]
    assert holds(replica, NEW, GROWN)
    assert verified(replica)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, slow(True)], ids=["changes", "full"])
@pytest.mark.parametrize("keep", [None, 2])
def test_no_room_after_the_switch_hinders_nothing(
    replica: Path, monkeypatch: pytest.MonkeyPatch, keep: int | None, full: bool
) -> None:
    run(replica, OLD, size=SIZE, keep=keep)
    with monkeypatch.context() as patched:
        filled_at(patched, replica, ImageFolder, "keep_record")
        if keep and is_btrfs(replica):  # which keeps room for content, and none for a document
            with suppress(DestinationFailed):
                run(replica, NEW, size=GROWN, keep=keep, full=full)
            assert holds(replica, NEW, GROWN)
            (replica.parent / "filler").unlink()
            with ImageFolder(replica):
                pass
        else:
            run(replica, NEW, size=GROWN, keep=keep, full=full)
    assert holds(replica, NEW, GROWN)
    assert verified(replica)
    assert not [name for name in there(replica) if name.endswith((".draft", ".partial", ".redo", ".index"))]


def test_a_run_that_dies_with_room_taken_leaves_the_older_point(replica: Path) -> None:
    run(replica, OLD, size=SIZE)

    def work() -> None:
        real = ImageFolder.keep_record

        def dying(folder: ImageFolder, text: bytes) -> None:
            if b'"begun": null' in text:
                os._exit(9)
            real(folder, text)

        FOR_GOOD.setattr(ImageFolder, "keep_record", dying)
        run(replica, NEW, size=GROWN)

    assert dying_child(work, 0, False, False)
    assert json.loads((replica / sets.NAME).read_text())["begun"] is not None
    assert holds(replica, OLD, SIZE)
    assert verified(replica)
    run(replica, NEW, size=GROWN)
    assert holds(replica, NEW, GROWN)
    assert not list(replica.glob("*.new"))
