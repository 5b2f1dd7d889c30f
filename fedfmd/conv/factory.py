"""The registry of convolutions and the factory that models use."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

from torch import nn

from fedfmd.conv.layers import ATTENTIONS, CondConv2d, DyConv2d, FMDConv2d, IntPair, ODConv2d
from fedfmd.conv.mixing import AUTO

CONVS: dict[str, type[nn.Module]] = {
    "static": nn.Conv2d,
    "condconv": CondConv2d,
    "dyconv": DyConv2d,
    "odconv": ODConv2d,
    "fmdconv": FMDConv2d,
}
PUBLISHED_WITH_BIAS = ("dyconv", "fmdconv")


def make_conv(
    name: str,
    in_channels: int,
    out_channels: int,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    bias: bool | None = None,
    *,
    kernels: int = 4,
    reduction: float = 1 / 16,
    kernel_reduction: float = 1 / 4,
    temperature: float = 30.0,
    attentions: Iterable[str] = ATTENTIONS,
    attention_init: str = "neutral",
    mixing: str = AUTO,
    norm: str = "batch",
) -> nn.Module:
    """The convolution `name` of `CONVS`, given those of the options that it has (static has none).

    `bias=None` takes the published form: a bias bank for dyconv and fmdconv, no bias for the others.
    """
    if name not in CONVS:
        nearest = difflib.get_close_matches(name, CONVS, n=1, cutoff=0)[0]
        raise ValueError(
            f"conv = {name!r} is unknown; did you mean {nearest!r}? Use one of {', '.join(CONVS)}"
        )
    options = {
        "kernels": kernels,
        "reduction": reduction,
        "kernel_reduction": kernel_reduction,
        "temperature": temperature,
        "attentions": attentions,
        "attention_init": attention_init,
        "mixing": mixing,
        "norm": norm,
    }
    accepted = inspect.signature(CONVS[name]).parameters
    return CONVS[name](
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        name in PUBLISHED_WITH_BIAS if bias is None else bias,
        **{option: value for option, value in options.items() if option in accepted},
    )
