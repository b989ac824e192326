"""A replica is a set of images and a point in time: whatever ends a run, it is the older one or the newer one.

Two disks are brought from one content to another, and the run dies at each step that it takes.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.clock import Clock
from coriolis_azure.errors import DestinationFailed, InvalidInput
from coriolis_azure.events import Event, Report, Step, silent
from coriolis_azure.model import Json
from coriolis_azure.replica import sets, statefiles, verification
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.replica import Replica
from harness.dying import FOR_GOOD, dying_child
from harness.image_runs import Told, bring
from harness.lanes import slow
from harness.spoiling import lose

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CHUNK = 4096
SIZE = 7 * CHUNK + 512
A, B = b"A" * CHUNK, b"B" * CHUNK
Content = dict[str, dict[int, bytes]]
OLD: Content = {"os": {0: A, 1: A, 5: A}, "data-0": {2: A, 7: A}}
NEW: Content = {"os": {0: B, 2: B, 5: A, 7: B}, "data-0": {0: B, 2: B, 7: A}}
EMPTY: Content = {"os": {}, "data-0": {}}


def run(
    path: Path,
    content: Content,
    *,
    size: int = SIZE,
    report: Report = silent,
    keep: int | None = None,
    left_out: tuple[str, ...] = (),
    baseline: Json | None = None,
    **options: Any,
) -> dict[str, list[int]]:
    """What a run does: bring all disks, then publish them. The chunks that were sent, by disk."""
    sent, roots = {}, {}
    with ImageFolder(path, report) as folder:
        folder.reserve(list(content))
        record = sets.begin(folder, "vm", sets.Begun("run", "now", tuple(content), left_out), keep)
        for name, chunks in content.items():
            with folder.disk(name) as image:
                leave = partial(image.leave, lambda: baseline)
                sent[name], manifest = bring(
                    image, chunks, size=size, chunk=CHUNK, after_known=leave, **options
                )
            roots[name] = manifest.root()
        sets.complete(folder, record, roots)
    return sent


def bytes_of(chunks: dict[int, bytes], size: int) -> bytes:
    return b"".join(chunks.get(index, bytes(CHUNK)) for index in range(-(-size // CHUNK)))[:size]


def holds(path: Path, content: Content, size: int = SIZE) -> bool:
    """Whether the images are these, all of them."""
    return all(
        (path / f"{name}.raw").read_bytes() == bytes_of(chunks, size) for name, chunks in content.items()
    )


def there(path: Path) -> set[str]:
    return {found.name for found in path.iterdir()}


def recorded(path: Path) -> bool:
    """Whether the record says that the second run is the replica."""
    document = json.loads((path / sets.NAME).read_text())
    return document["point"] is not None and document["point"]["time"] != "old"


def verified(path: Path) -> bool:
    with ImageFolder(path, existing=True) as folder:
        return all(verdict.verified for verdict in verification.verify(folder, silent, Clock()))


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize("options", [{}, {"full": True}, {"size": SIZE + 3 * CHUNK}], ids=str)
def test_dying_at_any_step_leaves_the_older_or_the_newer_point(
    memory: Path, options: dict[str, Any], power: bool
) -> None:
    path, at, died = memory / "replica", 0, True
    published = 0
    size = options.get("size", SIZE)
    run(memory / "template", OLD)
    while died:
        at += 1
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(memory / "template", path)
        run(path, OLD)  # a copy has other inodes
        before = (path / sets.NAME).read_bytes()
        died = dying_child(lambda: run(path, NEW, **options), at, True, power)
        if json.loads((path / sets.NAME).read_bytes())["point"] == json.loads(before)["point"]:
            assert holds(path, OLD), f"the older point was touched at step {at}"
            assert verified(path)
        else:
            published += 1
            with ImageFolder(path):
                pass
            assert holds(path, NEW, size), f"neither the older nor the newer point at step {at}"
            assert verified(path)
        # The source goes back to what it was: what the dead run fetched must not be taken for that.
        run(path, OLD)
        assert holds(path, OLD), f"wrong after dying at step {at}"
        assert there(path) == {
            "os.raw",
            "os.raw.manifest",
            "data-0.raw",
            "data-0.raw.manifest",
            ".lock",
            sets.NAME,
        }
    assert at > 30
    assert published > 5


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
def test_a_first_run_that_dies_leaves_no_image_that_could_be_taken_for_one(memory: Path, power: bool) -> None:
    path, at, died = memory / "replica", 0, True
    while died:
        at += 1
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        died = dying_child(lambda: run(path, NEW), at, True, power)
        record = path / sets.NAME
        if not record.exists() or json.loads(record.read_bytes())["point"] is None:
            assert not list(path.glob("*.raw")), f"an image is there before its replica, at step {at}"
        else:
            with ImageFolder(path):
                pass
            assert holds(path, NEW)
        run(path, NEW)
        assert holds(path, NEW), f"wrong after dying at step {at}"
    assert at > 30


def test_a_run_that_fails_at_its_second_disk_leaves_both_and_its_first_is_used(memory: Path) -> None:
    run(memory, OLD)
    with ImageFolder(memory) as folder:
        sets.begin(folder, "vm", sets.Begun("run", "now", ("os", "data-0")))
        with folder.disk("os") as image:
            bring(image, NEW["os"], size=SIZE, chunk=CHUNK)
    assert holds(memory, OLD)
    assert verified(memory)
    assert run(memory, NEW) == {"os": [], "data-0": [0, 2]}
    assert holds(memory, NEW)


def test_what_a_first_run_had_fetched_is_used(memory: Path) -> None:
    with ImageFolder(memory) as folder, folder.disk("os") as image:
        bring(image, NEW["os"], size=SIZE, chunk=CHUNK)
    assert not list(memory.glob("*.raw"))
    told = Told()
    assert run(memory, NEW, report=told)["os"] == []
    assert "had fetched" in told[0]
    assert holds(memory, NEW)


def test_a_stranger_between_copy_and_switch_stops_the_switch(memory: Path) -> None:
    """No disk changes then."""
    run(memory, OLD)
    with ImageFolder(memory) as folder:
        record = sets.begin(folder, "vm", sets.Begun("run", "now", ("os", "data-0")))
        roots = {}
        for name in OLD:
            with folder.disk(name) as image:
                roots[name] = bring(image, NEW[name], size=SIZE, chunk=CHUNK)[1].root()
        edit(memory / "data-0.raw")
        with pytest.raises(DestinationFailed, match="another program changed"):
            sets.complete(folder, record, roots)
    assert (memory / "os.raw").read_bytes() == bytes_of(OLD["os"], SIZE)
    run(memory, NEW)
    assert holds(memory, NEW)


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(3 * CHUNK)
        file.write(b"stranger")


def dies_while_it_publishes(path: Path) -> None:
    """Right after the record was replaced."""

    def work() -> None:
        real = ImageFolder.keep_record

        def switch(folder: ImageFolder, text: bytes) -> None:
            real(folder, text)
            if json.loads(text)["begun"] is None:
                os._exit(9)

        FOR_GOOD.setattr(ImageFolder, "keep_record", switch)
        run(path, NEW)

    assert dying_child(work, 0, False, False)


def test_a_stranger_after_a_run_that_died_while_it_published_is_seen(memory: Path) -> None:
    run(memory, OLD)
    dies_while_it_publishes(memory)
    assert not verified(memory)
    edit(memory / "os.raw")
    told = Told()
    with ImageFolder(memory, told):
        pass
    assert any("is not what the last run had fetched" in text for text in told)
    assert not verified(memory)
    run(memory, NEW)
    assert holds(memory, NEW)
    assert verified(memory)


@pytest.mark.parametrize("part", ["redo", "index"])
@pytest.mark.parametrize("damage", ["zeros", "gone", "short"])
def test_what_a_damaged_log_does_not_bring_the_next_run_does(tmp_path: Path, part: str, damage: str) -> None:
    run(tmp_path, OLD)
    dies_while_it_publishes(tmp_path)
    file = tmp_path / f"os.raw.{part}"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(file.stat().st_size - (damage == "short")))
    told = Told()
    with ImageFolder(tmp_path, told):
        pass
    assert any("is not what the last run had fetched" in text for text in told)
    assert not verified(tmp_path)
    missing = [0, 2, 7] if (part, damage) == ("redo", "zeros") else [0, 1, 2, 7]  # chunk 1 is to be zeros
    assert run(tmp_path, NEW) == {"os": missing, "data-0": []}
    assert holds(tmp_path, NEW)
    assert verified(tmp_path)


def test_no_space_for_the_log_is_told_and_the_replica_stays(tmp_path: Path) -> None:
    path = tmp_path / "replica"
    path.mkdir()
    run(path, OLD)

    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * CHUNK, 3 * CHUNK))
        with pytest.raises(DestinationFailed) as failure:
            run(path, NEW)
        assert failure.value.remedy

    assert not dying_child(work, 0, False, False)
    assert holds(path, OLD)
    assert verified(path)


def test_a_record_of_a_newer_build_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run(tmp_path, OLD)
    record = tmp_path / sets.NAME
    record.write_text(record.read_text().replace(f'"version": {sets.VERSION}', '"version": 99'))
    with pytest.raises(InvalidInput, match="this program knows"):
        run(tmp_path, NEW)
    assert holds(tmp_path, OLD)


def state_of_an_earlier_build(path: Path, dirty: Callable[[Path], object]) -> None:
    """Its record is of version 1, and a run that died has left its list of regions."""
    record = path / sets.NAME
    record.write_text(record.read_text().replace(f'"version": {sets.VERSION}', '"version": 1'))
    dirty(path / "os.raw.dirty")


def test_the_state_of_an_earlier_build_is_read(tmp_path: Path) -> None:
    run(tmp_path, OLD)
    state_of_an_earlier_build(
        tmp_path, lambda path: path.write_text("dirty regions of 67108864 bytes\n000000000000\n")
    )
    assert not verified(tmp_path)
    with (tmp_path / "os.raw").open("r+b") as file:
        file.write(b"dirty")
    told = Told()
    assert run(tmp_path, OLD, report=told) == {"os": [0], "data-0": []}
    assert "did not succeed" in told[0]
    assert holds(tmp_path, OLD)
    assert verified(tmp_path)


# Strangers, between the commit and the end, and what a death past the switch may leave


def stamped(path: Path) -> None:
    """What a stranger does to an image."""
    with path.open("r+b") as file:
        file.seek(3 * CHUNK)
        file.write(b"stranger")


def replaced(path: Path) -> None:
    """Another file in the place of the image."""
    other = path.with_name("other")
    other.write_bytes(b"Z" * path.stat().st_size)
    other.replace(path)


@pytest.mark.parametrize("act", [stamped, replaced])
@pytest.mark.parametrize("moment", ["preserve", "check_publishable", "keep_record", "publish", "seal"])
@pytest.mark.parametrize("options", [{}, {"full": True}], ids=["changes", "full"])
def test_a_stranger_who_acts_while_a_run_publishes_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Path], None],
    moment: str,
    options: dict[str, Any],
) -> None:
    path = tmp_path / "replica"
    run(path, OLD)
    with monkeypatch.context() as patched:
        acted = acting_once(patched, moment, lambda: act(path / "os.raw"))
        if moment in ("publish", "seal"):  # it was all there; the next run sees what became of it
            run(path, NEW, keep=2, **options)
        else:
            with pytest.raises(DestinationFailed, match="another program"):
                run(path, NEW, keep=2, **options)
    assert acted
    run(path, NEW)
    assert holds(path, NEW)
    assert verified(path)


@pytest.mark.parametrize("act", [stamped, replaced])
@pytest.mark.parametrize("moment", [slow("flush"), "commit", slow("preserve"), "keep_record"])
@pytest.mark.parametrize(
    ("part", "full"), [("redo", False), ("index", False), ("partial", True), ("index", True)]
)
def test_what_was_fetched_and_then_changed_is_not_published(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Path], None],
    moment: str,
    part: str,
    full: bool,
) -> None:
    """By somebody, between the moment when it was read back and the one when it becomes the replica."""
    path = tmp_path / "replica"
    run(path, OLD)
    acting_once(monkeypatch, moment, lambda: act(path / f"os.raw.{part}"))
    with pytest.raises(DestinationFailed, match="another program changed what was fetched") as raised:
        run(path, NEW, keep=2, full=full)
    assert "run again" in raised.value.remedy
    assert moment == "keep_record" or holds(path, OLD)
    monkeypatch.undo()
    run(path, NEW)
    assert holds(path, NEW)
    assert verified(path)
    assert not [name for name in there(path) if name.endswith((".draft", ".partial", ".redo", ".index"))]


def acting_once(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[], None]) -> list[bool]:
    """`act` once, right after this was done for the OS disk; "keep_record": at the switch. Not empty once it has."""
    owner: type = {"keep_record": ImageFolder, "seal": FileMedium}.get(moment, Replica)
    real = getattr(owner, moment)
    acted: list[bool] = []

    def acting(thing: Any, *arguments: Any) -> Any:
        result = real(thing, *arguments)
        is_due = moment != "keep_record" or b'"begun": null' in arguments[0]
        if not acted and is_due and getattr(thing, "name", "os") == "os":
            acted.append(True)
            act()
        return result

    monkeypatch.setattr(owner, moment, acting)
    return acted


def test_a_stranger_who_changes_a_disk_that_did_not_change_is_noticed_at_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, only = tmp_path / "replica", {"os": NEW["os"], "data-0": OLD["data-0"]}
    run(path, OLD)
    complete = sets.complete

    def late(*arguments: Any) -> None:
        stamped(path / "data-0.raw")
        complete(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sets, "complete", late)
        with pytest.raises(DestinationFailed, match="another program"):
            run(path, only)
    run(path, only)
    assert holds(path, only)


@pytest.mark.parametrize("size", [0, 2 * CHUNK, SIZE + 2 * CHUNK], ids=["empty", "shorter", "longer"])
def test_an_image_of_another_size_gets_its_own_back(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "replica", {"os": {0: A}, "data-0": {2: A}}
    run(path, content)
    os.truncate(path / "os.raw", size)
    run(path, content)
    assert holds(path, content)
    told = Told()
    run(path, content, report=told)
    assert told == []


def test_what_was_read_once_and_found_right_is_not_read_at_each_run(tmp_path: Path) -> None:
    path = tmp_path / "replica"
    run(path, OLD)
    for cause in ((path / "os.raw").touch, (path / "os.raw.dirty").touch):
        cause()
        first, second = Told(), Told()
        run(path, OLD, report=first)
        run(path, OLD, report=second)
        assert "is read as a whole" in first[0]
        assert second == []
        assert verified(path)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["os.raw", "os.raw.partial", "os.raw.redo", "os.raw.index", "os.raw.draft"])
@pytest.mark.parametrize("how", ["gone", slow("short"), "damaged"])
@pytest.mark.parametrize("kind", ["first", "changes", slow("full")])
def test_what_is_lost_of_a_switch_that_was_not_finished_is_fetched_again(
    tmp_path: Path, part: str, how: str, kind: str
) -> None:
    path = tmp_path / "replica"
    if kind != "first":
        run(path, OLD)

    def work() -> None:
        FOR_GOOD.setattr(Replica, "publish", lambda self: os._exit(9))
        run(path, NEW, full=kind == "full")

    assert dying_child(work, 0, False, False)
    lost = path / part
    if lost.exists():
        lose(lost, how)
    run(path, NEW)
    assert holds(path, NEW)
    assert verified(path)
    assert not [name for name in there(path) if name.endswith((".draft", ".partial", ".redo", ".index"))]


def test_a_disk_that_cannot_be_brought_there_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "replica"
    run(path, OLD)

    def work() -> None:
        FOR_GOOD.setattr(Replica, "publish", lambda self: os._exit(9))
        run(path, NEW)

    assert dying_child(work, 0, False, False)
    real = Replica.recover

    def failing(replica: Replica) -> None:
        real(replica)
        asked.append(replica.name)
        if len(asked) == 1:
            raise DestinationFailed("it is broken")

    asked: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(Replica, "recover", failing)
        with pytest.raises(DestinationFailed, match="it is broken"):
            run(path, NEW)
    assert sorted(asked) == ["data-0", "os"]
    assert holds(path, NEW)


# Disks that leave


ONLY: Content = {"os": NEW["os"]}


def beside(path: Path, name: str) -> set[str]:
    """What is there of a disk besides its image and its manifest."""
    return {found for found in there(path) if found.startswith(f"{name}.")} - {
        f"{name}.raw",
        f"{name}.raw.manifest",
        f"{name}.raw.grains",
    }


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["changes", "full"])
@pytest.mark.parametrize("calls", [("unlink",), ("replace",)], ids=str)
def test_nothing_is_left_of_the_draft_of_a_disk_that_leaves(
    memory: Path, full: bool, calls: tuple[str, ...]
) -> None:
    """Wherever the run died that made it."""
    path, at, died, swept = memory / "replica", 0, True, 0
    while died:
        at += 1
        shutil.rmtree(path, ignore_errors=True)
        run(path, OLD)
        died = dying_child(lambda: run(path, NEW, full=full), at, True, False, calls)
        told = Told()
        run(path, ONLY, report=told)
        assert not beside(path, "data-0"), at
        swept += any("data-0.raw and not published is deleted" in text for text in told)
        assert holds(path, ONLY)
        assert verified(path)
    assert at > 3
    assert swept or calls == ("unlink",)


@pytest.mark.parametrize("full", [False, True], ids=["changes", "full"])
def test_a_run_that_died_as_it_deleted_its_drafts_costs_no_reading(tmp_path: Path, full: bool) -> None:
    run(tmp_path, OLD)

    def forget(medium: FileMedium, document: str) -> None:
        if medium.path.with_name(f"{medium.path.name}.{document}").exists():
            os._exit(9)

    def work() -> None:
        FOR_GOOD.setattr(FileMedium, "forget", forget)
        run(tmp_path, NEW, full=full)

    assert dying_child(work, 0, False, False)
    assert beside(tmp_path, "data-0")
    seen: list[Event] = []
    with ImageFolder(tmp_path, seen.append):
        pass
    assert not beside(tmp_path, "os")
    read = {event.target for event in seen if isinstance(event, Step)}
    assert read == {"data-0"}  # whose image was not there yet
    assert holds(tmp_path, NEW)


def test_the_draft_of_a_disk_that_is_left_out_is_told_and_used_later(tmp_path: Path) -> None:
    run(tmp_path, OLD)
    with ImageFolder(tmp_path) as folder, folder.disk("data-0") as image:
        bring(image, NEW["data-0"], size=SIZE, chunk=CHUNK)
    told = Told()
    run(tmp_path, ONLY, report=told, left_out=("data-0",))
    assert any("is kept for a run that does not exclude data-0" in text for text in told)
    assert run(tmp_path, NEW) == {"os": [], "data-0": []}
    assert holds(tmp_path, NEW)


def test_what_only_looks_like_a_draft_is_left_alone_and_told(tmp_path: Path) -> None:
    path, precious = tmp_path / "replica", tmp_path / "precious"
    precious.write_text("mine")
    run(path, OLD)
    (path / "data-0.raw.partial").write_text("mine")
    (path / "data-1.raw.draft").symlink_to(precious)
    (path / "data-2.raw.redo").mkdir()
    told = Told()
    run(path, ONLY, report=told)
    assert [text.partition(" and not published ")[2].partition(":")[0] for text in told] == [
        "is left as it is",
        "stays",
        "is left as it is",
    ]
    assert (path / "data-0.raw.partial").read_text() == "mine"
    assert precious.read_text() == "mine"
    assert {"data-1.raw.draft", "data-2.raw.redo"} <= there(path)


@pytest.mark.parametrize("document", [sets.NAME, "os.raw.manifest"])
def test_what_cannot_be_read_at_the_moment_is_not_taken_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str
) -> None:
    """A medium with a bad sector, too many open files: what was known must not be replaced by nothing."""
    path = tmp_path / "replica"
    run(path, OLD)
    real = statefiles.open_existing

    def failing(file: Path, flags: int, *, ours: bool = True) -> int:
        if file.name == document:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, flags, ours=ours)

    before = (path / document).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(statefiles, "open_existing", failing)
        with pytest.raises((DestinationFailed, InvalidInput), match="cannot be read"):
            run(path, NEW)
    assert (path / document).read_bytes() == before
    assert holds(path, OLD)
    run(path, NEW)
    assert holds(path, NEW)


_CALLS = (
    *("open", "close", "stat", "lstat", "fstat", "listdir", "scandir", "mkdir", "rmdir", "unlink", "replace"),
    *(
        "pread",
        "preadv",
        "read",
        "pwrite",
        "write",
        "lseek",
        "ftruncate",
        "posix_fallocate",
        "fsync",
        "fdatasync",
    ),
)


class Gone:
    """The file system below a folder is gone after so many system calls, as if its server had died."""

    def __init__(self, path: Path, after: int, patched: pytest.MonkeyPatch) -> None:
        self._path, self._left = str(path), after
        for name in _CALLS:
            patched.setattr(os, name, partial(self._call, getattr(os, name), is_close=name == "close"))

    @property
    def gone(self) -> bool:
        """Whether that has happened."""
        return self._left < 0

    def _call(self, real: Callable[..., Any], *arguments: Any, is_close: bool, **options: Any) -> Any:
        if any(map(self._is_there, (*arguments[:1], *options.values()))):
            self._left -= 1
            if self._left < 0:
                if is_close:  # the kernel frees the descriptor all the same
                    real(*arguments)
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return real(*arguments, **options)

    def _is_there(self, what: object) -> bool:
        if isinstance(what, int) and not isinstance(what, bool):
            with suppress(OSError):
                what = os.readlink(f"/proc/self/fd/{what}")  # noqa: PTH115
        return isinstance(what, str | Path) and str(what).startswith(self._path)


@pytest.mark.slow
def test_a_file_system_that_is_gone_is_an_error_of_ours_and_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses even to close files: NFS, SMB and FUSE do so when their servers are gone."""
    path = tmp_path / "replica"
    for after in itertools.count(0, 31):
        with monkeypatch.context() as patched:
            filesystem = Gone(path, after, patched)
            with suppress(DestinationFailed, InvalidInput):
                run(path, OLD if after % 2 else NEW, keep=1)
        if not filesystem.gone:
            break
        run(path, NEW if after % 2 else OLD, keep=1)
        assert holds(path, NEW if after % 2 else OLD)
