"""Ways to convolve each sample with its own mixture of the K kernels; all give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfmd.conv.attention import AttentionValues

AUTO = "auto"


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over the image; the arguments of `F.conv2d`."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def conv(self, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
        """`F.conv2d` with this geometry."""
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups or self.groups)


def convolve(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    attention: AttentionValues,
    geometry: Geometry,
    mixing: str,
) -> Tensor:
    """a_out ⊙ ((s ⊙ Σ_k π_k W_k) ∗ (a_in ⊙ x) + Σ_k π_k b_k): from B × C × H × W to B × O × H' × W'."""
    kernels = bank.shape[0]
    if attention.input is not None:
        x = x * attention.input[:, :, None, None]
    pi = attention.kernel
    if pi is None:
        pi = x.new_full((x.shape[0], kernels), 1 / kernels)
    if attention.spatial is None and (attention.kernel is None or kernels == 1):
        y = geometry.conv(x, bank.mean(0))
        if attention.kernel is not None:
            y = y * pi[:, :, None, None]
    else:
        way = MIXINGS[choose_mixing() if mixing == AUTO else mixing]
        y = way(x, bank, pi, attention.spatial, geometry)
    if bias_bank is not None:
        y = y + (pi @ bias_bank)[:, :, None, None]
    return y if attention.output is None else y * attention.output[:, :, None, None]


def choose_mixing() -> str:
    """The way for "auto"."""
    return "outputs" if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() else "folded"


def folded(x: Tensor, bank: Tensor, pi: Tensor, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """One grouped convolution over the batch folded into the channels, with B mixed kernels."""
    batch, channels, height, width = x.shape
    weight = (pi @ bank.flatten(1)).view(batch, *bank.shape[1:])
    if spatial is not None:
        weight = weight * spatial.view(batch, 1, 1, *bank.shape[3:])
    y = geometry.conv(
        x.reshape(1, batch * channels, height, width), weight.flatten(0, 1), groups=batch * geometry.groups
    )
    return y.view(batch, bank.shape[1], *y.shape[2:])


def outputs(x: Tensor, bank: Tensor, pi: Tensor, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution to K·O channels, then mix the K results: no operation depends on the batch size."""
    if spatial is not None:
        x, bank, geometry = to_columns(x, bank, spatial, geometry)
    kernels, out_channels = bank.shape[:2]
    groups = geometry.groups
    weight = bank.unflatten(1, (groups, out_channels // groups)).transpose(0, 1).flatten(0, 2)
    y = geometry.conv(x, weight).unflatten(1, (groups, kernels, out_channels // groups))
    return torch.einsum("bgkohw,bk->bgohw", y, pi).flatten(1, 2)


def to_columns(
    x: Tensor, bank: Tensor, spatial: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Geometry]:
    """The same convolution with 1 × 1 kernels, over the unfolded columns scaled by the spatial attention."""
    kernel_size = bank.shape[3:]
    columns = F.unfold(x, kernel_size, geometry.dilation, geometry.padding, geometry.stride)
    columns = columns.unflatten(1, (x.shape[1], -1)) * spatial.flatten(1)[:, None, :, None]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], kernel_size, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]
    pointwise = Geometry((1, 1), (0, 0), (1, 1), geometry.groups)
    return columns.flatten(1, 2).unflatten(2, size), bank.flatten(2)[..., None, None], pointwise


MIXINGS: dict[str, Callable[..., Any]] = {"folded": folded, "outputs": outputs}
