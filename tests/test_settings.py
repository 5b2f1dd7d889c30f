import tomllib
from pathlib import Path

import pytest

from fedfmd.conv import make_conv
from fedfmd.errors import SettingsError
from fedfmd.experiment import load_experiment
from fedfmd.settings import Settings, flatten, read_yaml

ROOT = Path(__file__).parents[1]


def test_the_quickstart_is_the_defaults_with_a_deadline():
    (run,) = load_experiment(ROOT / "experiments" / "quickstart.yaml").runs
    deadline = {"budget.deadline-s": 5.0, "budget.policy": "partial"}
    assert run.settings.kept() == Settings().kept() | deadline


def test_by_default_nobody_is_cut_short():
    budget = Settings().budget
    assert (budget.policy, budget.deadline_s, budget.energy_j, budget.up_bytes) == ("wait", 0, 0, 0)


@pytest.mark.parametrize("limit", ["deadline-s", "energy-j", "up-bytes"])
def test_a_limit_needs_a_policy_because_the_default_heeds_none(limit):
    with pytest.raises(
        SettingsError, match=rf"^budget\.{limit} = 5 but no budget\.policy: .*'wait'.* one of wait,"
    ):
        Settings.from_mapping({f"budget.{limit}": 5})
    for policy in ("wait", "partial"):
        settings = Settings.from_mapping({f"budget.{limit}": 5, "budget.policy": policy})
        assert Settings.from_mapping(settings.flat()) == settings


def test_flwr_run_has_the_same_defaults_of_the_same_types():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    config, defaults = flatten(app["config"]), Settings().flat()
    assert config == defaults
    assert {key: type(value) for key, value in config.items()} == {
        key: type(value) for key, value in defaults.items()
    }


def test_keys_are_nested_dotted_or_both():
    nested = Settings.from_mapping({"train": {"batch-size": 8, "lr": 0.2}, "seed": 3})
    assert nested == Settings.from_mapping({"train.batch-size": 8, "train": {"lr": 0.2}, "seed": 3})
    assert (nested.train.batch_size, nested.train.lr, nested.seed) == (8, 0.2, 3)
    assert nested.model == Settings().model


def test_a_run_config_holds_scalars_that_make_the_same_settings():
    settings = Settings.from_mapping({"model.attentions": ["kernel"], "fleet.devices": {"phone": "100%"}})
    flat = settings.flat()
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert Settings.from_mapping(flat) == settings


@pytest.mark.parametrize(
    "value", [["input", "kernel"], "input,kernel", " input , kernel ", '["input", "kernel"]']
)
def test_a_list_may_be_yaml_json_or_words(value):
    assert Settings.from_mapping({"model.attentions": value}).model.attentions == ("input", "kernel")


@pytest.mark.parametrize(
    "key", [{"fleet": {"devices": {"pi-4": 4, "phone": 2}}}, {"fleet.devices": {"pi-4": 4, "phone": 2}}]
)
def test_a_fleet_may_be_a_mapping(key):
    assert Settings.from_mapping(key).fleet.devices == "pi-4:4, phone:2"


@pytest.mark.parametrize(("value", "number"), [("5e-4", 5e-4), (1, 1.0), ("2", 2.0)])
def test_a_number_may_be_a_text_because_yaml_reads_5e_4_as_one(value, number):
    assert Settings.from_mapping({"train.lr": value}).train.lr == number


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.momentun": 1}, "unknown setting train.momentun = 1; the nearest one is train.momentum"),
        (
            {"train": {"batch_size": 1}},
            "unknown setting train.batch_size = 1; the nearest one is train.batch-size",
        ),
        ({"model": "fmdconv"}, "model = 'fmdconv': model is a group of settings: model.arch, "),
        ({"model": {"conv": "odconv"}, "model.conv": "dyconv"}, "setting model.conv is given twice"),
        (
            {"model.conv": "fmdcnv"},
            "model.conv = 'fmdcnv': must be one of static, .*; did you mean 'fmdconv'?",
        ),
        ({"model.arch": ["resnet8"]}, r"model.arch = \['resnet8'\]: must be one of"),
        (
            {"model.attentions": "input,kernal"},
            "model.attentions = 'kernal': must be one of .*; did you mean 'kernel'?",
        ),
        ({"model.attentions": []}, r"model.attentions = \(?\[?.*: .*at least 1 item"),
        ({"model.attentions": "[input"}, "model.attentions = .* is not a JSON list"),
        ({"kind": "central"}, "kind = 'central': must be one of federated, centralised; did you mean"),
        ({"model.stem": "resnet"}, "model.stem = 'resnet': .*'cifar' or 'imagenet'"),
        ({"data.validation": -0.1}, "data.validation = -0.1: .*greater than or equal to 0"),
        ({"data.validation": 1.5}, "data.validation = 1.5: must be a share below 1, or a whole number of"),
        (
            {"data.augment": "flip"},
            "data.augment = 'flip': must be one of auto, none, crop, .*; did you mean",
        ),
        ({"data.augment": True}, "data.augment = True: must be one of auto, none"),
        ({"data.download": "yes"}, "data.download = 'yes': .*boolean"),
        ({"partition.alpha": 0}, "partition.alpha = 0: .*greater than 0"),
        ({"server.rounds": "abc"}, "server.rounds = 'abc': .*integer"),
        ({"server.rounds": 2.5}, "server.rounds = 2.5: .*integer"),
        ({"server.rounds": True}, "server.rounds = True: .*integer"),
        ({"train.lr": True}, "train.lr = True: must be a number"),
        ({"train.lr": None}, "train.lr = None: .*number"),
        ({"train.lr": float("nan")}, "train.lr = nan: .*finite"),
        ({"train.momentum": float("nan")}, "train.momentum = nan: .*finite"),
        ({"train.momentum": 1}, "train.momentum = 1: .*less than 1"),
        ({"budget.deadline-s": -1}, "budget.deadline-s = -1: .*greater than or equal to 0"),
        (
            {"fleet.assignment": "sized"},
            "fleet.assignment = 'sized': must be one of .*; did you mean 'size'?",
        ),
        ({"fleet.availability": 1.5}, "fleet.availability = 1.5: .*less than or equal to 1"),
        ({"fleet.jitter": 3}, "fleet.jitter = 3: .*less than or equal to 2"),
        ({"budget.over-select": 0.5}, "budget.over-select = 0.5: .*greater than or equal to 1"),
        ({"budget.min-reports": 2}, "budget.min-reports = 2: .*less than or equal to 1"),
        ({"budget.policy": "kernel"}, "budget.policy = 'kernel': must be .*; did you mean 'kernels'?"),
        (
            {"budget.over-select": 1.3},
            "budget.over-select = 1.3 asks more than server.clients-per-round, which is 0, all: ask for fewer",
        ),
        (
            {"budget.policy": "partial+kernels", "model.conv": "static"},
            "budget.policy = 'partial\\+kernels' trains some kernels of each bank, and model.conv = 'static' has no",
        ),
        (
            {"budget.policy": "kernels", "budget.kernels": 5},
            "budget.kernels = 5 but model.kernels = 4: train at most that many, or 0",
        ),
        (
            {
                "budget.policy": "kernels",
                "budget.kernel-choice": "attention",
                "model.attentions": "input,output",
            },
            "budget.kernel-choice = 'attention' needs kernel attention, and model.attentions = 'input,output' has none",
        ),
        (
            {"budget.policy": "partial", "budget.kernels": 2},
            "budget.kernels = 2 has no effect with budget.policy = 'partial': it belongs to kernels, partial\\+kernels",
        ),
        (
            {"budget.kernel-choice": "attention"},
            "budget.kernel-choice = 'attention' has no effect with budget.policy = 'wait': it belongs to kernels, part",
        ),
        (
            {"privacy.mode": "local"},
            "privacy.mode = 'local' has no effect without privacy.clip-norm, which is 0",
        ),
        (
            {"train.optimiser": "adma"},
            "train.optimiser = 'adma': must be one of sgd, adam, adamw, or module:Class",
        ),
        (
            {"train.loss": "mse"},
            "train.loss = 'mse': must be one of cross-entropy, or module:function of your own",
        ),
        ({"train.label-smoothing": 1}, "train.label-smoothing = 1: .*less than 1"),
        (
            {"train.label-smoothing": 0.1, "train.loss": "mine:loss"},
            "train.label-smoothing = 0.1 has no effect with train.loss = 'mine:loss': leave it out",
        ),
        ({"train.clip-norm": -1}, "train.clip-norm = -1: .*greater than or equal to 0"),
        (
            {"train.lr-warmup": 20},
            "train.lr-warmup = 20 but server.rounds = 20: the rate must reach train.lr",
        ),
        (
            {"kind": "centralised", "train.lr-warmup": 100},
            "train.lr-warmup = 100 but train.epochs = 100: the rate must",
        ),
        (
            {"train.cuda-graphs": True, "train.torch-compile": True, "device": "auto"},
            "train.torch-compile = true and train.cuda-graphs = true: .*, leave one out",
        ),
        ({"train.cuda-graphs": True}, "train.cuda-graphs = true replays steps on a GPU, and device = 'cpu'"),
        ({"partition.test-share": 1}, "partition.test-share = 1: .*less than 1"),
        ({"server.stop-at": 0.5}, "server.stop-at = 0.5: '0.5' must be name=value, such as accuracy=0.95"),
        ({"server.stop-at": "acc=1"}, "server.stop-at = 'acc=1': 'acc' must be one of accuracy, seconds, mb"),
        (
            {"kind": "centralised", "server.stop-at": "mb=1"},
            "server.stop-at = 'mb=1': centralised training knows no mb: use accuracy or seconds",
        ),
        ({"seed": 2**63}, "seed = 9223372036854775808: .*less than"),
        (
            {"server.clients-per-round": 11},
            "server.clients-per-round = 11 but partition.clients = 10: ask for at most",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_key_and_value(values, message):
    with pytest.raises(SettingsError, match=f"^{message}") as error:
        Settings.from_mapping(values)
    assert "\n" not in str(error.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(SettingsError, match=r"train\.lr = 0: .*; server\.rounds = 0: "):
        Settings.from_mapping({"train.lr": 0, "server.rounds": 0})


def test_settings_that_came_later_leave_the_digest_of_earlier_runs():
    """The digest of the defaults as it was before ``server.max-update-norm``."""
    assert Settings().digest() == "7255d394"
    limited = Settings.from_mapping({"server.max-update-ratio": 3})
    assert limited.digest() != Settings().digest()


def test_the_digest_tells_runs_apart_but_not_where_they_are_kept():
    settings = Settings()
    assert settings.digest() == Settings.from_mapping({"threads": 2}).in_folder(Path("elsewhere")).digest()
    assert settings.digest() != Settings.from_mapping({"seed": 1}).digest()


def test_a_kind_of_run_has_settings_that_mean_nothing_to_it():
    federated, centralised = Settings(), Settings(kind="centralised")
    assert federated.unused == {"train.epochs", "train.checkpoint-s", "data.workers"}
    assert {key.partition(".")[0] for key in centralised.kept()} == {
        *("kind", "model", "data", "train", "temperature", "server", "tracking", "seed", "device", "threads"),
        *("run-dir", "resume"),
    }
    assert {key for key in centralised.kept() if key.startswith("server.")} == {
        "server.checkpoint-every",
        "server.keep-checkpoints",
    }
    assert not centralised.unused & {"train.epochs", "train.lr", "train.schedule", "temperature.rounds"}


def test_settings_that_mean_nothing_to_a_run_do_not_tell_it_apart():
    for kind, key in (("federated", "train.epochs"), ("centralised", "server.rounds")):
        runs = [Settings.from_mapping({"kind": kind, key: value}) for value in (3, 4)]
        assert runs[0].digest() == runs[1].digest()


def test_a_run_is_as_long_as_its_rounds_or_epochs():
    both = {"server.rounds": 4, "train.epochs": 7}
    kinds = ("federated", "centralised")
    assert [Settings.from_mapping(both | {"kind": kind}).length for kind in kinds] == [4, 7]


def test_neutral_settings_exist():
    assert Settings().flat().keys() >= Settings.NEUTRAL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*file\.yaml: No such file"),
        (b"base: [", r"file\.yaml is not YAML: .*line 1"),
        (b"base: {seed: 1, seed: 2}", r"file\.yaml is not YAML: the key 'seed' is given twice .*line 1"),
        (b"\xff\xfe\xfa", r"file\.yaml is not YAML: "),
        (b"- base", r"file\.yaml must hold `key: value` pairs, not \['base'\]"),
        (b"", r"file\.yaml must hold `key: value` pairs, not None"),
    ],
)
def test_a_yaml_file_that_holds_no_settings_is_one_line(content, message, tmp_path):
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given", ["kernel-reduction:0.5", {"kernel-reduction": 0.5}, " kernel-reduction: 0.5 "], ids=repr
)
def test_an_option_of_the_convolution_alone_reaches_it(given):
    model = Settings.from_mapping({"model.conv-options": given, "model.kernels": 2}).model
    assert model.options()["kernel_reduction"] == 0.5
    layer = make_conv(model.conv, 8, 8, 3, **model.options())
    assert (layer.kernels, layer.attention["kernel"].squeeze.out_features) == (2, 5)


@pytest.mark.parametrize(
    ("conv", "options", "message"),
    [
        (
            "fmdconv",
            "kernel-redction:0.5",
            "no option 'kernel-redction'; those of fmdconv are kernel-reduction, annealed",
        ),
        ("fmdconv", "kernels:2", "no option 'kernels'; those of fmdconv are kernel-reduction"),
        ("fmdconv", "annealed:1", "annealed must be like its default, False"),
        ("fmdconv", "kernel-reduction:much", r"kernel-reduction must be like its default, 0\.25"),
        ("fmdconv", "kernel-reduction:@", r"kernel-reduction must be like its default, 0\.25"),
        ("static", "kernel-reduction:0.5", "no option 'kernel-reduction'; static has none"),
    ],
)
def test_an_option_that_the_convolution_does_not_have_is_refused(conv, options, message):
    with pytest.raises(SettingsError, match=f"^model.conv-options = '{options}': {message}"):
        Settings.from_mapping({"model.conv": conv, "model.conv-options": options})


def test_kernels_can_be_chosen_by_attention_only_where_images_weigh_them():
    choice = {"budget.policy": "kernels", "budget.deadline-s": 9, "budget.kernel-choice": "attention"}
    for conv in ("condconv", "dyconv", "odconv", "fmdconv"):
        Settings.from_mapping(choice | {"model.conv": conv})


def test_settings_of_a_users_own_code_are_told_without_importing_it():
    own = dict.fromkeys(Settings.OWN, "mine:thing")
    settings = Settings.from_mapping(own)
    assert settings.own_code == own
    assert Settings.from_mapping(settings.flat()) == settings
    centralised = Settings.from_mapping(own | {"kind": "centralised"}).own_code
    assert own.keys() - centralised.keys() == {"partition.scheme", "server.strategy", "budget.policy"}
    assert Settings().own_code == {}


def test_settings_that_came_later_leave_the_names_of_earlier_runs():
    later = {
        "train.optimiser": "adam",
        "train.lr-warmup": 1,
        "partition.test-share": 0.1,
        "server.stop-at": "mb=1",
    }
    assert not Settings().kept().keys() & Settings.OPTIONAL
    assert Settings.from_mapping(later).kept().items() >= later.items()


def test_momentum_of_nesterovs_is_asked_of_sgd_alone():
    with pytest.raises(SettingsError, match=r"train\.nesterov = True needs train\.momentum > 0"):
        Settings.from_mapping({"train.momentum": 0})
    Settings.from_mapping({"train.momentum": 0, "train.optimiser": "adam"})


@pytest.mark.parametrize(
    ("changes", "in_columns"),
    [
        ({}, False),
        ({"server.csv-rows": 99}, True),
        (
            {
                "partition.clients": 20,
                "server.clients-per-round": 10,
                "budget.over-select": 1.1,
                "budget.policy": "drop",
            },
            True,
        ),
        ({"partition.clients": 1000}, True),
        ({"partition.clients": 1000, "server.clients-per-round": 10}, False),
    ],
)
def test_more_rows_of_clients_than_a_csv_file_may_have_go_to_columns(changes, in_columns):
    base = {"server.rounds": 10, "partition.clients": 10, "server.csv-rows": 100}
    settings = Settings.from_mapping(base | changes)
    assert settings.clients_in_columns is in_columns
    assert (
        Settings.from_mapping(base | {"server.csv-rows": 0}).digest() == Settings.from_mapping(base).digest()
    )
