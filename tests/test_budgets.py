"""Azure's budgets of requests, and its hold on the NICs of a VM that failed: kept by the sandbox, on a held clock.

What is waited for passes at once, and the sandbox's time passes with it: all figures are Azure's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.replica import places
from coriolis_azure.run import resources
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.constants import GROUP
from harness.late_answers import Later

pytestmark = pytest.mark.slow

KIB = 1 << 10
Image = Callable[..., Path]


@pytest.fixture
def clock() -> Later:
    return Later()


def vm_id(source: Source, name: str = "web") -> str:
    return names.resource_id(source.azure.subscription, GROUP, "vm", name)


def throttled(azure: Sandbox) -> list[tuple[str, dict[str, str], Any]]:
    """From now on: path, headers and body of each 429."""
    seen: list[tuple[str, dict[str, str], Any]] = []

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if response.status == 429:
            seen.append((request.path, response.headers, json.loads(response.body)))
        return response

    azure.intercept = look
    return seen


@pytest.mark.parametrize(
    ("ask", "name", "capacity", "refill"),
    [
        (lambda source, vm: source.azure.get(vm), "LowCostGetResource", 36, 12),
        (lambda source, vm: source.azure.tag(vm, {"a": "b"}), "UpdateVMResource", 12, 4),
        (lambda source, vm: source.azure.deallocate(vm), "DeleteVMResource", 12, 4),
    ],
    ids=["read", "update", "deallocate"],
)
def test_a_vm_takes_so_many_requests_in_a_row_and_so_many_a_minute(
    azure: Sandbox,
    source: Source,
    image: Image,
    clock: Later,
    ask: Callable[[Source, str], object],
    name: str,
    capacity: int,
    refill: int,
) -> None:
    azure.add_vm("web", image("os"))
    azure.add_vm("other", image("os"))
    source.azure.groups()
    refused, held = throttled(azure), azure.budgets
    for left in range(capacity - 1, -1, -1):
        clock.moment = 0  # whatever the SDK waits for operations meanwhile
        ask(source, vm_id(source))
        assert held.left(vm_id(source))[name] == left
    assert refused == []
    clock.moment = 20
    ask(source, vm_id(source))
    # It asked once too early, was told for how long, and waited exactly that long.
    ((path, headers, body),) = refused
    assert path == vm_id(source) or path.startswith(f"{vm_id(source)}/")
    assert headers["Retry-After"] == "40"
    assert headers["x-ms-ratelimit-remaining-resource"] == f"Microsoft.Compute/{name};0"
    assert (body["code"], body["details"][0]["code"]) == ("OperationNotAllowed", "TooManyRequests")
    assert body["details"][0]["target"] == name
    assert held.left(vm_id(source))[name] == refill - 1
    ask(source, vm_id(source, "other"))
    assert held.left(vm_id(source, "other"))[name] == capacity - 1


def test_who_asks_again_too_early_waits_anew(
    azure: Sandbox, source: Source, image: Image, clock: Later
) -> None:
    azure.add_vm("web", image("os"))
    token = source.azure.credential.get_token("https://management.azure.com/.default").token
    url = f"https://x.invalid{vm_id(source)}?api-version=2024-07-01"

    def ask() -> Response:
        return azure.handle(Request("GET", url, {"Authorization": f"Bearer {token}"}))

    assert [ask().status for _ in range(36)] == [200] * 36
    clock.moment = 50
    assert ask().headers["Retry-After"] == "10"
    clock.moment = 55
    assert ask().headers["Retry-After"] == "60"
    clock.moment = 114
    assert (ask().status, ask().headers["Retry-After"]) == (429, "60")
    clock.moment = 174
    assert ask().status == 200


class Still(Later):
    """A clock that stands still: no bucket is ever filled up."""

    def sleep(self, seconds: float) -> None:
        del seconds


def in_rounds(count: int, azure: Sandbox, connect: Callable[..., Source], image: Image) -> Source:
    """A machine whose disks are copied in that many rounds, as the smallest worker holds four."""
    azure.add_vm(
        "web", image("os"), [image("data", 64 * KIB)] * (4 * count - 1), VmSpec(size="Standard_D8s_v5")
    )
    return connect({"export_worker_size": "Standard_D2s_v5"})


@pytest.mark.parametrize("clock", [Still()], ids=["no time passes"])
def test_a_job_in_many_rounds_needs_less_than_what_azure_grants_at_once(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    source, refused = in_rounds(4, azure, connect, image), throttled(azure)
    assert source.check("web").ok
    assert source.replicate("web", tmp_path / "images", shutdown=True).left_behind == ()
    assert refused == []
    changes = Counter(path for method, path in azure.requests if method == "PATCH" and "coriolis" in path)
    assert list(changes.values()) == [7], (
        "each round but the last attaches and detaches all of its disks at once"
    )
    (worker,) = changes
    assert azure.budgets.left(worker)["UpdateVMResource"] == 5
    assert azure.budgets.left(vm_id(source))["LowCostGetResource"] >= 30


def test_operations_that_last_are_asked_about_as_often_as_azure_takes(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path, clock: Later
) -> None:
    """Each takes minutes: at our pace, twelve a minute, the budget for asking lasts."""
    source, refused = in_rounds(2, azure, connect, image), throttled(azure)
    azure.faults.add("slow-operation", path="/virtualMachines/", times=0, polls=30)
    assert source.replicate("web", tmp_path / "images", shutdown=True).left_behind == ()
    assert refused == []
    assert clock.moment > 6 * 140


def test_the_nic_of_a_vm_that_failed_is_kept_for_it_and_waited_for(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, clock: Later
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    azure.faults.add("no-allocation", path="/virtualMachines/coriolis", times=0)
    refused: list[float] = []

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if response.status == 400 and request.method == "DELETE":
            assert json.loads(response.body)["error"]["code"] == "NicReservedForAnotherVm"
            assert "/virtualMachines/coriolis-" in json.loads(response.body)["error"]["message"]
            refused.append(clock.moment)
        return response

    azure.intercept = look
    with pytest.raises(errors.QuotaExceeded, match="AllocationFailed"):
        source.replicate("web", tmp_path / "images")
    assert azure.resources() == before
    assert 150 < refused[-1] - refused[0] < 180
    assert clock.moment - refused[0] < resources.PATIENCE_SECONDS


def test_a_nic_that_is_kept_serves_the_vm_that_it_is_kept_for(
    azure: Sandbox, source: Source, image: Image
) -> None:
    """So the next size can be tried with it at once; after that it is kept no longer."""
    azure.add_vm("web", image("os"))
    azure.faults.add("no-allocation", path="/virtualMachines/coriolis", times=2)
    before = source.context.clock.monotonic()
    run, _ = source.prepare("web")
    assert source.finish(run) == []
    assert source.context.clock.monotonic() - before < 180


@pytest.mark.parametrize("clock", [Still()], ids=["no time passes"])
@pytest.mark.parametrize("disks", [1, 3])
def test_an_execution_asks_as_often_as_the_page_says(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, disks: int
) -> None:
    azure.add_vm("web", image("os"), [image("data", 64 * KIB)] * (disks - 1))
    azure.requests.clear()
    run, worker = source.prepare("web")
    with places.open(str(tmp_path / "images"), source.context.report, source.storage) as folder:
        machine = source.inspect("web")
        source.copy(run, worker, machine, machine.disks, folder)
    copied = len(azure.requests)
    assert source.finish(run) == []
    listed = Counter(
        path.rpartition("/")[2]
        for method, path in list(azure.requests)[copied:]
        if method == "GET" and "/providers/" in path and path.partition("/providers/")[2].count("/") == 1
    )
    assert len(listed) == 8
    assert set(listed.values()) == {1}
    page = (Path(__file__).parent.parent / "docs/reference/coriolis.md").read_text()
    said = re.findall(
        r"sandbox: (\d+) and (\d+) for one and three disks\), of which (\d+) and (\d+) create and as many delete",
        " ".join(page.split()),
    )
    all_one, all_three, few_one, few_three = map(int, said[0])
    assert abs(len(azure.requests) - {1: all_one, 3: all_three}[disks]) <= 3
    methods = Counter(method for method, _ in azure.requests)
    assert methods["PUT"] == methods["DELETE"] == {1: few_one, 3: few_three}[disks]
