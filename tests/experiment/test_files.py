import pytest

from fedfmd.errors import SettingsError
from fedfmd.experiment import load_experiment, load_settings
from fedfmd.experiment.files import parse_overrides
from fedfmd.report.selection import Selection
from fedfmd.settings import Settings


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return write


def test_a_base_alone_is_one_run(write):
    experiment = load_experiment(write("base: {seed: 3, model: {conv: odconv}}"))
    (run,) = experiment.runs
    assert (experiment.name, run.name) == ("study", "")
    assert run.settings == Settings.from_mapping({"seed": 3, "model.conv": "odconv"})


def test_a_matrix_is_every_combination_and_its_last_key_varies_fastest(write):
    experiment = load_experiment(
        write("base: {seed: 9, train.lr: 0.2}\nmatrix: {model.conv: [static, fmdconv], seed: [0, 1]}")
    )
    assert [run.name for run in experiment.runs] == [
        "conv=static,seed=0",
        "conv=static,seed=1",
        "conv=fmdconv,seed=0",
        "conv=fmdconv,seed=1",
    ]
    assert [(run.settings.model.conv, run.settings.seed) for run in experiment.runs] == [
        ("static", 0),
        ("static", 1),
        ("fmdconv", 0),
        ("fmdconv", 1),
    ]
    assert {run.settings.train.lr for run in experiment.runs} == {0.2}


def test_a_kind_holds_for_all_runs(write):
    text = "kind: centralised\nbase: {train.epochs: 3, server.keep-checkpoints: 1}\nmatrix: {seed: [0, 1]}"
    runs = load_experiment(write(text)).runs
    assert [(run.settings.kind, run.settings.length) for run in runs] == [("centralised", 3)] * 2


def test_a_matrix_may_vary_several_settings_at_once(write):
    matrix = "{temperature: [{initial: 30}, {initial: 34, shape: constant}], seed: [0]}"
    runs = load_experiment(write(f"matrix: {matrix}")).runs
    assert [run.name for run in runs] == ["initial=30.0,seed=0", "initial=34.0,shape=constant,seed=0"]
    assert [run.settings.temperature.shape for run in runs] == ["linear", "constant"]


def test_several_matrices_add_up(write):
    text = "matrix: [{budget.policy: [wait, drop]}, {server.strategy: [fedbuff], seed: [0, 1]}]"
    names = ["policy=wait", "policy=drop", "strategy=fedbuff,seed=0", "strategy=fedbuff,seed=1"]
    assert [run.name for run in load_experiment(write(text)).runs] == names


@pytest.mark.parametrize(
    ("matrix", "names"),
    [
        ("{model.attentions: [[kernel], [input, kernel]]}", ["attentions=kernel", "attentions=input,kernel"]),
        ("{fleet: {devices: [{pi-4: 10}, phone]}}", ["devices=pi-4:10", "devices=phone"]),
        ("{data.train: [/srv/a.npz]}", ["train=-srv-a.npz"]),
        ("{model: [{conv: static}, {conv: fmdconv, kernels: 2}]}", ["conv=static", "conv=fmdconv,kernels=2"]),
    ],
)
def test_a_run_is_named_so_that_it_can_name_a_folder(matrix, names, write):
    assert [run.name for run in load_experiment(write(f"matrix: {matrix}")).runs] == names


def test_overrides_win_over_base_and_matrix(write):
    path = write("base: {train.lr: 0.2}\nmatrix: {model.conv: [static, fmdconv], seed: [0, 1]}")
    runs = load_experiment(path, ["train.lr=0.3", "model.conv=odconv"]).runs
    assert [run.name for run in runs] == ["seed=0", "seed=1"]
    assert {(run.settings.train.lr, run.settings.model.conv) for run in runs} == {(0.3, "odconv")}


def test_an_override_chooses_a_part_of_the_matrices(write):
    path = write(
        "matrix: [{partition: [{scheme: iid}, {scheme: dirichlet, alpha: 0.3}, {scheme: dirichlet, alpha: 1.0}]},"
        " {model.conv: [static], partition: [{scheme: iid}]}, {server.strategy: [fedbuff], seed: [0, 1]}]"
    )

    def names(*overrides):
        return [run.name for run in load_experiment(path, overrides).runs]

    assert names("partition.scheme=iid") == [
        "scheme=iid",
        "conv=static,scheme=iid",
        "strategy=fedbuff,seed=0",
        "strategy=fedbuff,seed=1",
    ]
    assert names("partition.alpha=0.3", "server.strategy=fedavg")[:2] == [
        "scheme=iid",
        "scheme=dirichlet,alpha=0.3",
    ]
    assert names("seed=1", "server.strategy=fedbuff", "model.conv=static") == [
        "scheme=iid",
        "scheme=dirichlet,alpha=0.3",
        "scheme=dirichlet,alpha=1.0",
        "base",
    ]


def test_of_runs_that_an_override_makes_equal_there_is_one(write):
    path = write("matrix: {server: [{strategy: fedavg}, {strategy: fednova}], seed: [0, 1]}")
    runs = load_experiment(path, ["server.strategy=fedprox"]).runs
    assert [run.name for run in runs] == ["strategy=fedprox,seed=0", "strategy=fedprox,seed=1"]


def test_no_run_of_several_lies_in_the_folder_of_all(write):
    assert [run.name for run in load_experiment(write("matrix: [{}, {seed: [1]}]")).runs] == [
        "base",
        "seed=1",
    ]


def test_an_override_wins_over_one_of_several_settings_that_vary_at_once(write):
    path = write("matrix: {temperature: [{initial: 30, rounds: 3}, {initial: 34, rounds: 3}]}")
    runs = load_experiment(path, ["temperature.rounds=5"]).runs
    assert [run.name for run in runs] == ["initial=30.0,rounds=5", "initial=34.0,rounds=5"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.lr=5e-4", {"train.lr": "5e-4"}),
        ("seed = 3", {"seed": 3}),
        ("resume=true", {"resume": True}),
        ("data.dir=", {"data.dir": ""}),
        ("data.dir=a=b", {"data.dir": "a=b"}),
        ("data.dir=[a", {"data.dir": "[a"}),
        ("fleet.devices=pi-4:4, phone:2", {"fleet.devices": "pi-4:4, phone:2"}),
        ("fleet.devices={pi-4: 4, phone: 2}", {"fleet.devices": "pi-4:4, phone:2"}),
        ("model={conv: static, kernels: 1}", {"model.conv": "static", "model.kernels": 1}),
        ("model.attentions=[input, kernel]", {"model.attentions": ["input", "kernel"]}),
    ],
)
def test_an_override_holds_a_yaml_value(text, values):
    assert parse_overrides([text]) == values


def test_the_last_override_of_a_key_wins():
    assert parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize("text", ["seed", "=3", " =3", ""])
def test_an_override_needs_a_key_and_a_value(text):
    with pytest.raises(SettingsError, match=f"--set '{text}': write key=value"):
        parse_overrides([text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1",
            r"study\.yaml must hold `base:` and may hold `matrix:`, `kind:` and `select:`, found seed",
        ),
        ("base: 3", r"study\.yaml: `base:` must hold settings, found int"),
        ("kind: central\nbase: {}", r"kind = 'central': must be one of federated, centralised"),
        (
            "base: {train.epochs: 3}",
            r"train\.epochs = 3 means nothing to a run of kind = federated: leave it",
        ),
        (
            "kind: centralised\nmatrix: {partition: {alpha: [0.1, 0.5]}}",
            r"partition\.alpha = 0\.1 means nothing to a run of kind = centralised: leave it out",
        ),
        ("matrix: {seed: 3}", r"matrix: seed = 3 must be a list of at least one value"),
        ("matrix: {seed: []}", r"matrix: seed = \[\] must be a list"),
        ("matrix: [{seed: [1]}, 3]", r"study\.yaml: `matrix:` must hold settings, found int"),
        ("matrix: []", r"study\.yaml: `matrix: \[\]` describes no run: list at least one"),
        ("matrix: {sed: [1]}", r"unknown setting sed = 1; the nearest one is seed"),
        ("matrix: {seed: [0, one]}", r"seed = 'one': .*integer"),
    ],
)
def test_a_file_that_describes_no_experiment_is_one_line(text, message, write):
    with pytest.raises(SettingsError, match=message):
        load_experiment(write(text))


SELECT = """
base: {data.validation: 0.1}
matrix: {model.conv: [static, fmdconv], train.lr: [0.02, 0.1], seed: [0, 1]}
select: {over: train.lr, by: validation, seeds: [100]}
"""


def test_trials_are_every_variant_and_value_with_the_seeds_that_choose(write):
    experiment = load_experiment(write(SELECT))
    assert experiment.selection == Selection(("train.lr",), (100,))
    assert [run.name for run in experiment.trials] == [
        "conv=static,lr=0.02,seed=100",
        "conv=static,lr=0.1,seed=100",
        "conv=fmdconv,lr=0.02,seed=100",
        "conv=fmdconv,lr=0.1,seed=100",
    ]
    assert len(experiment.runs) == 8
    trial, *_ = load_experiment(write(SELECT), ["seed=3"]).trials
    assert trial.settings.seed == 100  # an override's seed is for what is reported


def test_without_seeds_of_its_own_a_selection_is_among_all_runs(write):
    experiment = load_experiment(write(SELECT.replace(", seeds: [100]", "")))
    assert (experiment.selection, experiment.trials) == (Selection(("train.lr",)), ())
    assert len(experiment.runs) == 8


def test_an_override_leaves_nothing_to_select(write):
    experiment = load_experiment(write(SELECT), ["train.lr=0.3"])
    assert (experiment.selection, experiment.trials) == (None, ())
    assert {run.settings.train.lr for run in experiment.runs} == {0.3}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "[0.02, 0.1]",
            "[0.1]",
            r"select: over = 'train\.lr': the matrix has one value of it, 0\.1: give it",
        ),
        (
            "0.1}\nm",
            "0}\nm",
            r"data\.validation = 0 in conv=static,lr=0\.02,seed=0, and select: by = validation",
        ),
        ("seeds: [100]", "seeds: [5, 1]", r"select: seeds = \[5, 1\]: 1 is a seed of the matrix too"),
        ("by: validation", "by: test", r"select: by = 'test': must be validation"),
    ],
)
def test_a_selection_that_cannot_be_made_is_one_line(before, after, message, write):
    assert before in SELECT
    with pytest.raises(SettingsError, match=message):
        load_experiment(write(SELECT.replace(before, after)))


def test_settings_of_a_single_run(write):
    assert load_settings(None, ["seed=2"]) == Settings(seed=2)
    path = write("base: {seed: 1}\nmatrix: {model.conv: [static, fmdconv]}")
    assert load_settings(path, ["model.conv=static"]).model.conv == "static"
    with pytest.raises(SettingsError, match=r"study\.yaml describes 2 runs: choose one by --set"):
        load_settings(path)
