"""Older Azures: an Azure Stack Hub answers to one API version of each type, and knows none of the newer properties."""

from __future__ import annotations

import re

from coriolis_azure import errors
from coriolis_azure.sandbox.wire import ArmError, Json, Request

# By profile, what is offered: API versions by lower-cased provider or type.
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
# Properties that came with later versions.
_LATER = re.compile(
    r'"(deleteOption|networkAccessPolicy|publicNetworkAccess|securityProfile|dataAccessAuthMode|userData)":'
)


def known(name: str) -> str:
    """The profile of that name; InvalidInput for another."""
    if name not in PROFILES:
        raise errors.InvalidInput(f"{name!r} is no API profile of the sandbox: {', '.join(PROFILES)}")
    return name


def offered(profile: str, type_: str) -> str | None:
    """The one API version of a resource type; None where the profile offers all."""
    versions = PROFILES[profile]
    return versions.get(type_.lower(), versions.get(type_.lower().partition("/")[0]))


def check(profile: str, request: Request) -> None:
    """Refuse a request with another version than the profile's, or with what that version does not know."""
    found = _PROVIDER.match(request.path)
    if found is None or "operation" in request.path.lower():
        return
    type_ = found[1]
    version, asked = offered(profile, type_), request.query.get("api-version", "")
    if version is None:
        return
    if asked != version:
        raise ArmError(
            400,
            "NoRegisteredProviderFound",
            f"No registered resource provider found for API version '{asked}' for type '{type_}'. The supported "
            f"api-versions are '{version}'.",
        )
    later = _LATER.search(request.body.decode(errors="replace").replace('": ', '":'))
    if later:
        raise ArmError(400, "BadRequest", f"Could not find member '{later[1]}' on object of type '{type_}'.")


def provider(profile: str, document: Json) -> Json:
    """A provider's document with the profile's API versions."""
    types = [
        {**each, "apiVersions": [version]}
        if (version := offered(profile, f"{document['namespace']}/{each['resourceType']}"))
        else each
        for each in document["resourceTypes"]
    ]
    return {**document, "resourceTypes": types}
