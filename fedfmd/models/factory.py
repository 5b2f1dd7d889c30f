"""Models by name: an architecture, a convolution, a stem and a normalisation, all checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from fedfmd.conv import make_conv
from fedfmd.models.mobilenet import MOBILENETS, MobileNet
from fedfmd.models.resnet import NORMS, RESNETS, STEMS, Architecture

MODELS: dict[str, Architecture | MobileNet] = {**RESNETS, **MOBILENETS}

TORCHVISION = ("resnet18", "resnet34", "resnet50", "mobilenetv2")
"""Those that torchvision has too, with the ImageNet stem."""


def make_model(
    arch: str,
    conv: str,
    classes: int,
    *,
    kernels: int = 4,
    stem: str = "cifar",
    norm: str = "batch",
    width: float = 1.0,
    **conv_options: Any,
) -> nn.Sequential:
    """Build a network that maps images B×3×H×W to logits B×classes.

    Args:
        arch: a name in ``MODELS``.
        conv: a name in ``CONVS``, for the main path of a ResNet's blocks, or all convolutions of a MobileNet
            but the stem; stem, 1×1 shortcuts and classifier stay plain.
        classes: number of classes, at least 2.
        kernels: kernels per bank of a dynamic convolution.
        stem: ``"cifar"`` (3×3, stride 1) for small images, ``"imagenet"`` (a ResNet's: 7×7, stride 2,
            max-pooling; a MobileNet's: 3×3, stride 2, and a stride in the second stage).
        norm: ``"batch"``, or ``"group"`` for GroupNorm with 8 channels per group; then the squeeze of a
            dynamic convolution keeps no batch statistics either.
        width: factor on every channel count; the result is the nearest multiple of 8, and at least 8.
        conv_options: more options of ``make_conv``, such as ``temperature``, ``attentions`` and ``mixing``.

    With ``conv="static"`` and ``stem="imagenet"``, resnet18, 34, 50 and mobilenetv2 are torchvision's: the same
    state-dict names and, from the same weights, the same output.

    Raises:
        ValueError: an unknown name (the error gives the nearest valid one), ``width`` ≤ 0 or ``classes`` < 2.
    """
    for setting, name, valid in (("arch", arch, MODELS), ("stem", stem, STEMS), ("norm", norm, NORMS)):
        _check_name(setting, name, valid)
    if not 0 < width < math.inf:
        raise ValueError(f"width = {width} must be a positive finite number, such as 0.5")
    if classes < 2:
        raise ValueError(f"classes = {classes} must be at least 2")
    block_conv = partial(make_conv, conv, kernels=kernels, norm=norm, **conv_options)
    return MODELS[arch].build(classes, conv=block_conv, norm=norm, stem=stem, width=width)


def _check_name(setting: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        nearest = get_close_matches(name, valid, n=1, cutoff=0)[0]
        raise ValueError(
            f"{setting} = {name!r} is unknown; did you mean {nearest!r}? Use one of {', '.join(valid)}"
        )
