from dataclasses import replace

import pytest

from fedfmd.errors import RunError, SettingsError
from fedfmd.protocol.messages import BY_ATTENTION, read_instruction, to_record
from fedfmd.protocol.state import shared_arrays
from strategies.planning import Planner

KERNELS = {"model.conv": "fmdconv", "model.kernels": 3, "budget.policy": "kernels", "budget.kernels": 2}


@pytest.fixture
def asked(make_grid, workers):
    """Node id -> the instruction it gets in the round."""
    make_grid([])  # Messages need an identity of the process, which a grid gives it

    def ask(federation, server_round, nodes=1, time_s=0.0):
        planner = Planner(federation, workers(nodes), run="a")
        arrays = to_record(shared_arrays(federation.model))
        requests = planner.plan_round(server_round, time_s, arrays).requests
        return {request.node: read_instruction(request.message.content)[0] for request in requests}

    return ask


def clients_of(instructions):
    return sorted(a.client for instruction in instructions.values() for a in instruction.assignments)


def test_the_clients_of_a_round_follow_from_seed_and_round_alone(asked, make_federation):
    many = {"partition.clients": 20, "server.clients-per-round": 5, "server.rounds": 8}
    federation, other = make_federation(many), make_federation(many | {"seed": 1})
    picked = [clients_of(asked(federation, server_round)) for server_round in range(1, 9)]
    assert all(len(set(clients)) == 5 for clients in picked)
    assert [clients_of(asked(federation, r, nodes=3)) for r in range(1, 9)] == picked
    assert [clients_of(asked(other, r)) for r in range(1, 9)] != picked
    assert len({client for clients in picked for client in clients}) > 10


def test_a_node_is_told_its_clients_plans_and_the_round(asked, make_federation):
    federation = make_federation({"train.lr": 0.2, "train.batch-size": 8, "temperature.rounds": 2})
    instructions = asked(federation, 2, nodes=2)
    assert instructions.keys() == {100, 101}
    for instruction in instructions.values():
        assert (instruction.round, instruction.run) == (2, "a")
        assert instruction.lr == pytest.approx(0.1)  # cosine, after one of two rounds
        assert instruction.temperature == 15.5  # half the way from 30 to 1
        for assignment in instruction.assignments:
            assert assignment.steps == -(-federation.sizes[assignment.client] // 8)
            assert (assignment.batch_size, assignment.kernels) == (8, 1)


def test_a_policy_that_fails_in_a_round_ends_the_run(asked, make_federation):
    federation = make_federation()

    def moody(told):
        raise SettingsError("budget.policy = 'mine:moody' fails")

    federation = replace(federation, budget=replace(federation.budget, policy="mine:moody", choose=moody))
    with pytest.raises(RunError, match=r"^round 2, client \d: budget\.policy = 'mine:moody' fails$"):
        asked(federation, 2)


def test_kernels_rotate_over_rounds_and_clients(asked, make_federation):
    federation = make_federation(KERNELS | {"server.rounds": 3})
    for server_round in (1, 2, 3):
        (instruction,) = asked(federation, server_round).values()
        assert [(a.client, a.kernels, a.first_kernel) for a in instruction.assignments] == [
            (client, 2, (server_round + client) % 3) for client in range(3)
        ]


def test_by_attention_the_clients_choose(asked, make_federation):
    (instruction,) = asked(make_federation(KERNELS | {"budget.kernel-choice": "attention"}), 1).values()
    assert {a.first_kernel for a in instruction.assignments} == {BY_ATTENTION}


def test_clients_that_are_away_are_not_picked(asked, make_federation, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("client,start_s,end_s\n0,0,10\n1,5,20\n")
    two = {"server.clients-per-round": 2, "server.rounds": 20}
    federation = make_federation({"fleet.trace": str(trace)} | two)
    assert clients_of(asked(federation, 1, time_s=0.0)) == [0, 2]
    assert clients_of(asked(federation, 1, time_s=12.0)) == [1, 2]
    assert {tuple(clients_of(asked(federation, r, time_s=7.0))) for r in range(1, 20)} == {
        (0, 1),
        (0, 2),
        (1, 2),
    }
