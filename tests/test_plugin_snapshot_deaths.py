"""Executions that read snapshots and die anywhere: the next one is right, and leaves one baseline per disk."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.battles import served
from harness.conductor import TIMES, Task
from harness.snapshot_transfers import Place, Transfer
from harness.writer_targets import HttpsTarget

pytestmark = pytest.mark.slow

STRIKES = int(os.environ.get("STRIKES", "3"))  # a long run: STRIKES=1000, which is every request


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, seconds in TIMES:
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def place(azure: Sandbox, tmp_path: Path) -> Iterator[Place]:
    with served(azure) as connection:
        yield Place(azure, connection, tmp_path)
        azure.intercept = None


class Strike:
    """A signal to a task at its request number `at`, before or after Azure acts. Without a task, it only counts."""

    def __init__(
        self, place: Place, at: int = -1, number: int = signal.SIGKILL, *, after: bool = False
    ) -> None:
        self.count = 0
        self.task: Task | None = None
        self._at, self._number, self._after = at, number, after
        place.azure.intercept = self._intercept

    def _intercept(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        self.count += 1
        due = self.count - 1 == self._at and self.task is not None
        if due and not self._after:
            self._hit()
            if self._number == signal.SIGKILL:
                raise ConnectionResetError
        response = answer(request)
        if due and self._after:
            self._hit()
        return response

    def _hit(self) -> None:
        assert self.task is not None
        self.task.signal(self._number)


def connect(place: Place) -> Source:
    """What sees what is in Azure."""
    return Source(place.connection, place.azure.environment())


def struck(place: Place, method: str, arguments: tuple[Any, ...], strike: Strike) -> dict[str, Any]:
    """What becomes of a task that is struck."""
    with Task(method, place.connection, *arguments) as task:
        strike.task = task
        result = task.result()
    place.azure.intercept = None
    return result


def requests_of(place: Place, transfer: Transfer) -> int:
    """How many requests an execution's copying makes. It is a good one."""
    resources, reached = transfer.begin()
    counting = Strike(place)
    transfer.entries, _ = place.call("replicate_disks", *transfer.copying(resources, reached))
    place.azure.intercept = None
    transfer.end(resources)
    return counting.count


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_copying_that_is_killed_at_any_request(place: Place, first: bool) -> None:
    """The last request is always among them: of a first execution, nobody knows the baselines then."""
    measured = Transfer(place, "measured")
    for _ in range(1 if first else 3):
        total = requests_of(place, measured)
    chance = random.Random(first)
    moments = [(at, after) for at in range(total) for after in (False, True)]
    chosen = [*chance.sample(moments, min(STRIKES, len(moments))), (total - 1, True)]
    measured.give_up()
    transfer = Transfer(place)
    if not first:
        transfer.execute()
        transfer.execute()
    for number, (at, after) in enumerate(chosen):
        if first:
            transfer = Transfer(place, f"volumes-{number}")
        place.write(0, number % 16, number)
        resources, reached = transfer.begin()
        strike = Strike(place, at, after=after)
        result = struck(place, "replicate_disks", transfer.copying(resources, reached), strike)
        assert "returned" not in result or strike.count <= at, result
        transfer.end(resources)
        place.write(1, number % 16, number)
        transfer.execute()
        assert place.left() == transfer.baselines(), (at, after)
        if first:
            transfer.give_up()


def test_a_baseline_that_a_killed_copying_was_reading_is_closed_by_the_orchestrators_clean_up(
    place: Place,
) -> None:
    transfer = Transfer(place)
    transfer.execute()
    old = transfer.baselines()

    class Opened(Strike):
        """Once a baseline can be read."""

        def _intercept(self, request: Request, answer: Callable[[Request], Response]) -> Response:
            response = answer(request)
            is_read = request.method == "POST" and request.path.lower().startswith(tuple(old))
            if is_read and self.task is not None and not self.count:
                self.count += 1
                self._hit()
            return response

    def exposed() -> list[str]:
        with connect(place) as source:
            snapshots = source.azure.resources("snapshot", source.environment.resource_group)
        closed = {"networkAccessPolicy": "DenyAll", "diskState": "Unattached"}
        return [each["id"] for each in snapshots if not closed.items() <= each["properties"].items()]

    resources, reached = transfer.begin()
    struck(place, "replicate_disks", transfer.copying(resources, reached), Opened(place))
    assert {id.lower() for id in exposed()} & set(old)
    transfer.end(resources)
    assert exposed() == []
    assert place.left() == old
    transfer.execute()


def test_a_cancelled_copying_undoes_itself(place: Place) -> None:
    transfer = Transfer(place)
    transfer.execute()
    transfer.execute()
    total = requests_of(place, transfer)  # of one that reads what changed, as those that are cancelled
    for at in random.Random(1).sample(range(total // 4, total * 3 // 4), min(STRIKES, 2)):
        place.write(0, at % 16)
        resources, reached = transfer.begin()
        strike = Strike(place, at, signal.SIGINT)
        result = struck(place, "replicate_disks", transfer.copying(resources, reached), strike)
        assert "returned" not in result
        named = place.left()
        transfer.end(resources)
        assert place.left() == named  # nothing was left to do
        transfer.execute()
        assert place.left() == transfer.baselines()


def test_what_a_killed_clean_up_leaves_goes_with_the_next_execution(place: Place) -> None:
    """The orchestrator does not ask a second time."""
    transfer = Transfer(place)
    transfer.execute()
    resources, reached = transfer.begin()

    class Taken(Strike):
        """At the first page of a snapshot that is read."""

        def _intercept(self, request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.header("x-ms-range") and self.task is not None and not self.count:
                self.count += 1
                self._hit()
            return answer(request)

    struck(place, "replicate_disks", transfer.copying(resources, reached), Taken(place))
    assert len(place.left()) == 4

    class Deleting(Strike):
        """At the first deletion."""

        def _intercept(self, request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.method == "DELETE" and self.task is not None and not self.count:
                self.count += 1
                self._hit()
                raise ConnectionResetError
            return answer(request)

    clean_up = (transfer.environment, resources)
    struck(place, "delete_replica_source_resources", clean_up, Deleting(place))
    assert len(place.left()) > 2
    transfer.execute()
    assert place.left() == transfer.baselines()


def test_a_volume_behind_a_writer_is_right_after_a_death_in_the_middle(
    azure: Sandbox, tmp_path: Path
) -> None:
    target = HttpsTarget(tmp_path / "receiver")
    try:
        with served(azure) as connection:
            place = Place(azure, connection, tmp_path, target.info)
            transfer = Transfer(place)
            transfer.execute()
            total = requests_of(place, transfer)
            for at in (total - 1, total // 2):
                place.write(0, at % 16)
                resources, reached = transfer.begin()
                strike = Strike(place, at, after=True)
                struck(place, "replicate_disks", transfer.copying(resources, reached), strike)
                transfer.end(resources)
                target.holder.clear()  # the orchestrator starts its writers anew for each execution
                transfer.execute()
                assert place.left() == transfer.baselines()
    finally:
        azure.intercept = None
        target.close()
