"""The experiment files that come with the project: their settings are valid, and they hold the runs they tell of."""

from collections import Counter
from pathlib import Path

import pytest

from fedfmd.build import build_fleet
from fedfmd.conv import CONVS
from fedfmd.experiment import load_experiment

ROOT = Path(__file__).parents[2] / "experiments"

RUNS = {
    "quickstart": 1,
    "cifar10": 1,
    "compare": 180,
    "compare-small": 320,
    "policies": 24,
    "temperature": 12,
    "uploads": 6,
    "own/callback": 1,
    "own/conv": 2,
    "own/dataset": 1,
    "own/loss": 1,
    "own/network": 1,
    "own/optimiser": 1,
    "own/partition": 1,
    "own/policy": 1,
    "paper/operators": 60,
    "paper/operators-small": 70,
    "paper/attentions": 21,
    "paper/attentions-small": 40,
    "paper/temperature": 18,
    "paper/temperature-small": 40,
    "paper/kernels": 12,
    "paper/kernels-small": 25,
    "paper/longer-small": 25,
}


def runs(name):
    return load_experiment(ROOT / f"{name}.yaml").runs


def values(name, pick):
    """How many runs have each value."""
    return Counter(pick(run.settings) for run in runs(name))


def test_every_file_is_known_here():
    files = {str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("*.yaml")}
    assert files == set(RUNS)


@pytest.mark.parametrize(("name", "number"), RUNS.items())
def test_a_file_describes_so_many_different_runs(name, number):
    found = runs(name)
    assert len(found) == number
    assert len({run.settings.digest() for run in found}) == number
    assert len({run.name for run in found}) == number
    kind = "centralised" if name.startswith("paper/") else "federated"
    assert {run.settings.kind for run in found} == {kind}


@pytest.mark.parametrize(
    "name", [name for name, runs in RUNS.items() if runs > 1 and not name.startswith("own/")]
)
def test_every_variant_is_run_with_three_seeds_or_five(name):
    seeds = 5 if name.endswith("-small") else 3
    assert set(values(name, lambda settings: settings.seed)) == set(range(seeds))


@pytest.mark.parametrize("name", ["compare", "compare-small", "paper/operators", "paper/operators-small"])
def test_comparisons_have_every_convolution(name):
    assert set(values(name, lambda settings: settings.model.conv)) == set(CONVS)


@pytest.mark.parametrize(
    "name", ["paper/operators", "paper/attentions", "paper/temperature", "paper/kernels"]
)
def test_full_size_files_follow_the_papers_recipe(name):
    for run in runs(name):
        train = run.settings.train
        assert (train.epochs, train.lr, train.momentum, train.weight_decay) == (100, 0.1, 0.9, 1e-4)
        assert (train.schedule, train.nesterov, run.settings.model.norm) == ("step", False, "batch")


@pytest.mark.parametrize("size", ["", "-small"])
def test_ablations_vary_what_the_paper_varies(size):
    def varied(name, pick):
        dynamic = (run.settings for run in runs(f"paper/{name}{size}") if run.settings.model.conv != "static")
        return set(map(pick, dynamic))

    assert (
        len(varied("attentions", lambda settings: settings.model.attentions)) == 7
    )  # all but the empty subset
    assert varied("kernels", lambda settings: settings.model.kernels) == {1, 2, 4, 8}
    temperatures = varied("temperature", lambda s: (s.temperature.initial, s.temperature.shape))
    assert temperatures >= {(34, "constant")} | {(t, "linear") for t in (30, 40, 52, 61, 100)}


@pytest.mark.parametrize("name", ["attentions", "temperature", "kernels", "operators", "longer"])
def test_small_files_have_a_static_network_to_compare_with(name):
    assert values(f"paper/{name}-small", lambda settings: settings.model.conv)["static"] >= 5


@pytest.mark.parametrize("name", ["compare", "compare-small"])
def test_every_client_of_a_comparison_has_a_device(name):
    for settings in {run.settings.partition.clients: run.settings for run in runs(name)}.values():
        clients = settings.partition.clients
        assert len(build_fleet(settings, [500] * clients).clients) == clients
