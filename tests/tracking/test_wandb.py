import json
import os
import struct
import time

import pytest

pytest.importorskip("wandb", reason="pip install 'fedfmd[wandb]'")
from wandb.proto.wandb_internal_pb2 import Record


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    """W&B without a login, a mode, or files of the user's."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def records(path):
    """Read a .wandb file: 7 bytes, then LevelDB's log of 32 KiB blocks: checksum, length, kind, and a message."""
    content, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(message)
            message = b""


def offline_runs(folder):
    """The records of each start, in order, once W&B's own process has written the last one."""
    limit = time.monotonic() + 30
    while True:
        files = (folder.path / "wandb").glob("offline-run-*/run-*.wandb")
        runs = [list(records(file)) for file in sorted(files, key=lambda path: path.stat().st_mtime)]
        ended = all(any(record.HasField("exit") for record in run) for run in runs)
        if ended or time.monotonic() > limit:
            return runs
        time.sleep(0.1)


def logged(run):
    """Step and accuracy of each row."""
    for record in run:
        values = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        if "accuracy" in values:
            yield record.history.step.num, values["accuracy"]


def test_without_a_login_a_run_waits_for_sync_in_its_folder(do_rounds):
    folder = do_rounds("wandb", 1, 3, **{"tracking.project": "fleets", "train.lr": 0.125})
    (run,) = offline_runs(folder)
    (about,) = [record.run for record in run if record.HasField("run")]
    assert (about.project, about.display_name) == ("fleets", "run-a")
    assert about.run_id == json.loads((folder.path / "tracking.json").read_text())["run"]
    config = {item.key: item.value_json for item in about.config.update}
    assert config["train.lr"] == "0.125"
    assert list(logged(run)) == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]


def test_a_run_that_goes_on_is_the_same_one_and_has_no_step_twice(do_rounds):
    do_rounds("wandb", 1, 4)
    runs = offline_runs(do_rounds("wandb", 3, 6))
    assert [step for run in runs for step, _ in logged(run)] == [1, 2, 3, 4, 5, 6]
    assert len({record.run.run_id for run in runs for record in run if record.HasField("run")}) == 1
