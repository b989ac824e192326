"""Takes virtual machines out of Azure: an export plugin for Coriolis, a Python API and a command line.

`Source` (the Python API) and `AzureExportProvider` (the plugin) are loaded when they are first asked for: the
orchestrator imports every plugin at each look-up, and the SDKs take a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["AzureExportProvider", "Source", "__version__"]

_HOMES = {"AzureExportProvider": "provider", "Source": "source"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
