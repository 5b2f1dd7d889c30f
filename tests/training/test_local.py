import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fedfmd.conv import CONVS, record_attention
from fedfmd.cost import count
from fedfmd.data import Dataset, ImageSet, load_dataset
from fedfmd.edge import Workload
from fedfmd.models import make_model
from fedfmd.training import PRECISIONS, Best, Evaluation, LocalSGD, evaluate, learning_rate, train


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
