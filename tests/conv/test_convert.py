"""Static networks made dynamic."""

import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from fedfmd.conv import CONVS, DynamicConv2d, dynamic_layers, is_dynamic, load_static_state_dict, make_dynamic
from fedfmd.conv.attention import Attention, Routing
from fedfmd.models import make_model

DYNAMIC = [name for name in CONVS if is_dynamic(name)]
OPERATORS = DYNAMIC[:4]


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2"])
def network(request):
    """A network of torchvision's whose BatchNorm statistics are not those of a fresh one, images and its logits."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(request.param, num_classes=7)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        return model.eval(), images, model(images)


def small(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, **options), nn.ReLU())


def replaced(model, **options):
    return list(dynamic_layers(make_dynamic(model, "dyconv", **options)))


@pytest.mark.parametrize("kernels", [1, 4])
@pytest.mark.parametrize("conv", OPERATORS)
def test_a_dynamic_network_computes_what_the_static_one_does(network, conv, kernels):
    model, images, logits = network
    dynamic = make_dynamic(model, conv, kernels)
    with torch.no_grad():
        difference = (dynamic(images) - logits).abs().max() / logits.abs().max()
    assert {layer.name for layer in dynamic_layers(dynamic).values()} == {conv}
    assert difference <= 1e-4


@pytest.mark.parametrize("conv", DYNAMIC)
@pytest.mark.parametrize(
    "geometry",
    [
        {"groups": 4, "bias": False},
        {"groups": 2, "stride": (2, 1), "padding": (0, 2), "dilation": 2},
        {"kernel_size": 1},
        {"padding": "same"},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 2, "padding": "valid"},
        {"padding": 2, "padding_mode": "reflect"},
    ],
    ids=["depthwise", "grouped", "pointwise", "same", "uneven", "valid", "reflected"],
)
def test_every_geometry_keeps_its_output(conv, geometry):
    torch.manual_seed(0)
    static = nn.Conv2d(4, 4, **{"kernel_size": 3} | geometry)
    images = torch.randn(3, 4, 8, 7)
    torch.testing.assert_close(make_dynamic(static, conv, 3, skip=())(images), static(images))


def test_a_residual_network_keeps_its_stem_and_its_shortcuts_as_make_model_does():
    ours = make_dynamic(torchvision.models.resnet50(), "fmdconv", kernels=1)
    made = make_model("resnet50", "fmdconv", 1000, kernels=1, stem="imagenet")
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in made.state_dict().items()
    }


def test_the_given_model_stays_as_it_is_and_the_new_one_is_like_it():
    model = small().double().eval()
    model[2].requires_grad_(False)
    dynamic = make_dynamic(model, "odconv", temperature=3.0, norm="group")
    layer = dynamic[2]
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
    assert dynamic[0].weight is not model[0].weight
    assert (layer.bank.dtype, layer.training, layer.bank.requires_grad) == (torch.float64, False, False)
    assert (float(layer.temperature), layer.attention["shared"].squeeze.weight.requires_grad) == (3.0, True)


@pytest.mark.parametrize(
    ("skip", "dynamic"),
    [
        (None, ["1.0", "1.2"]),
        ((), ["0", "1.0", "1.2"]),
        ("1.0", ["0", "1.2"]),
        (["1"], ["0"]),
        (lambda name, conv: conv.out_channels == 6, ["0", "1.0"]),
    ],
    ids=["stem", "nothing", "name", "block", "function"],
)
def test_what_is_skipped_stays_static(skip, dynamic):
    assert replaced(nn.Sequential(nn.Conv2d(3, 3, 1), small()), skip=skip) == dynamic


def test_a_convolution_that_is_used_twice_stays_one():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    dynamic = make_dynamic(nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared)), "dyconv")
    assert isinstance(dynamic[1], DynamicConv2d)
    assert dynamic[1] is dynamic[2][0]


@pytest.mark.parametrize("conv", OPERATORS)
@pytest.mark.parametrize(("spread", "differ"), [(0.01, True), (0.0, False)])
def test_kernels_part_in_training_unless_they_are_exact_copies(conv, spread, differ):
    dynamic = make_dynamic(small().double(), conv, spread=spread)
    layer = dynamic[2]
    before = layer.bank.detach().clone()
    optimiser = torch.optim.SGD(dynamic.parameters(), lr=0.1)
    dynamic(torch.randn(8, 3, 9, 9, dtype=torch.float64)).square().mean().backward()
    optimiser.step()
    head = layer.attention.branches[-1].last_layers[-1].weight
    assert (layer.bank != before).any()
    assert bool((head - head[0]).abs().max() > 1e-12) is differ


def test_the_kernels_lie_around_the_old_one():
    torch.manual_seed(0)
    static = nn.Conv2d(64, 64, 3)
    kernels = 0.5 * 0.5 * make_dynamic(static, "fmdconv", skip=(), spread=0.1).bank.detach()
    torch.testing.assert_close(kernels.mean(0), static.weight.detach())
    centred = (3 / 4) ** 0.5  # noise of four kernels less its mean
    assert ((kernels - static.weight).std() / static.weight.std()).item() == pytest.approx(
        0.1 * centred, rel=0.02
    )


def test_a_convolution_of_ones_own_tells_its_factor_itself(monkeypatch):
    class Doubled(Routing):
        def forward(self, pooled, temperature):
            return {"kernel": 2 * torch.sigmoid(self.head(pooled)), "output": 3 * torch.ones(len(pooled), 6)}

    class Own(CONVS["condconv"]):
        name = "own"

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.attention = Attention({"kernel": Doubled(self.in_channels, self.kernels)})
            self.reset_parameters()

    monkeypatch.setitem(CONVS, "own", Own)
    model, images = small(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(make_dynamic(model, "own")(images), model(images))


def test_weights_of_a_static_network_fill_a_dynamic_one():
    torch.manual_seed(0)
    static, dynamic = (make_model("resnet8", conv, 5, norm="group").eval() for conv in ("static", "fmdconv"))
    images = torch.rand(2, 3, 16, 16)
    load_static_state_dict(dynamic, static.state_dict())
    torch.testing.assert_close(dynamic(images), static(images))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"fc.bias": None}, 'Missing key(s) in state_dict: "fc.bias"'),
        ({"layer1.0.conv1.weight": None}, "layer1.0.conv1.weight is missing, and must have (16, 16, 3, 3)"),
        ({"layer1.0.conv1.weight": torch.ones(1)}, "layer1.0.conv1.weight has shape (1,), and must have"),
        ({"layer1.0.conv1.other": torch.ones(1)}, 'Unexpected key(s) in state_dict: "layer1.0.conv1.other"'),
    ],
)
def test_weights_of_another_network_are_refused(change, line):
    state = make_model("resnet8", "static", 5).state_dict() | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(RuntimeError, match=re.escape(line)):
        load_static_state_dict(make_model("resnet8", "dyconv", 5), state)


class Same(nn.Conv2d):
    """Like an nn.Conv2d of timm's."""


def pruned():
    conv = nn.Conv2d(3, 4, 3)
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        (nn.Linear(3, 4), {}, "model = Linear: nothing to make dynamic, it has no nn.Conv2d"),
        (small(), {"skip": ["0", "2"]}, "model = Sequential: nothing to make dynamic, all of its convolutions are in"),
        (small(), {"skip": ["3"]}, "skip: '3' has no convolution; did you mean "),
        (small(), {"conv": "static"}, "conv = 'static' has no bank of kernels; use one of condconv, dyconv, "),
        (small(), {"conv": "fmdcon"}, "conv = 'fmdcon' is unknown; did you mean 'fmdconv'?"),
        (small(), {"attention_init": "kaiming"}, "attention_init = 'kaiming': the kernel attention of DyConv2d"),
        (small(), {"kernel": 3}, "kernel = 3: no convolution has it"),
        (Same(3, 4, 3), {"skip": ()}, "model is a Same, which may compute something else than an nn.Conv2d"),
        (pruned(), {"skip": ()}, "model computes its weight from others"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_dynamic_is_refused_in_one_clear_line(model, options, line):
    options = {"conv": "dyconv"} | options
    with pytest.raises(ValueError, match=re.escape(line)):
        make_dynamic(model, **options)
