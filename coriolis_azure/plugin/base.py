"""What the orchestrator asks of a source plugin: its own base classes where it is importable, the same shapes here.

The orchestrator finds capabilities by looking for its base classes among a plugin's ancestors, so inheriting is
not optional there. Without it the shapes below let the same plugin be used from scripts and tests. Besides the writers
in this folder, no other module knows whether the orchestrator is there.

Every call may run in another process, on another host; `ctxt` is the orchestrator's and of no use to us.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .. import errors

Json = dict[str, Any]


class BaseProvider(abc.ABC):
    """A plugin of one platform."""

    platform: str

    @classmethod
    def supports_shared_disks(cls) -> bool:
        """Asked of destinations only."""
        return False


class BaseEndpointProvider(BaseProvider):
    """An endpoint whose connection can be checked."""

    @abc.abstractmethod
    def validate_connection(self, ctxt: Any, connection_info: Json) -> None:
        """Raise when the connection does not work; the text is shown to the user."""

    @abc.abstractmethod
    def get_connection_info_schema(self) -> Json:
        """The JSON schema of connection infos."""


class BaseEndpointInstancesProvider(BaseEndpointProvider):
    """An endpoint whose machines can be listed."""

    @abc.abstractmethod
    def get_instances(
        self,
        ctxt: Any,
        connection_info: Json,
        source_environment: Json,
        limit: int | None = None,
        last_seen_id: str | None = None,
        instance_name_pattern: str | None = None,
        refresh: bool = False,
    ) -> list[Json]:
        """A page of machines as vm_instance_info, in a stable order, after the one with `last_seen_id`."""

    @abc.abstractmethod
    def get_instance(
        self, ctxt: Any, connection_info: Json, source_environment: Json, instance_name: str
    ) -> Json:
        """One machine as vm_export_info."""


class BaseEndpointNetworksProvider(abc.ABC):
    """An endpoint whose networks can be listed."""

    @abc.abstractmethod
    def get_networks(self, ctxt: Any, connection_info: Json, env: Json) -> list[Json]:
        """The networks as vm_network."""


class BaseEndpointStorageProvider(abc.ABC):
    """An endpoint whose storage types can be listed."""

    @abc.abstractmethod
    def get_storage(self, ctxt: Any, connection_info: Json, target_environment: Json) -> Json:
        """The storage types as vm_storage."""


class BaseEndpointSourceOptionsProvider(abc.ABC):
    """An endpoint that knows the values its source settings may take."""

    @abc.abstractmethod
    def get_source_environment_options(
        self,
        ctxt: Any,
        connection_info: Json,
        env: Json | None = None,
        option_names: list[str] | None = None,
    ) -> list[Json]:
        """The values, narrowed by the settings chosen so far; all options when `option_names` is empty."""


class BaseEndpointInventoryExportProvider(abc.ABC):
    """An endpoint whose machines can be exported as a table."""

    @abc.abstractmethod
    def export_instance_inventory(self, ctxt: Any, connection_info: Json, source_environment: Json) -> str:
        """CSV with a header, one line a machine."""


class BaseReplicaExportProvider(BaseProvider):
    """A source of whole machines, once or again and again."""

    @abc.abstractmethod
    def get_source_environment_schema(self) -> Json:
        """The JSON schema of source environments."""

    @abc.abstractmethod
    def get_replica_instance_info(
        self, ctxt: Any, connection_info: Json, source_environment: Json, instance_name: str
    ) -> Json:
        """The machine as vm_export_info."""

    @abc.abstractmethod
    def deploy_replica_source_resources(
        self, ctxt: Any, connection_info: Json, export_info: Json, source_environment: Json
    ) -> Json:
        """Make what reading disks needs: {"migr_resources", "connection_info"}. Undoes itself on error."""

    @abc.abstractmethod
    def delete_replica_source_resources(
        self, ctxt: Any, connection_info: Json, source_environment: Json, migr_resources_dict: Json
    ) -> None:
        """Delete what `deploy_replica_source_resources` made, and what any later step left. Idempotent."""

    @abc.abstractmethod
    def replicate_disks(
        self,
        ctxt: Any,
        connection_info: Json,
        source_environment: Json,
        instance_name: str,
        source_resources: Json,
        source_conn_info: Json,
        target_conn_info: Json,
        volumes_info: list[Json],
        incremental: bool,
    ) -> list[Json]:
        """Bring the volumes up to date; the whole of `volumes_info` with new states."""

    @abc.abstractmethod
    def delete_replica_source_snapshots(
        self, ctxt: Any, connection_info: Json, source_environment: Json, volumes_info: list[Json]
    ) -> list[Json]:
        """Delete what is kept at the source between runs; the whole of `volumes_info` without our keys."""

    @abc.abstractmethod
    def shutdown_instance(
        self, ctxt: Any, connection_info: Json, source_environment: Json, instance_name: str
    ) -> None:
        """Stop the machine and wait until it is stopped. Idempotent."""

    @abc.abstractmethod
    def get_os_morphing_tools(self, os_type: str, osmorphing_info: Json) -> list[type]:
        """Tools that change the migrated system for its new platform."""


class BaseReplicaExportValidationProvider(abc.ABC):
    """A source that can say beforehand what would go wrong."""

    @abc.abstractmethod
    def validate_replica_export_input(
        self, ctxt: Any, connection_info: Json, instance_name: str, source_environment: Json
    ) -> Json:
        """Raise when the machine could not be exported with these settings."""


class BaseUpdateSourceReplicaProvider(abc.ABC):
    """A source whose settings may change between executions."""

    @abc.abstractmethod
    def check_update_source_environment_params(
        self,
        ctxt: Any,
        connection_info: Json,
        instance_name: str,
        volumes_info: list[Json],
        old_params: Json,
        new_params: Json,
    ) -> list[Json]:
        """Raise when the change cannot be made; the volumes with the states that are still of use."""


class BaseSourceMinionPoolProvider(abc.ABC):
    """A source that keeps worker machines warm between transfers."""

    @abc.abstractmethod
    def get_minion_pool_environment_schema(self) -> Json:
        """The JSON schema of pool environments."""

    @abc.abstractmethod
    def get_minion_pool_options(
        self,
        ctxt: Any,
        connection_info: Json,
        env: Json | None = None,
        option_names: list[str] | None = None,
    ) -> list[Json]:
        """The values that pool settings may take."""

    @abc.abstractmethod
    def validate_minion_pool_environment_options(
        self, ctxt: Any, connection_info: Json, environment_options: Json
    ) -> None:
        """Raise when no worker could be made with these settings."""

    @abc.abstractmethod
    def set_up_pool_shared_resources(
        self, ctxt: Any, connection_info: Json, environment_options: Json, pool_identifier: str
    ) -> Json:
        """Make what all workers of a pool share."""

    @abc.abstractmethod
    def tear_down_pool_shared_resources(
        self, ctxt: Any, connection_info: Json, environment_options: Json, pool_shared_resources: Json
    ) -> None:
        """Delete it."""

    @abc.abstractmethod
    def create_minion(
        self,
        ctxt: Any,
        connection_info: Json,
        environment_options: Json,
        pool_identifier: str,
        pool_os_type: str,
        pool_shared_resources: Json,
        new_minion_identifier: str,
    ) -> Json:
        """A running worker: {connection_info, minion_provider_properties, backup_writer_connection_info}."""

    @abc.abstractmethod
    def delete_minion(self, ctxt: Any, connection_info: Json, minion_properties: Json) -> None:
        """Delete a worker."""

    @abc.abstractmethod
    def start_minion(self, ctxt: Any, connection_info: Json, minion_properties: Json) -> None:
        """Start a worker that was shut down."""

    @abc.abstractmethod
    def shutdown_minion(self, ctxt: Any, connection_info: Json, minion_properties: Json) -> None:
        """Shut a worker down, so that it costs nothing."""

    @abc.abstractmethod
    def healthcheck_minion(
        self, ctxt: Any, connection_info: Json, minion_properties: Json, minion_connection_info: Json
    ) -> None:
        """Raise when a worker cannot be used."""

    @abc.abstractmethod
    def attach_volumes_to_minion(
        self,
        ctxt: Any,
        connection_info: Json,
        minion_properties: Json,
        minion_connection_info: Json,
        volumes_info: list[Json],
    ) -> Json:
        """Never called on the source side."""

    @abc.abstractmethod
    def detach_volumes_from_minion(
        self,
        ctxt: Any,
        connection_info: Json,
        minion_properties: Json,
        minion_connection_info: Json,
        volumes_info: list[Json],
    ) -> Json:
        """Never called on the source side."""

    @abc.abstractmethod
    def validate_minion_compatibility_for_transfer(
        self,
        ctxt: Any,
        connection_info: Json,
        export_info: Json,
        environment_options: Json,
        minion_properties: Json,
    ) -> None:
        """Raise when this worker cannot read that machine's disks."""


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
