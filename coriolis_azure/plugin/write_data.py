"""Receives pieces of disks on stdin and writes them where they say: the target's end of the SSH backup writer.

This file is a module of the package and, as it stands, the whole program that is pushed to a target on which
the orchestrator's own `write_data` is not to be had. It speaks the same protocol and ends with the same
statuses: standard library only, Python 3.5 syntax, nothing of ours imported.

Wire, little endian. A message is HEAD (id, length) and, unless the length is 0, which ends it all, the length
that the payload inflates to (0: it is not compressed) and the payload. That is the path of a device, NUL, the
offset, the data. Each message is answered with its id once it is written; the one that ends it all once what
was written has reached the medium. Then, and only then, the status is 0.
"""
# ruff: noqa: UP006, UP035

import os
import struct
import sys
import zlib
from typing import BinaryIO, Dict, Tuple  # noqa: F401  (Dict: in a comment that the type checker reads)

HEAD = struct.Struct("<II")
NUMBER = struct.Struct("<I")
OFFSET = struct.Struct("<Q")
_PATH_BYTES = 4096  # with its NUL
LEAST, MOST = 9, 100 << 20  # bytes of a payload, as it comes and inflated

READ_SIZE, SIZE, DATA, OPEN, WRITE, CLOSE, MEMORY = 1, 2, 4, 5, 7, 8, 9
READ_ID, INFLATED_SIZE, ZLIB, ANSWER, BOUNDS = 11, 12, 13, 14, 15


class Refused(Exception):
    """The end of the stream, with the status that says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Devices:
    """The devices that were named, each opened once, with its size."""

    def __init__(self) -> None:
        self._opened = {}  # type: Dict[bytes, Tuple[int, int]]

    def write(self, path: bytes, offset: int, data: memoryview) -> None:
        """Put `data` there, if it lies within the device."""
        if path not in self._opened:
            try:
                fd = os.open(path, os.O_RDWR)
                self._opened[path] = fd, os.lseek(fd, 0, os.SEEK_END)
            except OSError:
                raise Refused(OPEN) from None
        fd, size = self._opened[path]
        if offset + len(data) > size:
            raise Refused(BOUNDS)
        try:
            while data:
                done = os.pwrite(fd, data, offset)
                offset, data = offset + done, data[done:]
        except OSError:
            raise Refused(WRITE) from None

    def finish(self) -> None:
        """On return what was written is on the medium."""
        try:
            for fd, _ in self._opened.values():
                os.fsync(fd)
        except OSError:
            raise Refused(CLOSE) from None


def serve(source: BinaryIO, answers: BinaryIO) -> None:
    """Take messages until the one that ends it all. Refused says why it ended before."""
    devices = Devices()
    while True:
        number, length = HEAD.unpack(_read(source, HEAD.size, READ_ID))
        if length:
            (inflated,) = NUMBER.unpack(_read(source, NUMBER.size, READ_SIZE))
            if not LEAST <= length <= MOST:
                raise Refused(SIZE)
            if inflated and not LEAST <= inflated <= MOST:
                raise Refused(INFLATED_SIZE)
            devices.write(*_parts(_inflated(_read(source, length, OPEN), inflated)))
        else:
            devices.finish()
        try:
            answers.write(NUMBER.pack(number))
            answers.flush()
        except OSError:
            raise Refused(ANSWER) from None
        if not length:
            return


def _read(source: BinaryIO, size: int, status: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise Refused(status)
    return data


def _inflated(payload: bytes, size: int) -> bytes:
    if not size:
        return payload
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(payload, size)
        # What is left of the stream once all its bytes are out is its checksum.
        if len(data) != size or inflate.decompress(inflate.unconsumed_tail, 1) or not inflate.eof:
            raise Refused(ZLIB)
    except zlib.error:
        raise Refused(ZLIB) from None
    return data


def _parts(payload: bytes) -> Tuple[bytes, int, memoryview]:
    """Path, offset, data."""
    path, found, _ = payload[:_PATH_BYTES].partition(b"\0")
    start = len(path) + 1 + OFFSET.size
    if not path or not found or len(payload) < start:
        raise Refused(DATA)
    return path, OFFSET.unpack_from(payload, len(path) + 1)[0], memoryview(payload)[start:]


def main() -> int:
    """Serve stdin and stdout; the status to end with."""
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except Refused as refused:
        return refused.status
    except MemoryError:
        return MEMORY
    return 0


if __name__ == "__main__":
    os._exit(main())  # what could not be answered is not to be flushed again
