import json
import subprocess
import sys

import pytest
import yaml

from fedfmd.errors import SettingsError
from fedfmd.run_folder import open_run_folder
from fedfmd.runs import save_checkpoint
from fedfmd.server_app import prepare
from fedfmd.settings import Settings


def opened(settings):
    """The run folder, opened and left."""
    with open_run_folder(settings) as folder:
        return folder


def kept(folder):
    return yaml.safe_load((folder / "settings.yaml").read_text())


def test_a_run_folder_holds_the_resolved_settings_and_may_be_moved(tiny_settings, tmp_path):
    settings = tiny_settings(**{"run-dir": str(tmp_path / "deep" / "run")})
    folder = opened(settings)
    assert folder.path == tmp_path / "deep" / "run"
    left_out = {"train.epochs", *Settings.OPTIONAL}
    heeded = {key: value for key, value in tiny_settings().flat().items() if key not in left_out}
    assert kept(folder.path) == heeded  # without the folder's own name
    assert folder.environment.exists()


def test_a_run_goes_on_where_its_settings_are_kept(tiny_settings, tmp_path):
    settings = tiny_settings().in_folder(tmp_path)
    opened(settings)
    again = tiny_settings(threads=1).in_folder(tmp_path)  # threads don't change the results
    assert opened(again).path == tmp_path
    assert kept(tmp_path)["threads"] == 1


def test_a_folder_of_a_run_is_not_taken_unasked(tiny_settings, tmp_path):
    settings = tiny_settings(**{"run-dir": str(tmp_path)})
    opened(settings)
    with pytest.raises(SettingsError, match=r"run-dir = .* holds a run: set resume=true to go on"):
        opened(settings)


@pytest.mark.parametrize("check", [prepare, opened])
def test_a_run_with_other_settings_is_told_which(check, tiny_settings, tmp_path):
    opened(tiny_settings().in_folder(tmp_path))
    before = kept(tmp_path)
    other = tiny_settings(**{"seed": 1, "train.lr": 0.5, "threads": 1}).in_folder(tmp_path)
    with pytest.raises(
        SettingsError, match=r"other settings \(train.lr was 0.05, is 0.5, seed was 0, is 1\): name another"
    ):
        check(other)
    assert kept(tmp_path) == before


@pytest.mark.parametrize("check", [prepare, opened])
def test_a_checkpoint_knows_its_settings_where_their_file_is_gone(check, tiny_settings, tmp_path):
    settings = tiny_settings().in_folder(tmp_path)
    folder = opened(settings)
    save_checkpoint(folder.checkpoints, 1, {}, {}, settings.kept())
    folder.settings.unlink()
    with pytest.raises(SettingsError, match=r"other settings \(train\.lr was 0\.05, is 0\.5\)"):
        check(tiny_settings(**{"train.lr": 0.5}).in_folder(tmp_path))
    assert opened(settings).path == tmp_path
    assert folder.settings.exists()


@pytest.mark.parametrize("done", [0, 1])
def test_a_run_that_goes_on_on_another_machine_is_told_so(done, tiny_settings, tmp_path, caplog):
    settings = tiny_settings().in_folder(tmp_path)
    folder = opened(settings)
    if done:
        save_checkpoint(folder.checkpoints, done, {}, {}, settings.kept())
    opened(settings)
    assert caplog.messages == []
    here = json.loads(folder.environment.read_text())
    there = here | {"versions": here["versions"] | {"torch": "2.0"}}
    there["machine"] = here["machine"] | {"native_mixing": not here["machine"]["native_mixing"]}
    folder.environment.write_text(json.dumps(there))
    opened(settings)
    told = [
        message
        for message in caplog.messages
        if message.startswith("this machine is not as it was (torch was 2.0")
    ]
    assert len(told) == len(caplog.messages) == done
    assert all("compiled mixing was" in message for message in told)


@pytest.mark.parametrize("check", [prepare, opened])
@pytest.mark.parametrize(
    ("environment", "known"),
    [
        (
            {"versions": {"fedfmd": "0.0.9"}, "commit": "0123456789abcdef", "code": "beef"},
            "0.0.9, commit 0123456789ab, sources beef",
        ),
        ({"versions": {"fedfmd": "0.0.9"}, "commit": None}, "0.0.9, sources unknown"),
    ],
    ids=["known", "from before digests"],
)
def test_a_run_of_other_code_does_not_go_on(check, environment, known, tiny_settings, tmp_path):
    settings = tiny_settings().in_folder(tmp_path)
    opened(settings).environment.write_text(json.dumps(environment))
    with pytest.raises(
        SettingsError,
        match=rf"holds a run of other code \(fedfmd {known}; now fedfmd .*\): name another folder, or delete this",
    ):
        check(settings)
    assert json.loads((tmp_path / "environment.json").read_text()) == environment


def test_a_folder_in_use_is_refused_until_its_process_dies(tiny_settings, tmp_path):
    settings = tiny_settings().in_folder(tmp_path)
    hold = "with RunFolder(sys.argv[1]).held(): print(flush=True); input()"
    code = f"import sys\nfrom fedfmd.runs import RunFolder\n{hold}"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(
        SettingsError, match=rf"run-dir = .* is in use: process {holder.pid} writes to it; wait"
    ):
        opened(settings)
    assert not (tmp_path / "settings.yaml").exists()
    holder.kill()
    holder.communicate()
    assert opened(settings).path == tmp_path


def test_a_damaged_environment_is_one_line(tiny_settings, tmp_path):
    settings = tiny_settings().in_folder(tmp_path)
    opened(settings).environment.write_text("{")
    with pytest.raises(SettingsError, match=r"environment\.json is damaged \(.*\): name another folder$"):
        prepare(settings)


def test_without_a_name_every_run_gets_a_folder_of_its_own(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings()
    name = f"digits-resnet8-fmdconv-{settings.digest()}"
    assert [opened(settings).path.name for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]


def test_without_a_name_a_resume_finds_the_run_of_its_settings(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = opened(tiny_settings())
    assert opened(tiny_settings(resume=True)).path == first.path
    assert opened(tiny_settings(resume=True, seed=1)).path != first.path


@pytest.mark.parametrize("content", ["model: [", "- a list", "model.cnv: static"])
def test_a_folder_with_foreign_settings_is_refused(content, tiny_settings, tmp_path):
    (tmp_path / "settings.yaml").write_text(content)
    with pytest.raises(SettingsError):
        opened(tiny_settings().in_folder(tmp_path))
    assert (tmp_path / "settings.yaml").read_text() == content


def test_a_folder_that_cannot_be_made_names_the_setting(tiny_settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"run-dir = .*file/run can't be made"):
        opened(tiny_settings().in_folder(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"server.strategy": "fedagv"},
            "server.strategy = 'fedagv': ",
        ),
        ({"fleet.devices": "pi-4:9"}, "fleet.devices "),
        ({"kind": "centralised"}, "kind = 'centralised' is not for Flower: use `fedfmd run FILE.yaml`"),
    ],
)
def test_nothing_is_written_before_the_checks(changes, message, tiny_settings, tmp_path):
    with pytest.raises(SettingsError, match=message):
        prepare(tiny_settings(**changes).in_folder(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
