"""FedDyn (Acar et al., ICLR 2021, arXiv:2111.04263): clients' losses are bent until they agree on one optimum.

A client adds to its loss the term of FedProx, α/2 ‖w − w₀‖², with ``train.proximal-mu`` for α, and takes off ⟨λ, w⟩,
where λ adds up how it moved in its earlier rounds. So the fixed point is the optimum of all clients' loss, which that
of FedAvg is not. Nothing more is sent. What is kept is g = λ/α here, which does not depend on α. Clients weigh by
their images, as in the other algorithms; the paper weighs them alike. The server's step goes beyond the mean of the
models, where the running statistics of BatchNorm no longer fit: take ``model.norm=group``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedfmd.algorithms.algorithm import Algorithm, LocalTraining, Update, mean
from fedfmd.conv.layers import bank_names
from fedfmd.errors import SettingsError
from fedfmd.protocol.state import Arrays, parameter_names, split_banks, wire_views


class FedDyn(Algorithm, name="feddyn"):
    """Each client keeps g, the sum of its moves with the sign turned, and the server the mean of all g."""

    def check(self) -> None:
        """Raise a SettingsError unless α is set, and the server goes all the way that the clients note."""
        if not self.settings.train.proximal_mu:
            raise SettingsError("server.strategy = feddyn needs train.proximal-mu > 0, its α, such as 0.1")
        server = self.settings.server
        for key, value in (
            ("server.max-update-norm", server.max_update_norm),
            ("server.max-update-ratio", server.max_update_ratio),
            ("budget.min-reports", self.settings.budget.min_reports),
        ):
            if value:
                raise SettingsError(
                    f"{key} = {value:g} and server.strategy = feddyn: clients keep the whole of their moves, which the "
                    f"server would not follow; set {key}=0, or take another strategy"
                )

    @contextmanager
    def training(self, local: LocalTraining) -> Iterator[None]:
        """Add −α g to the gradients."""
        parameters = dict(local.model.named_parameters())
        bend = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for name, part in split_banks(bend, bank_names(local.model)).items():
            if name in local.own:
                part.copy_(local.own[name])

        def add(parameter: Tensor, by: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.sub_(by, alpha=self.settings.train.proximal_mu)

        with ExitStack() as hooks:
            for name, parameter in parameters.items():
                hook = partial(add, by=bend[name])
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(hook))
            yield

    def keep(self, local: LocalTraining) -> Mapping[str, Tensor]:
        """Return g − (w − w₀)."""
        views = wire_views(local.model)
        moves = {
            name: views[name] - torch.as_tensor(local.received[name], device=views[name].device)
            for name in parameter_names(local.model)
        }
        return {name: local.own.get(name, 0) - move for name, move in moves.items()}

    def init(self) -> Arrays:
        """Return the mean of all clients' g, by array; nobody has moved yet."""
        return {}

    def step(
        self, state: Arrays, server_round: int, current: Arrays, updates: Sequence[Update]
    ) -> tuple[Arrays, Arrays]:
        """Return the clients' mean less the mean of all g, those of absent clients too."""
        del server_round
        clients = sum(len(update.results) for update in updates) / self.settings.partition.clients
        per_image = clients / sum(update.images for update in updates)
        means, moved = mean(updates), {}
        for name, array in means.items():
            share = per_image * sum(update.weights.get(name, 0) for update in updates)
            moved[name] = np.asarray(state.get(name, 0) - share * (array - current[name]), array.dtype)
        return {name: array - moved[name] for name, array in means.items()}, state | moved
