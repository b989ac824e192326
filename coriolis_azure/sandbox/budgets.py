"""Azure's request budgets: token buckets for each VM, and for the subscription in a location.

Their sizes come from Azure's documentation (compute-throttling-limits) and, for disks and snapshots, from the largest
remaining counts seen in its answers. Buckets start full and are refilled once per period. A request takes a token from
each bucket that applies to it. If one is empty, the answer is 429 with the time to wait; a client that retries earlier
has to wait a whole period from then on.

A header lists the buckets with their remaining tokens, under the names recorded from Azure. Names of subscription
buckets that were not recorded follow the pattern of the one that was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from coriolis_azure.sandbox.wire import Request, Response

Next = Callable[[Request], Response]


@dataclass(frozen=True)
class Policy:
    """A bucket of `capacity` tokens that gets `refill` more every `seconds`."""

    name: str
    capacity: int
    refill: int
    seconds: int = 60


def _counters(name: str, short: int, long: int) -> tuple[Policy, ...]:
    """The disk provider's two counters, for three and for thirty minutes."""
    return Policy(f"{name}3Min", short, short, 180), Policy(f"{name}30Min", long, long, 1800)


# By operation on a VM: the VM's own bucket, and the subscription's in the location.
_OF_A_VM = {
    "put": (Policy("PutVMResource", 12, 4), Policy("PutVMSubscriptionMaximum", 1500, 500)),
    "update": (Policy("UpdateVMResource", 12, 4), Policy("UpdateVMSubscriptionMaximum", 1500, 500)),
    "delete": (Policy("DeleteVMResource", 12, 4), Policy("DeleteVMSubscriptionMaximum", 1500, 500)),
    "attach": (
        Policy("AttachDetachVMDisksResource", 12, 4),
        Policy("UpdateVMSubscriptionMaximum", 1500, 500),
    ),
    "get": (Policy("LowCostGetResource", 36, 12), Policy("LowCostGetSubscriptionMaximum", 24000, 8000)),
    "operation": (
        Policy("GetOperationResource", 45, 15),
        Policy("GetOperationSubscriptionMaximum", 15000, 5000),
    ),
}
_VERBS = {"GET": "get", "HEAD": "get", "PUT": "put", "DELETE": "delete"}
_ACTIONS = {"deallocate": "delete", "attachdetachdatadisks": "attach", "instanceview": "get"}
_VMS = (Policy("HighCostGetSubscriptionMaximum", 900, 300),)

_DISKS = _counters("CreateUpdateDisks", 3000, 25000)
_SNAPSHOT = _counters("HighCostSnapshotCreateHydrate", 1000, 8000)
_OF_DISKS = {
    ("disks", "GET"): _counters("LowCostGet", 15000, 120000),
    ("snapshots", "GET"): _counters("LowCostGet", 15000, 120000),
    ("disks", "PUT"): _DISKS,
    ("disks", "PATCH"): _DISKS,
    ("snapshots", "PUT"): _SNAPSHOT,
    ("snapshots", "PATCH"): _DISKS,
    ("disks", "POST"): _counters("HighCostDiskHydrate", 1000, 8000),
    ("snapshots", "POST"): _SNAPSHOT,
    ("disks", "DELETE"): _counters("DeleteDisks", 3000, 24000),
    ("snapshots", "DELETE"): _counters("DeleteDisks", 3000, 24000),
}
# Of a collection of restore points, and of all in it.
_OF_POINTS = {
    "GET": _counters("LowCostGetRestorePoint", 500, 2500),
    "PUT": _counters("CreateRestorePoints", 120, 600),
    "DELETE": _counters("DeleteRestorePoints", 350, 1000),
    "operation": _counters("GetOperation", 15000, 30000),
}
_LISTS_OF_DISKS = _counters("HighCostGet", 240, 1920)
_DISK_OPERATION = _counters("GetOperation", 50000, 400000)

_PATH = re.compile(
    r"/subscriptions/[^/]+(/resourceGroups/[^/]+)?/providers/Microsoft\.Compute/"
    r"(?P<kind>virtualMachines|disks|snapshots)(/(?P<name>[^/]+)(/(?P<action>\w+))?)?/?",
    re.IGNORECASE,
)

_POINTS = re.compile(r".*/providers/Microsoft\.Compute/restorePointCollections/[^/]+(/.*)?", re.IGNORECASE)


class Budgets:
    """The buckets of one sandbox. `seconds` is Azure's time, which runs `pace` times as fast as a client's."""

    def __init__(self, seconds: Callable[[], float], pace: float) -> None:
        self._seconds, self._pace = seconds, pace
        self._buckets: dict[tuple[str, Policy], _Bucket] = {}

    def around(self, request: Request, target: str, answer: Next) -> Response:
        """Answer a request and add the headers about its buckets; 429 if one is empty.

        `target` is the id of the resource whose operation the request polls, "" if it polls none.
        """
        policies = list(_applicable(request, target))
        buckets = {policy: self._bucket(owner, policy) for owner, policy in policies}
        for policy, bucket in buckets.items():
            if not bucket.left:
                wait = bucket.refused(policy, self._seconds()) / self._pace
                return refusal(policy.name, policy.capacity, max(1, math.ceil(wait)))
        for bucket in buckets.values():
            bucket.left -= 1
        response = answer(request)
        response.headers.update(_of_manager(request.method))
        if buckets:
            response.headers["x-ms-ratelimit-remaining-resource"] = ",".join(
                f"Microsoft.Compute/{policy.name};{bucket.left}" for policy, bucket in buckets.items()
            )
        return response

    def left(self, vm: str) -> Mapping[str, int]:
        """The remaining tokens of a VM's own buckets that have been used, by name."""
        return {
            policy.name: self._bucket(owner, policy).left
            for owner, policy in list(self._buckets)
            if owner == vm.lower()
        }

    def _bucket(self, owner: str, policy: Policy) -> _Bucket:
        now = self._seconds()
        bucket = self._buckets.setdefault((owner, policy), _Bucket(policy.capacity, now))
        bucket.fill(policy, now)
        return bucket


@dataclass
class _Bucket:
    left: int
    since: float
    early: bool = False

    def fill(self, policy: Policy, now: float) -> None:
        """Add the tokens that have accrued since the last call."""
        periods = math.floor((now - self.since) / policy.seconds)
        if periods:
            self.left = min(policy.capacity, self.left + periods * policy.refill)
            self.since += periods * policy.seconds
            self.early = False

    def refused(self, policy: Policy, now: float) -> float:
        """The seconds that a client has to wait; a client that comes back early starts a whole new period."""
        self.since = now if self.early else self.since
        self.early = True
        return self.since + policy.seconds - now


def _of_manager(method: str) -> dict[str, str]:
    """The resource manager's own counters, always full: the sandbox does not enforce them."""
    if method in {"GET", "HEAD"}:
        return {"x-ms-ratelimit-remaining-subscription-global-reads": "3749"}
    kind = "deletes" if method == "DELETE" else "writes"
    return {
        f"x-ms-ratelimit-remaining-subscription-{kind}": "199",
        f"x-ms-ratelimit-remaining-subscription-global-{kind}": "2999",
    }


def refusal(group: str, allowed: int, seconds: float, **overrides: str) -> Response:
    """The compute provider's 429, which unlike other errors has no outer `error`; `overrides` replace parts."""
    counts = {
        "operationGroup": group,
        "allowedRequestCount": allowed,
        "measuredRequestCount": allowed + 1,
    }
    body = {
        "code": "OperationNotAllowed",
        "message": "The server rejected the request because too many requests have been received for this "
        "subscription.",
        "details": [{"code": "TooManyRequests", "target": group, "message": json.dumps(counts)}],
        "innererror": {"internalErrorCode": "TooManyRequestsReceived"},
        **overrides,
    }
    headers = {**retry_after(seconds), "x-ms-ratelimit-remaining-resource": f"Microsoft.Compute/{group};0"}
    return Response.of(429, body, headers)


def retry_after(seconds: float) -> dict[str, str]:
    """The header with the time to wait, in milliseconds if it is less than a second."""
    if seconds < 1:
        return {"retry-after-ms": str(math.ceil(seconds * 1000))}
    return {"Retry-After": str(math.ceil(seconds))}


def _applicable(request: Request, target: str) -> Iterator[tuple[str, Policy]]:
    """The buckets that a request takes tokens from, each with the id of its VM, or "" for the subscription's."""
    if _POINTS.fullmatch(target or request.path):
        of_disk = target and "/diskrestorepoints/" in target.lower()
        of_all = _DISK_OPERATION if of_disk else _OF_POINTS.get("operation" if target else request.method, ())
        yield from (("", policy) for policy in of_all)
        return
    match = _PATH.fullmatch(target or request.path)
    if match is None or not (match["name"] or request.method == "GET"):
        return
    kind, action = match["kind"].lower(), (match["action"] or "").lower()
    shared: tuple[Policy, ...]
    if kind != "virtualmachines":
        of_one = _DISK_OPERATION if target else _OF_DISKS.get((kind, request.method), ())
        shared = of_one if match["name"] else _LISTS_OF_DISKS
    elif not match["name"]:
        shared = _VMS
    else:
        operation = "operation" if target else _ACTIONS.get(action) or _VERBS.get(request.method, "update")
        own, of_subscription = _OF_A_VM[operation]
        yield (target or request.path).lower().rstrip("/").removesuffix(f"/{action}"), own
        shared = (of_subscription,)
    yield from (("", policy) for policy in shared)
