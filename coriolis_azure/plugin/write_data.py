"""The target's end of the SSH backup writer: receives data on stdin and writes it to devices.

This file is a module of the package and also a complete program, pushed to targets for which the orchestrator's own
`write_data` is not available. It speaks the same protocol and exits with the same statuses. It uses only the standard
library and the syntax of Python 3.5, and imports nothing of ours.

The protocol is little-endian. A message is HEAD (id, length), then the length of the decompressed payload (0: it is
not compressed), then the payload: the path of a device, NUL, the offset, the data. A message with a length of 0 has
only its HEAD and ends the stream. Each message is answered with its id: once its data is written, or for the last
one, once all data has reached the medium. Only then is the exit status 0.
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
_PATH_BYTES = 4096  # including the NUL
LEAST, MOST = 9, 100 << 20  # bytes of a payload, compressed and decompressed

READ_SIZE, SIZE, DATA, OPEN, WRITE, CLOSE, MEMORY = 1, 2, 4, 5, 7, 8, 9
READ_ID, INFLATED_SIZE, ZLIB, ANSWER, BOUNDS = 11, 12, 13, 14, 15


class Refused(Exception):
    """The stream ends early; the status says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Devices:
    """The devices named so far, each opened once."""

    def __init__(self) -> None:
        self._opened = {}  # type: Dict[bytes, Tuple[int, int]]  # path -> fd, size

    def write(self, path: bytes, offset: int, data: memoryview) -> None:
        """Write `data`; Refused if it exceeds the device."""
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
        """Flush everything written to the medium."""
        try:
            for fd, _ in self._opened.values():
                os.fsync(fd)
        except OSError:
            raise Refused(CLOSE) from None


def serve(source: BinaryIO, answers: BinaryIO) -> None:
    """Process messages up to the one that ends the stream. Refused if it ends early."""
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
        # After the last byte of data only the stream's checksum is left.
        if len(data) != size or inflate.decompress(inflate.unconsumed_tail, 1) or not inflate.eof:
            raise Refused(ZLIB)
    except zlib.error:
        raise Refused(ZLIB) from None
    return data


def _parts(payload: bytes) -> Tuple[bytes, int, memoryview]:
    """Path, offset, data."""
    path, nul, _ = payload[:_PATH_BYTES].partition(b"\0")
    start = len(path) + 1 + OFFSET.size
    if not path or not nul or len(payload) < start:
        raise Refused(DATA)
    return path, OFFSET.unpack_from(payload, len(path) + 1)[0], memoryview(payload)[start:]


def main() -> int:
    """Serve stdin and stdout; return the exit status."""
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except Refused as refused:
        return refused.status
    except MemoryError:
        return MEMORY
    return 0


if __name__ == "__main__":
    os._exit(main())  # skip the flush at exit: an answer that failed must not be sent again
