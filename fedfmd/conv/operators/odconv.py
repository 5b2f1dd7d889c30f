"""ODConv (ICLR 2022): attention to input, output, pixels and kernels from one squeeze."""

from __future__ import annotations

import math

from fedfmd.conv.attention import Attention, SharedAttention
from fedfmd.conv.layers import DynamicConv2d, IntPair
from fedfmd.conv.mixing import AUTO


class ODConv2d(DynamicConv2d):
    """ODConv (Li et al., ICLR 2022): y = a_out ⊙ ((Σ_k π_k (s ⊙ W_k)) ∗ (a_in ⊙ x) + Σ_k π_k b_k).

    All attentions come from one squeeze, sigmoids as σ(·/τ), the softmax as softmax(·/τ). Spatial attention
    is left out for 1 × 1 kernels, output attention for depthwise convolutions, kernel attention at K = 1.
    """

    name = "odconv"
    year = 2022

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        kernels: int = 4,
        reduction: float = 1 / 16,
        temperature: float = 30.0,
        attention_init: str = "neutral",
        mixing: str = AUTO,
        norm: str = "batch",
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            kernels=kernels,
            mixing=mixing,
            temperature=temperature,
            attention_init=attention_init,
        )
        heads = {"input": in_channels}
        if not self.depthwise:
            heads["output"] = out_channels
        if (taps := math.prod(self.kernel_size)) > 1:
            heads["spatial"] = taps
        if kernels > 1:
            heads["kernel"] = kernels
        shared = SharedAttention(in_channels, heads, reduction, norm, annealed=True)
        self.attention = Attention({"shared": shared})
        self.reset_parameters()
