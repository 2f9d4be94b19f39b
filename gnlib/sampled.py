"""Curvature from labels that the model draws itself: what Sophia-G and K-FAC learn from beside the gradient.

With y^ ~ p(y | z) drawn at every prediction, E[u u^T] = H for u = dL(z, y^)/dz of one prediction: the gradient of the
sampled loss has the Gauss-Newton matrix G = J^T H J as its second moment (Gauss-Newton-Bartlett, arXiv 2305.14342).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gnlib.config import ConfigError
from gnlib.linearise import Parameters, outputs_of
from gnlib.losses import ConvexLoss


class SampledLoss:
    """The model at theta on a batch, with labels of its own instead of the data's."""

    def __init__(
        self, model: nn.Module, loss: ConvexLoss, theta: Parameters, batches: Sequence[Tensor], anchored: bool = False
    ) -> None:
        """`theta`: by name, the other parameters as the model has them; `batches`: inputs in equal micro-batches.

        `anchored`: at the model's own parameters, to which the curvature of a linearised subproblem belongs, not theta.
        """
        if not (hasattr(loss, "sample") and hasattr(loss, "predictions")):
            raise ConfigError(
                f"method.inner.optimizer: needs a loss that can draw labels; {type(loss).__name__} cannot"
            )
        self.model, self.loss, self.batches = model, loss, batches
        self.names = {id(tensor): name for name, tensor in theta.items()}
        here = dict(model.named_parameters()) if anchored else theta
        self.theta = {name: here[name].detach().requires_grad_() for name in theta}

    def values(self, seed: int) -> Iterator[tuple[Tensor, int]]:
        """Each micro-batch's mean sampled loss, with its graph to `theta`, and its number of predictions.

        The same labels for the same seed, however the batch is cut into micro-batches.
        """
        generator = torch.Generator().manual_seed(seed)  # of the CPU, so that every device draws the same
        for inputs in self.batches:
            z = outputs_of(self.model, inputs, self.theta)
            labels = self.loss.sample(z.detach(), generator)  # type: ignore[attr-defined]
            yield self.loss.value(z, labels), self.loss.predictions(z)  # type: ignore[attr-defined]

    def gradient(self, seed: int) -> tuple[dict[str, Tensor], int]:
        """Of the mean over the whole batch, by parameter name, and the number of predictions."""
        total, predictions = {name: torch.zeros_like(tensor) for name, tensor in self.theta.items()}, 0
        for value, count in self.values(seed):
            found = torch.autograd.grad(value / len(self.batches), list(self.theta.values()), materialize_grads=True)
            torch._foreach_add_(list(total.values()), list(found))
            predictions += count
        return total, predictions


@runtime_checkable
class Observer(Protocol):
    """An optimiser that wants to see the batch before some of its steps."""

    def due(self) -> bool:
        """Before the coming step?"""

    def observe(self, sampled: SampledLoss) -> float:
        """Learn from it; returns the cost in forward passes of the batch."""
