import json
import logging
import math

import numpy as np
import pytest
import torch

import fedfmd.runs.checkpoint
from fedfmd.errors import RunError, SettingsError
from fedfmd.runs import (
    FORMAT_VERSION,
    kept_settings,
    latest_checkpoint,
    latest_round,
    load_model,
    read_header,
    save_checkpoint,
    save_tensors,
)
from fedfmd.runs.checkpoint import Header

BANK = torch.randn(4, 3, 2, 2)
ARRAYS = {
    **{f"conv1.bank.{k}": BANK[k] for k in range(4)},
    "conv1.weight": torch.randn(2, 3).T,  # not contiguous
    "bn1.num_batches_tracked": torch.tensor(5),
    "fc.bias": np.arange(3, dtype=np.float32),
    "step": np.array(7),
}
SETTINGS = {
    "model.conv": "fmdconv",
    "model.kernels": 4,
    "train.lr": 0.1,
    "budget.deadline-s": None,
    "seed": 0,
}


def save(folder, round, keep=3, **arguments):
    save_checkpoint(folder, round, ARRAYS, {"virtual_s": round / 3}, SETTINGS, keep=keep, **arguments)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(loaded, saved) -> bool:
    return loaded.keys() == saved.keys() and all(
        torch.equal(loaded[name], torch.as_tensor(array))
        and loaded[name].dtype == torch.as_tensor(array).dtype
        for name, array in saved.items()
    )


def test_a_checkpoint_holds_what_it_was_given(tmp_path):
    state = {"virtual_s": 0.1 + 0.2, "best_accuracy": -math.inf, "cum_train_flops": [2**60, 0]}
    save_checkpoint(tmp_path, 10, ARRAYS, state, SETTINGS, extra_arrays={"momentum.fc.bias": torch.ones(3)})
    assert names(tmp_path) == {
        "round-00010.json",
        "round-00010.safetensors",
        "round-00010.state.safetensors",
    }
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint.round == 10
    assert checkpoint.state == state
    assert checkpoint.settings == SETTINGS
    assert same(checkpoint.arrays, ARRAYS)
    assert same(checkpoint.extra_arrays, {"momentum.fc.bias": torch.ones(3)})


def test_the_models_file_can_be_used_on_its_own(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "round-00010.safetensors").rename(tmp_path / "mine.safetensors")
    arrays, header = load_model(tmp_path / "mine.safetensors")
    assert same(arrays, ARRAYS)
    assert header.settings == SETTINGS


def test_a_models_file_tells_its_classes(tmp_path):
    save(tmp_path, 10, class_names=("cat", "dog", "owl"))
    assert read_header(tmp_path / "round-00010.safetensors") == Header(SETTINGS, ("cat", "dog", "owl"))


def test_a_file_without_a_version_is_still_read(tmp_path):
    """As fedfmd wrote it before files had one."""
    path = tmp_path / "round-00010.safetensors"
    tensors = {name: torch.as_tensor(array) for name, array in ARRAYS.items()}
    save_tensors(path, tensors, {"settings": json.dumps(SETTINGS)})
    arrays, header = load_model(path)
    assert same(arrays, ARRAYS)
    assert header == read_header(path) == Header(SETTINGS)


def test_a_newer_file_is_refused_in_one_line_not_skipped(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(fedfmd.runs.checkpoint, "FORMAT_VERSION", FORMAT_VERSION + 1)
        save(tmp_path, 10)
    for read in (
        lambda: load_model(tmp_path / "round-00010.safetensors"),
        lambda: latest_checkpoint(tmp_path),
    ):
        with pytest.raises(
            SettingsError, match=r"00010\.safetensors has format 2, .*up to 1: install"
        ) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 10**5, "null", "[]", "{}", '{"version": "?"}', '{"version": 1, "settings": [1], "class_names": []}',
     '{"version": 1, "settings": {}, "class_names": [{}]}', '{"version": 1, "settings": {}, "class_names": 5}'],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_a_header_of_something_else_is_one_line(tmp_path, text):
    path = tmp_path / "model.safetensors"
    for key in ("checkpoint", "settings"):
        if key == "settings" and text[:1] == "{" and len(text) > 1:
            continue  # before version 1 any values were settings
        save_tensors(path, {"w": torch.zeros(1)}, {key: text})
        for read in (load_model, read_header):
            with pytest.raises(ValueError, match=r"model\.safetensors is damaged: ") as error:
                read(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[]", "[" * 10**5, '{"files": 5}', '{"files": {"round-00010.safetensors": {}}}']
)
def test_a_list_of_files_that_is_none_is_one_line(tmp_path, text):
    save(tmp_path, 10)
    (tmp_path / "round-00010.json").write_text(text)
    with pytest.raises(ValueError, match=r"round-00010\.json is damaged: ") as error:
        load_model(tmp_path / "round-00010.safetensors")
    assert "\n" not in str(error.value)
    assert latest_round(tmp_path) == 0


def test_equal_runs_write_equal_files(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        save(tmp_path / run, 10)
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_round(tmp_path) == latest_round(tmp_path / "none") == 0


def test_the_newest_checkpoints_are_kept(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".round-00010.safetensors.partial").touch()  # a process was killed while it wrote
    for round in (10, 20, 30):
        save(tmp_path, round, keep=2, extra_arrays={"momentum": torch.ones(1)})
    kept = {
        f"round-{round}.{end}"
        for round in ("00020", "00030")
        for end in ("json", "safetensors", "state.safetensors")
    }
    assert names(tmp_path) == {"notes.txt", *kept}


@pytest.mark.parametrize(("keep", "there"), [(1, {15}), (2, {15}), (3, {10, 15})])
def test_room_is_made_before_a_checkpoint_is_written(tmp_path, monkeypatch, keep, there):
    """But never without another one to go back to."""
    for round in (5, 10, 15):
        save(tmp_path, round, keep=keep)
    found = []

    def full(*_arguments: object) -> None:
        found.extend(int(path.stem[-5:]) for path in tmp_path.glob("*.json"))
        raise OSError("disk full")

    monkeypatch.setattr(fedfmd.runs.checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 20, keep=keep)
    assert set(found) == there
    assert latest_checkpoint(tmp_path).round == max(there)


def test_checkpoints_beyond_the_resumed_round_are_given_up(tmp_path):
    for round in (10, 20, 30, 15):
        save(tmp_path, round)
    assert latest_checkpoint(tmp_path).round == 15
    assert {name[:11] for name in names(tmp_path)} == {"round-00010", "round-00015"}


def test_a_checkpoint_that_is_saved_again_forgets_the_first(tmp_path):
    save(tmp_path, 10, extra_arrays={"momentum": torch.ones(1)})
    save(tmp_path, 10)
    assert latest_checkpoint(tmp_path).extra_arrays == {}


def test_rounds_are_ordered_as_numbers(tmp_path):
    for round in (99_999, 100_000):
        save(tmp_path, round)
    assert latest_checkpoint(tmp_path).round == latest_round(tmp_path) == 100_000


@pytest.mark.parametrize("end", ["json", "safetensors", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_a_broken_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, end, damage):
    for round in (10, 20):
        save(tmp_path, round, extra_arrays={"momentum": torch.ones(3)})
    file = tmp_path / f"round-00020.{end}"
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "cut": whole[:-1], "garbage": b"\xff" * len(whole)}[damage])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).round == 10
    never_finished = (end, damage) == ("json", "missing")
    assert ("round-00020.json is broken" in caplog.text) != never_finished


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def zero(path):
    arrays, header = load_model(path)
    kept = {"version": FORMAT_VERSION, "settings": header.settings, "class_names": []}
    save_tensors(path, {n: torch.zeros_like(t) for n, t in arrays.items()}, {"checkpoint": json.dumps(kept)})


@pytest.mark.parametrize(
    ("change", "end"),
    [
        (flip, "safetensors"),
        (flip, "state.safetensors"),
        (zero, "safetensors"),
        (
            lambda path: path.write_bytes((path.parent / "round-00010.safetensors").read_bytes()),
            "safetensors",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"virtual_s": 6.6', '"virtual_s": 0.6')),
            "json",
        ),
    ],
    ids=["a bit of the model", "a bit of the state", "zeros", "the model of another round", "the progress"],
)
def test_a_checkpoint_that_was_changed_is_skipped_with_a_warning(tmp_path, caplog, change, end):
    save(tmp_path, 10, extra_arrays={"momentum": torch.ones(3)})
    arrays = {name: array + 1 for name, array in ARRAYS.items()}
    state = {"virtual_s": 20 / 3}
    save_checkpoint(tmp_path, 20, arrays, state, SETTINGS, {"momentum": torch.ones(3)}, keep=2)
    assert latest_round(tmp_path) == 20
    change(tmp_path / f"round-00020.{end}")
    assert latest_checkpoint(tmp_path).round == latest_round(tmp_path) == 10
    assert "not as the run wrote it; it is skipped" in caplog.text
    assert f"round-00020.{end}" in caplog.text


def test_a_checkpoint_knows_the_records_that_it_continues(tmp_path):
    record, folder = tmp_path / "rounds.csv", tmp_path / "checkpoints"
    folder.mkdir()
    record.write_text("round\n1\n2\n")
    save(folder, 2, records=[record])
    record.write_text("round\n1\n2\n3\n")  # a round after it
    assert latest_checkpoint(folder).round == latest_round(folder) == 2
    record.write_text("round\n2\n")
    assert latest_round(folder) == 0
    with pytest.raises(
        RunError, match=r"no checkpoint can be used: .*rounds\.csv is not as the run wrote it"
    ):
        latest_checkpoint(folder)


def test_a_model_that_was_changed_is_not_loaded_from_its_checkpoint(tmp_path):
    save(tmp_path, 10)
    flip(tmp_path / "round-00010.safetensors")
    with pytest.raises(ValueError, match=r"round-00010\.safetensors is not as the run wrote it"):
        load_model(tmp_path / "round-00010.safetensors")


def test_a_checkpoint_without_digests_is_still_read(tmp_path):
    """As fedfmd 0.1 wrote it."""
    save(tmp_path, 10)
    mark = tmp_path / "round-00010.json"
    content = json.loads(mark.read_text())
    mark.write_text(json.dumps({name: content[name] for name in ("round", "extra_arrays", "state")}))
    assert latest_checkpoint(tmp_path).round == latest_round(tmp_path) == 10


def test_the_settings_are_those_of_the_newest_model(tmp_path):
    assert kept_settings(tmp_path) is None
    save(tmp_path, 10)
    assert kept_settings(tmp_path) == SETTINGS


def test_on_a_full_disk_the_checkpoint_before_stays(tmp_path, monkeypatch):
    save(tmp_path, 10, keep=1)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"round-00020\.safetensors: No space left on device"):
        save(tmp_path, 20, keep=1)
    assert latest_checkpoint(tmp_path).round == 10


def test_with_one_to_keep_the_one_before_goes_when_the_next_is_whole(tmp_path):
    for number in (1, 2):
        save_checkpoint(tmp_path, number, {"w": torch.zeros(1)}, {}, {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00002.json", "round-00002.safetensors"]
