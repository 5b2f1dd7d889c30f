import numpy as np
import pytest

from fedfmd.runs import save_checkpoint

mlflow = pytest.importorskip("mlflow", reason="pip install 'fedfmd[mlflow]'")


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client of an empty store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where the artifacts go
    return mlflow.MlflowClient()


def runs(client, project="fedfmd"):
    return client.search_runs([client.get_experiment_by_name(project).experiment_id])


def steps(client, run, name="accuracy"):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_a_run_has_its_name_its_settings_and_its_rows(client, do_rounds):
    do_rounds("mlflow", 1, 3, **{"tracking.project": "fleets", "train.lr": 0.125})
    (run,) = runs(client, "fleets")
    assert (run.info.run_name, run.info.status) == ("run-a", "FINISHED")
    assert (run.data.params["train.lr"], run.data.params["model.conv"]) == ("0.125", "fmdconv")
    assert steps(client, run) == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]
    assert steps(client, run, "virtual_s") == [(1, 10), (2, 20), (3, 30)]


def test_pictures_and_the_model_are_artifacts(client, open_run):
    context, do = open_run("mlflow")
    with context:
        folder = do(1, 2)
        (folder.path / "partition.png").write_bytes(b"picture")
        save_checkpoint(folder.checkpoints, 2, {"w": np.zeros(2)}, {}, {})
    (run,) = runs(client)
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["checkpoints", "partition.png"]
    (model,) = client.list_artifacts(run.info.run_id, "checkpoints")
    assert model.path == "checkpoints/round-00002.safetensors"


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_that_goes_on_is_the_same_one_and_has_no_step_twice(killed, client, do_rounds, forget):
    folder = do_rounds("mlflow", 1, 4, killed=killed)
    forget(folder, "mlflow", 3)
    do_rounds("mlflow", 3, 6, threads=2)  # which changes a parameter that MLflow keeps as it was
    (run,) = runs(client)
    assert [step for step, _ in steps(client, run)] == [1, 2, 3, 4, 5, 6]
    assert (run.info.status, run.data.params["threads"]) == ("FINISHED", "0")


def test_a_run_that_breaks_off_has_failed(client, do_rounds):
    with pytest.raises(KeyboardInterrupt):
        do_rounds("mlflow", 1, 1, error=KeyboardInterrupt())
    assert [run.info.status for run in runs(client)] == ["FAILED"]


def test_a_store_that_cannot_be_reached_costs_a_warning(monkeypatch, do_rounds, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = do_rounds("mlflow", 1, 2)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("fedfmd")]
    assert message.startswith("mlflow is told no more, and the run goes on without it: ")
    assert len(folder.rounds.read_text().splitlines()) == 3
