"""The devices' port, before a SuperLink that notes what reaches it."""

import asyncio

import httpx
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedfmd.flower_compat import DEVICE_CALLS


class SuperLink:
    """Answers every request alike, and notes it."""

    def __init__(self):
        self.requests = []
        self.fault = None

    def __call__(self, request):
        if self.fault:
            raise self.fault
        self.requests.append(request)
        return httpx.Response(404, content=b"no such node", headers={"flwr-a": "1", "set-cookie": "a=b"})


@pytest.fixture
def gate(script):
    return script("gate")


@pytest.fixture
def superlink():
    return SuperLink()


class Device:
    """Who reaches the gate."""

    def __init__(self, app):
        self.app = app

    def request(self, method, path, **content):
        async def answer():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app)) as client:
                return await client.request(method, f"https://gate{path}", **content)

        return asyncio.run(answer())

    def post(self, path, **content):
        return self.request("POST", path, **content)


@pytest.fixture
def device(gate, superlink):
    behind = httpx.AsyncClient(base_url="https://superlink", transport=httpx.MockTransport(superlink))
    return Device(gate.gate(behind))


def reply(sender, answered="m-0"):
    metadata = {"src_node_id": sender, "dst_node_id": 1, "reply_to_message_id": answered}
    return PushMessagesRequest(
        node={"node_id": 7}, messages_list=[{"metadata": metadata}]
    ).SerializeToString()


@pytest.mark.parametrize("call", sorted(DEVICE_CALLS))
def test_what_devices_ask_is_handed_on_with_flowers_headers_only(device, superlink, call):
    sent = {
        "Content-Type": "application/protobuf",
        "Flwr-Signature": "s",
        "Cookie": "c",
        "X-Forwarded-For": "a",
    }
    body = reply(7) if call == "push-messages" else b"any"
    answer = device.post(f"/v1/fleet/{call}", content=body, headers=sent)
    (request,) = superlink.requests
    assert str(request.url) == f"https://superlink/v1/fleet/{call}"
    assert request.content == body
    assert request.headers["content-type"] == "application/protobuf"
    assert request.headers["flwr-signature"] == "s"
    assert {"cookie", "x-forwarded-for"}.isdisjoint(request.headers)
    assert (answer.status_code, answer.content, answer.headers["flwr-a"]) == (404, b"no such node", "1")
    assert "set-cookie" not in answer.headers


OTHERS = sorted(
    path for _, path in PROTOBUF_REQUEST_TYPES if path.removeprefix("/v1/fleet/") not in DEVICE_CALLS
)
TRICKS = [
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/fleet/",
    "/v1/fleet/..",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/get-run/../../control/start-run",
    "//v1/control/start-run",
    "/v1/control/start-run?/v1/fleet/get-run",
]


@pytest.mark.parametrize("path", OTHERS + TRICKS)
def test_everything_else_is_refused(device, superlink, path):
    for method in ("POST", "GET", "PUT"):
        assert device.request(method, path).status_code in (404, 405)
    assert superlink.requests == []


def test_there_is_something_to_refuse():
    assert {"/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"} <= set(OTHERS)


def test_devices_calls_are_posted_only(device, superlink):
    assert device.request("GET", "/v1/fleet/get-run").status_code == 405
    assert superlink.requests == []


@pytest.mark.parametrize("body", [reply(8), reply(7, answered=""), b"no message"])
def test_a_device_that_speaks_for_another_is_refused(device, superlink, body):
    assert device.post("/v1/fleet/push-messages", content=body).status_code == 403
    assert superlink.requests == []


def test_what_is_too_long_is_refused(gate, device, superlink, monkeypatch):
    monkeypatch.setattr(gate, "MOST_BYTES", 10)
    assert device.post("/v1/fleet/push-object", content=bytes(10)).status_code == 404
    assert device.post("/v1/fleet/push-object", content=bytes(11)).status_code == 413
    assert len(superlink.requests) == 1


def test_devices_try_again_while_the_superlink_is_away(device, superlink):
    superlink.fault = httpx.ConnectError("refused")
    assert device.post("/v1/fleet/pull-messages").status_code == 502


def test_refusals_are_logged(device, caplog):
    device.post("/v1/control/start-run")
    assert "refused POST '/v1/control/start-run' (404)" in caplog.text
