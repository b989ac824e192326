"""Checks that the identity has the permissions for every step of a run, each at the scope where it is needed."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial

from ..azure import names, permissions
from ..model import Json
from .finding import Finding, ask, error, fine, warning
from .subject import Subject

_NEED = {
    permissions.SHUTDOWN: "runs that shut the VM down need",
    permissions.POOL: "a pool of workers needs",
    permissions.VOLUMES: "volumes behind the orchestrator's SSH and HTTPS writers need",
}


def permitted(subject: Subject) -> Iterator[Finding]:
    """Check the actions of each step, each at the scope where it must be allowed."""
    chosen = permissions.features(subject.context.environment).union(subject.uses, subject.may_use)
    if any(disk.encryption_set for disk in subject.disks):
        chosen.add(permissions.CUSTOMER_KEYS)

    places = _places(subject)
    roles = dict[str, list[Json] | None]()
    missing: dict[tuple[str, str], tuple[permissions.Action, list[str]]] = {}
    all_allowed = True
    # If two steps need the same action, the one that cannot do without it comes last and wins.
    for action in sorted(permissions.needed(chosen), key=partial(_is_dispensable, subject), reverse=True):
        allowed: dict[str, bool | None] = {}
        for scopes in places.get(action.scope, ()):
            allowed[scopes[-1]] = yield from _allowed(subject, action, scopes, roles)
        all_allowed = all_allowed and all(allowed.values())
        if denied := [scope for scope, answer in allowed.items() if answer is False]:
            missing[action.name, action.scope] = (action, denied)
    for action, denied in missing.values():
        yield _missing(subject, action, denied)
    if all_allowed:
        yield fine("permissions", "the identity has all permissions that the steps need")


def _places(subject: Subject) -> dict[str, list[tuple[str, ...]]]:
    """By scope, the resources on which its actions must be allowed, each preceded by wider scopes to try first."""
    environment, machine = subject.context.environment, subject.machine
    places: dict[str, list[tuple[str, ...]]] = {
        permissions.GROUP: [(subject.group,)],
        permissions.SUBSCRIPTION: [(subject.subscription,)],
    }
    if machine is None:
        places |= {permissions.VM: [(subject.group,)], permissions.DISK: [(subject.group,)]}
    else:
        managed = [disk.id for disk in subject.disks if not disk.unmanaged]
        places[permissions.VM] = [_and_group(subject, machine.id)]
        places[permissions.DISK] = [_and_group(subject, id) for id in managed]
        keys = sorted({disk.encryption_set for disk in subject.disks if disk.encryption_set})
        places[permissions.DISK_KEYS] = [(id,) for id in keys]
    subnet = subject.subnet if environment.export_network else None
    if subnet:
        network = subnet.partition("/subnets/")[0]
        places |= {permissions.NETWORK: [(network,)], permissions.SUBNET: [(network, subnet)]}
    if environment.export_worker_disk_encryption_set:
        places[permissions.ENCRYPTION_SET] = [(environment.export_worker_disk_encryption_set,)]
    if environment.storage_account_name:
        account = (
            f"{subject.group}/providers/Microsoft.Storage/storageAccounts/{environment.storage_account_name}"
        )
        container = f"{account}/blobServices/default/containers/{environment.storage_container_name}"
        places |= {permissions.ACCOUNT: [(account,)], permissions.CONTAINER: [(account, container)]}
    return places


def _and_group(subject: Subject, id: str) -> tuple[str, str]:
    """A resource preceded by its group, where most roles are assigned: then many disks need one request only."""
    group = id.partition("/providers/")[0]
    return subject.group if names.same(group, subject.group) else group, id


def _allowed(
    subject: Subject, action: permissions.Action, scopes: Sequence[str], roles: dict[str, list[Json] | None]
) -> Generator[Finding, None, bool | None]:
    """Whether a role at one of the scopes allows an action; None if Azure does not tell.

    `roles` caches the identity's permissions at each scope.
    """
    known = True
    for scope in scopes:
        if scope not in roles:
            question = partial(subject.context.azure.permissions, scope)
            roles[scope] = yield from ask("permissions", question, optional=True)
        entries = roles[scope]
        if entries is not None and permissions.granted(entries, action):
            return True
        known = known and entries is not None
    return False if known else None


def _is_dispensable(subject: Subject, action: permissions.Action) -> bool:
    """Whether some runs work without an action."""
    return action.optional or action.feature in subject.may_use


def _missing(subject: Subject, action: permissions.Action, scopes: Sequence[str]) -> Finding:
    where = " and ".join(scopes)
    remedy = f"Give the identity {action.name} on {where} (`coriolis-azure role` prints a complete role)."
    text = f"the identity lacks {action.name} on the {action.scope}: {action.why}"
    if subject.machine is None and action.scope in permissions.OF_THE_VM:
        text = f"the identity lacks {action.name} on the resource group: {action.why}"
        return warning(action.step, f"{text}. It may have the permission on a single VM", remedy)
    if subject.strict or not _is_dispensable(subject, action):
        return error(action.step, text, remedy)
    if action.optional:
        return warning(action.step, f"{text}. Runs work without it", remedy)
    return warning(action.step, f"{text}. Only {_NEED[action.feature]} it", remedy)
