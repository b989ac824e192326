"""Every error tells what to do, and has one of the documented exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from coriolis_azure import errors
from harness.error_tree import tree


@pytest.mark.parametrize("kind", tree(errors.CoriolisAzureError))
def test_every_error_has_a_remedy_a_docstring_and_a_documented_exit_code(
    kind: type[errors.CoriolisAzureError],
) -> None:
    assert kind.__doc__
    assert kind.remedy.endswith(".")
    assert kind.exit_code in {*range(1, 9), 130}


def test_a_raise_may_say_it_better() -> None:
    error = errors.InvalidInput("no", remedy="Do this.", offset=5, code=None)
    assert error.to_json() == {
        "error": "InvalidInput",
        "message": "no",
        "remedy": "Do this.",
        "exit_code": 2,
        "offset": 5,
    }


def test_facts_that_code_asks_for_are_attributes() -> None:
    refused = errors.Throttled("no", code="TooMany", status=429, target="Get", retry_after=5, request_id="1")
    assert (refused.code, refused.status, refused.target, refused.retry_after) == ("TooMany", 429, "Get", 5.0)
    unknown = errors.CloudUnreachable("no answer", status=None)
    assert (unknown.code, unknown.status, unknown.target, unknown.retry_after) == ("", 0, "", 0.0)
    damaged = errors.CorruptChunk("bad", disk="os", offset=0)
    assert (damaged.disk, damaged.offset) == ("os", 0)
    assert (errors.TransferError("bad").disk, errors.TransferError("bad").offset) == ("", None)
    assert refused.reworded("other").to_json() == {**refused.to_json(), "message": "other"}
    assert refused.left_behind == []
    refused.left_behind = ["id"]
    assert (refused.left_behind, refused.to_json()["left_behind"]) == (["id"], ["id"])


def test_no_code_asks_for_a_fact_by_its_key() -> None:
    package = Path(errors.__file__).parent
    texts = {path: path.read_text() for path in package.rglob("*.py") if path.name != "errors.py"}
    found = {path.relative_to(package).as_posix() for path, text in texts.items() if ".facts" in text}
    assert found == set()
