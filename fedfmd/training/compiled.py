"""Gradients from compiled code (https://docs.pytorch.org/docs/stable/generated/torch.compile.html).

A good part of a small network's step lies between its convolutions: norms, activations and attentions, each of which
reads and writes memory of its own. Compiled, they become a few loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from fedfmd.conv import AttentionValues, dynamic_layers, hearing_attention, tell_attention
from fedfmd.training.local import LocalSGD, compute_gradients

Backend = str | Callable[..., Any]
"""What compiles a graph: the name of one of PyTorch's, or a function of the graph and its inputs."""

SHAPES = 64
"""For how many shapes the same code is compiled: a deep network's layers have more than the 8 that PyTorch allows."""


class Compiled:
    """Computes the gradients of one model by one loss as `compute_gradients` does: of whole batches by compiled code.

    That differs in the last digits only. Smaller batches, such as the last one of a pass, are computed as usual: each
    of their sizes would take the compiler as long again, up to a minute.
    """

    def __init__(self, backend: Backend = "inductor") -> None:
        self._backend = backend
        self._networks: dict[nn.Module, _Network] = {}

    def __call__(
        self, model: nn.Module, sgd: LocalSGD, inputs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return loss and logits; the parameters' gradients are added to.

        Raises:
            RuntimeError: the network can't be compiled.
        """
        if len(labels) < sgd.batch_size:
            return compute_gradients(model, sgd, inputs, labels)
        if model not in self._networks:
            self._networks[model] = _Network(model, self._backend)
        network = self._networks[model]
        try:
            loss, logits = compute_gradients(network, sgd, inputs, labels)
        except TorchDynamoException as error:
            reason, _, _advice = str(error).partition("\n\n")
            raise RuntimeError(
                "train.torch-compile = true: the network can't be compiled, set it to false "
                f"({' '.join(reason.split())})"
            ) from error
        tell_attention(model, network.attention)
        return loss, logits


class _Network:
    """From images to logits by compiled code, which leaves the attentions of its last batch in `attention`."""

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        self._model = model
        self.attention: dict[str, AttentionValues] = {}
        options = inductor_options(model) if backend == "inductor" else None
        self._compiled: Callable[[Tensor], tuple[Tensor, dict[str, AttentionValues]]] = torch.compile(
            self._forward, dynamic=False, backend=backend, options=options
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        # Compiled code calls none of the hooks that were not there when it was made, so it returns the attentions.
        with (
            hearing_attention(self._model, self._hear),
            torch._dynamo.config.patch(recompile_limit=SHAPES),
        ):
            logits, self.attention = self._compiled(inputs)
        return logits

    def _forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, AttentionValues]]:
        self.attention = {}
        logits: Tensor = self._model(inputs)
        return logits, self.attention

    def _hear(self, name: str, values: AttentionValues) -> None:
        self.attention[name] = values


def inductor_options(model: nn.Module) -> dict[str, Any]:
    """Return what PyTorch's compiler is to do for this network: it takes no core that another process trains on.

    On the CPU it would hand all images to convolutions channels-last. Where each sample has a kernel of its own, the
    batch is folded into the channels for one grouped convolution, and would have to be transposed for that.
    """
    folds = any(layer.mixes and layer.bank.device.type == "cpu" for layer in dynamic_layers(model).values())
    return {"compile_threads": 1} | ({"layout_optimization": False} if folds else {})
