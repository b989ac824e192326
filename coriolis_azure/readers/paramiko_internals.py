"""What we touch of paramiko's that it does not promise to keep, all of it.

It is as here in the versions that pyproject.toml allows, which stop before the next major one; the lowest and the
newest are tested. `test_paramiko_internals.py` asks the paramiko that is installed whether each part is still there
and used.
"""

from __future__ import annotations

import mmap
from collections import deque

import paramiko
from paramiko.buffered_pipe import PipeTimeout
from paramiko.ssh_exception import SSHException

from ..threads import Condition

TAKEN = 256 << 10  # bytes that are taken from a channel at a time, at most: no packet is as large


def receive_into_blocks(channel: paramiko.Channel, window: int) -> None:
    """What comes for a channel that has just been opened, with this window, is held as Arrived holds it."""
    channel.in_buffer = Arrived(window)  # type: ignore[assignment]
    channel.in_stderr_buffer = Arrived(window)  # type: ignore[assignment]


def agree_on_new_keys_after(transport: paramiko.Transport, amount: int) -> None:
    """So many bytes in one direction, and the keys of the connection are replaced."""
    transport.packetizer.REKEY_BYTES = amount


def wait_for_status(channel: paramiko.Channel, seconds: float) -> bool:
    """Whether the channel's program has told its exit status within so many seconds, or the channel has ended."""
    return channel.status_event.wait(seconds)


def usual_window(transport: paramiko.Transport) -> int:
    """The bytes that paramiko lets be under way to a channel where it is told nothing else."""
    return transport.default_window_size


class Arrived:
    """What has come for a channel and is not taken yet: the `in_buffer` of a paramiko.Channel.

    paramiko's own is one array, which grows with each packet and is moved when some is taken from it: with the pages
    that it takes and gives back all the time, that is more work than to decrypt what comes. Here packets are put into
    blocks of pages, which are used again.
    """

    def __init__(self, window: int) -> None:
        self._blocks: deque[_Block] = deque()  # the oldest first; what comes is put into the last
        self._free: list[_Block] = []
        self._window, self._held = window, 0
        self._closed = False
        self._changed = Condition()

    def feed(self, data: bytes) -> None:
        """Append what has come: a packet. SSHException where there is more of it than the window lets in."""
        with self._changed:
            if len(data) > min(self._window - self._held, TAKEN):
                raise SSHException("more has come than may")
            self._held += len(data)
            if data:
                if not self._blocks or self._blocks[-1].stop + len(data) > TAKEN:
                    self._blocks.append(self._free.pop() if self._free else _Block())
                self._blocks[-1].put(data)
                self._changed.notify()

    def read(self, size: int, timeout: float | None = None) -> memoryview | bytes:
        """The oldest that has come, `size` bytes at most, which is there until the next call; b"" at the end.

        PipeTimeout after so many seconds in which nothing came.
        """
        with self._changed:
            if self._blocks and self._blocks[0].start == self._blocks[0].stop:
                self._give_back(self._blocks.popleft())
            if not self._changed.wait_for(lambda: self._blocks or self._closed, timeout):
                raise PipeTimeout
            piece = self._blocks[0].take(size) if self._blocks else b""
            self._held -= len(piece)
            return piece

    def read_ready(self) -> bool:
        """Whether something is there."""
        return self._held > 0

    def close(self) -> None:
        """There will be no more."""
        with self._changed:
            self._closed = True
            self._free.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        return self._held

    def _give_back(self, block: _Block) -> None:
        if not self._closed:  # a channel, and with it this, may be kept long after its end
            block.start = block.stop = 0
            self._free.append(block)


class _Block:
    """Pages with what has come and is not taken yet from `start` to `stop`."""

    def __init__(self) -> None:
        self._pages = memoryview(mmap.mmap(-1, TAKEN))
        self.start = self.stop = 0

    def put(self, data: bytes) -> None:
        self._pages[self.stop : self.stop + len(data)] = data
        self.stop += len(data)

    def take(self, size: int) -> memoryview:
        first, self.start = self.start, min(self.start + size, self.stop)
        return self._pages[first : self.start]
