"""The experiment files that come with the project: their settings are valid, and they hold the runs they tell of."""

from collections import Counter
from pathlib import Path

import pytest

from fedfmd.conv import CONVS
from fedfmd.data import load_dataset
from fedfmd.experiment import load_experiment
from fedfmd.federation import build_dataset, build_fleet

ROOT = Path(__file__).parents[2] / "experiments"

RUNS = {
    "quickstart": 1,
    "cifar10": 1,
    "compare": 180,
    "compare-small": 30,
    "policies": 24,
    "uploads": 6,
    "paper/operators": 60,
    "paper/operators-small": 15,
    "paper/attentions": 21,
    "paper/attentions-small": 21,
    "paper/temperature": 18,
    "paper/temperature-small": 18,
    "paper/kernels": 12,
    "paper/kernels-small": 12,
}


def cells(name):
    return load_experiment(ROOT / f"{name}.yaml").cells


def values(name, pick):
    """How many runs have each value."""
    return Counter(pick(cell.settings) for cell in cells(name))


def test_every_file_is_known_here():
    files = {str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("*.yaml")}
    assert files == set(RUNS)


@pytest.mark.parametrize(("name", "runs"), RUNS.items())
def test_a_file_describes_so_many_different_runs(name, runs):
    found = cells(name)
    assert len(found) == runs
    assert len({cell.settings.digest() for cell in found}) == runs
    assert len({cell.name for cell in found}) == runs
    kind = "centralised" if name.startswith("paper/") else "federated"
    assert {cell.settings.kind for cell in found} == {kind}


@pytest.mark.parametrize("name", [name for name, runs in RUNS.items() if runs > 1])
def test_every_variant_is_run_with_three_seeds(name):
    assert set(values(name, lambda settings: settings.seed)) == {0, 1, 2}


@pytest.mark.parametrize("name", ["compare", "compare-small", "paper/operators", "paper/operators-small"])
def test_comparisons_have_every_convolution(name):
    assert set(values(name, lambda settings: settings.model.conv)) == set(CONVS)


@pytest.mark.parametrize(
    "name", ["paper/operators", "paper/attentions", "paper/temperature", "paper/kernels"]
)
def test_full_size_files_follow_the_papers_recipe(name):
    for cell in cells(name):
        train = cell.settings.train
        assert (train.epochs, train.lr, train.momentum, train.weight_decay) == (100, 0.1, 0.9, 1e-4)
        assert (train.schedule, train.nesterov, cell.settings.model.norm) == ("step", False, "batch")


@pytest.mark.parametrize("size", ["", "-small"])
def test_ablations_vary_what_the_paper_varies(size):
    attentions = values(f"paper/attentions{size}", lambda settings: settings.model.attentions)
    assert len(attentions) == 7  # all subsets but the empty one
    assert set(values(f"paper/kernels{size}", lambda settings: settings.model.kernels)) == {1, 2, 4, 8}
    temperatures = values(f"paper/temperature{size}", lambda s: (s.temperature.initial, s.temperature.shape))
    assert set(temperatures) == {(34, "constant")} | {(t, "linear") for t in (30, 40, 52, 61, 100)}


@pytest.mark.parametrize("name", ["compare", "compare-small"])
def test_every_client_of_a_comparison_has_a_device(name):
    for settings in {cell.settings.partition.clients: cell.settings for cell in cells(name)}.values():
        clients = settings.partition.clients
        assert len(build_fleet(settings, [500] * clients).clients) == clients


def test_the_small_comparison_fits_its_half_hour():
    images = len(load_dataset("digits").train)
    for cell in cells("compare-small"):
        assert build_dataset(cell.settings).name == "digits"  # nothing to download
        passes = cell.settings.length * cell.settings.train.local_epochs * images
        assert passes < 33_000  # at 250 a second and core


def test_the_small_ablations_fit_25_minutes_on_two_cores():
    for name in ("paper/attentions-small", "paper/temperature-small"):
        passes = sum(10_000 * cell.settings.length for cell in cells(name))
        assert passes / 600 / 2 < 25 * 60  # at 600 a second and core: ResNet-8 of half its width
