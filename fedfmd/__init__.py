"""Federated learning simulation of dynamic-convolution ResNets on edge fleets, on Flower."""

__version__ = "0.1.0"
