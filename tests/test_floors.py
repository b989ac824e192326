"""The floors of the dependencies: what `tox -e lowest` installs, and none with a known advisory."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Package: the first version without the advisories that SECURITY.md names.
FIXED = {
    "azure-core": "1.38",
    "azure-identity": "1.16.1",
    "certifi": "2024.7.4",
    "cryptography": "48.0.1",
    "idna": "3.15",
    "jinja2": "3.1.6",
    "paramiko": "5.0",
    "pyjwt": "2.13",
    "pynacl": "1.6.2",
    "requests": "2.33",
    "urllib3": "2.8",
}


def version(text: str) -> tuple[int, ...]:
    """A version as numbers, without zeros at its end."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", text).split(".")))


def floors() -> dict[str, str]:
    """What pyproject.toml asks for at least, by package."""
    toml = pytest.importorskip("tomllib")  # since Python 3.11
    asked = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.match(r"([A-Za-z0-9.-]+)>=([0-9.]+)", each) for each in asked]
    assert all(found), asked
    return {each[1].lower(): each[2] for each in found if each}


def test_the_lowest_versions_together_are_those_of_the_floors() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    lines = tox["testenv:lowest"]["deps"].split("\n")
    pinned = dict(line.partition(";")[0].strip().lower().split("==") for line in lines if line.strip())
    assert {name: version(pin) for name, pin in pinned.items()} == {
        name: version(floor) for name, floor in floors().items()
    }


@pytest.mark.parametrize("package", FIXED)
def test_no_floor_lets_a_version_with_a_known_advisory_in(package: str) -> None:
    assert version(floors()[package]) >= version(FIXED[package])
    assert package in (ROOT / "SECURITY.md").read_text().lower()
