"""FMDConv (KBS 2025): attention to input, output and kernels."""

from __future__ import annotations

from collections.abc import Iterable

from fedfmd.conv.attention import Attention, KernelAttention, SharedAttention
from fedfmd.conv.layers import DynamicConv2d, IntPair
from fedfmd.conv.mixing import AUTO

ATTENTIONS = ("input", "kernel", "output")


class FMDConv2d(DynamicConv2d):
    """FMDConv (Zhang et al., KBS 2025): y = a_out ⊙ ((Σ_k π_k W_k) ∗ (a_in ⊙ x) + Σ_k π_k b_k).

    a_in and a_out are sigmoids from ODConv's squeeze, π is a softmax with temperature τ from DyConv's.
    `attentions` is any non-empty subset of "input", "kernel", "output" (the paper's ablation). Without
    "kernel" the kernels are averaged (π = 1/K). Output attention is left out for depthwise convolutions.
    With `annealed` the sigmoids are σ(·/τ), as ODConv's are and those of the authors' code.
    At K = 1 there is no mixture and no per-sample kernel.
    """

    name = "fmdconv"
    year = 2025
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
        reduction: float = 1 / 16,
        kernel_reduction: float = 1 / 4,
        temperature: float = 30.0,
        attentions: Iterable[str] = ATTENTIONS,
        attention_init: str = "neutral",
        mixing: str = AUTO,
        norm: str = "batch",
        annealed: bool = False,
    ) -> None:
        chosen = tuple(attentions)
        if not chosen or not set(chosen) <= set(ATTENTIONS):
            raise ValueError(f"attentions = {chosen!r} must be a non-empty subset of {', '.join(ATTENTIONS)}")
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            kernels=kernels,
            mixing=mixing,
            temperature=temperature,
            attention_init=attention_init,
        )
        heads = {}
        if "input" in chosen:
            heads["input"] = in_channels
        if "output" in chosen and not self.depthwise:
            heads["output"] = out_channels
        self.attention = Attention()
        if heads:
            self.attention["shared"] = SharedAttention(in_channels, heads, reduction, norm, annealed)
        if "kernel" in chosen:
            self.attention["kernel"] = KernelAttention(in_channels, kernels, kernel_reduction)
        self.reset_parameters()
