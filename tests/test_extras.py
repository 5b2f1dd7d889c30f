"""Edge devices do without the libraries of the extras; what needs one says which extra to install."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedfmd import build, cli
from fedfmd.errors import EXTRAS, SettingsError, need

ROOT = Path(__file__).parents[1]
BLOCKED = (*EXTRAS, "datasets", "pandas", "pyarrow", "ray")
DEVICE = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # as if they weren't installed
import fedfmd.client_app, fedfmd.classifier, fedfmd.calibration
fedfmd.calibration.ROUND_S = 0
from fedfmd.cli import main
main()
"""


def test_an_edge_device_serves_classifies_and_trains_without_extras(tmp_path):
    """`fedfmd calibrate` trains by the client's own code."""
    network = [
        "--conv",
        "static",
        "--batch-size",
        "2",
        "--image-size",
        "8",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-c", DEVICE, "calibrate", *network, "--name", "attic", "--out", "device.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "device.yaml").read_text().startswith("attic:")


NPZ = ["--set", "data.dataset=npz", "--set", "data.train=a.npz", "--set", "data.test=a.npz"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["partition", "--out", "."], "data.dataset = 'digits' needs sklearn: pip install 'fedfmd[server]'"),
        (
            ["partition", "--out", ".", *NPZ],
            "partition.scheme = 'dirichlet' needs flwr_datasets: pip install 'fedfmd[server]'",
        ),
        (["report", "."], "a report needs bokeh, matplotlib and scipy: pip install 'fedfmd[report]'"),
        (["cam", "a.npz", "a.npz"], "a picture needs matplotlib: pip install 'fedfmd[report]'"),
    ],
    ids=["digits", "partition", "report", "cam"],
)
def test_what_needs_an_extra_names_it_in_one_line(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.savez("a.npz", images=np.zeros((40, 8, 8, 3), np.uint8), labels=np.arange(40) % 4)
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    build._load.cache_clear()  # an earlier test's digits need no library any more
    monkeypatch.setattr(sys, "argv", ["fedfmd", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"fedfmd: {error}\n"


def test_what_is_installed_is_not_refused():
    need("training", "torch", "numpy")


def test_every_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("fedfmd.errors.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"it needs scipy and onnx: pip install 'fedfmd\[report\]'"):
        need("it", "scipy", "onnx")


def test_flower_installs_what_the_extra_for_simulations_names():
    """Flower reads the dependency group, in which the project's own extras can't stand."""
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = manifest["project"]["optional-dependencies"]

    def spelled_out(extra):
        for requirement in extras[extra]:
            own = re.fullmatch(r"fedfmd\[(\w+)\]", requirement)
            yield from spelled_out(own[1]) if own else [requirement]

    assert set(manifest["dependency-groups"]["simulation"]) == set(spelled_out("simulation"))
