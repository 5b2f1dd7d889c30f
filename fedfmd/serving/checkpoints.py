"""The models in checkpoints: built again from the settings that lie beside their arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fedfmd.build import build_dataset, build_model
from fedfmd.errors import SettingsError, one_line
from fedfmd.protocol.state import check_weights
from fedfmd.runs import load_model
from fedfmd.serving.classifier import Classifier
from fedfmd.serving.export import export_onnx, export_program
from fedfmd.settings import Settings
from fedfmd.start import settings_in

ExportFormat = Literal["onnx", "torch-export", "safetensors"]

EXPORTS = {"onnx": (export_onnx, ".onnx"), "torch-export": (export_program, ".pt2")}
CLASSIFIER_ENDING = ".model.safetensors"


def trained_model(checkpoint: Path) -> tuple[nn.Module, Settings]:
    """Load the model of a run's ``checkpoints/round-….safetensors`` on the CPU, and the run's settings.

    Raises:
        SettingsError: no such file, or it holds no model of a run; of a run's folder it names the newest one.
    """
    if checkpoint.is_dir():
        newest = max(checkpoint.glob("**/round-*[0-9].safetensors"), default=None)
        hint = f": name one of the files in it, for instance {newest}" if newest else ""
        raise SettingsError(f"cannot read the checkpoint: {checkpoint} is a folder{hint}")
    try:
        arrays, header = load_model(checkpoint)
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read the checkpoint: {error}") from None
    classes = len(header.class_names) or _classes_by_shape(arrays)
    if not header.settings or not classes:
        raise SettingsError(f"{checkpoint} holds no model of a run")
    settings = settings_in(checkpoint, header)
    model = build_model(settings, classes)
    try:
        model.load_state_dict(arrays)
        check_weights(arrays, model)
    except RuntimeError as error:
        raise SettingsError(f"{checkpoint} holds another model: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise SettingsError(f"{checkpoint} holds no trained model: {error}") from None
    return model, settings


def _classes_by_shape(arrays: Mapping[str, Tensor]) -> int:
    """How many classes a model has whose file doesn't tell, as those made before files had a version; 0: none."""
    return len(arrays.get("fc.bias", ()))


def _check_size(model: nn.Module, image_size: int) -> None:
    """See that the model takes images of this size, for which it may not have been made."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # a network of the user's own may raise anything
        raise SettingsError(
            f"--image-size = {image_size}: the model fails on such images: {one_line(error)}"
        ) from None


def export_checkpoint(
    checkpoint: Path, target: ExportFormat, out: Path | None, image_size: int | None
) -> Path:
    """Write a checkpoint's model for another runtime; returns the file.

    Args:
        checkpoint: as in `trained_model`.
        target: what to write.
        out: the file; by default the checkpoint's path with the format's ending.
        image_size: height and width of the images; by default those that the run was trained on.

    Raises:
        SettingsError: the checkpoint can't be used, it fails on images of this size, or the format's packages are
            missing.
    """
    model, settings = trained_model(checkpoint)
    if image_size:
        _check_size(model, image_size)
    if target == "safetensors":
        images = build_dataset(settings).format
        classifier = Classifier(model, settings, replace(images, image_size=image_size or images.image_size))
        write, ending = classifier.save, CLASSIFIER_ENDING
    else:
        size = image_size or settings.data.image_size or build_dataset(settings).image_size
        export, ending = EXPORTS[target]
        write = partial(export, model, size)
    path = out or checkpoint.with_suffix(ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path
