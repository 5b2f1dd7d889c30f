"""Gradients replayed from CUDA graphs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

A small network on a large GPU waits for the launches of its hundreds of kernels; a graph launches all of them at once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfmd.conv import AttentionValues, tell_attention, unrecorded_attention
from fedfmd.training.local import LocalSGD, compute_gradients

LAUNCHED = 2
"""How often a shape of batch is computed kernel by kernel before it gets a graph.

What comes only now and then is not worth one, and libraries set themselves up meanwhile, which can't be captured.
"""

_capturing = threading.Lock()


@dataclass(frozen=True)
class Passed:
    """What a forward and a backward pass leave behind: gradients by parameter, attentions by layer name."""

    loss: Tensor
    logits: Tensor
    gradients: Mapping[nn.Parameter, Tensor]
    attention: Mapping[str, AttentionValues]


Capture = Callable[[Callable[[], Passed]], tuple[Passed, Callable[[], None]]]
"""From passes on a GPU to what they leave behind, and to what repeats them: it writes to the same tensors."""


def capture_on_gpu(device: torch.device) -> Capture:
    """Return what captures passes in CUDA graphs, which share memory: only one may be in use at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(passes: Callable[[], Passed]) -> tuple[Passed, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with their own work on the GPU.
        with (
            _capturing,
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            passed = passes()
        return passed, graph.replay

    return capture


@dataclass(frozen=True)
class _Graph:
    """Captured passes, and where they read a batch."""

    inputs: Tensor
    labels: Tensor
    passed: Passed
    replay: Callable[[], None]


class Graphs:
    """Computes the gradients of one model by one loss as `compute_gradients` does, from graphs.

    Where the model's tensors lie must not change, and its passes must be the same whatever the values are. The memory
    of what is returned, and of gradients, is written to again by the next batch of that shape.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._launched: Counter[object] = Counter()
        self._graphs: dict[object, _Graph] = {}

    def __call__(
        self, model: nn.Module, sgd: LocalSGD, inputs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return loss and logits; the gradients of the parameters become this batch's.

        Raises:
            RuntimeError: the passes can't be captured.
        """
        key = (model, model.training, sgd.precision, sgd.memory_format, inputs.shape, inputs.stride())
        if self._launched[key] < LAUNCHED:
            self._launched[key] += 1
            return compute_gradients(model, sgd, inputs, labels)
        if key not in self._graphs:
            self._graphs[key] = self._captured(model, sgd, inputs, labels)
        graph = self._graphs[key]
        graph.inputs.copy_(inputs)
        graph.labels.copy_(labels)
        graph.replay()
        passed = graph.passed
        for parameter, gradient in passed.gradients.items():
            parameter.grad = gradient
        tell_attention(model, passed.attention)
        return passed.loss, passed.logits

    def _captured(self, model: nn.Module, sgd: LocalSGD, inputs: Tensor, labels: Tensor) -> _Graph:
        given = inputs.clone(), labels.clone()

        def passes() -> Passed:
            model.zero_grad()  # so that gradients are written, not added to others
            with unrecorded_attention(model) as attention:
                loss, logits = compute_gradients(model, sgd, *given)
            gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
            return Passed(loss, logits, gradients, attention)

        try:
            return _Graph(*given, *self._capture(passes))
        except RuntimeError as error:
            raise RuntimeError(
                f"train.cuda-graphs = true: the network's passes can't be captured, set it to false ({error})"
            ) from error
