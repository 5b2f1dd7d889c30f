"""A convolution of one's own: per channel first, then over the channels."""

from torch import Tensor, nn


class Separable(nn.Module):
    """A depthwise and a pointwise convolution (Howard et al., arXiv:1704.04861), made as nn.Conv2d is.

    Keyword arguments behind a star are options: of kernels and the like those of that name, others by
    model.conv-options. A subclass of fedfmd.conv.DynamicConv2d has a bank, whose kernels policies and reports know.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size, bias: bool = True, **geometry
    ) -> None:  # noqa: ANN001, ANN003
        super().__init__()
        geometry["groups"] = in_channels
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, bias=False, **geometry)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))
