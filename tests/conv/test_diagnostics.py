"""The record of the attention values and the entropy of the mixture."""

import math

import pytest
import torch
from torch import nn

from fedfmd.conv import DyConv2d, FMDConv2d, make_conv, record_attention


def entropy_of(conv, x):
    with record_attention(nn.Sequential(conv)) as record:
        conv(x)
    return record.kernel_entropy()


def dyconv_with_logits(*logits):
    conv = DyConv2d(2, 2, 1, kernels=len(logits), temperature=1.0)
    nn.init.zeros_(conv.attention["kernel"].head.weight)
    conv.attention["kernel"].head.bias.data = torch.tensor(logits)
    return conv


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0), 1.0),  # every kernel alike: inert
        ((99.0, 0.0, 0.0, 0.0), 0.0),  # one kernel wins
        ((0.0, 0.0, -99.0, -99.0), 0.5),  # two of four: ln 2 / ln 4
    ],
)
def test_kernel_entropy_by_hand(logits, expected):
    assert entropy_of(dyconv_with_logits(*logits), torch.randn(3, 2, 4, 4)) == pytest.approx(
        expected, abs=1e-6
    )


def test_condconv_weights_are_normalised_first():
    conv = make_conv("condconv", 2, 2, 1, kernels=4)
    nn.init.zeros_(conv.attention["kernel"].head.weight)  # every weight is sigmoid(0) = 0.5
    assert entropy_of(conv, torch.randn(3, 2, 4, 4)) == pytest.approx(1.0)


def test_layers_and_passes_are_averaged_and_the_record_ends_with_the_block():
    model = nn.Sequential(dyconv_with_logits(0.0, 0.0), dyconv_with_logits(99.0, 0.0))
    with record_attention(model) as record:
        model(torch.randn(3, 2, 4, 4))
        model(torch.randn(1, 2, 4, 4))
    model(torch.randn(3, 2, 4, 4))
    assert {name: len(values) for name, values in record.values.items()} == {"0": 2, "1": 2}
    assert record.kernel_entropy() == pytest.approx(0.5, abs=1e-6)


def test_a_record_may_be_of_the_last_passes_only():
    conv = make_conv("condconv", 2, 2, 1, kernels=4)
    with record_attention(conv, last=2) as record:
        for samples in (1, 2, 3, 4):
            conv(torch.randn(samples, 2, 4, 4))
    assert [len(values.kernel) for values in record.values[""]] == [3, 4]


def test_kernel_information_is_what_the_sample_tells_of_the_kernel():
    uneven = dyconv_with_logits(9.0, 0.0)  # but the same for every sample
    told = dyconv_with_logits(0.0, 0.0)
    told.attention["kernel"].squeeze.weight.data = torch.eye(2)[:1]  # the mean of channel 0 …
    told.attention["kernel"].head.weight.data = torch.tensor([[99.0], [0.0]])  # … turns kernel 0 on
    told.attention["kernel"].head.bias.data = torch.tensor([-50.0, 0.0])
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 2, 4, 4)
    for conv, information in ((uneven, 0.0), (told, 1.0)):
        with record_attention(conv) as record:
            conv(images)
        assert record.kernel_information() == pytest.approx(information, abs=1e-6)


@pytest.mark.parametrize("conv", [FMDConv2d(2, 2, 1, kernels=1), FMDConv2d(2, 2, 1, attentions=("input",))])
def test_without_a_kernel_attention_there_is_no_entropy(conv):
    assert math.isnan(entropy_of(conv, torch.randn(3, 2, 4, 4)))


def test_means_of_the_other_attentions():
    conv = FMDConv2d(2, 3, 1, attentions=("input", "kernel"))
    head = conv.attention["shared"].heads["input"]
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.0, 99.0])
    with record_attention(conv) as record:
        conv(torch.randn(3, 2, 4, 4))
    assert record.mean("input") == pytest.approx(0.75)
    assert math.isnan(record.mean("output"))
