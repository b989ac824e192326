"""How long `status` takes over many replicas, and how large and how quick the page about many VMs is.

    python benchmarks/status.py [replicas]

The replicas are folders as runs leave them: images, state, seven earlier points, a history of five runs with maps of
two disks. `status` runs as a process of its own: the best of three, because other work on the machine only adds to it.
The page of 500 VMs is opened in Chromium where that is installed: it is complete when it is drawn.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import writers

from coriolis_azure.cli import pages
from coriolis_azure.replica import history, sets
from coriolis_azure.replica.history import History

sys.path.insert(0, str(writers.TESTS))
from harness import browser, reports

MIB = 1 << 20
ROUNDS = 3
PAGE = 500


def replica(folder: Path, number: int) -> None:
    """A replica as seven runs have left it."""
    one = reports.a_replica(number)
    folder.mkdir(parents=True)
    point = sets.Point("run", str(one.point), dict.fromkeys(one.disks, "0" * 32))
    record = sets.Record(one.vm, None, point, 7)
    (folder / sets.NAME).write_bytes(record.text())
    (folder / ".vm").write_text(one.vm)
    (folder / ".lock").touch()
    for disk in one.disks:
        with (folder / f"{disk}.raw").open("wb") as image:
            image.truncate(64 << 30)
        for name in ("manifest", "grains"):
            (folder / f"{disk}.raw.{name}").write_bytes(bytes(4096))
    for at, time_of in enumerate(one.points):
        kept = folder / "points" / f"{at + 1:06}-x"
        kept.mkdir(parents=True)
        before = sets.Record(one.vm, None, sets.Point("run", time_of, point.roots), 7)
        (kept / sets.NAME).write_bytes(before.text())
    runs = one.history.runs * 5
    (folder / history.NAME).write_bytes(History(runs, one.history.mapped, one.history.maps).text())


def best(line: list[str]) -> tuple[float, float]:
    """The least wall time and processor time of a command in some rounds."""
    found = []
    for _ in range(ROUNDS):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append((time.monotonic() - began, used))
    return min(wall for wall, _ in found), min(used for _, used in found)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with TemporaryDirectory() as folder:
        place = Path(folder)
        for number in range(count):
            replica(place / "all" / f"vm-{number}", number)
        size = sum(path.stat().st_size for path in (place / "all").glob("*/history.json")) / count
        print(f"{count} replicas, history {size / 1024:.1f} KiB each")
        status = [sys.executable, "-m", "coriolis_azure", "status", str(place / "all")]
        for more in (
            [],
            ["--prometheus", str(place / "m.prom")],
            ["--html", str(place / "p.html")],
            ["--json"],
        ):
            wall, used = best([*status, *more])
            print(f"status {' '.join(more[:1]):12} {wall:5.2f} s, {used:5.2f} s of a processor")
        wall, used = best([*status[:-1], str(place / "all/vm-0")])
        print(f"status of one      {wall:5.2f} s, {used:5.2f} s of a processor")
        page = place / "page.html"
        page.write_text(pages.of_replicas(reports.a_fleet(PAGE), reports.NOW), encoding="utf-8")
        print(f"page of {PAGE} VMs: {page.stat().st_size / MIB:.2f} MiB")
        program = browser.program()
        if program:
            with browser.opened(program) as seen:
                for width in (1280, 360):
                    seen.open(page, width=width)
                    timing = json.loads(
                        seen.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])")
                    )
                    print(f"  {width} px wide: complete after {timing['domComplete'] / 1000:.2f} s")


if __name__ == "__main__":
    main()
