"""What the plugin raises, with and without the orchestrator."""

from __future__ import annotations

from coriolis_azure.errors import CoriolisAzureError


def raised(kind: type[CoriolisAzureError], *, connection: bool = False) -> type[Exception]:
    """What the plugin raises for an error of this kind: the orchestrator's own where it is installed."""
    from coriolis_azure.plugin import base  # which imports the orchestrator, see above

    return type(base.orchestrators_error(kind(""), connection=connection))
