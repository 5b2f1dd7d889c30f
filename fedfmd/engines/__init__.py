"""The ways to run the apps on one machine: in this process, or through Flower's simulation."""

from fedfmd.engines.flower import run_flower
from fedfmd.engines.inline import run_inline

__all__ = ["run_flower", "run_inline"]
