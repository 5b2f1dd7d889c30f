"""What all dynamic convolutions have in common: a bank of K kernels, mixed per sample by attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from fedfmd.conv.attention import Attention, init_attention
from fedfmd.conv.mixing import AUTO, EARLIER_NAMES, MIXINGS, NATIVE, convolve, is_traced
from fedfmd.conv.native import MISSING, is_compiled
from fedfmd.conv.plain import Geometry
from fedfmd.conv.temperature import check_temperature

IntPair = int | tuple[int, ...]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
BANKS = ("bank", "bias_bank")
"""The parameters of a layer that hold one entry per kernel."""


class DynamicConv2d(nn.Module):
    """A convolution whose kernel is Σ_k π_k W_k, with π computed from each sample.

    Takes its place: the arguments up to `padding_mode`, and what becomes of an image, of a batch and of an empty
    batch, are those of `nn.Conv2d`. The attentions see the image without its padding.

    Parameters: `bank` K × O × C/groups × kh × kw and `bias_bank` K × O (`None` without bias).
    `mixing` names the way the mixture is computed, one of `fedfmd.conv.mixing.MIXINGS`, "native" (compiled code,
    once `fedfmd compile` has made it) or "auto"; all give the same numbers. `attention_init` is how the attentions
    start, "neutral" or "kaiming" (see `init_attention`).
    Subclasses add the `attention` module and call `reset_parameters`. Those in `fedfmd.conv.operators` are known
    everywhere by their name; their keyword arguments are options of the models (see `fedfmd.conv.options_of`).

    Attributes:
        name: what settings and files call the operator.
        year: when it was published; operators are listed in this order.
        published_bias: whether the published form has a bias bank.
    """

    name: ClassVar[str]
    year: ClassVar[int]
    published_bias: ClassVar[bool] = False
    attention: Attention
    temperature: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair,
        padding: IntPair | str,
        dilation: IntPair,
        groups: int,
        bias: bool,
        padding_mode: str,
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
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode = {padding_mode!r} is unknown; use one of {', '.join(PADDING_MODES)}"
            )
        mixing = EARLIER_NAMES.get(mixing, mixing)
        if mixing not in (AUTO, *MIXINGS, NATIVE):
            raise ValueError(
                f"mixing = {mixing!r} is unknown; use {AUTO} or one of {', '.join((*MIXINGS, NATIVE))}"
            )
        if mixing == NATIVE and not is_compiled():
            raise ValueError(MISSING)
        self.in_channels, self.out_channels, self.kernels = in_channels, out_channels, kernels
        self.kernel_size, self.padding_mode = _pair(kernel_size), padding_mode
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        sides = _sides(self.padding, self.kernel_size, _pair(stride), _pair(dilation))
        (top, bottom), (left, right) = sides
        even = padding_mode == "zeros" and top == bottom and left == right
        self.geometry = Geometry(_pair(stride), (top, left) if even else (0, 0), _pair(dilation), groups)
        self._border = None if even else (left, right, top, bottom)
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

    @property
    def attentions(self) -> frozenset[str]:
        """The attentions that it has: "input", "output", "spatial" and "kernel", as in `AttentionValues`."""
        return self.attention.attentions

    @property
    def has_kernel_attention(self) -> bool:
        """Whether each sample weighs the kernels itself; they are averaged if not."""
        return "kernel" in self.attentions

    @property
    def mixes(self) -> bool:
        """Whether each sample is convolved with a kernel of its own."""
        return "spatial" in self.attentions or (self.has_kernel_attention and self.kernels > 1)

    @property
    def has_temperature(self) -> bool:
        """Whether its attentions have a τ."""
        return self.temperature is not None

    @property
    def attention_macs(self) -> int:
        """Multiply-accumulates of its attentions for one image."""
        return self.attention.macs

    @property
    def aggregation_macs(self) -> int:
        """Multiply-accumulates of mixing the kernels for one image, as the equation is written.

        K·O·C/groups·kh·kw for each attention that weighs the bank's entries: one in Σ_k π_k W_k, two in ODConv's
        Σ_k π_k (s ⊙ W_k).
        """
        return self.bank.numel() * len(self.attentions & {"kernel", "spatial"})

    @property
    def kernel_params(self) -> int:
        """Parameters in one kernel, its bias included."""
        return self.bank[0].numel() + (0 if self.bias_bank is None else self.bias_bank[0].numel())

    def reset_parameters(self) -> None:
        """Draw Kaiming-normal kernels (fan_out, ReLU) and the attentions' start; biases are zero."""
        for kernel in self.bank:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        if self.bias_bank is not None:
            nn.init.zeros_(self.bias_bank)
        init_attention(self.attention, self.attention_init)

    def forward(self, x: Tensor) -> Tensor:
        """From B × C × H × W, or C × H × W, to the output of `nn.Conv2d`'s size.

        Under autocast the images and the mixed kernels are rounded, not the bank and the attentions.

        Raises:
            RuntimeError: an image of other channels.
        """
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if not is_traced():  # where the batch has no size yet
            if x.dim() != 4 or x.shape[1] != self.in_channels:
                shape = " × ".join(map(str, x.shape))
                raise RuntimeError(f"got {shape}, but takes B × {self.in_channels} × H × W, or one image")
            if not len(x):
                return self.geometry.conv(self._padded(x), self.bank[0].to(x.dtype))
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return self.forward(x)
        attention = self.attention(x, self.temperature)
        return convolve(self._padded(x), self.bank, self.bias_bank, attention, self.geometry, self.mixing)

    def extra_repr(self) -> str:
        """Return the settings, in the form of `nn.Conv2d`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias_bank is not None}, kernels={self.kernels}, mixing={self.mixing!r}"
            + ("" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode}")
        )

    def _padded(self, x: Tensor) -> Tensor:
        """Pad the image where the convolution itself can't."""
        if self._border is None:
            return x
        return F.pad(x, self._border, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `Module.to(memory_format=channels_last)` rejects 5-D parameters: hand it the bank as a vector.
        super()._apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            lambda t: fn(t.reshape(-1)).view(t.shape) if t.dim() == 5 else fn(t), recurse
        )
        return self


def _sides(
    padding: str | tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> list[tuple[int, int]]:
    """Return the padding before and after, by axis; "same" and "valid" as `nn.Conv2d` has them.

    Raises:
        ValueError: another text, or "same" with a stride.
    """
    if not isinstance(padding, str):
        return [(n, n) for n in padding]
    if padding == "valid":
        return [(0, 0)] * 2
    if padding != "same":
        raise ValueError(f"padding = {padding!r} is unknown; give numbers of pixels, 'same' or 'valid'")
    if stride != (1, 1):
        raise ValueError(
            f"padding = 'same' keeps the size, and stride = {stride} doesn't: give numbers of pixels"
        )
    more = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [(n // 2, n - n // 2) for n in more]


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv2d]:
    """Return the dynamic convolutions of a model, or of one that is the model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DynamicConv2d)}


def bank_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the banks in the model's state dict."""
    return frozenset(f"{name}.{bank}".removeprefix(".") for name in dynamic_layers(model) for bank in BANKS)


def has_temperature(model: nn.Module) -> bool:
    """Whether any layer of the model has a τ."""
    return any(layer.has_temperature for layer in dynamic_layers(model).values())


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set τ in every layer of the model that has one (a model of static convolutions has none)."""
    value = check_temperature(temperature)
    for layer in dynamic_layers(model).values():
        if layer.temperature is not None:
            layer.temperature.fill_(value)
