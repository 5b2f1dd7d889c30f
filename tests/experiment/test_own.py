"""The examples of one's own code run as they stand, and what they do shows in what the runs leave."""

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fedfmd
from fedfmd.experiment import load_experiment, run_experiment
from fedfmd.own_code import FOLDER
from fedfmd.report.comparison import read_comparison
from fedfmd.runs import read_clients, read_environment, read_rounds

OWN = Path(__file__).parents[2] / "experiments" / "own"
MODULES = [path.stem for path in OWN.glob("*.py")]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """Modules, path and environment as they were before the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(FOLDER, "")
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example, without a page; gives the run folders and what was printed."""
    monkeypatch.setattr("fedfmd.experiment.run._write_page", lambda folder, anew=True: None)
    monkeypatch.setattr("fedfmd.experiment.run._compare", lambda folders, out, selection: "")

    def run(name, *overrides, out="out", engine="inline"):
        text = io.StringIO()
        console = Console(file=text, width=200)
        experiment = load_experiment(OWN / f"{name}.yaml", overrides)
        return run_experiment(experiment, tmp_path / out, engine, 2, console), text.getvalue()

    return run


@pytest.mark.parametrize("name", MODULES)
def test_an_example_is_short(name):
    assert len((OWN / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 20
    assert (OWN / f"{name}.yaml").exists()


def test_an_own_loss_is_minimised_and_the_cross_entropy_told(run):
    (focal,), _ = run("loss", "server.rounds=1")
    (plain,), _ = run("loss", "server.rounds=1", "train.loss=cross-entropy", out="plain")
    own, usual = (read_clients(folder / "clients.csv")[0] for folder in (focal, plain))
    assert own.loss < 0.9 * usual.loss  # the focal loss is below the cross entropy, of which both tests tell
    tests = [read_rounds(folder / "rounds.csv")[0].loss for folder in (focal, plain)]
    assert tests[0] == pytest.approx(tests[1], rel=0.2)


def test_an_own_optimiser_trains(run):
    (folder,), _ = run("optimiser")
    first, last = read_rounds(folder / "rounds.csv")
    assert last.loss < first.loss


def test_an_own_split_gives_clients_their_images(run):
    (folder,), _ = run("partition")
    (found,) = fedfmd.load(folder).runs
    counts = found.label_counts
    assert counts.sum() == 1437
    assert (counts[0, ::3] > 3 * counts[1, ::3]).all()  # client 0 mostly has the labels 0, 3, 6 and 9
    rows = read_clients(folder / "clients.csv")
    assert all(row.test_accuracy is not None for row in rows)


def test_an_own_policy_halves_the_work_of_the_slow(run):
    (folder,), text = run("policy")
    assert "policy policy:halve" in text
    rows = {row.device: row for row in read_clients(folder / "clients.csv") if row.round == 1}
    assert {device: (row.kernels, row.steps) for device, row in rows.items()} == {
        "pi-4": (2, 30),
        "jetson-nano": (2, 30),
        "pi-5": (1, 15),  # whose link is the slowest
    }


def test_own_images_are_learnt_until_they_are_told_apart(run):
    (folder,), text = run("dataset")
    rows = read_rounds(folder / "rounds.csv")
    assert rows[-1].accuracy >= 0.99
    assert len(rows) < 5
    assert "server.stop-at accuracy=0.99" in text


def test_an_own_convolution_is_compared_with_the_static_one_in_processes_of_their_own(run):
    folders, _ = run("conv")
    comparison = read_comparison(folders)
    static, own = comparison.runs
    assert (static.label, own.label) == ("static", "conv:Separable")
    assert own.cost.macs < 0.5 * static.cost.macs
    assert own.rounds[-1].loss < own.rounds[0].loss
    digests = [read_environment(folder)["code"] for folder in folders]
    assert digests[0] != digests[1]  # the file of the convolution is code of its run alone


@pytest.mark.slow
def test_rays_workers_find_all_of_it(run):
    pytest.importorskip("ray")
    own = (
        *("data.dataset=dataset:stripes", "model.conv=conv:Separable", "train.loss=loss:focal"),
        *(
            "train.optimiser=optimiser:SignSGD",
            "train.lr=0.002",
            "budget.policy=policy:halve",
            "server.rounds=1",
        ),
    )
    (flwr,), _ = run("partition", *own, engine="flwr")
    (inline,), _ = run("partition", *own, out="inline")
    rows = [read_clients(folder / "clients.csv") for folder in (flwr, inline)]
    assert [row.status for row in rows[0]] == ["ok"] * 3
    assert [row.loss for row in rows[0]] == pytest.approx([row.loss for row in rows[1]])
    assert [row.test_loss for row in rows[0]] == pytest.approx([row.test_loss for row in rows[1]], rel=1e-4)


def test_torchvisions_mobilenet_made_dynamic_trains_as_an_own_network(run, tmp_path, monkeypatch):
    (tmp_path / "torchvisions.py").write_text(
        "from torchvision.models import mobilenet_v2\n"
        "from fedfmd.conv import make_dynamic\n"
        "def make(classes, image_size, conv, norm):\n"
        "    return make_dynamic(mobilenet_v2(num_classes=classes, width_mult=0.25), 'fmdconv', kernels=2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = ("model.arch=torchvisions:make", "model.options=", "model.kernels=2", "data.image-size=16")
    work = (
        "partition.clients=2",
        "train.batch-size=8",
        "train.lr=0.001",
        "budget.policy=policy:twenty",
        "server.rounds=1",
    )
    (tmp_path / "policy.py").write_text("def twenty(full, plan):\n    return plan(steps=20)\n")
    (folder,), text = run("network", *network, *work, "partition.scheme=iid")
    rows = read_clients(folder / "clients.csv")
    assert [row.steps for row in rows] == [20, 20]
    assert all(row.status == "ok" and row.kernels == 2 for row in rows)
    assert 0.9 < rows[0].kernel_entropy <= 1
    assert "torchvisions:make with fmdconv (K=2)" in text
    assert torch.isfinite(torch.tensor([row.loss for row in rows])).all()
    sys.modules.pop("torchvisions")
