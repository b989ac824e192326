"""Snapshots that Azure fills in the background are waited for as long as they move."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.clock import Clock
from coriolis_azure.events import Event, Report, Waiting
from coriolis_azure.machine import cloning
from coriolis_azure.model import Json
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.constants import MIB

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Held()


def filled(azure: Sandbox, percent: Callable[[], float]) -> None:
    """What snapshots say of their background copy."""

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "GET" and "/snapshots/" in request.path and response.status == 200:
            document = json.loads(response.body)
            document["properties"]["completionPercent"] = percent()
            return replace(response, body=json.dumps(document).encode())
        return response

    azure.intercept = look


def snapshots(source: Source, report: Report, clock: Clock) -> dict[str, Json]:
    machine = source.inspect("web")
    run = source.new_run(machine)
    return cloning.snapshot_all(source.resources(run, Journal(run)), machine.disks[1:], report, clock)


def test_a_background_copy_may_take_a_day(
    azure: Sandbox, source: Source, image: Callable[..., Path], clock: Held, told: list[Event]
) -> None:
    azure.add_vm("web", image("os"), [image("data", MIB)], VmSpec(data_sku="PremiumV2_LRS"))
    begun, clock.pace = clock.moment, 10  # asked less often, so that the day is over sooner
    filled(azure, lambda: min(100.0, (clock.moment - begun) / (24 * HOUR) * 100))
    made = snapshots(source, told.append, clock)
    assert clock.moment - begun >= 24 * HOUR
    assert set(made) == {"data-0"}
    waits = [event for event in told if isinstance(event, Waiting)]
    assert len(waits) > 20
    assert all("the background copy of the snapshot of data-0" in wait.what for wait in waits)
    middle = min(waits, key=lambda wait: abs(wait.waited - 12 * HOUR))
    assert middle.seconds == pytest.approx(24 * HOUR, rel=0.05)
    assert middle.waited == pytest.approx(12 * HOUR, rel=0.05)
    assert middle.percent == pytest.approx(50, rel=0.05)


@pytest.mark.slow
def test_a_background_copy_that_stands_still_is_given_up_and_leaves_nothing(
    azure: Sandbox, source: Source, image: Callable[..., Path], clock: Held, told: list[Event]
) -> None:
    azure.add_vm("web", image("os"), [image("data", MIB)], VmSpec(data_sku="PremiumV2_LRS"))
    before = azure.resources()
    filled(azure, lambda: 40.0)
    with pytest.raises(errors.DeadlinePassed, match="has been at 40 % for 6 hours"):
        snapshots(source, told.append, clock)
    assert azure.resources() == before
