"""An optimiser of one's own: steps by the sign of the gradient alone."""

import torch


class SignSGD(torch.optim.Optimizer):
    """signSGD (Bernstein et al., arXiv:1802.04434). A client makes a new one in every round."""

    def __init__(self, parameters, lr: float, weight_decay: float = 0.0) -> None:  # noqa: ANN001
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
