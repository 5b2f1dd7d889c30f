"""Image sources, their split over the clients, and batches of images in memory or decoded on the way.

Heavy libraries (torchvision, scikit-learn, flwr-datasets, matplotlib) are imported where they are used,
so that importing this package costs no more than importing torch.
"""

from fedfmd.data.augmentation import AUGMENTATIONS, Augmentation, fit
from fedfmd.data.batches import batches
from fedfmd.data.images import Dataset, ImageFormat, Images, ImageSet, hold_out
from fedfmd.data.loading import load_image_set, read_image
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
from fedfmd.data.streaming import MEMORY_GB, STREAMING, StreamedImages, Streaming, decoded_by

__all__ = [
    "AUGMENTATIONS",
    "AUGMENT_CHOICES",
    "DATASETS",
    "MEMORY_GB",
    "PARTITIONS",
    "STREAMING",
    "Augmentation",
    "Dataset",
    "ImageFormat",
    "ImageSet",
    "Images",
    "Partition",
    "StreamedImages",
    "Streaming",
    "batches",
    "cached_partition",
    "decoded_by",
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
