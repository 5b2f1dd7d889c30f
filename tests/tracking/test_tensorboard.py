import numpy as np
import pytest
from PIL import Image

from fedfmd.runs import read_rounds

pytest.importorskip("tensorboard", reason="pip install 'fedfmd[tensorboard]'")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(folder):
    """What TensorBoard shows of a run."""
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return events


def curve(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_each_number_of_a_row_is_a_point_of_its_curve(do_rounds):
    folder = do_rounds("tensorboard", 1, 3)
    events, rows = read(folder), read_rounds(folder.rounds)
    assert curve(events, "accuracy") == [(row.round, pytest.approx(row.accuracy)) for row in rows]
    assert curve(events, "virtual_s") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {"loss", "energy_j", "clients_ok"}
    assert not scalars & {"round", "status", "validation_accuracy"}


def test_settings_and_pictures_are_there(open_run):
    context, do = open_run("tensorboard", **{"train.lr": 0.125})
    with context:
        folder = do(1, 2)
        Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(folder.path / "partition.png")
    events = read(folder)
    (text,) = events.Tensors("settings/text_summary")
    assert b"train.lr: 0.125" in text.tensor_proto.string_val[0]
    (picture,) = events.Images("partition")
    assert (picture.step, picture.height, picture.width) == (2, 4, 6)


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_that_goes_on_has_no_step_twice(killed, do_rounds, forget):
    folder = do_rounds("tensorboard", 1, 4, killed=killed)
    forget(folder, "tensorboard", 3)  # killed after it was written, before this was noted
    do_rounds("tensorboard", 3, 6)
    assert [step for step, _ in curve(read(folder), "accuracy")] == [1, 2, 3, 4, 5, 6]
