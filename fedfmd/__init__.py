"""Federated learning simulation of dynamic-convolution ResNets on edge fleets, on Flower."""

from fedfmd.version import __version__

__all__ = ["__version__"]
