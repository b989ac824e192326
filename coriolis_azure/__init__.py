"""Takes virtual machines out of Azure: an export plugin for Coriolis, a Python API and a command line.

Names are loaded when they are first used: the orchestrator imports every plugin at each look-up, and Azure's SDKs take
a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from . import events as events
    from .checks.plan import DiskPlan, Plan, Range
    from .checks.prices import Prices
    from .fleet import Fleet, FleetResult, FleetVm, VmResult
    from .model import Disk, Machine, Nic
    from .plugin.provider import AzureExportProvider
    from .replica.destinations import Destination, Folder, Place
    from .replica.manifest import Manifest
    from .replica.status import Status
    from .restoring import Restored, RestoredDisk
    from .results import DiskReport, Replicated
    from .source import Source
    from .timeline import RunReport

__version__ = "0.2.0"
__all__ = [
    "AzureExportProvider",
    "Destination",
    "Disk",
    "DiskPlan",
    "DiskReport",
    "Fleet",
    "FleetResult",
    "FleetVm",
    "Folder",
    "Machine",
    "Manifest",
    "Nic",
    "Place",
    "Plan",
    "Prices",
    "Range",
    "Replicated",
    "Restored",
    "RestoredDisk",
    "RunReport",
    "Source",
    "Status",
    "VmResult",
    "__version__",
    "errors",
    "events",
]

_HOMES = {
    "AzureExportProvider": "plugin.provider",
    "Destination": "replica.destinations",
    "Disk": "model",
    "DiskPlan": "checks.plan",
    "DiskReport": "results",
    "Fleet": "fleet",
    "FleetResult": "fleet",
    "FleetVm": "fleet",
    "Folder": "replica.destinations",
    "Machine": "model",
    "Manifest": "replica.manifest",
    "Nic": "model",
    "Place": "replica.destinations",
    "Plan": "checks.plan",
    "Prices": "checks.prices",
    "Range": "checks.plan",
    "Replicated": "results",
    "Restored": "restoring",
    "RestoredDisk": "restoring",
    "RunReport": "timeline",
    "Source": "source",
    "Status": "replica.status",
    "VmResult": "fleet",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "events"):
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
