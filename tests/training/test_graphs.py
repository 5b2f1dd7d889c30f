"""Gradients from graphs, with a stand-in for CUDA's on the CPU: it computes the captured work anew, in place."""

import copy

import pytest
import torch
from torch import nn

from fedfmd.conv import record_attention
from fedfmd.models import make_model
from fedfmd.training import LocalSGD, compute_gradients, train
from fedfmd.training.graphs import LAUNCHED, Graphs


class Rerun:
    """Captures passes as CUDA does, for which they are only noted down: the model's buffers stay as they are."""

    def __init__(self, model):
        self.model, self.captured, self.replayed = model, 0, 0

    def __call__(self, passes):
        self.captured += 1
        before = copy.deepcopy(self.model.state_dict())
        passed = passes()
        self.model.load_state_dict(before)

        def replay():
            self.replayed += 1
            for tensor, value in zip(tensors_of(passed), tensors_of(passes()), strict=True):
                tensor.copy_(value)

        return passed, replay


def tensors_of(passed):
    values = [value for layer in passed.attention.values() for value in layer if value is not None]
    return [passed.loss, passed.logits, *passed.gradients.values(), *values]


def network(conv="fmdconv", norm="batch"):
    torch.manual_seed(0)
    return make_model("resnet8", conv, 3, width=0.25, norm=norm)


def trained(model, dataset, compute, steps=9, **how):
    sgd = LocalSGD(0.05, batch_size=8, **how)
    return train(model, dataset.train, dataset, sgd, steps, torch.Generator().manual_seed(0), compute=compute)


@pytest.mark.parametrize("how", [{}, {"clip_norm": 0.1}, {"proximal": 0.5}, {"precision": "bf16"}])
@pytest.mark.parametrize("conv", ["static", "fmdconv", "odconv"])
def test_training_is_the_same(noise, conv, how):
    launched, replayed = network(conv), network(conv)
    rerun = Rerun(replayed)
    expected = trained(launched, noise, compute_gradients, **how)
    assert trained(replayed, noise, Graphs(rerun), **how) == expected
    for name, tensor in launched.state_dict().items():  # running statistics and counters too
        assert torch.equal(tensor, replayed.state_dict()[name]), name
    assert rerun.captured == 2  # one for each shape
    assert rerun.replayed == 9 - 2 * LAUNCHED


def test_a_graph_serves_the_next_client_from_other_weights(noise):
    launched, replayed = network(), network()
    graphs = Graphs(rerun := Rerun(replayed))
    for model, compute in ((launched, compute_gradients), (replayed, graphs)):
        trained(model, noise, compute)
        model.load_state_dict(network().state_dict())
        model.zero_grad()
        trained(model, noise, compute)
    assert all(map(torch.equal, launched.state_dict().values(), replayed.state_dict().values()))
    assert rerun.captured == 2


def test_attentions_of_the_last_steps_are_recorded_once_each(noise, assert_same_attentions):
    recorded = []
    for make in (lambda _: compute_gradients, lambda model: Graphs(Rerun(model))):
        model = network()
        compute = make(model)
        with record_attention(model, last=5) as record:
            trained(model, noise, compute)
        recorded.append(record)
    expected, found = recorded
    assert_same_attentions(found, expected, last=5, rtol=0, atol=0)


def test_parameters_that_take_no_part_have_no_gradient():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x.flatten(1))

    model = Partly()
    graphs, sgd = Graphs(Rerun(model)), LocalSGD(0.1)
    for _ in range(LAUNCHED + 1):
        model.zero_grad()
        graphs(model, sgd, torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))
    assert model.used.weight.grad is not None
    assert model.unused.weight.grad is None


def test_what_cannot_be_captured_names_the_setting():
    def capture(_passes):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.ones(2, 1, 2, 2)
    graphs = Graphs(capture)
    for _ in range(LAUNCHED):
        graphs(model, LocalSGD(0.1), images, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"train\.cuda-graphs = true: .* set it to false \(operation not"):
        graphs(model, LocalSGD(0.1), images, torch.tensor([0, 1]))
