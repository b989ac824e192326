"""Settings: validated against the JSON schemas, then typed.

Only the schemas define names, defaults and descriptions; the classes here add types. Each fault is reported as one
line that names the property and what it must be.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .errors import InvalidInput
from .model import Json, at, canonical_location

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

# An installed package contains the schemas; in a checkout they are beside it.
_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "schemas", _HERE.parent / "schemas")

_COMPRESSION = {False: "none", True: "always", "auto": "auto"}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_SECONDS = 36500 * 86400.0
_FASTEST = 1000 << 30
_BYTES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Connection:
    """The cloud, the subscription and the credentials. Schema: connection_info.json. Secrets are not in its `repr`."""

    subscription_id: str
    tenant: str = ""
    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    certificate_path: str = ""
    certificate_password: str = field(default="", repr=False)
    username: str = ""
    password: str = field(default="", repr=False)
    default_resource_group: str = ""
    cloud_profile: str = "AzureCloud"
    endpoints: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=dict)
    api_profile: str = "latest"
    api_versions: Mapping[str, str] = field(default_factory=dict)
    allow_untrusted: bool = False
    ca_bundle: str = ""

    @classmethod
    def from_json(cls, raw: Json) -> Connection:
        """The typed settings. Raises InvalidInput with one line for every fault."""
        settings = checked("connection_info", raw)
        principal, user = (
            settings.get("service_principal_credentials", {}),
            settings.get("user_credentials", {}),
        )
        custom = settings.get("custom_cloud_properties", {})
        connection = cls(
            subscription_id=settings["subscription_id"],
            tenant=settings.get("tenant", "") or principal.get("tenant_id", ""),
            client_id=principal.get("client_id", ""),
            client_secret=principal.get("client_secret", ""),
            certificate_path=principal.get("client_certificate_path", ""),
            certificate_password=principal.get("client_certificate_password", ""),
            username=user.get("username", ""),
            password=user.get("password", ""),
            default_resource_group=settings.get("default_resource_group", ""),
            cloud_profile=settings["cloud_profile"],
            endpoints=custom.get("endpoints", {}),
            suffixes=custom.get("suffixes", {}),
            api_profile=custom.get("api_profile", "latest"),
            api_versions=custom.get("api_versions", {}),
            allow_untrusted=settings["allow_untrusted"],
            ca_bundle=settings.get("ca_bundle", ""),
        )
        faults = connection._faults()
        if faults:
            raise InvalidInput([f"connection_info: {fault}" for fault in faults])
        return connection

    def _faults(self) -> list[str]:
        """The faults that the schema cannot express."""
        faults = []
        if self.client_id and not (self.client_secret or self.certificate_path):
            faults.append(
                "service_principal_credentials: client_secret or client_certificate_path is missing"
            )
        if (self.client_id or self.username) and not self.tenant:
            faults.append("tenant: is required with service_principal_credentials and user_credentials")
        if self.cloud_profile == "AzureGermanCloud":
            faults.append(
                "cloud_profile: AzureGermanCloud was closed in October 2021 with all its subscriptions; Azure's "
                "locations in Germany now belong to AzureCloud"
            )
        if self.cloud_profile == "CustomCloud" and not self.resource_manager:
            faults.append(
                "custom_cloud_properties: endpoints: resource_manager_endpoint (or management_endpoint) is "
                "required with the cloud_profile CustomCloud"
            )
        faults += (
            f"custom_cloud_properties: endpoints: {name}: must be an HTTPS address"
            for name in ("resource_manager_endpoint", "management_endpoint", "active_directory_url")
            if self.endpoints.get(name) and not _is_https(self.endpoints[name])
        )
        if self.ca_bundle and not os.path.isfile(self.ca_bundle):  # noqa: PTH113 - Path's raises if a folder is closed
            faults.append(f"ca_bundle: there is no file {self.ca_bundle}")
        return faults

    @property
    def resource_manager(self) -> str:
        """The resource manager endpoint of a CustomCloud."""
        return self.endpoints.get("resource_manager_endpoint") or self.endpoints.get(
            "management_endpoint", ""
        )


def _is_https(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Image:
    """A marketplace image."""

    publisher: str
    offer: str
    sku: str
    version: str = "latest"

    def __str__(self) -> str:
        return f"{self.publisher}:{self.offer}:{self.sku}:{self.version}"


# The values of replica_export_mechanism.
MECHANISMS = WORKER, SNAPSHOTS, HYBRID, AUTO = "worker", "snapshots", "hybrid", "auto"
DISK, CRASH, APPLICATION = "disk", "crash", "application"  # values of consistency
_FORMER_MECHANISMS: dict[str, str] = {"azure_worker": WORKER}


@dataclass(frozen=True)
class Environment:
    """Where the VMs are, how the worker is created, and how disks are transferred. Schema: source_environment.json.

    Example: the typed form of a source environment, with the defaults filled in.

        from coriolis_azure.settings import Environment

        environment = Environment.from_json({"location": "West Europe", "resource_group": "production"})
        print(environment.location, environment.chunk_size_kib)

    Sizes are in KiB as their names say, `bandwidth_limit` is in bytes per second (None: no limit).
    """

    location: str
    resource_group: str
    export_worker_size: str
    export_worker_image: Image | None
    export_worker_encryption_at_host: bool
    export_worker_disk_encryption_set: str
    storage_account_name: str
    storage_container_name: str
    storage_use_account_key: bool
    replica_export_mechanism: str
    consistency: str
    keep_baseline: bool
    baseline_days: int
    full_every: int
    export_network: str
    export_worker_use_fip: bool
    export_worker_allowed_addresses: tuple[str, ...]
    export_worker_ssh_port: int
    export_worker_data_port: int
    tags: Mapping[str, str]
    exclude_disks: tuple[str, ...]
    chunk_size_kib: int
    leaf_size_kib: int
    enable_transfer_compression: str
    verify_disk_integrity: bool
    bandwidth_limit: int | None

    @property
    def worker_is_open_to_all(self) -> bool:
        """Whether anybody can reach the worker's SSH port."""
        everywhere = {"*", "0.0.0.0/0", "internet"}
        allowed = {address.lower() for address in self.export_worker_allowed_addresses}
        return self.export_worker_use_fip and not allowed.isdisjoint(everywhere)

    @classmethod
    def from_json(cls, raw: Json, default_resource_group: str = "") -> Environment:
        """The typed settings. Raises InvalidInput with one line for every fault."""
        settings = checked("source_environment", raw)
        faults = []
        group = settings.get("resource_group") or default_resource_group
        if not group:
            faults.append("resource_group: is required, as the connection has no default_resource_group")
        named: str = settings["replica_export_mechanism"]
        mechanism = _FORMER_MECHANISMS.get(named, named)
        no_address = mechanism != SNAPSHOTS and not settings["export_worker_use_fip"]
        if no_address and "export_network" not in settings:
            faults.append(
                "export_network: is required if export_worker_use_fip is false: without it, the worker can only be "
                "reached at a public address"
            )
        if ("storage_account_name" in settings) != ("storage_container_name" in settings):
            faults.append("storage_account_name and storage_container_name: must be given together")
        faults += (
            f"export_worker_allowed_addresses: {fault}"
            for fault in _faults_of_sources(settings["export_worker_allowed_addresses"])
        )
        if faults:
            raise InvalidInput([f"source_environment: {fault}" for fault in faults])
        image, limit = settings.get("export_worker_image"), settings.get("bandwidth_limit")
        return cls(
            location=canonical_location(settings["location"]),
            resource_group=group,
            export_worker_size=settings.get("export_worker_size", ""),
            export_worker_image=Image(**image) if image else None,
            export_worker_encryption_at_host=settings["export_worker_encryption_at_host"],
            export_worker_disk_encryption_set=settings.get("export_worker_disk_encryption_set", ""),
            storage_account_name=settings.get("storage_account_name", ""),
            storage_container_name=settings.get("storage_container_name", ""),
            storage_use_account_key=settings["storage_use_account_key"],
            replica_export_mechanism=mechanism,
            consistency=settings["consistency"],
            keep_baseline=settings["keep_baseline"],
            baseline_days=int(settings["baseline_days"]),
            full_every=int(settings["full_every"]),
            export_network=settings.get("export_network", ""),
            export_worker_use_fip=settings["export_worker_use_fip"],
            export_worker_allowed_addresses=tuple(settings["export_worker_allowed_addresses"]),
            export_worker_ssh_port=int(settings["export_worker_ssh_port"]),
            export_worker_data_port=int(settings["export_worker_data_port"]),
            tags=settings["tags"],
            exclude_disks=tuple(settings["exclude_disks"]),
            chunk_size_kib=int(settings["chunk_size_kib"]),
            leaf_size_kib=int(settings["leaf_size_kib"]),
            enable_transfer_compression=_COMPRESSION[settings["enable_transfer_compression"]],
            verify_disk_integrity=settings["verify_disk_integrity"],
            bandwidth_limit=rate(limit) if limit else None,
        )


# Azure's service tags for address ranges: VirtualNetwork, AzureDevOps, AzureCloud.WestEurope; * is any address.
_SERVICE_TAG = re.compile(r"(?!Any$)[A-Z][A-Za-z0-9]+(\.[A-Za-z0-9]+)?|internet|virtualnetwork|\*")


def _faults_of_sources(sources: Sequence[str]) -> Iterator[str]:
    """Yield the reasons why these cannot be the sources of a security rule for a worker with an IPv4 address."""
    networks: list[ipaddress.IPv4Network] = []
    for source in sources:
        if _SERVICE_TAG.fullmatch(source):
            if len(sources) > 1:
                yield f"{source} is a service tag: give it alone, or give addresses only"
            continue
        try:
            network = ipaddress.ip_network(source)
        except ValueError:
            yield f"{source} is {_why_not_a_network(source)}"
            continue
        if isinstance(network, ipaddress.IPv6Network):
            yield f"{source} is an IPv6 range, but the worker has an IPv4 address: give this host's IPv4 address"
            continue
        for other in networks:
            if network.overlaps(other):
                wide, narrow = sorted((network, other), key=lambda range_: range_.prefixlen)
                yield f"{narrow} is part of {wide}: leave it out"
        networks.append(network)


def _why_not_a_network(source: str) -> str:
    try:
        return f"an address within a range: write the range as {ipaddress.ip_network(source, strict=False)}"
    except ValueError:
        return "neither an IPv4 address nor a range such as 192.0.2.0/24"


# The properties that the workers of a pool are created with; those that concern a single transfer are left out.
_POOL = (
    *("location", "resource_group", "export_worker_size", "export_worker_image", "export_network"),
    *("export_worker_encryption_at_host", "export_worker_disk_encryption_set"),
    *("export_worker_use_fip", "export_worker_allowed_addresses", "export_worker_ssh_port"),
    *("export_worker_data_port", "tags"),
)


def pool_schema() -> Json:
    """The JSON schema of a pool's environment: the properties of a source environment that concern the worker."""
    whole = schema("source_environment")
    return {
        **whole,
        "title": "Azure worker pool environment",
        "description": "Where the workers of a pool are, and how they are created.",
        "properties": {name: whole["properties"][name] for name in _POOL},
    }


@cache
def schema(name: str) -> Json:
    """The JSON schema `name`: connection_info or source_environment."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    loaded: Json = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def checked(name: str, raw: Any) -> Json:
    """`raw` with the schema's defaults filled in. Raises InvalidInput with one line for every fault."""
    _check_is_text(name, raw)
    from jsonschema import Draft7Validator  # takes a while to import: not for --help

    rules = schema(name)
    validator = Draft7Validator(rules)
    faults = sorted({_line(name, fault) for fault in validator.iter_errors(raw)})
    if faults:
        raise InvalidInput(faults)
    defaults = {key: rule["default"] for key, rule in rules["properties"].items() if "default" in rule}
    return {**defaults, **raw}


def document(name: str, raw: Any) -> Json:
    """`raw`. Raises InvalidInput if it is not a JSON object."""
    if not isinstance(raw, dict):
        raise InvalidInput(f"{name}: must be of type object, not {_type(raw)}")
    return raw


def _check_is_text(name: str, raw: Any) -> None:
    """Raise InvalidInput if a name or value contains what no text has: control characters or half a character."""
    for where, text in _texts(name, raw):
        for character in text:
            match unicodedata.category(character):
                case "Cc":
                    remedy = "Remove it. A copied value often ends with a line break."
                    raise InvalidInput(f"{where}: contains {character!r}, a control character", remedy=remedy)
                case "Cs":
                    remedy = "Write the character itself instead of its \\u escape."
                    raise InvalidInput(f"{where}: {character!r} is not a character", remedy=remedy)


def _texts(name: str, raw: Any) -> Iterator[tuple[str, str]]:
    """Yield every text in a document, names included, with the place where it is."""
    waiting = [(name, raw)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, str):
            yield where, value
        elif isinstance(value, dict):
            yield from ((where, str(key)) for key in value)
            waiting += ((f"{where}: {key}", item) for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            waiting += ((f"{where}: {n}", item) for n, item in enumerate(value))


def read_json(file: Path) -> Any:
    """Read the document in a settings file. Raises InvalidInput if it is not readable JSON or repeats a name."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> Json:
        names = [name for name, _ in pairs]
        duplicates = [name for name in names if names.count(name) > 1]
        if duplicates:
            raise InvalidInput(f"{file} contains {duplicates[0]!r} twice", remedy="Remove one of the two.")
        return dict(pairs)

    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file} is not a readable JSON file: {error}") from error
    except RecursionError as error:
        raise InvalidInput(f"{file} is not a readable JSON file: it is nested too deeply") from error


def changed(document: Any, changes: Mapping[str, str | None]) -> Any:
    """Settings with those of `changes` that are not None; a document that is no object is returned as it is."""
    if not isinstance(document, dict):
        return document
    return {**document, **{name: value for name, value in changes.items() if value is not None}}


def exposed(file: Path, connection_info: Any) -> list[str]:
    """Warnings about the files with a connection's secrets that every user of this host can read."""
    secrets = (
        *("service_principal_credentials.client_secret", "user_credentials.password"),
        "service_principal_credentials.client_certificate_password",
    )
    key = at(connection_info, "service_principal_credentials.client_certificate_path")
    files = [file] if any(at(connection_info, path) for path in secrets) else []
    files += [Path(key)] if isinstance(key, str) and key else []
    return [
        f"every user of this host can read {path}, which contains a secret: chmod go-rwx {path}"
        for path in files
        if _readable_by_all(path)
    ]


def _readable_by_all(file: Path) -> bool:
    try:
        return bool(file.stat().st_mode & stat.S_IROTH)
    except (OSError, ValueError):  # ValueError: no path at all, such as one with a null character
        return False


def duration(text: str) -> float:
    """The seconds in a duration such as `90s`, `15m`, `2h`, `1d` or `0s`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise InvalidInput(f"{text!r} is not a duration", remedy="Write a duration as 90s, 15m, 2h or 0s.")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _LONGEST_SECONDS:
        raise InvalidInput(f"the duration {text[:40]!r} is too long", remedy="Give at most 36500d.")
    return seconds


def rate(text: str) -> int:
    """The bytes per second in a rate such as `50MiB/s`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]i?|)B/s", text)
    value = float(match[1]) * _BYTES[match[2]] if match else 0
    if value > _FASTEST:
        raise InvalidInput(
            f"the rate {text[:40]!r} is too high", remedy="Give at most 1000GiB/s, or no limit."
        )
    per_second = round(value)
    if per_second < 1:
        number = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)i?B?(?:/s)?", text)
        suggestion = f"{number[1]}{number[2] or 'M'}iB/s" if number and float(number[1]) else "50MiB/s"
        raise InvalidInput(
            f"{text!r} is not a rate",
            remedy=f"Write a rate with its unit, in bytes per second: {suggestion}.",
        )
    return per_second


def _line(name: str, fault: ValidationError) -> str:
    """A fault for people: the property and what it must be, but never its value, which may be a secret."""
    path = ": ".join([name, *(str(part) for part in fault.absolute_path)])
    return f"{path}: {_must_be(fault)}"


def _must_be(fault: ValidationError) -> str:
    rule: Any = fault.validator_value
    instance: Any = fault.instance
    match fault.validator:
        case "required":
            missing = [key for key in rule if key not in instance]
            return f"{', '.join(missing)} is missing"
        case "additionalProperties" if rule is False:
            where: Any = fault.schema
            known = where.get("properties", {})
            return "; ".join(_unknown(key, known) for key in sorted(instance) if key not in known)
        case "type":
            return f"must be of type {rule}, not {_type(instance)}"
        case "enum":
            return f"must be one of {', '.join(str(value) for value in rule)}"
        case "minLength" | "minItems":
            return "must not be empty"
        case "minimum" | "maximum":
            return f"must be {'at least' if fault.validator == 'minimum' else 'at most'} {rule}"
        case "pattern" if "propertyNames" in fault.absolute_schema_path:
            return "has a name that Azure does not accept for a tag, or that starts with coriolis-"
        case "pattern" if isinstance(fault.schema, dict) and "examples" in fault.schema:
            return f"must be written like {fault.schema['examples'][0]}"
        case "pattern":
            return f"must match {rule}"
    return str(fault.message)


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    """The fault for an unknown property, with the one that was probably meant."""
    spellings = {name.replace("_", ""): name for name in known}
    near = difflib.get_close_matches(re.sub("[^a-z0-9]", "", key.lower()), spellings, n=1)
    hint = f"did you mean {spellings[near[0]]}?" if near else f"known are {', '.join(sorted(known))}"
    return f"{key} is not a known property; {hint}"


def _type(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
