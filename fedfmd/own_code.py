"""A user's own code, which settings name as ``module:name``: where it is found, and which files it is."""

from __future__ import annotations

import inspect
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from fedfmd.errors import SettingsError

FOLDER = "FEDFMD_OWN_CODE"
"""The environment variable that tells this process, and those that it starts, where to look."""


def look_in(folder: Path) -> None:
    """Let `find` look in this folder too, that of an experiment file, here and in the processes of its runs."""
    os.environ[FOLDER] = str(folder.resolve())


def is_own(name: str) -> bool:
    """Whether a setting names a user's own code, not something of fedfmd's."""
    return ":" in name


def find(setting: str, name: str) -> Any:
    """Import what `name`, a ``module:name``, stands for.

    Raises:
        SettingsError: there is no such thing; the text names the setting.
    """
    folder = os.environ.get(FOLDER)
    if folder and folder not in sys.path:
        sys.path.append(folder)  # last: no file there may hide a library
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{setting} = {name!r} can't be imported ({error}): put its file beside the experiment file, or its "
            "folder on PYTHONPATH"
        ) from None


def sources_of(own: Any) -> tuple[Path, ...]:
    """Return the file that a class or function is in, if it has one."""
    file = inspect.getsourcefile(own)
    return (Path(file),) if file else ()
