"""The kinds of faults of exported disks: of snapshots and their grants, and of the hosts that serve them."""

from __future__ import annotations

from collections.abc import Callable

from coriolis_azure.sandbox.storage.lies import LIES
from coriolis_azure.sandbox.storage.page_lists import PREVIOUS
from coriolis_azure.sandbox.wire import Json, Request

HOSTS = "/md-"
# What requests to a disk's host may be about: reading it, a page list, or such a list since an older snapshot.
ABOUT: dict[str, Callable[[Request], bool]] = {
    "read": lambda request: request.method == "GET" and "comp" not in request.query,
    "list": lambda request: request.query.get("comp") == "pagelist",
    "difference": lambda request: (
        request.query.get("comp") == "pagelist"
        and (request.header(PREVIOUS) is not None or "prevsnapshot" in request.query)
    ),
}
_HOST = {"path": HOSTS}
_READ, _LIST, _DIFFERENCE = ({**_HOST, "about": about} for about in ABOUT)
# The default values of a rule, by kind.
KINDS: dict[str, Json] = {
    "network-policy": {"method": "PUT", "path": "/snapshots/", "code": "DenyAll"},
    "family-merging": {
        "method": "DELETE",
        "path": "/snapshots/",
        "status": 403,
        "code": "AuthenticationFailed",
    },
    "sas-expired": _HOST,
    "slow-read": _READ,
    "server-busy": {
        **_HOST,
        "status": 503,
        "code": "ServerBusy",
        "message": "Operations per second is over the account limit.",
    },
    "list-timeout": {**_LIST, "times": 0},
    **dict.fromkeys(LIES, _LIST),
    "header-ignored": _DIFFERENCE,
    "wrong-length": _HOST,
    "wrong-version": _HOST,
    "broken-body": _READ,
}
# Kinds that change the sandbox before a request is answered, and after it.
BEFORE, AFTER = {"sas-expired", "slow-read", "family-merging"}, {"network-policy"}
