"""The Hessian-free inner solver: conjugate gradients on the Gauss-Newton subproblem of one fixed batch.

    q(d) = grad.d + 1/2 d.(G + damping I) d,      G = J^T H J

Damping and stopping rule are those of Martens, "Deep learning via Hessian-free optimization" (ICML 2010), sections 4.1
and 4.4: the damping follows the ratio of the loss's change to the model's, and the iterations end where they no longer
lower q by a share of it. There is no preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnlib.blocks import Block
from gnlib.config import ConfigError, MethodConfig
from gnlib.linearise import Parameters, linearise, outputs_of
from gnlib.losses import ConvexLoss
from gnlib.objective import TrueLoss, curvature_product

OPTIONS = {"damping": 0.1, "tolerance": 5e-4, "fraction": 0.125}

Batches = Sequence[tuple[Tensor, Tensor]]  # of equal sizes


class Solution(NamedTuple):
    direction: Tensor
    value: float
    """q there; 0 at the origin."""
    iterations: int


@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Tensor], Tensor], gradient: Tensor, start: Tensor, most: int, tolerance: float
) -> Solution:
    """Minimise q(d) = gradient.d + 1/2 d.product(d) from `start`, for a positive definite product; vectors [n].

    Ends after `most` iterations, or at iteration i > k = max(10, i / 10) where q < 0 and the last k iterations lowered
    q by less than k `tolerance` of it (Martens' relative progress).
    """
    d = start.clone()
    residual = -gradient - product(d)
    direction, square = residual.clone(), residual.dot(residual)
    values = [_quadratic(gradient, residual, d)]
    for iteration in range(1, most + 1):
        curved = product(direction)
        curvature = direction.dot(curved)
        if not (square > 0 and curvature > 0):  # at the minimum, as far as rounding can tell
            break
        step = square / curvature
        d += step * direction
        residual -= step * curved
        square, previous = residual.dot(residual), square
        direction = residual + square / previous * direction
        values.append(_quadratic(gradient, residual, d))
        window = max(10, iteration // 10)
        if iteration > window and values[-1] - values[-1 - window] > window * tolerance * values[-1]:  # then q < 0
            break
    return Solution(d, values[-1], len(values) - 1)


def _quadratic(gradient: Tensor, residual: Tensor, d: Tensor) -> float:
    """q(d), with residual = -gradient - product(d)."""
    return 0.5 * (gradient - residual).dot(d).item()


class HessianFree:
    """The inner solver of an outer step; its state is each block's damping and last direction.

    The gradient and the loss are those of the whole outer batch, the curvature that of its first sequences, a share
    `fraction` of it, however it is cut into micro-batches. With warm start the iterations begin at the last direction.
    """

    def __init__(self, model: nn.Module, loss: ConvexLoss, method: MethodConfig, blocks: Sequence[Block]) -> None:
        if method.objective != "gauss_newton" or method.ridge:
            needed = "objective gauss_newton, without a ridge"
            raise ConfigError(f"method.inner.optimizer: conjugate_gradient needs {needed}")
        options = _checked(method.inner.options)
        self.model, self.loss, self.blocks, self.most = model, loss, blocks, method.inner.steps
        self.tolerance, self.fraction = options["tolerance"], options["fraction"]
        self.dampings = [options["damping"]] * len(blocks)
        self.directions = [torch.zeros_like(_flat(self._parameters(block))) for block in blocks]

    def _parameters(self, block: Block) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in block}

    def solve(self, solution: dict[str, Tensor], batches: Batches) -> tuple[float, float]:
        """Set `solution` to theta_t + d; returns the loss at theta_t and the cost in forward passes of a sequence."""
        everything = self._parameters([name for block in self.blocks for name in block])
        gradient, loss = self._gradient(everything, batches)
        passes = 3.0 * _sequences(batches)
        for index, block in enumerate(self.blocks):
            theta_t = {name: everything[name] for name in block}
            found, cost = self._minimise(index, theta_t, _flat({name: gradient[name] for name in block}), batches)
            point = {name: theta_t[name] + d for name, d in _split(found.direction, theta_t).items()}
            change = self._loss(point, batches) - loss
            passes += cost + _sequences(batches)
            self.directions[index] = found.direction
            self.dampings[index] *= adjustment(change, found.value)
            for name, theta in point.items():
                solution[name].detach().copy_(theta)
        return loss, passes

    def _gradient(self, point: dict[str, Tensor], batches: Batches) -> tuple[dict[str, Tensor], float]:
        """The loss's, which at theta_t is the subproblem's too, and the loss."""
        totals, loss = {name: torch.zeros_like(p) for name, p in point.items()}, 0.0
        for inputs, targets in batches:
            (found,) = TrueLoss(self.loss).evaluate(self.model, [point], inputs, targets)
            totals = {name: total + found.gradient[name] / len(batches) for name, total in totals.items()}
            loss += found.loss.item() / len(batches)
        return totals, loss

    def _minimise(
        self, index: int, theta_t: dict[str, Tensor], gradient: Tensor, batches: Batches
    ) -> tuple[Solution, float]:
        """Conjugate gradients on one block, and their cost."""
        curved, damping = _first(batches, curved_sequences(self.fraction, _sequences(batches))), self.dampings[index]
        weights = [len(part) / len(whole) for (part, _), (whole, _) in zip(curved, batches, strict=False)]

        def product(d: Tensor) -> Tensor:
            delta = _split(d, theta_t)
            products = [_flat(curvature_product(self.model, self.loss, delta, *batch)) for batch in curved]  # type: ignore[arg-type]
            weighted = [weight * product for weight, product in zip(weights, products, strict=True)]
            return torch.stack(weighted).sum(0) / sum(weights) + damping * d

        found = conjugate_gradient(product, gradient, self.directions[index], self.most, self.tolerance)
        units = 1.0 + linearise(self.model, curved[0][0][:1]).forward_units(list(theta_t))
        return found, (1 + found.iterations) * units * _sequences(curved)

    @torch.no_grad()
    def _loss(self, point: dict[str, Tensor], batches: Batches) -> float:
        values = [
            self.loss.value(outputs_of(self.model, inputs, point), targets)
            for inputs, targets in batches
        ]
        return torch.stack(values).double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        return {"dampings": self.dampings, "directions": self.directions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dampings = list(state["dampings"])
        self.directions = [d.to(own) for d, own in zip(state["directions"], self.directions, strict=True)]


def curved_sequences(fraction: float, count: int) -> int:
    """How many of an outer batch's `count` sequences the curvature is measured on."""
    return max(1, round(fraction * count))


def _first(batches: Batches, count: int) -> Batches:
    """The first `count` sequences."""
    chosen: list[tuple[Tensor, Tensor]] = []
    for inputs, targets in batches:
        if count > 0:
            chosen.append((inputs[:count], targets[:count]))
        count -= len(inputs)
    return chosen


def most_passes(blocks_units: Sequence[float], method: MethodConfig, sequences: int) -> float:
    """Of an outer step that takes all its iterations, in forward passes of each sequence of the outer batch.

    The gradient, then for each block the loss at the new point and the products, one of them for the residual at the
    start; `blocks_units` are those of each block's gradient (`flops.gradient_units`).
    """
    share = curved_sequences(_checked(method.inner.options)["fraction"], sequences) / sequences
    return 3.0 + sum(1.0 + (1 + method.inner.steps) * share * units for units in blocks_units)


def adjustment(change: float, predicted: float) -> float:
    """Factor on the damping by the reduction ratio, the loss's change over q's: 3/2 below 1/4, 2/3 above 3/4.

    Where q did not fall or the loss is not finite the ratio has no meaning, and the damping rises.
    """
    ratio = change / predicted if predicted < 0 and math.isfinite(change) else -math.inf
    return 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1.0


def _checked(options: dict[str, Any]) -> dict[str, float]:
    if unknown := sorted(set(options) - set(OPTIONS)):
        allowed = ", ".join(OPTIONS)
        raise ConfigError(f"method.inner.options: conjugate_gradient takes no {unknown[0]!r}; allowed: {allowed}")
    chosen = OPTIONS | options
    if not (chosen["damping"] > 0 and chosen["tolerance"] >= 0 and 0 < chosen["fraction"] <= 1):
        raise ConfigError("method.inner.options: damping > 0, tolerance >= 0 and 0 < fraction <= 1 are needed")
    return chosen


def _flat(tensors: Parameters) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _split(vector: Tensor, like: Parameters) -> dict[str, Tensor]:
    """The inverse of `_flat`, in the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def _sequences(batches: Batches) -> int:
    return sum(len(inputs) for inputs, _ in batches)
