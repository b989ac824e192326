"""A small Azure on this machine, for the demo and the tests.

Names are loaded on first use, so that guests' processes and the command line start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coriolis_azure.sandbox.catalog import VmSpec
    from coriolis_azure.sandbox.sandbox import Sandbox
    from coriolis_azure.sandbox.server.local import (
        add_vm,
        clear,
        fault,
        fault_rules,
        permit,
        resources,
        serve,
        write,
    )
    from coriolis_azure.sandbox.wire import Request, Response

__all__ = [
    "Request",
    "Response",
    "Sandbox",
    "VmSpec",
    "add_vm",
    "clear",
    "fault",
    "fault_rules",
    "permit",
    "resources",
    "serve",
    "write",
]

_HOMES = {
    "Request": "wire",
    "Response": "wire",
    "Sandbox": "sandbox",
    "VmSpec": "catalog",
    "add_vm": "server.local",
    "clear": "server.local",
    "fault": "server.local",
    "fault_rules": "server.local",
    "permit": "server.local",
    "resources": "server.local",
    "serve": "server.local",
    "write": "server.local",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
