"""The registry and the factory."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedfmd.conv import CONVS, OPTIONS, has_kernel_attention, is_dynamic, make_conv, options_of
from fedfmd.conv.layers import DynamicConv2d
from fedfmd.errors import SettingsError


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


def test_convolutions_come_in_the_order_of_their_publication():
    assert list(CONVS)[:5] == ["static", "condconv", "dyconv", "odconv", "fmdconv"]


def test_only_banks_make_a_convolution_dynamic():
    assert [name for name in CONVS if not is_dynamic(name)] == ["static"]


def test_options_are_the_keyword_arguments_of_the_class():
    assert options_of("static") == {}
    assert options_of("condconv") == {"kernels": 4, "attention_init": "neutral", "mixing": "auto"}
    assert options_of("dyconv")["kernel_reduction"] == 0.25
    assert set(OPTIONS) == {option for name in CONVS for option in options_of(name)}


def test_an_option_that_no_convolution_has_is_refused():
    with pytest.raises(ValueError, match="kernel = 2: no convolution has it; use any of kernels, "):
        make_conv("fmdconv", 8, 8, 3, kernel=2)


@pytest.mark.parametrize(
    ("name", "options", "has"),
    [
        ("static", {}, False),
        ("condconv", {}, True),
        ("odconv", {"kernels": 1}, False),
        ("fmdconv", {}, True),
        ("fmdconv", {"attentions": ("input",)}, False),
    ],
)
def test_whether_kernels_are_weighed_is_known_without_drawing_numbers(name, options, has):
    before = torch.get_rng_state()
    assert has_kernel_attention(name, **options) is has
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"conv = 'fmdcon' is unknown; did you mean 'fmdconv'\?"):
        make_conv("fmdcon", 8, 8, 3)


class Scaled(nn.Conv2d):
    """A user's own that names no arguments, and takes them by place alone."""

    def __init__(self, *geometry, **others):
        super().__init__(*geometry)


class Keyword(nn.Conv2d):
    """A user's own with options."""

    def __init__(self, in_channels, out_channels, kernel_size, *, factor=2.0, kernels=1, **geometry):
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        self.factor, self.seen = factor, kernels


class Bank(CONVS["condconv"]):
    name = "bank"


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Conv=Keyword, Bank=Bank, Odd=Scaled, number=3))


def test_a_convolution_of_ones_own_is_made_as_a_conv2d_with_its_options(mine):
    conv = make_conv(
        "mine:Conv", 4, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, kernels=3, factor=5.0
    )
    assert isinstance(conv, Keyword)
    assert (conv.factor, conv.seen, conv.bias) == (5.0, 3, None)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 1), (2, 1), (1, 0), 2)
    assert make_conv("mine:Conv", 4, 8, 3, padding_mode="reflect").padding_mode == "reflect"
    assert options_of("mine:Conv") == {"factor": 2.0, "kernels": 1}


def test_one_with_a_bank_is_dynamic(mine):
    assert is_dynamic("mine:Bank")
    assert not is_dynamic("mine:Conv")
    assert has_kernel_attention("mine:Bank", kernels=2)
    assert make_conv("mine:Bank", 4, 8, 3, kernels=2).kernels == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:number", r"model\.conv = 'mine:number' must be a class that derives from nn\.Module"),
        ("mine:Nothing", r"model\.conv = 'mine:Nothing' can't be imported"),
        ("mine:Odd", r"model\.conv = 'mine:Odd' fails in test_factory\.py, line \d+: TypeError"),
    ],
)
def test_one_that_cannot_be_used_is_named(mine, name, message):
    with pytest.raises(SettingsError, match=message):
        make_conv(name, 4, 8, 3)
