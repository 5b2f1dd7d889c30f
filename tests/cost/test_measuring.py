import pytest
import torch
from torch import nn

from fedfmd.cost import latency, measuring


class Recorder(nn.Conv2d):
    calls: list = []  # noqa: RUF012  (shared with the copy that is measured)

    def forward(self, images):
        self.calls.append((images.shape, self.training, torch.is_inference_mode_enabled()))
        return super().forward(images)


def test_runs_batches_in_evaluation_mode_and_leaves_the_model_and_the_random_numbers_alone():
    model = Recorder(3, 1, 1).train()
    before = torch.get_rng_state()

    assert latency(model, 5, batch=2, repeats=4) > 0

    assert Recorder.calls == [((2, 3, 5, 5), False, True)] * (measuring.WARM_UP + 4)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_is_the_median_after_warm_up_for_one_image(monkeypatch):
    durations = iter([60.0] * measuring.WARM_UP + [8.0, 90.0, 6.0])
    monkeypatch.setattr(measuring, "_seconds", lambda *_: next(durations))
    assert latency(nn.Conv2d(3, 1, 1), 5, batch=4, repeats=3) == 2.0


@pytest.mark.parametrize("name", ["image_size", "batch", "repeats"])
def test_needs_something_to_measure(name):
    with pytest.raises(ValueError, match=f"{name} = 0 must be at least 1"):
        latency(nn.Conv2d(3, 1, 1), **{"image_size": 5, name: 0})
