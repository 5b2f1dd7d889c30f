"""Convolving each sample with its own mixture of the K kernels: the ways to do it, and the choice among them.

All ways give the same numbers. One is forced by its name, or chosen from layer shape, batch and device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fedfmd.conv.attention import AttentionValues
from fedfmd.conv.fused import Direct, Unfolded, Way, mix_in_blocks
from fedfmd.conv.native import Native, is_compiled, takes
from fedfmd.conv.plain import Geometry, Operands, grouped, inputs, mix_plainly, outputs

AUTO, NATIVE = "auto", "native"
PLAIN = {"grouped": grouped, "outputs": outputs, "inputs": inputs}
FUSED: dict[str, Callable[[Geometry, tuple[int, ...]], Way]] = {
    "im2col": Unfolded,
    "blocked": Direct,
    NATIVE: Native,
}
MIXINGS = tuple(name for name in (*PLAIN, *FUSED) if name != NATIVE)
"""Those that need no compiled code."""
NATIVE_POSITIONS = 64
"""Positions of the output up to which compiled code is the fastest for large kernels: there, one is much for a single
image."""
EARLIER_NAMES = {"folded": "grouped", "unfold": "im2col", "per_sample": "blocked"}
"""What the ways were called in fedfmd 0.1, for settings and constructors that still say so."""


def convolve(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    attention: AttentionValues,
    geometry: Geometry,
    mixing: str,
) -> Tensor:
    """a_out ⊙ ((s ⊙ Σ_k π_k W_k) ∗ (a_in ⊙ x) + Σ_k π_k b_k): from B × C × H × W to B × O × H' × W'.

    Where x has a lower precision than the bank, kernels are mixed in that of the bank and then rounded.
    """
    pi, scale_out = attention.kernel, attention.output
    spatial = None if attention.spatial is None else torch.unflatten(attention.spatial, 1, bank.shape[3:])
    if pi is None:
        pi = bank.new_full((x.shape[0], len(bank)), 1 / len(bank))
    bias = None
    if bias_bank is not None:
        bias = pi @ bias_bank if scale_out is None else (pi @ bias_bank) * scale_out
    shared = spatial is None and (attention.kernel is None or len(bank) == 1)
    if shared and attention.kernel is not None:
        scale_out = pi if scale_out is None else pi * scale_out
    factors = (t if t is None else t.to(x.dtype) for t in (attention.input, scale_out, spatial, bias))
    operands = Operands(x, bank, pi, *factors)
    if shared:
        return mix_plainly(unmixed, operands, geometry)
    if mixing == AUTO or (mixing == NATIVE and not takes(x, bank, geometry)):
        mixing = choose_mixing(x, bank, geometry)
    if mixing in FUSED:
        return mix_in_blocks(FUSED[mixing](geometry, tuple(bank.shape[1:])), operands)
    return mix_plainly(PLAIN[mixing], operands, geometry)


def unmixed(x: Tensor, bank: Tensor, _pi: Tensor, _spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution with the mean kernel, the same for all samples: no mixture, or a single kernel."""
    return geometry.conv(x, (bank[0] if len(bank) == 1 else bank.mean(0)).to(x.dtype))


def is_traced() -> bool:
    """Whether a graph is being made, in which the batch has no size yet."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def choose_mixing(x: Tensor, bank: Tensor, geometry: Geometry) -> str:
    """Return the way for "auto", by device, batch and layer shape.

    The CPU's rule is fitted to `experiments/benchmarks/mixing.py`, that of other devices to an H100
    (`experiments/results/gpu/layers.csv`): there the fused ways take 4 to 7 times as long, being many small
    operations, and no other way is faster throughout.
    """
    if is_traced():
        return "outputs"  # leaves the batch size free
    compiling = torch.compiler.is_compiling()  # compilers see through the cache
    rule: Callable[..., str] = _rule.__wrapped__ if compiling else _rule
    # compiled mixing would cut the graph that torch.compile makes in two
    native = not compiling and takes(x, bank, geometry) and is_compiled()
    return rule(x.device.type, tuple(x.shape), tuple(bank.shape[1:]), geometry, native)


@lru_cache(maxsize=1024)  # small layers are done in the time that the arithmetic takes
def _rule(
    device: str, images: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry, native: bool
) -> str:
    batch, *image = images
    if batch == 1:
        return "grouped"  # one plain convolution
    if device != "cpu":
        return "outputs"
    positions = math.prod(geometry.output_size(tuple(image[1:]), kernel[2:]))
    if batch <= Direct(geometry, kernel).block(tuple(image)):
        return "grouped"  # kernels and images of the whole batch fit the cache
    if native and positions <= NATIVE_POSITIONS:
        return NATIVE
    return "im2col" if kernel[0] // geometry.groups > positions else "blocked"
