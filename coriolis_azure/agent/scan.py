"""Reads one disk, read-only and once, chunk by chunk, and reports how it differs from the destination."""

import errno
import mmap
import os
import threading
import time
from collections import deque
from typing import Any, Callable, Iterable, Iterator, List, Tuple

from .digest import HASHES, Digester, is_zero, root
from .pack import Packer, Pieces, add_piece, content, layout
from .wire import (
    ASK,
    DATA,
    DIGEST,
    END,
    GRAIN,
    LEAVES,
    NUMBER,
    PATCH,
    RAW,
    SAME,
    UNKNOWN,
    ZERO,
    ZEROS,
    Failure,
    Input,
    Output,
    Queue,
    Wanted,
    window,
)

_ABSENT = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR)


def ordered(work: Callable[[Any], Any], items: Iterable[Any], threads: int, ahead: int) -> Iterator[Any]:
    """Yield work(item) in the order of `items`, with at most `ahead` of them in memory.

    The threads end by themselves. concurrent.futures takes longer to import than a small disk to read.
    """
    todo = Queue()

    def serve() -> None:
        for item, done in iter(todo.get, None):
            try:
                done.put((work(item), None))
            except Exception as error:  # noqa: BLE001  (raised again by `first`)
                done.put((None, error))

    for _ in range(threads):
        threading.Thread(target=serve, daemon=True).start()
    pending = deque()  # type: deque[Any]

    def first() -> Any:
        result, error = pending.popleft().get()
        if error is not None:
            raise error
        return result

    try:
        for item in items:
            pending.append(Queue())
            todo.put((item, pending[-1]))
            if len(pending) >= ahead:
                yield first()
        while pending:
            yield first()
    finally:
        for _ in range(threads):
            todo.put(None)


class Scan:
    """Compares one disk with the host's digests. `look` runs in several threads, everything else in one."""

    def __init__(self, job: Any, name: str, incoming: Input, out: Output) -> None:
        self.size, self.chunk, self.leaf = job["size"], job["chunk"], job["leaf"]  # type: int, int, int
        self.digester = Digester(HASHES[name](bytes.fromhex(job["key"])))
        self.fresh = job["choose"]  # the destination is unknown or known to be empty
        self.incoming, self.out, self.fd, self.device = incoming, out, -1, ""
        self.root = root(self.size, self.chunk, name)
        self.threads = job["threads"]  # type: int
        self.ahead = max(self.threads + 1, min(2 * self.threads, (4 << 20) // self.chunk))
        self.packer = Packer(job["compress"], job["packings"], out.line, self.threads)
        self.buffers = Queue()
        for _ in range(self.ahead + 1):
            self.buffers.put(mmap.mmap(-1, self.chunk))  # pages take no memory until they are used
        self.spare = memoryview(mmap.mmap(-1, self.chunk))
        self.asked = deque()  # type: deque[Any]
        self.answered = {}  # type: Any

    def run(self) -> None:
        """Look at every chunk that the host names and report it, then send END."""
        out, room = self.out, window(self.chunk)
        for kind, index, digest, body in ordered(self.look, self.incoming.chunks(), self.threads, self.ahead):
            self.root.update(digest)
            if kind == DATA:
                out.flush()
                pieces, payload, lent = body
                out.send(DATA, index, pieces, digest, payload)
                if lent is not None:
                    self.buffers.put(lent)
            else:
                out.run(kind, index, body)
            if kind == ASK:
                self.asked.append((index, digest))
            self.patch(room - 1)
        out.flush()
        self.patch(0)
        out.send_json(END, {"root": self.root.hexdigest()})

    def look(self, wanted: Wanted) -> Tuple[int, int, bytes, Any]:
        """Read a chunk: the kind of its message, its index, its digest, and what else the message needs."""
        index, base, numbers, known = wanted
        lent = self.buffers.get()
        offset = index * self.chunk
        data = memoryview(lent)[: min(self.chunk, self.size - offset)]
        grains = self.grains(offset, data, numbers, known)
        digest = self.digester.of(grains)
        body = b""  # type: Any
        if digest == base != UNKNOWN:
            kind = SAME
        elif digest == ZERO:
            kind = ZEROS
        elif known or (self.leaf and (base != ZERO or self.sparse(grains, data))):
            kind, body = ASK, b"".join(grains)
        else:
            pieces = content(grains, len(data))
            payload = self.packer.packed(layout(pieces, data))
            kind, body = DATA, (len(pieces), payload, lent if payload[0] == RAW else None)
        if kind != ASK:  # `differing` reads chunks of an ASK again, so they stay in the page cache
            self.drop(offset, len(data))
        if kind != DATA or body[2] is None:
            self.buffers.put(lent)
        return kind, index, digest, body

    def grains(self, offset: int, data: memoryview, numbers: List[int], known: List[bytes]) -> List[bytes]:
        """Read a chunk, or only the grains with these numbers if the others are `known`; the digests of all grains."""
        if not known:
            self.read(offset, data)
            return self.digester.grains(data)
        grains = list(known)
        for number in numbers:
            start = number * GRAIN
            self.read(offset + start, data[start : start + GRAIN])
            grains[number : number + 1] = self.digester.grains(data[start : start + GRAIN])
        return grains

    def sparse(self, grains: List[bytes], data: Any) -> bool:
        """Whether a chunk that was zeros is worth an ASK, to send leaves: DATA consists of whole grains."""
        if self.fresh or self.leaf >= GRAIN:
            return False
        used = [data[at * GRAIN : (at + 1) * GRAIN] for at, digest in enumerate(grains) if digest != ZERO]
        leaves = [grain[at : at + self.leaf] for grain in used for at in range(0, len(grain), self.leaf)]
        return 2 * sum(map(is_zero, leaves)) > len(leaves)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` from the disk. Failure with the offset if it cannot be read."""
        while len(view):
            try:
                if hasattr(os, "preadv"):
                    done = os.preadv(self.fd, [view], offset)
                else:
                    part = os.pread(self.fd, len(view), offset)
                    done = len(part)
                    view[:done] = part
            except OSError as error:
                text = "cannot read {} at offset {}: {}".format(self.device, offset, error.strerror)
                raise Failure(text, offset) from error
            if not done:
                raise Failure("{} ends at offset {}: no longer attached".format(self.device, offset), offset)
            offset, view = offset + done, view[done:]

    def drop(self, offset: int, length: int) -> None:
        """Drop what was read from the page cache: a disk is larger than memory."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def patch(self, room: int) -> None:
        """Once more than `room` chunks wait for LEAVES, PATCH half of them: bulk makes each cheaper."""
        if len(self.asked) <= room:
            return
        self.out.flush()
        while len(self.asked) > room // 2:
            index, digest = self.asked[0]
            while index not in self.answered:
                if self.incoming.others.empty():
                    self.out.release()
                kind, which, count, payload = self.incoming.others.get()
                if kind != LEAVES:
                    raise Failure("the host sent message {} instead of LEAVES".format(kind))
                self.answered[which] = count, payload
            pieces, data = self.differing(index, *self.answered.pop(index))
            self.out.send(
                PATCH, index, len(pieces), digest, self.packer.packed(layout(pieces, data)), hold=True
            )
            self.asked.popleft()

    def differing(self, index: int, count: int, payload: bytes) -> Tuple[Pieces, memoryview]:
        """The pieces of a chunk that differ from the digests in LEAVES (`count`, `payload`), and the chunk's data."""
        offset = index * self.chunk
        data = self.spare[: min(self.chunk, self.size - offset)]
        at, pieces = NUMBER.size * count, []  # type: int, Pieces
        if at > len(payload):
            raise Failure("the host sent {} bytes of leaves for chunk {}".format(len(payload), index))
        for (number,) in NUMBER.iter_unpack(payload[:at]):
            start = number * GRAIN
            stop = min(start + GRAIN, len(data))
            if not start < stop:
                raise Failure("the host asked for grain {} of chunk {}".format(number, index))
            self.read(offset + start, data[start:stop])
            leaves = [UNKNOWN]  # the leaf is the whole grain, which is known to differ
            if self.leaf < GRAIN:
                leaves = self.digester.leaves(data[start:stop], self.leaf)
            for piece, digest in enumerate(leaves):
                if self.leaf >= GRAIN or digest != payload[at : at + DIGEST]:
                    first = start + piece * self.leaf
                    length = min(self.leaf, stop - first)
                    add_piece(pieces, first, length, zero=is_zero(data[first : first + length]))
                if self.leaf < GRAIN:
                    at += DIGEST
        if at != len(payload):
            raise Failure("the host sent {} bytes of leaves for chunk {}".format(len(payload), index))
        self.drop(offset, len(data))
        return pieces, data


def open_device(paths: List[str], size: int, wait: float) -> Tuple[int, str]:
    """Open the first of `paths` that exists, read-only: fd, path. A disk just attached takes seconds to appear."""
    deadline = time.monotonic() + wait
    while True:
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in _ABSENT:
                    continue
                raise Failure("cannot open {}: {}".format(path, error.strerror)) from error
            actual = os.lseek(fd, 0, os.SEEK_END)
            if actual == size:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                return fd, path
            os.close(fd)
            if actual:  # a device may report no size while it is being attached
                raise Failure("{} has {} bytes, the disk to be read has {}".format(path, actual, size))
        if time.monotonic() >= deadline:
            raise Failure("no device appeared within {} s: {}".format(wait, ", ".join(paths)))
        time.sleep(0.1)
