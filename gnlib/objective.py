"""What an inner solver minimises around the anchor theta_t (the model's parameters): value and gradient at theta.

With delta = theta - theta_t, z = f(theta_t), v = J delta (arXiv 2510.09378, section 3):

    loss            L(f(theta), y)                       the baselines
    gauss_newton    L(z) + g.v + 1/2 v.Hv                gradient J^T (g + H v)
    prox_linear     L(z + v, y)                          gradient J^T (dL/dz at z + v)

The last two have an optional ridge lambda * sum over tensors of mean(delta^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gnlib.config import MethodConfig
from gnlib.linearise import Linearisation, Parameters, linearise, outputs_of
from gnlib.losses import ConvexLoss


class Evaluation(NamedTuple):
    """One objective at one point, for one block of parameters."""

    value: Tensor  # of the objective at theta
    loss: Tensor  # L at the anchor for a linearised objective, else at theta
    gradient: dict[str, Tensor]  # of the value, by parameter name
    forward_units: float  # matmul cost in forward passes; a cost shared by several blocks is counted in the first


class Objective(Protocol):
    def evaluate(
        self, model: nn.Module, points: Sequence[Parameters], inputs: Tensor, targets: Tensor
    ) -> list[Evaluation]:
        """For each block's theta (by parameter name, the other parameters at the anchor), all on the same batch."""


class TrueLoss:
    """L(f(theta), y) by ordinary backpropagation: what a baseline minimises, in the unit of the loss."""

    def __init__(self, loss: ConvexLoss, compiled: bool = False) -> None:
        self.loss = loss
        self._value = torch.compile(self._value_at) if compiled else self._value_at

    def _value_at(self, model: nn.Module, point: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.value(outputs_of(model, inputs, point), targets)

    def evaluate(
        self, model: nn.Module, points: Sequence[Parameters], inputs: Tensor, targets: Tensor
    ) -> list[Evaluation]:
        return [self._evaluate(model, point, inputs, targets) for point in points]

    def _evaluate(self, model: nn.Module, point: Parameters, inputs: Tensor, targets: Tensor) -> Evaluation:
        variables = {name: tensor.detach().requires_grad_() for name, tensor in point.items()}
        value = self._value(model, variables, inputs, targets)
        gradients = torch.autograd.grad(value, list(variables.values()))
        return Evaluation(value.detach(), value.detach(), dict(zip(variables, gradients, strict=True)), 3.0)


class LinearisedObjective:
    """What Gauss-Newton and prox-linear share; they differ in `expand`, the model of the loss around the outputs."""

    def __init__(self, loss: ConvexLoss, ridge: float = 0.0, compiled: bool = False) -> None:
        self.loss, self.ridge, self.compiled = loss, ridge, compiled
        self._expand = torch.compile(self.expand) if compiled else self.expand

    def expand(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The subproblem's value at output tangent v, and its derivative in v (the cotangent)."""
        raise NotImplementedError

    def evaluate(
        self, model: nn.Module, points: Sequence[Parameters], inputs: Tensor, targets: Tensor
    ) -> list[Evaluation]:
        here = linearise(model, inputs, self.compiled)
        with torch.no_grad():
            loss = self.loss.value(here.outputs, targets)
        anchor = dict(model.named_parameters())
        evaluations = [self._at(here, anchor, point, targets, loss) for point in points]
        first = evaluations[0]
        return [first._replace(forward_units=first.forward_units + 1.0), *evaluations[1:]]  # 1: the shared primal

    @torch.no_grad()
    def _at(
        self, here: Linearisation, anchor: Parameters, point: Parameters, targets: Tensor, loss: Tensor
    ) -> Evaluation:
        delta = {name: theta - anchor[name] for name, theta in point.items()}
        v = here.tangent(delta)
        value, cotangent = self._expand(here.outputs.detach(), targets, v)
        gradient = here.pullback(cotangent, list(delta))
        if self.ridge:
            value = value + self.ridge * sum(d.square().mean() for d in delta.values())
            gradient = {name: g + 2 * self.ridge / g.numel() * delta[name] for name, g in gradient.items()}
        return Evaluation(value, loss, gradient, here.forward_units(list(delta)))


class GaussNewtonObjective(LinearisedObjective):
    """L(z) + g.v + 1/2 v.Hv: minimised by theta_t - G^(-1) grad, G = J^T H J (arXiv 2510.09378, section 3).

    v = J (theta - theta_t) has the shape of the outputs z. `ridge` lambda adds lambda * sum of mean(delta^2).
    """

    def expand(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g, hv = self.loss.gradient(z, y), self.loss.hessian_product(z, y, v)
        return self.loss.value(z, y) + (g * v).sum() + 0.5 * (hv * v).sum(), g + hv


class ProxLinearObjective(LinearisedObjective):
    """L(z + v, y): the linearised model under the whole loss, with its higher-order terms (section 3, as above)."""

    def expand(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.value(z + v, y), self.loss.gradient(z + v, y)


@torch.no_grad()
def curvature_product(model: nn.Module, loss: ConvexLoss, delta: Parameters, inputs: Tensor, y: Tensor) -> Parameters:
    """G delta = J^T H J delta on a batch:  delta -> J delta -> H J delta -> J^T H J delta.

    `delta` holds tensors of the parameters' shapes by name, as the result does; parameters without one are fixed.
    """
    with torch.enable_grad():
        here = linearise(model, inputs)
    return here.pullback(loss.hessian_product(here.outputs.detach(), y, here.tangent(delta)), list(delta))


def forward_loss(loss: ConvexLoss, compiled: bool = False) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """(model, inputs, targets) -> L, for evaluation and line search."""

    def value(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return loss.value(outputs_of(model, inputs), targets)

    return torch.compile(value) if compiled else value


def build_objective(method: MethodConfig, loss: ConvexLoss, compiled: bool = False) -> Objective:
    """The objective that a method's inner solver minimises."""
    if method.objective == "loss":
        return TrueLoss(loss, compiled)
    kind = {"gauss_newton": GaussNewtonObjective, "prox_linear": ProxLinearObjective}[method.objective]
    return kind(loss, method.ridge, compiled)
