"""Weights with the names of the reference implementations (the ODConv and FMDConv repositories)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fedfmd.conv.layers import DynamicConv2d
from fedfmd.conv.operators.dyconv import DyConv2d
from fedfmd.conv.operators.fmdconv import FMDConv2d
from fedfmd.conv.operators.odconv import ODConv2d

_BANK = {"bank": "weight", "bias_bank": "bias"}
_SHARED = {
    "attention.shared.squeeze": "attention.fc",
    "attention.shared.norm": "attention.bn",
    "attention.shared.heads.input": "attention.channel_fc",
    "attention.shared.heads.output": "attention.filter_fc",
}
REFERENCE_NAMES: dict[type[DynamicConv2d], dict[str, str]] = {
    DyConv2d: _BANK | {"attention.kernel.squeeze": "attention.fc1", "attention.kernel.head": "attention.fc2"},
    ODConv2d: _BANK
    | _SHARED
    | {
        "attention.shared.heads.spatial": "attention.spatial_fc",
        "attention.shared.heads.kernel": "attention.kernel_fc",
    },
    FMDConv2d: _BANK
    | _SHARED
    | {"attention.kernel.squeeze": "attention2.fc1", "attention.kernel.head": "attention2.fc2"},
}
NOT_IN_REFERENCES = "temperature"  # a plain attribute there


def reference_names(model: nn.Module) -> dict[str, str]:
    """Return the reference implementations' name of each state-dict entry of the model (or of one layer)."""
    layers = {name: module for name, module in model.named_modules() if type(module) in REFERENCE_NAMES}
    names = {}
    for own in model.state_dict():
        prefix = next((p for p in layers if own.startswith(f"{p}." if p else "")), None)
        if prefix is None:
            names[own] = own
            continue
        local = own[len(prefix) + 1 :] if prefix else own
        if local == NOT_IN_REFERENCES:
            continue
        for mine, theirs in REFERENCE_NAMES[type(layers[prefix])].items():
            if local == mine or local.startswith(f"{mine}."):
                names[own] = own.removesuffix(local) + theirs + local[len(mine) :]
    return names


def load_reference_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Fill a dynamic layer or a whole model with weights named as in the reference implementations.

    Their attention weights are 1 × 1 convolutions (O × I × 1 × 1), here linear layers (O × I). They have no
    temperature, which stays as it is; `num_batches_tracked` may be absent. Nothing is changed when a name is
    missing or left over or a shape is wrong: one ValueError lists them all.
    """
    theirs = dict(state_dict)
    consume_prefix_in_state_dict_if_present(theirs, "module.")
    own_state = model.state_dict()
    names = reference_names(model)
    matched: dict[str, Tensor] = {}
    problems = []
    for own, name in names.items():
        wanted = own_state[own].shape
        if name not in theirs:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
            continue
        value = torch.as_tensor(theirs[name])
        if value.shape == wanted or value.shape == (*wanted, 1, 1):
            matched[own] = value.reshape(wanted)
        else:
            problems.append(f"{name} has shape {tuple(value.shape)} instead of {tuple(wanted)}")
    problems += [f"{name} is left over" for name in theirs if name not in set(names.values())]
    if problems:
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(matched, strict=False)
