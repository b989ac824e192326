"""One suite for every place a replica can be in: a file, a block device, Blob storage here and in Azurite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors
from coriolis_azure.errors import InvalidInput
from coriolis_azure.events import Event, Notice
from coriolis_azure.readers.conversation import Job
from coriolis_azure.replica.manifest import UNKNOWN, ZERO
from coriolis_azure.sandbox import Sandbox
from harness.copies import by_agent
from harness.lanes import slow
from harness.nbd_servers import nbdkit, serving
from harness.pipes import AGENT
from harness.replica_runs import CHUNK, LAST, SIZE, A, B, Place, expected, run
from harness.replicas import AzuriteOnly, BlobPlace, DevicePlace, FilePlace, NbdPlace, SandboxPlace

# Azurite ends with a connection of ours open; the socket is closed when it is collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(params=["file", "device", "blob", slow("nbd"), slow("azurite")])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "file":
        yield FilePlace(tmp_path)
    elif request.param == "device":
        yield DevicePlace(tmp_path, SIZE + (2 << 20))
    elif request.param == "nbd":
        yield request.getfixturevalue("nbd_place")
    elif request.param == "blob":
        with Sandbox(tmp_path / "azure") as sandbox:
            yield SandboxPlace(sandbox)
    else:
        azurite: AzuriteOnly = request.getfixturevalue("azurite")
        yield azurite.place(f"r/{request.node.name}")


@pytest.fixture
def nbd_place(tmp_path: Path) -> Iterator[NbdPlace]:
    (tmp_path / "backing").touch()
    with serving(*nbdkit("file", tmp_path / "backing")) as server:
        yield NbdPlace(tmp_path, SIZE + (2 << 20), server.url)


class Told(list[str]):
    """A report that keeps the notices."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.append(event.text)


def test_a_place_holds_what_was_written_and_zeros_elsewhere(place: Place) -> None:
    content = {0: A, 5: B, LAST: A}
    run(place, content)
    assert place.content(SIZE) == expected(content)


def test_the_second_run_writes_what_changed_and_clears_what_became_zeros(place: Place) -> None:
    run(place, {0: A, 1: B, 20: A, LAST: A})
    assert run(place, {0: A, 1: A, LAST: A}) == [1, 20]
    assert run(place, {0: A, 1: A, LAST: A}) == []
    assert place.content(SIZE) == expected({0: A, 1: A, LAST: A})


def test_full_begins_anew(place: Place) -> None:
    run(place, {0: A, 9: B})
    assert 0 in run(place, {0: A}, full=True)
    assert place.content(SIZE) == expected({0: A})


def test_another_disk_of_the_same_name_begins_anew(place: Place) -> None:
    told = Told()
    run(place, {0: A, 9: B})
    assert 0 in run(place, {0: A}, disk="another", report=told)
    assert "another disk" in told[0]
    assert place.content(SIZE) == expected({0: A})


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (SIZE, SIZE + (1 << 20)),
        slow(SIZE, 2 << 20),
        slow(5 * CHUNK, 5 * CHUNK + 512),
        (5 * CHUNK + 512, CHUNK),
        slow(1 << 20, (1 << 20) + 512),
    ],
)
def test_a_disk_may_grow_and_shrink(place: Place, first: int, then: int) -> None:
    content = {0: A, 4: B, 5: A, 16: B, LAST: A}
    for size in (first, then, first):
        fits = {index: data for index, data in content.items() if index * CHUNK < size}
        run(place, fits, size=size)
        assert place.content(size) == expected(fits, size)


def test_a_chunk_that_a_dead_run_changed_is_not_taken_for_its_older_self(place: Place) -> None:
    """A to B, death, back to A: the manifest that was kept says A all the time."""
    told = Told()
    run(place, {0: A, 20: A})
    run(place, {0: B, 20: B}, die=1)
    place.died()
    assert run(place, {0: A, 20: A}, report=told) == [0]
    assert "had fetched" in told[0]
    assert place.content(SIZE) == expected({0: A, 20: A})


def test_what_a_stranger_wrote_after_a_run_died_is_not_overwritten_unasked(place: Place) -> None:
    """In a chunk far from all that the dead run was to change, and back to what the disk had once."""
    if isinstance(place, FilePlace):
        pytest.skip("see test_destinations")
    run(place, {0: A, 20: B, 30: A})
    run(place, {0: B, 20: B, 30: A}, die=1)
    place.died()
    place.break_lease()
    place.scribble(20 * CHUNK, A)
    with pytest.raises(InvalidInput, match="somebody else changed"):
        run(place, {0: A, 20: B, 30: A})
    assert place.content(SIZE) == expected({0: A, 20: A, 30: A})
    run(place, {0: A, 20: B, 30: A}, full=True)
    assert place.content(SIZE) == expected({0: A, 20: B, 30: A})
    assert run(place, {0: A, 20: B, 30: A}) == []


def test_what_a_dead_run_had_brought_is_not_sent_again(place: Place) -> None:
    run(place, {0: A})
    run(place, {0: A, 3: B, 4: B}, die=1)
    place.died()
    assert run(place, {0: A, 3: B, 4: B}) == [4]
    assert place.content(SIZE) == expected({0: A, 3: B, 4: B})


def test_without_a_manifest_the_content_itself_is_read(place: Place) -> None:
    """Of a VHD its metadata says that it is ours; an image that nothing tells of must be adopted."""
    told = Told()
    run(place, {0: A, 9: B})
    place.forget()
    adopted: dict[str, Any] = {"adopt": True} if isinstance(place, FilePlace) else {}
    if adopted:
        with pytest.raises(InvalidInput, match="no run of ours"):
            run(place, {0: A, 9: A})
        assert place.content(SIZE) == expected({0: A, 9: B})
    assert run(place, {0: A, 9: A}, report=told, **adopted) == [9]
    assert "read as a whole" in told[-1]
    assert place.content(SIZE) == expected({0: A, 9: A})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    {
        "cut": (lambda text: text[: len(text) // 2], "was cut off"),
        "changed": (lambda text: text.replace(b'"size": ', b'"size": 1'), "its check value does not match"),
        "newer": (
            lambda text: text.replace(b'"version": 2', b'"version": 3'),
            "this program knows only version 2",
        ),
        "foreign": (lambda text: b'{"version": "1.0", "layers": []}', "it is not a manifest"),
    }.values(),
    ids=["cut", "changed", "newer", "foreign"],
)
def test_a_manifest_that_cannot_be_used_is_named_and_the_content_itself_is_read(
    place: Place, change: Callable[[bytes], bytes], said: str
) -> None:
    """Nothing tells any more that a device or an export is that of the last run, so it must be adopted."""
    told = Told()
    run(place, {0: A, 9: B})
    place.spoil(change)
    adopted: dict[str, Any] = {"adopt": True} if isinstance(place, DevicePlace | NbdPlace) else {}
    if adopted:
        with pytest.raises(InvalidInput, match="cannot be used"):
            run(place, {0: A, 9: A})
        assert place.content(SIZE) == expected({0: A, 9: B})
    sent = run(place, {0: A, 9: A}, report=told, **adopted)
    assert ".manifest" in told[0]
    assert said in told[0]
    assert sent == [9]
    assert place.content(SIZE) == expected({0: A, 9: A})
    assert run(place, {0: A, 9: A}) == []


def test_another_chunk_size_keeps_the_content(place: Place) -> None:
    run(place, {0: A, 9: B})
    with place.open() as image:
        base = image.known("id", SIZE, 4 * CHUNK, full=False)
        assert base.digest(0) == base.digester()(A + bytes(3 * CHUNK))
        assert base.digest(4) == ZERO
        assert UNKNOWN not in {base.digest(index) for index in range(base.count)}


def test_a_real_transfer_writes_and_verifies(place: Place, tmp_path: Path) -> None:
    """The agent itself in a process of its own, the real transfer code, twice."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(expected({0: os.urandom(CHUNK), 7: A, 8: B, LAST: A}))
    outcomes = []
    for _ in range(2):
        with place.open() as image, Agent() as agent:
            base = image.known("id", SIZE, CHUNK, full=False)
            job = Job((str(disk),), SIZE, leaf=4096)
            outcomes.append(by_agent(lambda: agent, job, base, image))
        with disk.open("r+b") as file:
            file.seek(7 * CHUNK)
            file.write(b"x")
            file.seek(8 * CHUNK)
            file.write(bytes(CHUNK))
        if len(outcomes) == 1:
            assert place.content(SIZE)[: 7 * CHUNK] == disk.read_bytes()[: 7 * CHUNK]
    assert [outcome.verified for outcome in outcomes] == [True, True]
    # A chunk near by is patched, one far away is sent as a whole: reading it back first would cost more.
    far = isinstance(place, BlobPlace)
    assert outcomes[1].sent_bytes == (CHUNK if far else 4096)
    assert outcomes[1].zero_bytes == CHUNK
    assert place.content(SIZE) == disk.read_bytes()


class Agent:
    """The agent in a process of its own, over pipes: a transfer.Stream."""

    def __enter__(self) -> Agent:
        self._process = subprocess.Popen(
            [sys.executable, "-I", *AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise errors.StreamEnded("the agent is gone")
        return data

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
