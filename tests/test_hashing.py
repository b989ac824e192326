"""Manifests: what they say, how they are kept, what they refuse."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coriolis_azure import agent
from coriolis_azure.errors import InvalidInput
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.manifest import DIGEST, MAX_CHUNK, UNKNOWN, ZERO, Manifest, _check
from harness import memory
from harness.constants import MIB

CHUNK = 4096


def manifest(size: int = 5 * CHUNK + 512, disk: str = "disk-1") -> Manifest:
    digests = b"".join(bytes([index + 1]) * DIGEST for index in range(-(-size // CHUNK)))
    return Manifest(size, CHUNK, "blake2b", bytes(range(32)), Digests(digests), disk)


def large(count: int) -> Manifest:
    digests = Digests(random.Random(count).randbytes(count * DIGEST))
    return Manifest(count * CHUNK, CHUNK, "blake2b", bytes(range(32)), digests, 'a "disk"')


def test_the_last_chunk_may_be_short() -> None:
    spans = [manifest().span(index) for index in range(manifest().count)]
    assert spans[0] == (0, CHUNK)
    assert spans[-1] == (5 * CHUNK, 512)
    assert sum(length for _, length in spans) == manifest().size


def test_every_manifest_has_a_secret_of_its_own_and_does_not_show_it() -> None:
    one, other = Manifest.new(CHUNK, CHUNK, "", ZERO), Manifest.new(CHUNK, CHUNK, "", ZERO)
    assert one.key != other.key
    assert one.digester()(b"x") != other.digester()(b"x")
    assert "key" not in repr(one)
    assert "digests" not in repr(one)


def test_the_digest_of_zeros_is_zero_for_any_buffer_and_length() -> None:
    digest = manifest().digester()
    for size in (1, 512, CHUNK, MAX_CHUNK):
        for kind in (bytes, bytearray, lambda n: memoryview(bytes(n))):
            assert digest(kind(size)) == ZERO
        assert digest(bytes(size - 1) + b"\1") not in (ZERO, UNKNOWN)
    data = b"content"
    assert digest(data) == digest(bytearray(data)) == digest(memoryview(data))
    assert len(digest(data)) == DIGEST


@pytest.mark.slow
def test_what_is_zeros_in_a_large_disk_takes_no_memory() -> None:
    """Even where its manifest has been to JSON and back: a page for each 4096 chunks that hold something."""
    assert memory.peak(to_json_and_back, 4 << 40) < 2 << 20


def to_json_and_back(size: int) -> None:
    made = Manifest.new(size, 1 << 20, "disk", ZERO)
    made.digests.put(0, b"d" * DIGEST)
    again = Manifest.from_json(made.to_json())
    assert again == made
    assert again.resized(size + (1 << 40), ZERO).count == (size >> 20) + (1 << 20)


def test_json_gives_the_manifest_back() -> None:
    document = json.loads(json.dumps(manifest().to_json()))
    assert Manifest.from_json(document) == manifest()
    assert Manifest.from_json({**document, "image": {"anything": 1}}) == manifest()


@pytest.mark.parametrize("count", [1, 2, 3, 9000])
def test_its_text_in_pieces_is_its_json_and_what_stands_beside_it(count: int) -> None:
    made = large(count)
    text = b"".join(made.text({"image": {"size": 1}}))
    assert json.loads(text) == {**made.to_json(), "image": {"size": 1}}
    assert Manifest.from_json(json.loads(text)) == made
    read, beside = Manifest.read(BytesIO(text))
    assert read == made
    assert beside == {**made.to_json(), "image": {"size": 1}, "chunks": ""}
    compact = json.dumps(json.loads(text), separators=(",", ":")).encode()
    assert Manifest.read(BytesIO(compact))[0] == made


def test_secret_and_digests_are_only_under_chunks() -> None:
    made = manifest()
    document = made.to_json()
    packed = zlib.decompress(base64.b64decode(document.pop("chunks")))
    assert packed == made.key + made.digests.span(0, made.count)
    assert set(document) == {"version", "size", "chunk", "hash", "disk", "check"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: None, "it is not a manifest"),
        (lambda d: [], "it is not a manifest"),
        (lambda d: {}, "it is not a manifest"),
        (lambda d: {"version": "1"}, "it is not a manifest"),
        (lambda d: {"version": True}, "it is not a manifest"),
        (lambda d: {**d, "version": 1}, "version 1, which had other digests"),
        (lambda d: {**d, "version": 3}, "version 3, but this program knows"),
        (lambda d: {k: v for k, v in d.items() if k != "chunks"}, "'chunks' is missing"),
        (lambda d: {**d, "size": "1"}, "'size' is missing or not a number"),
        (lambda d: {**d, "size": 1.5}, "'size'"),
        (lambda d: {**d, "disk": None}, "'disk'"),
        (lambda d: {**d, "chunks": d["chunks"][:-4]}, "check value does not match"),
        (lambda d: {**d, "disk": "another"}, "check value does not match"),
        (lambda d: sealed({**d, "chunks": d["chunks"][:-4]}), "'chunks'"),
        (lambda d: sealed({**d, "chunks": "%%%"}), "'chunks' is damaged"),
        (lambda d: sealed({**d, "chunks": "ä"}), "'chunks' is damaged"),
        (lambda d: sealed({**d, "chunks": ""}), "'chunks'"),
        (lambda d: sealed({**d, "size": d["size"] * 2}), "'chunks' does not contain"),
        (lambda d: sealed({**d, "size": 1 << 62}), "'chunks' does not contain"),
        (lambda d: sealed({**d, "size": 10**40}), "'chunks'"),
        (lambda d: sealed({**d, "size": 0}), "size is 0"),
        (lambda d: sealed({**d, "chunk": -1}), "chunk size -1"),
        (lambda d: sealed({**d, "hash": "md5"}), "hash 'md5' is not one of"),
    ],
)
def test_what_is_wrong_with_a_document_is_said(
    change: Callable[[dict[str, Any]], dict[str, Any]], said: str
) -> None:
    document = change(manifest().to_json())
    with pytest.raises(InvalidInput, match=said):
        Manifest.from_json(document)
    if not json.dumps(document).isascii() or "\\" in json.dumps(document):
        said = "check value does not match"  # of the letters as they stand there
    with pytest.raises(InvalidInput, match=said):
        Manifest.read(BytesIO(json.dumps(document).encode()))


@pytest.mark.parametrize("kept", [0, 1, 30, 200, 70000, -2])
def test_a_text_that_is_cut_off_is_no_manifest(kept: int) -> None:
    made = large(9000)
    text = b"".join(made.text({"image": {"size": 1}}))
    with pytest.raises((InvalidInput, ValueError)):
        Manifest.read(BytesIO(text[:kept]))
    with pytest.raises(InvalidInput):
        Manifest.read(BytesIO(text[:200] + (b"A" if text[200] != 65 else b"B") + text[201:]))


@pytest.mark.slow
def test_a_large_text_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.manifest"
    assert memory.peak(written_and_read, path) < 3 << 20
    assert path.stat().st_size > 7 << 20


def written_and_read(path: Path) -> None:
    made = large(100 * 4096)
    tracemalloc.reset_peak()
    with path.open("wb") as file:
        file.writelines(made.text({}))
    with path.open("rb") as file:
        again, _ = Manifest.read(file)
    assert again == made


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with a check that fits: damage that no check finds."""
    letters = document["chunks"].encode("ascii", "backslashreplace")
    return {**document, "check": _check(document, iter([letters]))}


@given(st.data())
def test_no_damage_is_taken_for_a_manifest(data: st.DataObject) -> None:
    text = json.dumps(manifest().to_json())
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(max_codepoint=255).filter(lambda c: c != text[at]))
    try:
        document = json.loads(text[:at] + letter + text[at + 1 :])
    except ValueError:
        return
    try:
        found = Manifest.from_json(document)
    except InvalidInput:
        return
    assert found == manifest()


def test_sizes_and_chunk_sizes_that_cannot_be_are_refused() -> None:
    for size, chunk in ((0, CHUNK), (-1, CHUNK), (CHUNK, 0), (CHUNK, 1000), (CHUNK, 2 * MAX_CHUNK)):
        with pytest.raises(InvalidInput):
            Manifest.new(size, chunk, "", ZERO)


@pytest.mark.parametrize("tail", [ZERO, UNKNOWN])
@pytest.mark.parametrize("before", [1, 512, CHUNK, CHUNK + 512, 3 * CHUNK, 3 * CHUNK + 512])
@pytest.mark.parametrize("after", [1, 512, CHUNK, CHUNK + 512, 3 * CHUNK, 3 * CHUNK + 512, 3 * CHUNK + 1024])
def test_resizing_keeps_what_is_known_and_nothing_else(before: int, after: int, tail: bytes) -> None:
    old = manifest(before)
    new = old.resized(after, tail)
    assert (new.size, new.key, new.disk) == (after, old.key, old.disk)
    for index in range(new.count):
        if index >= old.count:
            assert new.digest(index) == tail
        elif new.span(index) == old.span(index):
            assert new.digest(index) == old.digest(index)
        else:
            assert new.digest(index) == UNKNOWN


def test_the_root_names_content_and_shape_but_not_the_secret() -> None:
    made = manifest()
    assert made.root() == replace(made, key=bytes(32), disk="x").root()
    others = [
        replace(made, digests=Digests(made.digests.span(0, made.count)[::-1])),
        replace(made, size=made.size + 1),
        Manifest.new(made.size, CHUNK, "", ZERO),
    ]
    assert len({made.root(), *(other.root() for other in others)}) == 4
    whole = agent.root(made.size, made.chunk, made.hash)
    for index in range(made.count):
        whole.update(made.digest(index))
    assert whole.hexdigest() == made.root()


def test_the_state_of_a_volume_is_as_large_as_the_page_says() -> None:
    """Of a disk of 1 TiB with chunks of 1 MiB that all hold something: 64 times that of 16 GiB."""
    page = (Path(__file__).parent.parent / "docs/reference/coriolis.md").read_text(encoding="utf-8")
    said = re.search(
        r"has (\d+)\s+bytes per chunk, which is (\d+) MiB for a disk of 1 TiB [^,]*, or ([0-9.]+) MiB as text",
        page,
    )
    assert said
    whole = Manifest.new(1 << 34, MIB, "disk-1", ZERO)
    whole = replace(whole, digests=Digests(os.urandom(DIGEST * whole.count)))
    assert (int(said[1]), int(said[2])) == (DIGEST, DIGEST * whole.count * 64 // MIB)
    assert len(json.dumps(whole.to_json())) * 64 / MIB == pytest.approx(float(said[3]), rel=0.01)
