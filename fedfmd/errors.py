"""Errors that a user can mend; their text is one line that names the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec

EXTRAS = {
    "bokeh": "report",
    "matplotlib": "report",
    "scipy": "report",
    "pandas": "report",
    "flwr_datasets": "server",
    "pyarrow": "server",
    "sklearn": "server",
    "onnx": "export",
    "onnxscript": "export",
    "ray": "simulation",
    "opacus": "privacy",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
"""The extra of fedfmd that installs a library which edge devices do without, by the name of its module."""


class FedfmdError(Exception):
    """Base of the errors below: shown without a traceback."""


class SettingsError(FedfmdError, ValueError):
    """A setting that can't be used; nothing was started. Names the key, the value and what is allowed."""


class RunError(FedfmdError, RuntimeError):
    """A run that can't go on; its finished rounds are kept."""


class ImageError(RunError, ValueError):
    """An image that can't be read; names it. Before a run it is bad input, in one it ends what needs the image."""


def need(purpose: str, *modules: str) -> None:
    """Refuse what needs libraries that aren't installed.

    Raises:
        SettingsError: names them and the extra that brings them.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        *others, last = missing
        names = f"{', '.join(others)} and {last}" if others else last
        raise SettingsError(f"{purpose} needs {names}: pip install 'fedfmd[{EXTRAS[missing[0]]}]'")


def not_one_of(name: object, names: Iterable[str], own: str = "") -> str:
    """Say of a name that isn't among the registered ones, the nearest of which is suggested.

    `own` is the form of names of a user's own, where these are allowed too.
    """
    known = tuple(names)
    others = f", or {own} of your own" if own else ""
    module, dot, attribute = str(name).rpartition(".")
    meant = f"{module}:{attribute}" if own and dot else nearest_of(name, known)
    return f"must be one of {', '.join(known)}{others}; did you mean {meant!r}?"


def nearest_of(name: object, names: Iterable[str]) -> str:
    """Return the one of `names` that looks most like `name`."""
    return difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]


def one_line(error: BaseException) -> str:
    """Tell an error in one line: its text, after its type unless it is one that a user can mend."""
    kind = "" if isinstance(error, FedfmdError | OSError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())
