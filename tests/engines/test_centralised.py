import csv
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from fedfmd.cost import count
from fedfmd.engines.centralised import prepare_centralised, run_centralised
from fedfmd.errors import RunError, SettingsError
from fedfmd.runs import RunFolder, latest_checkpoint, load_model, read_epochs, save_checkpoint
from fedfmd.serving.cam import write_cam
from fedfmd.serving.checkpoints import trained_model
from fedfmd.settings import Settings
from fedfmd.training import evaluate, train

MEASURED = ("wall_s", "latency_s", "ies_", "rcs_")
TINY = {
    "kind": "centralised",
    "data.image-size": 8,
    "data.augment": "none",
    "model.width": 0.25,
    "model.kernels": 2,
    "train.batch-size": 128,
    "train.epochs": 3,
    "train.schedule": "step",
    "temperature.rounds": 2,
}


def settings_in(folder, **changes):
    return Settings.from_mapping(TINY | changes).in_folder(folder)


def counted(folder):
    """The rows of epochs.csv without the columns that depend on how fast this machine is."""
    with (folder / "epochs.csv").open() as file:
        return [
            {name: cell for name, cell in row.items() if not any(part in name for part in MEASURED)}
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs."""
    folder = tmp_path_factory.mktemp("centralised")
    run_centralised(settings_in(folder), threads=1)
    return folder


def test_every_epoch_is_a_row(finished):
    rows = read_epochs(finished / "epochs.csv")
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert [row.lr for row in rows] == pytest.approx([0.05, 0.005, 0.0005])  # before 30, from 30 and 60 %
    assert [row.temperature for row in rows] == [30, 15.5, 1]  # over two epochs
    assert rows[-1].best_accuracy > 0.5
    assert rows[-1].best_accuracy == max(row.accuracy for row in rows)
    assert rows[-1].cum_wall_s == pytest.approx(sum(row.wall_s for row in rows))
    assert {path.name for path in finished.iterdir()} == {
        ".lock",
        "checkpoints",
        "environment.json",
        "epochs.csv",
        "log.txt",
        "settings.yaml",
    }


def test_every_epoch_has_an_order_of_its_own(tmp_path, monkeypatch):
    seeds = []

    def recorded(model, images, dataset, sgd, steps, generator, device, optimiser, **how):
        seeds.append(generator.initial_seed())
        return train(model, images, dataset, sgd, 1, generator, device, optimiser, **how)

    monkeypatch.setattr("fedfmd.engines.centralised.train", recorded)
    run_centralised(settings_in(tmp_path), threads=1)
    assert len(set(seeds)) == len(seeds) == 3


def test_the_best_epoch_is_chosen_by_validation_and_told_by_its_test_accuracy(tmp_path):
    run_centralised(settings_in(tmp_path, **{"data.validation": 0.1}), threads=1)
    rows = read_epochs(tmp_path / "epochs.csv")
    for number, row in enumerate(rows, start=1):
        chosen = max(rows[:number], key=lambda earlier: earlier.validation_accuracy)
        assert row.best_accuracy == chosen.accuracy
        assert row.validation_loss > 0
    assert rows[0].train_flops == (1437 - 144) * 6 * count(trained_model_of(tmp_path), 8).macs


def trained_model_of(folder):
    return trained_model(folder / "checkpoints" / "round-00003.safetensors")[0]


def test_compute_is_that_of_every_image_once_per_epoch(finished):
    model, _ = trained_model(finished / "checkpoints" / "round-00003.safetensors")
    per_epoch = 1437 * 6 * count(model, 8).macs  # training images of digits; forward and backward
    rows = read_epochs(finished / "epochs.csv")
    assert [row.train_flops for row in rows] == [per_epoch] * 3
    assert [row.cum_train_flops for row in rows] == [per_epoch, 2 * per_epoch, 3 * per_epoch]


def test_scores_take_the_seconds_of_the_epoch_and_of_one_image(finished):
    for row in read_epochs(finished / "epochs.csv"):
        assert (row.ies_train, row.rcs_train) == pytest.approx(
            (row.wall_s / row.accuracy, row.accuracy / row.wall_s)
        )
        assert (row.ies_infer, row.rcs_infer) == pytest.approx(
            (row.latency_s / row.accuracy, row.accuracy / row.latency_s)
        )


def test_a_checkpoint_is_the_model_of_its_row(finished, tmp_path):
    checkpoint = finished / "checkpoints" / "round-00003.safetensors"
    model, settings = trained_model(checkpoint)
    dataset = prepare_centralised(settings).dataset
    tested = evaluate(model, dataset.test, dataset)
    row = read_epochs(finished / "epochs.csv")[-1]
    assert (tested.accuracy, tested.top5_accuracy) == pytest.approx((row.accuracy, row.top5_accuracy))
    assert write_cam(checkpoint, ["test:0"], tmp_path / "cam.png").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"server.checkpoint-every": 2},
        {"train.momentum": 0.0, "data.validation": 0.1},
        {"train.optimiser": "adamw", "train.lr": 0.005, "train.lr-warmup": 1, "train.label-smoothing": 0.1},
        {"train.optimiser": "torch.optim:NAdam", "train.lr": 0.005, "train.clip-norm": 1},
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(changes, tmp_path, monkeypatch):
    changes = {"train.nesterov": False} | changes
    whole, stopped = settings_in(tmp_path / "whole", **changes), settings_in(tmp_path / "stopped", **changes)
    run_centralised(whole, threads=1)
    append = RunFolder.append_epoch

    def stop_after_two(folder, row):
        append(folder, row)
        if row.epoch == 2:
            raise KeyboardInterrupt  # before the checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_epoch", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run_centralised(stopped, threads=1)
    run_centralised(stopped, threads=1)
    assert counted(tmp_path / "stopped") == counted(tmp_path / "whole")
    models = [
        load_model(tmp_path / name / "checkpoints" / "round-00003.safetensors")[0]
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def streamed(folder):
    return {
        "data.dataset": "imagefolder",
        "data.dir": str(folder),
        "data.streaming": "always",
        "data.augment": "auto",
        "train.batch-size": 2,
    }


def same_end(folder, other):
    """Whether the rows, the model and the optimiser of two runs are the same, seconds aside."""
    ours, theirs = (latest_checkpoint(path / "checkpoints") for path in (folder, other))
    arrays, others = ({**end.arrays, **end.extra_arrays} for end in (ours, theirs))
    return (
        counted(folder) == counted(other)
        and (ours.round, ours.state["best"], arrays.keys())
        == (theirs.round, theirs.state["best"], others.keys())
        and all(torch.equal(arrays[name], others[name]) for name in arrays)
    )


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"server.checkpoint-every": 2, "train.optimiser": "adamw", "train.lr": 0.005, "model.norm": "batch"},
    ],
)
@pytest.mark.parametrize("images", ["streamed", "in memory"])
def test_a_run_that_was_stopped_within_an_epoch_ends_as_one_that_was_not(
    images, changes, cores, image_folder, tmp_path, monkeypatch
):
    changes |= streamed(image_folder) | ({"data.streaming": "never"} if images == "in memory" else {})
    run_centralised(settings_in(tmp_path / "whole", **changes), threads=1)
    often = settings_in(tmp_path / "stopped", **changes, **{"train.checkpoint-s": 1e-9})
    for stop in (5, 12, 20):  # of the checkpoints from there on, that is of 12 steps and an end in each epoch
        with monkeypatch.context() as patch:
            patch.setattr("fedfmd.engines.centralised.save_checkpoint", stopping_after(stop))
            with pytest.raises(KeyboardInterrupt):
                run_centralised(often, threads=1, cores=cores)
    assert (tmp_path / "stopped" / "checkpoints" / "unfinished").exists()
    run_centralised(often, threads=1, cores=cores)
    assert same_end(tmp_path / "stopped", tmp_path / "whole")
    assert not (tmp_path / "stopped" / "checkpoints" / "unfinished").exists()


def stopping_after(number):
    """What saves so many checkpoints and is then interrupted."""
    left = iter(range(number))

    def save(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        save_checkpoint(*arguments, **options)

    return save


def test_a_broken_checkpoint_within_an_epoch_costs_no_more_than_the_epoch(
    image_folder, tmp_path, monkeypatch, caplog
):
    changes = streamed(image_folder)
    run_centralised(settings_in(tmp_path / "whole", **changes), threads=1)
    often = settings_in(tmp_path / "stopped", **changes, **{"train.checkpoint-s": 1e-9})
    with monkeypatch.context() as patch:
        patch.setattr("fedfmd.engines.centralised.save_checkpoint", stopping_after(17))
        with pytest.raises(KeyboardInterrupt):
            run_centralised(often, threads=1)
    (model,) = (tmp_path / "stopped" / "checkpoints" / "unfinished").glob("round-?????.safetensors")
    model.write_bytes(b"")
    with caplog.at_level(logging.INFO, "fedfmd"):
        run_centralised(often, threads=1)
    assert "is broken" in caplog.text
    assert "going on after epoch 1" in caplog.messages
    assert same_end(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no processes decode")
def test_a_run_that_was_killed_within_an_epoch_goes_on_at_once(image_folder, tmp_path):
    """Its folder is free for the next one, as the processes that decode die with it."""
    folder = tmp_path / "run"
    changes = TINY | streamed(image_folder) | {"data.workers": 1, "train.checkpoint-s": 1e-9}
    code = (
        "import sys, json; from pathlib import Path; from fedfmd.settings import Settings;"
        "from fedfmd.engines.centralised import run_centralised as run;"
        "run(Settings.from_mapping(json.loads(sys.argv[1])).in_folder(Path(sys.argv[2])), threads=1, cores=2)"
    )
    command = [sys.executable, "-c", code, json.dumps(changes), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(folder.glob("checkpoints/unfinished/round-*.json")):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    (decoder,) = children
    ended = time.monotonic() + 2  # left alone, it would look for its parent every five seconds
    while is_alive(decoder) and time.monotonic() < ended:
        time.sleep(0.01)
    assert not is_alive(decoder)
    assert list(folder.glob("checkpoints/unfinished/round-*.json"))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert "steps of the next" in (folder / "log.txt").read_text()
    run_centralised(settings_in(tmp_path / "whole", **streamed(image_folder)), threads=1)
    assert same_end(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    ("cores", "threads", "wanted", "workers"),
    [(1, 1, 8, 0), (4, 4, 8, 0), (4, 1, 8, 3), (4, 1, 2, 2), (4, 3, 2, 1), (4, 1, 0, 0)],
)
def test_no_more_processes_decode_than_training_leaves_cores(
    cores, threads, wanted, workers, image_folder, tmp_path, monkeypatch
):
    told = []

    def stop(dataset, workers):
        told.append(workers)
        raise KeyboardInterrupt

    monkeypatch.setattr("fedfmd.engines.centralised.decoded_by", stop)
    settings = settings_in(tmp_path, **streamed(image_folder), **{"data.workers": wanted})
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_centralised(settings, threads=threads, cores=cores)
    torch.set_num_threads(before)
    assert told == [workers]


def is_alive(process):
    """Whether it runs; one that has ended may wait for its end to be told."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_image_that_cannot_be_read_ends_the_run_by_its_name(image_folder, tmp_path):
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    settings = settings_in(tmp_path / "run", **streamed(folder))
    prepare_centralised(settings)
    (folder / "train" / "b" / "07.jpg").write_bytes(b"cut")
    with pytest.raises(RunError, match=r"train/b/07\.jpg: not a readable image .*; replace or remove it"):
        run_centralised(settings, threads=1)
    assert not (tmp_path / "run" / "epochs.csv").exists()


def test_a_finished_run_is_left_as_it_is(finished, caplog):
    before = (finished / "epochs.csv").read_bytes()
    with caplog.at_level(logging.INFO, "fedfmd"):
        run_centralised(settings_in(finished), threads=1)
    assert (finished / "epochs.csv").read_bytes() == before
    assert "going on after epoch 3" in caplog.messages


def test_an_epoch_is_logged_with_its_row(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fedfmd"):
        run_centralised(settings_in(tmp_path, **{"train.epochs": 1}), threads=1)
    (row,) = [record.round_row for record in caplog.records if hasattr(record, "round_row")]
    assert (row.round, row.epoch) == (1, 1)
    assert caplog.messages[0].startswith("fedfmd ")
    assert "resnet8 with fmdconv (K=2)" in caplog.messages[0]
    assert caplog.messages[1] == (
        "1 epochs over 1,437 images in batches of 128, learning rate 0.05 (step), float32 on cpu; seed 0"
    )


def test_a_static_network_has_neither_temperature_nor_entropy(tmp_path):
    run_centralised(settings_in(tmp_path, **{"train.epochs": 1, "model.conv": "static"}), threads=1)
    (row,) = read_epochs(tmp_path / "epochs.csv")
    assert (row.temperature, row.kernel_entropy) == (None, None)


def test_training_that_diverges_is_one_line_and_leaves_no_row(tmp_path):
    settings = settings_in(tmp_path, **{"train.lr": 1e30, "model.conv": "static", "model.norm": "batch"})
    with pytest.raises(
        RunError, match=r"epoch 1: the training loss is nan, .* Choose train\.lr below 1e\+30"
    ):
        run_centralised(settings, threads=1)
    assert not (tmp_path / "epochs.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device = 'tpu': "),
        ({"data.dataset": "npz"}, "data.train "),
        ({"data.image-size": 4}, "data.image-size = 4: "),
        (
            {"model.arch": "resnet18", "model.norm": "batch", "train.batch-size": 4},
            "train.batch-size = 4 leaves each epoch a last batch of one image: the network fails in training",
        ),
    ],
)
def test_nothing_is_written_before_the_checks(changes, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        run_centralised(settings_in(tmp_path / "run", **changes), threads=1)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_settings_is_refused(finished):
    with pytest.raises(SettingsError, match=r"other settings \(train\.lr was 0\.05, is 0\.5\)"):
        prepare_centralised(settings_in(finished, **{"train.lr": 0.5}))


def test_a_run_ends_at_its_accuracy_and_a_resume_says_so(tmp_path, caplog):
    how = {
        "server.stop-at": "seconds=1e9, accuracy=0.15",
        "server.checkpoint-every": 3,
        "data.validation": 0.2,
    }
    settings = settings_in(tmp_path, **how)
    for line in ("epoch 1/3", "going on after epoch 1"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fedfmd"):
            run_centralised(settings, threads=1)
        assert any(text.startswith(line) for text in caplog.messages)
        assert "the run ends after epoch 1 of 3: validation accuracy" in caplog.text
        assert [row.epoch for row in read_epochs(tmp_path / "epochs.csv")] == [1]
