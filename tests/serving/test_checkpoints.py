import json

import pytest
import torch

from fedfmd.build import build_model
from fedfmd.errors import SettingsError
from fedfmd.experiment import export_checkpoint, trained_model
from fedfmd.runs import save_checkpoint, save_tensors
from fedfmd.serving.classifier import load_classifier


@pytest.fixture
def checkpoint(tiny_settings, tmp_path):
    """The file of a model that differs from the initial one of its settings."""
    settings = tiny_settings()
    model = build_model(settings, classes=10)
    with torch.no_grad():
        model.fc.bias.fill_(3.0)
    save_checkpoint(tmp_path, 7, model.state_dict(), {}, settings.flat(), class_names=[*"0123456789"])
    return tmp_path / "round-00007.safetensors"


def test_a_checkpoint_is_the_model_and_its_settings(checkpoint, tiny_settings):
    model, settings = trained_model(checkpoint)
    assert settings == tiny_settings()
    assert model.fc.bias.tolist() == [3.0] * 10


@pytest.mark.parametrize("classes", [3, 10])
def test_a_file_made_before_there_was_a_version_is_the_model_too(tiny_settings, tmp_path, classes):
    settings = tiny_settings()
    state = build_model(settings, classes).state_dict()
    save_tensors(tmp_path / "old.safetensors", state, {"settings": json.dumps(settings.flat())})
    model, told = trained_model(tmp_path / "old.safetensors")
    assert told == settings
    assert torch.equal(model.state_dict()["fc.weight"], state["fc.weight"])


def test_classes_follow_from_the_header_whatever_the_weights_are_called(checkpoint, monkeypatch):
    monkeypatch.setattr("fedfmd.serving.checkpoints._classes_by_shape", lambda arrays: 0)
    assert trained_model(checkpoint)[0].fc.out_features == 10


def test_an_export_lies_beside_the_checkpoint_and_gives_the_same_logits(checkpoint):
    path = export_checkpoint(checkpoint, "torch-export", None, None)
    assert path == checkpoint.with_suffix(".pt2")
    model, _ = trained_model(checkpoint)
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.export.load(path).module()(images), model.eval()(images))


def test_a_classifier_is_a_file_of_its_own_beside_the_checkpoint(checkpoint):
    path = export_checkpoint(checkpoint, "safetensors", None, None)
    assert path.name == "round-00007.model.safetensors"
    classifier = load_classifier(path)
    assert classifier.images.class_names == tuple("0123456789")
    assert classifier.images.image_size == 8
    assert classifier.model.fc.bias.tolist() == [3.0] * 10
    trained_model(checkpoint)


@pytest.mark.parametrize(("image_size", "expected"), [(None, 8), (12, 12)])
def test_an_export_is_for_the_runs_images_or_another_size(
    image_size, expected, checkpoint, tmp_path, monkeypatch
):
    sizes = []
    monkeypatch.setitem(
        export_checkpoint.__globals__["EXPORTS"],
        "onnx",
        (lambda model, size, path: sizes.append((size, path)), ".onnx"),
    )
    out = tmp_path / "new" / "model.onnx"
    assert export_checkpoint(checkpoint, "onnx", out, image_size) == out
    assert sizes == [(expected, out)]
    assert out.parent.is_dir()


def test_an_export_for_images_that_the_model_does_not_take_is_refused(checkpoint, monkeypatch):
    module = "fedfmd.serving.checkpoints"
    fixed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    monkeypatch.setattr(f"{module}.trained_model", lambda path: (fixed, trained_model(path)[1]))
    with pytest.raises(
        SettingsError, match="--image-size = 12: the model fails on such images: RuntimeError: mat1"
    ):
        export_checkpoint(checkpoint, "torch-export", None, 12)


def test_the_file_that_is_named_of_a_folder_is_a_models(checkpoint, tmp_path):
    state = checkpoint.with_suffix(".state.safetensors")
    state.write_bytes(b"")
    with pytest.raises(SettingsError, match=rf"{checkpoint.name}$"):
        trained_model(tmp_path)


def test_what_is_no_checkpoint_is_one_line(checkpoint, tmp_path, tiny_settings):
    def refused(path, message):
        with pytest.raises(SettingsError, match=message) as error:
            trained_model(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none.safetensors", r"cannot read the checkpoint: .*none\.safetensors")
    refused(tmp_path, rf"cannot read the checkpoint: {tmp_path} is a folder: name one .*{checkpoint.name}$")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty is a folder$")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    refused(checkpoint, r"round-00007\.safetensors is not as the run wrote it")
    checkpoint.with_suffix(".json").unlink()  # a file of its own
    refused(checkpoint, "is damaged")
    save_checkpoint(tmp_path, 8, {"mean": torch.zeros(1)}, {}, tiny_settings().flat())
    refused(tmp_path / "round-00008.safetensors", "holds no model of a run")
    save_checkpoint(tmp_path, 8, {"fc.bias": torch.zeros(1)}, {}, {"sede": 1})
    refused(
        tmp_path / "round-00008.safetensors", "00008.safetensors holds settings that can't be used: unknown "
    )
    state = build_model(tiny_settings(), classes=10).state_dict()
    save_checkpoint(tmp_path, 9, state, {}, tiny_settings(**{"model.kernels": 3}).flat())
    refused(tmp_path / "round-00009.safetensors", "holds another model: .*size mismatch")
