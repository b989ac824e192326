"""Azure's lists of one disk, in a process of its own, so that its peak of memory is its own.

    python listing.py FOLDER

Takes two snapshots of the only disk of the VM `web`, has their pages and the differences between them listed, as a
later run does, and deletes them. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from peak import peak_kib

from coriolis_azure import Source
from coriolis_azure.machine import cloning, exports
from coriolis_azure.mechanisms import change_lists
from coriolis_azure.run.journal import Journal


def main(azure: Path) -> None:
    """List, and print what it took."""
    connection, environment = (
        json.loads((azure / f"{name}.json").read_text()) for name in ("connection", "environment")
    )
    with Source(connection, environment) as source:
        context, machine = source.context, source.inspect("web")
        (disk,) = machine.disks
        runs = [source.new_run(machine) for _ in range(2)]
        try:
            older, newer = (
                cloning.snapshot_all(
                    source.resources(run, Journal(run)),
                    [disk],
                    context.report,
                    context.clock,
                    exported=lambda _: "yes",
                )
                for run in runs
            )
            begun = time.perf_counter()
            with (
                exports.opened(context, [disk], older) as before,
                exports.opened(context, [disk], newer) as now,
            ):
                allocated = now[disk.name].pages()
                _, changed = change_lists.fetch(before[disk.name], now[disk.name], allocated)
            seconds = time.perf_counter() - begun
        finally:
            for run in runs:
                source.finish(run)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "host_mib": peak_kib() >> 10,
                "ranges": sum(1 for _ in allocated),
                "changed_mib": changed / (1 << 20),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
