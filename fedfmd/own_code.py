"""A user's own code, named by a setting as ``module:attribute``: where it is found and which files it is."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from fedfmd.errors import SettingsError


def is_own(name: str) -> bool:
    """Whether a setting names a user's own code, not something of fedfmd's."""
    return ":" in name


def load_own(key: str, name: str) -> Any:
    """Return what the setting `key` names, an attribute of a module on Python's path.

    Raises:
        SettingsError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{key} = {name!r} can't be imported ({error}): put its folder on PYTHONPATH, or its file beside that of "
            "the experiment"
        ) from None


def sources_of(own: Any) -> tuple[Path, ...]:
    """Return the file that a class or function is in, if it has one."""
    file = inspect.getsourcefile(own)
    return (Path(file),) if file else ()


def find_in(folder: Path) -> None:
    """Let own code be found in this folder, after all other places, by this process and those that it starts."""
    place = str(folder.resolve())
    if place not in sys.path:
        sys.path.append(place)
    places = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if place not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join([*places, place])
