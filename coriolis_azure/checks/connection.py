"""The connection: sign-in, subscription, resource group, location, API versions."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial

from ..errors import CoriolisAzureError, Denied
from ..machine import listing
from .finding import Finding, ask, error, failed, fine, warning
from .subject import Subject


def signed_in(subject: Subject) -> Generator[Finding, None, bool]:
    """Check the sign-in; return whether it makes sense to ask Azure anything else."""
    try:
        subject.context.azure.validate()
    except Denied as raised:
        yield failed("connect", raised)
        return raised.status == 403
    except CoriolisAzureError as raised:
        yield failed("connect", raised)
        return False
    yield fine("connect", f"signed in; subscription {subject.context.azure.subscription} can be read")
    return True


def subscription(subject: Subject) -> Iterator[Finding]:
    """Check the subscription's state: in some states nothing can be created."""
    state = yield from ask("connect", subject.context.azure.subscription_state, optional=True)
    if state in {"Disabled", "Deleted", "Expired"}:
        yield error(
            "connect",
            f"the subscription is {state}: nothing can be created in it",
            "Enable the subscription again.",
        )
    elif state in {"Warned", "PastDue"}:
        yield warning("connect", f"the subscription is {state}", "Pay its bills before Azure disables it.")


def group(subject: Subject) -> Iterator[Finding]:
    """Check that the resource group exists."""
    name = subject.context.environment.resource_group
    if (yield from ask("connect", lambda: subject.context.azure.group(name))):
        yield fine("connect", f"resource group {name} exists")


def location(subject: Subject) -> Iterator[Finding]:
    """Check that the subscription can have VMs in the location."""
    offered = (yield from ask("connect", subject.context.azure.locations, optional=True)) or ()
    yield from ask("connect", lambda: listing.check_location(subject.context.environment.location, offered))


def api_versions(subject: Subject) -> Iterator[Finding]:
    """Check that this Azure offers the API versions in use. An Azure Stack Hub may be older."""
    for namespace in ("Microsoft.Compute", "Microsoft.Network"):
        offered = yield from ask(
            "connect",
            partial(subject.context.azure.offered_versions, namespace),
            optional=True,
        )
        for type_, version in sorted(subject.context.azure.api_versions.items()):
            if version not in (offered or {}).get(type_, [version]):
                newest = max((offered or {})[type_], default="none")
                yield warning(
                    "connect",
                    f"this Azure does not offer {type_} with API version {version}; its newest is {newest}",
                    "Set api_profile or api_versions in custom_cloud_properties of the connection.",
                )
