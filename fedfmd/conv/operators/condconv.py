"""CondConv (NeurIPS 2019): weights from a routing of sigmoids."""

from __future__ import annotations

from fedfmd.conv.attention import Attention, Routing
from fedfmd.conv.layers import DynamicConv2d, IntPair
from fedfmd.conv.mixing import AUTO


class CondConv2d(DynamicConv2d):
    """CondConv (Yang et al., NeurIPS 2019): Σ_k r_k W_k with r = sigmoid(Linear(GAP(x)))."""

    name = "condconv"
    year = 2019

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
        attention_init: str = "neutral",
        mixing: str = AUTO,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            kernels=kernels,
            mixing=mixing,
            temperature=None,
            attention_init=attention_init,
        )
        self.attention = Attention({"kernel": Routing(in_channels, kernels)})
        self.reset_parameters()
