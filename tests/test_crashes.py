"""Dying anywhere in a run leaks nothing, on both fronts: the short form of the crash matrix (see reliability.py)."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.sandbox import Response
from harness.battles import (
    MIB,
    SIGNALS,
    CommandLine,
    Crashes,
    Plugin,
    Site,
    Strike,
    around_shutdown,
    crash,
    measure,
)

pytestmark = pytest.mark.slow

FRONTS = pytest.mark.parametrize("kind", [CommandLine, Plugin], ids=lambda kind: kind.name.replace(" ", "-"))


@FRONTS
def test_dying_anywhere_leaks_nothing(kind: type[CommandLine | Plugin], tmp_path: Path) -> None:
    """A few strikes from all over the run; strangers with similar names and the VM itself are as they were."""
    chance, figures = random.Random(kind.name), Crashes()
    with Site(tmp_path / "site") as site:
        front = kind(site)
        requests, pieces, received = measure(front)
        strikes = [
            Strike("lost", chance.randrange(requests // 2, requests), signal.SIGKILL),
            *(Strike("arrived", chance.randrange(requests // 5, requests), each) for each in SIGNALS),
            Strike("ssh", chance.randrange(pieces), signal.SIGKILL),
            Strike("ssh", chance.randrange(pieces), signal.SIGINT),
            Strike("data", chance.randrange(received // 2), chance.choice(SIGNALS)),
        ]
        for strike in strikes:
            crash(front, strike, figures, chance)
        assert figures.wrong == []
        assert figures.hit >= len(strikes) // 2
        assert front.replicate() == 0
        content = {name: path.read_bytes() for name, path in front.images().items()}
        assert content == site.disks()


@FRONTS
def test_dying_around_a_shutdown_leaves_the_vm_as_its_owner_chose(
    kind: type[CommandLine | Plugin], tmp_path: Path
) -> None:
    """On while Azure had not been told to shut it down, off from then on; never started again by anybody."""
    chance, figures = random.Random(kind.name), Crashes()
    with Site(tmp_path / "site", (MIB // 2,)) as site:
        front = kind(site)
        lost, *_, arrived = (each for each in around_shutdown(front)[:4])
        crash(front, lost, figures, chance, shutdown=True)
        assert site.owner.inspect("web").power_state == "running"
        crash(front, arrived, figures, chance, shutdown=True)
        assert site.owner.inspect("web").power_state == "deallocated"
        assert figures.hit == 2
        assert figures.wrong == []


def test_what_stays_is_named_with_code_7_and_the_next_sweep_finishes(tmp_path: Path) -> None:
    """Somebody has locked the snapshots of a run; later they lift it."""
    with Site(tmp_path / "site", (MIB,)) as site:
        front, intercept = CommandLine(site), site.azure.intercept
        assert intercept is not None
        body = b'{"error": {"code": "ScopeLocked", "message": "Please remove the lock."}}'
        site.azure.intercept = lambda request, answer: (
            Response(409, {"Content-Type": "application/json"}, body)
            if request.method == "DELETE" and "/snapshots/" in request.path
            else intercept(request, answer)
        )
        assert front.replicate() == errors.CleanupIncomplete.exit_code == 7
        told = json.loads((site.folder / "log").read_text().splitlines()[-1])
        assert [names.kind_of(id) for id in told["left_behind"]] == ["snapshot"]
        assert [id.lower() for id in site.left()] == [id.lower() for id in told["left_behind"]]
        assert [id.lower() for id in front.clean()] == [id.lower() for id in told["left_behind"]]
        site.azure.intercept = intercept
        assert front.clean() == []
        assert site.left() == []
