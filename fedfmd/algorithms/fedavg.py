"""FedAvg (McMahan et al., AISTATS 2017, arXiv:1602.05629): the clients' mean, weighted by their images."""

from __future__ import annotations

from fedfmd.algorithms.algorithm import Algorithm


class FedAvg(Algorithm, name="fedavg"):
    """The defaults of `Algorithm`."""

    only_mean = True
