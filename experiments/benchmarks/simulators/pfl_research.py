"""FedAvg in pfl-research, in a process per core under ``torchrun``: ``pfl_research.py WORK TIMES [metrics]``.

With `metrics` every client is tested on its own images before and after training, as pfl-research does by default.
Without, that happens in the first round only, which can't be switched off.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from work import SGD, Work, clock, load_shards


class Judged(nn.Module):
    """The network, with the two functions that pfl-research calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        return F.cross_entropy(self.network(images), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        self.eval()
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels, reduction="sum").item()
        correct = int((logits.argmax(1) == labels).sum())
        return {"loss": Weighted(loss, len(labels)), "accuracy": Weighted(correct, len(labels))}


class Rounds(TrainingProcessCallback):
    def __init__(self, times: str) -> None:
        self._over = clock(times)

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # noqa: ANN001, ANN201
        if get_framework_module().distributed.global_rank == 0:
            self._over()
        return False, Metrics()


def main(path: str, times: str, *metrics: str) -> None:
    work = Work.read(path)
    torch.set_num_threads(1)
    network = Judged(work.network())
    model = PyTorchModel(network, SGD, torch.optim.SGD(network.parameters(), 1.0))
    shards = {client: PyTorchTensorDataset(shard) for client, shard in enumerate(load_shards(work))}
    clients = FederatedDataset(shards.__getitem__, MinimizeReuseUserSampler(list(shards)))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(work.rounds, 1 if metrics else work.rounds, work.clients, 0),
        backend=SimulatedBackend(training_data=clients, val_data=clients),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_batch_size=work.batch, local_num_epochs=1, local_learning_rate=SGD.keywords["lr"]
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=work.batch),
        callbacks=[Rounds(times)],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
