import pytest
import torch
import torchvision
from torch import nn

from fedfmd.models import MODELS, NORMS, Architecture, feature_layers, make_model, resnet
from fedfmd.models.resnet import scaled


def plain(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs, bias=False)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_with_plain_convolutions_and_the_imagenet_stem_it_is_torchvisions_network(arch):
    ours = resnet(MODELS[arch], 1000, conv=plain, stem="imagenet").eval()
    theirs = torchvision.models.get_model(arch).eval()

    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


# resnet8: 432 (stem) + 2·2304 + (4608 + 9216 + 512) + (18432 + 36864 + 2048) weights of convolutions,
# 2·(16·3 + 32·3 + 64·3) of norms and 650 of the classifier; resnet20 adds 4·(2304 + 9216 + 36864) + 8·112.
@pytest.mark.parametrize(("arch", "expected"), [("resnet8", 78_042), ("resnet20", 272_474)])
def test_cifar_networks_have_the_parameters_counted_by_hand(arch, expected):
    assert parameters(resnet(MODELS[arch], 10, conv=plain)) == expected


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 8)])
def test_the_cifar_stem_keeps_the_resolution_and_the_imagenet_stem_quarters_it(stem, size):
    model = resnet(MODELS["resnet8"], 10, conv=plain, stem=stem)
    entry = nn.Sequential(*list(model.children())[: list(dict(model.named_children())).index("layer1")])
    assert entry(torch.rand(2, 3, 32, 32)).shape == (2, 16, size, size)


def test_the_factory_makes_the_main_path_of_the_blocks_and_nothing_else():
    class Marked(nn.Conv2d):
        pass

    model = resnet(MODELS["resnet50"], 10, conv=Marked)
    marked = {name for name, layer in model.named_modules() if isinstance(layer, Marked)}
    convolutions = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}

    assert len(marked) == 3 * (3 + 4 + 6 + 3)
    assert convolutions - marked == {"conv1"} | {f"layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4)}


def test_group_norm_replaces_every_batch_norm_and_takes_one_image():
    model = resnet(MODELS["resnet8"], 10, conv=plain, norm="group").train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert {norm.num_channels: norm.num_groups for norm in norms} == {16: 2, 32: 4, 64: 8}
    assert model(torch.rand(1, 3, 4, 4)).shape == (1, 10)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (6, 1), (7, 1), (8, 1), (20, 2), (30, 3), (35, 1), (64, 8)]
)
def test_group_norm_takes_any_number_of_channels_as_own_networks_may_have(channels, groups):
    norm = NORMS["group"](channels)
    assert norm.num_groups == groups
    assert norm(torch.rand(2, channels, 3, 3)).shape == (2, channels, 3, 3)


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(64, 1.0, 64), (64, 0.5, 32), (16, 0.25, 8), (16, 0.01, 8), (20, 1.0, 24), (64, 1.3, 80)],
)
def test_width_rounds_to_the_nearest_multiple_of_eight(channels, width, expected):
    assert scaled(channels, width) == expected


def test_width_scales_every_stage():
    model = resnet(MODELS["resnet8"], 10, conv=plain, width=2.0)
    assert [model.get_submodule(f"layer{s}")[0].conv1.out_channels for s in (1, 2, 3)] == [32, 64, 128]


def test_plain_convolutions_start_as_he_et_al_proposed():
    torch.manual_seed(0)
    wide = Architecture(MODELS["resnet18"].block, (1,), (256,))
    weight = resnet(wide, 10, conv=plain).layer1[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_feature_layers_are_stages_and_blocks():
    model = make_model("resnet8", "fmdconv", 4)
    assert feature_layers(model) == ("layer1", "layer1.0", "layer2", "layer2.0", "layer3", "layer3.0")
