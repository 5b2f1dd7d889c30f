"""Experiments from Python: as quiet as a function, and their results as tables."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

import fedfmd
from fedfmd.errors import EXTRAS, RunError, SettingsError
from fedfmd.runs import CLIENT_COLUMNS, EPOCH_COLUMNS, ROUND_COLUMNS
from fedfmd.settings import Settings


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to run in; pages are left empty, as drawing them takes seconds."""
    monkeypatch.chdir(tmp_path)
    page = "fedfmd.report.writing.write_page"
    monkeypatch.setattr(page, lambda folder: (folder / "report.html").touch())


@pytest.fixture
def tiny(tiny_settings):
    """Settings of a run of a second, as a mapping."""
    return tiny_settings().kept()


def test_a_run_is_silent_and_its_results_are_tables(tiny, capfd):
    results = fedfmd.run(tiny, out="here", workers=1)
    assert capfd.readouterr() == ("", "")
    assert results.names == ["here"]
    assert list(results.rounds.columns) == ["run", *ROUND_COLUMNS]
    assert list(results.clients.columns) == ["run", *CLIENT_COLUMNS]
    assert results.clients["client"].tolist() == [0, 1, 2]
    assert results.clients["measured_latency_s"].dtype == float  # nothing measured: NaN
    assert results.epochs.empty
    assert results.settings.loc["here", "model.width"] == 0.25
    assert Path("here/report.html").exists()


def test_what_is_finished_is_read_and_not_made_again(tiny, monkeypatch):
    first = fedfmd.run(tiny, workers=1)
    monkeypatch.setattr("fedfmd.server_app.prepare", None)
    again = fedfmd.run(Settings.from_mapping(tiny), workers=1)
    pd.testing.assert_frame_equal(again.rounds, first.rounds)
    (run,) = again.runs
    assert run.folder.parent == Path("runs").resolve()
    assert run.folder.name.startswith("digits-resnet8-fmdconv-")


def test_progress_prints_what_the_command_does(tiny, capfd):
    fedfmd.run(tiny, workers=1, progress=True)
    out, _ = capfd.readouterr()
    assert "round 1/1" in out


def test_a_run_works_in_a_thread_of_a_program_with_an_event_loop(tiny):
    async def main():
        direct = fedfmd.run(tiny, workers=1, out="direct")  # as a notebook's cell does
        elsewhere = await asyncio.to_thread(fedfmd.run, tiny, workers=1, out="thread")
        return direct, elsewhere

    direct, elsewhere = asyncio.run(main())
    apart_from_time = {"run", "wall_s"}
    columns = [column for column in direct.rounds if column not in apart_from_time]
    pd.testing.assert_frame_equal(direct.rounds[columns], elsewhere.rounds[columns])


def test_several_threads_take_turns(tiny, monkeypatch):
    at_work, most = 0, 0

    def run_experiment(*_):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        threading.Event().wait(0.01)
        at_work -= 1
        raise RunError("enough")

    monkeypatch.setattr("fedfmd.experiment.api.run_experiment", run_experiment)

    def attempt():
        with pytest.raises(fedfmd.FedfmdError, match="enough"):
            fedfmd.run(tiny)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        ({"seed": 1}, [""]),
        ({"base": {}, "matrix": {"seed": [0, 1]}}, ["seed=0", "seed=1"]),
        (Settings(), [""]),
        ("quickstart", [""]),
        (Path("mine.yaml"), [""]),
    ],
    ids=["settings", "parts", "Settings", "example", "file"],
)
def test_an_experiment_may_be_settings_parts_or_a_file(experiment, names, monkeypatch):
    asked = []

    def run_experiment(*given):
        asked.extend(given)
        raise RunError("planned")

    monkeypatch.setattr("fedfmd.experiment.api.run_experiment", run_experiment)
    Path("mine.yaml").write_text("base: {seed: 3}")
    with pytest.raises(RunError, match="planned"):
        fedfmd.run(experiment)
    planned, out, engine, workers, _, address = asked
    assert [run.name for run in planned.runs] == names
    assert (out, engine, workers, address) == (None, "inline", 0, "")


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        ({"train.lrr": 1}, {}, r"^unknown setting train\.lrr = 1; the nearest one is train\.lr$"),
        ({"base": {}, "seed": 1}, {}, "^the experiment must hold `base:`"),
        ("quikstart", {}, "did you mean 'quickstart'"),
        ({}, {"engine": "ray"}, r"^engine = 'ray': must be one of inline, flwr"),
        ({}, {"workers": 0}, "^workers = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(experiment, options, message):
    with pytest.raises(SettingsError, match=message):
        fedfmd.run(experiment, **options)


def test_any_failure_of_a_run_is_an_error_of_fedfmd(tiny, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("in a strategy")

    monkeypatch.setattr("fedfmd.engines.inline.run_inline", fail)
    with pytest.raises(fedfmd.FedfmdError, match="ZeroDivisionError: in a strategy") as raised:
        fedfmd.run(tiny)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@pytest.mark.slow
def test_a_script_needs_no_guard_of_its_main_module(tiny, tmp_path):
    """The processes of a matrix would run it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import fedfmd\n"
        f"results = fedfmd.run({{'base': {tiny!r}, 'matrix': {{'seed': [0, 1]}}}}, workers=1)\n"
        "print(results)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Results of 2 runs") == 1


def test_results_name_their_runs(finished_runs):
    assert repr(fedfmd.load(finished_runs)).startswith("<Results of 4 runs: ")
    assert repr(fedfmd.load(finished_runs / "static-0")) == "<Results of 1 run: static-0>"


def test_finished_runs_are_loaded_and_joined_with_their_settings(finished_runs):
    results = fedfmd.load(finished_runs)
    assert sorted(results.names) == ["fmdconv-0", "fmdconv-1", "static-0", "static-1"]
    final = results.rounds[results.rounds["round"] == 2].join(results.settings[["model.conv"]], on="run")
    assert final.groupby("model.conv")["accuracy"].mean().to_dict() == pytest.approx(
        {"fmdconv": 0.83, "static": 0.75}
    )
    late = results.clients[results.clients["status"] == "late"]
    assert late["accuracy"].isna().all()
    assert fedfmd.load([finished_runs / "static-0"]).names == ["static-0"]


def test_epochs_of_centralised_runs_are_loaded(centralised_runs):
    results = fedfmd.load(centralised_runs)
    assert list(results.epochs.columns) == ["run", *EPOCH_COLUMNS]
    assert len(results.epochs) == 8
    assert results.rounds.empty


def test_packed_runs_are_loaded_as_their_folders_are():
    results = fedfmd.load(Path(__file__).parents[2] / "experiments/results/quickstart")
    assert len(results.runs) >= 1
    assert not results.rounds.empty


def test_results_are_drawn_as_a_figure(finished_runs):
    figure = fedfmd.load(finished_runs).plot()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["static", "fmdconv"]
    assert len(figure.axes) == 3


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(SettingsError, match=r"^no run with a finished round below "):
        fedfmd.load(tmp_path)


def test_tables_need_an_extra(monkeypatch):
    monkeypatch.setattr("fedfmd.errors.find_spec", lambda name: None)
    assert EXTRAS["pandas"] == "report"
    for function in (fedfmd.run, fedfmd.load):
        with pytest.raises(SettingsError, match=r"needs pandas: pip install 'fedfmd\[report\]'"):
            function("quickstart")


def test_importing_fedfmd_is_light_and_lists_what_it_has():
    code = (
        "import sys, fedfmd; assert {'run', 'load', 'Settings'} <= set(dir(fedfmd)); "
        "sys.exit(any(heavy in sys.modules for heavy in ('torch', 'flwr', 'pandas', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nun'"):
        _ = fedfmd.nun
