"""Trained models for other runtimes, as ONNX or `torch.export` files that take batches of any size."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from fedfmd.conv import dynamic_layers
from fedfmd.errors import SettingsError, need, one_line


def export_onnx(model: nn.Module, image_size: int, path: Path) -> None:
    """Write the model as one ONNX file, `images` B × 3 × `image_size` × `image_size` to `logits`, B free.

    Raises:
        SettingsError: the packages of the extra `export` are missing.
    """
    need("ONNX export", "onnx", "onnxscript")
    torch.onnx.export(
        _program(model, image_size),
        f=path,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def export_program(model: nn.Module, image_size: int, path: Path) -> None:
    """Write the model for `torch.export.load`, from B × 3 × `image_size` × `image_size` to logits, B free."""
    torch.export.save(_program(model, image_size), path)


def _program(model: nn.Module, image_size: int) -> ExportedProgram:
    """Capture inference on the CPU; the model stays as it is."""
    model = copy.deepcopy(model).cpu().eval()
    for layer in dynamic_layers(model).values():
        layer.mixing = "auto"  # while exporting: a way that does not depend on the batch size
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # such as a network of the user's own whose path depends on the images
        raise SettingsError(
            f"torch.export can't capture the network ({one_line(error)}): use --format safetensors"
        ) from error
