"""Fault injection by rules: what goes wrong, for which requests, how often.

A rule applies until its count is used up or it is cleared. For each request, the oldest matching rule applies. Codes,
messages and statuses are Azure's, from recordings, logs and its documentation. Requests to the sandbox's own
administration are exempt.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from coriolis_azure import errors
from coriolis_azure.sandbox import budgets, export_faults
from coriolis_azure.sandbox.export_faults import ABOUT
from coriolis_azure.sandbox.storage import lies
from coriolis_azure.sandbox.wire import Json, Request, Response

Next = Callable[[Request], Response]


class Lost(ConnectionError):
    """The connection is lost and the client gets no answer."""


@dataclass(frozen=True)
class Fault:
    """One rule, of a kind in `KINDS`.

    It matches requests with this `method` ("" for any) and this text in their `path`, ignoring case, that are `about`
    something in `ABOUT` ("": anything). The first `after` of them pass; it then applies to the next `times` (0: to
    all). `code`, `status` and `message` are Azure's error, `seconds` is how long a throttled client is told to wait or
    how long something lasts, `polls` how many more polls an operation takes, `ranges` how many a host lists in time.
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
    about: str = ""
    ranges: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)

    def matches(self, request: Request) -> bool:
        """Whether the rule is about this request."""
        fits = self.method in {"", request.method} and self.path.lower() in request.path.lower()
        return fits and (not self.about or ABOUT[self.about](request))


_VM = {"method": "PUT", "path": "/virtualMachines/"}
_QUOTA = (
    "Operation could not be completed as it results in exceeding approved Total Regional Cores quota. Additional "
    "details - Deployment Model: Resource Manager, Location: westeurope, Current Limit: 4, Current Usage: 4, "
    "Additional Required: 2, (Minimum) New Limit Required: 6. Submit a request for Quota increase at "
    "https://aka.ms/ProdportalCRP/ by specifying parameters listed in the 'Details' section for deployment to succeed."
)
# The default values of a rule, by kind.
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
    **export_faults.KINDS,
}
_FAILING = {"failed-operation", "no-allocation"}


def rule(kind: str, details: Mapping[str, Any]) -> Fault:
    """A rule of `kind` with its default values overridden by `details`; InvalidInput if they are invalid."""
    if kind not in KINDS:
        raise errors.InvalidInput(f"{kind!r} is not a kind of fault; use one of {', '.join(KINDS)}")
    types: dict[str, Any] = {
        parameter.name: (int, float) if isinstance(parameter.default, float | int) else str
        for parameter in fields(Fault)
        if parameter.name not in {"kind", "id"}
    }
    for name, value in details.items():
        if (
            name not in types
            or not isinstance(value, types[name])
            or (name == "about" and value not in ABOUT)
        ):
            raise errors.InvalidInput(f"{name}={value!r} is not valid for a fault")
    return Fault(kind, **{**KINDS[kind], **details})


class Faults:
    """The rules of one sandbox. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Fault] = []

    def add(self, kind: str, **details: Any) -> Fault:
        """Add a rule; InvalidInput if it is invalid."""
        added = rule(kind, details)
        with self._lock:
            self._rules.append(added)
        return added

    def listed(self) -> list[Json]:
        """The active rules with their remaining counts."""
        with self._lock:
            return [active.to_json() for active in self._rules]

    def clear(self) -> None:
        """Remove all rules."""
        with self._lock:
            self._rules.clear()

    def around(self, request: Request, answer: Next, change: Callable[[str, Fault], None]) -> Response:
        """Answer a request, unless a rule decides otherwise.

        If the rule is about operations, `change` is called with the URL of the operation that the request started.
        """
        fault = self._applied(request)
        if fault is None:
            return answer(request)
        if fault.kind in export_faults.KINDS:
            return _of_exports(request, fault, answer, change)
        if fault.kind == "lost-request":
            raise Lost("the sandbox lost the request")
        if fault.kind == "lost-answer":
            answer(request)
            raise Lost("the sandbox lost the answer")
        if fault.kind == "slow-operation" or fault.kind in _FAILING:
            response = answer(request)
            url = response.headers.get("Azure-AsyncOperation") or response.headers.get("Location")
            if url:
                change(url, fault)
            return response
        return _throttled(request, fault) if fault.status == 429 else _refused(request, fault)

    def _applied(self, request: Request) -> Fault | None:
        """The rule that applies to this request, if any; counts it."""
        with self._lock:
            for position, fault in enumerate(self._rules):
                if not fault.matches(request):
                    continue
                if fault.after:
                    self._rules[position] = replace(fault, after=fault.after - 1)
                    continue
                if fault.times == 1:
                    del self._rules[position]
                elif fault.times:
                    self._rules[position] = replace(fault, times=fault.times - 1)
                return fault
        return None


def _of_exports(
    request: Request, fault: Fault, answer: Next, change: Callable[[str, Fault], None]
) -> Response:
    """The answer under a rule about exported disks."""
    if fault.kind in lies.LIES:
        return lies.LIES[fault.kind](request, answer)
    if fault.kind == "list-timeout":
        return lies.too_long(request, answer, fault.ranges)
    if fault.kind in export_faults.BEFORE:
        change(request.url, fault)
        return answer(request)
    if fault.kind in export_faults.AFTER:
        response = answer(request)
        change(request.url, fault)
        return response
    return lies.refused(fault.status, fault.code, fault.message)


def failure(fault: Fault) -> Json | None:
    """The error with which a rule ends an operation; None if the rule only slows it down."""
    return {"code": fault.code, "message": fault.message} if fault.kind in _FAILING else None


def _refused(request: Request, fault: Fault) -> Response:
    if request.path.startswith(export_faults.HOSTS):
        return lies.refused(fault.status, fault.code, fault.message)
    headers = {"x-ms-failure-cause": "gateway"} if fault.status >= 500 else {}
    return Response.of(fault.status, {"error": {"code": fault.code, "message": fault.message}}, headers)


def _throttled(request: Request, fault: Fault) -> Response:
    overrides = {name: text for name in ("code", "message") if (text := getattr(fault, name))}
    if "/providers/microsoft.compute/" in request.path.lower():
        return budgets.refusal("HighCostGet", 300, fault.seconds, **overrides)
    error = {
        "code": "SubscriptionRequestsThrottled",
        "message": f"Number of requests for operation '{request.method}' exceeded the backend storage limit. Please "
        f"try again after '{math.ceil(fault.seconds)}' seconds.",
        **overrides,
    }
    return Response.of(429, {"error": error}, budgets.retry_after(fault.seconds))
