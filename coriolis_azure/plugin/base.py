"""What the orchestrator asks of a source plugin: its own base classes where it is importable, their names here.

The orchestrator finds capabilities by looking for its base classes among a plugin's ancestors, so inheriting is
not optional there. Without it the classes below let the same plugin be used from scripts and tests: the calls are in
`provider`, and `test_contract.py` holds them to the orchestrator's. Besides the writers in this folder, no other module
knows whether the orchestrator is there.

Every call may run in another process, on another host; `ctxt` is the orchestrator's and of no use to us.
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
        """Asked of destinations only."""
        return False


class BaseEndpointInstancesProvider(BaseProvider):
    """An endpoint whose connection can be checked and whose machines can be listed."""


class BaseEndpointNetworksProvider:
    """An endpoint whose networks can be listed."""


class BaseEndpointStorageProvider:
    """An endpoint whose storage types can be listed."""


class BaseEndpointSourceOptionsProvider:
    """An endpoint that knows the values its source settings may take."""


class BaseEndpointInventoryExportProvider:
    """An endpoint whose machines can be exported as a table."""


class BaseReplicaExportProvider(BaseProvider):
    """A source of whole machines, once or again and again."""


class BaseReplicaExportValidationProvider:
    """A source that can say beforehand what would go wrong."""


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
    """A module of the orchestrator; None where it is not installed."""
    if importlib.util.find_spec("coriolis") is None:
        return None
    try:
        return importlib.import_module(f"coriolis.{module}")
    except ImportError:
        return None


def orchestrators_error(error: errors.CoriolisAzureError, *, connection: bool = False) -> Exception:
    """The error as the orchestrator passes it on to its users: message, remedy and what Azure calls the
    request, with the class of its own HTTP code.

    Only classes of the orchestrator itself keep their type on their way through its message queue. Without an
    orchestrator our own class, whose text then holds the remedy too.
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
    found: Exception = kind(text)
    return found


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
