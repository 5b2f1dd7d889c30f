import os
from errno import ENOSPC

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import fedfmd.runs.files
from fedfmd.runs import atomic_write, save_tensors


@pytest.mark.parametrize("content", ["τ = 1\n", b"\x00\xff"])
def test_a_file_gets_its_new_content_and_nothing_else_appears(tmp_path, content):
    file = tmp_path / "settings.yaml"
    file.write_text("old")
    atomic_write(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_on_a_full_disk_the_old_content_stays_and_the_error_says_what_to_do(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    file = tmp_path / "settings.yaml"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*settings\.yaml: No space left on device; free some space"
    ):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_tensors_of_any_layout_are_written(tmp_path):
    tensors = {"turned": torch.arange(6.0).view(2, 3).T, "counter": torch.tensor(3)}
    save_tensors(tmp_path / "model.safetensors", tensors, {"about": "two"})
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tied_parameters_are_written_under_each_of_their_names(tmp_path):
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_tensors(tmp_path / "model.safetensors", tied.state_dict(), {})
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tied.state_dict().keys()
    assert torch.equal(read["1.weight"], tied[0].weight)


def test_if_tensors_cannot_be_written_the_old_file_stays(tmp_path, monkeypatch):
    def full(*_arguments: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    file = tmp_path / "model.safetensors"
    file.write_text("old")
    monkeypatch.setattr(fedfmd.runs.files, "save_file", full)
    with pytest.raises(
        OSError, match=r"cannot write .*model\.safetensors: .*space left on device; free some space"
    ):
        save_tensors(file, {"w": torch.ones(1)}, {})
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
