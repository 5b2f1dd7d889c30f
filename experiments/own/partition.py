"""A split of one's own: clients by the label they mostly have, and a shared rest."""

import numpy as np


def by_label(labels: np.ndarray, clients: int, rng: np.random.Generator, alpha: float) -> list[np.ndarray]:
    """Return the indices of each client's images: all random draws are from `rng`.

    Client c mostly has labels c, c + clients, …; of all images a share of alpha goes to anybody. Arguments named alpha,
    classes_per_client and min_images get those settings.
    """
    owners = labels % clients
    anybody = rng.random(len(labels)) < alpha
    owners[anybody] = rng.integers(clients, size=anybody.sum())
    return [np.flatnonzero(owners == client) for client in range(clients)]
