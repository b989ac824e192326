"""Older Azures: an Azure Stack Hub accepts one API version of each type and none of the newer properties."""

from __future__ import annotations

import re

from coriolis_azure import errors
from coriolis_azure.sandbox.wire import ArmError, Json, Request

# The API versions that each profile supports, by lower-case provider or type.
PROFILES: dict[str, dict[str, str]] = {
    "latest": {},
    "2020-09-01-hybrid": {
        "microsoft.compute": "2020-06-01",
        "microsoft.compute/disks": "2019-07-01",
        "microsoft.compute/snapshots": "2019-07-01",
        "microsoft.compute/skus": "2019-04-01",
        "microsoft.network": "2018-11-01",
        "microsoft.storage": "2019-06-01",
        "microsoft.resources": "2019-10-01",
    },
}
_PROVIDER = re.compile(r".*/providers/(Microsoft\.\w+/\w+)", re.IGNORECASE)
# Properties that later versions introduced.
_LATER = re.compile(
    r'"(deleteOption|networkAccessPolicy|publicNetworkAccess|securityProfile|dataAccessAuthMode|userData)":'
)


def known(name: str) -> str:
    """The name of a profile; InvalidInput if it is unknown."""
    if name not in PROFILES:
        raise errors.InvalidInput(
            f"the sandbox has no API profile {name!r}; use one of {', '.join(PROFILES)}"
        )
    return name


def offered(profile: str, type_: str) -> str | None:
    """The one API version of a resource type; None if the profile supports all."""
    versions = PROFILES[profile]
    return versions.get(type_.lower(), versions.get(type_.lower().partition("/")[0]))


def check(profile: str, request: Request) -> None:
    """Refuse a request with a version other than the profile's, or with properties that are newer."""
    match = _PROVIDER.match(request.path)
    if match is None or "operation" in request.path.lower():
        return
    type_ = match[1]
    version, requested = offered(profile, type_), request.query.get("api-version", "")
    if version is None:
        return
    if requested != version:
        raise ArmError(
            400,
            "NoRegisteredProviderFound",
            f"No registered resource provider found for API version '{requested}' for type '{type_}'. The supported "
            f"api-versions are '{version}'.",
        )
    later = _LATER.search(request.body.decode(errors="replace").replace('": ', '":'))
    if later:
        raise ArmError(400, "BadRequest", f"Could not find member '{later[1]}' on object of type '{type_}'.")


def provider(profile: str, document: Json) -> Json:
    """A provider's document with the profile's API versions."""
    types = [
        {**type_, "apiVersions": [version]}
        if (version := offered(profile, f"{document['namespace']}/{type_['resourceType']}"))
        else type_
        for type_ in document["resourceTypes"]
    ]
    return {**document, "resourceTypes": types}
