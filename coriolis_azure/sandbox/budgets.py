"""How many requests Azure takes in a while: token buckets of each VM, and of the subscription in a location.

The sizes are those of Azure's documentation (compute-throttling-limits) and, for disks and snapshots, the most that
its answers were seen to tell as left. Buckets begin full and get more once in their period. A request takes a token of
each bucket that means it. Where one is empty it is answered with 429 and the time to wait; who asks again before that
time waits for a whole period from then.

A header names the buckets with what is left in them, by the names that Azure was recorded with; those of a subscription
that were not recorded are formed like the one that was.
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
    """A bucket that holds `capacity` tokens, and gets `refill` more every so many `seconds`."""

    name: str
    capacity: int
    refill: int
    seconds: int = 60


def _counters(name: str, short: int, long: int) -> tuple[Policy, ...]:
    """The two counters of the disk provider: of three minutes, and of thirty."""
    return Policy(f"{name}3Min", short, short, 180), Policy(f"{name}30Min", long, long, 1800)


# By what is done with a VM: the VM's own bucket, and the subscription's in the location.
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
_LISTS_OF_DISKS = _counters("HighCostGet", 240, 1920)
_DISK_OPERATION = _counters("GetOperation", 50000, 400000)

_PATH = re.compile(
    r"/subscriptions/[^/]+(/resourceGroups/[^/]+)?/providers/Microsoft\.Compute/"
    r"(?P<kind>virtualMachines|disks|snapshots)(/(?P<name>[^/]+)(/(?P<action>\w+))?)?/?",
    re.IGNORECASE,
)


class Budgets:
    """The buckets of one sandbox, whose clock is `seconds`: `pace` of its seconds pass in one of a client's."""

    def __init__(self, seconds: Callable[[], float], pace: float) -> None:
        self._seconds, self._pace = seconds, pace
        self._buckets: dict[tuple[str, Policy], _Bucket] = {}

    def around(self, request: Request, target: str, answer: Next) -> Response:
        """The answer to a request, with what is left in its buckets; 429 where one is empty.

        `target` is the id of what the request's operation is about, "" where it asks about none.
        """
        named = list(_meant(request, target))
        buckets = {policy: self._bucket(owner, policy) for owner, policy in named}
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
        """What a VM's own buckets hold, of those that were asked of: by name."""
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
        """Put in what has come since the last time."""
        periods = math.floor((now - self.since) / policy.seconds)
        if periods:
            self.left = min(policy.capacity, self.left + periods * policy.refill)
            self.since += periods * policy.seconds
            self.early = False

    def refused(self, policy: Policy, now: float) -> float:
        """The seconds that a client has to wait, which begin anew where it had been told already."""
        self.since = now if self.early else self.since
        self.early = True
        return self.since + policy.seconds - now


def _of_manager(method: str) -> dict[str, str]:
    """What the resource manager says of its own buckets: full ones, for here nobody is refused because of them."""
    if method in {"GET", "HEAD"}:
        return {"x-ms-ratelimit-remaining-subscription-global-reads": "3749"}
    kind = "deletes" if method == "DELETE" else "writes"
    return {
        f"x-ms-ratelimit-remaining-subscription-{kind}": "199",
        f"x-ms-ratelimit-remaining-subscription-global-{kind}": "2999",
    }


def refusal(group: str, allowed: int, seconds: float, **given: str) -> Response:
    """429 as the compute provider says it, without the `error` that all else has around it; `given` replaces parts."""
    counted = {
        "operationGroup": group,
        "allowedRequestCount": allowed,
        "measuredRequestCount": allowed + 1,
    }
    body = {
        "code": "OperationNotAllowed",
        "message": "The server rejected the request because too many requests have been received for this "
        "subscription.",
        "details": [{"code": "TooManyRequests", "target": group, "message": json.dumps(counted)}],
        "innererror": {"internalErrorCode": "TooManyRequestsReceived"},
        **given,
    }
    headers = {**retry_after(seconds), "x-ms-ratelimit-remaining-resource": f"Microsoft.Compute/{group};0"}
    return Response.of(429, body, headers)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that tells how long to wait; less than a second only in milliseconds."""
    if seconds < 1:
        return {"retry-after-ms": str(math.ceil(seconds * 1000))}
    return {"Retry-After": str(math.ceil(seconds))}


def _meant(request: Request, target: str) -> Iterator[tuple[str, Policy]]:
    """The buckets that a request takes from, each with the id of the VM that has it; "" for the subscription's."""
    found = _PATH.fullmatch(target or request.path)
    if found is None or not (found["name"] or request.method == "GET"):
        return
    kind, action = found["kind"].lower(), (found["action"] or "").lower()
    shared: tuple[Policy, ...]
    if kind != "virtualmachines":
        of_one = _DISK_OPERATION if target else _OF_DISKS.get((kind, request.method), ())
        shared = of_one if found["name"] else _LISTS_OF_DISKS
    elif not found["name"]:
        shared = _VMS
    else:
        doing = "operation" if target else _ACTIONS.get(action) or _VERBS.get(request.method, "update")
        own, of_all = _OF_A_VM[doing]
        yield (target or request.path).lower().rstrip("/").removesuffix(f"/{action}"), own
        shared = (of_all,)
    yield from (("", policy) for policy in shared)
