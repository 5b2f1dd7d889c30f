"""An algorithm of your own: ``fedfmd run experiment.yaml --set server.strategy=algorithm:EqualVotes``."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg


class EqualVotes(FedAvg):
    """FedAvg in which every client counts the same, however many images it has.

    A strategy of Flower's: `aggregate_train` gets a reply from every client and returns the next parameters.
    Attributes that it sets on itself are part of the checkpoints.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients' parameters with equal weights."""
        votes = list(replies)
        for vote in votes:
            for metrics in vote.content.metric_records.values():
                metrics[self.weighted_by_key] = 1
        return super().aggregate_train(server_round, votes)
