"""`verify`: a destination is read again, and what is not as it was replicated is named. Nothing is changed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coriolis_azure.clock import Clock
from coriolis_azure.errors import InvalidInput, NoReplica
from coriolis_azure.events import Event, Report, Step, silent
from coriolis_azure.replica import places, sets, survey, verification
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.verification import Verdict
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.block_devices import command as mount
from harness.block_devices import mounted
from harness.constants import MIB
from harness.copies import CHUNK, by_agent, job
from harness.image_runs import B, bring, put
from harness.images import Image
from harness.pipes import Pipes
from harness.replicas import SandboxPlace

SIZE = 5 * CHUNK + 512


def replicate(disk: Path, path: Path) -> None:
    with Image(path) as image, Pipes() as pipes:
        base = image.known("id", disk.stat().st_size, CHUNK, full=False)
        by_agent(lambda: pipes, job(disk), base, image)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A destination of two disks."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("os", "data-0")):
        disk = tmp_path / name
        disk.write_bytes(random.Random(seed).randbytes(SIZE))
        replicate(disk, folder / f"{name}.raw")
    with places.open(str(folder), silent) as place:
        record = sets.begin(place, "/vm", sets.Begun("run", "2026-01-01T00:00:00Z", ("os", "data-0")))
        sets.complete(place, record, {name: place.disk(name).stored().root() for name in place.names()})
    return folder


def verify(folder: Path) -> dict[str, Verdict]:
    with places.open(str(folder), silent, existing=True) as place:
        return {verdict.name: verdict for verdict in verification.verify(place, silent, Clock())}


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "coriolis_azure", "verify", str(folder), "--json"]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_replica_as_it_was_left_is_verified(images: Path) -> None:
    before = contents(images)
    done = command(images)
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert [verdict["name"] for verdict in verdicts] == ["data-0", "os"]
    for verdict in verdicts:
        assert (verdict["verified"], verdict["size_bytes"], verdict["bad_offset"]) == (True, SIZE, None)
        assert verdict["root"]
    assert contents(images) == before


@pytest.mark.parametrize("bad", [[2], [5], [4, 1, 3]])
def test_the_first_chunk_that_is_not_as_it_was_is_named(images: Path, bad: list[int]) -> None:
    rot(images / "os.raw", bad)
    before = contents(images)
    verdicts = verify(images)
    assert verdicts["data-0"].verified is True
    assert verdicts["os"].verified is False
    assert verdicts["os"].bad_offset == min(bad) * CHUNK
    assert contents(images) == before


def rot(path: Path, chunks: list[int]) -> None:
    with path.open("r+b") as file:
        for index in chunks:
            file.seek(index * CHUNK + 17)
            file.write(b"rot")


@pytest.mark.slow
def test_the_command_ends_with_the_offset_and_code_5(images: Path) -> None:
    rot(images / "os.raw", [3])
    done = command(images)
    error = json.loads(done.stderr.splitlines()[-1])
    assert done.returncode == error["exit_code"] == 5
    assert (error["error"], error["offset"]) == ("CorruptChunk", 3 * CHUNK)
    assert [verdict["verified"] for verdict in json.loads(done.stdout)] == [True, False]


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 512, 0])
def test_an_image_of_another_size_is_not_as_it_was(images: Path, size: int) -> None:
    with (images / "os.raw").open("r+b") as file:
        file.truncate(size)
    verdict = verify(images)["os"]
    assert (verdict.verified, verdict.bad_offset) == (False, min(size, SIZE))


@pytest.mark.slow
def test_a_run_that_died_takes_nothing_from_the_last_good_one(images: Path) -> None:
    with Image(images / "os.raw") as image:
        base = image.known("id", SIZE, CHUNK, full=False)
        put(image, base, 1, bytes(CHUNK))
    assert [verdict.verified for verdict in verify(images).values()] == [True, True]
    assert command(images).returncode == 0


@pytest.mark.slow
def test_what_a_dead_run_of_an_earlier_build_was_writing_is_not_verified(images: Path) -> None:
    """It wrote the image itself, and left a list of where."""
    (images / "os.raw.dirty").write_text("dirty regions of 67108864 bytes\n000000000000\n")
    verdicts = verify(images)
    assert verdicts["os"].verified is None
    assert "the last run failed" in verdicts["os"].reason
    assert verdicts["os"].unknown_bytes == SIZE
    assert verdicts["data-0"].verified is True
    assert command(images).returncode == 2


@pytest.mark.slow
def test_a_switch_that_was_not_finished_is_brought_to_its_end_or_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies_after_the_record(folder: ImageFolder, text: bytes) -> None:
        keep_record(folder, text)
        if json.loads(text)["begun"] is None:
            os._exit(9)

    keep_record = ImageFolder.keep_record
    child = os.fork()
    if not child:
        monkeypatch.setattr(ImageFolder, "keep_record", dies_after_the_record)
        with ImageFolder(images) as place:
            record = sets.begin(place, "/vm", sets.Begun("run", "2026-01-02T00:00:00Z", ("os", "data-0")))
            roots = {
                name: bring(place.disk(name), {1: B}, size=SIZE, chunk=CHUNK)[1].root()
                for name in place.names()
            }
            sets.complete(place, record, roots)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with mounted(images, tmp_path / "read-only", "--bind") as folder:
        mount("mount", "-o", "remount,ro,bind", folder)
        found = verify(folder)["replica"]
        assert found.verified is False
        assert "died while it published data-0, os" in found.reason
        assert command(folder).returncode == 5
        (told,), _ = survey.survey(str(folder), silent)
        assert (told.state, told.drafts) == ("unfinished", ("data-0", "os"))
        assert "completes what a run had begun to publish" in told.advice()
    (told,), many = survey.survey(str(images.parent), silent)  # completes it, as whoever opens the place does
    assert many
    assert (told.name, told.state, told.drafts) == ("images", "good", ())
    assert command(images).returncode == 0
    assert (images / "os.raw").read_bytes()[CHUNK : 2 * CHUNK] == B


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_without_a_usable_manifest_a_disk_is_not_verified(images: Path, damage: str) -> None:
    path = images / "os.raw.manifest"
    text = path.read_text()
    altered = text.replace(f'"size": {SIZE}', '"size": 512')
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(text[: len(text) // 2] if damage == "cut" else altered)
    verdict = verify(images)["os"]
    assert verdict.verified is None
    assert "no usable" in verdict.reason


@pytest.mark.slow
def test_a_replica_in_blob_storage_is_verified_too(
    azure: Sandbox, source: Source, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os", MIB))
    place = SandboxPlace(azure)
    with pytest.raises(NoReplica, match="no replica at"):  # nor a container
        source.verify(place.url)
    source.replicate("web", place.url)
    (verdict,) = source.verify(place.url)
    assert (verdict.verified, verdict.size_bytes) == (True, MIB), verdict
    place.died()
    place.scribble(512, b"r" * 512)
    (verdict,) = source.verify(place.url)
    assert (verdict.verified, verdict.bad_offset) == (False, 0)


DATA = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"


class Stored:
    """A replica in Blob storage, of the content B in chunk 1, and who may only read it."""

    def __init__(self, azure: Sandbox, source: Source) -> None:
        self.azure, self.place, self.source = azure, SandboxPlace(azure), source
        self.bring({1: B})

    @contextmanager
    def writable(self) -> Iterator[None]:
        self.azure.permissions[:] = [{"actions": ["*"], "dataActions": ["*"]}]
        yield
        self.azure.permissions[:] = [{"actions": ["*/read"], "dataActions": [f"{DATA}/read"]}]

    def blobs(self) -> dict[str, tuple[str, bool]]:
        """Their versions, and whether they are leased."""
        blobs = self.azure.storage.account("sandboxstorage").containers["images"].blobs
        return {name: (blob.etag, bool(blob.leased())) for name, blob in blobs.items()}

    def bring(self, content: dict[int, bytes]) -> None:
        with self.writable(), self.place.folder() as folder:
            record = sets.begin(folder, "/vm", sets.Begun("run", "2026-01-01T00:00:00Z", ("os",)))
            _, manifest = bring(folder.disk("os"), content, size=SIZE, chunk=CHUNK)
            sets.complete(folder, record, {"os": manifest.root()})

    def verify(self, report: Report = silent) -> list[Verdict]:
        return verification.verify_at(self.place.url, report, self.source.storage, Clock())


@pytest.fixture
def stored(azure: Sandbox, source: Source) -> Stored:
    return Stored(azure, source)


def test_a_replica_in_blob_storage_is_read_without_the_right_to_write(stored: Stored, tmp_path: Path) -> None:
    before = stored.blobs()
    assert [verdict.verified for verdict in stored.verify()] == [True]
    assert stored.source.status(stored.place.url).disks == ("os",)
    assert [one.state for one in survey.survey(stored.place.url, silent, stored.source.storage)[0]] == [
        "good"
    ]
    stored.source.restore(stored.place.url, "latest", tmp_path / "restored")
    assert (tmp_path / "restored/os.raw").read_bytes() == stored.place.content(SIZE)
    assert stored.blobs() == before
    with stored.writable():
        stored.place.scribble(512, b"r" * 512)
    assert [verdict.verified for verdict in stored.verify()] == [False]


def test_who_cannot_keep_runs_out_notices_them(stored: Stored) -> None:
    """One that is at work, and one that begins and ends meanwhile: neither is taken for damage."""

    def meanwhile(event: Event) -> None:
        if isinstance(event, Step):
            stored.bring({2: B})

    with ExitStack() as ending:
        with stored.writable():
            ending.enter_context(stored.place.folder())
        with pytest.raises(InvalidInput, match="another run is using"):
            stored.verify()
        with stored.writable():
            ending.close()
    with pytest.raises(InvalidInput, match="another run is using") as refused:
        stored.verify(meanwhile)
    assert "Wait until it ends" in refused.value.remedy
    assert [verdict.verified for verdict in stored.verify()] == [True]


def test_where_there_is_no_replica_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        verify(tmp_path / "nothing")
    assert caught.value.remedy == "Give an existing folder."
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no replica"):
        verify(tmp_path / "empty")
