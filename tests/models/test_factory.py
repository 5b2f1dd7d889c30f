import re

import pytest
import torch
from torch import nn

from fedfmd.conv import CONVS
from fedfmd.models import MODELS, make_model


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("conv", CONVS)
def test_every_convolution_trains(conv, norm):
    model = make_model("resnet8", conv, 10, kernels=2, norm=norm, width=0.5)
    loss = nn.functional.cross_entropy(model(torch.rand(2, 3, 16, 16)), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch", MODELS)
def test_every_architecture_maps_images_to_logits(arch):
    model = make_model(arch, "static", 7, width=0.125).eval()
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize("conv", CONVS)
def test_group_norm_leaves_no_batch_statistics(conv):
    model = make_model("resnet8", conv, 10, norm="group")
    assert not [name for name, _ in model.named_buffers() if "running" in name]


def test_options_of_the_convolution_reach_every_layer():
    model = make_model("resnet8", "fmdconv", 10, kernels=3, temperature=7.0)
    assert model.layer3[0].conv2.bank.shape == (3, 64, 64, 3, 3)
    assert model.layer1[0].conv1.temperature == 7.0


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"arch": "resnet19"}, "arch = 'resnet19' is unknown; did you mean 'resnet18'?"),
        ({"conv": "fmdcnv"}, "conv = 'fmdcnv' "),
        ({"stem": "imagnet"}, "stem = 'imagnet' is unknown; did you mean 'imagenet'?"),
        ({"norm": "groups"}, "norm = 'groups' is unknown; did you mean 'group'?"),
        ({"width": 0}, "width = 0 must be a positive finite number"),
        ({"width": float("nan")}, "width = nan must be a positive finite number"),
        ({"classes": 1}, "classes = 1 must be at least 2"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(wrong, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        make_model(**{"arch": "resnet8", "conv": "static", "classes": 10} | wrong)
