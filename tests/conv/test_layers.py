"""The operators as layers: the published equations, and what a layer has to survive."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedfmd.conv import CONVS, CondConv2d, DyConv2d, FMDConv2d, ODConv2d, dynamic_layers, make_conv
from fedfmd.conv.layers import bank_names
from fedfmd.conv.mixing import EARLIER_NAMES
from fedfmd.settings import Settings

DYNAMIC = [name for name in CONVS if name != "static"]


def layer(name, **options):
    torch.manual_seed(0)
    conv = make_conv(name, 8, 12, 3, stride=2, padding=1, **options)
    for parameter in conv.parameters():  # biases too, which start at zero
        nn.init.normal_(parameter, std=0.3)
    return conv


def images(batch=3):
    return torch.randn(batch, 8, 7, 6, generator=torch.Generator().manual_seed(1))


def convolve_each(x, kernels, biases, **geometry):
    return torch.cat([F.conv2d(x[b : b + 1], kernels[b], biases[b], **geometry) for b in range(len(x))])


def test_fmdconv_is_the_published_equation():
    conv, x = layer("fmdconv", temperature=3.0).eval(), images()
    pooled, shared, kernel = x.mean((2, 3)), conv.attention["shared"], conv.attention["kernel"]
    z = F.relu(shared.norm(pooled @ shared.squeeze.weight.t()))
    a_in, a_out = torch.sigmoid(shared.heads["input"](z)), torch.sigmoid(shared.heads["output"](z))
    pi = F.softmax(kernel.head(F.relu(pooled @ kernel.squeeze.weight.t())) / 3.0, dim=1)
    kernels, biases = torch.einsum("bk,koihw->boihw", pi, conv.bank), pi @ conv.bias_bank
    expected = a_out[:, :, None, None] * convolve_each(
        x * a_in[:, :, None, None], kernels, biases, stride=2, padding=1
    )
    torch.testing.assert_close(conv(x), expected)


def test_the_temperature_also_softens_fmdconvs_sigmoids_where_they_are_annealed():
    conv, x = layer("fmdconv", temperature=4.0, annealed=True).eval(), images()
    shared = conv.attention["shared"]
    logits = shared.heads["input"](F.relu(shared.norm(shared.squeeze(x.mean((2, 3))))))
    annealed = conv.attention(x, conv.temperature)
    torch.testing.assert_close(annealed.input, torch.sigmoid(logits / 4))
    plain = layer("fmdconv", temperature=4.0).eval().attention(x, conv.temperature)
    assert torch.equal(plain.kernel, annealed.kernel)
    assert (plain.input - 0.5).abs().mean() > 2 * (annealed.input - 0.5).abs().mean()


def test_condconv_is_the_published_equation():
    conv, x = layer("condconv", bias=True), images()
    r = torch.sigmoid(conv.attention["kernel"].head(x.mean((2, 3))))
    kernels, biases = torch.einsum("bk,koihw->boihw", r, conv.bank), r @ conv.bias_bank
    torch.testing.assert_close(conv(x), convolve_each(x, kernels, biases, stride=2, padding=1))


def test_odconv_attends_to_the_taps_of_the_kernel():
    conv, x = layer("odconv", temperature=2.0).eval(), images()
    attention = conv.attention(x, conv.temperature)
    taps = attention.spatial.view(3, 1, 1, 3, 3)
    kernels = torch.einsum("bk,koihw->boihw", attention.kernel, conv.bank) * taps
    scaled = x * attention.input[:, :, None, None]
    expected = attention.output[:, :, None, None] * convolve_each(
        scaled, kernels, torch.zeros(3, 12), stride=2, padding=1
    )
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_at_the_start_every_sample_is_treated_alike(name):
    torch.manual_seed(0)
    attention = make_conv(name, 8, 12, 3).attention(images(), torch.tensor(3.0))
    for values in attention:
        if values is not None:
            assert values.unique().numel() == 1, "the same for all samples, channels and kernels"
    scales = [scale for scale in (attention.input, attention.output, attention.spatial) if scale is not None]
    assert all(scale.unique() == 0.5 for scale in scales)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_published_start_draws_kernels_and_attentions_in_order(name):
    conv = make_conv(name, 8, 12, 3, attention_init="kaiming")
    torch.manual_seed(1)
    conv.reset_parameters()
    torch.manual_seed(1)
    weights = [*conv.bank, *(m.weight for m in conv.attention.modules() if isinstance(m, nn.Linear))]
    for weight in weights:
        expected = nn.init.kaiming_normal_(torch.empty_like(weight), mode="fan_out", nonlinearity="relu")
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_starts_differ_in_the_last_layers_alone(name):
    layers = {}
    for start in ("neutral", "kaiming"):
        torch.manual_seed(0)
        layers[start] = make_conv(name, 8, 12, 3, attention_init=start)
    last = {id(m.weight) for branch in layers["neutral"].attention.values() for m in branch.last_layers}
    for (key, neutral), kaiming in zip(
        layers["neutral"].named_parameters(), layers["kaiming"].parameters(), strict=True
    ):
        assert torch.equal(neutral, torch.zeros_like(kaiming) if id(neutral) in last else kaiming), key


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="attention_init = 'zero' is unknown; use one of neutral, kaiming"):
        FMDConv2d(8, 12, 3, attention_init="zero")


@pytest.mark.parametrize(
    ("channels", "out_channels", "hidden"), [(64, 64, (16, 17)), (512, 512, (32, 129)), (3, 16, (16, 4))]
)
def test_hidden_sizes_follow_the_published_rules(channels, out_channels, hidden):
    attention = FMDConv2d(channels, out_channels, 3).attention
    assert (attention["shared"].squeeze.out_features, attention["kernel"].squeeze.out_features) == hidden


def test_attentions_that_do_not_apply_are_left_out():
    assert set(ODConv2d(8, 12, 1).attention["shared"].heads) == {"input", "output", "kernel"}
    assert set(ODConv2d(8, 8, 3, groups=8).attention["shared"].heads) == {"input", "spatial", "kernel"}
    assert set(ODConv2d(8, 12, 3, kernels=1).attention["shared"].heads) == {"input", "output", "spatial"}
    assert set(FMDConv2d(8, 8, 3, groups=8).attention["shared"].heads) == {"input"}


@pytest.mark.parametrize(
    "attentions", [("input",), ("kernel",), ("output",), ("input", "output"), ("kernel", "output")]
)
def test_fmdconv_takes_any_subset_of_its_attentions(attentions):
    conv = layer("fmdconv", attentions=attentions)
    values = conv.attention(images(), conv.temperature)
    assert {name for name in ("input", "output", "kernel") if getattr(values, name) is not None} == set(
        attentions
    )
    assert conv(images()).shape == (3, 12, 4, 3)


def test_fmdconv_without_kernel_attention_averages_the_kernels():
    conv, x = layer("fmdconv", attentions=("input",)), images()
    a_in = conv.attention(x, conv.temperature).input[:, :, None, None]
    expected = F.conv2d(x * a_in, conv.bank.mean(0), conv.bias_bank.mean(0), stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_kernel_needs_no_mixture(name, monkeypatch):
    conv, x = layer(name, kernels=1, bias=True).eval(), images()
    if name != "odconv":  # whose spatial attention changes the kernel of each sample
        monkeypatch.setattr(
            "fedfmd.conv.mixing.choose_mixing", lambda *_: pytest.fail("mixed a single kernel")
        )
    values = conv.attention(x, conv.temperature)
    scaled = x if values.input is None else x * values.input[:, :, None, None]
    kernels = conv.bank.expand(3, -1, -1, -1, -1)
    if values.spatial is not None:
        kernels = kernels * values.spatial.view(3, 1, 1, 3, 3)
    expected = convolve_each(scaled, kernels, conv.bias_bank.expand(3, -1), stride=2, padding=1)
    for factor in (values.output, values.kernel):
        expected = expected if factor is None else expected * factor[:, :, None, None]
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_every_parameter_gets_a_gradient(name):
    conv = layer(name)
    conv(images()).square().sum().backward()
    assert [n for n, p in conv.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["odconv", "fmdconv"])
def test_a_training_batch_of_one_sample(name, norm):
    conv = layer(name, norm=norm).train()
    conv(images(4))  # which does say something about the statistics
    before = copy.deepcopy(conv.state_dict())
    conv(images(1)).sum().backward()
    assert torch.isfinite(conv.bank.grad).all()
    torch.testing.assert_close(conv.state_dict(), before)  # one sample says nothing about the statistics
    torch.testing.assert_close(conv(images(1)), conv.eval()(images(1)))


@pytest.mark.parametrize("name", DYNAMIC)
def test_channels_last(name):
    conv, x = layer(name), images()
    expected = conv(x)
    conv = conv.to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_autocast_rounds_images_and_mixed_kernels_only(name):
    conv, x = layer(name), images()
    expected = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        attention = conv.attention(x, conv.temperature)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max())
    )
    y.float().sum().backward()
    assert conv.bank.grad.dtype == torch.float32
    assert attention.kernel.shape == (3, 4)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_layer_in_float16_pools_large_images(name):
    """40,000 numbers above 1 sum up to more than the largest of float16, 65,504."""
    conv = layer(name).half().eval()
    shape = images().shape
    assert conv(torch.full((1, shape[1], 200, 200), 2.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_layer_in_bfloat16(name):
    conv = layer(name).bfloat16()
    assert conv(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", DYNAMIC)
def test_copies_and_state_dicts_carry_everything(name):
    conv = layer(name).eval()
    other = make_conv(name, 8, 12, 3, stride=2, padding=1)
    if conv.temperature is not None:
        conv.temperature.fill_(5.0)
        assert conv.state_dict()["temperature"].shape == ()
    other.load_state_dict(conv.state_dict())
    for twin in (other.eval(), copy.deepcopy(conv)):
        torch.testing.assert_close(twin(images()), conv(images()))


@pytest.mark.parametrize("name", DYNAMIC)
def test_shapes_on_the_meta_device(name):
    with torch.device("meta"):
        assert make_conv(name, 8, 12, 3, padding=1)(torch.empty(5, 8, 6, 6)).shape == (5, 12, 6, 6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_traced_layer_takes_batches_of_any_size(name):
    conv = layer(name).eval()
    traced = torch.jit.trace(conv, images())
    more = torch.cat([images(), images()])
    torch.testing.assert_close(traced(more), conv(more))


PADDINGS = [
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": (2, 4), "dilation": (3, 1), "padding": "same"},  # one pixel more after than before
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate", "stride": 2},
    {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("geometry", PADDINGS)
def test_images_are_padded_as_by_a_static_convolution(name, geometry):
    """A layer whose kernels are all the same and whose attentions start neutral is a static one times a number."""
    torch.manual_seed(0)
    static = nn.Conv2d(8, 12, bias=False, **geometry)
    conv = make_conv(name, 8, 12, bias=False, kernels=2, **geometry).eval()
    with torch.no_grad():
        conv.bank[:] = static.weight
        y, expected = conv(images()), static(images())
        scale = (y * expected).sum() / expected.square().sum()
    torch.testing.assert_close(y, scale * expected, rtol=1e-3, atol=1e-4)
    assert (conv.padding, conv.padding_mode) == (static.padding, static.padding_mode)


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_image_without_a_batch(name):
    conv = layer(name).eval()
    torch.testing.assert_close(conv(images()[0]), conv(images()[:1])[0])


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_empty_batch(name):
    conv = layer(name)
    y = conv(images()[:0])
    assert y.shape == (0, *conv(images()).shape[1:])
    y.sum().backward()
    assert not conv.bank.grad.any()


@pytest.mark.parametrize("shape", [(2, 7, 9, 9), (8, 9), (7, 9, 9)])
@pytest.mark.parametrize("name", DYNAMIC)
def test_what_is_no_image_of_the_layers_channels_is_refused(name, shape):
    with pytest.raises(RuntimeError, match=r"but takes B × 8 × H × W, or one image$"):
        layer(name)(torch.zeros(shape))


@pytest.mark.parametrize("mixing", ["auto", "blocked"])
def test_a_compiled_layer(mixing):
    conv, x = layer("fmdconv", mixing=mixing).eval(), images()
    torch.testing.assert_close(torch.compile(conv, backend="eager")(x), conv(x))


@pytest.mark.parametrize(("earlier", "name"), EARLIER_NAMES.items())
def test_a_way_of_mixing_may_be_called_as_in_fedfmd_0_1(earlier, name):
    assert layer("fmdconv", mixing=earlier).mixing == name
    assert Settings.from_mapping({"model.mixing": earlier}) == Settings.from_mapping({"model.mixing": name})


@pytest.mark.parametrize("name", ["odconv", "fmdconv"])
def test_export_leaves_the_batch_size_free(name):
    conv = layer(name).eval()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(conv, (images(2),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        torch.testing.assert_close(exported(images(size)), conv(images(size)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": -1}, "kernels = -1 must be at least 1"),
        ({"groups": 3}, "groups = 3 must divide in_channels = 8 and out_channels = 12"),
        ({"padding": "full"}, "padding = 'full' is unknown; give numbers of pixels, 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, "padding = 'same' keeps the size, and stride"),
        ({"padding_mode": "mirror"}, "padding_mode = 'mirror' is unknown; use one of zeros, reflect"),
        ({"mixing": "magic"}, "mixing = 'magic' is unknown; use auto or one of grouped"),
        ({"temperature": 0.0}, "temperature = 0.0 "),
        ({"attentions": ()}, r"attentions = \(\) must be a non-empty subset of input, kernel, output"),
        ({"attentions": ("spatial",)}, "must be a non-empty subset"),
        ({"norm": "layer"}, "norm = 'layer' is unknown; use one of batch, group"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FMDConv2d(8, 12, 3, **options)


def test_representation_mirrors_conv2d():
    text = repr(DyConv2d(4, 6, 3, stride=2, bias=False))
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2)" in text
    assert "bias=False, kernels=4" in text
    assert CondConv2d(4, 6, 3).temperature is None


@pytest.mark.parametrize(
    ("name", "options", "attentions"),
    [
        ("condconv", {}, {"kernel"}),
        ("dyconv", {}, {"kernel"}),
        ("odconv", {}, {"input", "output", "spatial", "kernel"}),
        ("odconv", {"kernels": 1}, {"input", "output", "spatial"}),
        ("fmdconv", {}, {"input", "output", "kernel"}),
        ("fmdconv", {"attentions": ("output",)}, {"output"}),
    ],
)
def test_a_layer_tells_its_attentions(name, options, attentions):
    conv = make_conv(name, 8, 12, 3, **options)
    assert conv.attentions == attentions
    assert conv.has_kernel_attention is ("kernel" in attentions)
    values = conv.attention(images(), conv.temperature)._asdict()
    assert {name for name, value in values.items() if value is not None} == attentions


def test_a_layer_tells_what_its_attentions_and_its_mixture_cost():
    conv = make_conv("odconv", 8, 12, 3, kernels=4)
    hidden, bank = 16, 4 * 12 * 8 * 9
    assert conv.attention_macs == 8 * hidden + hidden * (8 + 12 + 9 + 4)
    assert conv.aggregation_macs == 2 * bank
    assert conv.kernel_params == bank // 4
    assert make_conv("fmdconv", 8, 12, 3, bias=True).kernel_params == bank // 4 + 12


def test_dynamic_layers_and_their_banks_are_found_by_type():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(make_conv("dyconv", 8, 8, 3, bias=False)))
    assert list(dynamic_layers(model)) == ["1.0"]
    assert bank_names(model) & model.state_dict().keys() == {"1.0.bank"}
    assert bank_names(model[1][0]) >= {"bank"}
