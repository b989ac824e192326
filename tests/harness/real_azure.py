"""Documents of real Azure: recorded exchanges, the official OpenAPI documents with their examples, and our own.

Our own are in tests/data: what Azure was seen and is documented to answer, written anew. The others are no part of this
project. They are read from beside the checkout; tests that need them are skipped elsewhere.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coriolis_azure.sandbox import Request, Response, Sandbox

Json = dict[str, Any]

_SHARED = Path(__file__).resolve().parents[3] / "shared"
RECORDINGS = _SHARED / "azure-recordings"
OPENAPI = _SHARED / "azure-openapi" / "spec"

needs_recordings = pytest.mark.skipif(
    not (RECORDINGS / "read_recordings.py").exists(),
    reason="the recordings of real Azure exchanges are not beside this checkout",
)
needs_openapi = pytest.mark.skipif(
    not OPENAPI.is_dir(), reason="the OpenAPI documents of Azure are not beside this checkout"
)


DATA = Path(__file__).resolve().parents[1] / "data"


@cache
def written(name: str) -> Any:
    """A document of tests/data."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def machines() -> dict[str, Json]:
    """Our own VMs by name: what each `shows`, the `reason` why it cannot be moved ("" if it can), its `documents`."""
    return {
        path.stem: written(f"machines/{path.stem}") for path in sorted((DATA / "machines").glob("*.json"))
    }


@cache
def reader() -> ModuleType:
    """The recordings' own reader."""
    spec = importlib.util.spec_from_file_location("read_recordings", RECORDINGS / "read_recordings.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["read_recordings"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def recordings() -> list[str]:
    """The names of the recordings; none where they are absent."""
    return sorted(path.name for path in RECORDINGS.glob("*") if path.suffix in {".json", ".yaml"})


@cache
def exchanges(recording: str) -> list[Any]:
    """What was said in a recording, in order."""
    return list(reader().exchanges(RECORDINGS / recording))


@cache
def documents(recording: str) -> dict[str, Json]:
    """The last known document of every resource of a recording, by lower-cased id; disks that nobody read made up."""
    state = reader().final_state(exchanges(recording))
    reader().complete(state)
    found: dict[str, Json] = {}
    for key, document in state.every().items():
        found[key] = copy.deepcopy(document)
        if key in state.instance_views:
            found[key]["properties"]["instanceView"] = state.instance_views[key]
    return found


def machine_documents(recording: str) -> list[Json]:
    """Every different state in which a VM of the recording was seen."""
    state = reader().final_state(exchanges(recording))
    seen = {
        json.dumps(document, sort_keys=True): document
        for key, history in state.history.items()
        for _, document in history
        if "/microsoft.compute/virtualmachines/" in key and "storageProfile" in document["properties"]
    }
    return list(seen.values())


def examples(pattern: str) -> Iterator[tuple[str, Json]]:
    """The documents in the answers of the OpenAPI examples whose path matches, with the example's name."""
    for path in sorted(OPENAPI.rglob(f"examples/**/{pattern}.json")):
        for answer in json.loads(path.read_text(encoding="utf-8"))["responses"].values():
            body = answer.get("body")
            for document in body.get("value", [body]) if isinstance(body, dict) else ():
                yield path.stem, document


def answering(azure: Sandbox, told: Iterable[Json]) -> None:
    """From now on the sandbox answers reads of these resources with these documents; of others as always.

    The subscription in their ids does not count: it is another one than the sandbox's.
    """
    by_path = {_within(document["id"]): document for document in told}

    def answer(request: Request, real: Callable[[Request], Response]) -> Response:
        document = by_path.get(_within(request.path))
        return Response.of(200, document) if request.method == "GET" and document else real(request)

    azure.intercept = answer


def _within(id: str) -> str:
    return re.sub(r"^/subscriptions/[^/]*", "", id.lower()).rstrip("/")
