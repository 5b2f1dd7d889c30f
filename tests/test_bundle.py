"""What Flower sends to edge devices and to its simulation: all of the code."""

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedfmd", "strategies")


@pytest.mark.skipif(not (ROOT / PACKAGES[0]).exists(), reason="the sources aren't here, only a wheel's")
def test_flowers_bundle_holds_every_module():
    """Flower leaves out what .gitignore names, wherever it lies."""
    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))).namelist())
    for package in PACKAGES:
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert modules <= names
