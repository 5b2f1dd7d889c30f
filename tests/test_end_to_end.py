"""Whole runs on tiny digits, in this process: what they leave in their folders."""

import gc
import math
import shutil
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedfmd.client.app
import fedfmd.client.round
import fedfmd.edge.fleet
import strategies.planning
import strategies.tracked
from fedfmd.build import build_federation, build_model
from fedfmd.client_app import app as client_app
from fedfmd.data import ImageSet, load_dataset, load_partition, own_test_size
from fedfmd.edge import DEVICES, WorkPlan, device_text
from fedfmd.engines.inline import InlineGrid, run_inline
from fedfmd.errors import RunError
from fedfmd.protocol.messages import Assignment, ClientResult, from_record
from fedfmd.protocol.state import pack
from fedfmd.runs import (
    WALL_COLUMNS,
    ClientRow,
    RunFolder,
    clients_of,
    latest_checkpoint,
    read_clients,
    read_rounds,
)
from fedfmd.server_app import app as server_app
from strategies import STRATEGIES, make_strategy

SKEWED = {
    "partition.scheme": "dirichlet",
    "partition.clients": 4,
    "fleet.devices": "pi-4:2, pi-5:1, jetson-nano:1",
    "train.batch-size": 128,
    "server.rounds": 2,
    "threads": 1,
}
UNRELIABLE = {
    "fleet.jitter": 0.4,
    "fleet.availability": 0.7,
    "budget.policy": "kernels",
    "budget.kernels": 1,
    "budget.kernel-choice": "attention",
}


@pytest.fixture
def run(tiny_settings, tmp_path):
    """Runs four clients with skewed labels in a folder of this name, which it gives back."""

    def run(name="run", workers=1, forked=False, **changes):
        settings = tiny_settings(**SKEWED | changes).in_folder(tmp_path / name)
        run_inline(server_app, client_app, settings.flat(), workers, forked=forked)
        return tmp_path / name

    return run


def rows_of(folder):
    """The rows of rounds and clients but for the time that real machines needed."""
    tables = read_rounds(folder / "rounds.csv"), clients_of(folder)
    return [
        [{key: value for key, value in asdict(row).items() if key not in WALL_COLUMNS} for row in rows]
        for rows in tables
    ]


def same_arrays(folder, other):
    arrays, others = (latest_checkpoint(f / "checkpoints").arrays for f in (folder, other))
    return arrays.keys() == others.keys() and all(torch.equal(arrays[name], others[name]) for name in arrays)


def test_a_run_leaves_its_results_and_they_are_the_same_each_time(run):
    whole = run("whole")
    assert sorted(path.name for path in whole.iterdir()) == [
        ".lock",
        "checkpoints",
        "clients.csv",
        "environment.json",
        "log.txt",
        "partition.npz",
        "partition.png",
        "rounds.csv",
        "settings.yaml",
    ]
    rounds, clients = read_rounds(whole / "rounds.csv"), read_clients(whole / "clients.csv")
    assert [row.round for row in rounds] == [1, 2]
    assert [(row.round, row.client) for row in clients] == [(r, c) for r in (1, 2) for c in range(4)]
    assert rounds[-1].loss < rounds[0].loss
    assert f"results: {whole}" in (whole / "log.txt").read_text(encoding="utf-8")

    again = run("again")
    assert rows_of(again) == rows_of(whole)
    assert same_arrays(again, whole)
    assert {(row.measured_transfer_s, row.measured_latency_s) for row in clients} == {(None, None)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        UNRELIABLE,
        {"server.strategy": "fedadam"},
        {
            "server.strategy": "fedbuff",
            "server.buffer": 2,
            "server.clients-per-round": 3,
            "data.validation": 0.1,
        },
        {"server.csv-rows": 7},
    ],
    ids=["all kernels", "unreliable fleet", "fedadam", "fedbuff", "columns"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, monkeypatch, changes):
    save = strategies.tracked.save_checkpoint

    def stop_in_round_2(folder, server_round, *args, **kwargs):
        if server_round == 2:  # its rows are written by now
            raise KeyboardInterrupt
        save(folder, server_round, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(strategies.tracked, "save_checkpoint", stop_in_round_2)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", **changes)
    whole, stopped = run("whole", **changes), run("stopped", **changes)
    assert "going on after round 1" in (stopped / "log.txt").read_text(encoding="utf-8")
    assert rows_of(stopped) == rows_of(whole)
    assert same_arrays(stopped, whole)
    assert (stopped / "clients.parquet").exists() == ("server.csv-rows" in changes)


def test_rounds_of_a_few_clients_do_as_much_and_keep_as_much_out_of_a_thousand_as_out_of_twenty(
    run, monkeypatch
):
    kept, made, save = [], Counter(), strategies.tracked.save_checkpoint

    def count(module, name):
        call = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: made.update([name]) or call(*args, **kwargs)
        )

    for module, name in (
        (strategies.planning, "plan_work"),
        (fedfmd.edge.fleet, "derive_seed"),
        (fedfmd.client.round, "derive_seed"),
        (fedfmd.client.round, "fault_of"),
    ):
        count(module, name)

    def save_and_count(*args, **kwargs):
        save(*args, **kwargs)
        kinds = (ClientRow, ClientResult, WorkPlan, Assignment, torch.Tensor)
        kept.append(sum(type(found) in kinds for found in gc.get_objects()))

    monkeypatch.setattr(strategies.tracked, "save_checkpoint", save_and_count)
    few = {
        "server.clients-per-round": 3,
        "server.rounds": 5,
        "train.batch-size": 16,
        "partition.scheme": "iid",
    }
    counts = []
    for clients in (20, 1000):
        folder = run(
            str(clients), **few | {"partition.clients": clients, "fleet.devices": "pi-4:50%, pi-5:50%"}
        )
        assert len(read_clients(folder / "clients.csv")) == 15
        counts.append(dict(made))
        made.clear()
        assert max(kept[2:]) <= kept[1]
        kept.clear()
    assert counts[0] == counts[1]
    assert counts[0]["plan_work"] == 15


@pytest.mark.parametrize(
    "changes",
    [
        {},
        UNRELIABLE,
        {"server.strategy": "fednova", "model.norm": "batch", "server.clients-per-round": 3},
        {"server.strategy": "fedbuff", "server.buffer": 2, "transport.upload": "int8"},
    ],
    ids=["all kernels", "unreliable fleet", "fednova", "fedbuff in int8"],
)
def test_the_number_of_workers_changes_no_bit(run, changes):
    one = run("one", **changes)
    others = [run(f"{workers} threads", workers, **changes) for workers in (2, 3)]
    for other in (*others, run("3 processes", 3, forked=True, **changes)):
        assert without_nodes(other) == without_nodes(one)
        assert models_of(other) == models_of(one)


def test_a_worker_that_cannot_test_leaves_it_to_the_server(run, monkeypatch, caplog):
    expected = run("alone")
    tested = fedfmd.client.app.test_model

    def fail(host, instruction, arrays):
        return tested(host, instruction, arrays) if instruction.part else {}["no"]

    monkeypatch.setattr(fedfmd.client.app, "test_model", fail)
    assert without_nodes(run("shared", workers=2)) == without_nodes(expected)
    assert "round 1: the server tests the model alone: unusable reply:" in caplog.text


def without_nodes(folder):
    return [[row | {"node": ""} for row in table] for table in rows_of(folder)]


def models_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "checkpoints").glob("*.safetensors")}


OPTIONS = {
    "fedprox": {"train.proximal-mu": 0.01},
    "fedavgm": {"server.momentum": 0.2},
    "fedadagrad": {"server.lr": 0.03},  # its first step is ± lr in every weight: 0.1 may overshoot
    "krum": {"server.byzantine": 0},
    "multikrum": {"server.byzantine": 0},
    "fedbuff": {"server.buffer": 4},
    # its step goes beyond the mean of the weights, for which BatchNorm has no statistics
    "feddyn": {"train.proximal-mu": 0.1, "model.norm": "group"},
}


def test_clients_stream_their_images_as_if_they_had_them_in_memory(run, image_folder):
    """The kernels that images use most, tests on held-out ones and validation images are of streamed ones too."""
    changes = UNRELIABLE | {
        "data.dataset": "imagefolder",
        "data.dir": str(image_folder),
        "data.augment": "crop+flip",
        "data.validation": 4,
        "partition.clients": 3,
        "partition.test-share": 0.3,
        "fleet.devices": "pi-4",
        "train.batch-size": 3,
    }
    held = run("held", **changes, **{"data.streaming": "never"})
    for name, workers in (("streamed", 1), ("streamed by two nodes", 2)):
        streamed = run(name, workers, **changes, **{"data.streaming": "always"})
        assert without_nodes(streamed) == without_nodes(held)
        assert same_arrays(streamed, held)
    cropped = run("cropped", 2, **changes | {"data.streaming": "always", "data.augment": "auto"})
    assert not same_arrays(cropped, held)
    assert "decoded on the way, augmentation resized-crop+flip" in (cropped / "log.txt").read_text()


def test_a_client_whose_image_breaks_fails_alone_by_the_name_of_the_file(
    run, image_folder, tmp_path, tiny_settings
):
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    changes = {"data.dataset": "imagefolder", "data.dir": str(folder), "data.streaming": "always"}
    partition = build_federation(tiny_settings(**SKEWED | changes)).partition
    files = sorted(folder.glob("train/*/*"))
    broken = files[partition.indices[1][0]]
    broken.write_bytes(b"cut")
    clients = read_clients(run(**changes) / "clients.csv")
    assert {row.client for row in clients if row.status == "failed"} == {1}
    assert f"ImageError: {broken}: not a readable image" in clients[1].reason


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns(run, name):
    easy = {"train.batch-size": 16, "model.norm": "batch", "partition.scheme": "iid", "server.strategy": name}
    folder = run(name, **easy | OPTIONS.get(name, {}))
    first, last = read_rounds(folder / "rounds.csv")
    assert last.loss < first.loss
    assert {row.status for row in read_clients(folder / "clients.csv")} == {"ok"}


def poison(images):
    """NaN in the place of the pixels."""
    return replace(images, images=torch.full(images.images.shape, math.nan))


def fail(images):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (fail, "RuntimeError: out of memory"),
        (poison, "conv1.weight"),
    ],
    ids=["raises", "nan"],
)
def test_a_run_with_a_broken_client_finishes(run, tiny_settings, monkeypatch, fault, reason):
    sizes = build_federation(tiny_settings(**SKEWED)).sizes
    train = fedfmd.client.round.train

    def train_or_fail(model, images, *args, **how):
        return train(model, fault(images) if len(images) == sizes[1] else images, *args, **how)

    monkeypatch.setattr(fedfmd.client.round, "train", train_or_fail)
    folder = run(workers=2)
    clients = read_clients(folder / "clients.csv")
    assert [(row.client, row.status) for row in clients] == [
        (client, "failed" if client == 1 else "ok") for client in range(4)
    ] * 2
    assert all(reason in row.reason for row in clients if row.client == 1)
    assert [row.clients_failed for row in read_rounds(folder / "rounds.csv")] == [1, 1]


def test_the_log_tells_why_a_run_ended(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fedfmd.client.round, "train", lambda model, images, *_, **__: fail(images))
    with pytest.raises(RunError, match="4 of 4 clients failed"):
        run()
    *_, last = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    assert "ERROR the run ends: round 1: 4 of 4 clients failed, more than server.max-failed-share" in last


def write_npz(path, images):
    np.savez(path, images=images.images.permute(0, 2, 3, 1).numpy(), labels=images.labels.numpy())
    return str(path)


def test_a_client_with_a_single_image_is_trained(run, tmp_path):
    digits = load_dataset("digits", image_size=8)
    five = digits.train.subset(torch.arange(5))
    data = {
        "data.dataset": "npz",
        "data.train": write_npz(tmp_path / "train.npz", ImageSet(five.images, torch.arange(5) % 2)),
        "data.test": write_npz(tmp_path / "test.npz", ImageSet(five.images, torch.arange(5) % 2)),
    }
    folder = run(**data, **{"partition.scheme": "iid", "model.norm": "batch", "server.rounds": 1})
    clients = read_clients(folder / "clients.csv")
    assert sorted(row.examples for row in clients) == [1, 1, 1, 2]
    assert {row.status for row in clients} == {"ok"}


@pytest.fixture
def devices(tmp_path):
    """The --node-config of three edge devices with 30, 40 and 1 digits."""
    train = load_dataset("digits", image_size=8).train
    shares = [train.subset(indices) for indices in torch.arange(71).split([30, 40, 1])]
    devices = ("pi-5", "jetson-nano", "")
    return [
        {"client": client, "data": write_npz(tmp_path / f"device-{client}.npz", share), "device": device}
        for client, (share, device) in enumerate(zip(shares, devices, strict=True))
    ]


@pytest.fixture
def run_devices(tiny_settings, tmp_path):
    """Runs two rounds on edge devices with these node configs; gives the rows of the clients."""

    def run(node_configs, grid_type=InlineGrid, **changes):
        settings = tiny_settings(
            **{
                "server.rounds": 2,
                "train.batch-size": 16,
                "model.norm": "batch",
                "server.node-timeout-s": 0.1,
            }
            | changes
        )
        folder = RunFolder(tmp_path / "run")
        with grid_type(client_app, settings.flat(), node_configs) as grid:
            make_strategy(build_federation(settings), folder).run(grid)
        return read_clients(folder.clients)

    return run


def test_edge_devices_train_on_their_own_images_with_their_own_devices(run_devices, devices, tiny_settings):
    simulated = build_federation(tiny_settings()).fleet.clients[2].device.name
    clients = run_devices(list(reversed(devices)))
    assert [(row.node, row.client, row.device, row.examples, row.steps, row.status) for row in clients] == [
        (0, 0, "pi-5", 30, 2, "ok"),
        (1, 1, "jetson-nano", 40, 3, "ok"),
        (2, 2, simulated, 1, 1, "ok"),
    ] * 2
    assert all(row.loss is not None for row in clients)


def test_edge_devices_measure_what_is_modelled(run_devices, devices):
    for row in run_devices(devices):
        assert row.wall_s > 0
        assert row.measured_transfer_s > 0
        assert row.measured_latency_s > 0


def test_edge_devices_may_bring_a_device_file_of_their_own(run_devices, devices, tmp_path):
    own = replace(DEVICES["pi-5"], name="mine", round_s=100, down_mbps=8, up_mbps=8)
    (tmp_path / "box.yaml").write_text(device_text(own))
    devices[1]["device"] = str(tmp_path / "box.yaml")
    mine, other = [row for row in run_devices(devices) if row.round == 1 and row.client in (1, 2)]
    assert mine.device == "mine"
    assert 100 < mine.compute_s < 110 > other.compute_s
    assert mine.down_s == pytest.approx(mine.down_bytes / 1e6)
    assert mine.up_s == pytest.approx(mine.up_bytes / 1e6)


def test_nothing_of_an_edge_devices_images_leaves_it(run_devices, devices, tiny_settings):
    sent = []

    class TappedGrid(InlineGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            sent.extend((reply.metadata.message_type, dict(reply.content)) for reply in replies)
            return replies

    run_devices(devices, TappedGrid)
    model = pack(build_model(tiny_settings(**{"model.norm": "batch"}), classes=10))
    answers, updates = ([content for type_, content in sent if type_ == kind] for kind in ("query", "train"))
    assert (len(answers), len(updates)) == (3, 2 * 3)
    for content in answers:
        assert list(content) == ["config"]
        assert content["config"].keys() == {"client", "rank", "nodes", "device", "profile", "images", "error"}
        assert all(isinstance(value, int) or len(value) < 20 for value in content["config"].values())
    metrics = {field.name for field in fields(ClientResult)} - {"reason"} | {"num-examples"}
    for content in updates:
        assert set(content) == {"arrays", "weights", "scales", "rest", "metrics", "config"}
        assert {n: a.shape for n, a in from_record(content["arrays"]).items()} == {
            n: a.shape for n, a in model.items()
        }
        assert content["weights"].keys() == model.keys()
        assert not content["scales"]
        assert not content["rest"]
        assert content["metrics"].keys() == metrics
        assert all(len(value) == 1 for name, value in content["metrics"].items() if name != "num-examples")
        assert dict(content["config"]) == {"reason": [""]}


def test_edge_devices_whose_data_is_wrong_stop_the_run_before_training(run_devices, devices):
    np.savez(devices[1]["data"], images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([3, 10]))
    with pytest.raises(
        RunError, match=r"the edge device of client 1 refuses: .*device-1\.npz: label 10 is outside"
    ):
        run_devices(devices)


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedbuff"])
def test_the_clients_of_tested_rounds_test_the_model_on_what_they_hold_out(strategy, run):
    how = {"server.strategy": strategy, "partition.test-share": 0.2, "server.evaluate-every": 2}
    if strategy == "fedbuff":
        how["server.buffer"] = 2
    one, two = run("one", **how, **{"server.rounds": 3}), run("two", workers=2, **how, **{"server.rounds": 3})
    rows = read_clients(one / "clients.csv")
    for row in rows:
        tested = row.round in (2, 3)
        assert (row.test_accuracy is not None) == (row.test_loss is not None) == tested
        assert (row.personal_test_accuracy is not None) == (tested and strategy == "fedbn")
    for row, other in zip(rows, read_clients(two / "clients.csv"), strict=True):
        for loss, same in (
            (row.test_loss, other.test_loss),
            (row.personal_test_loss, other.personal_test_loss),
        ):
            assert loss == (same and pytest.approx(same, rel=1e-4))  # whichever worker hosts the client
    sizes = load_partition(one / "partition.npz").sizes
    for row in rows:
        if row.round == 1:
            assert row.examples == sizes[row.client] - own_test_size(int(sizes[row.client]), 0.2)


def test_edge_devices_test_the_model_on_what_they_hold_out_of_their_own(run_devices, devices):
    rows = run_devices(devices, **{"partition.test-share": 0.1, "server.strategy": "fedbn"})
    held = {0: 3, 1: 4}  # of 30 and 40 images; the only one of client 2 can't be spared
    for row in rows:
        assert row.examples == {0: 27, 1: 36, 2: 1}[row.client]
        for accuracy in (row.test_accuracy, row.personal_test_accuracy):
            images = held.get(row.client)
            assert (
                accuracy is None
                if images is None
                else accuracy * images == pytest.approx(round(accuracy * images))
            )
