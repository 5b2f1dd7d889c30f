import pytest
import torch
import torchvision
from torch import nn

from fedfmd.models import MODELS, feature_layers, make_model


def plain(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs, bias=False)


def test_with_plain_convolutions_and_the_imagenet_stem_it_is_torchvisions_network():
    ours = make_model("mobilenetv2", "static", 1000, stem="imagenet").eval()
    theirs = torchvision.models.mobilenet_v2().eval()

    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == 3_504_872
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


def test_it_starts_as_torchvisions_does():
    torch.manual_seed(0)
    ours = make_model("mobilenetv2", "static", 1000, stem="imagenet")
    theirs = torchvision.models.mobilenet_v2()
    for name in ("features.18.0.weight", "features.17.conv.1.0.weight", "classifier.1.weight"):
        stds = [model.get_parameter(name).std().item() for model in (ours, theirs)]
        assert stds[0] == pytest.approx(stds[1], rel=0.05), name


# With the CIFAR stem images of 32 × 32 end as 4 × 4, with ImageNet's as 1 × 1; those of 224 × 224 as 7 × 7.
@pytest.mark.parametrize(
    ("stem", "size", "last"), [("cifar", 32, 4), ("imagenet", 32, 1), ("imagenet", 224, 7)]
)
def test_the_stem_decides_on_the_resolution(stem, size, last):
    model = make_model("mobilenetv2", "static", 10, stem=stem, width=0.125).eval()
    assert model.features(torch.zeros(1, 3, size, size)).shape == (1, 1280, last, last)


def test_the_factory_makes_all_convolutions_but_the_stem():
    class Marked(nn.Conv2d):
        pass

    model = MODELS["mobilenetv2"].build(10, conv=Marked, width=0.25)
    others = {
        n
        for n, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, Marked)
    }
    assert others == {"features.0.0"}


def test_width_scales_all_but_the_last_features_which_only_grow():
    narrow, wide = (MODELS["mobilenetv2"].build(10, conv=plain, width=width) for width in (0.5, 1.5))
    assert [model.features[0][0].out_channels for model in (narrow, wide)] == [16, 48]
    assert [model.features[2].conv[0][0].out_channels for model in (narrow, wide)] == [6 * 8, 6 * 24]
    assert [model.classifier[1].in_features for model in (narrow, wide)] == [1280, 1920]


def test_group_norm_replaces_every_batch_norm_and_takes_one_image():
    model = make_model("mobilenetv2", "fmdconv", 10, norm="group", width=0.25).train()
    assert not [name for name, _ in model.named_buffers() if "running" in name]
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 10)


def test_training_draws_no_random_numbers():
    model = make_model("mobilenetv2", "fmdconv", 10, norm="group", width=0.125).train()
    images, before = torch.rand(2, 3, 8, 8), torch.get_rng_state()
    assert torch.equal(model(images), model(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_feature_layers_have_no_negative_values():
    model = make_model("mobilenetv2", "fmdconv", 4, width=0.125).eval()
    layers, lowest = feature_layers(model), []
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *args: lowest.append(args[2].min().item()))
    model(torch.randn(2, 3, 16, 16))
    assert (layers[0], layers[-1]) == ("features.0", "features.18")
    assert min(lowest) >= 0
