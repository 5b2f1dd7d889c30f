"""Where a network looks: Grad-CAM++ maps of its classes on given images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfmd.models import feature_layers

FINE_ENOUGH = 7
"""Pixels per side of the maps that Grad-CAM++ is used with on ImageNet (a ResNet's last stage at 224 × 224)."""


@torch.no_grad()
def explained_layers(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Return the layers that can be explained, in the network's order, with the pixels per side of their maps.

    They are `feature_layers`, and in a network of another kind, as a user's own, all layers whose output are maps
    without negative values for these images.
    """
    names = feature_layers(model) or [name for name, _ in model.named_modules() if name]
    sides: dict[str, int] = {}

    def record(name: str, _module: nn.Module, _inputs: object, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and not (out < 0).any():
            sides[name] = min(out.shape[2:])

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(record, name)))
        model(images)
    return {name: sides[name] for name in names if name in sides}


def default_layer(layers: Mapping[str, int]) -> str:
    """Return the deepest of `explained_layers`, blocks aside, with 7 × 7 pixels or more, or the first if none has.

    Deeper features are closer to the class, but small images leave too few of them to show a place: the last
    stage of a ResNet-18 has 4 × 4 at 32 × 32 pixels.
    """
    stages = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    return next((name for name in reversed(stages) if layers[name] >= FINE_ENOUGH), stages[0])


def grad_cam_pp(model: nn.Module, layer: str, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, arXiv:1710.11063): how much each pixel speaks for a class.

    With the layer's features A ≥ 0 and the gradient g = ∂S/∂A of the class's logit S, channel k has the weight
    w_k = Σ_ij relu(g_ij) / (2 + g_ij Σ_ab A_ab), and the map is Σ_k w_k A^k. This is the paper's closed form for
    the score exp(S), with numerator and denominator of α divided by g², and without the factor exp(S), which
    cancels when the map is scaled. It takes S to be piecewise linear in A: that holds between the last stage
    and the logits; from earlier layers on, normalisation by group and attention make it an approximation.

    Args:
        model: a classifier in evaluation mode; nothing of it is changed.
        layer: name of the submodule whose (last) output is explained (see `explained_layers`).
        images: N × 3 × H × W, normalised as the model expects.
        classes: int64 N, the class to explain in each image; by default the predicted one.

    Returns:
        N × H × W in [0, 1]: bilinear from the layer's resolution to the images', each map divided by its
        highest value. A map of an image where nothing speaks for the class is 0.

    Raises:
        AttributeError: no such layer.
        ValueError: a layer whose output is no feature maps, or has negative values.
    """
    features: list[Tensor] = []

    def start_here(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        features.append(out.detach().requires_grad_())
        return features[-1].clone()  # what follows may work in place

    handle = model.get_submodule(layer).register_forward_hook(start_here)
    try:
        with torch.enable_grad():
            logits = model(images)
            chosen = logits.argmax(1) if classes is None else classes
            score = logits.gather(1, chosen[:, None]).sum()
    finally:
        handle.remove()
    maps = features[-1]
    if maps.ndim != 4 or (maps < 0).any():
        raise ValueError(f"layer = {layer!r}: Grad-CAM++ needs feature maps without negative values")
    (gradient,) = torch.autograd.grad(score, maps)
    maps = maps.detach()
    rising = gradient.relu()
    weights = (rising / (2 + rising * maps.sum((2, 3), keepdim=True))).sum((2, 3), keepdim=True)
    cam = F.interpolate((weights * maps).sum(1, keepdim=True), images.shape[2:], mode="bilinear")[:, 0]
    highest = cam.amax((1, 2), keepdim=True)
    return cam / torch.where(highest > 0, highest, 1)
