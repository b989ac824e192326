"""The long form of the reliability tests: `tox -e reliability`. Its figures go into docs/explanation/reliability.md.

    python tests/reliability.py [--only SECTION]... [--share N] [--rounds N] [--minutes N]

`--share N` takes every N-th strike of the crash matrix, `--rounds N` that many rounds of each fault of the replica
matrix; after `--minutes` a section begins nothing more, and its figures say how far it came. Figures of a share, or of
fewer rounds than there are otherwise, are printed, and the page keeps those of the whole. Sections may run side by
side, each in a process of its own. Ends with 1 when anything was wrong; what it was is printed.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from harness.battles import CommandLine, Crashes, Plugin, Site, Strike, around_shutdown, crash, measure
from harness.episodes import FRONTS, Figures, episode, opened, possible

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "reliability.md"
ROUNDS = 3
Table = list[list[object]]


class Asked(argparse.Namespace):
    """What is to be done: see above. `until`: when a section begins nothing more, by the monotonic clock."""

    only: list[str] | None
    share: int
    rounds: int
    minutes: float
    until: float


def crashes(kind: type[CommandLine | Plugin], asked: Asked, folder: Path) -> tuple[Table, list[str]]:
    """Strikes at every ARM request, every piece of SSH and random bytes of the data of a run on one front."""
    chance, figures, tried = random.Random(kind.name), Crashes(), Counter[str]()
    with Site(folder / "site") as site:
        front = kind(site)
        requests, pieces, received = measure(front)
        strikes = [
            *(Strike("lost", at, signal.SIGKILL) for at in range(requests)),
            *(Strike("arrived", at, signal.SIGKILL) for at in range(requests)),
            *(Strike("arrived", at, (signal.SIGINT, signal.SIGTERM)[at % 2]) for at in range(requests)),
            *(Strike("ssh", at, signal.SIGKILL) for at in range(1, pieces)),
            *(Strike("ssh", at, (signal.SIGINT, signal.SIGTERM)[at % 2]) for at in range(1, pieces, 3)),
        ]
        for end in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            strikes += [Strike("data", chance.randrange(received // 2), end) for _ in range(20)]
        # What its owner has made of the VM before, and whether they want it to be shut down for the run.
        planned = [
            *((strike, "running", False) for strike in strikes),
            *((strike, "running", True) for strike in around_shutdown(front)),
            *((strike, power, False) for power in ("stopped", "deallocated") for strike in strikes[::40]),
            *((strike, "deallocated", True) for strike in strikes[::40]),
        ]
        # Strikes of all kinds from the beginning: what is broken shows early, and a part is a sample.
        chance.shuffle(planned)
        chosen = planned[:: asked.share]
        for number, (strike, power, shutdown) in enumerate(chosen):
            if time.monotonic() > asked.until:
                break
            crash(front, strike, figures, chance, power, shutdown)
            tried[strike.where if strike.where in ("ssh", "data") else "arm"] += 1
            tried["shutdown"] += shutdown
            tried["stopped"] += power != "running"
            say(f"{kind.name}: {number + 1} of {len(chosen)}, {len(figures.wrong)} wrong")
    return [
        [f"{kind.name}", "seen"],
        ["strikes", f"{figures.strikes} of {len(planned)}"],
        ["at requests, at SSH, at data", ", ".join(str(tried[where]) for where in ("arm", "ssh", "data"))],
        ["the VM was to be shut down, was stopped before", f"{tried['shutdown']}, {tried['stopped']}"],
        ["hit a living run", figures.hit],
        ["left something until the clean-up", figures.cleaned],
        ["leaks, strangers touched", figures.leaks],
        ["power state of the VM changed", figures.power_changed],
        ["manifests ahead", figures.manifests_ahead],
        ["wrong in all", len(figures.wrong)],
    ], figures.wrong


def replicas(asked: Asked, folder: Path) -> tuple[Table, list[str]]:
    """All faults on all destinations."""
    table: Table = [["destination", "runs", "faults", "runs that ended by them", "images compared", "wrong"]]
    wrong: list[str] = []
    changes: dict[str, int] = {}
    for done, (name, kind) in enumerate(FRONTS.items()):
        figures, chance = Figures(), random.Random(name)
        now = time.monotonic()
        until = now + (asked.until - now) / (len(FRONTS) - done)  # each destination has its part of the time
        try:
            with opened(kind, folder / name.replace(" ", "-")) as front:
                for number in range(asked.rounds):
                    if number and time.monotonic() > until:
                        break
                    faults = possible(front)
                    chance.shuffle(faults)
                    episode(front, faults, figures, chance)
                    say(f"{name}: round {number + 1} of {asked.rounds}, {len(figures.wrong)} wrong")
        except OSError as error:
            if name != "block device":
                raise
            table.append([name, f"not possible here: {error}", "", "", "", ""])
            continue
        wrong += figures.wrong
        for change, count in figures.changes.items():
            changes[change] = changes.get(change, 0) + count
        faults_told = ", ".join(f"{fault} {count}" for fault, count in sorted(figures.faults.items()))
        faults_told += "; " + ", ".join(f"{way} {count}" for way, count in sorted(figures.ways.items()))
        table.append(
            [name, figures.runs, faults_told, figures.ended_by_fault, figures.images, len(figures.wrong)]
        )
    changes_told = ", ".join(f"{change} {count}" for change, count in sorted(changes.items()))
    table.append(["what happened to disks", changes_told, "", "", "", ""])
    return table, wrong


def load(runs: tuple[str, ...], asked: Asked, folder: Path) -> tuple[Table, list[str]]:
    """What is large: see loads.py. Each in a process of its own, whose peak is its own."""
    del asked
    table: Table = [["load", "seen"]]
    wrong = []
    for name in runs:
        program = Path(__file__).with_name("loads.py")
        command = [sys.executable, str(program), name, str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        say(f"{name}: {done.stdout.strip() or done.stderr[-500:]}")
        if done.returncode:
            wrong.append(f"{name}: {done.stdout[-500:]}{done.stderr[-2000:]}")
        table += [list[object](line.split(": ", 1)) for line in done.stdout.strip().splitlines()]
    return table, wrong


SECTIONS: dict[str, Callable[[Asked, Path], tuple[Table, list[str]]]] = {
    "crashes-command-line": partial(crashes, CommandLine),
    "crashes-plugin": partial(crashes, Plugin),
    "replicas": replicas,
    "load-sparse": partial(load, ("sparse", "sparse")),  # once more is the incremental run
    "load-extents": partial(load, ("extents",)),
    "load-fleet": partial(load, ("fleet",)),
}


def say(text: str) -> None:
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {text}", flush=True)


def told(table: Table, seconds: float) -> str:
    """A section's figures, as the page has them."""
    head, *rows = [["" if cell is None else str(cell) for cell in row] for row in table]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    moment = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    took = f"{seconds / 60:.0f} minutes" if seconds > 100 else f"{seconds:.0f} seconds"
    return "\n".join([*lines, "", f"Run on {moment}, {took}.", ""])


def written(section: str, text: str) -> None:
    """Put a section's figures into the page, between its marks."""
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
    page = PAGE.read_text()
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + text + end + rest.partition(end)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=24 * 60)
    asked = parser.parse_args(namespace=Asked())
    wrong = []
    for name in asked.only or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
            began = time.monotonic()
            asked.until = began + 60 * asked.minutes
            table, found = SECTIONS[name](asked, Path(folder))
            text = told(table, time.monotonic() - began)
            say(f"{name}:\n{text}")
            if asked.share == 1 and asked.rounds >= ROUNDS:
                written(name, text)
            wrong += found
    for each in wrong:
        print(f"WRONG {each}\n", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
