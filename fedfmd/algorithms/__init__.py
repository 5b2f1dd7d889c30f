"""The algorithms that ``server.strategy`` names, each in a file: their clients' half and their server's.

An `Algorithm` with a name in a new file of this folder is known everywhere.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fedfmd.algorithms.algorithm import ALGORITHMS, Algorithm, LocalTraining, Update
from fedfmd.algorithms.flower import OwnStrategy
from fedfmd.errors import SettingsError, not_one_of
from fedfmd.own_code import is_own
from fedfmd.settings import ServerSettings, Settings

__all__ = ["ALGORITHMS", "Algorithm", "LocalTraining", "Update", "find_algorithm", "make_algorithm"]

for _file in iter_modules(__path__, f"{__name__}."):
    import_module(_file.name)


def make_algorithm(settings: Settings) -> Algorithm:
    """Return the algorithm that ``server.strategy`` names: one of `ALGORITHMS`, or a user's ``module:Class``.

    Raises:
        SettingsError: unknown name.
    """
    name = settings.server.strategy
    if is_own(name):
        return OwnStrategy(settings)
    if name not in ALGORITHMS:
        raise SettingsError(f"server.strategy = {name!r}: {not_one_of(name, ALGORITHMS, 'module:Class')}")
    return ALGORITHMS[name](settings)


def find_algorithm(settings: Settings) -> Algorithm:
    """Return the algorithm that ``server.strategy`` names, once it is clear that the settings suit it.

    Raises:
        SettingsError: unknown name, no such class, an option that the algorithm does not read, or privacy that it
            can't keep.
    """
    algorithm = make_algorithm(settings)
    _check_options(algorithm)
    _check_privacy(algorithm)
    algorithm.check()
    return algorithm


def _check_privacy(algorithm: Algorithm) -> None:
    settings = algorithm.settings
    if settings.privacy.clip_norm and not algorithm.only_mean:
        able = ", ".join(name for name, kind in ALGORITHMS.items() if kind.only_mean)
        raise SettingsError(
            f"privacy.clip-norm = {settings.privacy.clip_norm:g} and server.strategy = {settings.server.strategy!r}, "
            f"whose server needs more of the clients than a mean in which all count alike: use one of {able}"
        )


def _check_options(algorithm: Algorithm) -> None:
    server, defaults = algorithm.settings.server, ServerSettings()
    readers = {
        option: [name for name, other in ALGORITHMS.items() if option in other.options]
        for kind in ALGORITHMS.values()
        for option in kind.options
    }
    for option in readers:
        if option not in algorithm.options and getattr(server, option) != getattr(defaults, option):
            raise SettingsError(
                f"server.{option.replace('_', '-')} = {getattr(server, option)} has no effect with "
                f"server.strategy = {server.strategy}: it belongs to {', '.join(readers[option])}"
            )
