from importlib import util

import pytest
import torch

from fedfmd.conv import CONVS, make_conv
from fedfmd.errors import SettingsError
from fedfmd.models import make_model
from fedfmd.serving.export import export_onnx, export_program

SIZE = 12


def onnx_function(model, path):
    """The model through an ONNX file and onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(model, SIZE, path)
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def program_function(model, path):
    """The model through a file of torch.export."""
    export_program(model, SIZE, path)
    return torch.export.load(path).module()


def assert_same_for_batches_of_1_and_7(exported, model):
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 7):
        images = torch.rand(batch, 3, SIZE, SIZE, generator=generator)
        torch.testing.assert_close(exported(images), model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [onnx_function, program_function])
@pytest.mark.parametrize("conv", CONVS)
def test_every_convolution_takes_batches_of_any_size(conv, function, tmp_path):
    torch.manual_seed(0)
    layer = make_conv(conv, 3, 8, 3, stride=2, padding=1, kernels=3)
    assert_same_for_batches_of_1_and_7(function(layer, tmp_path / "model.pt2"), layer)


def test_a_whole_network_is_one_file_and_stays_in_training(tmp_path):
    torch.manual_seed(0)
    model = make_model("resnet8", "fmdconv", 5, kernels=3, width=0.5).train()
    exported = onnx_function(model, tmp_path / "model.onnx")
    assert model.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert_same_for_batches_of_1_and_7(exported, model)


def test_a_forced_mixing_does_not_fix_the_batch(tmp_path):
    layer = make_conv("fmdconv", 3, 8, 3, mixing="grouped")
    assert_same_for_batches_of_1_and_7(program_function(layer, tmp_path / "model.pt2"), layer)
    assert layer.mixing == "grouped"


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedfmd.errors.find_spec", lambda name: None if name == "onnx" else util.find_spec(name)
    )
    with pytest.raises(ValueError, match=r"ONNX export needs onnx: pip install 'fedfmd\[export\]'"):
        export_onnx(make_conv("static", 3, 8, 3), SIZE, tmp_path / "model.onnx")


class Branching(torch.nn.Module):
    """Goes a way that depends on the images."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_network_that_cannot_be_captured_is_one_line(tmp_path):
    with pytest.raises(
        SettingsError, match=r"^torch\.export can't capture the network \(.*use --format safetensors$"
    ):
        export_program(Branching(), SIZE, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
