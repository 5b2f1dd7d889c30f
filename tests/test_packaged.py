"""Files that come with the package: in a clone and in a wheel the same ones."""

import tomllib
from pathlib import Path

import pytest

from fedfmd import packaged
from fedfmd.errors import SettingsError
from fedfmd.packaged import copy_templates, examples, find_experiment

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("*.yaml"))


def test_a_wheel_holds_the_experiments_of_a_clone():
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = manifest["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"experiments/{name}": f"fedfmd/examples/{name}" for name in EXPERIMENTS}


def test_examples_are_known_by_name():
    assert [f"{name}.yaml" for name in examples()] == EXPERIMENTS
    assert examples()["quickstart"].read_text() == (ROOT / "experiments/quickstart.yaml").read_text()


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    inside = tmp_path / "examples"
    inside.mkdir()
    (inside / "mine.yaml").touch()
    monkeypatch.setattr(packaged, "EXAMPLES", (inside, ROOT / "experiments"))
    assert examples() == {"mine": inside / "mine.yaml"}


def test_a_file_comes_before_an_example_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_experiment(Path("quickstart")) == examples()["quickstart"]
    Path("quickstart").mkdir()  # a folder is no experiment
    assert find_experiment(Path("quickstart")) == examples()["quickstart"]
    Path("uploads").touch()
    for path in (Path("uploads"), Path("quickstart.yaml"), Path("none/quickstart")):
        assert find_experiment(path) == path


@pytest.mark.parametrize(("name", "nearest"), [("quikstart", "quickstart"), ("min", "mine.yaml")])
def test_an_unknown_name_suggests_the_nearest(name, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    with pytest.raises(SettingsError, match=rf"^no file {name}, .* cifar10, .*did you mean '{nearest}'\?$"):
        find_experiment(Path(name))


def test_templates_are_copied_once(tmp_path):
    folder = tmp_path / "new" / "mine"
    files = copy_templates(folder)
    assert set(files) == set(folder.iterdir()) >= {folder / "experiment.yaml", folder / "algorithm.py"}
    (folder / "algorithm.py").unlink()
    (folder / "experiment.yaml").write_text("my own")
    with pytest.raises(SettingsError, match=r"experiment\.yaml is there already and stays as it is"):
        copy_templates(folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("experiment.yaml", "my own")]
