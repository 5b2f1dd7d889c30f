import pytest
import torch
import yaml

from fedfmd.settings import Settings

TINY = {
    "data.image-size": 8,
    "model.width": 0.25,
    "model.kernels": 2,
    "partition.scheme": "iid",
    "partition.clients": 3,
    "train.batch-size": 64,
    "train.local-epochs": 1,
    "server.rounds": 1,
    "fleet.devices": "pi-4:2, pi-5:1",
    "budget.deadline-s": 0,
}


def pytest_configure(config):
    """Tests run side by side: one thread each."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Those that start Flower's processes run one after another, beside the others."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """A cache of partitions for all tests, so that none reads or fills the user's."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture
def tiny_settings():
    """Makes settings of a run of a second: three clients with digits of 8 x 8 pixels; changes as dotted keys."""

    def make(**changes):
        return Settings.from_mapping(TINY | changes)

    return make


@pytest.fixture
def write_yaml(tmp_path):
    """Writes an experiment file of the tiny settings; changes are the base's dotted keys."""

    def write(name="tiny", matrix=None, select=None, **changes):
        path = tmp_path / f"{name}.yaml"
        parts = {"base": TINY | changes, "matrix": matrix, "select": select}
        path.write_text(yaml.safe_dump({part: content for part, content in parts.items() if content}))
        return path

    return write


@pytest.fixture
def write_checkpoint(tiny_settings, tmp_path):
    """Writes a checkpoint of an untrained model of the tiny settings; changes as dotted keys."""
    from fedfmd.build import build_model
    from fedfmd.runs import save_checkpoint

    def write(**changes):
        settings = tiny_settings(**changes)
        state = build_model(settings, classes=10).state_dict()
        save_checkpoint(tmp_path, 7, state, {}, settings.flat())
        return tmp_path / "round-00007.safetensors"

    return write
