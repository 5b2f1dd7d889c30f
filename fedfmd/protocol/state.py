"""A model's state as named arrays, as it travels, is averaged and is checked.

A dynamic layer's bank is one array per kernel (``layer1.0.conv1.bank.2``), so that a plan can name kernels and bytes
can be counted from what was really sent. In the model it is one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedfmd.conv.layers import BANKS, bank_names, dynamic_layers

Arrays = dict[str, np.ndarray]


def bank_of(name: str) -> tuple[str, int] | None:
    """Return the bank (`layer1.0.conv1.bank`) and the place in it of the kernel `name`; None for other arrays."""
    bank, _, place = name.rpartition(".")
    return (bank, int(place)) if bank.rpartition(".")[2] in BANKS else None


def false_kernels(module: nn.Module) -> list[str]:
    """Return the names in the module's state that `bank_of` takes for kernels, and that are none."""
    others = module.state_dict().keys() - bank_names(module)
    return sorted(name for name in others if name.rpartition(".")[0].rpartition(".")[2] in BANKS)


def trained_views(views: Mapping[str, Tensor], kernels: Mapping[str, Collection[int]]) -> dict[str, Tensor]:
    """Return `wire_views` without the frozen kernels; `kernels` holds those trained, by layer."""
    trained = {}
    for name, view in views.items():
        kernel = bank_of(name)
        if kernel is None or kernel[1] in kernels[kernel[0].rpartition(".")[0]]:
            trained[name] = view
    return trained


def wire_views(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state under its names on the wire, as tensors that share its memory."""
    return split_banks(module.state_dict(), bank_names(module))


class WireState:
    """`wire_views` of one module, time and again: made once, as the module's parts don't change.

    The tensors may: a buffer that the module replaces by another is found. A module that makes its state dict in a
    way of its own is asked each time.
    """

    def __init__(self, module: nn.Module) -> None:
        state = module.state_dict()
        owners = {
            _child(parent, key): (owner, key)
            for parent, owner in module.named_modules(remove_duplicate=False)
            for named in (owner.named_parameters, owner.named_buffers)
            for key, _ in named(recurse=False, remove_duplicate=False)
        }
        self.module, self._banks = module, bank_names(module)
        self._places = {name: owners[name] for name in state} if state.keys() <= owners.keys() else {}
        if _memory(self._tensors()) != _memory(state):
            self._places = {}
        self._memory: list[int] = []
        self._views: dict[str, Tensor] = {}

    def views(self) -> Mapping[str, Tensor]:
        """Return the module's state under its names on the wire, as tensors that share its memory."""
        tensors = self._tensors()
        memory = _memory(tensors)  # no other tensor gets an address while a view of it is kept
        if memory != self._memory or not self._places:
            self._memory = memory
            self._views = split_banks(
                {name: tensor.detach() for name, tensor in tensors.items()}, self._banks
            )
        return self._views

    def _tensors(self) -> Mapping[str, Tensor]:
        if not self._places:
            return self.module.state_dict()
        return {name: getattr(owner, key) for name, (owner, key) in self._places.items()}


def _memory(tensors: Mapping[str, Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors.values()]


def split_banks(tensors: Mapping[str, Tensor], banks: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors under their names on the wire: views of the kernels in place of each of the `banks`."""
    views: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in banks:
            views |= {f"{name}.{k}": kernel for k, kernel in enumerate(tensor.unbind())}
        else:
            views[name] = tensor
    return views


def parameter_names(module: nn.Module) -> frozenset[str]:
    """Names on the wire of what an optimiser trains, as opposed to buffers."""
    buffers = {name for name, _ in module.named_buffers()}
    return frozenset(wire_views(module).keys() - buffers)


def fixed_names(module: nn.Module) -> frozenset[str]:
    """Names on the wire of the buffers that training leaves as they are: the temperatures."""
    layers = dynamic_layers(module)
    return frozenset(
        _child(name, "temperature") for name, layer in layers.items() if layer.temperature is not None
    )


def variance_names(module: nn.Module) -> frozenset[str]:
    """Names on the wire of the running variances, which can't be negative."""
    return frozenset(
        _child(name, "running_var")
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.running_var is not None
    )


def _child(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def pack(module: nn.Module) -> Arrays:
    """Copy the module's state into arrays named as on the wire."""
    return {name: array.copy() for name, array in shared_arrays(module).items()}


def shared_arrays(module: nn.Module) -> Arrays:
    """Return the module's state as arrays named as on the wire, which on the CPU share its memory."""
    return {name: view.numpy(force=True) for name, view in wire_views(module).items()}


def load(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the module.

    Raises:
        ValueError: names or shapes differ from the module's.
    """
    fill(wire_views(module), arrays)


def fill(views: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into a module's `wire_views`.

    Raises:
        ValueError: names or shapes differ from theirs.
    """
    check_layout(arrays, {name: tuple(view.shape) for name, view in views.items()})
    if not views:
        return
    with torch.no_grad():  # in one call, as there are a hundred
        torch._foreach_copy_(list(views.values()), [torch.as_tensor(arrays[name]) for name in views])


def check_layout(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Compare names and shapes with what is expected; `optional` arrays may be missing.

    Raises:
        ValueError: names the first missing, unexpected or misshapen array.
    """
    if missing := shapes.keys() - arrays.keys() - set(optional):
        raise ValueError(f"array {min(missing)} is missing")
    if unexpected := arrays.keys() - shapes.keys():
        raise ValueError(f"array {min(unexpected)} is not part of the model")
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise ValueError(f"array {name} has shape {array.shape}, the model's has {shapes[name]}")


def first_non_finite(arrays: Mapping[str, np.ndarray | Tensor]) -> str | None:
    """Return the name of the first array with a NaN or an infinity."""
    for name, array in arrays.items():
        values = torch.as_tensor(array)
        # A sum is several times cheaper; it is finite only if all values are, but large ones may overflow it.
        if not math.isfinite(values.sum()) and not values.isfinite().all():
            return name
    return None


def check_weights(arrays: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse arrays that are no weights of a trained module, whose names and shapes are not looked at.

    Raises:
        ValueError: one has NaN or infinite values, or whole numbers in the place of others.
    """
    whole = {name for name, own in module.state_dict().items() if not own.is_floating_point()}
    for name, array in arrays.items():
        if not (array.is_floating_point() or name in whole):
            raise ValueError(f"array {name} is of type {array.dtype}, and a model's are floats")
        if not array.double().isfinite().all():
            raise ValueError(f"array {name} has NaN or infinite values")


def payload_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of the arrays' values."""
    return sum(array.nbytes for array in arrays.values())
