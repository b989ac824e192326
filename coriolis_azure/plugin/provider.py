"""The plugin that the orchestrator loads. Each method takes JSON, calls the core once and returns JSON.

Nothing is kept between calls: each may run in another process, on another host. Heavy modules are imported only by
the calls that need them, because the orchestrator imports every plugin at each look-up. Errors are translated to the
orchestrator's own, with the remedy in their text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from .. import settings
from ..clock import Clock
from ..errors import CleanupIncomplete, CoriolisAzureError, InvalidInput, exhausted
from ..events import Copied, Event, Notice, Step, Waiting, amount, line, logged, unfailing
from ..model import Disk, Json, Machine, Run, Worker
from ..run.interrupts import ended_with_parent
from ..threads import Lock
from . import base, configuration

if TYPE_CHECKING:
    from ..azure.client import Azure
    from ..azure.transport import Transport
    from ..results import DiskReport
    from ..source import Source
    from ..transfer import Outcome
    from ..worker.pool import Pool
    from .writer import Volumes

LOG = logging.getLogger(__name__)
configuration.register()
configuration.quiet()
# Users watch these updates, and the orchestrator's database keeps every one.
_SECONDS_BETWEEN_STEPS = 1.0
_SECONDS_BETWEEN_WAITS = 60.0

F = TypeVar("F", bound=Callable[..., Any])


def _ended_with_service(method: F) -> F:
    """Interrupt the method, so that it undoes what it made, when the service waiting for its result is gone."""

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        with ended_with_parent():
            return method(*arguments, **options)

    return call  # type: ignore[return-value]


def _translated(method: F) -> F:
    """Translate the method's errors to the orchestrator's."""

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except CoriolisAzureError as error:
            connection = method.__name__ == "validate_connection"
            raise base.orchestrators_error(error, connection=connection) from error
        except Exception as error:
            if limit := exhausted(error):
                raise base.orchestrators_error(limit) from error
            raise

    return call  # type: ignore[return-value]


class AzureExportProvider(
    base.BaseEndpointInstancesProvider,
    base.BaseEndpointNetworksProvider,
    base.BaseEndpointStorageProvider,
    base.BaseEndpointSourceOptionsProvider,
    base.BaseEndpointInventoryExportProvider,
    base.BaseReplicaExportProvider,
    base.BaseReplicaExportValidationProvider,
    base.BaseUpdateSourceReplicaProvider,
    base.BaseSourceMinionPoolProvider,
):
    """The source plugin for Azure. `event_handler` is the orchestrator's; None in calls about an endpoint.

    Example: list the VMs, as the orchestrator does. We do not use the first argument, the orchestrator's context.

        from coriolis_azure import AzureExportProvider

        provider = AzureExportProvider()
        provider.validate_connection(None, connection_info)
        for vm in provider.get_instances(None, connection_info, source_environment):
            print(vm["instance_name"])

    Methods raise the orchestrator's exceptions if it is installed, otherwise those of `errors`; their text includes the
    remedy. Arguments and results are the JSON values that the orchestrator's schemas describe.
    """

    platform = "azure"

    def __init__(self, event_handler: Any = None) -> None:
        # A handler that fails, perhaps because the task was cancelled, must not break a transfer or a clean-up.
        self._report = unfailing(_ProgressUpdates(event_handler))

    # The endpoint

    def get_connection_info_schema(self) -> Json:
        """The JSON schema of connection infos."""
        return settings.schema("connection_info")

    def get_source_environment_schema(self) -> Json:
        """The JSON schema of source environments. Settings with a configured default are optional."""
        return _optional(settings.schema("source_environment"))

    @_translated
    def validate_connection(self, ctxt: Any, connection_info: Json) -> None:
        """Sign in and look up the subscription; an error names the setting at fault."""
        with _azure(connection_info) as azure:
            azure.validate()

    @_translated
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
        """A page of machines as vm_instance_info, in the order of their ids.

        Every page but the last is full. Nothing is cached, so `refresh` has no effect.
        """
        from ..machine import listing
        from . import catalog

        with _azure(connection_info) as azure:
            vms = listing.machines(azure, _chosen(connection_info, source_environment))
            page = catalog.page(vms, after=last_seen_id, limit=limit, pattern=instance_name_pattern)
            return catalog.instances(azure, page, vms)

    @_translated
    def get_instance(
        self, ctxt: Any, connection_info: Json, source_environment: Json, instance_name: str
    ) -> Json:
        """One machine as vm_export_info; `instance_name` is a name or an ARM id."""
        from ..machine import export_info, inspection, listing

        with _azure(connection_info) as azure:
            vms = listing.machines(azure, _chosen(connection_info, source_environment))
            vm = listing.called(vms, instance_name)
            return export_info.export_info(inspection.any_machine(azure, vm["id"]))

    @_translated
    def get_networks(self, ctxt: Any, connection_info: Json, env: Json) -> list[Json]:
        """All subnets, as vnet/subnet."""
        from . import catalog

        with _azure(connection_info) as azure:
            return catalog.networks(azure, _chosen(connection_info, env))

    @_translated
    def get_storage(self, ctxt: Any, connection_info: Json, target_environment: Json) -> Json:
        """The account types (SKUs) of all existing disks, by which destinations map storage."""
        from . import catalog

        with _azure(connection_info) as azure:
            types = catalog.disk_types(azure, _chosen(connection_info, target_environment))
        return {"storage_backends": [{"id": name, "name": name} for name in types]}

    @_translated
    def get_source_environment_options(
        self,
        ctxt: Any,
        connection_info: Json,
        env: Json | None = None,
        option_names: list[str] | None = None,
    ) -> list[Json]:
        """The possible values of source settings, as read from Azure now, with configured defaults."""
        from . import catalog

        defaults = configuration.environment_defaults()
        chosen = configuration.filled_environment(env or {})
        with _azure(connection_info) as azure:
            return catalog.options(azure, chosen, option_names or (), defaults)

    @_translated
    def export_instance_inventory(self, ctxt: Any, connection_info: Json, source_environment: Json) -> str:
        """A table of the machines as CSV."""
        from . import catalog

        with _azure(connection_info) as azure:
            return catalog.inventory(azure, _chosen(connection_info, source_environment))

    # A transfer

    @_translated
    def validate_replica_export_input(
        self, ctxt: Any, connection_info: Json, instance_name: str, source_environment: Json
    ) -> Json:
        """Check everything that can be known before anything is made or shut down; return vm_export_info.

        InvalidInput lists everything that would make a run fail; warnings are reported.
        """
        from ..machine.export_info import export_info

        with self._source(connection_info, source_environment) as source:
            checked = source.check(instance_name, volumes=True)
        for finding in checked.findings:
            if finding.severity == "warning":
                self._report(Notice(finding.text_with_remedy))
        return export_info(checked.checked_machine())

    @_translated
    def get_replica_instance_info(
        self, ctxt: Any, connection_info: Json, source_environment: Json, instance_name: str
    ) -> Json:
        """The machine as vm_export_info."""
        from ..machine.export_info import export_info

        with self._source(connection_info, source_environment) as source:
            return export_info(source.inspect(instance_name))

    @_translated
    @_ended_with_service
    def deploy_replica_source_resources(
        self, ctxt: Any, connection_info: Json, export_info: Json, source_environment: Json
    ) -> Json:
        """Begin a run, and boot a worker if one is going to read disks; without one, `connection_info` is empty.

        A failure leaves nothing behind, because the orchestrator would not call us to clean up.
        """
        with self._source(connection_info, source_environment) as source:
            run, worker = source.prepare(export_info["id"])
        disks = export_info.get("devices", {}).get("disks", [])
        resources = {"run": run.to_json(), "vhds": _vhds(disk["id"] for disk in disks)}
        if worker is None:
            return {"migr_resources": resources, "connection_info": {}}
        return {
            "migr_resources": {**resources, **_worker_resources(run, worker)},
            "connection_info": _worker_connection(worker),
        }

    @_translated
    def delete_replica_source_resources(
        self, ctxt: Any, connection_info: Json, source_environment: Json, migr_resources_dict: Json
    ) -> None:
        """Delete everything of the run, whichever step made it. CleanupIncomplete names what could not be deleted."""
        run = _run(migr_resources_dict)
        with self._source(connection_info, source_environment) as source:
            left_behind = source.finish(run, vhds=migr_resources_dict.get("vhds") or ())
        if left_behind:
            raise CleanupIncomplete(f"could not delete: {', '.join(left_behind)}", left_behind=left_behind)

    @_translated
    @_ended_with_service
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
        """Snapshot and copy every disk that has a volume; return `volumes_info` with the new states.

        `incremental` is ignored: the orchestrator always passes True, and a volume's state tells what it holds.
        """
        from ..run.cleanup import DEAD_AFTER
        from . import writer
        from .claims import Claimant

        run = _run(source_resources)
        _check_volumes(volumes_info)
        worker = _worker(source_resources, source_conn_info) if source_resources.get("worker") else None
        with self._source(connection_info, source_environment) as source:
            machine = source.inspect(instance_name)
            if run.pool:
                run = replace(source.new_run(machine), zone=run.zone)
                source.sweep(DEAD_AFTER)
            compress = source.environment.enable_transfer_compression == "always"
            in_blobs = bool(source.environment.storage_account_name)
            volumes = writer.Volumes(
                writer.backend(target_conn_info, self._report, compress=compress),
                volumes_info,
                source.chosen(machine),
                Claimant(run.id, source.records(run), self._report),
                container=partial(source.in_container, machine) if in_blobs else None,
            )
            with volumes:
                source.delete_leftovers(
                    run, volumes.fenced, _vhds(volume["disk_id"] for volume in volumes_info)
                )
                selected = [disk for disk in source.chosen(machine) if disk.name in volumes.names()]
                if selected:
                    for disk in _copied(source, run, worker, machine, selected, volumes):
                        self._report(Step(f"copied {disk.name}", _figures(disk)))
                return volumes.to_json()

    @_translated
    def delete_replica_source_snapshots(
        self, ctxt: Any, connection_info: Json, source_environment: Json, volumes_info: list[Json]
    ) -> list[Json]:
        """Delete the baselines of the volumes and drop their states, so that the next execution is a full one.

        Volumes that are VHDs in Blob storage are deleted, because no destination plugin does that.
        """
        from . import states, writer

        _check_volumes(volumes_info)
        vhds = [volume[states.VHD] for volume in volumes_info if volume.get(states.VHD)]
        if vhds:
            with self._source(connection_info, source_environment) as source:
                source.remove(vhds)
        self._forget(connection_info, source_environment, volumes_info)
        return [writer.forgotten(volume) for volume in volumes_info]

    @_translated
    def shutdown_instance(
        self, ctxt: Any, connection_info: Json, source_environment: Json, instance_name: str
    ) -> None:
        """Deallocate the VM and wait until that is done."""
        with self._source(connection_info, source_environment) as source:
            source.deallocate(source.inspect(instance_name))

    @_translated
    def check_update_source_environment_params(
        self,
        ctxt: Any,
        connection_info: Json,
        instance_name: str,
        volumes_info: list[Json],
        old_params: Json,
        new_params: Json,
    ) -> list[Json]:
        """Refuse changes that would select another machine; return the volumes, marked as no longer blank.

        The location and the resource group identify the machine, so they cannot change; nor can the container while
        it holds volumes. Another chunk size means a full run. Everything else may change between executions.
        """
        from . import states, writer

        _check_volumes(volumes_info)
        group = settings.Connection.from_json(connection_info).default_resource_group
        old_environment = configuration.filled_environment(old_params)
        changes = settings.document("source_environment", new_params)
        old = settings.Environment.from_json(old_environment, group)
        new = settings.Environment.from_json({**old_environment, **changes}, group)
        for name in ("location", "resource_group"):
            before, after = getattr(old, name), getattr(new, name)
            if before.lower() != after.lower():
                raise InvalidInput(
                    f"{name} cannot change from {before} to {after}: {instance_name} would be another machine",
                    remedy="Create a new transfer for the machine there.",
                )
        for name in ("storage_account_name", "storage_container_name"):
            before, after = getattr(old, name), getattr(new, name)
            if before != after and any(volume.get(states.VHD) for volume in volumes_info):
                raise InvalidInput(
                    f"{name} cannot change from {before} to {after or 'nothing'}: it holds the replica of "
                    f"{instance_name}",
                    remedy="Delete the disks of the transfer first.",
                )
        return [writer.no_longer_blank(volume) for volume in volumes_info]

    def get_os_morphing_tools(self, os_type: str, osmorphing_info: Json) -> list[type]:
        """None: leaving Azure needs no change in the guest, and the destination has its own tools."""
        return []

    # Worker pools

    def get_minion_pool_environment_schema(self) -> Json:
        """The JSON schema of pool environments. Settings with a configured default are optional."""
        return _optional(settings.pool_schema())

    def get_minion_pool_options(
        self,
        ctxt: Any,
        connection_info: Json,
        env: Json | None = None,
        option_names: list[str] | None = None,
    ) -> list[Json]:
        """The possible values of pool settings, as read from Azure now."""
        known = settings.pool_schema()["properties"]
        options: list[Json] = self.get_source_environment_options(ctxt, connection_info, env, option_names)
        return [option for option in options if option["name"] in known]

    @_translated
    def validate_minion_pool_environment_options(
        self, ctxt: Any, connection_info: Json, environment_options: Json
    ) -> None:
        """Raise an error if no worker can be made with these settings."""
        from ..azure import permissions
        from ..checks import preflight

        with self._pool(connection_info, environment_options) as pool:
            preflight.check(pool.context, None, uses={permissions.POOL}, may_use=()).require()

    @_translated
    @_ended_with_service
    def set_up_pool_shared_resources(
        self, ctxt: Any, connection_info: Json, environment_options: Json, pool_identifier: str
    ) -> Json:
        """Create the network that all workers of a pool share."""
        with self._pool(connection_info, environment_options, pool_identifier) as pool:
            run, subnet = pool.share()
        return {"run": run.to_json(), "subnet": subnet}

    @_translated
    def tear_down_pool_shared_resources(
        self, ctxt: Any, connection_info: Json, environment_options: Json, pool_shared_resources: Json
    ) -> None:
        """Delete the network that the workers of a pool shared, and anything else that is left of the pool."""
        if not pool_shared_resources:
            return
        run = _run(pool_shared_resources)
        with self._pool(connection_info, environment_options) as pool:
            pool.remove_shared(run)

    @_translated
    @_ended_with_service
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
        """Boot a worker of the pool and wait until it is reachable."""
        if pool_os_type != "linux":
            raise InvalidInput(
                f"there is no worker for {pool_os_type}",
                remedy="Create a Linux pool; its workers read any disk.",
            )
        with self._pool(connection_info, environment_options, pool_identifier) as pool:
            run, worker = pool.add(new_minion_identifier, pool_shared_resources["subnet"])
        properties = {**_worker_resources(run, worker), "environment": environment_options}
        return {
            "connection_info": _worker_connection(worker),
            "minion_provider_properties": properties,
            "backup_writer_connection_info": {},
        }

    @_translated
    def delete_minion(self, ctxt: Any, connection_info: Json, minion_properties: Json) -> None:
        """Delete a worker of a pool."""
        if not minion_properties:
            return
        run = _run(minion_properties)
        with self._pool(connection_info, minion_properties["environment"]) as pool:
            pool.remove(run)

    @_translated
    def start_minion(self, ctxt: Any, connection_info: Json, minion_properties: Json) -> None:
        """Start a worker that was shut down."""
        with self._pool(connection_info, minion_properties["environment"]) as pool:
            pool.start(minion_properties["worker"]["vm"])

    @_translated
    def shutdown_minion(self, ctxt: Any, connection_info: Json, minion_properties: Json) -> None:
        """Deallocate a worker, so that only its disk is charged."""
        with self._pool(connection_info, minion_properties["environment"]) as pool:
            pool.stop(minion_properties["worker"]["vm"])

    @_translated
    def healthcheck_minion(
        self, ctxt: Any, connection_info: Json, minion_properties: Json, minion_connection_info: Json
    ) -> None:
        """Raise an error if a worker is unusable; the orchestrator then makes another one."""
        with self._pool(connection_info, minion_properties["environment"]) as pool:
            pool.check_health(_worker(minion_properties, minion_connection_info))

    def attach_volumes_to_minion(
        self,
        ctxt: Any,
        connection_info: Json,
        minion_properties: Json,
        minion_connection_info: Json,
        volumes_info: list[Json],
    ) -> Json:
        """Do nothing: on the source side `replicate_disks` attaches disks."""
        return {"volumes_info": volumes_info, "minion_properties": minion_properties}

    def detach_volumes_from_minion(
        self,
        ctxt: Any,
        connection_info: Json,
        minion_properties: Json,
        minion_connection_info: Json,
        volumes_info: list[Json],
    ) -> Json:
        """Do nothing: on the source side `replicate_disks` detaches disks."""
        return {"volumes_info": volumes_info, "minion_properties": minion_properties}

    @_translated
    def validate_minion_compatibility_for_transfer(
        self,
        ctxt: Any,
        connection_info: Json,
        export_info: Json,
        environment_options: Json,
        minion_properties: Json,
    ) -> None:
        """Raise an error if this worker cannot read the machine's disks."""
        with self._pool(connection_info, minion_properties["environment"]) as pool:
            pool.check_fits(export_info.get("location") or environment_options["location"])

    def _forget(self, connection_info: Json, source_environment: Json, volumes_info: list[Json]) -> None:
        """Delete the records and the baselines of volumes.

        This must succeed even if Azure can no longer be reached: a record left behind does no harm, and a baseline has
        an end date.
        """
        from . import writer

        try:
            with self._source(connection_info, source_environment) as source:
                for id in writer.record_ids(volumes_info):
                    source.records().delete(id)
                for id in source.disown([writer.owner(volume) for volume in volumes_info]):
                    self._report(Notice(f"could not delete the baseline {id}"))
        except CoriolisAzureError as error:
            self._report(Notice(f"records and baselines of volumes may remain in Azure: {error.message}"))

    @contextmanager
    def _source(self, connection_info: Json, source_environment: Json) -> Iterator[Source]:
        from ..source import Source

        connection, environment = _filled(connection_info, source_environment)
        with Source(
            connection,
            environment,
            report=self._report,
            transport=_transport(connection),
        ) as source:
            source.journals = None  # the tasks of one run are processes of several hosts
            yield source

    @contextmanager
    def _pool(self, connection_info: Json, environment_options: Json, identifier: str = "") -> Iterator[Pool]:
        from ..azure.context import Context
        from ..worker.pool import Pool

        connection, environment = _filled(connection_info, environment_options)
        group = settings.Connection.from_json(connection).default_resource_group
        typed = settings.Environment.from_json(environment, group)
        with _azure(connection_info) as azure:
            yield Pool(Context.of(azure, typed, Clock(), self._report), identifier)


@contextmanager
def _azure(connection_info: Json) -> Iterator[Azure]:
    from ..azure.client import Azure

    connection, _ = _filled(connection_info, {})
    azure = Azure(settings.Connection.from_json(connection), transport=_transport(connection))
    try:
        yield azure
    finally:
        azure.close()


def _transport(connection_info: Json) -> Transport:
    """HTTPS, through the orchestrator's configured proxy, if any."""
    from ..azure import transport

    configured = configuration.proxy()
    proxy = transport.Proxy(*configured) if configured else None
    return transport.https(settings.Connection.from_json(connection_info), proxy)


def _filled(connection_info: Json, environment: Json) -> tuple[Json, Json]:
    """The connection and the environment, with configured defaults for what they leave out."""
    return (
        configuration.filled_connection(connection_info),
        configuration.filled_environment(environment),
    )


def _optional(schema: Json) -> Json:
    """The schema, with settings that have a configured default made optional."""
    configured = configuration.environment_defaults()
    return {**schema, "required": [name for name in schema["required"] if name not in configured]}


def _chosen(connection_info: Json, environment: Json | None) -> Json:
    """The settings chosen so far or configured; the resource group defaults to the connection's."""
    merged = configuration.filled_environment(environment or {})
    chosen = {name: value for name, value in merged.items() if value}
    group = connection_info.get("default_resource_group")
    return {"resource_group": group, **chosen} if group else chosen


def _copied(
    source: Source,
    run: Run,
    worker: Worker | None,
    machine: Machine,
    disks: Sequence[Disk],
    volumes: Volumes,
) -> tuple[DiskReport, ...]:
    """Copy the disks to their volumes; VHD volumes are recorded as one set, like any replica."""
    from ..replica import sets

    place, vhds = volumes.vhds()
    if place is None:
        return source.copy(run, worker, machine, disks, volumes)
    record = sets.begin(place, machine.id, source.begun(run, machine, vhds))

    def publish(outcomes: Sequence[Outcome]) -> None:
        roots = {disk.name: outcome.manifest.root() for disk, outcome in zip(disks, outcomes, strict=True)}
        sets.complete(place, record, {name: roots[name] for name in vhds})

    return source.copy(run, worker, machine, disks, volumes, publish)


def _figures(disk: DiskReport) -> str:
    """A summary of a copied disk, for people."""
    counts = {
        "read": disk.read_bytes,
        "sent": disk.sent_bytes,
        "zeros": disk.zero_bytes,
        "unchanged": disk.skipped_bytes,
    }
    verified = "verified" if disk.verified else "not verified"
    parts = [*(f"{amount(count)} {label}" for label, count in counts.items()), verified]
    if disk.relied_bytes:
        parts.append(f"{amount(disk.relied_bytes)} not read: Azure lists no change there")
    return ", ".join(parts)


def _run(resources: Json) -> Run:
    """The run in what a task has returned. Raises InvalidInput if this version would not have returned it."""
    try:
        run = Run.from_json(resources["run"])
    except (TypeError, KeyError):
        run = None
    if run is None or not run.id or not all(isinstance(value, str) for value in run.to_json().values()):
        raise _damaged()
    return run


def _damaged() -> InvalidInput:
    return InvalidInput(
        "what an earlier task has returned is damaged, or another version of the plugin has returned it",
        remedy="Install one version on all worker hosts and execute the transfer again. What the earlier task has "
        "made is deleted after two hours by the next execution, or by `coriolis-azure cleanup`.",
    )


def _check_volumes(volumes_info: Any) -> None:
    """Raise InvalidInput unless these are volumes, each with the id of its disk."""
    if isinstance(volumes_info, list) and all(
        isinstance(volume, dict) and isinstance(volume.get("disk_id"), str) for volume in volumes_info
    ):
        return
    raise InvalidInput(
        "volumes_info is not a list of volumes, each with the id of its disk",
        remedy="The destination's plugin or the orchestrator's database is at fault: create a new transfer.",
    )


def _worker_resources(run: Run, worker: Worker) -> Json:
    """What another process needs to use and delete a worker, without secrets."""
    return {
        "run": run.to_json(),
        "worker": {"vm": worker.vm, "host_key": worker.host_key, "slots": worker.slots},
    }


def _vhds(disks: Iterable[str]) -> list[str]:
    """The URLs of the disks that are VHDs: they may exist even if the VM no longer has them at clean-up."""
    # The id of a managed disk is its ARM id, a path.
    return [id for id in disks if urlsplit(id).scheme == "https"]


def _worker_connection(worker: Worker) -> Json:
    """How to reach a worker, in the orchestrator's format, with the private key as `password`.

    The orchestrator logs what tasks return and masks `password` but not `pkey`. Its database and debug logs mask
    nothing, so the key is encrypted if a password for temporary keys is configured.
    """
    from ..readers import keys

    key, password = worker.private_key, configuration.temporary_keys_password()
    return {
        "ip": worker.address,
        "port": worker.port,
        "username": worker.username,
        "password": keys.encrypted(key, password) if password else key,
    }


def _worker(resources: Json, connection: Json) -> Worker:
    """The worker, from the results of `_worker_resources` and `_worker_connection`. Raises InvalidInput as `_run`."""
    try:
        worker = Worker(
            vm=resources["worker"]["vm"],
            address=connection["ip"],
            port=connection["port"],
            username=connection["username"],
            host_key=resources["worker"]["host_key"],
            slots=resources["worker"]["slots"],
            private_key=connection.get("password") or "",
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged() from error
    texts = (worker.vm, worker.address, worker.username, worker.host_key, worker.private_key)
    if not all(isinstance(text, str) for text in texts) or {type(worker.port), type(worker.slots)} != {int}:
        raise _damaged()
    return replace(worker, private_key=_opened(worker.private_key))


def _opened(private_key: str) -> str:
    """The private key from `_worker_connection`, decrypted if it is encrypted."""
    from ..readers import keys

    if not private_key:
        raise InvalidInput(
            "the worker's connection info has no password",
            remedy="Run again; if the worker belongs to a pool, refresh the pool.",
        )
    if not private_key.startswith("-----BEGIN ENCRYPTED"):
        return private_key
    try:
        return keys.decrypted(private_key, configuration.temporary_keys_password())
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            "the worker's key is encrypted with a different [serialization] temp_keypair_password than this host's",
            remedy="Configure the same password on all worker hosts. Then run again, or refresh the pool.",
        ) from error


class _ProgressUpdates:
    """Shows events to the orchestrator's users: as lines, and as one progress bar per disk that never goes back.

    Disks are copied concurrently and the orchestrator's handler is not thread-safe, hence the lock.
    """

    def __init__(self, handler: Any, clock: Clock | None = None) -> None:
        self._handler = handler
        self._clock = clock or Clock()
        self._lock = Lock()
        # By disk: the bar, its percentage, and when that was shown.
        self._bars: dict[str, tuple[Any, int, float]] = {}
        self._waits: dict[str, float] = {}  # when each wait was last shown

    def __call__(self, event: Event) -> None:
        """Log the event and show it."""
        logged(event)
        if self._handler is None:
            return
        with self._lock:
            self._show(event)

    def _show(self, event: Event) -> None:
        """Show the event as a progress update; no client of the orchestrator shows its own events."""
        match event:
            case Waiting() if not self._is_due(event):
                pass
            case Copied():
                self._advance(event)
            case _:
                self._handler.add_progress_update(line(event))

    def _is_due(self, event: Waiting) -> bool:
        """Whether to show a wait: it is new, or was last shown a minute ago or earlier."""
        now, shown = self._clock.monotonic(), self._waits.get(event.what)
        due = shown is None or now - shown >= _SECONDS_BETWEEN_WAITS
        if due:
            self._waits[event.what] = now
        return due

    def _advance(self, event: Copied) -> None:
        now = self._clock.monotonic()
        percent = 100 * event.done // event.total
        if event.disk not in self._bars:
            text = f"copying {event.disk} ({amount(event.total)})"
            bar = self._handler.add_progress_update(text, initial_step=0, total_steps=100, return_event=True)
            self._bars[event.disk] = (self._handler.get_progress_update_identifier(bar), 0, now)
        bar, shown, when = self._bars[event.disk]
        finished = event.done == event.total
        if percent > shown and (finished or now - when >= _SECONDS_BETWEEN_STEPS):
            self._handler.update_progress_update(bar, percent)
            self._bars[event.disk] = (bar, percent, now)
