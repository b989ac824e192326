"""The house of docs/explanation/architecture.md, enforced: imports go down, never in a circle; some have one owner.

A room is a folder of the package or a module beside them. All imports count: relative and absolute ones, those inside
functions and those for type checkers, and those by a string.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

NAME = "coriolis_azure"
PACKAGE = Path(__file__).parent.parent / NAME

GROUND = {
    "errors",
    "clock",
    "tls",
    "threads",
    "model",
    "events",
    "settings",
    "formats",
    "vhd",
    "timeline",
    "change_map",
}
STEPS = {"azure", "run", "replica", "readers", "machine", "worker"}
CORE = {
    *GROUND,
    "agent",
    *STEPS,
    "checks",
    "transfer",
    "handoff",
    "restoring",
    "mechanisms",
    "results",
    "source",
    "fleet",
    "cutover",
}

# What each room may import besides itself and the version: rooms, or single modules of them.
MAY_IMPORT: dict[str, set[str]] = {
    "agent": set(),
    **dict.fromkeys(GROUND, GROUND),
    "azure": GROUND,
    "run": {*GROUND, "azure"},
    "replica": {*GROUND, "agent", "azure.blobs", "azure.pages"},
    "readers": {*GROUND, "agent", "azure.blobs", "replica.manifest"},
    "machine": {*GROUND, "azure", "run"},
    "worker": {*GROUND, "azure", "run", "machine", "readers"},
    "checks": {*GROUND, "azure", "run", "machine", "worker"},
    "transfer": {*GROUND, "readers", "replica"},
    "handoff": {*GROUND, "machine", "replica"},
    "restoring": {*GROUND, "readers", "replica", "transfer", "handoff"},
    "mechanisms": {*GROUND, *STEPS, "transfer"},
    "results": {*GROUND, "mechanisms", "transfer"},
    "source": {*GROUND, *STEPS, "results", "checks", "mechanisms", "handoff", "restoring", "transfer"},
    "fleet": {*GROUND, "azure", "machine", "readers", "replica", "run", "worker", "results", "source"},
    "cutover": {*GROUND, "replica", "results", "source"},
    "plugin": CORE,
    "testing": {"replica"},
    "cli": {*CORE, "plugin", "sandbox"},
    "__main__": {"cli"},
    "__init__": {"results", "source", "fleet", "plugin", "replica", "restoring", "checks", *GROUND},
    "sandbox": {*GROUND, "azure.documents"},
}

# The owners of imports from outside, as rooms or modules.
OWNERS = {
    "azure": {"azure", "sandbox"},
    "paramiko": {"readers.ssh", "readers.keys", "readers.paramiko_internals", "sandbox"},
    "requests": {"azure", "sandbox"},
    "nbd": {"replica.nbd_store"},
    "coriolis": {"plugin"},
    "oslo_config": {"plugin"},
    "click": {"cli"},
    "rich": {"cli"},
    "jinja2": {"cli"},
    "jsonschema": {"settings"},
    "signal": {"run.interrupts", "replica.exclusive", "cli", "sandbox"},
    "socket": {"readers", "agent", "plugin", "sandbox"},
    "threading": {"sandbox", "threads", "agent"},
    "concurrent": {"threads", "agent", "sandbox"},
    "subprocess": {"cli", "sandbox"},
    "fcntl": {"run.journal", "replica", "plugin", "agent", "sandbox"},
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below the package; "__init__" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


@functools.cache
def imports(module: str) -> list[str]:
    """The absolute names of what a module imports, as precise as the import says."""
    return list(
        imported(ast.parse(modules()[module].read_text()), module, modules()[module].name == "__init__.py")
    )


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The absolute names of what this code of `module` imports."""
    inside = [] if module == "__init__" else module.split(".")
    here = [NAME, *(inside if is_package else inside[:-1])]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield by_string(node.args[0], module)


def by_string(name: ast.expr, module: str) -> str:
    """What an import by a string names: a constant, or one that begins with a constant; else it is refused."""
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        return name.value
    if isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
        return str(name.values[0].value).rstrip(".")
    if ast.unparse(name).startswith("f'{__name__}.") and modules()[module].name == "__init__.py":
        return NAME if module == "__init__" else f"{NAME}.{module}"  # a package's own lazy names
    raise AssertionError(f"{module} imports {ast.unparse(name)}: nobody can tell what that is")


def ours(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        if name == NAME or name.startswith(f"{NAME}."):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in modules():
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found - {module}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_its_place_in_the_table() -> None:
    assert {room(module) for module in modules()} == set(MAY_IMPORT)


def test_rooms_import_only_what_they_may() -> None:
    wrong = [
        f"{module} imports {target}"
        for module in modules()
        for target in ours(module)
        if room(target) not in {room(module), "__init__"}
        and not {target, room(target)} & MAY_IMPORT[room(module)]
    ]
    assert wrong == []


def test_both_pictures_of_the_house_are_the_same_and_agree_with_the_table() -> None:
    """Each room is in a row of its own kind, and imports only from this row and those below it."""
    root = PACKAGE.parent
    pictures = [
        re.findall(
            r"^```text\n(.*?)^```", (root / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        for page in ("CONTRIBUTING.md", "docs/explanation/architecture.md")
    ]
    assert pictures[0] == pictures[1]
    (picture,) = pictures[0]
    rows = [line.partition("|")[0].split() for line in picture.splitlines()]
    row = {name: number for number, names in enumerate(rows) for name in names}
    beside = {"__init__", "__main__", "sandbox", "testing"}
    assert set(row) == set(MAY_IMPORT) - beside
    upwards = [
        f"{importer} imports {target}"
        for importer in row
        for target in {room(name) for name in MAY_IMPORT[importer]} - beside
        if row[target] < row[importer] and not {importer, target} <= GROUND
    ]
    assert upwards == []


def test_the_table_has_no_circle() -> None:
    above = {room: {name.partition(".")[0] for name in may} - {room} for room, may in MAY_IMPORT.items()}
    tuple(TopologicalSorter({name: may - GROUND for name, may in above.items()}).static_order())


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: ours(module) - {"__init__", *packages()} for module in modules() if module not in packages()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def packages() -> set[str]:
    return {module for module, path in modules().items() if path.name == "__init__.py"}


@pytest.mark.parametrize("package", OWNERS)
def test_a_dangerous_import_has_its_owners_only(package: str) -> None:
    importers = {
        module for module in modules() for name in imports(module) if name.partition(".")[0] == package
    }
    assert {module for module in importers if not {module, room(module)} & OWNERS[package]} == set()


def test_the_agent_imports_nothing_of_ours_and_nothing_that_must_be_installed() -> None:
    found = {name for module in modules() if room(module) == "agent" for name in imports(module)}
    foreign = {name for name in found if not name.startswith(f"{NAME}.agent.")}
    assert {name.partition(".")[0] for name in foreign} <= {*sys.stdlib_module_names, "blake3"}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from coriolis_azure.cli import cli", "coriolis_azure.cli.cli"),
        ("def f():\n    from ..cli import entry", "coriolis_azure.cli.entry"),
        ("from .. import source", "coriolis_azure.source"),
        ("import coriolis_azure.source", "coriolis_azure.source"),
        (
            "from importlib import import_module\nimport_module('coriolis_azure.source')",
            "coriolis_azure.source",
        ),
        ("import importlib\nimportlib.import_module(f'coriolis_azure.cli.{x}')", "coriolis_azure.cli"),
        ("__import__('coriolis_azure.source')", "coriolis_azure.source"),
    ],
)
def test_every_way_to_import_is_seen(code: str, found: str) -> None:
    assert found in set(imported(ast.parse(code), "replica.image", False))


def test_an_import_by_a_name_that_nobody_can_read_is_refused() -> None:
    with pytest.raises(AssertionError, match="nobody can tell"):
        list(imported(ast.parse("__import__(name)"), "replica.image", False))
