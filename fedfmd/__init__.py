"""Federated learning simulation of dynamic-convolution ResNets on edge fleets, on Flower.

    import fedfmd

    results = fedfmd.run("quickstart")
    results.plot()

Only `run`, `load` and what else is used takes the time to import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedfmd.version import __version__

if TYPE_CHECKING:
    from fedfmd.errors import FedfmdError
    from fedfmd.experiment.api import Results, load, run
    from fedfmd.settings import Settings

__all__ = ["FedfmdError", "Results", "Settings", "__version__", "load", "run"]

_HOMES = {
    "FedfmdError": "fedfmd.errors",
    "Results": "fedfmd.experiment.api",
    "Settings": "fedfmd.settings",
    "load": "fedfmd.experiment.api",
    "run": "fedfmd.experiment.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
