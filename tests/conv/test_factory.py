"""The registry and the factory."""

import pytest
from torch import nn

from fedfmd.conv import CONVS, make_conv
from fedfmd.conv.layers import DynamicConv2d


@pytest.mark.parametrize("name", CONVS)
def test_every_convolution_takes_the_arguments_of_conv2d(name):
    conv = make_conv(name, 8, 12, (3, 1), stride=(2, 1), padding=(1, 0), dilation=1, groups=2)
    assert isinstance(conv, CONVS[name])
    assert (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 1), (2, 1), (1, 0), (1, 1))
    assert (conv.in_channels, conv.out_channels, conv.groups) == (8, 12, 2)


@pytest.mark.parametrize(
    ("name", "bias"),
    [("static", False), ("condconv", False), ("dyconv", True), ("odconv", False), ("fmdconv", True)],
)
def test_the_published_form_decides_on_the_bias(name, bias):
    def has_bias(conv):
        return (conv.bias_bank if isinstance(conv, DynamicConv2d) else conv.bias) is not None

    assert has_bias(make_conv(name, 8, 8, 3)) is bias
    assert has_bias(make_conv(name, 8, 8, 3, bias=not bias)) is not bias


def test_options_reach_the_operators_that_have_them():
    options = {
        "kernels": 2,
        "temperature": 7.0,
        "mixing": "outputs",
        "norm": "group",
        "attentions": ("kernel",),
    }
    conv = make_conv("fmdconv", 8, 8, 3, **options)
    assert (len(conv.bank), float(conv.temperature), conv.mixing) == (2, 7.0, "outputs")
    assert type(make_conv("static", 8, 8, 3, **options)) is nn.Conv2d
    assert isinstance(make_conv("odconv", 8, 8, 3, **options).attention["shared"].norm, nn.GroupNorm)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"conv = 'fmdcon' is unknown; did you mean 'fmdconv'\?"):
        make_conv("fmdcon", 8, 8, 3)
