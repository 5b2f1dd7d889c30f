"""A convolution of one's own: per channel first, then over the channels."""

from torch import Tensor, nn


class Separable(nn.Module):
    """A depthwise and a pointwise convolution (Howard et al., arXiv:1704.04861), made as nn.Conv2d is.

    Arguments behind a star are options, as model.kernels and model.conv-options have them.
    """

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, **geometry):  # noqa: ANN001, ANN003, ANN204
        super().__init__()
        geometry["groups"] = in_channels
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, bias=False, **geometry)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))
