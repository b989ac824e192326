"""One run of `Source.replicate` in a process of its own, so that its peak of memory is its own.

    python replicating.py '{"azure": FOLDER, "to": FOLDER, "environment": {...}}'

Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from peak import peak_kib

from coriolis_azure import Source

MIB = 1 << 20


def main(task: dict[str, Any]) -> None:
    """Replicate the VM `web`, and print what it took."""
    azure = Path(task["azure"])
    connection, environment = (
        json.loads((azure / f"{name}.json").read_text()) for name in ("connection", "environment")
    )
    begun = time.perf_counter()
    with Source(connection, {**environment, **task["environment"]}) as source:
        disks = source.replicate("web", Path(task["to"])).disks
    seconds = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "seconds": seconds,
                "host_mib": peak_kib() >> 10,
                "read_mib": sum(disk.read_bytes for disk in disks) / MIB,
                "sent_mib": sum(disk.sent_bytes for disk in disks) / MIB,
                "relied_mib": sum(disk.relied_bytes for disk in disks) / MIB,
                "checked_mib": sum(disk.checked_bytes for disk in disks) / MIB,
                "tiers": [f"{disk.tier} {disk.reason}".strip() for disk in disks],
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
