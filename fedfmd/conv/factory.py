"""The registry of convolutions and the factory that models use."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fedfmd.conv import operators
from fedfmd.conv.layers import DynamicConv2d, IntPair
from fedfmd.errors import SettingsError, nearest_of
from fedfmd.own_code import call, find, is_own


def _operators() -> Iterator[type[DynamicConv2d]]:
    """All classes of dynamic convolutions in the files of `fedfmd.conv.operators`."""
    for found in iter_modules(operators.__path__, f"{operators.__name__}."):
        for kind in vars(import_module(found.name)).values():
            if inspect.isclass(kind) and issubclass(kind, DynamicConv2d) and kind.__module__ == found.name:
                yield kind


CONVS: dict[str, type[nn.Module]] = {
    "static": nn.Conv2d,
    **{kind.name: kind for kind in sorted(_operators(), key=lambda kind: (kind.year, kind.name))},
}
"""The convolutions by name, in the order of their publication."""


def conv_class(name: str) -> type[nn.Module]:
    """Return the class of the convolution that `name` of `CONVS` stands for, or a user's own ``module:Class``.

    Raises:
        ValueError: an unknown name, or something else than the class of a module.
    """
    if not is_own(name):
        if name in CONVS:
            return CONVS[name]
        raise ValueError(
            f"conv = {name!r} is unknown; did you mean {nearest_of(name, CONVS)!r}? Use one of {', '.join(CONVS)}"
        )
    kind = find("model.conv", name)
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise SettingsError(f"model.conv = {name!r} must be a class that derives from nn.Module")
    return kind


def is_dynamic(name: str) -> bool:
    """Whether the convolution of this name has a bank of kernels."""
    return issubclass(conv_class(name), DynamicConv2d)


def options_of(name: str) -> Mapping[str, Any]:
    """Return the options of a convolution with their defaults: the keyword arguments of its class."""
    parameters = inspect.signature(conv_class(name)).parameters.values()
    return {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}


OPTIONS: Mapping[str, Any] = MappingProxyType({k: v for name in CONVS for k, v in options_of(name).items()})
"""All options that any convolution has, with a default."""


def make_conv(
    name: str,
    in_channels: int,
    out_channels: int,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    bias: bool | None = None,
    padding_mode: str = "zeros",
    **options: Any,
) -> nn.Module:
    """Return the convolution `name` of `CONVS`, given those of the `options` that it has (static has none).

    A user's own ``module:Class`` is made in the same way: as an `nn.Conv2d`, with those of the options that are
    keyword arguments of its class. `bias=None` takes the published form: a bias bank for dyconv and fmdconv, no bias
    for condconv and odconv.

    Raises:
        ValueError: an unknown name, an option that no convolution has, or a value that can't be used.
    """
    kind, accepted = conv_class(name), options_of(name)
    for option, value in options.items():
        if option not in OPTIONS and option not in accepted:
            raise ValueError(f"{option} = {value!r}: no convolution has it; use any of {', '.join(OPTIONS)}")
    if bias is None:
        bias = issubclass(kind, DynamicConv2d) and kind.published_bias
    geometry = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
    }
    if padding_mode != "zeros":
        geometry["padding_mode"] = padding_mode
    arguments = geometry | {option: value for option, value in options.items() if option in accepted}
    layer: nn.Module = call("model.conv", name, arguments) if is_own(name) else kind(**arguments)
    return layer


def has_kernel_attention(name: str, **options: Any) -> bool:
    """Whether layers of the convolution `name` with these options weigh their kernels by the image."""
    with torch.device("meta"):  # draws no numbers
        layer = make_conv(name, 8, 8, 3, **options)
    return isinstance(layer, DynamicConv2d) and layer.has_kernel_attention
