"""What the orchestrator logs and shows of what a plugin returns: its own functions where it can be imported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

# The names of keys whose values are masked contain one of these. `pkey` does not.
_SECRET = (
    "password",
    "passphrase",
    "secret",
    "token",
    "private_key",
    "encrypted_key",
    "admin_pass",
    "sslkey",
)
_SHOWN_MASKED = ("pkey", "password")


def logged(result: dict[str, Any]) -> dict[str, Any]:
    """A task's result as worker and conductor log it."""
    theirs = orchestrators("coriolis.utils", "sanitize_task_info")
    return (theirs or _sanitized)(copy.deepcopy(result))


def shown(properties: dict[str, Any], reached: dict[str, Any]) -> dict[str, Any]:
    """A pool's worker as the REST API shows it."""
    machine = copy.deepcopy({"provider_properties": properties, "connection_info": reached})
    theirs = orchestrators("coriolis.api.v1.views.minion_pool_view", "single")
    if theirs:
        return dict(theirs({"minion_machines": [machine]}))
    for name in _SHOWN_MASKED:
        if machine["connection_info"].get(name):
            machine["connection_info"][name] = "***"
    return machine


def orchestrators(module: str, name: str) -> Callable[..., Any] | None:
    """A function of the orchestrator; None where it is not installed."""
    import importlib

    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    return found


def _sanitized(result: dict[str, Any]) -> dict[str, Any]:
    for volume in result.get("volumes_info", ()):
        if "chunks" in volume.get("replica_state", {}):
            volume["replica_state"]["chunks"] = ["<redacted>"]
    return dict(_masked(result))


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _masked(inner)
            if isinstance(inner, dict)
            else "***"
            if any(word in key.lower() for word in _SECRET)
            else _masked(inner)
            for key, inner in value.items()
        }
    return [_masked(inner) for inner in value] if isinstance(value, list) else value
