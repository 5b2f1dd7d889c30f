import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fedfmd import cli
from fedfmd.conv import CONVS
from fedfmd.edge import DEVICES, device_text, read_devices
from fedfmd.errors import RunError
from fedfmd.settings import Settings
from fedfmd.version import __version__

COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.cli.registered_commands)


@pytest.fixture
def fedfmd(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedfmd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def npz(tmp_path):
    """Two npz files, of which the second has no labels."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "good.npz", images=images, labels=[0, 1, 0, 1])
    np.savez(tmp_path / "unlabelled.npz", images=images)


def test_a_run_ends_with_0_and_says_where_its_results_are(fedfmd, write_yaml, tmp_path):
    status, out, err = fedfmd("run", write_yaml(), "--out", "results", "--set", "seed=1", "--workers", 1)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"results: {tmp_path / 'results'}"
    refused, _, err = fedfmd("run", write_yaml(), "--out", "results", "--set", "seed=2")
    assert refused == 2
    assert err == (
        f"fedfmd: run-dir = {tmp_path / 'results'} holds a run with other settings (seed was 1, is 2): "
        "name another folder\n"
    )


def test_a_dry_run_lists_the_cells_and_writes_nothing(fedfmd, write_yaml, tmp_path):
    file = write_yaml(matrix={"seed": [0, 1]})
    before = set(tmp_path.rglob("*"))
    status, out, err = fedfmd("run", file, "--dry-run", "--workers", 2)
    assert (status, err) == (0, "")
    assert "seed=0" in out
    assert "2, 2 at a time" in out
    status, out, _ = fedfmd("run", file, "--dry-run", "--json")
    estimate = json.loads(out)
    assert status == 0
    assert [cell["cell"] for cell in estimate["cells"]] == ["seed=0", "seed=1"]
    assert estimate["train_flops"] == sum(cell["train_flops"] for cell in estimate["cells"]) > 0
    assert set(tmp_path.rglob("*")) == before


def test_a_report_packs_the_runs_and_is_written_beside_them(fedfmd, write_yaml, tmp_path):
    fedfmd("run", write_yaml(), "--out", "runs/a", "--workers", 1)
    status, out, _ = fedfmd("report", "runs", "--pack", "study", "--json")
    assert status == 0
    names = {"rounds.csv", "clients.csv", "runs.json", "report.md", "report.csv", "report.html", "curves.png"}
    names.add("report_files")
    assert {path.name for path in (tmp_path / "study").iterdir()} == names
    status, again, _ = fedfmd("report", "study", "--json")
    assert (status, again) == (0, out)
    refused, _, err = fedfmd("report", "runs", "--pack", "runs/a")
    assert refused == 2
    assert err == "fedfmd: --pack runs/a is the folder of a run, whose rows would be lost: name another\n"


def test_json_without_a_dry_run_is_refused(fedfmd, write_yaml):
    status, _, err = fedfmd("run", write_yaml(), "--json")
    assert (status, err) == (
        2,
        "fedfmd: --json prints the list of --dry-run: add --dry-run, or leave --json out\n",
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.learning-rates=1", "unknown setting train.learning-rates = 1; "),
        ("model.conv=fmdcnv", "model.conv = 'fmdcnv': "),
        ("model.attentions=kernal", "model.attentions = 'kernal': "),
        ("server.strategy=fedagv", "server.strategy = 'fedagv': "),
        ("server.rounds=abc", "server.rounds = 'abc': "),
        ("server.rounds=2.5", "server.rounds = 2.5: "),
        ("train.lr=nan", "train.lr = 'nan': "),
        ("train.lr=.nan", "train.lr = nan: "),
        ("partition.alpha=0", "partition.alpha = 0: "),
        ("partition.clients=10000", "partition.clients = 10000 "),
        ("budget.deadline-s=-1", "budget.deadline-s = -1: "),
        ("fleet.devices=pi-44:3", "fleet.devices: "),
        ("fleet.devices=pi-4:9", "fleet.devices "),
        ("device=gpu", "device = 'gpu': "),
        ("data={dataset: npz, train: none.npz, test: good.npz}", "data.train = none.npz: "),
        (
            "data={dataset: npz, train: unlabelled.npz, test: good.npz}",
            "data.train = unlabelled.npz: ",
        ),
        ("data={dataset: npz, train: good.npz, image-size: 0}", "data.test "),
        ("data={dataset: cifar10}", "data.dir "),
        ("data={dataset: cifar10, dir: images}", "data.dir = images: "),
        ("data.dataset=cifar11", "data.dataset = 'cifar11': "),
        ("seed", "--set 'seed': "),
    ],
)
@pytest.mark.parametrize("engine", ["inline", "flwr"])
def test_a_bad_setting_is_one_line_and_nothing_is_written(
    engine, setting, message, fedfmd, write_yaml, npz, tmp_path
):
    file = write_yaml()
    before = set(tmp_path.rglob("*"))
    status, out, err = fedfmd("run", file, "--engine", engine, "--set", setting)
    assert (status, out) == (2, "")
    assert err.startswith(f"fedfmd: {message}")
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read file.yaml: "),
        ("base: {seed: [", "file.yaml "),
        ("matrix: []", "file.yaml: `matrix: []` "),
        ("seed: 1", "file.yaml "),
        ("base: {sede: 1}", "unknown setting sede = 1; "),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["partition", "--out", "split"]])
def test_a_bad_file_is_one_line_and_nothing_is_written(command, content, message, fedfmd, tmp_path):
    if content is not None:
        (tmp_path / "file.yaml").write_text(content)
    before = set(tmp_path.iterdir())
    status, out, err = fedfmd(*command, "file.yaml")
    assert (status, out) == (2, "")
    assert err.startswith(f"fedfmd: {message}")
    assert err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RunError("round 3: all clients failed"), 1, "round 3: all clients failed"),
        (OSError("no space left"), 1, "no space left"),
        (KeyboardInterrupt(), 130, "stopped; finished rounds are kept"),
    ],
)
def test_a_run_that_cannot_go_on_is_one_line(error, status, message, fedfmd, write_yaml, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("fedfmd.experiment.run_experiment", fail)
    ended, out, err = fedfmd("run", write_yaml())
    assert (ended, out) == (status, "")
    assert err.startswith(f"fedfmd: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["run"], ["rnu"], ["cost", "--classes", "1"], ["run", "a.yaml", "--engine", "x"]]
)
def test_wrong_usage_ends_with_2(arguments, fedfmd):
    status, out, err = fedfmd(*arguments)
    assert (status, out) == (2, "")
    assert "Error: " in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, fedfmd):
    status, out, err = fedfmd(command, "--help")
    assert (status, err) == (0, "")
    assert f"Example: fedfmd {command} " in " ".join([*out.split(), ""])


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_plain_and_whole(command, width, fedfmd, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, _ = fedfmd(*filter(None, [command]), "--help")
    assert status == 0
    assert "\\" not in out
    assert "..." not in out.partition("Options:")[2]  # before, it says that there may be several arguments
    assert max(map(len, out.splitlines())) <= width


def test_the_version_is_told_without_a_command(fedfmd):
    assert fedfmd("--version") == (0, f"fedfmd {__version__}\n", "")


def test_the_package_is_a_command_too(tmp_path):
    command = [sys.executable, "-m", "fedfmd", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fedfmd {__version__}\n")


def test_settings_are_listed_as_table_or_json(fedfmd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = fedfmd("settings", "train.")
    assert (status, err) == (0, "")
    assert "train.weight-decay" in out
    assert "cosine to 0" in out
    assert "fleet." not in out
    status, out, _ = fedfmd("settings", "learning", "rate")
    assert "train.lr" in out
    assert "train.momentum" not in out
    status, out, _ = fedfmd("settings", "--json")
    assert status == 0
    rows = {row["key"]: row for row in json.loads(out)}
    assert {key: row["default"] for key, row in rows.items()} == Settings().flat()
    sources = ["digits", "cifar10", "cifar100", "npz", "imagefolder"]
    assert rows["data.dataset"]["choices"] == [*sources, "module:function"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["settings"],
        ["cost", "--model", "resnet8", "--width", 0.25],
        ["run", "tiny.yaml", "--out", "run×", "--workers", 1],
        ["report", "runs"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_terminal_without_unicode_gets_question_marks(
    arguments, fedfmd, write_yaml, write_run, monkeypatch
):
    write_yaml()
    for seed in (0, 1):
        write_run(f"{seed}", [0.5, 0.6], seed=seed)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    status, _, err = fedfmd(*arguments)
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("ascii")
    assert (status, err) == (0, "")
    assert "?" in shown


def test_settings_that_no_word_finds_are_one_line_with_the_nearest(fedfmd):
    assert fedfmd("settings", "temprature") == (
        2,
        "",
        "fedfmd: no setting tells of 'temprature'; the nearest word is 'temperature'\n",
    )


def test_init_writes_an_experiment_and_code_that_can_be_run(fedfmd, tmp_path):
    status, out, err = fedfmd("init", "mine")
    assert (status, err) == (0, "now: fedfmd run mine/experiment.yaml\n")
    assert {tmp_path / line for line in out.splitlines()} == set((tmp_path / "mine").iterdir())
    own = ["--set", "server.strategy=algorithm:EqualVotes", "--set", "server.rounds=1"]
    small = ["--set", "partition.clients=2", "--set", "fleet.devices=pi-4:2", "--set", "model.width=0.25"]
    assert fedfmd("run", "mine/experiment.yaml", *own, *small, "--out", "run", "--workers", 1)[0] == 0
    again, _, err = fedfmd("init", "mine")
    assert again == 2
    assert err.startswith("fedfmd: mine/algorithm.py is there already")


@pytest.mark.parametrize(
    ("complete", "incomplete", "completions"),
    [
        (cli._complete_experiment, "qu", ["quickstart"]),
        (cli._complete_experiment, "m", ["mine/", "mine.yaml"]),
        (cli._complete_experiment, "mine/", ["mine/own.yaml"]),
        (cli._complete_experiment, "none/", []),
        (cli._complete_setting, "train.lo", ["train.local-epochs=", "train.loss="]),
        (cli._complete_setting, "model.conv=f", ["model.conv=fmdconv"]),
        (cli._complete_setting, "none=", []),
        (cli._complete_value("model.arch"), "resnet3", ["resnet34"]),
    ],
)
def test_shells_complete_files_examples_and_settings(
    complete, incomplete, completions, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for file in ("mine.yaml", "mine.txt", "mine/own.yaml"):
        (tmp_path / file).touch()
    assert complete(incomplete) == completions


def test_help_is_quick_because_it_imports_no_torch():
    code = "import sys, fedfmd.cli; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_report_chooses_only_settings(fedfmd, tmp_path):
    status, out, err = fedfmd("report", tmp_path, "--select", "train.rl")
    assert (status, out) == (2, "")
    assert err == (
        "fedfmd: select: over = 'train.rl': nothing that can be chosen; the nearest setting is train.lr\n"
    )


def test_cost_prints_a_table_or_json(fedfmd):
    options = ["cost", "--model", "resnet8", "--width", 0.5, "--classes", 7]
    status, out, err = fedfmd(*options)
    assert (status, err) == (0, "")
    assert "resnet8 (width 0.5, K=4), 7 classes, one image of 32×32" in out
    status, out, _ = fedfmd(*options, "--json")
    assert status == 0
    assert [row["conv"] for row in json.loads(out)] == list(CONVS)


def test_cost_counts_the_network_that_a_run_trains(fedfmd):
    from fedfmd.build import build_model
    from fedfmd.cost import count

    rows = json.loads(fedfmd("cost", "--model", Settings().model.arch, "--json")[1])
    counted = {row["conv"]: row["params"] for row in rows}
    assert counted["fmdconv"] == count(build_model(Settings(), classes=10), 32).params


def test_cost_of_an_unknown_model_suggests_the_nearest(fedfmd):
    status, _, err = fedfmd("cost", "--model", "resnt8")
    assert status == 2
    assert err.startswith("fedfmd: model.arch = 'resnt8': must be one of ")
    assert err.endswith("did you mean 'resnet8'?\n")


@pytest.fixture
def quick_calibration(monkeypatch):
    monkeypatch.setattr("fedfmd.calibration.ROUND_S", 0)
    network = ["--conv", "fmdconv", "--kernels", 2, "--kernels", 1, "--batch-size", 2, "--image-size", 8]
    return ["calibrate", *network, "--threads", 1, "--repeats", 1]


def test_calibrate_writes_a_device_and_prints_its_timings(fedfmd, quick_calibration, tmp_path):
    (tmp_path / "boxes.yaml").write_text(device_text(DEVICES["pi-4"]))
    link = ["--power-w", 5, "--down-mbps", 40, "--name", "mine", "--out", "boxes.yaml"]
    status, out, err = fedfmd(*quick_calibration, *link, "--json")
    assert (status, err.splitlines()[-1].partition(",")[0]) == (0, "boxes.yaml: mine")
    networks = (("static", 1), ("fmdconv", 2), ("fmdconv", 1))
    assert [(row["conv"], row["kernels"], row["batch_size"]) for row in json.loads(out)] == [
        (*network, size) for network in networks for size in (1, 2)
    ]
    devices = read_devices(tmp_path / "boxes.yaml")
    assert devices.keys() == {"pi-4", "mine"}
    mine = devices["mine"]
    assert (mine.power_w, mine.down_mbps, mine.estimate) == (5, 40, ())
    assert [*map(str, mine.efficiency)] == ["static", "fmdconv/2", "fmdconv/1"]
    assert [*map(str, mine.models)] == ["resnet8/static", "resnet8/fmdconv/2", "resnet8/fmdconv/1"]


def test_calibrate_prints_a_table(fedfmd, quick_calibration, tmp_path):
    status, out, _ = fedfmd(*quick_calibration)
    assert status == 0
    assert "training ms" in out
    assert (tmp_path / "box.yaml").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnt8"], "model.arch = 'resnt8': "),
        (["--conv", "fmdcnv"], "model.conv = 'fmdcnv': "),
        (["--norm", "layer"], "model.norm = 'layer': "),
        (["--name", "a b"], "--name 'a b': "),
        (["--out", "nowhere/box.yaml"], "--out nowhere/box.yaml: "),
    ],
)
def test_calibrate_refuses_before_it_measures(fedfmd, tmp_path, options, message):
    status, out, err = fedfmd("calibrate", *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"fedfmd: {message}")
    assert list(tmp_path.iterdir()) == []


def test_partition_writes_the_split_and_prints_it(fedfmd, write_yaml, tmp_path):
    status, out, err = fedfmd("partition", write_yaml(), "--set", "seed=4", "--out", "split")
    assert (status, err) == (0, "")
    assert "digits: iid, seed 4" in out
    assert {path.name for path in (tmp_path / "split").iterdir()} == {"partition.npz", "partition.png"}
    status, out, _ = fedfmd("partition", write_yaml(), "--out", "split", "--json")
    assert status == 0
    assert [row["images"] for row in json.loads(out)] == [479, 479, 479]


def test_partition_without_a_file_splits_the_default(fedfmd):
    status, out, _ = fedfmd("partition", "--set", "partition.scheme=iid", "--out", "split", "--json")
    assert status == 0
    assert sum(row["images"] for row in json.loads(out)) == 1437


def test_export_prints_the_file(fedfmd, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("fedfmd.experiment.export_checkpoint", lambda *given: asked.append(given) or given[2])
    status, out, _ = fedfmd("export", "a.safetensors", "--format", "torch-export", "--out", "a.pt2")
    assert (status, out) == (0, "a.pt2\n")
    ((checkpoint, target, path, image_size),) = asked
    assert (checkpoint.name, target, path.name, image_size) == (
        "a.safetensors",
        "torch-export",
        "a.pt2",
        None,
    )


def test_export_of_a_missing_checkpoint_is_one_line(fedfmd):
    status, _, err = fedfmd("export", "none.safetensors")
    assert status == 2
    assert err.startswith("fedfmd: ")
    assert "none.safetensors" in err
    assert err.count("\n") == 1


def test_export_into_a_folder_is_refused(fedfmd, tmp_path):
    status, _, err = fedfmd("export", "a.safetensors", "--out", tmp_path)
    assert status == 2
    assert err.endswith("is a directory.\n")


@pytest.mark.parametrize("command", [("export",), ("cam", "test:3")], ids=["export", "cam"])
def test_no_command_overwrites_what_it_reads(command, fedfmd, write_checkpoint):
    checkpoint = write_checkpoint()
    before = checkpoint.read_bytes()
    name, *others = command
    status, _, err = fedfmd(name, checkpoint, *others, "--out", checkpoint)
    assert status == 2
    assert (
        err
        == f"fedfmd: --out = {checkpoint}: would overwrite {checkpoint}, which is read; name another file\n"
    )
    assert checkpoint.read_bytes() == before


def wide_runs(row):
    """How many runs of more than 100 pixels that aren't white a row of a picture has."""
    inked = np.concatenate([[0], (row != 255).any(1), [0]]).astype(int)
    starts, ends = np.flatnonzero(np.diff(inked) == 1), np.flatnonzero(np.diff(inked) == -1)
    return int((ends - starts > 100).sum())


@pytest.mark.parametrize(("conv", "panels"), [("fmdconv", 5), ("dyconv", 2), ("static", 2)])
def test_cam_draws_a_row_per_image_and_a_column_per_attention(
    conv, panels, fedfmd, write_checkpoint, tmp_path
):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    checkpoint = write_checkpoint(**{"model.conv": conv})
    status, out, err = fedfmd("cam", checkpoint, "red.png", "blue.png", "test:3", "--out", "maps.png")
    assert (status, out, err) == (0, "maps.png\n", "")
    pixels = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB"))
    (red_y, red_x), (blue_y, blue_x) = (
        np.argwhere((pixels == colour).all(2)).mean(0) for colour in ([255, 0, 0], [0, 0, 255])
    )
    assert red_x == pytest.approx(blue_x, abs=2)
    assert red_x < pixels.shape[1] / panels
    assert red_y < blue_y
    assert [wide_runs(pixels[round(y)]) for y in (red_y, blue_y, 2 * blue_y - red_y)] == [panels] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png: no such image; give a file, or test:N for "),
        (["test:360"], "test:360: the run's test set has the images 0..359\n"),
        (["round-00007.json"], "round-00007.json: not a readable image ("),
        (["test:0", "--class", "10"], "--class = 10: the classes are 0..9\n"),
        (["test:0", "--class", "-1"], "--class = -1: the classes are 0..9\n"),
        (
            ["test:0", "--layer", "layr2"],
            "--layer = 'layr2': must be one of layer1, layer1.0, layer2, layer2.0, layer3, layer3.0; "
            "did you mean 'layer2'?\n",
        ),
    ],
)
def test_cam_of_unusable_input_is_one_line(arguments, message, fedfmd, write_checkpoint, tmp_path):
    status, out, err = fedfmd("cam", write_checkpoint(), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"fedfmd: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "cam.png").exists()


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_cam_of_what_is_no_checkpoint_is_one_line(content, fedfmd, tmp_path):
    if content is not None:
        (tmp_path / "file.safetensors").write_bytes(content)
    status, _, err = fedfmd("cam", "file.safetensors", "test:0")
    assert status == 2
    assert err.startswith("fedfmd: ")
    assert "file.safetensors" in err
    assert err.count("\n") == 1
