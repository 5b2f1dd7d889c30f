"""A user's own code, which settings name as ``module:name``: where it is found, how it is called, which files it is."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedfmd.errors import FedfmdError, SettingsError, one_line

FOLDER = "FEDFMD_OWN_CODE"
"""The environment variable that tells this process, and those that it starts, where to look."""

_searched: set[str] = set()
"""Folders that `find` added to where Python looks."""

_imported: set[str] = set()
"""Modules that it imported, by name."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


def look_in(folder: Path) -> None:
    """Let `find` look in this folder too, that of an experiment file, here and in the processes of its runs.

    What it found in an earlier one is forgotten, so that files of one name in two folders aren't taken for each other.
    """
    earlier, now = os.environ.get(FOLDER), str(folder.resolve())
    if earlier and earlier != now:
        _forget(Path(earlier))
    os.environ[FOLDER] = now


def _forget(folder: Path) -> None:
    """Import nothing from this folder any more, and keep no module that was; a library below it stays."""
    if str(folder) not in _searched:
        return
    _searched.remove(str(folder))
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    for name in list(_imported):
        top, file = name.partition(".")[0], _file_of(name)
        if file == folder / f"{top}.py" or file.is_relative_to(folder / top):
            _imported.remove(name)
            del sys.modules[name]
    invalidate_caches()


def _file_of(module: str) -> Path:
    """Return the file of an imported module; of one without a file, such as built-in ones, a path that is none."""
    return Path(getattr(sys.modules.get(module), "__file__", None) or os.devnull)


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
        _searched.add(folder)
    module, _, attribute = name.partition(":")
    known = set(sys.modules)
    try:
        found = import_module(module)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"{setting} = {name!r} can't be imported ({error}): put its file beside the experiment file, or its "
            "folder on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:  # what stands in the module is the user's to mend
        raise SettingsError(f"{setting} = {name!r} can't be imported: {_told(error)}") from error
    _imported.update(sys.modules.keys() - known)
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


def files_of(setting: str, name: str) -> tuple[Path, ...]:
    """Return the files of what `name` stands for: its module's, and that which it comes from.

    Raises:
        SettingsError: as `find`.
    """
    own = find(setting, name)
    named = _file_of(name.partition(":")[0])
    return tuple(dict.fromkeys([*([named] if named.is_file() else []), *sources_of(own)]))


def sources_of(own: Any) -> tuple[Path, ...]:
    """Return the file that a class or function is in, if it has one; of an instance, that of its class."""
    while isinstance(own, partial):
        own = own.func
    own = inspect.unwrap(own)
    for thing in (own, type(own)):
        try:
            file = inspect.getsourcefile(thing)
        except TypeError:  # an instance; what is written in C has none
            continue
        return (Path(file),) if file else ()
    return ()


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
