import json
import re

import pytest
import torch
import torchvision

from fedfmd.build import build_federation, build_model
from fedfmd.engines.centralised import prepare_centralised
from fedfmd.errors import SettingsError
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.runs import save_checkpoint
from fedfmd.serving.checkpoints import trained_model
from fedfmd.start import load_start

STATIC = {"model.conv": "static"}
TORCHVISIONS = {"model.stem": "imagenet", "model.norm": "batch", "model.width": 1.0, "data.image-size": 32}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def started(settings):
    """A run's model with the weights that it starts from, and what the log says of them."""
    model = build_model(settings, 10)
    return model.eval(), load_start(model, settings, 10)


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def test_the_same_network_starts_with_the_checkpoints_weights(tiny_settings, write_checkpoint):
    path = write_checkpoint(seed=5)
    model, line = started(tiny_settings(**{"model.init": str(path)}))
    assert line == f"weights of {path}"
    assert torch.equal(logits(model), logits(build_model(tiny_settings(seed=5), 10)))


@pytest.mark.parametrize("conv", ["condconv", "dyconv", "odconv", "fmdconv"])
def test_a_static_checkpoint_starts_a_dynamic_network(conv, tiny_settings, write_checkpoint):
    path = write_checkpoint(**STATIC, seed=5)
    settings = tiny_settings(**{"model.conv": conv, "model.init": str(path)})
    (model, line), (again, _) = started(settings), started(settings)
    assert line == f"weights of {path}, its convolutions made dynamic"
    torch.testing.assert_close(logits(model), logits(build_model(tiny_settings(**STATIC, seed=5), 10)))
    assert torch.equal(logits(model), logits(again))


def test_both_kinds_of_training_start_there(tiny_settings, write_checkpoint):
    path = str(write_checkpoint(seed=5))
    expected = build_model(tiny_settings(seed=5), 10).state_dict()["fc.weight"]
    assert torch.equal(build_federation(tiny_settings(**{"model.init": path})).model.fc.weight, expected)
    centralised = tiny_settings(**{"model.init": path, "kind": "centralised"})
    assert torch.equal(prepare_centralised(centralised).model.fc.weight, expected)


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        ({}, {"model.arch": "resnet20"}, "(model.arch is 'resnet8' there, 'resnet20' here): set what is there"),
        ({}, {"model.kernels": 3}, "(model.kernels is 2 there, 3 here)"),
        ({}, {"model.conv": "odconv"}, "(model.conv is 'fmdconv' there, 'odconv' here)"),
        ({}, {"model.conv": "static"}, "(model.conv is 'fmdconv' there, 'static' here)"),
        (STATIC, {"model.width": 0.5, "model.norm": "batch"}, "(model.norm is 'group' there, 'batch' here, model.w"),
        (STATIC, {"model.attention-init": "kaiming"}, "doesn't fit this run's network: attention_init = 'kaiming'"),
    ],
)  # fmt: skip
def test_another_network_is_one_clear_line(there, here, line, tiny_settings, write_checkpoint):
    path = str(write_checkpoint(**there))
    with pytest.raises(SettingsError, match=f"^model.init = '{path}' .*{re.escape(line)}"):
        started(tiny_settings(**{"model.init": path} | here))


def test_other_classes_are_one_clear_line(tiny_settings, write_checkpoint):
    settings = tiny_settings(**{"model.init": str(write_checkpoint())})
    with pytest.raises(
        SettingsError, match="tells 10 classes apart, and this run has 7: take a checkpoint of"
    ):
        load_start(build_model(settings, 7), settings, 7)


def test_what_is_no_checkpoint_is_one_clear_line(tiny_settings, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    for name in ("missing.safetensors", "text.safetensors"):
        with pytest.raises(
            SettingsError, match=f"^model.init = '.*{name}' can't be read .*give a checkpoint"
        ):
            started(tiny_settings(**{"model.init": str(tmp_path / name)}))


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (lambda weights: weights * float("nan"), "array fc.weight has NaN or infinite values"),
        (
            lambda weights: weights.to(torch.int8),
            "array fc.weight is of type torch.int8, and a model's are floats",
        ),
    ],
    ids=["NaN", "whole numbers"],
)
def test_weights_that_no_training_leaves_are_one_clear_line(broken, line, tiny_settings, tmp_path):
    settings = tiny_settings(**{"model.init": str(tmp_path / "round-00001.safetensors")})
    state = build_model(settings, 10).state_dict()
    save_checkpoint(
        tmp_path, 1, state | {"fc.weight": broken(state["fc.weight"])}, {}, tiny_settings().kept()
    )
    with pytest.raises(SettingsError, match=f"^model.init = '.*' doesn't fit this run's network: {line}$"):
        started(settings)
    with pytest.raises(SettingsError, match=f"safetensors holds no trained model: {line}$"):
        trained_model(tmp_path / "round-00001.safetensors")


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
@pytest.mark.parametrize("conv", ["static", "fmdconv"])
@pytest.mark.parametrize("classes", [10, 12])
def test_torchvisions_weights_start_a_run(arch, conv, classes, tiny_settings, tmp_path):
    theirs = torchvision.models.get_model(arch.replace("netv2", "net_v2"), num_classes=classes)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    changes = {"model.arch": arch, "model.conv": conv, "model.kernels": 1, "model.pretrained": str(path)}
    model, line = started(tiny_settings(**TORCHVISIONS | changes))
    if classes == 10:
        assert line == f"torchvision's weights of {path}"
        torch.testing.assert_close(logits(model), logits(theirs))
    else:
        assert line == f"torchvision's weights of {path}, but a fresh classifier of 10 classes"
        assert torch.equal(next(model.parameters()), next(theirs.parameters()))
        assert logits(model).shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.arch": "resnet8"}, "needs a network of torchvision's, and model.arch = 'resnet8': use one of "),
        ({"model.stem": "cifar"}, "needs torchvision's network, and model.stem = 'cifar': set model.stem=imagenet"),
        ({"model.norm": "group"}, "model.norm = 'group': set model.norm=batch"),
        ({"model.width": 0.5}, "model.width = 0.5: set model.width=1.0"),
        ({"model.init": "other"}, "model.init = 'other' and model.pretrained = 'weights.pth': a run starts from one"),
    ],
)  # fmt: skip
def test_settings_that_torchvision_has_no_weights_for_are_refused(changes, line, tiny_settings):
    with pytest.raises(SettingsError, match=re.escape(line)):
        tiny_settings(
            **TORCHVISIONS | {"model.arch": "resnet18", "model.pretrained": "weights.pth"} | changes
        )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "can't be read"),
        ([1, 2], "holds no state dict: give one of torchvision's for resnet18"),
        (torchvision.models.resnet34, "doesn't fit this run's network: "),
        (torch.nn.Linear, "can't be read"),
    ],
    ids=["missing", "list", "other network", "code"],
)
def test_files_that_are_no_weights_of_torchvisions_are_refused(content, line, tiny_settings, tmp_path):
    path = tmp_path / "weights.pth"
    if content is torchvision.models.resnet34:
        content = content(num_classes=2).state_dict()
    if content is not None:
        torch.save(content, path)
    settings = tiny_settings(
        **TORCHVISIONS | {"model.arch": "resnet18", "model.conv": "static", "model.pretrained": str(path)}
    )
    with pytest.raises(SettingsError, match=f"^model.pretrained = '{path}' {line}"):
        started(settings)


def test_a_run_goes_on_only_from_the_same_weights(tiny_settings, write_checkpoint, tmp_path):
    path = write_checkpoint()
    settings = tiny_settings(**{"model.init": str(path)}).in_folder(tmp_path / "run")
    with open_run_folder(settings) as folder:
        assert len(json.loads(folder.environment.read_text())["weights"]) == 12
    assert run_path(settings) == folder.path
    write_checkpoint(seed=1)
    with pytest.raises(SettingsError, match=f"started from other weights than {path} has now: name another"):
        run_path(settings)


def test_settings_that_are_not_set_leave_no_trace(tiny_settings):
    assert not tiny_settings().kept().keys() & {"model.init", "model.pretrained", "model.options"}
    assert tiny_settings(**{"model.init": "x"}).digest() != tiny_settings().digest()
