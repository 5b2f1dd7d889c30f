import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fedfmd.conv import CONVS, MIXINGS, FMDConv2d, ODConv2d
from fedfmd.cost import Cost, count, frozen_bytes, training_flops, training_memory
from fedfmd.models import make_model


def imagenet(arch, conv, kernels):
    with torch.device("meta"):  # counting needs shapes only
        return make_model(arch, conv, 1000, kernels=kernels, stem="imagenet")


# The published counts; those of ODConv follow other conventions for MACs and are checked below.
@pytest.mark.parametrize(
    ("arch", "conv", "kernels", "params", "macs"),
    [
        ("resnet18", "static", 1, 11_689_512, 1.8141e9),
        ("resnet18", "odconv", 1, 11_943_944, None),
        ("resnet18", "odconv", 4, 44_901_640, None),
        ("resnet18", "fmdconv", 1, 12_232_824, 1.8256e9),
        ("resnet18", "fmdconv", 2, 23_223_016, None),
        ("resnet18", "fmdconv", 4, 45_203_400, 1.8586e9),
        ("resnet18", "fmdconv", 8, 89_164_168, 1.9025e9),
        ("resnet50", "static", 1, 25_557_032, 4.0892e9),
        ("resnet50", "odconv", 1, 28_635_112, None),
        ("resnet50", "odconv", 4, 90_670_888, None),
        ("resnet50", "fmdconv", 1, 33_291_896, None),
        ("resnet50", "fmdconv", 2, 53_996_424, None),
        ("resnet50", "fmdconv", 4, 95_405_480, 4.1797e9),
        ("resnet50", "fmdconv", 8, 178_223_592, None),
        ("mobilenetv2", "static", 1, 3_504_872, 300.8e6),
        ("mobilenetv2", "odconv", 1, 4_940_185, None),  # published: 4.94 M and 11.51 M
        ("mobilenetv2", "odconv", 4, 11_512_149, None),
    ],
)
def test_published_counts(arch, conv, kernels, params, macs):
    cost = count(imagenet(arch, conv, kernels), 224)
    assert cost.params == params
    if macs:
        assert cost.macs == pytest.approx(macs, rel=1e-4)


@pytest.mark.parametrize(("kernels", "published"), [(1, 1.838e9), (4, 1.916e9)])
def test_odconv_counts_are_below_the_published_ones_by_less_than_a_percent(kernels, published):
    assert 0.99 * published < count(imagenet("resnet18", "odconv", kernels), 224).macs < published


# Images of 8×8; hidden = 16 in the shared squeeze and ⌊4 / 4⌋ + 1 = 2 in that of the kernels.
@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), {"convolution": 6 * 16 * 1 * 9}),
        (
            FMDConv2d(3, 6, 3, padding=1, groups=3, kernels=4),
            {
                "convolution": 6 * 64 * 1 * 9,
                "attention": 3 * 16 + 16 * 3 + 16 * 6 + 3 * 4 + 4 * 4,
                "aggregation": 4 * 6 * 1 * 9,
            },
        ),
        (
            FMDConv2d(3, 6, 3, kernels=4, attentions=("input",)),
            {"convolution": 6 * 36 * 3 * 9, "attention": 3 * 16 + 16 * 3},
        ),
        (
            ODConv2d(3, 6, 3, kernels=4),
            {
                "convolution": 6 * 36 * 3 * 9,
                "attention": 3 * 16 + 16 * (3 + 6 + 9 + 4),
                "aggregation": 2 * 4 * 6 * 3 * 9,
            },
        ),
        (
            nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.Flatten(), nn.Linear(15, 2)),
            {"linear": 3 * 64 * 5 + 15 * 2},
        ),
    ],
    ids=["static", "fmdconv", "fmdconv without mixture", "odconv", "linear"],
)
def test_macs_of_one_layer_by_hand(layer, macs):
    counted = count(layer, 8).macs_by_kind
    assert {kind: value for kind, value in counted.items() if value} == macs


@pytest.mark.parametrize("conv", sorted(set(CONVS) - {"static"}))
def test_the_mixing_changes_nothing(conv):
    costs = [count(make_model("resnet8", conv, 10, mixing=mixing), 32) for mixing in ("auto", *MIXINGS)]
    assert all(cost == costs[0] for cost in costs)


def test_the_model_stays_as_it_is():
    model = make_model("resnet8", "fmdconv", 10).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    count(model, 32)

    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_flops_and_bytes_follow_from_the_counts():
    cost = Cost(params=10, bytes=44, macs_by_kind={"convolution": 5, "linear": 2}, activation_bytes=100)
    assert (cost.macs, cost.flops, cost.train_flops, cost.param_bytes) == (7, 14, 42, 40)
    assert training_memory(cost, batch=8) == 3 * 40 + 8 * 100


def test_frozen_kernels_save_their_gradient_and_momentum_but_few_flops():
    """Three kernels, each of 10 of the 100 parameters; 20 of a pass's 1000 MACs go into each one's gradient."""
    macs = {"convolution": 940, "aggregation": 60}
    cost = Cost(100, 400, macs, activation_bytes=50, kernels=3, kernel_params=10, kernel_gradient_macs=20)
    assert [frozen_bytes(cost, kernels) for kernels in (3, 2, 1)] == [0, 40, 80]
    assert [training_flops(cost, kernels) for kernels in (3, 2, 1)] == [6000, 5960, 5920]
    assert [training_memory(cost, 2, kernels) for kernels in (3, 2, 1)] == [1300, 1220, 1140]
    assert training_memory(cost, 2) == 1300


@pytest.mark.parametrize(
    ("layer", "params", "gradient_macs"),
    [
        (nn.Conv2d(3, 6, 3), 0, 0),
        (FMDConv2d(3, 6, 3, kernels=4), 6 * 3 * 9 + 6, 6 * 3 * 9),
        (FMDConv2d(3, 6, 3, kernels=4, bias=False, attentions=("input",)), 6 * 3 * 9, 0),
        (ODConv2d(3, 6, 3, kernels=4, bias=False), 6 * 3 * 9, 6 * 3 * 9),
    ],
    ids=["static", "fmdconv", "fmdconv without mixture", "odconv"],
)
def test_what_one_kernel_of_every_bank_adds(layer, params, gradient_macs):
    cost = count(layer, 8)
    assert cost.kernels == (1 if isinstance(layer, nn.Conv2d) else 4)
    assert (cost.kernel_params, cost.kernel_gradient_macs) == (params, gradient_macs)


def test_bytes_are_those_of_the_state_dict():
    assert count(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), 4).bytes == 4 * (6 + 2 + 4 * 2) + 8


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "mobilenetv2"])
def test_activations_are_what_autograd_keeps(arch, norm):
    model = make_model(arch, "static", 10, norm=norm)
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.rand(4, 3, 32, 32))
    assert logits.requires_grad
    assert 4 * count(model, 32).activation_bytes == pytest.approx(sum(kept.values()), rel=0.06)


class Raw(nn.Module):
    """A layer of one's own: its own 3 × 3 kernel, and an attention of a linear layer."""

    def __init__(self, with_attention):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.attention = nn.Linear(3, 6) if with_attention else None

    def forward(self, x):
        y = nn.functional.conv2d(x, self.weight, padding=1)
        return y if self.attention is None else y * self.attention(x.mean((2, 3)))[..., None, None]


@pytest.mark.parametrize("with_attention", [False, True])
def test_a_layer_of_ones_own_counts_by_what_it_does(with_attention):
    model = nn.Sequential(Raw(with_attention), nn.Conv2d(6, 2, 1))
    cost = count(model, 8)
    kinds = {kind: macs for kind, macs in cost.macs_by_kind.items() if macs}
    assert kinds == {"convolution": 2 * 64 * 6, "other": 6 * 64 * 27} | (
        {"linear": 18} if with_attention else {}
    )
    assert cost.activation_bytes == 4 * (6 * 64 + 2 * 64 + (6 if with_attention else 0))
    assert "other" not in count(nn.Conv2d(3, 2, 1), 8).macs_by_kind


def test_an_optimiser_with_more_states_holds_more():
    cost = Cost(100, 400, {"convolution": 1}, activation_bytes=50, kernels=3, kernel_params=10)
    assert [training_memory(cost, 2, states=states) for states in (0, 1, 2)] == [900, 1300, 1700]
    assert training_memory(cost, 2, kernels=1, states=2) == 1700 - 3 * 80


def test_an_image_has_pixels():
    with pytest.raises(ValueError, match="image_size = 0 must be at least 1"):
        count(nn.Conv2d(3, 1, 1), 0)


class Looking(nn.Module):
    """Looks at the values of its features, as no network on the meta device can, and names its layers' inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        features = self.conv(input=x)
        scale = 1.0 if features.mean().item() > 0 else 2.0
        return self.head(scale * features.mean((2, 3)))


def test_a_network_that_looks_at_values_is_counted_too():
    assert count(Looking(), 8).macs_by_kind == {
        "convolution": 8 * 8 * 8 * 3 * 9,
        "linear": 80,
        "attention": 0,
        "aggregation": 0,
    }
