"""What is released: a source archive and a wheel, of which two builds are the same, and which every Python installs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSIONS = [f"3.{minor}" for minor in range(10, 15)]


def built(folder: Path) -> dict[str, Path]:
    """A wheel and a source archive, by suffix."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    line = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True)
    return {file.suffix: file for file in folder.iterdir()}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(tmp_path_factory.mktemp("release"))


def test_two_builds_are_the_same(release: dict[str, Path], tmp_path: Path) -> None:
    again = built(tmp_path)
    assert {suffix: _digest(file) for suffix, file in again.items()} == {
        suffix: _digest(file) for suffix, file in release.items()
    }


def test_the_archive_has_what_somebody_needs_to_build_test_and_trust_it(release: dict[str, Path]) -> None:
    with tarfile.open(release[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "LICENSE",
        "README.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "RELEASE.md",
        "pyproject.toml",
        "tox.ini",
    }
    assert wanted <= names
    assert {"docs/index.md", "schemas/source_environment.json", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_wheel_has_the_package_and_its_schemas_and_nothing_else(release: dict[str, Path]) -> None:
    with zipfile.ZipFile(release[".whl"]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"coriolis_azure"}
    assert {"coriolis_azure/py.typed", "coriolis_azure/schemas/connection_info.json"} <= set(names)


def test_the_version_is_the_same_everywhere() -> None:
    version = metadata.version("coriolis-azure")
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f'\n__version__ = "{version}"\n' in (ROOT / "coriolis_azure/__init__.py").read_text()
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_installs_the_wheel(release: dict[str, Path], version: str, tmp_path: Path) -> None:
    """Without what it depends on, which would come from the network: tox installs that."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"Python {version} is not installed here")
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    inside = tmp_path / "env/bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(inside), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(release[".whl"])], check=True, capture_output=True)
    code = "import coriolis_azure; print(coriolis_azure.__version__, coriolis_azure.__file__)"
    told = subprocess.run([inside, "-I", "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.split()[0] == metadata.version("coriolis-azure")
    assert Path(told.split()[1]).is_relative_to(tmp_path)
    assert (tmp_path / "env/bin/coriolis-azure").exists()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
