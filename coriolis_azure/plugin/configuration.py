"""The orchestrator's configuration file: its group of our options, its proxy, its password for temporary keys.

The options are defaults for what a source environment and a connection leave out. Their names are those that
the orchestrator's documentation has for Azure as a source. Without oslo.config there is none of it.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any
from urllib.parse import quote, urlsplit

from ..errors import InvalidInput
from ..model import Json

try:
    cfg: Any = importlib.import_module("oslo_config.cfg")
except ImportError:
    cfg = None

LOG = logging.getLogger(__name__)

GROUP = "azure_migration_provider"
# Option, and the property of a source environment that it is the default of.
_ENVIRONMENT = {
    "export_location": "location",
    "export_worker_size": "export_worker_size",
    "export_worker_image": "export_worker_image",
}
# Option, and the resource provider whose API version it sets.
_VERSIONS = {
    "export_arm_resource_api_version": "Microsoft.Resources",
    "export_arm_compute_api_version": "Microsoft.Compute",
    "export_arm_network_api_version": "Microsoft.Network",
    "export_blob_storage_api_version": "Microsoft.Storage",
}
_HELP = {
    "export_location": "Azure location of VMs and temporary resources where a source environment names none.",
    "export_worker_size": "Size of the temporary worker VM where a source environment names none.",
    "export_worker_image": "Image of the temporary worker VM: publisher, offer, sku and version.",
    **{
        name: f"API version for {provider}, for an older Azure Stack." for name, provider in _VERSIONS.items()
    },
}


def register() -> None:
    """Register the options, unless another plugin has options of these names already: then those are read."""
    if cfg is None:
        return
    for name, help in _HELP.items():
        kind = cfg.DictOpt if name == "export_worker_image" else cfg.StrOpt
        try:
            cfg.CONF.register_opt(kind(name, help=help), GROUP)
        except cfg.DuplicateOptError:
            LOG.info("[%s] %s is registered already", GROUP, name)


def quiet() -> None:
    """Keep what Azure's SDKs log of each request and each token out of logs at INFO, unless a level is configured."""
    sdks = logging.getLogger("azure")
    if sdks.level == logging.NOTSET:
        sdks.setLevel(logging.WARNING)


def environment_defaults() -> Json:
    """What is configured for source environments."""
    return {name: value for option, name in _ENVIRONMENT.items() if (value := _value(option))}


def filled_connection(connection_info: Json) -> Json:
    """The connection with the API versions that are configured, where it does not say others itself."""
    versions = {provider: value for option, provider in _VERSIONS.items() if (value := _value(option))}
    custom = connection_info.get("custom_cloud_properties", {})
    if not versions or not isinstance(custom, dict):
        return connection_info
    versions |= custom.get("api_versions") or {}
    return {**connection_info, "custom_cloud_properties": {**custom, "api_versions": versions}}


def proxy() -> tuple[str, tuple[str, ...]] | None:
    """The proxy of the orchestrator's group `[proxy]`: its URL with the credentials in it, and the exceptions."""
    told = _orchestrators("osmorphing.manager", "proxy")
    if not told or not told.url:
        return None
    parts = urlsplit(told.url if "://" in told.url else f"http://{told.url}")
    if not parts.hostname:
        raise InvalidInput("[proxy] url names no host", remedy="Write it as http://host:port.")
    if told.username and "@" not in parts.netloc:
        login = ":".join(quote(part, safe="") for part in (told.username, told.password) if part)
        parts = parts._replace(netloc=f"{login}@{parts.netloc}")
    return parts.geturl(), tuple(name.strip().lstrip(".").lower() for name in told.no_proxy)


def temporary_keys_password() -> str:
    """The password that keys of temporary machines are encrypted with on their way between tasks; "" for none."""
    told = _orchestrators("tasks.base", "serialization")
    return (told and told.temp_keypair_password) or ""


def _orchestrators(module: str, group: str) -> Any:
    """The orchestrator's own options of `group`, None without it.

    They are registered by a module that not every one of its processes loads.
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
