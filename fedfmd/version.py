"""The version of fedfmd."""

import tomllib
from importlib import metadata
from pathlib import Path


def _version() -> str:
    """Return the version in the pyproject.toml of a clone or of Flower's bundle, else that of the installed package."""
    manifest = Path(__file__).parents[1] / "pyproject.toml"
    if manifest.exists():
        project = tomllib.loads(manifest.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "fedfmd":
            return str(project["version"])
    return metadata.version("fedfmd")


__version__ = _version()
