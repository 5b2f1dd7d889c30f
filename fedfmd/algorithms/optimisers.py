"""Server optimisers: the mean update is a gradient for momentum, Adagrad, Adam or Yogi.

FedAvgM is of Hsu et al. (2019, arXiv:1909.06335), the others of Reddi et al. (ICLR 2021, arXiv:2003.00295).
"""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from fedfmd.algorithms.flower import FlowerAlgorithm


class FedAvgM(FlowerAlgorithm, name="fedavgm"):
    """SGD with momentum."""

    options = ("lr", "momentum")
    only_mean = True

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedAvgM."""
        server = self.settings.server
        return flower.FedAvgM(server_learning_rate=server.lr or 1.0, server_momentum=server.momentum)


class FedAdagrad(FlowerAlgorithm, name="fedadagrad"):
    """Adagrad."""

    options = ("lr", "tau")
    only_mean = True

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedAdagrad."""
        server = self.settings.server
        return flower.FedAdagrad(eta=server.lr or 0.1, tau=server.tau)


class FedAdam(FlowerAlgorithm, name="fedadam"):
    """Adam."""

    options = ("lr", "momentum", "beta_2", "tau")
    only_mean = True

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedAdam."""
        return flower.FedAdam(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        server = self.settings.server
        betas = {"beta_1": server.momentum, "beta_2": server.beta_2}
        return {"eta": server.lr or 0.01, "tau": server.tau, **betas}


class FedYogi(FedAdam, name="fedyogi"):
    """Yogi, with Adam's options."""

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedYogi."""
        return flower.FedYogi(**self._arguments())
