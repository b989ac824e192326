"""The base classes of a source plugin: the orchestrator's own if it is importable, otherwise stand-ins.

The orchestrator detects a plugin's capabilities by its base classes, so a plugin must inherit from them. Without an
orchestrator the stand-ins below make the same plugin usable from scripts and tests. The methods are in `provider`;
`test_contract.py` checks that they match the orchestrator's. Apart from the writers in this folder, no other module
knows whether the orchestrator is installed.

Every call may run in another process, on another host; we do not use `ctxt`, the orchestrator's context.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .. import errors


class BaseProvider:
    """A plugin of one platform."""

    platform: str

    @classmethod
    def supports_shared_disks(cls) -> bool:
        """Only relevant for destinations."""
        return False


class BaseEndpointInstancesProvider(BaseProvider):
    """An endpoint whose connection can be checked and whose machines can be listed."""


class BaseEndpointNetworksProvider:
    """An endpoint whose networks can be listed."""


class BaseEndpointStorageProvider:
    """An endpoint whose storage types can be listed."""


class BaseEndpointSourceOptionsProvider:
    """An endpoint that can list the possible values of its source settings."""


class BaseEndpointInventoryExportProvider:
    """An endpoint whose machines can be exported as a table."""


class BaseReplicaExportProvider(BaseProvider):
    """A source that exports whole machines, once or repeatedly."""


class BaseReplicaExportValidationProvider:
    """A source that can check a transfer beforehand."""


class BaseUpdateSourceReplicaProvider:
    """A source whose settings may change between executions."""


class BaseSourceMinionPoolProvider:
    """A source that keeps worker machines warm between transfers."""


CAPABILITIES: tuple[type, ...] = (
    BaseEndpointInstancesProvider,
    BaseEndpointNetworksProvider,
    BaseEndpointStorageProvider,
    BaseEndpointSourceOptionsProvider,
    BaseEndpointInventoryExportProvider,
    BaseReplicaExportProvider,
    BaseReplicaExportValidationProvider,
    BaseUpdateSourceReplicaProvider,
    BaseSourceMinionPoolProvider,
)


def _orchestrator(module: str) -> Any:
    """A module of the orchestrator; None if it is not installed."""
    if importlib.util.find_spec("coriolis") is None:
        return None
    try:
        return importlib.import_module(f"coriolis.{module}")
    except ImportError:
        return None


def orchestrators_error(error: errors.CoriolisAzureError, *, connection: bool = False) -> Exception:
    """Translate an error to the orchestrator's class with the fitting HTTP code.

    Its text, which the orchestrator shows to its users, has the message, the remedy and Azure's id of the request.
    Only the orchestrator's own classes keep their type on the way through its message queue. Without an orchestrator
    the error keeps its class, and its text includes the remedy as well.
    """
    text = (
        f"{error.message}. {error.remedy}"
        if not error.message.endswith(".")
        else f"{error.message} {error.remedy}"
    )
    if isinstance(error, errors.AzureError) and error.reference:
        text += f" (Azure's answer: {error.reference})"
    exceptions = _orchestrator("exception")
    if exceptions is None:
        error.args = (text,)
        return error
    name = next(name for kind, name in _THEIRS if isinstance(error, kind))
    kind = getattr(
        exceptions, "ConnectionValidationException" if connection else name, exceptions.CoriolisException
    )
    translated: Exception = kind(text)
    return translated


_THEIRS: tuple[tuple[type[errors.CoriolisAzureError], str], ...] = (
    (errors.NotFound, "InstanceNotFound"),
    (errors.Denied, "NotAuthorized"),
    (errors.Conflict, "Conflict"),
    (errors.InvalidInput, "InvalidInput"),
    (errors.CoriolisAzureError, "CoriolisException"),
)


if not TYPE_CHECKING:
    _theirs = _orchestrator("providers.base")
    for _ours in CAPABILITIES:
        globals()[_ours.__name__] = getattr(_theirs, _ours.__name__, _ours)
