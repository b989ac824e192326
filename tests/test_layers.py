"""The house of docs/architecture.md, enforced: imports go down or sideways, and dangerous ones have one owner."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "coriolis_azure"

# From the ground up. A room may import from its own floor and from those below.
FLOORS = (
    {"errors", "clock", "tls", "__init__"},
    {
        "codes",
        "documents",
        "digests",
        "hashing",
        "names",
        "model",
        "settings",
        "events",
        "agent",
        "permissions",
        "plugin_api",
        "configuration",
        "suitability",
        "vhd",
        "formats",
        "skus",
    },
    {"api_versions", "cloud", "storage", "pipeline", "journal", "interrupts"},
    {"resources", "records", "ssh", "channel", "frames", "destinations"},
    {
        "inspection",
        "unmanaged",
        "cloning",
        "worker",
        "attachment",
        "cloud_init",
        "transfer",
        "verification",
        "cleanup",
        "catalog",
        "preflight",
    },
    {"source", "pool"},
    {"provider", "cli", "demo", "sandbox", "__main__"},
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

OWNERS = {
    "azure": {"api_versions", "cloud", "storage", "sandbox"},
    "paramiko": {"ssh", "sandbox"},
    "requests": {"cloud", "sandbox"},
    "coriolis": {"plugin_api", "destinations"},
    "click": {"cli"},
    "rich": {"cli"},
    "jsonschema": {"settings"},
    "signal": {"interrupts", "destinations", "cli", "sandbox"},
    "socket": {"ssh", "channel", "agent", "unmanaged", "destinations", "sandbox"},
    "threading": {"sandbox", "pipeline", "agent"},
    "concurrent": {"pipeline", "agent", "sandbox"},
    "subprocess": {"demo", "sandbox"},
    "fcntl": {"journal", "destinations", "agent", "sandbox"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], path


@functools.cache
def imports(path: Path) -> list[tuple[str, str]]:
    """(top-level package, our room or "") of every import in a file; those only for type checkers included."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0], ""
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            named = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (("coriolis_azure", name.partition(".")[0]) for name in named)


def test_every_room_has_a_floor() -> None:
    assert {room for room, _ in modules()} <= set(FLOOR)


def test_imports_never_run_upward() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for room, path in modules()
        for package, imported in imports(path)
        if package == "coriolis_azure" and imported in FLOOR and FLOOR[imported] > FLOOR[room]
    ]
    assert upward == []


def test_no_two_rooms_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for room, path in modules():
        found = {
            imported
            for package, imported in imports(path)
            if package == "coriolis_azure" and imported in FLOOR
        }
        edges.setdefault(room, set()).update(found - {room, "__init__"})

    def reach(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, f"circle: {' -> '.join((*trail, room))}"
        for imported in edges.get(room, ()):
            reach(imported, (*trail, room))

    for room in edges:
        reach(room, ())


@pytest.mark.parametrize("package", OWNERS)
def test_a_dangerous_import_has_its_owners_only(package: str) -> None:
    importers = {room for room, path in modules() for imported, _ in imports(path) if imported == package}
    assert importers <= OWNERS[package]


def test_the_agent_imports_nothing_of_ours_and_nothing_that_must_be_installed() -> None:
    import sys

    found = {package for package, _ in imports(PACKAGE / "agent.py")}
    assert found <= set(sys.stdlib_module_names)
