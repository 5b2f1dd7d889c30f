"""Against broken or hostile clients: median, trimmed mean, and the updates that are nearest to each other.

Medians and trimmed means are of Yin et al. (ICML 2018, arXiv:1803.01498), Krum and Multi-Krum of Blanchard et al.
(NeurIPS 2017, arXiv:1703.02757).
"""

from __future__ import annotations

from flwr.serverapp import strategy as flower

from fedfmd.algorithms.flower import FlowerAlgorithm
from fedfmd.errors import SettingsError


class FedMedian(FlowerAlgorithm, name="fedmedian"):
    """The median of each number."""

    separate = True

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedMedian."""
        return flower.FedMedian()


class FedTrimmedAvg(FlowerAlgorithm, name="fedtrimmedavg"):
    """The mean of each number without the largest and smallest ``server.trim`` of them."""

    options = ("trim",)
    separate = True

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedTrimmedAvg."""
        return flower.FedTrimmedAvg(beta=self.settings.server.trim)


class Krum(FlowerAlgorithm, name="krum"):
    """The update that is nearest to the others, where ``server.byzantine`` of them are bad."""

    options = ("byzantine",)
    separate = True

    def check(self) -> None:
        """Raise a SettingsError if there are too few clients to outvote the bad ones."""
        server, clients = self.settings.server, self.settings.clients_per_round
        least = 2 * server.byzantine + 2
        if clients <= least:
            raise SettingsError(
                f"server.byzantine = {server.byzantine}: {server.strategy} needs more than {least} clients per "
                f"round, there are {clients}"
            )

    def strategy(self) -> flower.FedAvg:
        """Make Flower's Krum."""
        return flower.Krum(num_malicious_nodes=self.settings.server.byzantine)


class MultiKrum(Krum, name="multikrum"):
    """The mean of all updates but the ``server.byzantine`` that are farthest from the others."""

    def strategy(self) -> flower.FedAvg:
        """Make Flower's MultiKrum."""
        bad = self.settings.server.byzantine
        selected = self.settings.clients_per_round - bad
        return flower.MultiKrum(num_malicious_nodes=bad, num_nodes_to_select=selected)
