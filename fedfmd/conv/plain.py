"""Kernel mixing in plain tensor operations: differentiable to any order, the reference for the fused ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over the image: the arguments of `F.conv2d`."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def movement(self) -> tuple[tuple[int, int], ...]:
        """Stride, padding, dilation."""
        return self.stride, self.padding, self.dilation

    def conv(self, x: Tensor, weight: Tensor, samples: int = 1) -> Tensor:
        """`F.conv2d`; x may hold several samples in its channels, each with its own kernel."""
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups * samples)

    def conv_backward(
        self, x: Tensor, weight: Tensor, grad: Tensor, samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of x and weight in `conv`, in one call: faster than `torch.nn.grad`'s two."""
        stride, padding, dilation = self.movement
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            *(grad, x, weight, None, stride, padding, dilation),
            *(False, (0, 0), self.groups * samples, (True, True, False)),
        )
        return dx, dweight

    def output_size(self, image: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width

    def unfold(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Return the columns B × C·kh·kw × H'·W' that turn the convolution into a matrix product."""
        return F.unfold(x, kernel, self.dilation, self.padding, self.stride)

    def fold(self, columns: Tensor, image: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
        """Return the transpose of `unfold`."""
        return F.fold(columns, image, kernel, self.dilation, self.padding, self.stride)


def per_channel(values: Tensor) -> Tensor:
    """B × C as B × C × 1 × 1."""
    return values[:, :, None, None]


def mix(pi: Tensor, bank: Tensor) -> Tensor:
    """Σ_k π_bk W_k: the B kernels of the samples, B × O × C/groups × kh × kw."""
    return torch.unflatten(pi @ bank.flatten(1), 1, bank.shape[1:])


def fold_batch(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve sample b with weight[b]: one grouped convolution over the batch, folded into the channels."""
    y = geometry.conv(x.flatten(0, 1)[None], weight.flatten(0, 1), samples=x.shape[0])
    return torch.unflatten(y, 1, weight.shape[:2])[0]


class Operands(NamedTuple):
    """The tensors of a mixed convolution, scale_out ⊙ ((s ⊙ Σ_k π_k W_k) ∗ (scale_in ⊙ x)) + bias.

    x: B × C × H × W, bank: K × O × C/groups × kh × kw, pi: B × K; scales and bias: B × channels,
    spatial: B × kh × kw.
    """

    x: Tensor
    bank: Tensor
    pi: Tensor
    scale_in: Tensor | None
    scale_out: Tensor | None
    spatial: Tensor | None
    bias: Tensor | None

    def block(self, samples: slice) -> Operands:
        """Return the same for some of the samples."""
        return Operands._make(t if t is None or t is self.bank else t[samples] for t in self)

    def scaled_input(self) -> Tensor:
        """scale_in ⊙ x."""
        return self.x if self.scale_in is None else self.x * per_channel(self.scale_in)

    def scaled_output(self, y: Tensor, out: Tensor | None = None) -> Tensor:
        """scale_out ⊙ y + bias."""
        if self.scale_out is not None:
            scaled = torch.mul(y, per_channel(self.scale_out), out=out)
            # two passes, but each in a vectorised loop: twice as fast as addcmul, which isn't where factors repeat
            return scaled if self.bias is None else scaled.add_(per_channel(self.bias))
        if self.bias is not None:
            return torch.add(y, per_channel(self.bias), out=out)
        return y if out is None else out.copy_(y)


PlainWay = Callable[[Tensor, Tensor, Tensor, Tensor | None, Geometry], Tensor]


def mix_plainly(way: PlainWay, operands: Operands, geometry: Geometry) -> Tensor:
    """Compute the mixed convolution, by a way of mixing."""
    y = way(operands.scaled_input(), operands.bank, operands.pi, operands.spatial, geometry)
    return operands.scaled_output(y)


def grouped(x: Tensor, bank: Tensor, pi: Tensor, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """One grouped convolution with B mixed kernels: the usual code."""
    weight = mix(pi, bank).to(x.dtype)
    if spatial is not None:
        weight = weight * spatial[:, None, None].to(x.dtype)
    return fold_batch(x, weight, geometry)


def outputs(x: Tensor, bank: Tensor, pi: Tensor, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution to K·O channels, then mix the results: nothing depends on the batch size."""
    if spatial is not None:
        x, bank, geometry = pointwise(x, bank, spatial, geometry)
    y = geometry.conv(x, by_group(bank, geometry.groups).flatten(0, 2).to(x.dtype))
    y = torch.unflatten(y, 1, (geometry.groups, bank.shape[0], -1))
    return torch.einsum("bgkohw,bk->bgohw", y, pi.to(x.dtype)).flatten(1, 2)


def inputs(x: Tensor, bank: Tensor, pi: Tensor, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution over K copies of the input, scaled by π."""
    if spatial is not None:
        x, bank, geometry = pointwise(x, bank, spatial, geometry)
    x = torch.unflatten(x, 1, (geometry.groups, 1, -1)) * pi[:, None, :, None, None, None].to(x.dtype)
    weight = by_group(bank, geometry.groups).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return geometry.conv(x.flatten(1, 3), weight.to(x.dtype))


def by_group(bank: Tensor, groups: int) -> Tensor:
    """Return the bank as groups × K × O/groups × C/groups × kh × kw."""
    return torch.unflatten(bank, 1, (groups, -1)).transpose(0, 1)


def pointwise(
    x: Tensor, bank: Tensor, spatial: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Geometry]:
    """Return the same convolution with 1 × 1 kernels, over unfolded columns scaled by the spatial attention."""
    kernel = bank.shape[3:]
    taps = spatial.flatten(1)[:, None, :, None].to(x.dtype)
    columns = torch.unflatten(geometry.unfold(x, kernel), 1, (x.shape[1], -1)) * taps
    columns = torch.unflatten(columns.flatten(1, 2), 2, geometry.output_size(x.shape[2:], kernel))
    return columns, bank.flatten(2)[..., None, None], Geometry((1, 1), (0, 0), (1, 1), geometry.groups)
