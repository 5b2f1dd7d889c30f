"""All that fedfmd relies on in Flower 1.41 beyond its documented API, one fact per function.

Elsewhere only `flwr.app`, `flwr.clientapp`, `flwr.serverapp` and its strategies are imported. Each docstring says
where in Flower the fact stands, and each fact has a test of its own in ``tests/test_flower_compat.py``: with another
version of Flower, those that fail tell what to change here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from pickle import PickleBuffer
from typing import Any, SupportsIndex

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
    ErrorCode,
    Status,
    SType,
    SubStatus,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

Json = dict[str, Any]

SERVER_ID = SUPERLINK_NODE_ID
"""The server's own node id, by which messages name it as their sender (`flwr.common.constant`)."""

RANK, NODES = PARTITION_ID_KEY, NUM_PARTITIONS_KEY
"""What a node of a simulation is told, as its config names it (`flwr.common.constant`)."""

# --- A process that sends messages -----------------------------------------------------------------------------


def set_identity(run_id: int, node_id: int) -> None:
    """Set who sends the messages that this process makes.

    `Message` reads run, task and sender from the class `flwr.supercore.task_identity.TaskIdentity`, and raises
    where they are not set. Flower's own engines set them when they start an app.
    """
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, node_id


def empty_run(run_id: int) -> Run:
    """Return the information that a grid must have of its run, with nothing in it but the id.

    `Grid.run` is a `flwr.supercore.run.Run`, of more than a dozen fields without defaults.
    """
    return Run.create_empty(run_id)


def serve(server_app: ServerApp, grid: Grid, context: Context) -> None:
    """Run a ServerApp's main function to its end: a `flwr.serverapp.ServerApp` is called with grid and context."""
    server_app(grid, context)


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """Return a ClientApp's reply; where it raises, an error with the traceback, as Flower's nodes reply.

    A `flwr.clientapp.ClientApp` is called with message and context. Its node reports what it raises by the code
    `ErrorCode.CLIENT_APP_RAISED_EXCEPTION` (`flwr.server.superlink.fleet.vce.vce_api.worker`).
    """
    try:
        return client_app(message, context)
    except Exception:  # a node's fault is a reply, not the end of the run
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc())
        return Message(error, reply_to=message)


def node_config(rank: int, nodes: int) -> dict[str, int]:
    """Return the config that the `rank`-th of a simulation's nodes has: its place, and how many there are.

    Flower's simulation tells nothing else (`flwr.server.superlink.fleet.vce.vce_api._register_node_info_stores`).
    """
    return {RANK: rank, NODES: nodes}


# --- Ids of messages -------------------------------------------------------------------------------------------


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that its replies refer to, as grids do when it is pushed.

    `Metadata` has no setter for it; Flower's grids write into its ``__dict__``
    (`flwr.superlink.grid.inmemory_grid`).
    """
    message.metadata.__dict__["_message_id"] = message_id


def message_id(message: Message) -> str:
    """Return the id of a message that was pushed: grids write it into the sender's own object, "" until then.

    Source: `push_messages` in `flwr.superlink.grid.inmemory_grid` and in `http_grid`.
    """
    return message.metadata.message_id


def answered_id(reply: Message) -> str:
    """Return the id of the message that a reply answers, the only thing that tells whose reply it is.

    For a node that has vanished the SuperLink answers in its own name, as the sender `SERVER_ID`
    (`flwr.server.superlink.linkstate.utils.create_message_error_unavailable_res_message`).
    """
    return reply.metadata.reply_to_message_id


# --- Errors in replies -----------------------------------------------------------------------------------------

_RAY_FAULT = re.compile(r"<class 'ray\.exceptions\.(?!RayTaskError)(\w+)'>")
"""Ray's exceptions but for those that pass on what an actor raised: RayTaskError, RayTaskError(ValueError), …"""


def is_gone(reply: Message) -> bool:
    """Whether the SuperLink answers that the node is not there any more, by `ErrorCode.NODE_UNAVAILABLE`.

    Source: `flwr.server.superlink.linkstate.utils.create_message_error_unavailable_res_message`.
    """
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def dead_worker(replies: Iterable[Message]) -> str:
    """Return Ray's name of the fault if a worker of Flower's simulation, or its machine, died, "" if none did.

    With a machine go the replies that it has not passed on yet (`ray.exceptions.ObjectLostError`). Flower keeps a dead
    actor in its pool, where it fails every job that it is handed. All that it tells is an error of unknown kind
    (`ErrorCode.UNKNOWN`) whose reason starts with the type of Ray's exception
    (`flwr.server.superlink.fleet.vce.vce_api.worker`).
    """
    for reply in replies:
        if reply.has_error() and reply.error.code == ErrorCode.UNKNOWN:
            found = _RAY_FAULT.match(reply.error.reason or "")
            if found:
                return found[1]
    return ""


def error_text(reply: Message) -> str:
    """Return the last line of an error's reason, or its code if it has none.

    Reasons are whole tracebacks (`flwr.server.superlink.fleet.vce.vce_api.worker`), whose last line is the error.
    """
    lines = (reply.error.reason or "").strip().splitlines()
    return lines[-1].strip() if lines else f"error code {reply.error.code}"


# --- Arrays ----------------------------------------------------------------------------------------------------

_MOST_HEADER_BYTES = 1024
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '(?P<dtype>[<>|=][biuf]\d{1,2})', 'fortran_order': (?P<columns>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n",
    re.DOTALL,
)
"""Version 1.0 of the format, which NumPy writes for plain numbers (`numpy.lib.format`)."""


def to_array(array: np.ndarray) -> Array:
    """Return Flower's array of the same dtype and shape, 0-dim ones included, with fewer copies than `Array(array)`.

    Flower's serialisation is named `SType.NUMPY` and is a .npy file (`Array.from_numpy_ndarray`); `Array` takes
    such content, and any subclass of bytes, as it is (`flwr.app.message.array`).
    """
    header = _header(array.dtype, array.shape)
    data = b"".join([header, array.reshape(-1).view(np.uint8).data])
    return Array(str(array.dtype), array.shape, SType.NUMPY, _Content(data))


@lru_cache(maxsize=4096)  # NumPy takes longer for a header than for the numbers of a small array
def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = BytesIO()
    write_array_header_1_0(header, {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return header.getvalue()


def to_numpy(array: Array) -> np.ndarray:
    """Return the numbers of Flower's array, which can't be written to as they share its memory.

    `Array.data` is a .npy file. `Array.numpy` has NumPy evaluate its header and allocate the shape that it claims;
    here the header must be one that NumPy writes for numbers, and claim just the bytes that are there.

    Raises:
        ValueError: the content is damaged.
    """
    header = _HEADER.match(bytes(array.data[:_MOST_HEADER_BYTES]))
    if header is None or header.end() != 10 + int.from_bytes(header["length"], "little") or header.end() % 64:
        raise ValueError("an array is no .npy file of numbers")
    try:
        dtype = np.dtype(header["dtype"].decode())
    except TypeError as error:
        raise ValueError(f"an array has numbers of an unknown type ({error})") from None
    shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    if math.prod(shape) * dtype.itemsize != len(array.data) - header.end():
        raise ValueError(
            f"an array of shape {shape} and type {dtype} has {len(array.data) - header.end()} bytes"
        )
    return np.ndarray(
        shape, dtype, array.data, header.end(), order="F" if header["columns"] == b"True" else "C"
    )


class _Content(bytes):
    """An array's content; pickled out of band (PEP 574), so that Ray moves it by shared memory alone.

    Who receives it so has a memoryview in its place, which `Array` doesn't check when it is unpickled.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """How it is pickled; before protocol 5 as other bytes are."""
        return _unpickled, (PickleBuffer(self) if int(protocol) >= 5 else bytes(self),)


def _unpickled(content: Any) -> bytes | memoryview:
    return content if isinstance(content, bytes) else memoryview(content)


# --- Flower's strategies ---------------------------------------------------------------------------------------

_STEP_START = "current_arrays"


def start_step(strategy: FedAvg, server_round: int, parameters: ArrayRecord, grid: Grid) -> None:
    """Tell a strategy the parameters that its next step starts from.

    Server optimisers note them in `configure_train`, as `current_arrays`; FedAvgM only where nothing is noted, as it
    goes on from the result of its own last step. With a share of 0 of the nodes `configure_train` asks nobody, and
    uses no `grid` (`flwr.serverapp.strategy.fedopt`, `fedavgm`, `fedavg`).
    """
    if getattr(strategy, _STEP_START, None) is not None:
        setattr(strategy, _STEP_START, None)
    fraction, strategy.fraction_train = strategy.fraction_train, 0.0
    strategy.configure_train(server_round, parameters, ConfigRecord(), grid)
    strategy.fraction_train = fraction


def kept_between_rounds(strategy: FedAvg) -> dict[str, Any]:
    """Return what a strategy keeps from round to round, by the name of its attribute.

    Moments and momentum are attributes, mappings or lists of NumPy arrays (``m_t``, ``v_t`` in
    `flwr.serverapp.strategy.fedadam`, ``momentum_vector`` in `fedavgm`); `start_step` sets the start anew.
    """
    return {name: value for name, value in vars(strategy).items() if name != _STEP_START}


# --- Logs ------------------------------------------------------------------------------------------------------


def quiet_logs() -> None:
    """Keep Flower's own remarks below warnings out of the log.

    Importing Flower sets the level of its logger, "flwr", to DEBUG (`flwr.supercore.logger`): it must be set
    afterwards, and this module has imported it.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)


# --- What a device of a deployment asks of the SuperLink --------------------------------------------------------

DEVICE_CALLS = frozenset(
    {
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "pull-object",
        "push-object",
        "confirm-message-received",
    }
)
"""What a SuperNode with a registered key posts to ``/v1/fleet/…`` (`flwr.supernode.fleet_http_client`).

The two that are left out, by which a node registers and unregisters itself, a SuperLink with node authentication
refuses (`flwr.superlink.servicer.fleet.fleet_handlers`).
"""

DEVICE_HEADERS = ("content-type", "flwr-", "x-flwr-")
"""How the headers begin that SuperNode and SuperLink read (`flwr.supercore.constant`)."""


def speaks_for_itself(pushed: bytes) -> bool:
    """Whether what a device posts to ``push-messages`` holds replies in its own name only.

    The SuperLink checks that the device is the request's `node`, but not that it is the messages' sender; and it
    stores what replies to nothing as a message of its own to any other device
    (`flwr.superlink.servicer.fleet.fleet_handlers.push_messages`, `store_message_and_object_tree` in
    `flwr.server.superlink.linkstate`).
    """
    try:
        request = PushMessagesRequest.FromString(pushed)
    except DecodeError:
        return False
    return all(
        message.metadata.src_node_id == request.node.node_id and message.metadata.reply_to_message_id
        for message in request.messages_list
    )


HUB_CALL = "/v1/hub/fetch-fab"
"""What a SuperLink posts to Flower Hub to get an app and its signatures; FLWR_SUPERGRID_API_URL, up to ``/v1``, says
where the Hub is (`flwr.superlink.servicer.control.control_handlers._get_remote_fab`, `flwr.supercore.constant`)."""


def message_to_sign(app: bytes, signed_at: int) -> bytes:
    """Return what a signature of an app is made over; `signed_at` in seconds since 1970.

    A SuperNode with ``--trusted-entities`` checks it (`flwr.supernode.start_client_internal._verify_fab`,
    `flwr.supercore.primitives.asymmetric_ed25519.create_message_to_sign`).
    """
    return signed_at.to_bytes(8, "big") + hashlib.sha256(app).digest()


# --- A private SuperLink and the commands of a simulation ------------------------------------------------------

_NO_DETAILS = "N/A"
CONNECTION = "fedfmd"
"""What the connection to our SuperLink is called in Flower's ``config.toml``."""


CLUSTER_ADDRESS = "RAY_ADDRESS"
"""The environment variable by which Ray finds a cluster; "local" has it start one (`ray._private.services`)."""


def flower_environment(home: Path, address: str = "") -> dict[str, str]:
    """Return the environment of every process of a run, whose Flower keeps its files in `home`.

    Flower names no address when it starts Ray, which then takes that of RAY_ADDRESS, or else any cluster that it finds
    on this machine: "" keeps it from all of them (`flwr.server.superlink.fleet.vce.backend.raybackend`).

    Flower looks its programs up on the PATH: they lie next to this Python. FLWR_HOME names its folder, and the
    next three keep it from installing the app's dependencies, from sending telemetry and from asking for updates
    (`flwr.common.constant`, `flwr.supercore.constant`, `flwr.supercore.telemetry`). Ray would leave out lines of
    log that look alike, and warn of GPUs that a worker was not given (`ray._private.ray_constants`,
    `ray._private.worker`). Logs come in UTF-8, whatever the terminal shows.
    """
    return (
        os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            CLUSTER_ADDRESS: address or "local",
            "RAY_DEDUP_LOGS": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        | (_job_config() if address else {})
    )


WORKER_VARIABLES = ("FEDFMD_OWN_CODE", "XDG_CACHE_HOME")
"""What tells where a user's own code and the cache are; all other variables a worker has from its own machine."""


def worker_environment() -> dict[str, str]:
    """Return the variables that a worker on another machine needs of this process's."""
    return {name: os.environ[name] for name in WORKER_VARIABLES if name in os.environ}


def _job_config() -> dict[str, str]:
    """Return the variable that adds to the environment of a cluster's workers, beside the one that Flower gives them.

    Ray merges its `runtime_env` into that of `ray.init` (`ray._private.worker`); ``ray job submit`` sets it too.
    """
    config = json.loads(os.environ.get(_JOB_CONFIG) or "{}")
    variables = config.setdefault("runtime_env", {}).setdefault("env_vars", {})
    variables.update(worker_environment())
    return {_JOB_CONFIG: json.dumps(config)}


_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def connection_config(port: int) -> Json:
    """Return the content of ``config.toml`` in Flower's folder that leads to a SuperLink of this machine.

    Source: `flwr.cli.flower_config.read_superlink_connection`.
    """
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    return {"superlink": {"default": CONNECTION, CONNECTION: connection}}


def superlink_command(port: int) -> list[str]:
    """Return the command of a SuperLink for simulations: one port of the loopback serves all its interfaces.

    Source: `flwr.superlink.cli.flower_superlink._parse_args_run_superlink`.
    """
    return [
        *("flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]


def health_url(port: int) -> str:
    """Return the address that a SuperLink answers as soon as it is up (`flwr.supercore.routers.health`)."""
    return f"http://127.0.0.1:{port}/health"


def run_command(app: Path, workers: int, gpus: float | None = None) -> list[str]:
    """Return the command that submits the app, on `workers` Ray actors of one CPU each.

    The keys are the fields of a simulation's config, with dashes (`flwr.cli.run.run`). A Ray of its own is told of as
    many CPUs as there are workers, so that it starts them all. A cluster, which `gpus` is for, the GPUs of each, has
    its own CPUs, and Ray refuses to be told (`ray._private.worker`).
    """
    simulation = f"num-supernodes={workers} client-resources-num-cpus=1 "
    simulation += (
        f"init-args-num-cpus={workers}" if gpus is None else f"client-resources-num-gpus={float(gpus)}"
    )
    return ["flwr", "run", str(app), CONNECTION, "--format", "json", "--federation-config", simulation]


def submitted_run(reply: Json) -> tuple[str, str]:
    """Return the run's id from what `run_command` printed, or "" and why it was refused.

    The exit status is 0 in both cases: only ``success`` tells (`flwr.cli.run.run`,
    `flwr.supercore.logger.print_json_error`).
    """
    if reply.get("success"):
        return str(reply["run-id"]), ""
    return "", str(reply.get("error-message", reply))


def log_command(run_id: str) -> list[str]:
    """Return the command that prints a run's log until it has ended (`flwr.cli.log`)."""
    return ["flwr", "log", run_id, CONNECTION, "--stream"]


def state_command(run_id: str) -> list[str]:
    """Return the command whose answer `run_state` reads (`flwr.cli.ls`); ``flwr run`` exits 0 for failed runs too."""
    return ["flwr", "ls", CONNECTION, "--run-id", run_id, "--format", "json"]


@dataclass(frozen=True)
class RunState:
    """Whether a run has ended, whether it did all of its work, and Flower's words for it."""

    ended: bool
    completed: bool
    text: str


def run_state(reply: Json) -> RunState:
    """Return the state of the run from what `state_command` printed.

    A status is ``running``, or ``finished:completed`` with a sub-status; why a run failed is in ``status-details``,
    which are "N/A" where there is nothing to say (`flwr.cli.run_utils.format_runs`, `flwr.cli.ls._to_json`).
    """
    run = reply["runs"][0]
    status, _, sub_status = run["status"].partition(":")
    details = run["status-details"]
    text = f"{run['status']}: {details if details != _NO_DETAILS else 'see the log above'}"
    ended = status == Status.FINISHED
    return RunState(ended, ended and sub_status == SubStatus.COMPLETED, text)
