import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedfmd.conv import CONVS, record_attention
from fedfmd.cost import count
from fedfmd.data import Dataset, ImageSet, load_dataset
from fedfmd.edge import Workload
from fedfmd.models import make_model
from fedfmd.training import (
    MEMORY_FORMATS,
    OPTIMISERS,
    PRECISIONS,
    Best,
    Evaluation,
    LocalSGD,
    evaluate,
    learning_rate,
    scheduled_rate,
    train,
)
from fedfmd.training.local import START


@pytest.fixture
def dataset():
    """20 images of 8 x 8 pixels in 3 classes that differ in brightness: 7, 7 and 6 of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 3
    noise = torch.randint(60, (20, 3, 8, 8), generator=generator)
    images = ImageSet((noise + 90 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
    return Dataset("shades", images, images, 3, ("dark", "grey", "light"), (0.5,) * 3, (0.25,) * 3, "none")


def network(conv="static", norm="group"):
    torch.manual_seed(0)
    return make_model("resnet8", conv, 3, width=0.25, norm=norm)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def run(model, dataset, steps, sgd=None, images=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return train(
        model, images or dataset.train, dataset, sgd or LocalSGD(0.05, batch_size=8), steps, generator
    )


@pytest.mark.parametrize(("steps", "examples"), [(1, 8), (2, 16), (3, 20), (5, 36), (7, 48)])
def test_as_many_steps_are_done_as_planned(dataset, steps, examples):
    plan = Workload(20, batch_size=8, epochs=3, cost=count(network(), 8), payload_bytes=1, upload_bytes=(1,))
    result = run(linear(), dataset, steps)
    assert (result.steps, result.examples) == (steps, examples)
    assert plan.examples(steps, batch_size=8) == examples


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_training_that_goes_on_ends_as_one_that_never_stopped(dataset, stop):
    """Three steps are a pass over the images, so that five are in the second one."""
    sgd = LocalSGD(0.05, batch_size=8)
    how = {"images": dataset.train, "dataset": replace(dataset, augment="crop+flip"), "sgd": sgd, "steps": 6}

    def go_on(model, optimiser, **changes):
        generator = torch.Generator().manual_seed(0)
        return train(model, **how | changes, generator=generator, optimiser=optimiser)

    whole, model = network(), network()
    expected = go_on(whole, sgd.optimiser(whole.parameters()))
    optimiser, tallies = sgd.optimiser(model.parameters()), []
    go_on(model, optimiser, steps=stop, after_step=lambda tally: tallies.append(tally()))
    assert [tally.steps for tally in tallies] == list(range(1, stop + 1))
    assert go_on(model, optimiser, since=tallies[-1]) == expected
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_follows_the_generator_over_a_stop_too(dataset):
    """PyTorch's own generator, from which dropout draws, is elsewhere each time, and stays there."""

    def go_on(model, seed, steps, since=START, after_step=None):
        before = torch.get_rng_state()
        sgd = LocalSGD(0.05, batch_size=8, momentum=0.0)
        train(model, dataset.train, dataset, sgd, steps, seeded(seed), since=since, after_step=after_step)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        return model[2].weight.detach().clone()

    def dropping():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 3))

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    whole = go_on(dropping(), seed=5, steps=4)
    assert torch.equal(go_on(dropping(), seed=5, steps=4), whole)
    stopped, tallies = dropping(), []
    go_on(stopped, seed=5, steps=2, after_step=lambda tally: tallies.append(tally()))
    assert torch.equal(go_on(stopped, seed=5, steps=4, since=tallies[-1]), whole)
    assert not torch.equal(go_on(dropping(), seed=6, steps=4), whole)


@pytest.mark.parametrize("conv", ["static", "fmdconv"])
def test_training_lowers_the_loss(dataset, conv):
    model = network(conv)
    before = evaluate(model, dataset.test, dataset)
    run(model, dataset, steps=60)  # dynamic kernels start slowly; processors differ
    after = evaluate(model, dataset.test, dataset)
    assert after.loss < 0.5 * before.loss
    assert after.accuracy > before.accuracy


def test_a_step_is_sgd_with_weight_decay(dataset):
    model = linear()
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    run(model, dataset, steps=1, sgd=LocalSGD(0.1, weight_decay=0.01, batch_size=20))
    inputs = ((dataset.train.images.float() / 255 - 0.5) / 0.25).flatten(1)
    wrong = torch.softmax(inputs @ weight.T + bias, 1) - nn.functional.one_hot(dataset.train.labels)
    expected = weight - 0.1 * (wrong.T @ inputs / 20 + 0.01 * weight)
    torch.testing.assert_close(model[1].weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_proximal_term_pulls_to_the_start(dataset):
    plain, prox = (
        LocalSGD(0.1, 0.0, weight_decay=0.0, batch_size=20),
        LocalSGD(0.1, 0.0, weight_decay=0.0, batch_size=20, proximal=2.0),
    )
    ways = {}
    for name, sgd in {"plain": plain, "prox": prox}.items():
        model = linear()
        start = model[1].weight.detach().clone()
        run(model, dataset, steps=1, sgd=sgd)
        first = model[1].weight.detach() - start
        again = linear()
        run(again, dataset, steps=2, sgd=sgd)
        ways[name] = first, again[1].weight.detach() - start
    assert torch.equal(ways["plain"][0], ways["prox"][0])  # at the start there is no pull
    # the second step has the same gradient of the loss, and 0.1 · 2 times the first step back
    torch.testing.assert_close(ways["prox"][1], ways["plain"][1] - 0.2 * ways["plain"][0])


def test_loss_and_accuracy_are_means_over_images(dataset):
    model = linear()
    still = LocalSGD(0.0, batch_size=8)  # batches of 8, 8 and 4
    trained, evaluated = run(model, dataset, 3, still), evaluate(model, dataset.train, dataset, batch_size=7)
    assert trained.loss == pytest.approx(evaluated.loss, rel=1e-5)
    assert trained.accuracy == pytest.approx(evaluated.accuracy)


def test_evaluation_by_hand(dataset):
    model = linear()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    result = evaluate(model, dataset.test, dataset)
    assert result.loss == pytest.approx(math.log(3), rel=1e-6)
    assert result.accuracy == pytest.approx(7 / 20)  # argmax of equal logits is class 0
    assert math.isnan(result.kernel_entropy)
    assert math.isnan(result.top5_accuracy)  # three classes


def test_top5_counts_labels_among_the_five_most_probable_classes(dataset):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([6.0, 5, 4, 3, 2, 1, 0])
    images = ImageSet(dataset.test.images, torch.arange(20) % 7)  # five labels of 5 or 6, three of 0
    result = evaluate(model, images, dataset, batch_size=8)
    assert result.top5_accuracy == pytest.approx(15 / 20)
    assert result.accuracy == pytest.approx(3 / 20)


@pytest.mark.parametrize("conv", ["condconv", "dyconv", "odconv", "fmdconv"])
def test_the_entropy_is_a_mean_over_all_images_whatever_the_batches(dataset, conv):
    """The last of the batches has 6 images."""
    model = make_model("resnet8", conv, 3, width=0.25, norm="group", attention_init="kaiming")
    one, many = (evaluate(model, dataset.test, dataset, batch_size=size).kernel_entropy for size in (20, 7))
    assert many == pytest.approx(one, rel=1e-5)
    assert 0 < one < 1


def test_evaluation_holds_the_attentions_of_one_batch(dataset, monkeypatch):
    held = []
    monkeypatch.setattr(
        "fedfmd.training.local.record_attention",
        lambda model, **options: _watched(record_attention(model, **options), held),
    )
    evaluate(network("fmdconv"), dataset.test, dataset, batch_size=5)
    assert max(len(entries) for record in held for entries in record.values.values()) == 1


@contextmanager
def _watched(recording, held):
    with recording as record:
        held.append(record)
        yield record


def test_evaluation_changes_nothing_and_leaves_no_gradients(dataset):
    model = network("fmdconv", norm="batch")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluation = evaluate(model, dataset.test, dataset)
    assert 0 <= evaluation.kernel_entropy <= 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    run(model, dataset, steps=1)  # and the model can still be trained


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("conv", ["static", "fmdconv"])
def test_a_single_image_can_be_trained_on(dataset, conv, norm):
    model = network(conv, norm)
    before = model.fc.weight.detach().clone()
    result = run(model, dataset, steps=2, images=dataset.train.subset(torch.tensor([4])))
    assert (result.steps, result.examples) == (2, 2)
    assert math.isfinite(result.loss)
    assert not torch.equal(model.fc.weight, before)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_the_generator_decides_the_order(dataset):
    weights = []
    for seed in (0, 0, 1):
        model = linear()
        run(model, dataset, steps=3, seed=seed)
        weights.append(model[1].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.2, 0.2, 0.2, 0.2, 0.2]),
        ("cosine", [0.2, 0.2 * (2 + math.sqrt(2)) / 4, 0.1, 0.2 * (2 - math.sqrt(2)) / 4, 0.0]),
        ("step", [0.2, 0.2, 0.02, 0.002, 0.0002]),
    ],
)
def test_learning_rate_over_the_rounds(schedule, rates):
    progress = (0, 0.25, 0.5, 0.75, 1)
    assert [learning_rate(0.2, schedule, p) for p in progress] == pytest.approx(rates)


def test_a_warm_up_rises_in_equal_steps_and_the_schedule_takes_the_rest():
    rates = [scheduled_rate(0.4, "cosine", done, 7, warmup=3) for done in range(7)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.3414213562, 0.2, 0.0585786438])
    without = [scheduled_rate(0.4, "step", done, 10) for done in range(10)]
    assert without == [learning_rate(0.4, "step", done / 10) for done in range(10)]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_optimiser_lowers_the_loss(dataset, name):
    model = network()
    before = evaluate(model, dataset.test, dataset)
    run(model, dataset, 30, LocalSGD(0.05 if name == "sgd" else 0.005, batch_size=8, make=OPTIMISERS[name]))
    assert evaluate(model, dataset.test, dataset).loss < 0.7 * before.loss


def test_adam_takes_momentum_for_beta_1_and_adamw_decays_apart_from_the_gradient(dataset):
    first = {}
    for name in ("adam", "adamw"):
        model = linear()
        start = model[1].weight.detach().clone()
        how = LocalSGD(0.01, 0.5, weight_decay=0.1, batch_size=20, make=OPTIMISERS[name])
        run(model, dataset, 1, how)
        first[name] = start, model[1].weight.detach()
        (group,) = how.optimiser(model.parameters()).param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0.1)
    start, stepped = first["adamw"]
    shrunk = (1 - 0.01 * 0.1) * start
    torch.testing.assert_close((stepped - shrunk).abs(), torch.full_like(start, 0.01), rtol=1e-3, atol=1e-5)
    assert not torch.equal(first["adam"][1], stepped)


@pytest.mark.parametrize(("name", "momentum", "states"), [("sgd", 0.9, 1), ("sgd", 0.0, 0), ("adam", 0.9, 2)])
def test_an_optimiser_keeps_so_many_numbers_for_a_parameter(name, momentum, states):
    assert LocalSGD(0.1, momentum, make=OPTIMISERS[name]).states() == states


@pytest.mark.parametrize("proximal", [0.0, 5.0])
def test_a_long_gradient_is_scaled_down_with_all_that_belongs_to_it(dataset, proximal):
    ways = {}
    for clip in (0.0, 0.01):
        model = linear()
        how = LocalSGD(1.0, 0.0, weight_decay=0.0, batch_size=20, proximal=proximal, clip_norm=clip)
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        run(model, dataset, 1, how)
        ways[clip] = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert ways[0.01].norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(
        ways[0.01] / ways[0.01].norm(), ways[0.0] / ways[0.0].norm(), atol=1e-4, rtol=0
    )
    gentle = LocalSGD(1.0, 0.0, weight_decay=0.0, batch_size=20, clip_norm=1e6)
    model = linear()
    run(model, dataset, 1, gentle)  # a limit that isn't met changes nothing
    torch.testing.assert_close(
        torch.cat([p.detach().flatten() for p in model.parameters()]) - start, ways[0.0], atol=1e-6, rtol=1e-4
    )


def test_a_loss_of_ones_own_is_minimised_and_told(dataset):
    model = linear()
    result = run(
        model, dataset, 1, LocalSGD(0.1, batch_size=20, loss=lambda logits, labels: 0 * logits.sum() + 7)
    )
    assert result.loss == 7
    torch.manual_seed(0)
    assert torch.allclose(model[1].weight, 0.99995 * nn.Linear(192, 3).weight)  # by weight decay alone


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"train\.schedule = 'cosin': must be one of constant, cosine, step"):
        learning_rate(0.1, "cosin", 0)


def test_the_best_is_chosen_by_validation_and_without_it_by_the_test_images():
    def evaluation(accuracy):
        return Evaluation(1.0, accuracy, math.nan)

    first = Best().or_later(evaluation(0.0), evaluation(0.0))
    assert first == Best(0.0, 0.0)  # the first one is better than none
    second = first.or_later(evaluation(0.7), evaluation(0.9))
    third = second.or_later(evaluation(0.8), evaluation(0.85))
    assert second == third == Best(accuracy=0.7, chosen_by=0.9)
    assert third.or_later(evaluation(0.6), evaluation(0.9)) == third  # the earlier one of two
    assert Best(0.7, 0.7).or_later(evaluation(0.8), None) == Best(0.8, 0.8)


@pytest.mark.parametrize("name", MEMORY_FORMATS)
def test_batches_lie_in_memory_as_the_format_says(name):
    digits, seen = load_dataset("digits", image_size=8), []
    model = make_model("resnet8", "static", 10, width=0.25, norm="group")
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run(model, digits, steps=1, sgd=LocalSGD(0.01, memory_format=MEMORY_FORMATS[name]))
    assert [batch.is_contiguous(memory_format=MEMORY_FORMATS[name]) for batch in seen] == [True]


@pytest.mark.parametrize("conv", CONVS)
def test_bf16_ends_where_float32_does(conv):
    digits = load_dataset("digits", image_size=8, augment="none")
    losses = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)
        model = make_model("resnet8", conv, 10, width=0.25, norm="group")
        sgd = LocalSGD(0.01, batch_size=32, precision=precision)
        run(model, digits, steps=50, sgd=sgd)
        losses[precision] = evaluate(model, digits.test, digits).loss
    assert losses["float32"] < 0.9 * math.log(10)
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bf16"] != losses["float32"]
