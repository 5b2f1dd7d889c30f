import numpy as np
import pytest

from fedfmd.build import _load
from fedfmd.errors import SettingsError
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.runs import save_checkpoint

BOX = "box: {train_gflops: 1.0, infer_gflops: 1.0, memory_gb: 1.0, power_w: 2.0, source: made up}\n"


def write_images(path, labels):
    np.savez(path, images=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=np.array(labels))


@pytest.fixture
def settings(tiny_settings, tmp_path):
    """A run with files of its own for images, devices and trace, of which a round is done."""
    write_images(tmp_path / "train.npz", [0, 1] * 6)
    write_images(tmp_path / "test.npz", [0, 1])
    (tmp_path / "devices.yaml").write_text(BOX)
    (tmp_path / "trace.csv").write_text("client,start_s,end_s\n0,0,100\n1,0,100\n2,0,100\n")
    settings = tiny_settings(
        **{
            "data.dataset": "npz",
            "data.train": str(tmp_path / "train.npz"),
            "data.test": str(tmp_path / "test.npz"),
            "fleet.devices": "box:3",
            "fleet.devices-file": str(tmp_path / "devices.yaml"),
            "fleet.trace": str(tmp_path / "trace.csv"),
        }
    ).in_folder(tmp_path / "run")
    with open_run_folder(settings) as folder:
        save_checkpoint(folder.checkpoints, 1, {}, {}, settings.kept())
    return settings


def test_a_run_goes_on_with_the_files_that_it_had(settings):
    _load.cache_clear()
    with open_run_folder(settings) as folder:
        assert folder.path == run_path(settings)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("devices.yaml", "# faster\n", "had other devices than .*devices.yaml has now: name another folder"),
        ("trace.csv", "2,200,300\n", "had another trace than .*trace.csv has now: name another folder"),
    ],
)
def test_a_run_does_not_go_on_with_other_devices_or_another_trace(file, line, said, settings, tmp_path):
    with (tmp_path / file).open("a") as changed:
        changed.write(line)
    with pytest.raises(SettingsError, match=said):
        run_path(settings)


def test_a_run_does_not_go_on_with_other_images(settings, tmp_path):
    write_images(tmp_path / "train.npz", [1, 0] * 6)
    _load.cache_clear()
    with (
        pytest.raises(
            SettingsError, match=r"had other images than data\.dataset = npz has now: name another"
        ),
        open_run_folder(settings),
    ):
        pass
