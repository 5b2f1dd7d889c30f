"""Code of a user's own, which settings name as ``module:name``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from fedfmd.errors import SettingsError

FOLDER = "FEDFMD_PLUGINS"
"""The environment variable that tells this process, and those that it starts, where to look."""


def look_in(folder: Path) -> None:
    """Let `find` look in this folder too, that of an experiment file, here and in the processes of its runs."""
    os.environ[FOLDER] = str(folder.resolve())


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
