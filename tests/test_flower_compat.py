"""Flower's behaviour that fedfmd relies on: one test per fact of `fedfmd.flower_compat`."""

import ast
import base64
import json
import logging
import pickle
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import httpx
import numpy as np
import pytest
import typer
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.cli import ls
from flwr.cli.app import app as flwr_app
from flwr.cli.flower_config import read_superlink_connection
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.server.utils.validator import validate_message
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.logger import print_json_error
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supercore.primitives.asymmetric_ed25519 import generate_key_pair
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.routers.health.router import router as health
from flwr.supercore.run import RunStatus
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from flwr.superlink.servicer.fleet.fleet_handlers import push_messages
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.start_client_internal import _verify_fab

import fedfmd
import fedfmd.flower_compat as compat
import strategies

DOCUMENTED = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}


def imported(path):
    """The modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_all_other_modules_import_only_what_flower_documents():
    undocumented = {
        (path.relative_to(Path(package.__file__).parents[1]).as_posix(), module)
        for package in (fedfmd, strategies)
        for path in Path(package.__file__).parent.rglob("*.py")
        for module in imported(path)
        if module.partition(".")[0] == "flwr" and module not in DOCUMENTED
    }
    assert {file for file, _ in undocumented} == {"fedfmd/flower_compat.py"}, undocumented


@pytest.fixture
def make_message():
    """Makes a message to a node, by run 1's server."""
    compat.set_identity(1, compat.SERVER_ID)
    return lambda node=7: Message(RecordDict(), node, MessageType.QUERY)


@pytest.fixture
def make_reply(make_message):
    """Makes the reply of an error to message "m"."""

    def make(code, reason):
        request = make_message()
        compat.set_message_id(request, "m")
        return Message(Error(code, reason), reply_to=request)

    return make


# --- A process that sends messages


def test_a_message_needs_an_identity_and_has_it():
    """In a process of its own: it is set for good."""
    code = (
        "from flwr.app import Message, MessageType, RecordDict\n"
        "import fedfmd.flower_compat as compat\n"
        "make = lambda: Message(RecordDict(), 7, MessageType.QUERY).metadata\n"
        "try: make()\n"
        "except RuntimeError: print('refused')\n"
        "compat.set_identity(5, 3)\n"
        "print(make().run_id, make().src_node_id)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "5", "3"]


def test_a_run_with_nothing_but_its_id():
    assert compat.empty_run(5).run_id == 5


def test_a_server_app_is_called_with_grid_and_context():
    app, seen = ServerApp(), []

    @app.main()
    def main(grid, context):
        seen.append((grid, context))

    context = Context(1, 1, {}, RecordDict(), {})
    compat.serve(app, "grid", context)
    assert seen == [("grid", context)]


def test_a_client_app_is_called_with_message_and_context_and_may_raise(make_message):
    app = ClientApp()

    @app.query()
    def query(message, context):
        if context.node_config["broken"]:
            raise RuntimeError("out of battery")
        return Message(RecordDict({"told": ConfigRecord({"node": context.node_id})}), reply_to=message)

    message = make_message()
    fine, failed = (
        compat.answer(app, message, Context(1, 7, {"broken": broken}, RecordDict(), {}))
        for broken in (False, True)
    )
    assert fine.content["told"]["node"] == 7
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert failed.error.reason.endswith("RuntimeError: out of battery\n")


def test_a_simulations_nodes_know_their_place():
    from flwr.server.superlink.fleet.vce.vce_api import _register_node_info_stores

    stores = _register_node_info_stores({11: 0, 12: 1}, compat.empty_run(1))
    contexts = [stores[node].retrieve_context(1) for node in (11, 12)]
    assert [context.node_config for context in contexts] == [compat.node_config(rank, 2) for rank in (0, 1)]


# --- Ids of messages


def test_a_reply_names_the_id_that_was_set(make_message):
    message = make_message()
    compat.set_message_id(message, "m-1")
    assert compat.answered_id(Message(RecordDict(), reply_to=message)) == "m-1"


def test_grids_write_the_id_into_the_message_that_is_pushed(make_message):
    class State:
        def state(self):
            return self

        def get_run_info(self, run_ids):
            return [compat.empty_run(run_id) for run_id in run_ids]

        def store_message_ins(self, message):
            return message.metadata.message_id

    grid = InMemoryGrid(State())
    grid.set_run(compat.empty_run(1))
    message = make_message()
    assert compat.message_id(message) == ""
    (pushed,) = grid.push_messages([message])
    assert pushed
    assert compat.message_id(message) == pushed


def test_of_a_vanished_node_only_the_messages_id_is_told(make_message):
    message = make_message(node=7)
    compat.set_message_id(message, "m")
    reply = create_message_error_unavailable_res_message(message.metadata, "node_unavail")
    assert compat.answered_id(reply) == "m"
    assert reply.metadata.src_node_id == compat.SERVER_ID


# --- Errors in replies


def test_a_vanished_node_is_gone_and_a_raising_one_is_not(make_message, make_reply):
    gone = create_message_error_unavailable_res_message(make_message().metadata, "node_unavail")
    late = create_message_error_unavailable_res_message(make_message().metadata, "msg_unavail")
    raised = make_reply(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no")
    assert [compat.is_gone(reply) for reply in (gone, late, raised)] == [True, False, False]
    assert not compat.is_gone(Message(RecordDict(), reply_to=make_message()))


def by_worker(error, message):
    """What Flower's simulation makes of an error that its backend raises."""
    import threading
    from queue import Queue

    from flwr.server.superlink.fleet.vce.vce_api import VceMetrics, worker

    class Backend:
        def process_message(self, message, context):
            stop.set()
            raise error

    class Store:
        def retrieve_context(self, run_id):
            return None

    stop, messages, replies = threading.Event(), Queue(), Queue()
    messages.put(message)
    worker(messages, replies, {message.metadata.dst_node_id: Store()}, Backend(), stop, VceMetrics())
    return replies.get_nowait()


def test_a_dead_ray_actor_is_told_from_other_errors(make_message, make_reply):
    ray = pytest.importorskip("ray.exceptions")
    replies = {
        "dead": by_worker(ray.ActorDiedError(), make_message()),
        "memory": by_worker(ray.OutOfMemoryError("too much"), make_message()),
        "lost": by_worker(ray.ObjectLostError("0" * 56, "", ""), make_message()),
        "actor's": by_worker(
            ray.RayTaskError("run", "no import", ImportError("x")).as_instanceof_cause(), make_message()
        ),
        "actor's, of no cause": by_worker(
            ray.RayTaskError("run", "no import", ImportError("x")), make_message()
        ),
        "other": by_worker(ValueError("<class 'ray.exceptions.ActorDiedError'>"), make_message()),
        "app's": make_reply(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'ray.exceptions.ActorDiedError'>"),
    }
    faults = {name: compat.dead_worker([reply]) for name, reply in replies.items()}
    assert faults == {
        "dead": "ActorDiedError",
        "memory": "OutOfMemoryError",
        "lost": "ObjectLostError",
        "actor's": "",
        "actor's, of no cause": "",
        "other": "",
        "app's": "",
    }
    assert compat.dead_worker(replies.values()) == "ActorDiedError"


@pytest.mark.parametrize(
    ("reason", "text"),
    [("Traceback\n  line 1\nValueError: no images \n", "ValueError: no images"), ("", "error code 2")],
)
def test_the_text_of_an_error_is_its_last_line(make_reply, reason, text):
    assert compat.error_text(make_reply(2, reason)) == text


# --- Arrays


ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.asfortranarray(np.arange(6, dtype=np.int8).reshape(2, 3)),
    np.array(7),
    np.zeros((0, 3), np.int64),
    np.ones((2, 1, 2), np.float16),
]


def same(ours, theirs):
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("array", ARRAYS)
def test_our_arrays_are_flowers_and_flowers_are_ours(array):
    ours, theirs = compat.to_array(np.asarray(array, order="C")), Array(array)
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    same(ours.numpy(), array)
    same(compat.to_numpy(ours), array)
    same(compat.to_numpy(theirs), array)


def test_numbers_share_the_messages_memory():
    received = compat.to_array(ARRAYS[0])
    assert np.shares_memory(compat.to_numpy(received), np.frombuffer(received.data, np.uint8))


def test_a_received_array_may_hold_a_memoryview():
    buffers = []
    text = pickle.dumps(compat.to_array(ARRAYS[0]), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1
    received = pickle.loads(text, buffers=[bytearray(buffers[0].raw())])
    assert isinstance(received.data, memoryview)
    same(compat.to_numpy(received), ARRAYS[0])


# --- Flower's strategies


def step(strategy, number, start, goal, reply):
    """What a strategy makes of a client's update."""
    compat.start_step(strategy, number, ArrayRecord({"w": compat.to_array(np.array([start]))}), grid=None)
    content = {"arrays": ArrayRecord({"w": compat.to_array(np.array([goal]))})}
    reply.content = RecordDict(content | {"metrics": MetricRecord({"num-examples": 1})})
    arrays, _ = strategy.aggregate_train(number, [reply])
    return float(arrays["w"].numpy()[0])


def strategies_with_optimiser():
    return [
        FedAvgM(server_learning_rate=0.5, server_momentum=0.5),
        FedAdam(eta=0.1),
        FedYogi(eta=0.1),
        FedAdagrad(eta=0.1),
    ]


@pytest.mark.parametrize(
    "strategy", strategies_with_optimiser(), ids=lambda strategy: type(strategy).__name__
)
def test_a_strategys_step_starts_where_it_is_told(strategy, make_message):
    reply = Message(RecordDict(), reply_to=make_message())
    for number, start in enumerate((10.0, -10.0), start=1):
        moved = step(strategy, number, start, start + 1.0, reply) - start
        assert 0 < moved < 1, "it took its own last state for the start"


@pytest.mark.parametrize(
    "strategy", strategies_with_optimiser(), ids=lambda strategy: type(strategy).__name__
)
def test_a_strategy_keeps_arrays_in_mappings_or_lists_and_its_start_apart(strategy, make_message):
    reply = Message(RecordDict(), reply_to=make_message())
    for number in (1, 2):
        step(strategy, number, 0.0, 1.0, reply)
    kept = compat.kept_between_rounds(strategy)
    arrays = {
        name
        for name, value in kept.items()
        if isinstance(value, dict | list)
        and any(isinstance(v, np.ndarray) for v in (value.values() if isinstance(value, dict) else value))
    }
    assert arrays == ({"momentum_vector"} if isinstance(strategy, FedAvgM) else {"m_t", "v_t"})
    assert "current_arrays" in vars(strategy).keys() - kept.keys()


# --- Logs


def test_importing_flower_sets_its_loggers_level_which_is_then_set_anew():
    code = (
        "import logging; logger = logging.getLogger('flwr'); logger.setLevel(logging.ERROR)\n"
        "import fedfmd.flower_compat as compat\n"
        "print(logger.level); compat.quiet_logs(); print(logger.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(level) for level in done.stdout.split()] == [logging.DEBUG, logging.WARNING]


# --- What a device of a deployment asks of the SuperLink


def test_devices_calls_are_flowers_without_registering_oneself():
    class Client(FleetHttpClient):
        def __init__(self):
            self.paths = set()

        def _unary_unary(self, path, **options):
            self.paths.add(path)

    client = Client()
    for descriptor in fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].methods:
        getattr(client, descriptor.name)(None)
    own = {f"/v1/fleet/{call}" for call in compat.DEVICE_CALLS}
    assert client.paths - own == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert own <= {path for _, path in PROTOBUF_REQUEST_TYPES} & client.paths


def test_devices_send_flowers_headers(monkeypatch):
    keys = generate_key_pairs()
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(*keys)]
    sent = []

    def answer(request):
        sent.extend(request.headers)
        return httpx.Response(200, headers={"content-type": "application/protobuf"})

    client = FleetHttpClient("http://superlink", interceptors=interceptors)
    client._client = httpx.Client(transport=httpx.MockTransport(answer))
    client.PullMessages(fleet_pb2.PullMessagesRequest())
    added = {name for name in sent if name.startswith(compat.DEVICE_HEADERS)}
    of_http = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-length"}
    assert set(sent) - added <= of_http
    assert {"content-type", "flwr-public-key", "flwr-signature", "flwr-timestamp"} <= added


def pushed(node, sender, answered, receiver=compat.SERVER_ID):
    """What device `node` posts: a message from `sender` to `receiver`."""
    metadata = {"src_node_id": sender, "dst_node_id": receiver, "reply_to_message_id": answered}
    metadata |= {
        "run_id": 1,
        "message_id": "m",
        "message_type": "train",
        "ttl": 60,
        "created_at": time.time(),
    }
    request = fleet_pb2.PushMessagesRequest(node={"node_id": node}, messages_list=[{"metadata": metadata}])
    request.messages_list[0].content.SetInParent()
    request.message_object_trees.add()
    return request


FORGED = {"as the server": (7, compat.SERVER_ID, "", 8), "as another device": (7, 8, "m-0")}


def test_a_device_speaks_for_itself_in_replies():
    assert compat.speaks_for_itself(pushed(7, 7, "m-0").SerializeToString())
    assert not compat.speaks_for_itself(pushed(7, 7, "").SerializeToString())
    assert not compat.speaks_for_itself(b"no message")
    for forged in FORGED.values():
        assert not compat.speaks_for_itself(pushed(*forged).SerializeToString())


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_the_superlink_itself_takes_what_is_forged(forged):
    """If this fails, Flower has closed the gap: the check can go."""
    stored = []

    class State:
        def get_run_status(self, run_ids):
            return {run: RunStatus("running", "", "") for run in run_ids}

        def start_session(self, run_id):
            return "session"

        def store_message_and_object_tree(self, message, tree, session):
            stored.append((message.metadata.src_node_id, message.metadata.dst_node_id))
            return True, []

        def store_traffic(self, *arguments, **options):
            pass

    request = pushed(*forged)
    push_messages(request, State())
    sender = request.messages_list[0].metadata
    assert stored == [(sender.src_node_id, sender.dst_node_id)]


def test_an_order_to_another_device_passes_flowers_check():
    order = message_from_proto(pushed(*FORGED["as the server"]).messages_list[0])
    assert validate_message(order, is_reply_message=False) == []


def test_devices_check_a_signature_over_this_message():
    private, public = generate_key_pair()
    app = b"an app"
    signature = base64.urlsafe_b64encode(private.sign(compat.message_to_sign(app, 1_700_000_000))).decode()
    signed = {
        "owner": json.dumps({"signature": signature, "signed_at": 1_700_000_000}),
        "valid_license": "Valid",
    }
    trusted = {"owner": public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()}
    assert _verify_fab(Fab("", app, signed), trusted)
    assert not _verify_fab(Fab("", b"another app", signed), trusted)


# --- A private SuperLink and the commands of a simulation


def in_environment(home, code):
    """What a program prints in Flower's environment."""
    environment = compat.flower_environment(home)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_environment_is_flowers(tmp_path):
    code = (
        "from flwr.supercore.utils import get_flwr_home\n"
        "from flwr.superlink.cli.flower_superlink import _runtime_dependency_install_default\n"
        "from flwr.supercore import constant, telemetry\n"
        "import os, shutil\n"
        "print(get_flwr_home(), _runtime_dependency_install_default(), telemetry.FLWR_TELEMETRY_ENABLED,\n"
        "      os.environ[constant.FLWR_DISABLE_UPDATE_CHECK], *map(shutil.which, ('flwr', 'flower-superlink')))"
    )
    beside = Path(sys.executable).parent
    assert in_environment(tmp_path, code) == [
        *(str(tmp_path), "False", "0", "1"),
        *(str(beside / program) for program in ("flwr", "flower-superlink")),
    ]


def test_the_environment_is_rays(tmp_path):
    pytest.importorskip("ray")
    code = (
        "from ray._private import ray_constants\n"
        "from ray._private.accelerators import RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR as gpus\n"
        "import os\n"
        "print(ray_constants.RAY_DEDUP_LOGS, os.environ[gpus])"
    )
    assert in_environment(tmp_path, code) == ["False", "0"]


def test_ray_starts_a_cluster_of_its_own_or_joins_the_one_at_the_address(tmp_path, monkeypatch):
    constants = pytest.importorskip("ray._private.ray_constants")
    name = constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE
    monkeypatch.setenv(name, "10.0.0.9:6379")
    assert name == compat.CLUSTER_ADDRESS
    assert compat.flower_environment(tmp_path)[name] == "local"
    assert compat.flower_environment(tmp_path, "10.0.0.1:6379")[name] == "10.0.0.1:6379"


def test_workers_of_a_cluster_get_the_variables_that_they_need(tmp_path, monkeypatch):
    """Beside what ``ray job submit`` gives them, and Flower."""
    name = pytest.importorskip("ray._private.runtime_env.constants").RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray._private.worker import _merge_runtime_env
    from ray.job_config import JobConfig

    submitted = {"runtime_env": {"pip": ["mine"], "env_vars": {"A": "1"}}, "metadata": {"name": "job"}}
    monkeypatch.setenv(name, json.dumps(submitted))
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    monkeypatch.setenv("FEDFMD_OWN_CODE", "/mine")
    config = JobConfig.from_json(json.loads(compat.flower_environment(tmp_path, "10.0.0.1:6379")[name]))
    assert config.metadata["name"] == "job"
    assert _merge_runtime_env(config.runtime_env, {"env_vars": {"PYTHONPATH": "/x"}}) == {
        "pip": ["mine"],
        "env_vars": {"A": "1", "XDG_CACHE_HOME": "/shared", "FEDFMD_OWN_CODE": "/mine", "PYTHONPATH": "/x"},
    }
    assert compat.flower_environment(tmp_path)[name] == json.dumps(submitted)


def test_the_config_file_leads_to_our_superlink(tmp_path, monkeypatch):
    import tomli_w

    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(compat.connection_config(1234)))
    for name in (None, compat.CONNECTION):
        connection = read_superlink_connection(name)
        assert (connection.name, connection.address) == (compat.CONNECTION, "127.0.0.1:1234")
        assert connection.insecure


def test_the_superlinks_command_is_understood():
    program, *arguments = compat.superlink_command(1234)
    parsed = _parse_args_run_superlink().parse_args(arguments)
    assert program == "flower-superlink"
    assert (parsed.host, parsed.port) == ("127.0.0.1", 1234)
    assert parsed.simulation
    assert parsed.insecure
    assert not parsed.runtime_dependency_install


def test_a_superlink_tells_its_health():
    assert compat.health_url(1234) == "http://127.0.0.1:1234/health"
    assert ("/health", {"GET"}) in [(route.path, route.methods) for route in health.routes]


def parsed(command):
    """The options that Flower's command understands, by name."""
    program, name, *arguments = command
    assert program == "flwr"
    group = typer.main.get_command(flwr_app)
    return group.commands[name].make_context(name, arguments).params


def test_the_run_command_is_understood():
    from flwr.cli.run.run import _parse_federation_config_overrides
    from flwr.cli.typing import SuperLinkConnection

    options = parsed(compat.run_command(Path("/app"), 3))
    assert (options["app"], options["superlink"], options["output_format"]) == (
        "/app",
        compat.CONNECTION,
        "json",
    )
    overrides = options["federation_config_overrides"]
    simulation = _parse_federation_config_overrides(overrides, SuperLinkConnection("x", "127.0.0.1:1"))
    told = (simulation.num_supernodes, simulation.client_resources_num_cpus, simulation.init_args_num_cpus)
    assert told == (3, 1, 3)

    overrides = parsed(compat.run_command(Path("/app"), 3, gpus=0.5))["federation_config_overrides"]
    cluster = _parse_federation_config_overrides(overrides, SuperLinkConnection("x", "127.0.0.1:1"))
    assert (cluster.num_supernodes, cluster.client_resources_num_gpus) == (3, 0.5)
    assert not cluster.HasField("init_args_num_cpus")


@pytest.mark.parametrize("refused", [False, True])
def test_a_submitted_run_has_its_id_and_a_refused_one_its_reason(monkeypatch, capfd, refused):
    """Both from what ``flwr run`` prints; of a refused run that is an error's text."""
    from flwr.cli.typing import SuperLinkConnection
    from flwr.proto.control_pb2 import StartRunResponse

    class Client:
        def StartRun(self, request):  # noqa: N802
            if refused:
                raise ValueError("no such app")
            return StartRunResponse(run_id=12)

        def close(self):
            pass

    module = import_module("flwr.cli.run.run")
    monkeypatch.setattr(module, "init_http_client_from_connection", lambda connection: Client())
    connection = SuperLinkConnection("x", "127.0.0.1:1")
    try:
        module._run_with_control_api(Path(), {}, None, connection, None, None, False, True, "@a/b")
    except ValueError as error:
        print_json_error("refused", error)
    printed = capfd.readouterr().out
    run_id, reason = compat.submitted_run(json.loads(printed[printed.index("{") :]))
    assert (run_id, reason) == (("", "refused\nno such app") if refused else ("12", ""))


def test_the_log_command_is_understood():
    options = parsed(compat.log_command("12"))
    assert (options["run_id"], options["superlink"], options["stream"]) == (12, compat.CONNECTION, True)


def test_the_state_command_is_understood():
    options = parsed(compat.state_command("12"))
    told = options["superlink"], options["run_id"], options["output_format"]
    assert told == (compat.CONNECTION, 12, "json")


@pytest.mark.parametrize(
    ("status", "sub_status", "details", "expected"),
    [
        ("running", "", "", compat.RunState(False, False, "running: see the log above")),
        ("finished", "completed", "", compat.RunState(True, True, "finished:completed: see the log above")),
        ("finished", "failed", "no heartbeat", compat.RunState(True, False, "finished:failed: no heartbeat")),
        ("finished", "stopped", "", compat.RunState(True, False, "finished:stopped: see the log above")),
    ],
)
def test_the_state_of_a_run_is_read_from_flowers_answer(status, sub_status, details, expected):
    from flwr.cli.run_utils import format_runs
    from flwr.supercore.run import RunStatus

    run = compat.empty_run(12)
    run.status = RunStatus(status, sub_status, details)
    answer = json.loads(ls._to_json(format_runs([run], "2026-01-01T00:00:00+00:00")))
    assert compat.run_state(answer) == expected
