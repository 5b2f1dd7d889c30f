"""DyConv (CVPR 2020): a softmax over the kernels."""

from __future__ import annotations

from fedfmd.conv.attention import Attention, KernelAttention
from fedfmd.conv.layers import DynamicConv2d, IntPair
from fedfmd.conv.mixing import AUTO


class DyConv2d(DynamicConv2d):
    """DyConv (Chen et al., CVPR 2020): Σ_k π_k W_k with π = softmax(Linear(ReLU(Linear(GAP(x)))) / τ)."""

    name = "dyconv"
    year = 2020
    published_bias = True

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
        kernel_reduction: float = 1 / 4,
        temperature: float = 30.0,
        attention_init: str = "neutral",
        mixing: str = AUTO,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            kernels=kernels,
            mixing=mixing,
            temperature=temperature,
            attention_init=attention_init,
        )
        self.attention = Attention({"kernel": KernelAttention(in_channels, kernels, kernel_reduction)})
        self.reset_parameters()
