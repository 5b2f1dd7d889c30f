"""What the attentions of a trained model look at: Grad-CAM++ pictures of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedfmd.build import build_dataset
from fedfmd.conv import AttentionRecord, only_attentions, record_attention, recorded_attentions
from fedfmd.data import Dataset, Images, ImageSet, batches, read_image
from fedfmd.errors import SettingsError, not_one_of
from fedfmd.serving.checkpoints import trained_model
from fedfmd.serving.gradcam import default_layer, explained_layers, grad_cam_pp

TYPICAL_IMAGES = 128
"""Images of the training set over which an attention that is switched off is averaged."""

LINE = 30
"""Characters that fit above a picture."""

UNLABELLED = -1
"""The label of an image of unknown class."""


@dataclass(frozen=True, eq=False)
class Column:
    """The maps N × H × W of all images, and the model's `probabilities` N × classes, with some attentions."""

    title: str
    maps: Tensor
    probabilities: Tensor


def write_cam(
    checkpoint: Path,
    images: Sequence[str],
    out: Path,
    layer: str | None = None,
    class_index: int | None = None,
) -> Path:
    """Write a PNG with a row per image: the image, and Grad-CAM++ maps with each attention alone and with all.

    "Alone" means that the model's other attentions are fixed to their means over images of the training set
    (see `only_attentions`). All maps of a row are of one class, so that they can be compared; above each
    stands what the model then predicts.

    Args:
        checkpoint: as in `trained_model`.
        images: image files, or `test:3` for image 3 of the run's test set.
        out: the picture.
        layer: a stage or residual block; by default `default_layer`.
        class_index: the class to explain; by default the one that the model predicts for the image.

    Raises:
        SettingsError: what can't be used, in one line.
    """
    model, settings = trained_model(checkpoint)
    model.eval()
    dataset = build_dataset(settings)
    if class_index is not None and not 0 <= class_index < dataset.classes:
        raise SettingsError(f"--class = {class_index}: the classes are 0..{dataset.classes - 1}")
    shown = _read(images, dataset)
    (inputs,) = _inputs(shown, dataset, len(shown))
    layers = explained_layers(model, inputs)
    if not layers:
        raise SettingsError(
            f"{checkpoint}: no layer of {settings.model.arch} has feature maps without negative values for these "
            "images, which Grad-CAM++ needs"
        )
    if layer is not None and layer not in layers:
        raise SettingsError(f"--layer = {layer!r}: {not_one_of(layer, layers)}")
    layer = layer or default_layer(layers)
    with torch.no_grad():
        predicted = model(inputs).argmax(1)
    classes = predicted if class_index is None else torch.full_like(predicted, class_index)
    columns = explain(model, layer, inputs, classes, _typical_attention(model, dataset))
    names = [Path(image).name for image in images]
    figure = plot_cam(shown, names, classes, columns, dataset.class_names, layer)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


def explain(
    model: nn.Module, layer: str, inputs: Tensor, classes: Tensor, usual: AttentionRecord
) -> list[Column]:
    """Make a column for each attention that the model has, alone, and one for all together.

    A model with a single attention has only the latter, and so has a static one.
    """
    attentions = recorded_attentions(usual)
    variants: dict[str, tuple[str, ...]] = (
        {f"{name} only": (name,) for name in attentions} if len(attentions) > 1 else {}
    )
    variants[" + ".join(attentions) or "static"] = attentions
    columns = []
    for title, kept in variants.items():
        with only_attentions(model, kept, usual), torch.no_grad():
            maps, logits = grad_cam_pp(model, layer, inputs, classes), model(inputs)
        columns.append(Column(title, maps, logits.softmax(1)))
    return columns


def plot_cam(
    shown: ImageSet,
    names: Sequence[str],
    classes: Tensor,
    columns: Sequence[Column],
    class_names: Sequence[str],
    layer: str,
) -> Figure:
    """Draw the grid; the maps are those of `classes` (N), and a label below 0 is not known."""
    count, width = len(shown), 1 + len(columns)
    figure = Figure(figsize=(2 * width + 1, 2.15 * count + 0.8), dpi=120, layout="constrained")
    figure.suptitle(f"Grad-CAM++ at {layer}", fontsize=11)
    grid = figure.subplots(count, width, squeeze=False)
    for axes, heading in zip(grid[0], ("image", *(column.title for column in columns)), strict=True):
        axes.set_title(heading, weight="bold", fontsize=9)
    for row, (original, *overlays) in enumerate(grid):
        label, explained = int(shown.labels[row]), int(classes[row])
        original.imshow(shown.images[row].permute(1, 2, 0).numpy())
        known = "" if label == UNLABELLED else f" (label {class_names[label]})"
        original.set_xlabel(fill(f"{names[row]}{known}", LINE), fontsize=8)
        original.set_ylabel(fill(f"maps of class {class_names[explained]}", LINE), fontsize=8)
        for axes, column in zip(overlays, columns, strict=True):
            axes.imshow(shown.images[row].float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255)
            heat = axes.imshow(column.maps[row].numpy(), cmap="turbo", vmin=0, vmax=1, alpha=0.55)
            prediction = _prediction(column.probabilities[row], explained, class_names)
            axes.set_xlabel(fill(prediction, LINE), fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.xaxis.set_label_position("top")
    bar = figure.colorbar(heat, ax=grid, aspect=15 * count)
    bar.set_label("share of the map's highest value", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _prediction(probabilities: Tensor, explained: int, class_names: Sequence[str]) -> str:
    """Return the most probable class, and the explained one if that is another."""
    classes = dict.fromkeys((int(probabilities.argmax()), explained))
    return ", ".join(f"{class_names[index]}: {probabilities[index]:.0%}" for index in classes)


def _read(images: Sequence[str], dataset: Dataset) -> ImageSet:
    """Read the images at the size of the run's, in colour, with their labels where these are known."""
    pixels, labels = zip(*(_read_one(image, dataset) for image in images), strict=True)
    return ImageSet(torch.stack(pixels), torch.tensor(labels))


def _read_one(image: str, dataset: Dataset) -> tuple[Tensor, int]:
    if found := re.fullmatch(r"test:(\d+)", image):
        index = int(found[1])
        if index >= len(dataset.test):
            raise SettingsError(f"{image}: the run's test set has the images 0..{len(dataset.test) - 1}")
        chosen = dataset.test.subset(torch.tensor([index])).in_memory()
        return chosen.images[0], int(chosen.labels[0])
    if not Path(image).is_file():
        raise SettingsError(f"{image}: no such image; give a file, or test:N for one of the run's test set")
    try:
        return read_image(Path(image), dataset.image_size), UNLABELLED
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _typical_attention(model: nn.Module, dataset: Dataset) -> AttentionRecord:
    """Average what the attentions do on images spread evenly over the training set, which may be sorted by class."""
    chosen = torch.linspace(0, len(dataset.train) - 1, min(TYPICAL_IMAGES, len(dataset.train))).long()
    with record_attention(model) as record, torch.no_grad():
        for inputs in _inputs(dataset.train.subset(chosen), dataset):
            model(inputs)
    return record


def _inputs(images: Images, dataset: Dataset, batch_size: int = 32) -> Iterator[Tensor]:
    """Return the images in batches, normalised as in training."""
    for inputs, _ in batches(
        images, batch_size, generator=None, augment="none", mean=dataset.mean, std=dataset.std
    ):
        yield inputs
