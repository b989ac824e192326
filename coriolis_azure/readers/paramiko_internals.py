"""All uses of paramiko's undocumented internals.

pyproject.toml limits paramiko to versions that have them: below the next major one, with the lowest and the newest
tested. `test_paramiko_internals.py` checks that the installed paramiko still has and uses each of them.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import Any

import paramiko
from paramiko.buffered_pipe import PipeTimeout
from paramiko.ssh_exception import SSHException

from ..threads import Condition

TAKEN = 256 << 10  # most bytes taken from a channel at a time: larger than any packet
_LONGEST_PACKET = 256 << 10  # what OpenSSH accepts
_LONGEST_GREETING = 64 << 10  # bytes before the first packet: lines of text, the last one names the version


def receive_into_blocks(channel: paramiko.Channel, window: int) -> None:
    """Make a channel that was just opened with this window hold its input in Arrived."""
    channel.in_buffer = Arrived(window)  # type: ignore[assignment]
    channel.in_stderr_buffer = Arrived(window)  # type: ignore[assignment]


def refuse_what_is_too_large(transport: paramiko.Transport) -> None:
    """Make the connection fail if the other side announces a packet, or begins with a text, that nobody can mean.

    Both are read before its host key is known, and paramiko would keep up to 4 GiB of them.
    """
    packetizer: Any = transport.packetizer
    read_all, read_some = packetizer.read_all, packetizer._read_timeout
    greeting = 0

    def bounded(size: int, **options: bool) -> bytes:
        if size > _LONGEST_PACKET:
            raise SSHException(f"the server announced a packet of {size} bytes")
        return bytes(read_all(size, **options))

    def counted(timeout: float) -> bytes:
        nonlocal greeting
        part = bytes(read_some(timeout))
        greeting += len(part)
        if greeting > _LONGEST_GREETING:
            raise SSHException(f"the server began with a text of more than {_LONGEST_GREETING} bytes")
        return part

    packetizer.read_all = bounded
    packetizer._read_timeout = counted


def agree_on_new_keys_after(transport: paramiko.Transport, amount: int) -> None:
    """Renegotiate the connection's keys after `amount` bytes in one direction."""
    transport.packetizer.REKEY_BYTES = amount


def wait_for_status(channel: paramiko.Channel, seconds: float) -> bool:
    """Wait for the program's exit status or the channel's end; False if neither comes within `seconds`."""
    return channel.status_event.wait(seconds)


def usual_window(transport: paramiko.Transport) -> int:
    """paramiko's default window: the most bytes that may be in flight to a channel."""
    return transport.default_window_size


class Arrived:
    """The input buffer of a paramiko.Channel: what has arrived and was not read yet.

    paramiko's own buffer is one array that grows with each packet and is moved by each read; with the pages it keeps
    allocating and freeing, that costs more than decrypting the input. This one stores packets in reusable blocks.
    """

    def __init__(self, window: int) -> None:
        self._blocks: deque[_Block] = deque()  # oldest first; new packets go into the last one
        self._free: list[_Block] = []
        self._window, self._held = window, 0
        self._closed = False
        self._changed = Condition()

    def feed(self, data: bytes) -> None:
        """Append a packet. SSHException if it exceeds the window."""
        with self._changed:
            if len(data) > min(self._window - self._held, TAKEN):
                raise SSHException("the server sent more than its window allows")
            self._held += len(data)
            if data:
                if not self._blocks or self._blocks[-1].stop + len(data) > TAKEN:
                    self._blocks.append(self._free.pop() if self._free else _Block())
                self._blocks[-1].put(data)
                self._changed.notify()

    def read(self, size: int, timeout: float | None = None) -> memoryview | bytes:
        """The oldest input, at most `size` bytes, valid until the next call; b"" at the end.

        PipeTimeout if nothing arrives within `timeout` seconds.
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
        """Whether unread input is available."""
        return self._held > 0

    def close(self) -> None:
        """No more input will arrive."""
        with self._changed:
            self._closed = True
            self._free.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        return self._held

    def _give_back(self, block: _Block) -> None:
        if not self._closed:  # a channel, and with it this buffer, may be referenced long after its end
            block.start = block.stop = 0
            self._free.append(block)


class _Block:
    """Pages of input; the unread part is from `start` to `stop`."""

    def __init__(self) -> None:
        self._pages = memoryview(mmap.mmap(-1, TAKEN))
        self.start = self.stop = 0

    def put(self, data: bytes) -> None:
        self._pages[self.stop : self.stop + len(data)] = data
        self.stop += len(data)

    def take(self, size: int) -> memoryview:
        first, self.start = self.start, min(self.start + size, self.stop)
        return self._pages[first : self.start]
