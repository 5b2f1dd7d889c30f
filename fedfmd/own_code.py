"""A user's own code, which settings name as ``module:name``: where it is found, how it is called, which files it is."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedfmd.errors import FedfmdError, SettingsError, one_line

FOLDER = "FEDFMD_OWN_CODE"
"""The environment variable that tells this process, and those that it starts, where to look."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


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
        found = import_module(module)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"{setting} = {name!r} can't be imported ({error}): put its file beside the experiment file, or its "
            "folder on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:  # what stands in the module is the user's to mend
        raise SettingsError(f"{setting} = {name!r} can't be imported: {_told(error)}") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise SettingsError(
            f"{setting} = {name!r} can't be imported ({error}): the module is {getattr(found, '__file__', 'built in')}"
        ) from None


def call(
    setting: str,
    name: str,
    given: Mapping[str, Any] = NOTHING,
    offered: Mapping[str, Any] = NOTHING,
    first: Mapping[str, Any] = NOTHING,
    hint: str = "",
) -> Any:
    """Call what `name` stands for, and return what it returns.

    Args:
        setting: the setting, for errors.
        name: ``module:name``.
        given: the arguments that it must have, by name.
        offered: those that it may have, and gets if it does.
        first: those that come first, whatever it calls them.
        hint: ends the error where it can't be called.

    Raises:
        SettingsError: there is no such thing, it takes other arguments, or it fails, in the line that is named.
    """
    own = find(setting, name)
    try:
        known = inspect.signature(own).parameters
        arguments = {**given, **{option: value for option, value in offered.items() if option in known}}
        inspect.signature(own).bind(*first.values(), **arguments)
    except (TypeError, ValueError) as error:  # the latter where Python can't tell the arguments
        names = ", ".join([*first, *given]) or "nothing"
        also = f", and what it has arguments for of {', '.join(offered)}" if offered else ""
        raise SettingsError(
            f"{setting} = {name!r} can't be called ({error}): it gets {names}{also}{hint}"
        ) from None
    with running(f"{setting} = {name!r} fails", SettingsError, own):
        return own(*first.values(), **arguments)


@contextmanager
def running(what: str, kind: type[FedfmdError], own: Any) -> Iterator[None]:
    """Turn what a user's own code raises while the block runs, sys.exit included, into one line.

    Args:
        what: the beginning of the line, which names the setting.
        kind: of the error that it becomes.
        own: the class or function, whose file's last line is told.

    Raises:
        FedfmdError: of that kind; one that the block raises itself stays as it is.
    """
    try:
        yield
    except FedfmdError:
        raise
    except (Exception, SystemExit) as error:  # whatever it is, it is the user's to mend
        raise kind(f"{what}{_place(own, error)}: {_told(error)}") from error


def sources_of(own: Any) -> tuple[Path, ...]:
    """Return the file that a class or function is in, if it has one."""
    try:
        file = inspect.getsourcefile(own)
    except TypeError:  # what is written in C has none
        file = None
    return (Path(file),) if file else ()


def _told(error: Exception | SystemExit) -> str:
    return "it calls sys.exit" if isinstance(error, SystemExit) else one_line(error)


def _place(own: Any, error: Exception | SystemExit) -> str:
    """Return the last line of the user's file that an error came through, in words."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        f" in {file.name}, line {frame.lineno}"
        for file in sources_of(own)
        for frame in frames
        if frame.filename == str(file)
    ]
    return lines[-1] if lines else ""
