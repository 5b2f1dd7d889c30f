import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message

import strategies.tracked
from fedfmd.algorithms.fedbn import norm_views
from fedfmd.edge import plan_work
from fedfmd.errors import RunError, SettingsError
from fedfmd.flower_compat import answered_id
from fedfmd.protocol.compression import UPLOADS, upload_bytes
from fedfmd.protocol.state import pack, parameter_names
from fedfmd.runs import RunFolder, latest_checkpoint, read_clients, read_rounds
from fedfmd.training import evaluate
from strategies import make_strategy


@pytest.fixture
def make(tmp_path):
    return lambda federation: make_strategy(federation, RunFolder(tmp_path))


def rows(strategy):
    return read_rounds(strategy.folder.rounds), read_clients(strategy.folder.clients)


def status(strategy):
    return {(row.round, row.client): row.status for row in rows(strategy)[1]}


def test_a_run_takes_the_mean_of_its_clients(make, make_federation, make_grid):
    federation = make_federation()
    before = pack(federation.model)
    strategy = make(federation)
    progress = strategy.run(make_grid([{"rank": 0, "nodes": 2}, {"rank": 1, "nodes": 2}]))
    # client c has 10 (c + 1) images and adds c + 1: the mean grows by (1 + 4 + 9) / 6 a round
    for name, array in pack(federation.model).items():
        np.testing.assert_allclose(array, before[name] + 2 * 14 / 6, rtol=1e-5, atol=1e-5)
    rounds, clients = rows(strategy)
    assert [row.round for row in rounds] == [1, 2]
    assert [(row.clients_ok, row.clients_failed) for row in rounds] == [(3, 0), (3, 0)]
    assert {row.node for row in clients} == {0, 1}
    assert progress.round == 2
    assert progress.virtual_s == pytest.approx(rounds[-1].virtual_s)
    assert list(progress.client_flops) == [row.cum_train_flops for row in clients[3:]]


def test_the_best_round_is_chosen_on_images_held_out_of_training(make, make_federation, make_grid):
    federation = make_federation({"data.validation": 0.1, "server.rounds": 4})
    strategy = make(federation)
    progress = strategy.run(make_grid())
    rounds, _ = rows(strategy)
    chosen = max(rounds, key=lambda row: row.validation_accuracy)
    assert rounds[-1].best_accuracy == progress.best.accuracy == pytest.approx(chosen.accuracy)
    assert progress.best.chosen_by == pytest.approx(chosen.validation_accuracy)
    held = evaluate(federation.model, federation.dataset.validation, federation.dataset)
    assert (held.loss, held.accuracy) == pytest.approx(
        (rounds[-1].validation_loss, rounds[-1].validation_accuracy)
    )


@pytest.mark.parametrize(("conv", "temperatures"), [("static", [None, None]), ("fmdconv", [30.0, 27.1])])
def test_the_temperature_is_that_of_the_round(make, make_federation, make_grid, conv, temperatures):
    strategy = make(make_federation({"model.conv": conv}))
    strategy.run(make_grid())
    assert [row.temperature for row in rows(strategy)[0]] == pytest.approx(temperatures)


def test_a_failing_client_is_reported_and_the_others_count(make, make_federation, make_grid, caplog):
    federation = make_federation()
    before = pack(federation.model)
    strategy = make(federation)
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid(behave=lambda client, server_round: "OSError: no disk" if client == 1 else ""))
    assert status(strategy) == {(r, c): "failed" if c == 1 else "ok" for r in (1, 2) for c in range(3)}
    np.testing.assert_allclose(
        pack(federation.model)["fc.bias"], before["fc.bias"] + 2 * (1 + 9) / 4, rtol=1e-5, atol=1e-5
    )
    assert "round 1: client 1 failed: OSError: no disk" in caplog.messages


def test_a_dead_node_costs_only_its_own_clients(make, make_federation, make_grid):
    def behave(client, server_round):
        if client == 0:
            raise RuntimeError("killed")
        return ""

    strategy = make(make_federation())
    strategy.run(make_grid([edge_device(0), edge_device(1), edge_device(2)], behave))
    _, clients = rows(strategy)
    assert [(row.client, row.status, row.reason) for row in clients[:3]] == [
        (0, "failed", "RuntimeError: killed"),
        (1, "ok", ""),
        (2, "ok", ""),
    ]


def test_a_round_without_success_keeps_the_model(make, make_federation, make_grid):
    federation = make_federation({"server.max-failed-share": 1})
    before = pack(federation.model)
    strategy = make(federation)
    strategy.run(make_grid(behave=lambda client, server_round: "no power"))
    after = pack(federation.model)
    assert all(np.array_equal(array, before[name]) for name, array in after.items())
    rounds, _ = rows(strategy)
    assert [row.clients_failed for row in rounds] == [3, 3]
    assert rounds[0].accuracy == rounds[1].accuracy


def test_too_many_failures_stop_the_run_but_not_its_finished_rounds(make, make_federation, make_grid):
    strategy = make(make_federation())
    behave = lambda client, server_round: f"no power in {client}" if server_round == 2 and client else ""  # noqa: E731
    message = r"^round 2: 2 of 3 clients failed, .*max-failed-share = 0\.5; the last reason: no power in 2$"
    with pytest.raises(RunError, match=message):
        strategy.run(make_grid(behave=behave))
    assert [row.round for row in rows(strategy)[0]] == [1, 2]
    assert latest_checkpoint(strategy.folder.checkpoints).round == 2


@pytest.mark.parametrize(("lr", "sign"), [(1e42, "NaN or infinite values in "), (1e12, "a loss of ")])
def test_a_step_of_the_server_that_diverges_stops_the_run(make, make_federation, make_grid, lr, sign):
    settings = {"server.strategy": "fedadam", "server.lr": lr}
    strategy = make(make_federation(settings))
    with pytest.raises(
        RunError,
        match=rf"^round 1: training diverged, .* {sign}.* Choose server\.lr below 1e\+\d\d or "
        r"train\.lr below 0\.05 or train\.clip-norm=1, and another run folder$",
    ):
        strategy.run(make_grid())
    assert not strategy.folder.rounds.exists()
    assert latest_checkpoint(strategy.folder.checkpoints) is None


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_dead_ray_worker_stops_the_run(make, make_federation, make_grid, phase):
    """Flower tells of it by the error of a message; the round is not counted, so that a resume does it anew."""
    fault = (
        "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.\n"
        "\tclass_name: ClientAppActor\nThe actor is dead because its worker process has died.'>"
    )
    strategy, grid = make(make_federation({"partition.test-share": 0.2})), make_grid()
    pull = grid.pull_messages

    def pull_or_die(ids):
        in_round_2 = latest_checkpoint(strategy.folder.checkpoints) is not None
        for reply in pull(ids):
            if in_round_2 and reply.metadata.message_type == phase:
                request = reply.metadata.reply_to_message_id
                reply = Message(Error(0, fault), reply_to=reply)
                reply.metadata.__dict__["_reply_to_message_id"] = request
            yield reply

    grid.pull_messages = pull_or_die
    with pytest.raises(RunError, match=r"round 2: a Ray worker died \(ActorDiedError\)"):
        strategy.run(grid)
    assert [row.round for row in rows(strategy)[0]] == [1]
    assert latest_checkpoint(strategy.folder.checkpoints).round == 1


def test_late_clients_are_not_trained(make, make_federation, make_grid):
    federation = make_federation()
    seconds = sorted(
        plan_work(client, federation.workload(client.id), federation.budget).total_s
        for client in federation.fleet.clients
    )
    trained = []

    def behave(client, server_round):
        trained.append(client)
        return ""

    deadline = (seconds[0] + seconds[1]) / 2
    strategy = make(
        make_federation({"budget.deadline-s": deadline, "budget.policy": "drop", "server.rounds": 1})
    )
    strategy.run(make_grid(behave=behave))
    (row,), clients = rows(strategy)
    assert (row.clients_ok, row.clients_late) == (1, 2)
    assert row.round_s == pytest.approx(deadline)
    late = [client for client in clients if client.status == "late"]
    assert trained == [client.client for client in clients if client.status == "ok"]
    assert all(client.loss is None and client.node is None and client.train_flops > 0 for client in late)


def test_a_round_in_which_all_are_late_asks_nobody(make, make_federation, make_grid):
    strategy = make(make_federation({"budget.deadline-s": 1e-6, "budget.policy": "drop"}))

    def behave(client, server_round):
        raise AssertionError("nobody should be asked")

    strategy.run(make_grid(behave=behave))
    assert [row.clients_late for row in rows(strategy)[0]] == [3, 3]


def test_a_device_that_cannot_hold_the_model_is_unfit(make, make_federation, make_grid):
    federation = make_federation({"fleet.devices": "pi-zero-2w:1, pi-5:2"})
    big = replace(
        federation, cost=replace(federation.cost, params=10**8)
    )  # 1.2 GB with gradients and momentum
    strategy = make(big)
    strategy.run(make_grid())
    rounds, clients = rows(strategy)
    unfit = [row for row in clients if row.status == "unfit"]
    assert {row.device for row in unfit} == {"pi-zero-2w"}
    assert "(pi-zero-2w, 0.5 GB) can't hold the 1.2" in unfit[0].reason
    assert (rounds[0].clients_ok, rounds[0].clients_failed) == (2, 1)


def test_a_fleet_that_cannot_hold_the_model_stops_with_the_reason(make, make_federation, make_grid):
    federation = make_federation({"fleet.devices": "pi-zero-2w"})
    big = replace(federation, cost=replace(federation.cost, params=10**8))
    with pytest.raises(RunError, match=r"round 1: 3 of 3 clients failed, .* use a smaller model"):
        make(big).run(make_grid())


def edge_device(client, **told):
    return {"client": client, "rank": client, "images": 10 * (client + 1)} | told


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_kernel_is_averaged_over_the_clients_that_trained_it(make, make_federation, make_grid, nodes):
    """Client c has 10 (c + 1) images and adds c + 1. In round 1 it trains kernel 1 + c of three alone, if it is
    there: client 1, who fails, is the only one for kernel 2.
    """
    federation = make_federation(
        {"model.conv": "fmdconv", "model.kernels": 3, "server.rounds": 1}
        | {"budget.policy": "kernels", "budget.kernels": 1}
    )
    before = pack(federation.model)
    strategy = make(federation)
    grid = make_grid(
        [{"rank": rank, "nodes": nodes} for rank in range(nodes)],
        behave=lambda client, server_round: "no power" if client == 1 else "",
    )
    strategy.run(grid)
    after = pack(federation.model)
    bank = "layer1.0.conv1.bank"
    grown = {name: np.mean(after[name] - before[name]) for name in after}
    assert [grown[f"{bank}.{k}"] for k in (0, 1)] == pytest.approx([3, 1], abs=1e-5)
    assert np.array_equal(after[f"{bank}.2"], before[f"{bank}.2"])
    assert grown["fc.bias"] == pytest.approx((1 + 9) / 4, abs=1e-5)
    _, clients = rows(strategy)
    assert [row.kernels for row in clients] == [1, 1, 1]
    whole, kernel = federation.payload_bytes, federation.cost.kernel_params * 4
    assert [row.up_bytes for row in clients] == [whole - 2 * kernel] * 3
    assert [row.down_bytes for row in clients] == [whole] * 3


def test_a_round_with_nobody_there_is_discarded_and_the_server_waits_for_the_next_window(
    make, make_federation, make_grid, tmp_path, caplog
):
    trace = tmp_path / "trace.csv"
    trace.write_text("client,start_s,end_s\n" + "".join(f"{client},25,1000\n" for client in range(3)))
    federation = make_federation({"fleet.trace": str(trace)})
    strategy = make(federation)
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid())
    rounds, clients = rows(strategy)
    assert [(row.status, row.clients_ok) for row in rounds] == [("discarded", 0), ("ok", 3)]
    assert (rounds[0].round_s, rounds[0].virtual_s) == (25, 25)
    assert {row.round for row in clients} == {2}
    assert any(line.startswith("round 1/2") and line.endswith("discarded") for line in caplog.messages)


@pytest.mark.parametrize(("deadline_s", "seconds"), [(0, 60), (7, 7)])
def test_where_the_dice_leave_nobody_the_server_tries_again(
    make, make_federation, make_grid, deadline_s, seconds
):
    budget = {"budget.policy": "partial", "budget.deadline-s": deadline_s}
    strategy = make(make_federation({"fleet.availability": 1e-9} | budget))
    strategy.run(make_grid())
    assert [(row.status, row.round_s) for row in rows(strategy)[0]] == [("discarded", seconds)] * 2


def test_a_round_with_too_few_reports_keeps_the_model(make, make_federation, make_grid, caplog):
    federation = make_federation({"budget.min-reports": 0.9})
    before = pack(federation.model)
    strategy = make(federation)
    behave = lambda client, server_round: "no power" if server_round == client == 1 else ""  # noqa: E731
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid(behave=behave))
    rounds, _ = rows(strategy)
    assert [(row.status, row.clients_ok) for row in rounds] == [("discarded", 2), ("ok", 3)]
    np.testing.assert_allclose(
        pack(federation.model)["fc.bias"], before["fc.bias"] + 14 / 6, rtol=1e-5, atol=1e-5
    )
    lines = [line for line in caplog.messages if line.startswith(("round 1/2", "round 2/2"))]
    assert [line.endswith("discarded") for line in lines] == [True, False]


def test_of_too_many_clients_the_first_are_kept(make, make_federation, make_grid):
    settings = {"server.clients-per-round": 2, "budget.over-select": 1.5, "budget.policy": "wait"}
    strategy = make(make_federation(settings))
    strategy.run(make_grid())
    rounds, clients = rows(strategy)
    assert [(row.clients_ok, row.clients_late) for row in rounds] == [(2, 1), (2, 1)]
    for row in rounds:
        mine = [client for client in clients if client.round == row.round]
        kept = [client.total_s for client in mine if client.status == "ok"]
        (late,) = (client for client in mine if client.status == "late")
        assert row.round_s == pytest.approx(max(kept))
        assert late.total_s >= max(kept)
        assert late.reason == "2 updates came earlier (budget.over-select)"


def test_speeds_change_from_round_to_round_and_are_the_same_each_time(make, make_federation, make_grid):
    federation = make_federation({"fleet.jitter": 0.5})
    strategy = make(federation)
    strategy.run(make_grid())
    _, clients = rows(strategy)
    assert len({row.compute_s for row in clients}) == 6
    nominal = [
        plan_work(owner, federation.workload(owner.id), federation.budget).compute_s
        for owner in federation.fleet.clients
    ]
    for row in clients:
        speed = federation.fleet.speed(row.round, federation.fleet.clients[row.client])
        assert row.compute_s == pytest.approx(nominal[row.client] / speed)


def test_edge_devices_are_planned_by_their_own_images_and_devices(make, make_federation, make_grid, caplog):
    strategy = make(make_federation({"train.batch-size": 8}))
    devices = [edge_device(0, device="pi-5"), edge_device(1), edge_device(2, device="jetson-nano")]
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid(devices))
    _, clients = rows(strategy)
    assert [(row.device, row.examples, row.steps) for row in clients[:3]] == [
        ("pi-5", 10, 2),
        ("pi-4", 20, 3),
        ("jetson-nano", 30, 4),
    ]
    header = "3 clients (own data, 10 to 30 images each) on 1 jetson-nano, 1 pi-4, 1 pi-5 over wifi"
    assert header in caplog.messages


def test_an_edge_device_with_an_unknown_device_stops_the_run_before_training(
    make, make_federation, make_grid
):
    strategy = make(make_federation({"server.node-timeout-s": 0.05}))
    with pytest.raises(RunError, match="'pi-9'"):
        strategy.run(make_grid([edge_device(0), edge_device(1, device="pi-9"), edge_device(2)]))
    assert not strategy.folder.rounds.exists()


def test_the_log_tells_what_runs_and_how_it_goes(make, make_federation, make_grid, caplog):
    budget = {"budget.policy": "partial", "budget.deadline-s": 6}
    strategy = make(make_federation({"model.conv": "fmdconv"} | budget))
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid())
    first, second, third, *rounds = [record.message for record in caplog.records if record.name == "fedfmd"]
    assert "resnet8 with fmdconv (K=2)" in first
    assert second.startswith("3 clients (iid, ")
    assert second.endswith(" on 3 pi-4 over wifi")
    assert "policy partial, deadline 6 s; seed 0" in third
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    assert rounds[0].endswith("clients 3 ok 0 late 0 failed")


@pytest.mark.parametrize(
    ("policy", "told", "cut"),
    [
        ("partial", "policy partial, deadline 1e-06 s; seed 0", 3),
        ("wait", "policy wait, deadline 1e-06 s (unheeded); seed 0", 0),
    ],
)
def test_the_log_tells_how_many_clients_were_cut(make, make_federation, make_grid, caplog, policy, told, cut):
    budget = {"budget.policy": policy, "budget.deadline-s": 1e-6, "server.rounds": 1, "train.batch-size": 4}
    strategy = make(make_federation(budget))
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid())
    (row,) = rows(strategy)[0]
    assert row.clients_cut == cut
    assert told in caplog.text
    assert ("failed 3 cut" in caplog.text) == bool(cut)


def test_the_model_is_tested_every_so_many_rounds_and_at_the_end(make, make_federation, make_grid, caplog):
    strategy = make(make_federation({"server.rounds": 5, "server.evaluate-every": 2}))
    with caplog.at_level(logging.INFO, "fedfmd"):
        strategy.run(make_grid())
    _, second, _, fourth, _ = made = rows(strategy)[0]
    assert [row.round for row in made if row.accuracy is not None] == [2, 4, 5]
    assert all((row.accuracy is None) == (row.loss is None) == (row.ies_train is None) for row in made)
    best = [None, second.accuracy, second.accuracy, max(second.accuracy, fourth.accuracy)]
    assert [row.best_accuracy for row in made[:4]] == best
    told = [message for message in caplog.messages if message.startswith("round ")]
    assert ["accuracy" in message for message in told] == [False, True, False, True, True]


def test_checkpoints_are_kept_as_asked(make, make_federation, make_grid):
    strategy = make(make_federation({"server.rounds": 5, "server.checkpoint-every": 2}))
    strategy.run(make_grid())
    marks = sorted(path.name for path in strategy.folder.checkpoints.glob("*.json"))
    assert marks == ["round-00004.json", "round-00005.json"]
    state = json.loads((strategy.folder.checkpoints / marks[-1]).read_text())["state"]
    assert state["round"] == 5


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    make, make_federation, make_grid, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(strategies.tracked, "save_checkpoint", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(make_federation()).run(make_grid())
    strategy = make(make_federation())
    assert [row.round for row in rows(strategy)[0]] == [1]  # its row was written, its checkpoint was not
    strategy.run(make_grid())
    assert [row.round for row in rows(strategy)[0]] == [1, 2]
    assert [row.round for row in rows(strategy)[1]] == [1, 1, 1, 2, 2, 2]


def test_a_finished_run_asks_no_nodes(make, make_federation, make_grid):
    federation = make_federation()
    done = make(federation).run(make_grid())
    assert make(federation).run(grid=None) == done


def test_an_unknown_strategy_names_the_nearest(make, make_federation):
    with pytest.raises(SettingsError, match=r"server\.strategy = 'fedagv'.*did you mean 'fedavg'"):
        make(make_federation({"server.strategy": "fedagv"}))


@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_plans_and_takes_uploads_without_normalisation(make, make_federation, make_grid, norm, upload):
    own = {"model.norm": norm, "transport.upload": upload, "server.strategy": "fedbn", "server.rounds": 1}
    federation = make_federation(own)
    private = set(norm_views(federation.model))
    before = pack(federation.model)
    strategy = make(federation)
    strategy.run(make_grid(private=private))
    after = pack(strategy.federation.model)
    changed = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    assert changed == before.keys() - private
    sent = {name: array for name, array in before.items() if name not in private}
    expected = upload_bytes(sent, upload, parameter_names(federation.model))
    assert [row.up_bytes for row in rows(strategy)[1]] == [expected] * 3
    assert all(row.status == "ok" for row in rows(strategy)[1])


LENGTH = {"server.rounds": 1, "partition.clients": 4, "server.strategy": "fedavg", "model.norm": "batch"}


@pytest.mark.parametrize(
    ("limit", "scaled"),
    [
        ({}, []),
        ({"server.max-update-norm": 1e6}, []),
        ({"server.max-update-norm": 2.0}, [0, 1, 2, 3]),
        ({"server.max-update-ratio": 1.5}, [3]),  # clients add 1, 2, 3, 4 to each number: the median is 2.5
    ],
)
def test_an_update_beyond_the_limit_is_scaled_down_to_it(
    make, make_federation, make_grid, caplog, limit, scaled
):
    federation = make_federation(LENGTH | limit)
    before, parameters = pack(federation.model), parameter_names(federation.model)
    size = sum(array.size for name, array in before.items() if name in parameters) ** 0.5
    strategy = make(federation)
    strategy.run(make_grid())
    most = min(
        limit.get("server.max-update-norm", math.inf) / size, limit.get("server.max-update-ratio", 9) * 2.5
    )
    growth = sum(
        images * min(added, most) for added, images in zip((1, 2, 3, 4), (10, 20, 30, 40), strict=True)
    )
    for name, array in pack(federation.model).items():
        if array.ndim:
            np.testing.assert_allclose(array - before[name], growth / 100, rtol=1e-3, atol=1e-6)
    told = {row.client: (row.status, row.reason) for row in rows(strategy)[1] if row.reason}
    assert list(told) == scaled
    for client, (status, reason) in told.items():
        assert status == "ok"
        assert reason == (
            f"update of norm {(client + 1) * size:.4g} scaled down to {most * size:.4g} ({next(iter(limit))})"
        )
        assert f"round 1: client {client}: {reason}" in caplog.messages


def test_where_updates_are_limited_every_client_has_its_own_message(
    make, make_federation, make_grid, workers
):
    make_grid([])
    for limit, messages in (({}, 1), ({"server.max-update-ratio": 3}, 3)):
        strategy = make(make_federation(limit))
        strategy.nodes = workers(1)
        sent = strategy.configure_train(1, strategy.initial_arrays, ConfigRecord(), grid=None)
        assert len(sent) == messages


def test_an_edge_devices_error_cannot_pass_for_a_dead_worker(make, make_federation, make_grid):
    strategy = make(make_federation({"server.rounds": 1}))
    grid = make_grid([edge_device(0), edge_device(1), edge_device(2)])
    pull = grid.pull_messages

    def forged(ids):
        """Client 0's device says that it is a Ray worker, which died."""
        fault = Error(0, "<class 'ray.exceptions.ActorDiedError'>:<'gone'>")
        first = [request.message for request in strategy._round.requests][:1]
        mine = {message.metadata.message_id: message for message in first}
        return [
            Message(fault, reply_to=mine[id]) if (id := answered_id(reply)) in mine else reply
            for reply in pull(ids)
        ]

    grid.pull_messages = forged
    strategy.run(grid)
    assert sorted(status(strategy).values()) == ["failed", "ok", "ok"]


@pytest.mark.parametrize(
    ("limit", "round", "told"),
    [
        ("seconds={second}", 2, "virtual time in seconds {second:.6g} has reached server.stop-at seconds="),
        ("joules=1e9, mb={traffic}", 3, "traffic in MB"),
        ("accuracy=0.0001", 1, "accuracy on the test images, without any validation images,"),
    ],
)
def test_a_run_ends_when_a_limit_is_met_and_a_resume_says_so(
    limit, round, told, make, make_federation, make_grid, caplog, tmp_path
):
    many = {"server.rounds": 6, "server.checkpoint-every": 5, "server.evaluate-every": 4, "threads": 1}
    if limit.startswith("accuracy"):
        many["server.evaluate-every"] = 1
    whole = make_strategy(make_federation(many), RunFolder(tmp_path / "whole"))
    whole.run(make_grid())
    made = rows(whole)[0]
    traffic = sum(row.up_bytes + row.down_bytes for row in made[:3]) / 1e6
    values = {"second": made[1].virtual_s, "traffic": traffic}
    stopping = many | {"server.stop-at": limit.format(**values)}
    with caplog.at_level(logging.INFO, "fedfmd"):
        done = make(make_federation(stopping)).run(make_grid())
    assert done.round == round
    line = next(text for text in caplog.messages if text.startswith("the run ends after"))
    assert line.startswith(f"the run ends after round {round} of 6: {told.format(**values)}")
    strategy = make(make_federation(stopping))
    kept = rows(strategy)[0]
    assert [row.round for row in kept] == list(range(1, round + 1))
    assert kept[-1].accuracy is not None  # the last model is tested, whatever server.evaluate-every says
    before = strategy.folder.rounds.read_bytes()
    caplog.clear()
    with caplog.at_level(logging.INFO, "fedfmd"):
        assert strategy.run(grid=None) == done
    assert line in caplog.messages
    assert strategy.folder.rounds.read_bytes() == before


def test_flowers_start_cannot_end_early(make, make_federation, make_grid):
    strategy = make(make_federation({"server.stop-at": "seconds=1"}))
    with pytest.raises(
        RunError, match=r"server\.stop-at ends a run of `run`, and Flower's `start` does all rounds"
    ):
        strategy.configure_train(1, strategy.initial_arrays, ConfigRecord(), grid=None)


def test_an_edge_device_that_cannot_test_costs_its_row_the_columns_alone(
    make, make_federation, make_grid, caplog
):
    """The stub's clients train, and know no message that has them test."""
    strategy = make(make_federation({"partition.test-share": 0.1, "server.rounds": 1}))
    strategy.run(make_grid())
    assert {row.status for row in rows(strategy)[1]} == {"ok"}
    assert {row.test_accuracy for row in rows(strategy)[1]} == {None}
    assert "round 1: no test of client 0: unusable reply: " in caplog.text
