"""What clients keep between rounds: which states are found again, and which are deleted."""

import os
import time

import pytest
import torch

from fedfmd.client.state import ClientState, ClientStates, discard_old, states_of_run


def state(value):
    return ClientState({"bn.weight": torch.tensor([value])}, {"fc.weight": torch.tensor([-value])})


def value_of(state):
    return state.own["bn.weight"].item()


def rounds_on_disk(states, client=3):
    return sorted(int(path.stem[-5:]) for path in (states.folder / f"client-{client:05d}").iterdir())


def test_a_state_is_found_again_by_its_client_alone(tmp_path):
    ClientStates(tmp_path).save(3, 10, state(1.5))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")] == [
        "client-00003/round-00010.safetensors"
    ]
    kept = ClientStates(tmp_path).load(3, before_round=11)
    assert kept.own == {"bn.weight": torch.tensor([1.5])}
    assert kept.residual == {"fc.weight": torch.tensor([-1.5])}
    assert ClientStates(tmp_path).load(4, before_round=11) == ClientState()


def test_counters_and_scalars_come_back_as_they_were(tmp_path):
    ClientStates(tmp_path).save(0, 1, ClientState(own={"bn.num_batches_tracked": torch.tensor(7)}))
    kept = ClientStates(tmp_path).load(0, before_round=2).own["bn.num_batches_tracked"]
    assert (kept.dtype, kept.shape, kept.item()) == (torch.int64, (), 7)


def test_a_resumed_round_ignores_its_own_and_later_states_and_then_replaces_them(tmp_path):
    states = ClientStates(tmp_path)
    for round in (4, 5, 6):
        states.save(3, round, state(float(round)))
    assert value_of(states.load(3, before_round=5)) == 4
    states.save(3, 5, state(50.0))
    assert value_of(states.load(3, before_round=9)) == 50
    assert rounds_on_disk(states) == [4, 5]


@pytest.mark.parametrize(
    ("every", "keep", "rounds", "expected"),
    [
        (1, 2, [1, 2, 3, 4], [2, 3, 4]),  # round 4 may be resumed from 3, and if that is broken from 2
        (1, 1, [1, 2, 3, 4], [3, 4]),
        (1, 2, [1, 9], [1, 9]),
        (10, 1, [8, 9, 12, 15, 18], [9, 18]),  # from 10, where the state of 9 was the newest
        (10, 2, [8, 9, 12, 15, 22], [9, 15, 22]),
    ],
)
def test_states_are_kept_where_a_run_may_be_resumed(tmp_path, every, keep, rounds, expected):
    states = ClientStates(tmp_path, every, keep)
    for round in rounds:
        states.save(3, round, state(0.0))
    assert rounds_on_disk(states) == expected


def test_a_damaged_state_is_told(tmp_path):
    ClientStates(tmp_path).save(3, 1, state(0.0))
    (tmp_path / "client-00003" / "round-00001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"round-00001\.safetensors is damaged"):
        ClientStates(tmp_path).load(3, before_round=2)


def test_every_run_has_its_own_states(tmp_path):
    states_of_run(tmp_path, "a-1", 1, 2).save(3, 1, state(1.0))
    assert states_of_run(tmp_path, "b", 1, 2).load(3, before_round=2) == ClientState()
    assert value_of(states_of_run(tmp_path, "a-1", 1, 2).load(3, before_round=2)) == 1


@pytest.mark.parametrize("run", ["", "../elsewhere", "a/b", "."])
def test_a_run_without_a_plain_name_can_keep_nothing(tmp_path, run):
    with pytest.raises(ValueError, match=r"run = .* must name the run"):
        states_of_run(tmp_path, run, 1, 2)


def test_states_that_nobody_used_for_long_are_discarded(tmp_path):
    for run in ("old", "new", "resumed"):
        states_of_run(tmp_path, run, 1, 2).save(3, 1, state(0.0))
    month = time.time() - 31 * 24 * 3600
    for path in (tmp_path / "old", tmp_path / "old" / "client-00003", tmp_path / "resumed"):
        os.utime(path, (month, month))
    discard_old(tmp_path, days=30)
    assert {run.name for run in tmp_path.iterdir()} == {"new", "resumed"}
    discard_old(tmp_path / "nowhere")
