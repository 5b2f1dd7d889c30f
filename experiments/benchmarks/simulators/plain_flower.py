"""FedAvg in Flower's own simulation, on Ray, written as its PyTorch tutorial: ``plain_flower.py WORK TIMES``.

A message per client, and nothing is tested, on clients or server.
"""

from __future__ import annotations

import sys

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Work, clock, load_shards


def main(path: str, times: str) -> None:
    work = Work.read(path)
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        images, labels = load_shards(work)[context.node_config["partition-id"]]
        model = work.network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        work.train(model, images, labels)
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(labels)}),
        }
        return Message(RecordDict(content), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, _context: Context) -> None:
        over = clock(times)

        def note(server_round: int, _arrays: ArrayRecord) -> None:
            if server_round:
                over()

        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=work.clients)
        strategy.start(
            grid, ArrayRecord(work.network().state_dict()), num_rounds=work.rounds, evaluate_fn=note
        )

    resources = {
        "init_args": {"num_cpus": work.workers},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, client_app, work.clients, backend_config=resources)


if __name__ == "__main__":
    main(*sys.argv[1:])
