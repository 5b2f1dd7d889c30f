"""What the attentions of a model do on given inputs: whether its mixture of kernels is alive."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedfmd.conv.attention import AttentionValues
from fedfmd.conv.layers import DynamicConv2d


@dataclass
class AttentionRecord:
    """The attention values of a model's dynamic layers, by layer name, one entry per forward pass."""

    values: dict[str, list[AttentionValues]] = field(default_factory=dict)

    def kernel_entropy(self) -> float:
        """The mean over layers and samples of H(π) / ln K: 1 if the mixture is inert, 0 if one kernel wins.

        CondConv's weights are first divided by their sum. Layers without a kernel attention over two or more
        kernels do not count; NaN if there is no other.
        """
        entropies = []
        for pi in self._tensors("kernel"):
            kernels = pi.shape[1]
            if kernels > 1:
                share = pi.double() / pi.double().sum(1, keepdim=True)
                entropies.append(torch.special.entr(share).sum(1) / math.log(kernels))
        return _mean(entropies)

    def mean(self, attention: str) -> float:
        """The mean of the "input", "output" or "spatial" attention over layers and samples; NaN if none."""
        return _mean(
            [value.double().mean(tuple(range(1, value.dim()))) for value in self._tensors(attention)]
        )

    def _tensors(self, attention: str) -> list[Tensor]:
        entries = (entry for layer in self.values.values() for entry in layer)
        return [value for entry in entries if (value := getattr(entry, attention)) is not None]


@contextmanager
def record_attention(model: nn.Module) -> Iterator[AttentionRecord]:
    """Record the attention values of the forward passes made inside the `with` block."""
    record = AttentionRecord()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, DynamicConv2d):

            def keep(_module: nn.Module, _inputs: object, out: AttentionValues, name: str = name) -> None:
                kept = (value if value is None else value.detach() for value in out)
                record.values.setdefault(name, []).append(AttentionValues(*kept))

            handles.append(module.attention.register_forward_hook(keep))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _mean(per_layer: list[Tensor]) -> float:
    return float(torch.cat(per_layer).mean()) if per_layer else math.nan
