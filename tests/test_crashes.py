"""Dying anywhere in a run leaks nothing, on both fronts: the short form of the crash matrix (see reliability.py)."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from battles import CommandLine, Crashes, Plugin, Site, Strike, crash, measure

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("kind", [CommandLine, Plugin], ids=lambda kind: kind.name.replace(" ", "-"))
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
