"""Gradients from compiled code; but for one test, a stand-in runs what PyTorch would compile."""

import shutil

import pytest
import torch
from torch import nn

from fedfmd.conv import CONVS, make_conv, record_attention
from fedfmd.training import LocalSGD, compute_gradients, train
from fedfmd.training.compiled import Compiled, inductor_options


class Interpreter:
    """Takes a network's graph as the compiler does, and runs it operation by operation."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def forget_compiled():
    torch.compiler.reset()


def network(conv="fmdconv", **options):
    torch.manual_seed(0)
    return nn.Sequential(
        *(make_conv(conv, 3, 4, 3, padding=1, **options), nn.BatchNorm2d(4), nn.ReLU()),
        *(make_conv(conv, 4, 4, 3, stride=2, **options), nn.Flatten(), nn.Linear(36, 3)),
    )


def trained(model, dataset, compute, **how):
    sgd = LocalSGD(0.05, batch_size=8, **how)
    return train(model, dataset.train, dataset, sgd, 6, torch.Generator().manual_seed(0), compute=compute)


def assert_close(model, other):
    for name, tensor in model.state_dict().items():  # running statistics and counters too
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("conv", CONVS)
def test_training_is_the_same(noise, conv):
    usual, compiled = network(conv), network(conv)
    expected = trained(usual, noise, compute_gradients)
    found = trained(compiled, noise, Compiled(interpreter := Interpreter()))
    assert (found.steps, found.examples, found.accuracy) == (6, 44, expected.accuracy)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_close(usual, compiled)
    assert interpreter.graphs == 1  # none for the smaller batches


@pytest.mark.parametrize("how", [{"clip_norm": 0.1}, {"proximal": 0.5}, {"precision": "bf16"}])
def test_what_else_a_step_does_stays(noise, how):
    usual, compiled = network("static"), network("static")
    trained(usual, noise, compute_gradients, **how)
    trained(compiled, noise, Compiled(Interpreter()), **how)
    assert_close(usual, compiled)


def test_code_serves_the_next_client_from_other_weights(noise):
    usual, compiled = network(), network()
    compute = Compiled(interpreter := Interpreter())
    for model, how in ((usual, compute_gradients), (compiled, compute)):
        for _client in range(2):
            model.load_state_dict(network().state_dict())
            model.zero_grad()
            with record_attention(model, last=2):
                trained(model, noise, how)
    assert_close(usual, compiled)
    assert interpreter.graphs == 1


@pytest.mark.parametrize("mixing", ["grouped", "blocked"])  # one graph, or several around what isn't compiled
def test_attentions_of_the_last_steps_are_recorded_once_each(noise, assert_same_attentions, mixing):
    records = []
    for compute in (compute_gradients, Compiled(Interpreter())):
        model = network(mixing=mixing)
        with record_attention(model, last=4) as record:
            trained(model, noise, compute)
        records.append(record)
    expected, found = records
    assert_same_attentions(found, expected, last=4)


@pytest.mark.parametrize(
    ("conv", "kernels", "folds"),
    [
        ("static", 4, False),
        ("fmdconv", 1, False),
        ("fmdconv", 4, True),
        ("odconv", 1, True),
        ("dyconv", 4, True),
    ],
)
def test_images_stay_as_they_are_where_the_batch_is_folded_into_channels(conv, kernels, folds):
    options = inductor_options(network(conv, kernels=kernels))
    assert options == {"compile_threads": 1} | ({"layout_optimization": False} if folds else {})


def test_a_network_that_cannot_be_compiled_names_the_setting():
    def refuse(_graph, _inputs):
        raise OSError("no compiler")

    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.ones(2, 1, 2, 2)
    with pytest.raises(
        RuntimeError, match=r"train\.torch-compile = true: .* set it to false \(.*no compiler"
    ):
        Compiled(refuse)(model, LocalSGD(0.1, batch_size=2), images, torch.tensor([0, 1]))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_pytorch_compiles_a_network_that_computes_the_same():
    def gradients(compute):
        model, images = network(kernels=1), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        loss, logits = compute(model, LocalSGD(0.1, batch_size=2), images, torch.tensor([0, 1]))
        return [loss, logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    torch.testing.assert_close(gradients(Compiled()), gradients(compute_gradients), rtol=1e-4, atol=1e-6)
