"""Which attentions are active: a trained model of which only some attentions still look at the image."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from fedfmd.conv.attention import AttentionValues
from fedfmd.conv.diagnostics import AttentionRecord
from fedfmd.conv.layers import dynamic_layers


def recorded_attentions(record: AttentionRecord) -> tuple[str, ...]:
    """Return the attentions that at least one recorded layer has, in alphabetical order; none if all are static."""
    entries = [entry for layer in record.values.values() for entry in layer]
    return tuple(
        sorted(name for name in AttentionValues._fields if any(getattr(e, name) is not None for e in entries))
    )


@contextmanager
def only_attentions(model: nn.Module, kept: Collection[str], usual: AttentionRecord) -> Iterator[None]:
    """Inside the `with` block only the attentions in `kept` depend on the image.

    The others are fixed to their means over the samples in `usual`, entry by entry, so that channels and
    kernels keep the scale that the rest of the network was trained with. An attention that is the same for
    all images is one more factor of the weights: with none kept, every layer is a static convolution.

    Args:
        model: the model; its weights stay as they are.
        kept: any of "input", "kernel", "output" and "spatial". With all of them nothing changes.
        usual: what the attentions of this model do on typical images (see `record_attention`).

    Raises:
        ValueError: an unknown attention, or a layer that is not in the record.
    """
    if unknown := sorted(set(kept) - set(AttentionValues._fields)):
        raise ValueError(
            f"kept = {', '.join(unknown)}: use any of {', '.join(sorted(AttentionValues._fields))}"
        )
    layers = dynamic_layers(model)
    if missing := sorted(set(layers) - set(usual.values)):
        raise ValueError(f"usual has no values of {', '.join(missing)}: record a forward pass of this model")
    with ExitStack() as hooks:
        for name, layer in layers.items():
            fix = partial(_fix, kept=kept, mean=_mean(usual.values[name]))
            hooks.enter_context(layer.attention.register_forward_hook(fix))
        yield


def _fix(
    _module: nn.Module,
    _inputs: object,
    values: AttentionValues,
    kept: Collection[str],
    mean: AttentionValues,
) -> AttentionValues:
    """Put, as a forward hook, the means (1 × size) in place of the values (B × size) that are not kept."""
    return AttentionValues(
        *(
            value if value is None or fixed is None or name in kept else fixed.expand_as(value)
            for name, value, fixed in zip(AttentionValues._fields, values, mean, strict=True)
        )
    )


def _mean(entries: Collection[AttentionValues]) -> AttentionValues:
    """Return the mean over all samples, 1 × size each."""
    return AttentionValues(
        *(
            None if values[0] is None else torch.cat(values).mean(0, keepdim=True)
            for values in zip(*entries, strict=True)
        )
    )
