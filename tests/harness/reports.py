"""Reports, maps and replicas to make pages of: as runs on Azure leave them, without the hours that these take."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime, timedelta, timezone

from coriolis_azure.change_map import ChangeMap, Kind, Tally
from coriolis_azure.clock import rfc3339
from coriolis_azure.replica.history import History, Verified
from coriolis_azure.replica.survey import Surveyed
from coriolis_azure.timeline import DiskFigures, Rates, RunReport, StepTaken

GIB = 1 << 30
NOW = datetime(2026, 11, 29, 12, tzinfo=timezone.utc)


def a_map(size: int, seed: int, chunk: int = 1 << 20) -> ChangeMap:
    """A disk that is a third full, with what a day changes."""
    rng, tally, at = random.Random(seed), Tally(size, chunk), 0
    count = -(-size // chunk)
    longest = max(1, count // 90)
    while at < count:
        filled = at < count * 0.45
        kinds: tuple[Kind, ...] = ("relied", "changed", "same", "checked", "zero")
        (kind,) = rng.choices(kinds, (12, 3, 3, 2, 3) if filled else (1, 0.3, 0, 0, 12))
        run = min(count - at, rng.randint(1, longest if kind != "changed" else max(1, longest // 6)))
        tally.add(kind, at, run)
        at += run
    return tally.map()


def a_report(vm: str = "web-1", *, hours: float = 2.0, seed: int = 1, failed: bool = False) -> RunReport:
    """An incremental run by a worker, of two disks."""
    rng = random.Random(seed)
    sizes = {"os": 128 * GIB, "data-0": 1024 * GIB}
    steps = (
        StepTaken("inspect", vm, "", 0.0, 1.2),
        StepTaken(
            "boot worker", "Standard_D4s_v5, Ubuntu 24.04", "", 1.2, 74.0, (("the VM to be made", 52.0),)
        ),
        StepTaken(
            "snapshot", "os, data-0", "", 74.0, 96.0, (("the snapshots of os, data-0 to complete", 18.0),)
        ),
        StepTaken("clone", "os, data-0", "", 96.0, 121.0, (("the disks", 20.0),)),
        StepTaken(
            "attach", f"coriolis-{seed:08x}-worker", "", 121.0, 149.0, (("the disks on the worker", 21.0),)
        ),
        StepTaken("copy", "os, data-0", "", 149.0, 731.0),
        StepTaken("verify", "os", "os", 402.0, 431.0),
        StepTaken("verify", "data-0", "data-0", 690.0, 729.0),
        StepTaken("clean up", f"{seed:08x}", "", 731.0, 792.0, (("the deletion of the worker", 44.0),)),
    )
    letters = "s" * 28 + "d" * 6 + "s" * 10 + "l" * 7 + "-" * 7
    done = [int(rng.uniform(0.6, 1.0) * 3.2 * GIB) for _ in letters]
    sent = [int(each * rng.choice((0.01, 0.02, 0.05, 0.4))) for each in done]
    maps = {name: a_map(size, seed + at) for at, (name, size) in enumerate(sizes.items())}
    disks = tuple(
        DiskFigures(
            name, size, size, maps[name].totals["changed"] // 3, size // 9, maps[name].totals["zero"], size // 2,
            maps[name].totals["relied"], maps[name].totals["checked"], full=False, verified=True, mechanism="hybrid",
            tier="changed", reason="",
        )
        for name, size in sizes.items()
    )  # fmt: skip
    report = RunReport(
        vm,
        rfc3339(NOW - timedelta(hours=hours)),
        792.0,
        "done",
        mechanism="hybrid",
        point=rfc3339(NOW - timedelta(hours=hours, seconds=-75)),
        steps=steps,
        disks=disks,
        rates=Rates(149.0, 10.0, tuple(done), tuple(sent), letters),
        notices=("the size Standard_D2s_v5 has no capacity here; Standard_D4s_v5 is used instead",),
        maps=maps,
    )
    if not failed:
        return report
    return replace(
        report,
        outcome="failed",
        error="the connection to the worker broke and could not be restored",
        remedy="Check the network between this host and the worker, then run again: what had arrived is kept, only "
        "the rest is sent.",
        point="",
        seconds=410.0,
        steps=tuple(replace(step, end=min(step.end, 410.0)) for step in steps if step.begin < 405),
        disks=tuple(
            DiskFigures(disk.name, disk.size_bytes, disk.size_bytes // 3, disk.sent_bytes // 3)
            for disk in disks
        ),
        maps={},
        left_behind=(
            "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/production/providers/"
            "Microsoft.Compute/disks/coriolis-1a2b3c4d-clone-data-0",
        ),
    )


def a_replica(number: int, *, state: str = "good", name: str = "") -> Surveyed:
    """A replica in one of the states."""
    vm = name or f"{('web', 'db', 'mail', 'build', 'files')[number % 5]}-{number + 1}"
    hours = 0.5 + (number * 7 % 50)
    report = a_report(vm, hours=hours, seed=number)
    history = History().after(report)
    if state == "unfinished":
        history = history.after(a_report(vm, hours=0.6, seed=number, failed=True))
    points = tuple(rfc3339(NOW - timedelta(days=day, hours=hours)) for day in range(7, 0, -1))
    good = Surveyed(
        vm,
        f"/srv/replicas/{vm}",
        f"/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/production/providers/"
        f"Microsoft.Compute/virtualMachines/{vm}",
        report.point,
        points,
        ("data-0", "os"),
        size_bytes=1152 * GIB,
        stored_bytes=412 * GIB,
        verified=Verified(report.point, rfc3339(NOW - timedelta(hours=hours - 0.4))) if number % 3 else None,
        history=history,
    )
    match state:
        case "running":
            return replace(good, running=True)
        case "unfinished":
            return replace(good, unfinished=rfc3339(NOW - timedelta(hours=0.6)), drafts=("data-0",))
        case "incomplete":
            return replace(good, point=None, points=(), disks=(), unfinished=rfc3339(NOW), history=History())
        case "damaged":
            return Surveyed(
                vm,
                f"/srv/replicas/{vm}",
                error="the record of the replica is damaged",
                remedy="Replicate to it again: the images are used, and a new record is written.",
            )
    return good


def a_fleet(count: int) -> list[Surveyed]:
    """Replicas in all states, most of them good."""
    states = {3: "damaged", 7: "unfinished", 11: "running", 5: "incomplete"}
    return [a_replica(number, state=states.get(number % 40, "good")) for number in range(count)]
