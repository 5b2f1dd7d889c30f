"""FedProx (Li et al., MLSys 2020, arXiv:1812.06127): clients are held near the global model.

The term is part of local training (`fedfmd.training.LocalSGD.proximal`), where ``train.proximal-mu`` adds it to any
algorithm and any optimiser: its gradient, μ (w − w₀), joins that of the loss, before either is clipped or scaled by an
adaptive optimiser.
"""

from __future__ import annotations

from fedfmd.algorithms.algorithm import Algorithm
from fedfmd.errors import SettingsError


class FedProx(Algorithm, name="fedprox"):
    """FedAvg that insists on the term."""

    only_mean = True

    def check(self) -> None:
        """Raise a SettingsError unless μ is set."""
        if not self.settings.train.proximal_mu:
            raise SettingsError("server.strategy = fedprox needs train.proximal-mu > 0, such as 0.01")
