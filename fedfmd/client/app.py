"""How a node answers Flower's messages: it says what it hosts, and trains or tests the clients dealt out to it.

In a simulation a node hosts any client: it holds the data set and the partition. An edge device hosts its own client,
named in its ``--node-config`` (``client=3 data="/srv/images.npz" device="pi-4"``), and its images never leave it. Its
profile is a known one or a file of its own, as `fedfmd calibrate` writes it (``device="/srv/device.yaml"``).
"""

from __future__ import annotations

from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfmd.client.host import host_of
from fedfmd.client.node_config import NodeConfig, check_version
from fedfmd.client.round import run_assignments, test_model
from fedfmd.cost import latency
from fedfmd.protocol.messages import (
    Hosted,
    read_instruction,
    read_question,
    write_hosted,
    write_reply,
    write_scores,
)

app = ClientApp()

LATENCY_IMAGES = 5
"""Images, after a warm-up, on which an edge device measures how long inference takes: their median."""


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell the server which client this node hosts (-1: any) and with what."""
    hosted = Hosted()
    try:
        node = NodeConfig.from_mapping(context.node_config)
        hosted = Hosted(rank=node.rank, nodes=node.nodes, device=node.device, profile=node.profile())
        if node.client is not None:
            hosted = replace(hosted, client=node.client)
            version, images = read_question(message.content)
            check_version(version)
            hosted = replace(hosted, images=len(host_of(context, images).images_of(node.client)))
    except Exception as error:  # the server decides what a refusing node means for the run
        hosted = replace(hosted, error=f"{error}")
    return Message(write_hosted(hosted), reply_to=message)


@app.train()
def train_clients(message: Message, context: Context) -> Message:
    """Train the assigned clients one after another and answer once, with their weighted mean."""
    instruction, arrays = read_instruction(message.content)
    host = host_of(context, instruction.images)
    reply = run_assignments(host, instruction, arrays)
    if "client" in context.node_config and reply.arrays:
        latency_s = latency(host.model, host.dataset.image_size, repeats=LATENCY_IMAGES)
        reply = replace(reply, results=tuple(replace(r, latency_s=latency_s) for r in reply.results))
    return Message(write_reply(reply), reply_to=message)


@app.evaluate()
def evaluate_clients(message: Message, context: Context) -> Message:
    """Test the new model on the images that the round's clients hold out, and on a part of the run's own."""
    instruction, arrays = read_instruction(message.content)
    scores = test_model(host_of(context, instruction.images), instruction, arrays)
    return Message(write_scores(scores), reply_to=message)
