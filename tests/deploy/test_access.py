"""What strangers, and devices that are registered, try on a server that is set up as the README tells."""

import datetime
from contextlib import contextmanager

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest as RegisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedfmd.engines.flower import descendants, end_processes
from fedfmd.errors import RunError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(make_deployment, tmp_path_factory):
    """A server that knows box0 and box1, none of which is there, with a run that waits."""
    before = descendants()
    server = make_deployment(tmp_path_factory.mktemp("access"))
    try:
        server.start_server(superexec=False)
        server.register("box0")
        server.register("box1")
        server.connect("device", server.port)
        server.run = server.submit("run")
        yield server
    finally:
        end_processes(before)


@pytest.fixture(scope="module")
def nodes(server):
    """The ids of box0 and box1, which are there."""
    return [Device(server, box).activate() for box in ("box0", "box1")]


class Device:
    """A device with a key, and what it asks at the devices' port."""

    def __init__(self, server, box):
        self.key = load_ssh_private_key((server.etc(box) / box).read_bytes(), None)
        self.public_key = public_key_to_bytes(self.key.public_key())
        trust = (server.etc("server") / "ca.crt").read_bytes()
        signs = NodeAuthHttpInterceptor(self.key, self.key.public_key())
        self.client = FleetHttpClient.from_server_address(server.address, False, trust, [signs])

    def activate(self):
        request = ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=30)
        return self.client.ActivateNode(request).node_id

    def pull(self, node):
        return self.client.PullMessages(PullMessagesRequest(node={"node_id": node}))


@contextmanager
def refused(status, text=""):
    with pytest.raises(httpx.HTTPStatusError) as error:
        yield
    assert (error.value.response.status_code, text in error.value.response.text) == (status, True)


def state(server):
    """What the server's owner sees: runs with their status, and devices."""
    runs = {run["run-id"]: run["status"] for run in server.flwr("ls", "boxes")["runs"]}
    return runs, {node["node-id"] for node in server.flwr("supernode", "list", "boxes")["nodes"]}


def test_a_stranger_is_refused(server, nodes):
    stranger, registered = Device(server, "stranger"), Device(server, "box0")
    with refused(412, "2004"):
        stranger.activate()
    with refused(404):
        stranger.client.RegisterNode(RegisterNodeRequest(public_key=stranger.public_key))
    with refused(401):
        stranger.pull(nodes[0])
    with refused(401):
        stranger.client.ActivateNode(ActivateNodeRequest(public_key=registered.public_key))


def test_a_request_that_was_overheard_is_of_no_use_later(server, nodes, monkeypatch):
    device = Device(server, "box0")
    device.pull(nodes[0])
    ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=6)
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: ago)
    with refused(401):
        device.pull(nodes[0])


def test_nobody_talks_to_a_server_that_another_authority_vouches_for(server):
    server.certificates("ca", server.etc("another ca"))
    for trust in (None, (server.etc("another ca") / "ca.crt").read_bytes()):
        client = FleetHttpClient.from_server_address(server.address, False, trust, [])
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            client.PullMessages(PullMessagesRequest())


def test_a_registered_device_speaks_for_itself_alone(server, nodes):
    device, (own, others) = Device(server, "box0"), nodes
    with refused(401):
        device.pull(others)
    order = {"src_node_id": 1, "dst_node_id": others, "run_id": int(server.run), "message_type": "train"}
    for metadata in (order, {"src_node_id": others, "reply_to_message_id": "m"}):
        request = PushMessagesRequest(node={"node_id": own}, messages_list=[{"metadata": metadata}])
        with refused(403):
            device.client.PushMessages(request)


def test_a_device_is_no_user(server):
    """By the devices' port nobody submits, stops or sees runs, or adds and removes devices."""
    before = state(server)
    assert list(before[0]) == [server.run]
    assert len(before[1]) == 2
    node = server.flwr("supernode", "list", "boxes")["nodes"][0]["node-id"]
    for command in (
        ("run", ".", "device"),
        ("stop", server.run, "device"),
        ("ls", "device"),
        ("supernode", "list", "device"),
        ("supernode", "register", server.etc("stranger") / "stranger.pub", "device"),
        ("supernode", "unregister", node, "device"),
    ):
        try:
            answer = server.flwr(*command)
        except RunError as error:
            answer = {"error": str(error)}
        assert not answer.get("success"), (command, answer)
    assert state(server) == before
    assert "refused POST '/v1/control/start-run' (404)" in server.log("gate.log")


def test_on_the_server_itself_tasks_are_for_who_knows_the_secret(server):
    trust = (server.etc("server") / "ca.crt").read_bytes()
    client = RuntimeHttpClient.from_server_address(f"127.0.0.1:{server.control_port}", False, trust, [])
    with refused(401):
        client.AcquireTask(AcquireTaskRequest())
