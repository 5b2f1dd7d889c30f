import numpy as np
import pytest

from fedfmd.data import make_partition
from fedfmd.data.schemes import PARTITIONS

LABELS = np.arange(600) % 10


def sizes(scheme, **options):
    return np.sort(make_partition(LABELS, scheme, 10, **options).sizes)


def classes_per_client(**options):
    counts = make_partition(LABELS, "dirichlet", 10, **options).label_counts(LABELS, 10)
    return (counts > 0).sum(1).mean()


def test_iid_shares_differ_by_one_image_at_most():
    assert make_partition(LABELS, "iid", 7).sizes.tolist() == [86, 86, 86, 86, 86, 85, 85]


def test_dirichlet_is_more_uneven_for_small_alpha():
    assert classes_per_client(alpha=0.1) < 6 < 9 < classes_per_client(alpha=100)


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_pathological_clients_have_their_number_of_classes(classes):
    partition = make_partition(LABELS, "pathological", 20, classes_per_client=classes)
    assert ((partition.label_counts(LABELS, 10) > 0).sum(1) == classes).all()


@pytest.mark.parametrize(("clients", "classes"), [(5, 2), (4, 3), (2, 5)])
def test_few_pathological_clients_still_have_all_classes_between_them(clients, classes):
    """Random draws hardly ever leave none out."""
    partition = make_partition(LABELS, "pathological", clients, classes_per_client=classes)
    owned = partition.label_counts(LABELS, 10) > 0
    assert (owned.sum(1) == classes).all()
    assert owned.any(0).all()


def test_quantity_skews_sizes_but_not_labels():
    even, skewed = sizes("quantity", alpha=1000), sizes("quantity", alpha=0.3)
    assert even[-1] - even[0] < 20
    assert skewed[-1] - skewed[0] > 100
    partition = make_partition(LABELS, "quantity", 10, alpha=0.3)
    largest = partition.indices[partition.sizes.argmax()]
    shares = np.bincount(LABELS[largest]) / len(largest)
    assert 0.05 < shares.min() <= shares.max() < 0.15


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6])
def test_quantity_meets_any_alpha(alpha):
    assert sizes("quantity", alpha=alpha, min_images=5)[0] >= 5


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_more_clients_than_images_are_refused(scheme):
    message = "partition.clients = 10000 but the training set has 600 images: .* use at most 600 clients"
    with pytest.raises(ValueError, match=message):
        make_partition(LABELS, scheme, 10000)


@pytest.mark.parametrize(
    "scheme", [name for name, scheme in PARTITIONS.items() if "alpha" in scheme.parameters]
)
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), 1e308])
def test_alpha_must_be_positive_and_finite(scheme, alpha):
    with pytest.raises(
        ValueError, match=f"partition.alpha = {str(alpha).replace('+', '.')}: must be above 0"
    ):
        make_partition(LABELS, scheme, 10, alpha=alpha)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "dirichlett"}, "partition.scheme = 'dirichlett': must be one of iid, dirichlet"),
        ({"clients": 0}, "partition.clients = 0: must be at least 1"),
        ({"min_images": 0}, "partition.min-images = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"min_images": 61}, "partition.clients = 10 .*partition.min-images = 61, so use at most 9 clients"),
        ({"classes_per_client": 0}, "partition.classes-per-client = 0: must be 1 to 10"),
        ({"classes_per_client": 11}, "partition.classes-per-client = 11: must be 1 to 10"),
        ({"clients": 4}, "partition.classes-per-client = 2 with partition.clients = 4 makes 8 shares"),
        ({"clients": 400}, "partition.classes-per-client = 2 with partition.clients = 400 makes 800 shares"),
    ],
)
def test_impossible_settings_are_refused_before_drawing(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_partition(LABELS, **{"scheme": "pathological", "clients": 10} | options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("scheme", "clients", "options", "message"),
    [
        ("dirichlet", 100, {"alpha": 0.001}, "^partition.alpha = 0.001, .*raise partition.alpha or lower"),
        ("dirichlet", 100, {"alpha": 0.5, "min_images": 6}, "partition.min-images = 6: .* too few images"),
        (
            "pathological",
            4,
            {"classes_per_client": 3, "min_images": 150},
            "^partition.classes-per-client = 3, partition.clients = 4, .*without a client",
        ),
    ],
)
def test_unlucky_settings_end_with_a_clear_error(scheme, clients, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_partition(LABELS, scheme, clients, **options)
    assert "\n" not in str(raised.value)
