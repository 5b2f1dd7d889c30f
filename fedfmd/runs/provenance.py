"""Which code a run was made with, so that results of different code never meet in one folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("fedfmd", "strategies")
SUFFIXES = (".py", ".yaml")
NO_CODE = ("examples", "templates")
"""Folders of a package that no run is made of; a clone has its examples elsewhere."""


@lru_cache
def code_digest(*own: Path) -> str:
    """Short hash of the packages' sources and of a user's `own` files, wherever they lie.

    It is taken once, so that a process goes on calling its code by the same name when files change below it.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for name, path in [*_sources(), *((path.name, path) for path in own)]:
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _sources() -> Iterator[tuple[str, Path]]:
    """Return the packages' files, by their names inside."""
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        files = {path.relative_to(root): path for path in root.rglob("*") if path.suffix in SUFFIXES}
        yield from sorted(
            (f"{package}/{name.as_posix()}", path)
            for name, path in files.items()
            if name.parts[0] not in NO_CODE
        )
