"""Training some of a bank's kernels: which ones a client takes, and how the others stay frozen.

Frozen kernels are mixed as before, in the forward and in the backward pass; they only don't learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fedfmd.conv import dynamic_layers, record_attention
from fedfmd.data import Dataset, Images, batches

Kernels = Mapping[str, tuple[int, ...]]
"""The places of the kernels to train in each bank, by the name of its layer."""


def rotation(first: int, count: int, kernels: int) -> tuple[int, ...]:
    """Return the places of `count` of `kernels` kernels, or of all if there are fewer, in a circle from `first` on."""
    return tuple((first + step) % kernels for step in range(min(count, kernels)))


def rotated(model: nn.Module, first: int, count: int) -> Kernels:
    """Return the same rotation in all layers."""
    return {name: rotation(first, count, layer.kernels) for name, layer in dynamic_layers(model).items()}


@torch.inference_mode()
def most_attended(
    model: nn.Module, images: Images, dataset: Dataset, count: int, device: torch.device | str = "cpu"
) -> Kernels:
    """Return the `count` kernels, or all of fewer, that weigh most in each layer's mixture: largest mean π.

    Layers choose on their own, since the kernels of different layers have nothing to do with each other. The
    model is run in evaluation mode on `images` as they are.
    """
    model.eval()
    with record_attention(model) as record:
        for inputs, _ in batches(
            images,
            len(images),
            generator=None,
            augment="none",
            mean=dataset.mean,
            std=dataset.std,
            device=device,
        ):
            model(inputs)
    weights = {
        name: values[0].kernel.mean(0)
        for name, values in record.values.items()
        if values[0].kernel is not None
    }
    return {
        name: tuple(weight.topk(min(count, len(weight))).indices.tolist()) for name, weight in weights.items()
    }


@contextmanager
def trained_parameters(model: nn.Module, kernels: Kernels) -> Iterator[list[Tensor]]:
    """Return the parameters for an optimiser that trains all of the model but the banks' other kernels.

    In the place of a bank stand views of its kernels to train, which get its gradient inside the `with` block:
    for the optimiser, the others don't exist, so that neither weight decay nor momentum moves them.
    """
    layers = dynamic_layers(model)
    banks = {
        id(bank): places
        for name, places in kernels.items()
        for bank in (layers[name].bank, layers[name].bias_bank)
        if bank is not None and len(places) < len(bank)
    }
    parameters: list[Tensor] = []

    def hand_over(bank: Tensor, views: Mapping[int, Tensor]) -> None:
        grad, bank.grad = bank.grad, None
        for place, view in views.items():
            view.grad = None if grad is None else grad[place]

    with ExitStack() as hooks:
        for parameter in model.parameters():
            if id(parameter) not in banks:
                parameters.append(parameter)
                continue
            views = {place: parameter.detach()[place] for place in banks[id(parameter)]}
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(partial(hand_over, views=views)))
            parameters += views.values()
        yield parameters


def are_whole(parameters: Iterable[Tensor]) -> bool:
    """Tell whether `trained_parameters` are the model's own, and none is a view of some kernels of a bank."""
    return all(isinstance(parameter, nn.Parameter) for parameter in parameters)
