"""Faults that are switched on by rule: what goes wrong, for which requests, how often.

A rule stays until it has struck as often as it may, or is cleared. Rules are tried in the order in which they were
made; each request meets the first that means it. The words and statuses are Azure's, from recordings, logs and its
documentation. Requests to the sandbox's own administration are never struck.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from coriolis_azure import errors
from coriolis_azure.sandbox import budgets
from coriolis_azure.sandbox.wire import Json, Request, Response

Next = Callable[[Request], Response]


class Lost(ConnectionError):
    """The connection broke: the client gets no answer."""


@dataclass(frozen=True)
class Fault:
    """One rule.

    `kind` is one of `KINDS`. It means requests with this `method` ("" for any) and this text in their path, case
    aside. The first `after` of them pass, the next `times` are struck (0: all). `code`, `status` and `message` are
    Azure's error; `seconds` is what a throttled client is told to wait; `polls` is how often an operation is
    asked about in vain.
    """

    kind: str
    method: str = ""
    path: str = "/subscriptions/"
    times: int = 1
    after: int = 0
    code: str = ""
    status: int = 0
    message: str = ""
    seconds: float = 1
    polls: int = 5
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)

    def means(self, request: Request) -> bool:
        """Whether the rule is about this request."""
        return self.method in {"", request.method} and self.path.lower() in request.path.lower()


_VM = {"method": "PUT", "path": "/virtualMachines/"}
_QUOTA = (
    "Operation could not be completed as it results in exceeding approved Total Regional Cores quota. Additional "
    "details - Deployment Model: Resource Manager, Location: westeurope, Current Limit: 4, Current Usage: 4, "
    "Additional Required: 2, (Minimum) New Limit Required: 6. Submit a request for Quota increase at "
    "https://aka.ms/ProdportalCRP/ by specifying parameters listed in the 'Details' section for deployment to succeed."
)
# What a rule of each kind is made of, where nothing else is said.
KINDS: dict[str, Json] = {
    "throttle": {"status": 429},
    "server-error": {"status": 503, "code": "ServerTimeout", "message": "The request timed out."},
    "lost-request": {},
    "lost-answer": {},
    "refuse": {"status": 409, "code": "Conflict", "message": "The request failed due to conflict."},
    "failed-operation": {
        "code": "InternalExecutionError",
        "message": "An internal execution error occurred. Please retry later.",
    },
    "slow-operation": {},
    "no-capacity": {
        **_VM,
        "status": 409,
        "code": "SkuNotAvailable",
        "message": "The requested VM size for resource 'Following SKUs have failed for Capacity Restrictions' is "
        "currently not available in location 'westeurope'. Please try another size or deploy to a different location "
        "or different zone. See https://aka.ms/azureskunotavailable for details.",
    },
    "no-allocation": {
        **_VM,
        "code": "AllocationFailed",
        "message": "Allocation failed. We do not have sufficient capacity for the requested VM size in this region. "
        "Read more about improving likelihood of allocation success at http://aka.ms/allocation-guidance",
    },
    "quota": {**_VM, "status": 409, "code": "OperationNotAllowed", "message": _QUOTA},
    "policy": {
        "method": "PUT",
        "status": 403,
        "code": "RequestDisallowedByPolicy",
        "message": "Resource was disallowed by policy. Policy identifiers: "
        '\'[{"policyAssignment":{"name":"sandbox"}}]\'.',
    },
    "lock": {
        "method": "DELETE",
        "status": 409,
        "code": "ScopeLocked",
        "message": "The scope cannot perform delete operation because following scope(s) are locked. Please remove "
        "the lock and try again.",
    },
}
_FAILING = {"failed-operation", "no-allocation"}


def rule(kind: str, given: Mapping[str, Any]) -> Fault:
    """A rule of `kind`, its usual values replaced by the `given` ones; InvalidInput names what is wrong."""
    if kind not in KINDS:
        raise errors.InvalidInput(f"{kind!r} is no kind of fault; there are {', '.join(KINDS)}")
    kinds: dict[str, Any] = {
        each.name: (int, float) if isinstance(each.default, float | int) else str
        for each in fields(Fault)
        if each.name not in {"kind", "id"}
    }
    for name, value in given.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise errors.InvalidInput(f"{name}={value!r} is nothing that a fault can have")
    return Fault(kind, **{**KINDS[kind], **given})


class Faults:
    """The rules of one sandbox. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Fault] = []

    def add(self, kind: str, **given: Any) -> Fault:
        """Switch a fault on; InvalidInput for what is none."""
        made = rule(kind, given)
        with self._lock:
            self._rules.append(made)
        return made

    def listed(self) -> list[Json]:
        """The rules that can still strike, with what is left of their counts."""
        with self._lock:
            return [each.to_json() for each in self._rules]

    def clear(self) -> None:
        """Switch all off."""
        with self._lock:
            self._rules.clear()

    def around(self, request: Request, answer: Next, change: Callable[[str, Fault], None]) -> Response:
        """The answer to a request, or what a rule makes of it.

        `change` is handed the URL of an operation that the request began, where a rule is about operations.
        """
        struck = self._struck(request)
        if struck is None:
            return answer(request)
        if struck.kind == "lost-request":
            raise Lost("the sandbox lost the request")
        if struck.kind == "lost-answer":
            answer(request)
            raise Lost("the sandbox lost the answer")
        if struck.kind == "slow-operation" or struck.kind in _FAILING:
            response = answer(request)
            url = response.headers.get("Azure-AsyncOperation") or response.headers.get("Location")
            if url:
                change(url, struck)
            return response
        return _throttled(request, struck) if struck.status == 429 else _refused(struck)

    def _struck(self, request: Request) -> Fault | None:
        """The rule that strikes this request; its counts go down."""
        with self._lock:
            for place, each in enumerate(self._rules):
                if not each.means(request):
                    continue
                if each.after:
                    self._rules[place] = replace(each, after=each.after - 1)
                    continue
                if each.times == 1:
                    del self._rules[place]
                elif each.times:
                    self._rules[place] = replace(each, times=each.times - 1)
                return each
        return None


def failure(fault: Fault) -> Json | None:
    """The error with which a rule ends an operation; None for a rule that only slows it down."""
    return {"code": fault.code, "message": fault.message} if fault.kind in _FAILING else None


def _refused(fault: Fault) -> Response:
    headers = {"x-ms-failure-cause": "gateway"} if fault.status >= 500 else {}
    return Response.of(fault.status, {"error": {"code": fault.code, "message": fault.message}}, headers)


def _throttled(request: Request, fault: Fault) -> Response:
    given = {name: text for name in ("code", "message") if (text := getattr(fault, name))}
    if "/providers/microsoft.compute/" in request.path.lower():
        return budgets.refusal("HighCostGet", 300, fault.seconds, **given)
    error = {
        "code": "SubscriptionRequestsThrottled",
        "message": f"Number of requests for operation '{request.method}' exceeded the backend storage limit. Please "
        f"try again after '{math.ceil(fault.seconds)}' seconds.",
        **given,
    }
    return Response.of(429, {"error": error}, budgets.retry_after(fault.seconds))
