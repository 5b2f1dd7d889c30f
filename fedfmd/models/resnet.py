"""Residual networks whose block convolutions come from a factory.

The blocks are torchvision's; this module arranges them (CIFAR or ImageNet stem, three or four stages, any
width) and never asks which convolution it is given.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (section 4.2: the networks for
CIFAR); https://docs.pytorch.org/vision/stable/models/resnet.html (layout, names, initialisation).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops.misc import Conv2dNormActivation

CHANNELS_PER_GROUP = 8
"""Channels that share one GroupNorm statistic. Every width of the networks here is a multiple of it."""

ConvFactory = Callable[..., nn.Module]
"""Called like ``nn.Conv2d(in_channels, out_channels, kernel_size, stride=…, padding=…, groups=…)``."""

NormFactory = Callable[[int], nn.Module]
"""Called with the number of channels."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with about `CHANNELS_PER_GROUP` channels per group, for any number of channels.

    Where that doesn't divide them, as in a user's own network, groups are larger: the next number that does.
    """
    groups = next(n for n in range(max(1, channels // CHANNELS_PER_GROUP), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)


NORMS: dict[str, NormFactory] = {
    "batch": nn.BatchNorm2d,
    "group": group_norm,
}


class Stage(nn.Sequential):
    """The residual blocks of one resolution, one after another."""


FEATURES = (Stage, BasicBlock, Bottleneck, Conv2dNormActivation)
"""Modules that end in a ReLU, so that their feature maps have no negative values."""


def feature_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's layers of feature maps, in order.

    They are the stages and blocks of a ResNet, `layer1`, `layer1.0`, …, and in a MobileNet the convolutions with an
    activation, `features.1.conv.0`, ….
    """
    return tuple(name for name, module in model.named_modules() if isinstance(module, FEATURES))


@dataclass(frozen=True)
class Architecture:
    """One residual network: its block, and for each stage the number of blocks and of channels."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, ...]
    channels: tuple[int, ...]

    def build(
        self,
        classes: int,
        *,
        conv: ConvFactory,
        norm: str = "batch",
        stem: str = "cifar",
        width: float = 1.0,
    ) -> nn.Sequential:
        """Build the network, as `resnet` does."""
        return resnet(self, classes, conv=conv, norm=norm, stem=stem, width=width)


RESNETS: dict[str, Architecture] = {
    "resnet8": Architecture(BasicBlock, (1, 1, 1), (16, 32, 64)),
    "resnet20": Architecture(BasicBlock, (3, 3, 3), (16, 32, 64)),
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
}


def cifar_stem(channels: int, norm: NormFactory) -> dict[str, nn.Module]:
    """Keep the resolution: one 3×3 convolution."""
    return {
        "conv1": nn.Conv2d(3, channels, 3, padding=1, bias=False),
        "bn1": norm(channels),
        "relu": nn.ReLU(inplace=True),
    }


def imagenet_stem(channels: int, norm: NormFactory) -> dict[str, nn.Module]:
    """Quarter the resolution: a 7×7 convolution with stride 2 and max-pooling."""
    return {
        "conv1": nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
        "bn1": norm(channels),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }


STEMS: dict[str, Callable[[int, NormFactory], dict[str, nn.Module]]] = {
    "cifar": cifar_stem,
    "imagenet": imagenet_stem,
}


def scaled(channels: int, width: float) -> int:
    """Give ``channels · width`` rounded to the nearest multiple of 8, and at least 8."""
    return max(CHANNELS_PER_GROUP, CHANNELS_PER_GROUP * int(channels * width / CHANNELS_PER_GROUP + 0.5))


def resnet(
    architecture: Architecture,
    classes: int,
    *,
    conv: ConvFactory,
    norm: str = "batch",
    stem: str = "cifar",
    width: float = 1.0,
) -> nn.Sequential:
    """Build the network that maps images B×3×H×W to logits B×classes.

    The layers have torchvision's names: conv1, bn1, layer1.0.conv1, …, fc. The convolutions on the main path
    of the residual blocks come from ``conv``; stem, 1×1 shortcuts and classifier are always plain.
    """
    norm_layer = NORMS[norm]
    channels = [scaled(c, width) for c in architecture.channels]
    layers = OrderedDict(STEMS[stem](channels[0], norm_layer))
    in_channels = channels[0]
    for stage, (blocks, planes) in enumerate(zip(architecture.blocks, channels, strict=True), start=1):
        residual_blocks = []
        for index in range(blocks):
            stride = 2 if stage > 1 and index == 0 else 1
            residual_blocks.append(
                _residual_block(architecture.block, in_channels, planes, stride, conv, norm_layer)
            )
            in_channels = planes * architecture.block.expansion
        layers[f"layer{stage}"] = Stage(*residual_blocks)
    layers |= {
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(in_channels, classes),
    }
    model = nn.Sequential(layers)
    init_convolutions(model)
    return model


def init_convolutions(model: nn.Module) -> None:
    """Draw the weights of static convolutions as He et al. (ICCV 2015) do; a dynamic one draws its own bank."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def made_like(plain: nn.Conv2d, conv: ConvFactory) -> nn.Module:
    """Make a convolution of the same shape by ``conv``."""
    return conv(
        plain.in_channels,
        plain.out_channels,
        plain.kernel_size,
        stride=plain.stride,
        padding=plain.padding,
        groups=plain.groups,
    )


def _residual_block(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    planes: int,
    stride: int,
    conv: ConvFactory,
    norm: NormFactory,
) -> nn.Module:
    """Build torchvision's block with each of its main-branch convolutions remade by ``conv``."""
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), norm(out_channels))
    module: nn.Module = block(in_channels, planes, stride, shortcut, norm_layer=norm)
    for name, plain in list(module.named_children()):
        if isinstance(plain, nn.Conv2d):
            setattr(module, name, made_like(plain, conv))
    return module
