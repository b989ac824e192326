"""Whether an answer is as Azure's own OpenAPI documents say: its status, its names, their types, what is required."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from harness.real_azure import OPENAPI, Json

# Documents of the kinds that the sandbox imitates.
FILES = (
    *("virtualMachine.json", "virtualMachineImage.json", "disk.json", "snapshot.json", "skus.json"),
    *("restorePoint.json", "diskRestorePoint.json"),
    *("networkInterface.json", "networkSecurityGroup.json", "publicIpAddress.json", "virtualNetwork.json"),
)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


@cache
def _document(file: Path) -> Json:
    """A document; {} for one that was not stored."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


@cache
def operations() -> list[tuple[re.Pattern[str], str, Path, Json]]:
    """Path, method, file and answers of every operation."""
    found = []
    for file in (path for name in FILES for path in OPENAPI.rglob(name)):
        for template, methods in _document(file)["paths"].items():
            pattern = re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)) + "/?", re.IGNORECASE)
            found += [(pattern, method.upper(), file, told["responses"]) for method, told in methods.items()]
    return found


def faults(method: str, path: str, status: int, body: Any) -> list[str] | None:
    """What is wrong with an answer; None where the documents do not have the operation."""
    for pattern, verb, file, answers in operations():
        if verb == method and pattern.fullmatch(path):
            # Not every operation tells how it refuses.
            answer = answers.get(str(status)) or (answers.get("default", {}) if status >= 400 else None)
            if answer is None:
                return [f"status {status} is none of {', '.join(answers)}"]
            schema = answer.get("schema")
            if schema is None or (status >= 400 and not body):
                return []
            return list(_faults(body, schema, file, ""))
    return None


def _resolved(schema: Json, file: Path) -> tuple[Json, Path]:
    """A schema behind its references."""
    while "$ref" in schema:
        target, _, pointer = schema["$ref"].partition("#/")
        file = (file.parent / target).resolve() if target else file
        found: Any = _document(file)
        for part in pointer.split("/"):
            found = found.get(part, {})
        schema = found
    return schema, file


def _members(schema: Json, file: Path) -> tuple[dict[str, tuple[Json, Path]], set[str], bool]:
    """The properties of an object with those of all that it extends, the required ones, and whether all are known."""
    found = {name: (inner, file) for name, inner in schema.get("properties", {}).items()}
    required, closed = set(schema.get("required", ())), True
    for part in schema.get("allOf", ()):
        base, where = _resolved(part, file)
        inherited, needed, whole = _members(base, where)
        found, required, closed = {**inherited, **found}, required | needed, closed and whole and bool(base)
    return found, required, closed


def _faults(value: Any, schema: Json, file: Path, where: str) -> Iterator[str]:
    schema, file = _resolved(schema, file)
    members, required, closed = _members(schema, file)
    kind = _TYPES.get(schema.get("type", "object" if members else ""), object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        yield f"{where}: {value!r} is not of type {schema.get('type')}"
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _faults(item, schema.get("items", {}), file, f"{where}[{number}]")
    elif isinstance(value, dict) and members:
        yield from (f"{where}.{name} is missing" for name in required - value.keys())
        for name, item in value.items():
            if name in members:
                yield from _faults(item, *members[name], f"{where}.{name}")
            elif closed and "additionalProperties" not in schema:
                yield f"{where}.{name} is not known"
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for name, item in value.items():
            yield from _faults(item, schema["additionalProperties"], file, f"{where}.{name}")
