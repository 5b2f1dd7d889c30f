"""Kernel mixing that stores no per-sample kernels: a block of samples at a time, and again in backward.

For the backward pass it keeps what a static convolution keeps, the input, and a few vectors per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedfmd.conv.plain import Geometry, Operands, fold_batch, grouped, mix_plainly, per_channel

# Working sets in numbers of 4 bytes, fitted on x86 CPUs: what a block needs should stay in the cache, from
# mixing its kernels to their gradient.
BLOCK_NUMEL = 2_000_000
TILE_NUMEL = 1_200_000
TILE_SAMPLES = 8
TILE_ROWS = 16


class Mixture:
    """The mixed kernels of the samples, made on demand; rows are output channels, D = C/groups · kh · kw."""

    def __init__(self, bank: Tensor, pi: Tensor) -> None:
        self.bank, self.pi = bank.flatten(2), pi
        self._buffer = bank.new_empty(0)

    def kernels(self, samples: slice, rows: slice = slice(None)) -> Tensor:
        """Σ_k π_k W_k: samples × rows × D, in memory that the next call uses again."""
        pi, bank = self.pi[samples], self.bank[:, rows]
        size = len(pi) * bank[0].numel()
        if self._buffer.numel() < size:
            self._buffer = bank.new_empty(size)
        kernels = self._buffer[:size].view(len(pi), *bank.shape[1:])
        torch.mm(pi, bank.flatten(1), out=kernels.flatten(1))
        return kernels


class MixtureGradient(Mixture):
    """Gathers the gradients of the bank and of π from those of the mixed kernels, which come and go.

    Attributes:
        of_bank: K × O × D.
        of_pi: B × K.
        of_scaled_rows: B × O, the gradient of a factor on each row of each mixed kernel, times that factor.
    """

    def __init__(self, bank: Tensor, pi: Tensor) -> None:
        super().__init__(bank, pi)
        self.of_bank, self.of_pi = torch.empty_like(self.bank), torch.zeros_like(pi)
        self.of_scaled_rows = pi.new_empty(len(pi), bank.shape[1])

    def add(self, gradient: Tensor, samples: slice, rows: slice = slice(None)) -> None:
        """Take the gradient of `kernels(samples, rows)`; the samples come in order, from the first."""
        gradient = gradient.to(self.bank.dtype)
        pi, bank = self.pi[samples], self.bank[:, rows]
        self.of_bank[:, rows].flatten(1).addmm_(pi.t(), gradient.flatten(1), beta=min(samples.start, 1))
        # O × B × K: how the gradient of a sample's mixed row projects on that row of each kernel
        products = torch.bmm(gradient.transpose(0, 1), bank.permute(1, 2, 0))
        self.of_pi[samples] += products.sum(0)
        self.of_scaled_rows[samples, rows] = (products * pi).sum(2).t()


@dataclass(frozen=True)
class Direct:
    """Convolve a few samples at a time, each with its own kernel, in one grouped convolution."""

    geometry: Geometry
    kernel: tuple[int, ...]  # O × C/groups × kh × kw

    def block(self, image: tuple[int, ...]) -> int:
        """How many samples of shape C × H × W fit the cache, with their kernels and outputs."""
        output = self.kernel[0] * math.prod(self.geometry.output_size(image[1:], self.kernel[2:]))
        return max(1, BLOCK_NUMEL // (math.prod(self.kernel) + math.prod(image) + output))

    def forward(self, x: Tensor, mixture: Mixture, samples: slice, spatial: Tensor | None) -> Tensor:
        """Compute the outputs of a block; x and spatial hold its samples only."""
        return fold_batch(x, self._attend(self._kernels(mixture, samples, x.dtype), spatial), self.geometry)

    def backward(
        self, x: Tensor, grad: Tensor, mixture: MixtureGradient, samples: slice, spatial: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of x and spatial; that of the kernels goes to the mixture."""
        kernels = self._kernels(mixture, samples, x.dtype)
        weight = self._attend(kernels, spatial).flatten(0, 1)
        images, grads = x.flatten(0, 1)[None], grad.flatten(0, 1)[None]
        dx, dweight = self.geometry.conv_backward(images, weight, grads, samples=len(x))
        dx, dweight = dx.view_as(x), dweight.view_as(kernels)
        dspatial = None if spatial is None else (dweight * kernels).sum((1, 2))
        mixture.add(self._attend(dweight, spatial).flatten(2), samples)
        return dx, dspatial

    def _kernels(self, mixture: Mixture, samples: slice, dtype: torch.dtype) -> Tensor:
        return torch.unflatten(mixture.kernels(samples), 2, self.kernel[1:]).to(dtype)

    @staticmethod
    def _attend(kernels: Tensor, spatial: Tensor | None) -> Tensor:
        return kernels if spatial is None else kernels * spatial[:, None, None]


@dataclass(frozen=True)
class Unfolded:
    """Multiply unfolded columns with the mixed kernels, tile by tile: for kernels larger than images."""

    geometry: Geometry
    kernel: tuple[int, ...]  # O × C/groups × kh × kw

    def block(self, image: tuple[int, ...]) -> int:
        """How many samples share a tile."""
        return TILE_SAMPLES

    def forward(self, x: Tensor, mixture: Mixture, samples: slice, spatial: Tensor | None) -> Tensor:
        """Compute the outputs of a block; x and spatial hold its samples only."""
        columns = self._by_group(self._attend(self.geometry.unfold(x, self.kernel[2:]), spatial))
        y = x.new_empty(len(x), self.kernel[0], columns.shape[2])
        for rows in self._tiles():
            kernels = self._by_group(mixture.kernels(samples, rows).to(x.dtype))
            torch.bmm(kernels, columns, out=self._by_group(y[:, rows]))
        return torch.unflatten(y, 2, self.geometry.output_size(x.shape[2:], self.kernel[2:]))

    def backward(
        self, x: Tensor, grad: Tensor, mixture: MixtureGradient, samples: slice, spatial: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of x and spatial; that of the kernels goes to the mixture."""
        raw = self.geometry.unfold(x, self.kernel[2:])
        columns = self._by_group(self._attend(raw, spatial))
        dcolumns = torch.empty_like(raw)
        grad = grad.flatten(2)
        for rows in self._tiles():
            g = self._by_group(grad[:, rows])
            kernels = mixture.kernels(samples, rows).to(x.dtype)
            by_group = self._by_group(kernels)
            self._by_group(dcolumns).baddbmm_(by_group.transpose(1, 2), g, beta=min(rows.start, 1))
            torch.bmm(g, columns.transpose(1, 2), out=by_group)
            mixture.add(kernels, samples, rows)
        dspatial = None
        if spatial is not None:
            dspatial = torch.unflatten(dcolumns * raw, 1, (-1, *spatial.shape[1:])).sum((1, 4))
        dcolumns = self._attend(dcolumns, spatial)
        return self.geometry.fold(dcolumns, x.shape[2:], self.kernel[2:]), dspatial

    def _tiles(self) -> Iterator[slice]:
        """Output channels whose kernels, for a block, fit the cache; all of them where there are groups."""
        out_channels, depth = self.kernel[0], math.prod(self.kernel[1:])
        tile = TILE_ROWS * max(1, TILE_NUMEL // (TILE_ROWS * TILE_SAMPLES * depth))
        if self.geometry.groups > 1:
            tile = out_channels
        return (slice(row, row + tile) for row in range(0, out_channels, tile))

    def _by_group(self, t: Tensor) -> Tensor:
        """From samples × (groups · n) × m to (samples · groups) × n × m."""
        return torch.unflatten(t, 1, (self.geometry.groups, -1)).flatten(0, 1)

    @staticmethod
    def _attend(columns: Tensor, spatial: Tensor | None) -> Tensor:
        if spatial is None:
            return columns
        taps = spatial.flatten(1)
        return (torch.unflatten(columns, 1, (-1, taps.shape[1])) * taps[:, None, :, None]).flatten(1, 2)


class Way(Protocol):
    """Convolves a block of samples with their mixed kernels, and back."""

    @property
    def geometry(self) -> Geometry:
        """How the kernels move."""

    def block(self, image: tuple[int, ...]) -> int:
        """How many samples of shape C × H × W it takes at a time."""

    def forward(self, x: Tensor, mixture: Mixture, samples: slice, spatial: Tensor | None) -> Tensor:
        """Compute the outputs of a block; x and spatial hold its samples only."""

    def backward(
        self, x: Tensor, grad: Tensor, mixture: MixtureGradient, samples: slice, spatial: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of x and spatial; that of the kernels goes to the mixture."""


class MixedConv(torch.autograd.Function):
    """A mixed convolution, block by block: of `Operands` and a way.

    The scales are sigmoids, thus positive: the gradient of scale_out is found by a division by it.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """B × O × H' × W'."""
        *tensors, way = inputs
        operands = Operands(*tensors)
        x, bank, pi = operands[:3]
        mixture = Mixture(bank, pi)
        y = x.new_empty(len(x), bank.shape[1], *way.geometry.output_size(x.shape[2:], bank.shape[3:]))
        for samples in blocks(x, way):
            block = operands.block(samples)
            part = way.forward(block.scaled_input(), mixture, samples, block.spatial)
            block.scaled_output(part, out=y[samples])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass starts from."""
        *operands, ctx.way = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Block by block; by plain operations if the gradient itself is to be differentiated."""
        gradients = plain_gradients if torch.is_grad_enabled() else fused_gradients
        return (*gradients(grad, Operands(*ctx.saved_tensors), ctx.way), None)


def plain_gradients(grad: Tensor, operands: Operands, way: Way) -> list[Tensor | None]:
    """Compute the gradients of the operands, differentiable once more."""
    # Views make new nodes of the operands: the gradient of x must not run on through what else was made of x.
    own = Operands._make(None if t is None else t.view_as(t) for t in operands)
    wanted = [t for t in own if t is not None and t.requires_grad]
    y = mix_plainly(grouped, own, way.geometry)
    found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, grad, create_graph=True), strict=True))
    return [found.get(id(t)) for t in own]


def fused_gradients(grad: Tensor, operands: Operands, way: Way) -> Operands:
    """Compute the gradients of the operands."""
    x, bank, pi, scale_in, scale_out, spatial, bias = operands
    mixture = MixtureGradient(bank, pi)
    dx = torch.empty_like(x)
    dscale_in, dspatial, dbias = (
        None if t is None else torch.empty_like(t) for t in (scale_in, spatial, bias)
    )
    for samples in blocks(x, way):
        block, dy = operands.block(samples), grad[samples]
        if dbias is not None:
            dbias[samples] = dy.sum((2, 3))
        if block.scale_out is not None:
            dy = dy * per_channel(block.scale_out)
        part, dspatial_part = way.backward(block.scaled_input(), dy, mixture, samples, block.spatial)
        if dspatial is not None and dspatial_part is not None:
            dspatial[samples] = dspatial_part
        if dscale_in is None or block.scale_in is None:
            dx[samples] = part
        else:
            dscale_in[samples] = (part * block.x).sum((2, 3))
            torch.mul(part, per_channel(block.scale_in), out=dx[samples])
    dscale_out = None
    if scale_out is not None:
        dscale_out = mixture.of_scaled_rows.to(x.dtype) / scale_out.clamp_min(torch.finfo(x.dtype).tiny)
    return Operands(dx, mixture.of_bank.view_as(bank), mixture.of_pi, dscale_in, dscale_out, dspatial, dbias)


def blocks(x: Tensor, way: Way) -> Iterator[slice]:
    """Return the batch in blocks of samples."""
    size = way.block(tuple(x.shape[1:]))
    return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))


def _mix_in_blocks(way: Way, operands: Operands) -> Tensor:
    """`MixedConv`; compiled models call it as it is."""
    y: Tensor = MixedConv.apply(*operands, way)
    return y


mix_in_blocks: Callable[[Way, Operands], Tensor] = torch.compiler.disable(_mix_in_blocks)
"""Not compiled, since that would unroll the loop over the blocks."""
