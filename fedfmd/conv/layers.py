"""The dynamic convolutions: a bank of K kernels, mixed per sample by attention, over one base class."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from fedfmd.conv.attention import Attention, KernelAttention, Routing, SharedAttention, init_attention
from fedfmd.conv.mixing import AUTO, MIXINGS, convolve
from fedfmd.conv.plain import Geometry
from fedfmd.conv.temperature import check_temperature

IntPair = int | tuple[int, int]
ATTENTIONS = ("input", "kernel", "output")


class DynamicConv2d(nn.Module):
    """A convolution whose kernel is Σ_k π_k W_k, with π computed from each sample.

    Parameters: `bank` K × O × C/groups × kh × kw and `bias_bank` K × O (`None` without bias).
    `mixing` names the way the mixture is computed, one of `fedfmd.conv.mixing.MIXINGS` or "auto"; all give
    the same numbers. `attention_init` is how the attentions start, "neutral" or "kaiming" (see `init_attention`).
    Subclasses add the `attention` module and call `reset_parameters`.
    """

    attention: Attention
    temperature: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair,
        padding: IntPair,
        dilation: IntPair,
        groups: int,
        bias: bool,
        *,
        kernels: int,
        mixing: str,
        temperature: float | None,
        attention_init: str,
    ) -> None:
        super().__init__()
        for name, value in (
            ("kernels", kernels),
            ("groups", groups),
            ("in_channels", in_channels),
            ("out_channels", out_channels),
        ):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups = {groups} must divide in_channels = {in_channels} and out_channels = {out_channels}"
            )
        if isinstance(padding, str):
            raise ValueError(
                f"padding = {padding!r} is not supported; give a number of pixels, or one per axis"
            )
        if mixing != AUTO and mixing not in MIXINGS:
            raise ValueError(f"mixing = {mixing!r} is unknown; use {AUTO} or one of {', '.join(MIXINGS)}")
        self.in_channels, self.out_channels, self.kernels = in_channels, out_channels, kernels
        self.kernel_size = _pair(kernel_size)
        self.geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
        self.mixing, self.attention_init = mixing, attention_init
        self.bank = nn.Parameter(torch.empty(kernels, out_channels, in_channels // groups, *self.kernel_size))
        self.bias_bank = nn.Parameter(torch.empty(kernels, out_channels)) if bias else None
        start = None if temperature is None else torch.tensor(check_temperature(temperature))
        self.register_buffer("temperature", start)

    @property
    def stride(self) -> tuple[int, int]:
        """As in `nn.Conv2d`."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, int]:
        """As in `nn.Conv2d`."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """As in `nn.Conv2d`."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """As in `nn.Conv2d`."""
        return self.geometry.groups

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has its own output channel."""
        return self.groups == self.in_channels == self.out_channels

    def reset_parameters(self) -> None:
        """Draw Kaiming-normal kernels (fan_out, ReLU) and the attentions' start; biases are zero."""
        for kernel in self.bank:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        if self.bias_bank is not None:
            nn.init.zeros_(self.bias_bank)
        init_attention(self.attention, self.attention_init)

    def forward(self, x: Tensor) -> Tensor:
        """From B × C × H × W to B × O × H' × W', with the output size of `nn.Conv2d`.

        Under autocast the images and the mixed kernels are rounded, not the bank and the attentions.
        """
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return self.forward(x)
        attention = self.attention(x, self.temperature)
        return convolve(x, self.bank, self.bias_bank, attention, self.geometry, self.mixing)

    def extra_repr(self) -> str:
        """The settings, in the form of `nn.Conv2d`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias_bank is not None}, kernels={self.kernels}, mixing={self.mixing!r}"
        )

    def _apply(self, fn, recurse: bool = True) -> DynamicConv2d:  # noqa: ANN001
        # `Module.to(memory_format=channels_last)` rejects 5-D parameters: hand it the bank as a vector.
        return super()._apply(lambda t: fn(t.reshape(-1)).view(t.shape) if t.dim() == 5 else fn(t), recurse)


class CondConv2d(DynamicConv2d):
    """CondConv (Yang et al., NeurIPS 2019): Σ_k r_k W_k with r = sigmoid(Linear(GAP(x)))."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernels: int = 4,
        attention_init: str = "neutral",
        mixing: str = AUTO,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            kernels=kernels,
            mixing=mixing,
            temperature=None,
            attention_init=attention_init,
        )
        self.attention = Attention({"kernel": Routing(in_channels, kernels)})
        self.reset_parameters()


class DyConv2d(DynamicConv2d):
    """DyConv (Chen et al., CVPR 2020): Σ_k π_k W_k with π = softmax(Linear(ReLU(Linear(GAP(x)))) / τ)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernels: int = 4,
        kernel_reduction: float = 1 / 4,
        temperature: float = 30.0,
        attention_init: str = "neutral",
        mixing: str = AUTO,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            kernels=kernels,
            mixing=mixing,
            temperature=temperature,
            attention_init=attention_init,
        )
        self.attention = Attention({"kernel": KernelAttention(in_channels, kernels, kernel_reduction)})
        self.reset_parameters()


class ODConv2d(DynamicConv2d):
    """ODConv (Li et al., ICLR 2022): y = a_out ⊙ ((Σ_k π_k (s ⊙ W_k)) ∗ (a_in ⊙ x) + Σ_k π_k b_k).

    All attentions come from one squeeze, sigmoids as σ(·/τ), the softmax as softmax(·/τ). Spatial attention
    is left out for 1 × 1 kernels, output attention for depthwise convolutions, kernel attention at K = 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernels: int = 4,
        reduction: float = 1 / 16,
        temperature: float = 30.0,
        attention_init: str = "neutral",
        mixing: str = AUTO,
        norm: str = "batch",
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
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


class FMDConv2d(DynamicConv2d):
    """FMDConv (Zhang et al., KBS 2025): y = a_out ⊙ ((Σ_k π_k W_k) ∗ (a_in ⊙ x) + Σ_k π_k b_k).

    a_in and a_out are sigmoids from ODConv's squeeze, π is a softmax with temperature τ from DyConv's.
    `attentions` is any non-empty subset of "input", "kernel", "output" (the paper's ablation). Without
    "kernel" the kernels are averaged (π = 1/K). Output attention is left out for depthwise convolutions.
    At K = 1 there is no mixture and no per-sample kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernels: int = 4,
        reduction: float = 1 / 16,
        kernel_reduction: float = 1 / 4,
        temperature: float = 30.0,
        attentions: Iterable[str] = ATTENTIONS,
        attention_init: str = "neutral",
        mixing: str = AUTO,
        norm: str = "batch",
    ) -> None:
        chosen = tuple(attentions)
        if not chosen or not set(chosen) <= set(ATTENTIONS):
            raise ValueError(f"attentions = {chosen!r} must be a non-empty subset of {', '.join(ATTENTIONS)}")
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
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
            self.attention["shared"] = SharedAttention(in_channels, heads, reduction, norm)
        if "kernel" in chosen:
            self.attention["kernel"] = KernelAttention(in_channels, kernels, kernel_reduction)
        self.reset_parameters()
