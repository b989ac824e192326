"""Whatever is spoilt: an answer to any question of a check, or a request to the sandbox. Nothing ends with a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.constants import GROUP
from harness.late_answers import Later
from harness.spoiling import QUICK, spoilt

pytestmark = pytest.mark.slow

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoilt")


@pytest.fixture(scope="module")
def place(folder: Path) -> Iterator[tuple[Sandbox, Source, Later]]:
    """A sandbox with a VM, and a source that waits for nothing: the sandbox's time passes with its waits."""
    disk, clock = folder / "disk.raw", Later()
    disk.write_bytes(bytes(1 << 16))
    with Sandbox(folder / "azure", clock=clock, pace=1) as sandbox:
        sandbox.add_vm("web", disk, [disk], VmSpec(zone="1"))
        storage = {"storage_account_name": "sandboxstorage", "storage_container_name": "replicas"}
        source = Source(
            sandbox.connection_info(),
            {**sandbox.environment(), **storage},
            transport=sandbox.transport(),
            clock=clock,
        )
        source.azure.groups()  # sign in
        yield sandbox, source, clock
        source.close()


def check(place: tuple[Sandbox, Source, Later], change: Callable[[str, Json], Any]) -> None:
    """Check the VM, each answer of the resource manager as `change` makes it: of a question and the answer's body."""
    sandbox, source, clock = place

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if not request.path.lower().startswith("/subscriptions") or not response.body:
            return response
        body = change(f"{request.method} {request.path}", json.loads(response.body))
        return replace(response, body=json.dumps(body).encode())

    clock.moment += 3600
    source.azure._skus.clear()
    sandbox.intercept = look
    try:
        assert source.check("web").findings
    finally:
        sandbox.intercept = None


@pytest.fixture(scope="module")
def answers(place: tuple[Sandbox, Source, Later]) -> dict[str, Json]:
    """What Azure says to the questions of a check."""
    seen: dict[str, Json] = {}
    check(place, lambda question, body: seen.setdefault(question, body))
    assert len(seen) > 20
    return dict(sorted(seen.items()))


@settings(QUICK, max_examples=40)
@given(data=st.data())
def test_a_check_of_which_any_answer_is_spoilt_is_a_list_of_findings(
    place: tuple[Sandbox, Source, Later], answers: dict[str, Json], data: st.DataObject
) -> None:
    which = data.draw(st.sampled_from(list(answers)))
    (bad,) = data.draw(spoilt([answers[which]]))
    check(place, lambda question, body: bad if question == which else body)


@pytest.fixture(scope="module")
def sent(place: tuple[Sandbox, Source, Later], folder: Path) -> list[Request]:
    """The requests of a job that say what is to be made or changed, one of each kind."""
    sandbox, source, _ = place
    seen: dict[str, Request] = {}

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.body and request.path.lower().startswith("/subscriptions"):
            seen.setdefault(f"{request.method} {'/'.join(request.path.split('/')[6:8])}", request)
        return answer(request)

    sandbox.intercept = look
    source.check("web")
    source.replicate("web", folder / "images", shutdown=True)
    sandbox.intercept = None
    assert len(seen) >= 8
    return list(seen.values())


@QUICK
@given(data=st.data(), again=st.booleans())
def test_a_spoilt_request_to_the_sandbox_is_done_or_refused_as_azure_would(
    place: tuple[Sandbox, Source, Later],
    sent: list[Request],
    data: st.DataObject,
    again: bool,
) -> None:
    sandbox, _, clock = place
    clock.moment += 3600
    good = data.draw(st.sampled_from(sent))
    (body,) = data.draw(spoilt([json.loads(good.body)]))
    url = good.url if again else good.url.replace("/coriolis-", "/other-")
    response = sandbox.handle(replace(good, url=url, body=json.dumps(body).encode()))
    if response.status >= 300:
        assert 400 <= response.status < 500
        error = json.loads(response.body)["error"]
        assert error["code"]
        assert error["message"]
    assert sandbox.resources()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/skus", {"value": [{"resourceType": "virtualMachines", "name": None}]}),
        ("/usages", {"value": [{"name": {"value": "cores"}, "limit": 7}, {"currentValue": 7}]}),
        ("/versions", [True]),
        ("/versions", {"value": [{"id": "x"}]}),
        ("/checkPolicyRestrictions", {"fieldRestrictions": False}),
        ("/checkPolicyRestrictions", {"contentEvaluationResult": {"policyEvaluations": [7]}}),
        ("/providers/Microsoft.Compute", {"resourceTypes": [{}, {"resourceType": None}]}),
        ("/permissions", {"value": [{"actions": 7}]}),
        ("/virtualMachines", {"value": [{"id": "x"}]}),
        ("/resourceGroups", {"value": [{"location": "x"}]}),
    ],
)
def test_answers_that_once_ended_a_check_with_a_trace(
    place: tuple[Sandbox, Source, Later], path: str, body: Any
) -> None:
    """Found by changing real answers at random."""
    check(place, lambda question, real: body if question.endswith(path) else real)


def test_an_operation_whose_state_is_no_document_is_an_error_of_ours(
    place: tuple[Sandbox, Source, Later],
) -> None:
    sandbox, source, _ = place

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        return Response.of(200, [[]]) if "/operations/" in request.path else answer(request)

    sandbox.intercept = look
    id = names.resource_id(source.azure.subscription, GROUP, "nsg", "n")
    try:
        with pytest.raises(errors.Unreadable, match="does not have the form") as caught:
            source.azure.put(id, {"location": "westeurope", "properties": {}})
    finally:
        sandbox.intercept = None
    assert caught.value.facts["resource"] == id
