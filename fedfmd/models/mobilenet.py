"""MobileNetV2 whose block convolutions come from a factory.

The blocks are torchvision's; this module arranges them (CIFAR or ImageNet stem, any width) and never asks which
convolution it is given.

Sources: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018 (table 2);
https://docs.pytorch.org/vision/stable/models/mobilenetv2.html (layout, names, initialisation);
https://github.com/kuangliu/pytorch-cifar (which strides are 1 for CIFAR).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

from fedfmd.models.resnet import NORMS, ConvFactory, init_convolutions, made_like, scaled


class Stage(NamedTuple):
    """The blocks of one width: table 2's t, c, n and s."""

    expansion: int
    channels: int
    blocks: int
    stride: int


@dataclass(frozen=True)
class MobileNet:
    """A network of inverted residuals: the channels of its stem, its stages, and the channels of its features."""

    stem: int
    stages: tuple[Stage, ...]
    features: int

    def build(
        self,
        classes: int,
        *,
        conv: ConvFactory,
        norm: str = "batch",
        stem: str = "cifar",
        width: float = 1.0,
    ) -> nn.Sequential:
        """Build the network that maps images B×3×H×W to logits B×classes.

        The layers have torchvision's names: features.0.0, features.1.conv.0.0, …, classifier.1. All convolutions
        but the stem's come from ``conv``, as in the papers of dynamic convolutions: 1×1 and depthwise ones too.
        ``stem="cifar"`` leaves out the strides of the stem and of the second stage, so that images of 32×32 end as
        4×4. Widths below 1 leave the last features as they are, as in the paper. Unlike torchvision's it has no
        dropout before the classifier.
        """
        norm_layer = NORMS[norm]
        layer = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        small = stem == "cifar"
        in_channels = scaled(self.stem, width)
        features: list[nn.Module] = [layer(3, in_channels, stride=1 if small else 2)]
        for number, stage in enumerate(self.stages):
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 and not (small and number == 1) else 1
                channels = scaled(stage.channels, width)
                block = InvertedResidual(in_channels, channels, stride, stage.expansion, norm_layer)
                features.append(block)
                in_channels = channels
        last = scaled(self.features, max(width, 1.0))
        features.append(layer(in_channels, last, kernel_size=1))
        for module in features[1:]:
            for name, plain in list(module.named_modules()):
                if isinstance(plain, nn.Conv2d):
                    module.set_submodule(name, made_like(plain, conv))
        classifier = nn.Linear(last, classes)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        model = nn.Sequential(
            OrderedDict(
                features=nn.Sequential(*features),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(nn.Identity(), classifier),
            )
        )
        init_convolutions(model)
        return model


MOBILENETS: dict[str, MobileNet] = {
    "mobilenetv2": MobileNet(
        stem=32,
        stages=(
            Stage(1, 16, 1, 1),
            Stage(6, 24, 2, 2),
            Stage(6, 32, 3, 2),
            Stage(6, 64, 4, 2),
            Stage(6, 96, 3, 1),
            Stage(6, 160, 3, 2),
            Stage(6, 320, 1, 1),
        ),
        features=1280,
    )
}
