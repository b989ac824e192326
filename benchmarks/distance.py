"""A long line: packets of the kernel's TCP pass through it as they are, so both ends see the distance. Needs root.

    python benchmarks/distance.py SPACE HOST WORKER MBIT MS

Two TUN devices, with the addresses HOST and WORKER; that of the worker is in the network namespace SPACE. A packet
comes out of the other one once a line of so many Mbit/s has carried it, and half of MS later. What would wait for
more than 4 MiB is dropped. Prints a line once both are up, and ends with its standard input.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # see linux/if_tun.h
TUN, NO_PI, VNET_HDR = 0x0001, 0x1000, 0x4000
CHECKSUM, TSO4, TSO6 = 1, 2, 4
MOST = 65536 + 64
QUEUE_BYTES = 4 << 20


def device(name: str) -> int:
    """A TUN device that passes up to 64 KiB of segments at once, as a network card with offloads does."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TUN | NO_PI | VNET_HDR))
    fcntl.ioctl(fd, TUNSETOFFLOAD, CHECKSUM | TSO4 | TSO6)
    return fd


class Way:
    """One direction of the line."""

    def __init__(self, source: int, target: int, rate: float, delay: float) -> None:
        self._source, self._target, self._rate, self._delay = source, target, rate, delay
        self._packets = deque[tuple[float, bytes]]()
        self._free = 0.0  # when the line has carried all that was accepted

    def take(self, now: float) -> None:
        """Accept what has come."""
        while True:
            try:
                packet = os.read(self._source, MOST)
            except BlockingIOError:
                return
            if (self._free - now) * self._rate < QUEUE_BYTES:
                self._free = max(self._free, now) + len(packet) / self._rate
                self._packets.append((self._free + self._delay, packet))

    def give(self, now: float) -> float:
        """Deliver what is due; return the seconds until more is."""
        while self._packets and self._packets[0][0] <= now:
            with suppress(BlockingIOError):  # dropped
                os.write(self._target, self._packets.popleft()[1])
        return max(0.0, self._packets[0][0] - now) if self._packets else 1.0


def main() -> None:
    """Carry packets until standard input ends."""
    space, here, there = sys.argv[1:4]
    mbit, ms = map(float, sys.argv[4:6])
    ours, theirs = device("far-host"), device("far-worker")
    inside = f"ip netns exec {space} "
    for command in (
        f"ip link set far-worker netns {space}",
        f"ip addr add {here}/24 dev far-host",
        "ip link set far-host up",
        f"{inside}ip addr add {there}/24 dev far-worker",
        f"{inside}ip link set far-worker up",
        f"{inside}ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)
    ways = [Way(ours, theirs, mbit * 125_000, ms / 2000), Way(theirs, ours, mbit * 125_000, ms / 2000)]
    print("up", flush=True)
    wait = 1.0
    while sys.stdin not in (readable := select.select([ours, theirs, sys.stdin], [], [], wait)[0]):
        now = time.monotonic()
        for way, source in zip(ways, (ours, theirs), strict=True):
            if source in readable:
                way.take(now)
        wait = min(way.give(time.monotonic()) for way in ways)


if __name__ == "__main__":
    main()
