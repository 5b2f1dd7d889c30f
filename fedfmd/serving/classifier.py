"""A trained model with all that it takes to classify images: one file, all that an edge device needs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedfmd.build import build_model
from fedfmd.data import ImageFormat, ImageSet, batches, fit, read_image
from fedfmd.errors import SettingsError
from fedfmd.runs import FORMAT_VERSION, check_format, save_tensors
from fedfmd.settings import Settings

METADATA = "classifier"
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model in evaluation mode, the settings that it is built from, and what images it takes.

    Called with the path of an image, it gives each class's probability, the most probable first.
    """

    model: nn.Module
    settings: Settings
    images: ImageFormat

    def __call__(self, path: Path | str) -> dict[str, float]:
        """Return the classes' names and probabilities for an image file.

        Raises:
            ValueError: the file is no image; one line that starts with the path.
        """
        image = read_image(Path(path), self.images.image_size)
        named = zip(self.images.class_names, self.probabilities(image[None])[0].tolist(), strict=True)
        return dict(sorted(named, key=lambda pair: -pair[1]))

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities N x classes of images uint8 N x 3 x H x W, which are resized and cut where they don't fit."""
        if images.shape[2:] != (self.images.image_size,) * 2:
            images = fit(images, self.images.image_size)
        unlabelled = ImageSet(images, torch.zeros(len(images), dtype=torch.int64))
        mean, std = self.images.mean, self.images.std
        inputs = batches(unlabelled, BATCH_SIZE, generator=None, augment="none", mean=mean, std=std)
        with torch.inference_mode():
            return torch.cat([self.model(batch).softmax(1) for batch, _ in inputs])

    def save(self, path: Path) -> None:
        """Write the arrays as a .safetensors file; its header has format version, settings, classes and image format.

        Raises:
            OSError: it can't be written; an older file is still there.
        """
        header = {"version": FORMAT_VERSION, "settings": self.settings.kept(), "images": asdict(self.images)}
        save_tensors(path, self.model.state_dict(), {METADATA: json.dumps(header)})


def load_classifier(path: Path | str) -> Classifier:
    """Read what `Classifier.save` or ``fedfmd export --format safetensors`` wrote.

    Raises:
        SettingsError: no such file, it holds no classifier, or a newer version of fedfmd wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[METADATA])
            check_format(Path(path), header.get("version", 0))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except KeyError:
        raise SettingsError(
            f"{path} holds no classifier: make one of a checkpoint by `fedfmd export CHECKPOINT --format safetensors`"
        ) from None
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"cannot read the classifier {path}: {error}") from None
    images = ImageFormat.from_lists(header["images"])
    settings = Settings.from_mapping(header["settings"])
    model = build_model(settings, len(images.class_names), images.image_size)
    model.load_state_dict(state)
    return Classifier(model.eval(), settings, images)
