"""FedBN (Li et al., ICLR 2021, arXiv:2102.07623): every client has normalisation layers of its own.

They begin as the server's and never leave the client. So the server's stay as they were made, and its model, which it
evaluates, is nobody's: how well clients do with their own layers, their rows tell (in clients.csv `loss` and
`accuracy`, met while training, and with ``partition.test-share`` `personal_test_accuracy`). With
``model.norm = batch`` the server's statistics are those of no images at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedfmd.algorithms.algorithm import Algorithm, LocalTraining

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


class FedBN(Algorithm, name="fedbn"):
    """Clients put their own layers in the place of the global ones, and keep them to themselves."""

    def private(self, model: nn.Module) -> Collection[str]:
        """Return the names of the normalisation layers' arrays."""
        return norm_views(model).keys()

    @contextmanager
    def training(self, local: LocalTraining) -> Iterator[None]:
        """Give the model the client's layers back."""
        views = norm_views(local.model)
        with torch.no_grad():
            for name, tensor in local.own.items():
                views[name].copy_(tensor)
        yield

    def update(self, local: LocalTraining, trained: Mapping[str, Tensor], steps: int) -> Mapping[str, Tensor]:
        """Return what the client trained without its own layers."""
        del steps
        private = self.private(local.model)
        return {name: tensor for name, tensor in trained.items() if name not in private}

    def keep(self, local: LocalTraining) -> Mapping[str, Tensor]:
        """Return the layers as they are after training."""
        return norm_views(local.model)


def norm_views(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and statistics of the normalisation layers, as tensors that share the model's memory.

    Raises:
        ValueError: the model has no such layer.
    """
    views = {
        f"{name}.{part}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, NORMS)
        for part, tensor in layer.state_dict().items()
    }
    if not views:
        raise ValueError("FedBN keeps normalisation layers on the client, and this model has none")
    return views
