"""Many digests: what they are like, and that they are not in memory."""

from __future__ import annotations

import gc
import os
import random
import resource
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coriolis_azure.errors import DestinationFailed
from coriolis_azure.replica import digests as room
from coriolis_azure.replica.digests import PAGE, Digests
from coriolis_azure.replica.manifest import DIGEST, UNKNOWN, ZERO
from harness import memory

SOME, OTHER = b"d" * DIGEST, b"e" * DIGEST
EDITS = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.integers(0, 20000),
            st.integers(1, 9000),
            st.sampled_from([ZERO, UNKNOWN, SOME]),
        ),
        st.tuples(st.just("resize"), st.integers(0, 20000), st.just(0), st.sampled_from([ZERO, UNKNOWN])),
        st.tuples(st.just("copy"), st.just(0), st.just(0), st.just(ZERO)),
        st.tuples(st.just("go on"), st.integers(0, 20000), st.integers(1, 9000), st.just(SOME)),
    ),
    max_size=8,
)


@pytest.mark.parametrize(
    "in_memory", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]
)
@given(st.integers(0, 20000), st.sampled_from([ZERO, UNKNOWN]), EDITS)
def test_they_are_what_the_same_bytes_would_be(
    in_memory: int, count: int, fill: bytes, edits: list[tuple[str, int, int, bytes]]
) -> None:
    """And what is done to a copy is not seen in what it is a copy of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_IN_MEMORY", in_memory)
        digests, plain = Digests.filled(fill, count), fill * count
        for what, index, length, digest in edits:
            older, before = digests, plain
            if what != "go on":
                digests = digests.copy()
            if what in ("put", "go on"):
                index = min(index, len(digests))
                length = min(length, len(digests) - index)
                digests.put(index, digest * length)
                plain = plain[: DIGEST * index] + digest * length + plain[DIGEST * (index + length) :]
            elif what == "resize":
                digests = digests.resized(index, digest)
                plain = plain[: DIGEST * index] + digest * max(0, index - len(older))
            if what != "go on":
                assert older.span(0, len(older)) == before
            if len(older) == len(digests):
                now = digests.span(0, len(digests))
                pairs = (
                    (before[at : at + DIGEST], now[at : at + DIGEST]) for at in range(0, len(now), DIGEST)
                )
                expected = [number for number, (one, other) in enumerate(pairs) if one != other]
                assert list(Digests(before).differing(digests)) == expected
            assert len(digests) == len(plain) // DIGEST
            assert digests.span(0, len(digests)) == plain
            assert digests == Digests(plain)
            for at in {0, index - 1, index, len(digests) - 1}:
                if 0 <= at < len(digests):
                    assert digests[at] == plain[DIGEST * at : DIGEST * (at + 1)]
                    assert digests.span(at, at + 4100) == plain[DIGEST * at : DIGEST * (at + 4100)]


def filled_and_changed(count: int) -> tuple[Digests, bytes]:
    """Digests that were all put, as a run does it, then some of them once more; and what they are."""
    told = random.Random(count)
    plain = bytearray(told.randbytes(DIGEST * count))
    digests = Digests.filled(UNKNOWN, count)
    for index in range(0, count, 64):
        digests.put(index, bytes(plain[DIGEST * index : DIGEST * (index + 64)]))
    digests = digests.copy()
    for index in range(0, count, 1000):
        plain[DIGEST * index : DIGEST * (index + 1)] = SOME
        digests.put(index, SOME)
    return digests, bytes(plain)


@pytest.mark.slow
def test_the_memory_they_take_does_not_grow_with_the_disk() -> None:
    small, large = memory.peak(put_and_copied, 40), memory.peak(put_and_copied, 160)
    assert large < 4 << 20
    assert large < 1.1 * small


def put_and_copied(pages: int) -> None:
    digests = Digests.filled(UNKNOWN, pages * PAGE)
    for index in range(0, pages * PAGE, 64):
        digests.put(index, os.urandom(DIGEST * 64))
    other = digests.copy()
    for index in range(0, pages * PAGE, 64):
        other.put(index, SOME * 64)
    assert digests.span(0, 64) != other.span(0, 64) == SOME * 64


def test_their_file_has_no_name_and_is_gone_with_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    digests, plain = filled_and_changed(20 * PAGE)
    assert list(tmp_path.iterdir()) == []
    opened = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    new = [fd for fd in opened if str(tmp_path) in str(fd.readlink())]
    assert len(new) == 1
    assert os.fstat(int(new[0].name)).st_mode & 0o077 == 0
    other = digests.copy()
    del digests
    assert other == Digests(plain)
    del other
    gc.collect()
    assert not [fd for fd in new if fd.is_symlink()]


def test_where_there_is_no_place_for_a_file_they_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    digests, plain = filled_and_changed(20 * PAGE)
    assert digests == Digests(plain)


def test_where_the_place_is_full_the_others_stay_in_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 2 * DIGEST * PAGE + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        digests, plain = filled_and_changed(22 * PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert digests == Digests(plain)
    assert os.fstat(digests._file._fd).st_size == size


def test_what_the_medium_loses_is_not_known() -> None:
    digests, plain = filled_and_changed(20 * PAGE)
    fd, size = digests._file._fd, os.fstat(digests._file._fd).st_size
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)
    assert digests.span(0, 16 * PAGE) == plain[: 16 * PAGE * DIGEST]
    lost = digests.span(16 * PAGE, 18 * PAGE)
    assert lost == UNKNOWN * (2 * PAGE)
    os.ftruncate(fd, 0)
    with pytest.raises(DestinationFailed, match="cannot be read: Input") as failure:
        digests.span(16 * PAGE, 18 * PAGE)
    assert "TMPDIR" in failure.value.remedy


@pytest.mark.parametrize("count", [100, 20 * PAGE + 5])
def test_there_are_no_others(count: int) -> None:
    digests = Digests(SOME * count)
    for index in (-1, count):
        with pytest.raises(IndexError):
            digests[index]
        with pytest.raises(IndexError):
            digests.put(index, SOME)
    with pytest.raises(IndexError):
        digests.put(count - 1, SOME * 2)
    digests.put(count, b"")
    assert digests[count - 1] == SOME


def test_one_thread_changes_them_while_others_read() -> None:
    """Each reader sees one of the two digests that a chunk has had, whatever page is in memory just now."""
    count, rounds = 24 * PAGE, 3
    digests = Digests(SOME * count)
    ended, seen = threading.Event(), []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not ended.is_set():
            first = chance.randrange(count - 64)
            found = digests.span(first, first + 64)
            seen.append({found[at : at + DIGEST] for at in range(0, len(found), DIGEST)} | {digests[first]})

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(rounds):
            for index in range(0, count, 512):
                digests.put(index, (OTHER if number % 2 == 0 else SOME) * 512)
            digests.copy()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert seen
    assert set().union(*seen) <= {SOME, OTHER}
    assert digests.span(0, count) == OTHER * count


def test_only_whole_pages_follow_each_other() -> None:
    digests = Digests(SOME * PAGE)
    digests.append(SOME)
    with pytest.raises(ValueError, match="not a page"):
        digests.append(SOME)
    for wrong in (b"", SOME * (PAGE + 1), SOME[1:]):
        with pytest.raises(ValueError, match="not a page"):
            Digests(SOME * PAGE).append(wrong)
    with pytest.raises(ValueError, match="not a multiple"):
        Digests(SOME[1:])
