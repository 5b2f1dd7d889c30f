"""What a model costs, by formulas on shapes: parameters, multiply-accumulates (MACs), FLOPs and bytes.

Conventions: 1 MAC = 2 FLOPs; training costs 3 × the forward pass, since the backward pass has two products
for each of its products; a number takes 4 bytes (float32). Convolutions, linear layers and the aggregation
of kernels are counted; what is elementwise on feature maps (normalisation, activation, pooling, scaling by
an attention) is not. Of layers of other kinds, as a user's own, the products are counted that PyTorch does: its
convolutions and matrix products. A dynamic convolution is counted as its equation is written, whatever way of mixing
computes it, and also at K = 1, where the layers save themselves the aggregation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedfmd.conv import DynamicConv2d

FLOPS_PER_MAC = 2
TRAINING_PER_FORWARD = 3
BYTES_PER_NUMBER = 4

CONVOLUTIONS = (nn.Conv2d, DynamicConv2d)
KNOWN = (*CONVOLUTIONS, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU6, nn.MaxPool2d, nn.Linear)


@dataclass(frozen=True)
class Cost:
    """What a model costs; MACs, FLOPs and activations for one image.

    Attributes:
        params: number of parameters.
        bytes: size of the state dict, parameters and buffers.
        macs_by_kind: MACs of a forward pass in the convolutions (static and dynamic), the linear layers (the
            classifier), the attention of the dynamic convolutions and the aggregation of their kernels; "other" is
            what layers of other kinds have, where there are any.
        activation_bytes: what training keeps from the forward for the backward pass: see `stored_numbers`.
        kernels: K, the kernels of each bank; 1 without banks.
        kernel_params: parameters, biases included, that one kernel of every bank has together.
        kernel_gradient_macs: MACs for the gradient of these parameters.
    """

    params: int
    bytes: int
    macs_by_kind: dict[str, int]
    activation_bytes: int
    kernels: int = 1
    kernel_params: int = 0
    kernel_gradient_macs: int = 0

    @property
    def macs(self) -> int:
        """MACs of a forward pass."""
        return sum(self.macs_by_kind.values())

    @property
    def flops(self) -> int:
        """FLOPs of a forward pass."""
        return FLOPS_PER_MAC * self.macs

    @property
    def train_flops(self) -> int:
        """FLOPs of a forward and a backward pass."""
        return TRAINING_PER_FORWARD * self.flops

    @property
    def param_bytes(self) -> int:
        """Bytes of the parameters in float32."""
        return BYTES_PER_NUMBER * self.params


class Call(NamedTuple):
    """A layer with the shapes, batch first, of its input and its output."""

    layer: nn.Module
    input: torch.Size
    output: torch.Size


def count(model: nn.Module, image_size: int) -> Cost:
    """Count one image of 3 × `image_size` × `image_size` through the model, which stays as it is.

    At 224 pixels this gives the usual 1.814 G MACs for ResNet-18 and 4.089 G for ResNet-50, whose stride is
    on the 3×3 convolutions as in torchvision (ODConv's base of 3.858 G has it on the first 1×1). ODConv's
    published figures count more than convolutions, linear layers and kernels: ResNet-18 with K = 1 and 4
    has 1.838 G and 1.916 G there, 1.825 G and 1.902 G here.

    Raises:
        ValueError: `image_size` < 1.
    """
    if image_size < 1:
        raise ValueError(f"image_size = {image_size} must be at least 1")
    calls, other_macs = trace(model, image_size)
    dynamic = [call.layer for call in calls if isinstance(call.layer, DynamicConv2d)]
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        macs_by_kind={
            "convolution": sum(
                convolution_macs(c.layer, c.output) for c in calls if isinstance(c.layer, CONVOLUTIONS)
            ),
            "linear": sum(linear_macs(c.layer, c.output) for c in calls if isinstance(c.layer, nn.Linear)),
            "attention": sum(layer.attention_macs for layer in dynamic),
            "aggregation": sum(layer.aggregation_macs for layer in dynamic),
            **({"other": other_macs} if other_macs else {}),
        },
        activation_bytes=BYTES_PER_NUMBER * sum(stored_numbers(call) for call in calls),
        kernels=max((layer.kernels for layer in dynamic), default=1),
        kernel_params=sum(layer.kernel_params for layer in dynamic),
        kernel_gradient_macs=sum(kernel_gradient_macs(layer) for layer in dynamic),
    )


def frozen_bytes(cost: Cost, kernels: int) -> int:
    """Bytes of the parameters that stay as they are where only `kernels` kernels of each bank are trained."""
    return BYTES_PER_NUMBER * (cost.kernels - kernels) * cost.kernel_params


def training_flops(cost: Cost, kernels: int) -> int:
    """FLOPs of a forward and a backward pass for one image, `kernels` kernels of each bank being trained.

    All kernels are mixed and pass gradients on to the attention and to the image. Only the products that end
    in a frozen kernel's own gradient are saved: a small part, as mixing is cheap beside convolving.
    """
    return cost.train_flops - FLOPS_PER_MAC * (cost.kernels - kernels) * cost.kernel_gradient_macs


def training_memory(cost: Cost, batch: int, kernels: int | None = None, states: int = 1) -> int:
    """Bytes that training holds: parameters, gradients, the optimiser's state and a batch's activations.

    Frozen parameters have neither gradient nor state: all but `kernels` (None: all) of each bank. `states` counts
    the numbers that the optimiser keeps for each parameter: 1 is the momentum of SGD.
    """
    frozen = 0 if kernels is None else frozen_bytes(cost, kernels)
    parameters = (2 + states) * cost.param_bytes - (1 + states) * frozen
    return parameters + batch * cost.activation_bytes


def trace(model: nn.Module, image_size: int) -> tuple[list[Call], int]:
    """List the layers with the shapes that they meet, by running a copy without data on the meta device.

    A network that looks at values, or makes tensors on a device of its choice, runs on the CPU instead. The second
    value is the MACs of all that is done outside `KNOWN` layers, where the model has other ones.
    """
    try:
        return _trace(model, image_size, "meta")
    except Exception:  # as many kinds as there are operators; what is wrong itself fails again
        return _trace(model, image_size, "cpu")


def _trace(model: nn.Module, image_size: int, device: str) -> tuple[list[Call], int]:
    model = copy.deepcopy(model).to(device).eval()
    calls: list[Call] = []
    counter = FlopCounterMode(display=False)
    known = 0  # FLOPs up to and in known layers, less those before them

    def enter(_layer: nn.Module, _inputs: object) -> None:
        nonlocal known
        known -= counter.get_total_flops()

    def leave(_layer: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal known
        known += counter.get_total_flops()

    def note(layer: nn.Module, inputs: tuple[object, ...], named: dict[str, object], output: object) -> None:
        first = next((given for given in (*inputs, *named.values()) if isinstance(given, Tensor)), None)
        if isinstance(output, Tensor) and first is not None:
            calls.append(Call(layer, first.shape, output.shape))

    layers = list(leaves(model))
    others = any(not isinstance(layer, KNOWN) for layer in layers)
    for layer in layers:
        layer.register_forward_hook(note, with_kwargs=True)
        if others and isinstance(layer, KNOWN):
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)
    with torch.no_grad(), counter if others else nullcontext():
        model(torch.empty(1, 3, image_size, image_size, device=device))
    return calls, (counter.get_total_flops() - known) // FLOPS_PER_MAC


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that have a cost: `KNOWN` ones, a dynamic convolution with its attention being one, and others.

    The others are all that have parameters of their own, whatever lies inside.
    """
    known = isinstance(module, KNOWN)
    if known or next(module.parameters(recurse=False), None) is not None:
        yield module
    for child in () if known else module.children():
        yield from leaves(child)


def convolution_macs(layer: nn.Conv2d | DynamicConv2d, output: torch.Size) -> int:
    """O·H'·W' outputs, each a sum over C/groups·kh·kw inputs."""
    return prod(output[1:]) * layer.in_channels // layer.groups * prod(layer.kernel_size)


def linear_macs(layer: nn.Linear, output: torch.Size) -> int:
    """One product for each weight, at each position of one image's output, B × … × features."""
    return prod(output[1:-1]) * layer.in_features * layer.out_features


def kernel_gradient_macs(layer: DynamicConv2d) -> int:
    """One product per number of a kernel: π_k times the mixed kernel's gradient.

    Without kernel attention the kernels are averaged once for all images, which is not counted.
    """
    return layer.bank[0].numel() if layer.has_kernel_attention else 0


def stored_numbers(call: Call) -> int:
    """Numbers that the backward pass needs from a layer: its output, which is the next layer's input.

    ReLU works in place, and so does ReLU6, but that keeps what it was given. Where attention scales the input or
    output of a dynamic convolution, the numbers before and after are needed. Per-sample kernels are left out: the
    mixing decides whether they are kept.
    """
    numbers = prod(call.output[1:])
    if isinstance(call.layer, DynamicConv2d):
        scaled = call.layer.attentions
        numbers += prod(call.input[1:]) * ("input" in scaled) + prod(call.output[1:]) * ("output" in scaled)
    return numbers
