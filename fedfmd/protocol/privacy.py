"""Differential privacy of clients: their updates clipped to a norm, Gaussian noise, and what that amounts to.

DP-FedAvg with fixed clipping (McMahan et al., ICLR 2018, arXiv:1710.06963). What is protected is that a client takes
part at all, with everything that it holds. An array's way is the difference to what the client began with.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedfmd.protocol.state import Arrays

Ways = dict[str, np.ndarray]
"""Differences to the arrays that a client began with, in float64."""


def noise_generator(seed: int, secret: bool) -> np.random.Generator:
    """Return where noise comes from: `seed`, so that a simulation can be repeated, or a source that nobody knows."""
    return np.random.default_rng(None if secret else seed)


def clipped_ways(arrays: Arrays, start: Arrays, parameters: Collection[str], norm: float) -> Ways:
    """Return the ways of the parameters, scaled down so that their L2 norm, over all of them, is `norm` at most."""
    ways = {
        name: np.asarray(array, np.float64) - start[name]
        for name, array in arrays.items()
        if name in parameters
    }
    length = math.hypot(*(float(np.linalg.norm(way)) for way in ways.values()))
    return {name: way * (norm / length) for name, way in ways.items()} if length > norm else ways


def noisy_mean(ways: Sequence[Ways], start: Arrays, std: float, generator: np.random.Generator) -> Arrays:
    """Return what the mean way leads to from `start`, in which all count alike.

    Noise of standard deviation `std` is added to each number of the sum: weights would differ by what a client has, and
    let one of them move the sum by more than its norm.
    """
    arrays: Arrays = {}
    for name in (name for name in start if name in ways[0]):
        total = generator.normal(0.0, std, start[name].shape) + sum(way[name] for way in ways)
        arrays[name] = np.asarray(start[name] + total / len(ways), start[name].dtype)
    return arrays


def noised_update(
    update: Mapping[str, Tensor],
    received: Arrays,
    parameters: Collection[str],
    norm: float,
    noise_multiplier: float,
    generator: np.random.Generator,
) -> dict[str, Tensor]:
    """Return what a client sends of its update under local privacy: clipped, with noise on each parameter."""
    arrays = {name: tensor.numpy(force=True) for name, tensor in update.items()}
    ways = clipped_ways(arrays, received, parameters, norm)
    noised = noisy_mean([ways], received, noise_multiplier * norm, generator)
    return {**update, **{name: torch.from_numpy(array) for name, array in noised.items()}}


def epsilon(noise_multiplier: float, rate: float, releases: int, delta: float) -> float:
    """Return ε at δ of so many releases with Gaussian noise, each of a Poisson sample of this rate.

    The accountant is Opacus' of Rényi privacy (Mironov et al. 2019, arXiv:1908.10530), for neighbours of which one has
    a client more. Without noise ε is infinite.
    """
    if not releases:
        return 0.0
    if not noise_multiplier:
        return math.inf
    root = logging.getLogger()
    handlers = list(root.handlers)
    from opacus.accountants import RDPAccountant

    root.handlers[:] = handlers  # Opacus adds one, which would print every line twice
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, releases)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a larger order might give a smaller ε
        return float(accountant.get_epsilon(delta))
