"""The server's part of differential privacy: the noisy mean of a round's updates, and what the rounds add up to."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from fedfmd.algorithms import Update
from fedfmd.build import build_budget
from fedfmd.protocol import privacy
from fedfmd.protocol.state import Arrays
from fedfmd.settings import Settings


def private_mean(
    updates: Sequence[Update],
    current: Arrays,
    parameters: Collection[str],
    settings: Settings,
    generator: np.random.Generator,
) -> Update:
    """Return one update of all clients, in which each counts alike; in central mode clipped, and with noise."""
    chosen = settings.privacy
    central = chosen.mode == "central"
    norm = chosen.clip_norm if central else math.inf
    ways = [privacy.clipped_ways(update.arrays, update.start, parameters, norm) for update in updates]
    std = chosen.noise_multiplier * chosen.clip_norm if central else 0.0
    arrays = privacy.noisy_mean(ways, current, std, generator)
    results = tuple(result for update in updates for result in update.results)
    return Update(arrays, dict.fromkeys(arrays, len(updates)), results, start=current)


def sampling_rate(settings: Settings) -> float:
    """Return the share of the clients that a round asks."""
    asked = build_budget(settings).asked(settings.clients_per_round)
    return min(1.0, asked / settings.partition.clients)


def spent(settings: Settings, releases: int) -> float | None:
    """Return ε after so many releases; None without privacy.

    Central: each is the noisy mean of a random sample of the clients, of whom one more or less is not to be noticed.
    Local: each is an update of the client that sent the most, and the server knows whose it is; two of them may lie
    twice the norm apart.
    """
    chosen = settings.privacy
    if not chosen.clip_norm:
        return None
    if chosen.mode == "central":
        return privacy.epsilon(chosen.noise_multiplier, sampling_rate(settings), releases, chosen.delta)
    return privacy.epsilon(chosen.noise_multiplier / 2, 1.0, releases, chosen.delta)
