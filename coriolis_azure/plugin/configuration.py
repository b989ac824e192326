"""The orchestrator's configuration file: the group with our options, its proxy, its password for temporary keys.

The options are defaults for settings that a source environment or a connection leaves out. Their names are those in
the orchestrator's documentation of Azure as a source. Without oslo.config there are no options.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any
from urllib.parse import quote, urlsplit

from .. import settings
from ..errors import InvalidInput
from ..model import Json

try:
    cfg: Any = importlib.import_module("oslo_config.cfg")
except ImportError:
    cfg = None

LOG = logging.getLogger(__name__)

GROUP = "azure_migration_provider"
# Option -> the property of a source environment whose default it is.
_ENVIRONMENT = {
    "export_location": "location",
    "export_worker_size": "export_worker_size",
    "export_worker_image": "export_worker_image",
}
# Option -> the resource provider whose API version it sets.
_VERSIONS = {
    "export_arm_resource_api_version": "Microsoft.Resources",
    "export_arm_compute_api_version": "Microsoft.Compute",
    "export_arm_network_api_version": "Microsoft.Network",
    "export_blob_storage_api_version": "Microsoft.Storage",
}
_HELP = {
    "export_location": "Azure location of VMs and temporary resources, unless a source environment names one.",
    "export_worker_size": "Size of the temporary worker VM, unless a source environment names one.",
    "export_worker_image": "Image of the temporary worker VM: publisher, offer, sku and version.",
    **{
        name: f"API version for {provider}, for an older Azure Stack." for name, provider in _VERSIONS.items()
    },
}


def register() -> None:
    """Register the options; if another plugin has already registered one of the same name, that one is used."""
    if cfg is None:
        return
    for name, help in _HELP.items():
        kind = cfg.DictOpt if name == "export_worker_image" else cfg.StrOpt
        try:
            cfg.CONF.register_opt(kind(name, help=help), GROUP)
        except cfg.DuplicateOptError:
            LOG.info("[%s] %s is registered already", GROUP, name)


def quiet() -> None:
    """Keep the INFO messages of Azure's SDKs (each request, each token) out of the logs, unless a level is set."""
    sdks = logging.getLogger("azure")
    if sdks.level == logging.NOTSET:
        sdks.setLevel(logging.WARNING)


def environment_defaults() -> Json:
    """The configured defaults of source environments."""
    return {name: value for option, name in _ENVIRONMENT.items() if (value := _value(option))}


def filled_environment(source_environment: Json) -> Json:
    """The source environment with the configured defaults for what it leaves out."""
    return {**environment_defaults(), **settings.document("source_environment", source_environment)}


def filled_connection(connection_info: Json) -> Json:
    """The connection with the configured API versions, except those that it sets itself."""
    settings.document("connection_info", connection_info)
    versions = {provider: value for option, provider in _VERSIONS.items() if (value := _value(option))}
    custom = connection_info.get("custom_cloud_properties", {})
    if not versions or not isinstance(custom, dict):
        return connection_info
    versions |= custom.get("api_versions") or {}
    return {**connection_info, "custom_cloud_properties": {**custom, "api_versions": versions}}


def proxy() -> tuple[str, tuple[str, ...]] | None:
    """The proxy in the orchestrator's group `[proxy]`: the URL with its credentials, and the hosts to exclude."""
    options = _orchestrators("osmorphing.manager", "proxy")
    if not options or not options.url:
        return None
    parts = urlsplit(options.url if "://" in options.url else f"http://{options.url}")
    if not parts.hostname:
        raise InvalidInput("[proxy] url names no host", remedy="Write it as http://host:port.")
    if options.username and "@" not in parts.netloc:
        login = ":".join(quote(part, safe="") for part in (options.username, options.password) if part)
        parts = parts._replace(netloc=f"{login}@{parts.netloc}")
    return parts.geturl(), tuple(name.strip().lstrip(".").lower() for name in options.no_proxy)


def temporary_keys_password() -> str:
    """The password that encrypts keys of temporary machines on their way between tasks; "" for none."""
    options = _orchestrators("tasks.base", "serialization")
    return (options and options.temp_keypair_password) or ""


def _orchestrators(module: str, group: str) -> Any:
    """The orchestrator's own options in `group`; None without an orchestrator.

    `module` registers them; not every process of the orchestrator has loaded it.
    """
    if cfg is None:
        return None
    try:
        importlib.import_module(f"coriolis.{module}")
        return cfg.CONF[group]
    except (ImportError, cfg.NoSuchOptError):
        return None


def _value(option: str) -> Any:
    return cfg.CONF[GROUP][option] if cfg else None
