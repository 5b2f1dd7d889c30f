from io import BytesIO

import numpy as np
import pytest

from fedfmd.data import plot_partition
from fedfmd.data.plot import clients_by_images


def counts(clients, classes):
    return np.random.default_rng(0).integers(0, 30, (clients, classes))


def draw(figure):
    figure.savefig(BytesIO(), format="png")
    return figure


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (5, 20), (60, 21), (61, 20), (101, 3), (500, 100)])
def test_any_size_can_be_drawn(clients, classes):
    figure = draw(plot_partition(counts(clients, classes), [f"c{c}" for c in range(classes)], "dirichlet"))
    total = counts(clients, classes).sum()
    assert figure.get_suptitle() == f"dirichlet\n{clients} clients, {total:,} images of {classes} classes"
    assert max(figure.get_size_inches()) < 14


def test_bars_have_the_counts_as_lengths_and_the_legend_as_colours():
    label_counts = np.array([[3, 0, 1], [0, 2, 5]])
    figure = draw(plot_partition(label_counts, ["cat", "dog", "cow"]))
    (bars,) = figure.axes[0].collections
    boxes = [path.get_extents() for path in bars.get_paths()]
    assert [(box.x0, box.x1) for box in boxes] == [(0, 3), (3, 3), (3, 4), (0, 0), (0, 2), (2, 7)]
    assert [round(box.y0 + 0.4) for box in boxes] == [0, 0, 0, 1, 1, 1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["cat", "dog", "cow"]
    colours = np.array([patch.get_facecolor() for patch in legend.get_patches()])
    assert np.allclose(bars.get_facecolors(), np.tile(colours, (2, 1)))
    assert len(np.unique(colours, axis=0)) == 3


def test_beyond_twenty_classes_a_colour_bar_replaces_the_legend():
    figure = draw(plot_partition(counts(5, 21), [""] * 21))
    assert not figure.legends
    assert figure.axes[1].get_ylabel() == "class"


def test_beyond_sixty_clients_a_heat_map_shows_classes_by_clients():
    label_counts = counts(61, 3)
    sizes, heat, _ = plot_partition(label_counts, ["cat", "dog", "cow"]).axes
    assert np.array_equal(heat.images[0].get_array().filled(0), label_counts.T)
    assert [tick.get_text() for tick in heat.get_yticklabels()] == ["cat", "dog", "cow"]
    assert sizes.get_ylim()[1] >= label_counts.sum(1).max()


def test_many_clients_are_counted_by_their_images_of_each_class():
    label_counts = np.array([[0, 2], [1, 2], [0, 0]])
    clients, step = clients_by_images(label_counts)
    assert (clients.tolist(), step) == ([[2, 1], [1, 0], [0, 2]], 1)
    clients, step = clients_by_images(np.array([[0, 100], [7, 41], [40, 3]]))
    assert step == 3
    assert clients.sum(0).tolist() == [3, 3]
    assert [np.flatnonzero(own).tolist() for own in clients.T] == [[0, 2, 13], [1, 13, 33]]


@pytest.mark.parametrize("clients", [101, 10_000])
def test_beyond_a_hundred_clients_a_picture_has_as_many_points_as_of_fewer(clients):
    label_counts = counts(clients, 3)
    sizes, heat, _ = plot_partition(label_counts, ["cat", "dog", "cow"]).axes
    assert len(sizes.patches) <= 40
    assert sum(bar.get_height() for bar in sizes.patches) == clients
    picture = heat.images[0].get_array().filled(0)
    assert picture.shape == (3, 30)
    assert picture[0, 7] == (label_counts[:, 0] == 7).sum()
