"""Attentions that are switched off: the same for every image, at their usual strength."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedfmd.conv import (
    CONVS,
    FMDConv2d,
    dynamic_layers,
    make_conv,
    only_attentions,
    record_attention,
    recorded_attentions,
)

DYNAMIC = sorted(set(CONVS) - {"static"})


def attentions(conv):
    """What its layers say that they have."""
    layers = dynamic_layers(make_conv(conv, 8, 4, 3)).values()
    return tuple(sorted(name for layer in layers for name in layer.attentions))


@pytest.fixture
def images():
    return torch.randn(5, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def layer(conv):
    torch.manual_seed(0)
    made = make_conv(conv, 8, 4, 3, bias=False, attention_init="kaiming")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "attention" in name:
                parameter.mul_(20)  # so that the mixture depends on the image
    return nn.Sequential(made).eval()


def recorded(model, images):
    with record_attention(model) as record:
        model(images)
    return record


@pytest.mark.parametrize("conv", CONVS)
def test_the_record_tells_which_attentions_there_are(conv, images):
    assert recorded_attentions(recorded(layer(conv), images)) == attentions(conv)


@pytest.mark.parametrize("conv", DYNAMIC)
def test_with_all_kept_the_model_is_its_own(conv, images):
    model = layer(conv)
    with only_attentions(model, attentions(conv), recorded(model, images)):
        inside = model(images)
    assert torch.equal(inside, model(images))


@pytest.mark.parametrize("conv", DYNAMIC)
def test_with_none_kept_the_convolution_is_static(conv, images):
    model = layer(conv)
    with only_attentions(model, (), recorded(model, images)):
        torch.testing.assert_close(model(images * 3), model(images) * 3)
    assert not torch.allclose(model(images * 3), model(images) * 3, rtol=0.01)


def test_what_is_switched_off_keeps_its_mean_over_the_samples(images):
    conv = FMDConv2d(8, 4, 1, bias=False).eval()
    usual = recorded(nn.Sequential(conv), images)
    ((input, output, _, kernel),) = usual.values["0"]
    weight = torch.einsum("k,kocij->ocij", kernel.mean(0), conv.bank)
    expected = F.conv2d(images * input.mean(0).view(-1, 1, 1), weight) * output.mean(0).view(-1, 1, 1)
    with only_attentions(nn.Sequential(conv), (), usual):
        torch.testing.assert_close(conv(images), expected)


@pytest.mark.parametrize("conv", DYNAMIC)
@pytest.mark.parametrize("kept", ["input", "kernel", "output", "spatial"])
def test_only_what_is_kept_depends_on_the_image(conv, kept, images):
    model = layer(conv)
    with only_attentions(model, {kept}, recorded(model, images)):
        (values,) = recorded(model, images).values["0"]
    differing = [
        name
        for name, value in values._asdict().items()
        if value is not None and not (value == value[0]).all()
    ]
    assert differing == [name for name in attentions(conv) if name == kept]


def test_the_mean_is_over_all_recorded_batches(images):
    model = layer("fmdconv")
    with record_attention(model) as parts:
        model(images[:2])
        model(images[2:])
    with only_attentions(model, (), parts):
        in_parts = model(images)
    with only_attentions(model, (), recorded(model, images)):
        torch.testing.assert_close(in_parts, model(images))


def test_unusable_input_is_one_line(images):
    model = layer("fmdconv")
    usual = recorded(model, images)
    with pytest.raises(ValueError, match=r"^kept = kernle: use any of input, kernel, output, spatial$"):
        only_attentions(model, {"kernle"}, usual).__enter__()
    with pytest.raises(ValueError, match=r"^usual has no values of 0\.0: record a forward pass"):
        only_attentions(nn.Sequential(model), {"kernel"}, usual).__enter__()
