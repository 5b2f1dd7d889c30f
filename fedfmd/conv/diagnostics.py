"""What the attentions of a model do on given inputs: whether its mixture of kernels is alive."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fedfmd.conv.attention import AttentionValues
from fedfmd.conv.layers import dynamic_layers

_paused: ContextVar[bool] = ContextVar("recording of attentions is paused", default=False)


@dataclass
class AttentionRecord:
    """The attention values of a model's dynamic layers, by layer name, one entry per forward pass."""

    values: dict[str, deque[AttentionValues]] = field(default_factory=dict)

    def kernel_entropy(self) -> float:
        """Return the mean over layers and samples of H(π) / ln K: 1 if the mixture is inert, 0 if one kernel wins.

        Weights that are no probabilities (CondConv's) are first divided by the sum of their sizes. Layers
        without a kernel attention over two or more kernels do not count; NaN if there is no other.
        """
        return _mean([_entropy(share) for share in self._kernel_shares().values()])

    def kernel_information(self) -> float:
        """Return the mean over layers of what the sample tells of the kernel: (H(mean π) − mean H(π)) / ln K.

        0 if every sample has the same mixture, however uneven it is; NaN as in `kernel_entropy`.
        """
        shares = self._kernel_shares().values()
        return _mean([_entropy(share.mean(0, keepdim=True)) - _entropy(share).mean() for share in shares])

    def mean(self, attention: str) -> float:
        """Return the mean of the "input", "output" or "spatial" attention over layers and samples; NaN if none."""
        return _mean([value.double().flatten(1).mean(1) for value in self._by_layer(attention).values()])

    def _kernel_shares(self) -> dict[str, Tensor]:
        """By layer, samples × K, of the layers with two or more kernels to choose from."""
        weights = {
            name: pi.double().abs() for name, pi in self._by_layer("kernel").items() if pi.shape[1] > 1
        }
        return {name: size / size.sum(1, keepdim=True) for name, size in weights.items()}

    def _by_layer(self, attention: str) -> dict[str, Tensor]:
        """Return the values of all samples, by layer, where the layer has this attention."""
        found = {
            name: [value for entry in entries if (value := getattr(entry, attention)) is not None]
            for name, entries in self.values.items()
        }
        return {name: torch.cat(values) for name, values in found.items() if values}


@contextmanager
def record_attention(model: nn.Module, last: int | None = None) -> Iterator[AttentionRecord]:
    """Record the attention values of the (`last`) forward passes made inside the `with` block.

    Those of code that `torch.compile` makes of the model are recorded if `tell_attention` tells them.
    """
    record = AttentionRecord()

    def keep(name: str, values: AttentionValues) -> None:
        if not (torch.compiler.is_compiling() or _paused.get()):
            record.values.setdefault(name, deque(maxlen=last)).append(values)

    with hearing_attention(model, keep):
        yield record


@contextmanager
def hearing_attention(model: nn.Module, hear: Callable[[str, AttentionValues], None]) -> Iterator[None]:
    """Call hear(layer name, detached values) for each dynamic layer of the forward passes inside the `with` block."""

    def told(name: str, _module: nn.Module, _inputs: object, out: AttentionValues) -> None:
        hear(name, AttentionValues(*(value if value is None else value.detach() for value in out)))

    with ExitStack() as hooks:
        for name, layer in dynamic_layers(model).items():
            hooks.enter_context(layer.attention.register_forward_hook(partial(told, name)))
        yield


@contextmanager
def unrecorded_attention(model: nn.Module) -> Iterator[dict[str, AttentionValues]]:
    """Yield what gets the attention values of a forward pass inside the `with` block, which nobody else records.

    `tell_attention` tells them afterwards, as often as the pass is repeated without Python's taking part.
    """
    seen: dict[str, AttentionValues] = {}
    before = _paused.set(True)
    try:
        with hearing_attention(model, seen.__setitem__):
            yield seen
    finally:
        _paused.reset(before)


def tell_attention(model: nn.Module, values: Mapping[str, AttentionValues]) -> None:
    """Have those who record a model's attentions record copies of these values, by layer name."""
    for name, told in values.items():
        attention = model.get_submodule(f"{name}.attention".removeprefix("."))
        if hooks := list(attention._forward_hooks.values()):
            copies = AttentionValues(*(value if value is None else value.clone() for value in told))
            for hook in hooks:
                hook(attention, (), copies)


def _entropy(share: Tensor) -> Tensor:
    """H / ln K of each sample's shares."""
    terms: Tensor = torch.special.entr(share)
    return terms.sum(1) / math.log(share.shape[1])


def _mean(per_layer: list[Tensor]) -> float:
    return float(torch.cat(per_layer).mean()) if per_layer else math.nan
