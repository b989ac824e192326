"""Every error tells what to do, and has one of the documented exit codes."""

from __future__ import annotations

import pytest

from coriolis_azure import errors
from harness.error_tree import tree


@pytest.mark.parametrize("kind", tree(errors.CoriolisAzureError))
def test_every_error_has_a_remedy_a_docstring_and_a_documented_exit_code(
    kind: type[errors.CoriolisAzureError],
) -> None:
    assert kind.__doc__
    assert kind.remedy.endswith(".")
    assert kind.exit_code in range(1, 9)


def test_a_raise_may_say_it_better() -> None:
    error = errors.InvalidInput("no", remedy="Do this.", offset=5, code=None)
    assert error.to_json() == {
        "error": "InvalidInput",
        "message": "no",
        "remedy": "Do this.",
        "exit_code": 2,
        "offset": 5,
    }
