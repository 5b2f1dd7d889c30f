"""The label distribution of a split as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfmd.errors import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 60
MAX_CLIENTS = 100
"""Clients up to which each is shown; of more, how many have so many images."""

MAX_LEVELS = 40
MAX_NAMES = 20


def plot_partition(label_counts: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """Show how many images of each class each client has (`label_counts`: clients x classes).

    Up to 60 clients are stacked bars, coloured by class; up to 100 are a heat map under the clients' sizes. Of more it
    shows how many have so many images, in all and of each class.
    """
    need("the picture of a partition", "matplotlib")
    from matplotlib.figure import Figure

    clients, classes = label_counts.shape
    total = f"{clients} clients, {label_counts.sum():,} images of {classes} classes"
    figure = Figure(layout="constrained", dpi=120)
    figure.suptitle(f"{title}\n{total}" if title else total, fontsize=11)
    draw = _bars if clients <= MAX_BARS else _heat_map if clients <= MAX_CLIENTS else _density
    draw(figure, label_counts, class_names)
    return figure


def clients_by_images(label_counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Return how many clients have 0, 1, … images of each class: levels x classes, 40 levels at most.

    Also returns how many numbers of images are one level: the first one is from 0 to this, without it.
    """
    step = -(-(int(label_counts.max()) + 1) // MAX_LEVELS)
    levels = label_counts // step
    most = levels.max() + 1
    return np.stack([np.bincount(own, minlength=most) for own in levels.T], axis=1), step


def _bars(figure: Figure, counts: np.ndarray, names: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    clients, classes = counts.shape
    named = classes <= MAX_NAMES
    figure.set_size_inches(8, 2 + max(0.18 * clients, 0.14 * min(classes, MAX_NAMES)))
    axes = figure.subplots()
    palette = colormaps["tab10" if classes <= 10 else "tab20" if named else "turbo"]
    colours = ListedColormap(palette(np.arange(classes) if named else np.linspace(0, 1, classes)))
    right = np.cumsum(counts, axis=1)
    left, centre = right - counts, np.broadcast_to(np.arange(clients)[:, None], counts.shape)
    corners = [(left, centre - 0.4), (right, centre - 0.4), (right, centre + 0.4), (left, centre + 0.4)]
    # one collection, because thousands of single bars take matplotlib tens of seconds
    bars = PolyCollection(list(np.array(corners).transpose(2, 3, 0, 1).reshape(-1, 4, 2)), cmap=colours)
    bars.set_array(np.tile(np.arange(classes), clients))
    bars.set_clim(-0.5, classes - 0.5)
    axes.add_collection(bars)
    axes.set(xlabel="images", ylabel="client", xlim=(0, 1.02 * right.max()), ylim=(clients - 0.4, -0.6))
    axes.set_yticks(range(0, clients, 1 if clients <= 40 else 5))
    if named:
        handles = [Patch(color=colours(c), label=name) for c, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside right center", title="class", fontsize=8)
    else:
        figure.colorbar(bars, ax=axes, label="class")


def _heat_map(figure: Figure, counts: np.ndarray, names: Sequence[str]) -> None:
    from matplotlib.colors import PowerNorm

    clients, classes = counts.shape
    figure.set_size_inches(10, 3.5 + 0.14 * min(classes, 30))
    sizes, heat = figure.subplots(2, sharex=True, height_ratios=[1, 2.5])
    sizes.fill_between(
        np.arange(-0.5, clients), [*counts.sum(1), counts[-1].sum()], step="post", color="tab:gray"
    )
    sizes.set(ylabel="images", ylim=(0, None))
    # absent classes are white; by the square root, so that few images can be told from fewer
    picture = heat.imshow(
        np.where(counts, counts, np.nan).T,
        aspect="auto",
        interpolation="nearest",
        cmap="YlGnBu",
        norm=PowerNorm(0.5, vmin=0),
    )
    heat.set(xlabel="client")
    _name_classes(heat, names)
    figure.colorbar(picture, ax=heat, label="images per class")


def _density(figure: Figure, counts: np.ndarray, names: Sequence[str]) -> None:
    from matplotlib.colors import LogNorm

    figure.set_size_inches(10, 4 + 0.14 * min(len(names), 30))
    sizes, heat = figure.subplots(2, height_ratios=[1, 2])
    clients, step = clients_by_images(counts.sum(1, keepdims=True))
    sizes.bar(step * np.arange(len(clients)), clients[:, 0], width=step, align="edge", color="tab:gray")
    sizes.set(xlabel="images", ylabel="clients")
    clients, step = clients_by_images(counts)
    # levels that nobody has are white; by the logarithm, as most clients have few images of most classes
    picture = heat.imshow(
        np.where(clients, clients, np.nan).T,
        aspect="auto",
        interpolation="nearest",
        cmap="YlGnBu",
        norm=LogNorm(1, max(2, clients.max())),
        extent=(0, step * len(clients), len(names) - 0.5, -0.5),
    )
    heat.set(xlabel="images of the class")
    _name_classes(heat, names)
    figure.colorbar(picture, ax=heat, label="clients")


def _name_classes(heat: Axes, names: Sequence[str]) -> None:
    heat.set(ylabel="class")
    if len(names) <= MAX_NAMES:
        heat.set_yticks(range(len(names)), names, fontsize=8)
