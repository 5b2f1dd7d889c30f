"""The attention branches of the dynamic convolutions: small networks on the input's channel averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = ("batch", "group")
ATTENTION_INITS = ("neutral", "kaiming")


class AttentionValues(NamedTuple):
    """What a layer's branches say about B samples; `None` where the operator has no such attention.

    input: B × C, output: B × O, spatial: B × kh·kw, kernel: B × K.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    spatial: Tensor | None = None
    kernel: Tensor | None = None


class SqueezeBatchNorm(nn.BatchNorm1d):
    """BatchNorm that survives a training batch of 1.

    One sample has no variance, so it is normalised with the running statistics, which stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise B × hidden."""
        if not self.training or input.shape[0] > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def squeeze_norm(norm: str, channels: int) -> nn.Module:
    """Return the normalisation of the shared squeeze: "batch" as published, or "group" without batch statistics."""
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r} is unknown; use one of {', '.join(NORMS)}")
    return SqueezeBatchNorm(channels) if norm == "batch" else nn.GroupNorm(1, channels)


class Branch(nn.Module):
    """From the B × C averages, some of a layer's attentions by name."""

    @property
    def attentions(self) -> tuple[str, ...]:
        """Which ones, as in `AttentionValues`."""
        raise NotImplementedError

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The layers that give the logits."""
        raise NotImplementedError

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: those of the linear layers, each of which is used once."""
        return sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))


class SharedAttention(Branch):
    """ODConv's squeeze: one hidden vector z = ReLU(norm(Linear(GAP(x)))) from which every head is computed.

    `heads` maps the name of an attention to its size. Kernel attention is softmax(head(z)/τ); the others are
    sigmoid(head(z)), or sigmoid(head(z)/τ) with `annealed` (ODConv). hidden = max(⌊C · reduction⌋, 16).
    """

    def __init__(
        self, channels: int, heads: Mapping[str, int], reduction: float, norm: str, annealed: bool = False
    ) -> None:
        super().__init__()
        hidden = max(int(channels * reduction), 16)
        self.annealed = annealed
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.norm = squeeze_norm(norm, hidden)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in heads.items()})

    @property
    def attentions(self) -> tuple[str, ...]:
        """Those that have a head."""
        return tuple(self.heads)

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The layers that give the logits."""
        return tuple(self.heads.values())

    def forward(self, pooled: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        """From the B × C averages, one B × size tensor per head."""
        z = F.relu(self.norm(self.squeeze(pooled)))
        logits = {name: head(z) for name, head in self.heads.items()}
        return {
            name: (
                F.softmax(value / temperature, dim=1)
                if name == "kernel"
                else torch.sigmoid(value / temperature if self.annealed else value)
            )
            for name, value in logits.items()
        }


class KernelAttention(Branch):
    """DyConv's squeeze: π = softmax(Linear(ReLU(Linear(GAP(x)))) / τ).

    hidden = ⌊C · reduction⌋ + 1, or K when C = 3 (the published rule). With one kernel π is 1 and nothing is
    computed; the parameters stay, so that counts and checkpoints agree with the published ones.
    """

    def __init__(self, channels: int, kernels: int, reduction: float) -> None:
        super().__init__()
        hidden = kernels if channels == 3 else int(channels * reduction) + 1
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.head = nn.Linear(hidden, kernels)

    @property
    def attentions(self) -> tuple[str, ...]:
        """That of the kernels."""
        return ("kernel",)

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The layer that gives the logits."""
        return (self.head,)

    def forward(self, pooled: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        """From the B × C averages, π: B × K."""
        if self.head.out_features == 1:
            return {}
        return {"kernel": F.softmax(self.head(F.relu(self.squeeze(pooled))) / temperature, dim=1)}


class Routing(Branch):
    """CondConv's routing: r = sigmoid(Linear(GAP(x))), an independent weight per kernel; no temperature."""

    def __init__(self, channels: int, kernels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, kernels)

    @property
    def attentions(self) -> tuple[str, ...]:
        """That of the kernels."""
        return ("kernel",)

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The layer that gives the logits."""
        return (self.head,)

    def forward(self, pooled: Tensor, _temperature: None) -> dict[str, Tensor]:
        """From the B × C averages, r: B × K."""
        return {"kernel": torch.sigmoid(self.head(pooled))}


class Attention(nn.ModuleDict):
    """The branches of one layer, evaluated together on the average over the pixels."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All that it holds."""
        return tuple(cast("Branch", branch) for branch in self.values())

    @property
    def attentions(self) -> frozenset[str]:
        """Those of all branches."""
        return frozenset(name for branch in self.branches for name in branch.attentions)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all branches for one image."""
        return sum(branch.macs for branch in self.branches)

    def forward(self, x: Tensor, temperature: Tensor | None) -> AttentionValues:
        """From x: B × C × H × W, pooled in the precision of the parameters."""
        dtype = next((parameter.dtype for parameter in self.parameters()), x.dtype)
        # A sum, not a mean: its gradient is a view, not another image-sized tensor. In float16 it would overflow.
        wide = torch.float32 if dtype == torch.float16 else dtype
        pooled = (x.sum((2, 3), dtype=wide) / (x.shape[2] * x.shape[3])).to(dtype)
        values: dict[str, Tensor] = {}
        for branch in self.values():
            values |= branch(pooled, temperature)
        return AttentionValues(**values)


def init_attention(attention: Attention, start: str) -> None:
    """Draw the weights of an attention anew; all biases are zero.

    "kaiming" is the published start: Kaiming-normal weights (fan_out, ReLU) in every linear layer, so that every
    channel of every sample is scaled at random. "neutral" draws the same weights, then sets those of the last
    layers to zero: every sample is treated alike until training has a reason not to (sigmoids are 1/2, a softmax
    is 1/K). FDConv (Chen et al., CVPR 2025) and PAD-Net (He et al., ACL 2023) start like this.
    """
    if start not in ATTENTION_INITS:
        raise ValueError(f"attention_init = {start!r} is unknown; use one of {', '.join(ATTENTION_INITS)}")
    for layer in attention.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if start == "neutral":
        for branch in attention.branches:
            for layer in branch.last_layers:
                nn.init.zeros_(layer.get_parameter("weight"))
