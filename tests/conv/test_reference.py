"""Weights of the reference implementations give their outputs and gradients, whatever the mixing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedfmd.conv import MIXINGS, FMDConv2d, load_reference_state_dict, make_conv
from fedfmd.conv.reference import reference_names

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.npz"))


def load(path):
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    state = {name.removeprefix("state/"): t for name, t in arrays.items() if name.startswith("state/")}
    return arrays, state, meta


def golden_layer(meta, mixing="auto"):
    return make_conv(
        meta["op"],
        *(meta["in"], meta["out"], meta["k"], meta["stride"], meta["pad"]),
        groups=meta.get("groups", 1),
        kernels=meta["K"],
        temperature=meta["T"],
        mixing=mixing,
    ).train(meta["train"])


def relative_error(value, expected):
    return float((value.detach() - expected.view_as(value)).abs().max() / expected.abs().max())


@pytest.mark.parametrize("mixing", ["auto", *MIXINGS])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reference_outputs_and_gradients_are_reproduced(path, mixing):
    arrays, state, meta = load(path)
    layer = golden_layer(meta, mixing)
    load_reference_state_dict(layer, state)
    x = arrays["x"].requires_grad_()
    y = layer(x)
    y.backward(arrays["grad_y"])
    names = reference_names(layer)
    pairs = {"y": (y, arrays["y"]), "x": (x.grad, arrays["grad_x"])}
    pairs |= {name: (p.grad, arrays[f"grad/{names[name]}"]) for name, p in layer.named_parameters()}
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    assert max(errors.values()) < 1e-4, errors


def test_a_whole_model_with_the_prefix_of_data_parallel():
    def block():
        return nn.ModuleDict({"conv1": FMDConv2d(8, 8, 3, bias=False), "bn1": nn.BatchNorm2d(8)})

    model, other = (
        nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "layer1": nn.Sequential(block())}) for _ in range(2)
    )
    names = reference_names(model)
    assert names["layer1.0.conv1.bank"] == "layer1.0.conv1.weight"
    assert names["layer1.0.conv1.attention.kernel.squeeze.weight"] == "layer1.0.conv1.attention2.fc1.weight"
    reference = {f"module.{theirs}": model.state_dict()[own] for own, theirs in names.items()}
    load_reference_state_dict(other, reference)
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_everything_that_does_not_fit_is_listed_and_nothing_is_loaded():
    _, state, meta = load(next(path for path in GOLDEN if path.stem.startswith("dyconv")))
    layer = golden_layer(meta)
    before = layer.bank.clone()
    state["attention.fc3.weight"] = torch.zeros(1)
    state["bias"] = torch.zeros(3)
    del state["attention.fc2.weight"]
    with pytest.raises(ValueError, match="the state dict does not fit DyConv2d") as error:
        load_reference_state_dict(layer, state)
    for problem in (
        "attention.fc3.weight is left over",
        "bias has shape (3,) instead of",
        "attention.fc2.weight is missing",
    ):
        assert problem in str(error.value)
    assert torch.equal(layer.bank, before)
