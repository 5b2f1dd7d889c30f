"""Grad-CAM++, computed by hand on a network of one ReLU and one linear layer."""

import pytest
import torch
from torch import nn

from fedfmd.models import make_model
from fedfmd.serving.gradcam import default_layer, explained_layers, grad_cam_pp

IMAGE = torch.tensor([[[[1.0, 3.0], [-1.0, 0.0]], [[0.0, -2.0], [2.0, 2.0]]]])
"""Features after the ReLU: [[1, 3], [0, 0]] and [[0, 0], [2, 2]], both with the sum 4."""

EXPECTED = [[1 / 3, 1.0], [1 / 4, 1 / 4]]
"""The weights 1 / (2 + 4) + 1 / (2 + 4) = 1/3 and 0.5 / (2 + 0.5 · 4) = 1/8 of the two features."""


def network():
    model = nn.Sequential()
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(8, 2, bias=False))
    model.fc.weight.data = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0, 0.5, -1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]]
    )
    return model.eval()


def test_a_map_by_hand():
    torch.testing.assert_close(grad_cam_pp(network(), "relu", IMAGE.clone())[0], torch.tensor(EXPECTED))


def test_each_image_has_its_own_class_and_scale():
    images = torch.cat([IMAGE, IMAGE, IMAGE * 0])
    maps = grad_cam_pp(network(), "relu", images, torch.tensor([0, 1, 0]))
    nothing = [[0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(maps, torch.tensor([EXPECTED, nothing, nothing]))


def test_the_closed_form_is_the_papers_definition():
    """α = Y'' / (2 Y'' + Σ A · Y''') and w = Σ α relu(Y') of Y = exp(S), each pixel's derivatives by autograd."""
    model = network()
    features = IMAGE.relu().double()
    pixels = features.flatten()
    head = model.fc.weight[0].double().detach()
    weights = []
    for pixel in range(len(pixels)):
        a = pixels[pixel].clone().requires_grad_()
        score = torch.exp(pixels @ head + (a - pixels[pixel]) * head[pixel])
        first, second, third = _derivatives(score, a, 3)
        alpha = second / (2 * second + 4 * third) if second else 0
        weights.append(alpha * first.clamp_min(0))
    weights = torch.tensor(weights).view(2, 4).sum(1)
    cam = (weights.view(2, 1, 1) * features[0]).sum(0)
    torch.testing.assert_close(
        grad_cam_pp(model, "relu", IMAGE.clone())[0].double(), cam / cam.max(), atol=1e-6, rtol=1e-6
    )


def _derivatives(y, x, count):
    found = []
    for _ in range(count):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(y.detach())
    return found


def test_coarse_features_give_a_map_of_the_images_size_and_the_model_stays_as_it_was():
    torch.manual_seed(0)
    model = make_model("resnet8", "fmdconv", 4, width=0.25).eval()
    images = torch.randn(3, 3, 16, 16)
    before = model(images)
    maps = grad_cam_pp(model, "layer2.0", images)
    assert maps.shape == (3, 16, 16)
    assert maps.amin() >= 0
    assert maps.amax((1, 2)).tolist() == [1, 1, 1]
    assert torch.equal(model(images), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not maps.requires_grad


@pytest.mark.parametrize("layer", ["fc", "bn1"])
def test_only_feature_maps_without_negative_values_can_be_explained(layer):
    model = make_model("resnet8", "static", 4, width=0.25).eval()
    with pytest.raises(ValueError, match=f"^layer = '{layer}': "):
        grad_cam_pp(model, layer, torch.randn(2, 3, 8, 8))


def test_an_unknown_layer_is_an_error():
    with pytest.raises(AttributeError, match="layer9"):
        grad_cam_pp(network(), "layer9", IMAGE)


@pytest.mark.parametrize(
    ("arch", "stem", "size", "layer"),
    [
        ("resnet18", "imagenet", 224, "layer4"),  # 7 x 7
        ("resnet18", "cifar", 32, "layer3"),  # 8 x 8; layer4 has 4 x 4
        ("resnet20", "cifar", 32, "layer3"),  # 8 x 8, the last
        ("resnet20", "imagenet", 16, "layer1"),  # 4 x 4, the finest
        ("mobilenetv2", "imagenet", 224, "features.18"),  # 7 x 7
        ("mobilenetv2", "cifar", 32, "features.14.conv.0"),  # 8 x 8, before the stride of this block
    ],
)
def test_the_default_layer_is_the_deepest_that_can_show_a_place(arch, stem, size, layer):
    model = make_model(arch, "static", 4, stem=stem, width=0.125).eval()
    assert default_layer(explained_layers(model, torch.zeros(1, 3, size, size))) == layer


def test_layers_of_a_network_of_ones_own_are_those_of_maps_without_negative_values():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 8), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(196, 2),
    ).eval()
    with torch.no_grad():
        model[0].bias.fill_(-0.1)
    layers = explained_layers(model, torch.ones(1, 3, 16, 16))
    assert layers == {"1": 14, "2": 7, "2.1": 7}
    assert default_layer(layers) == "2"
