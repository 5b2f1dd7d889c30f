"""Image sources, their split over the clients, and in-memory batches.

Heavy libraries (torchvision, scikit-learn, flwr-datasets, matplotlib) are imported where they are used,
so that importing this package costs no more than importing torch.
"""

from fedfmd.data.augmentation import AUGMENTATIONS, Augmentation
from fedfmd.data.batches import batches
from fedfmd.data.images import Dataset, ImageFormat, ImageSet, fit, hold_out, load_image_set, read_image
from fedfmd.data.partition import (
    Partition,
    cached_partition,
    hold_out_own,
    load_partition,
    make_partition,
    own_test_size,
    save_partition,
)
from fedfmd.data.plot import plot_partition
from fedfmd.data.schemes import PARTITIONS, parameters_of
from fedfmd.data.sources import AUGMENT_CHOICES, DATASETS, load_dataset

__all__ = [
    "AUGMENTATIONS",
    "AUGMENT_CHOICES",
    "DATASETS",
    "PARTITIONS",
    "Augmentation",
    "Dataset",
    "ImageFormat",
    "ImageSet",
    "Partition",
    "batches",
    "cached_partition",
    "fit",
    "hold_out",
    "hold_out_own",
    "load_dataset",
    "load_image_set",
    "load_partition",
    "make_partition",
    "own_test_size",
    "parameters_of",
    "plot_partition",
    "read_image",
    "save_partition",
]
