from dataclasses import replace
from types import MappingProxyType

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedfmd.build import build_federation
from fedfmd.edge import examples_of
from fedfmd.engines.inline import InlineGrid
from fedfmd.flower_compat import set_message_id
from fedfmd.protocol.averaging import WeightedMean
from fedfmd.protocol.messages import CONFIG, ClientResult, Hosted, Reply, read_instruction, write_reply
from fedfmd.protocol.state import bank_of
from fedfmd.training.partial import rotation
from strategies.nodes import Node

TWO_ROUNDS = {"model.conv": "static", "fleet.devices": "pi-4", "server.rounds": 2}


@pytest.fixture
def make_federation(tiny_settings):
    """Builds the federation of three pi-4 on tiny digits, changed by dotted settings.

    Client c has 10 (c + 1) images, as those of `make_grid`.
    """

    def make(changes=MappingProxyType({})):
        federation = build_federation(tiny_settings(**TWO_ROUNDS | dict(changes)))
        return replace(federation, sizes=tuple(10 * (client + 1) for client in range(len(federation.sizes))))

    return make


@pytest.fixture
def workers():
    """Makes so many nodes of a simulation, by id 100, 101, …"""
    return lambda count: tuple(Node(100 + rank, rank, None, 0, "") for rank in range(count))


@pytest.fixture
def make_grid():
    """Makes a grid of nodes that need no data: `node_configs` say what they host.

    Their clients don't train: client c has 10 (c + 1) images and adds c + 1 to every array that it is to
    train, but for the temperatures. What `behave(client, round)` returns is the reason for which the client fails;
    if it raises, its node does. `answers` has, by node, what else it answers to the query: fields, or all of it.
    Arrays whose names are `private` are not sent.
    """
    grids = []

    def make(
        node_configs=({},),
        behave=lambda client, server_round: "",
        answers=MappingProxyType({}),
        private=frozenset(),
    ):
        grids.append(InlineGrid(stub_app(behave, answers, private), {}, node_configs))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


def stub_app(behave, answers, private):
    app = ClientApp()

    @app.query()
    def query(message, context):
        told = answers.get(context.node_id, {})
        if isinstance(told, RecordDict):
            return Message(told, reply_to=message)
        client = int(context.node_config.get("client", -1))
        hosted = vars(Hosted(client, images=10 * (client + 1))) | context.node_config | told
        return Message(
            RecordDict({CONFIG: ConfigRecord(hosted | {"client": told.get("client", client)})}),
            reply_to=message,
        )

    @app.train()
    def train(message, context):
        instruction, arrays = read_instruction(message.content)
        mean, results = WeightedMean(), []
        for work in instruction.assignments:
            client = work.client
            reason = behave(client, instruction.round)
            images = 10 * (client + 1)
            seen = examples_of(images, work.steps, work.batch_size)
            results.append(ClientResult(client, images, work.steps, seen, 1.0, 0.5, 0.1, reason))
            if not reason:
                own = {
                    name: array
                    for name, array in arrays.items()
                    if name not in private and is_trained(name, work, arrays)
                }
                added = {n: (a + client + 1).astype(a.dtype) if a.ndim else a for n, a in own.items()}
                mean.add(added, images)
        return Message(write_reply(Reply(mean.arrays(), tuple(results), mean.weights)), reply_to=message)

    return app


def is_trained(name, work, arrays):
    if (kernel := bank_of(name)) is None:
        return True
    bank, place = kernel
    kernels = sum((other := bank_of(n)) is not None and other[0] == bank for n in arrays)
    return place in rotation(work.first_kernel, work.kernels, kernels)


@pytest.fixture
def reply_of(make_grid):
    """Makes the message that node `node` answers with `content`, a record or an error.

    The id of what it was sent is the node's.
    """
    make_grid([])  # Messages need an identity of the process, which a grid gives it

    def make(node, content):
        request = Message(RecordDict(), node, MessageType.TRAIN)
        set_message_id(request, str(node))
        return Message(content, reply_to=request)

    make.error = lambda node, reason: make(node, Error(2, reason))
    return make
