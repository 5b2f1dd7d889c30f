import pytest
import torch
from torch import nn

from fedfmd.conv import CONVS
from fedfmd.data import Dataset, ImageSet
from fedfmd.models import make_model
from fedfmd.training import OPTIMISERS, LocalSGD, train
from fedfmd.training.partial import most_attended, rotated, rotation, trained_parameters

DYNAMIC = sorted(CONVS.keys() - {"static"})


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(24) % 3)
    return Dataset("noise", images, images, 3, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, "none")


def make(conv):
    torch.manual_seed(0)
    return make_model("resnet8", conv, 3, kernels=4, width=0.25, norm="group")


def run(model, dataset, parameters, steps=3, **how):
    sgd = LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.1, batch_size=8, **how)
    generator = torch.Generator().manual_seed(1)
    train(model, dataset.train, dataset, sgd, steps, generator, "cpu", sgd.optimiser(parameters))


@pytest.mark.parametrize(
    ("first", "count", "places"),
    [(0, 2, (0, 1)), (3, 2, (3, 0)), (5, 3, (1, 2, 3)), (2, 4, (2, 3, 0, 1)), (2, 6, (2, 3, 0, 1))],
)
def test_a_rotation_goes_round(first, count, places):
    assert rotation(first, count, 4) == places


@pytest.mark.parametrize(
    ("conv", "how"),
    [
        *((conv, {}) for conv in DYNAMIC),
        ("fmdconv", {"make": OPTIMISERS["adamw"], "clip_norm": 1.0, "proximal": 0.1}),
    ],
)
def test_frozen_kernels_stay_bit_for_bit_and_all_else_learns(conv, how, dataset):
    model = make(conv)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with trained_parameters(model, rotated(model, first=3, count=2)) as parameters:
        run(model, dataset, parameters, **how)
    for name, value in model.named_parameters():
        if name.endswith("bank"):
            changed = [not torch.equal(value[k], before[name][k]) for k in range(4)]
            assert changed == [True, False, False, True], name
        else:
            assert not torch.equal(value, before[name]), name


def test_the_first_step_of_a_trained_kernel_is_that_of_training_all(dataset):
    whole, part = make("fmdconv"), make("fmdconv")
    run(whole, dataset, whole.parameters(), steps=1)
    with trained_parameters(part, rotated(part, first=1, count=1)) as parameters:
        run(part, dataset, parameters, steps=1)
    ours, theirs = dict(part.named_parameters()), dict(whole.named_parameters())
    for name in ours:
        kernels = slice(1, 2) if name.endswith("bank") else slice(None)
        torch.testing.assert_close(ours[name][kernels], theirs[name][kernels], rtol=0, atol=0)


def test_frozen_kernels_have_no_momentum(dataset):
    model = make("fmdconv")
    with trained_parameters(model, rotated(model, first=0, count=1)) as parameters:
        held = sum(parameter.numel() for parameter in parameters)
    banks = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bank"))
    assert held == sum(p.numel() for p in model.parameters()) - 3 * banks // 4


def test_afterwards_the_banks_learn_as_before(dataset):
    model = make("fmdconv")
    with trained_parameters(model, rotated(model, first=0, count=1)) as parameters:
        run(model, dataset, parameters)
    bank = model.layer1[0].conv1.bank
    before = bank.detach().clone()
    run(model, dataset, model.parameters())
    assert all(not torch.equal(kernel, old) for kernel, old in zip(bank, before, strict=True))


@pytest.mark.parametrize("conv", ["static", "fmdconv"])
def test_where_nothing_is_frozen_the_parameters_are_the_models(conv):
    model = make(conv)
    with trained_parameters(model, rotated(model, first=1, count=4)) as parameters:
        assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("conv", DYNAMIC)
def test_the_most_attended_kernels_are_those_with_the_largest_weights(conv, dataset):
    """A bias of 9 on one kernel and of 5 on another, different ones in every layer, outweighs every image."""
    model, expected = make(conv), {}
    for place, (name, layer) in enumerate(
        (name, layer) for name, layer in model.named_modules() if hasattr(layer, "bank")
    ):
        head = next(
            module
            for path, module in layer.attention.named_modules()
            if isinstance(module, nn.Linear) and path in ("kernel.head", "shared.heads.kernel")
        )
        nn.init.zeros_(head.weight)
        with torch.no_grad():
            head.bias.copy_(torch.tensor([9.0, 5.0, 0.0, 0.0]).roll(place))
        expected[name] = (place % 4, (place + 1) % 4)
    assert most_attended(model, dataset.train, dataset, count=2) == expected
