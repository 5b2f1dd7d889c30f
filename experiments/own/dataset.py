"""Images of one's own: here they are drawn, horizontal and vertical stripes."""

import numpy as np


def stripes(image_size: int | None) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return (images, labels), (test images, test labels): images N×H×W×3 uint8, labels whole numbers from 0.

    Arguments named dir, train, test and image_size get those settings of data; dir, train and test are paths or None.
    """
    rng, size = np.random.default_rng(0), image_size or 8
    labels = np.arange(400) % 2
    bright = np.indices((size, size))[labels] % 2 * 120
    images = (bright[..., None] + rng.integers(136, size=(400, size, size, 3))).astype(np.uint8)
    return (images[:300], labels[:300]), (images[300:], labels[300:])
