"""What `from coriolis_azure import ...` gives: names that exist, and types that mypy holds a caller to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import coriolis_azure

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", coriolis_azure.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(coriolis_azure, name)


def test_a_name_that_is_not_there_is_told_as_python_tells_it() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Sauce'"):
        coriolis_azure.Sauce  # noqa: B018 - to ask for it is the test


def test_importing_the_package_loads_no_sdk() -> None:
    """The orchestrator imports every plugin at each look-up."""
    code = "import sys, coriolis_azure; print([name for name in sys.modules if name.startswith(('azure', 'paramiko'))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


CALLS = {
    'Source({}, {}).replicate("web", "/tmp/x", shutdown=True)': "",
    "Source({})": 'Missing positional argument "source_environment"',
    'Source({}, {}).replicate("web", "/tmp/x", shut_down=True)': 'Unexpected keyword argument "shut_down"',
    'Source({}, {}).replicate("web", "/tmp/x").diskss': 'has no attribute "diskss"',
    "Machine()": "Missing positional argument",
    "errors.NotThere": 'Module has no attribute "NotThere"',
}


@pytest.mark.slow
def test_mypy_holds_a_caller_to_the_types(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("\n".join(["from coriolis_azure import Machine, Source, errors", *CALLS]))
    line = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    said = subprocess.run([*line, str(script)], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for number, fault in enumerate(CALLS.values(), 2):
        told = [each for each in said.splitlines() if f"script.py:{number}: error" in each]
        assert bool(told) == bool(fault), said
        assert not told or fault in told[0]
