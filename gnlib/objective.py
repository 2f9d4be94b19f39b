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

from gnlib import head
from gnlib.config import MethodConfig
from gnlib.linearise import Parameters, linearise, outputs_of
from gnlib.losses import ConvexLoss, CrossEntropy, has_kernel
from gnlib.model import Decoder, is_plain


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
        gradients = torch.autograd.grad(value, list(variables.values()), materialize_grads=True)
        return Evaluation(value.detach(), value.detach(), dict(zip(variables, gradients, strict=True)), 3.0)


class LinearisedObjective:
    """What Gauss-Newton and prox-linear share; they differ in `expand`, the model of the loss around the outputs."""

    def __init__(self, loss: ConvexLoss, ridge: float = 0.0, compiled: bool = False) -> None:
        self.loss, self.ridge, self.compiled = loss, ridge, compiled

    def expand(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(z), the subproblem's value at output tangent v, and its derivative in v (the cotangent)."""
        raise NotImplementedError

    def evaluate(
        self, model: nn.Module, points: Sequence[Parameters], inputs: Tensor, targets: Tensor
    ) -> list[Evaluation]:
        here = linearise(model, inputs, self.compiled)
        anchor = dict(model.named_parameters())
        deltas = [_difference(point, anchor) for point in points]
        loss, found = here.derivatives(deltas, targets, self.expand)
        units = [here.forward_units(list(delta)) for delta in deltas]
        units[0] += 1.0  # the shared primal
        pairs = [self._with_ridge(delta, *pair) for delta, pair in zip(deltas, found, strict=True)]
        return [Evaluation(value, loss, grad, unit) for (value, grad), unit in zip(pairs, units, strict=True)]

    @torch.no_grad()
    def _with_ridge(
        self, delta: Parameters, value: Tensor, gradient: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.ridge:
            return value, gradient
        deltas = list(delta.values())
        lengths = torch._foreach_mul(torch._foreach_norm(deltas), [d.numel() ** -0.5 for d in deltas])
        sloped: dict[str, Tensor] = {}
        for size in {d.numel() for d in deltas}:  # a call for all tensors of a size
            names = [name for name, d in delta.items() if d.numel() == size]
            slopes = [gradient[name] for name in names]  # autograd's may share memory, so not in their place
            added = torch._foreach_add(slopes, [delta[name] for name in names], alpha=2 * self.ridge / size)
            sloped |= dict(zip(names, added, strict=True))
        return value + self.ridge * torch.stack(lengths).square().sum(), {name: sloped[name] for name in gradient}


@torch.no_grad()
def _difference(point: Parameters, anchor: Parameters) -> dict[str, Tensor]:
    return dict(zip(point, torch._foreach_sub(list(point.values()), [anchor[name] for name in point]), strict=True))


class GaussNewtonObjective(LinearisedObjective):
    """L(z) + g.v + 1/2 v.Hv: minimised by theta_t - G^(-1) grad, G = J^T H J (arXiv 2510.09378, section 3).

    v = J (theta - theta_t) has the shape of the outputs z. `ridge` lambda adds lambda * sum of mean(delta^2).
    """

    def expand(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if has_kernel(self.loss, z):
            return cross_entropy_expansion(z, y, v, prox=False)
        if type(self.loss) is CrossEntropy:
            return self.loss.quadratic_model(z, y, v)
        loss, g, hv = self.loss.value(z, y), self.loss.gradient(z, y), self.loss.hessian_product(z, y, v)
        return loss, loss + (torch.add(g, hv, alpha=0.5) * v).sum(), g + hv


class ProxLinearObjective(LinearisedObjective):
    """L(z + v, y): the linearised model under the whole loss, with its higher-order terms.

    arXiv 2510.09378, section 3. Its gradient in theta is J^T dL/dz at z + v; v = J (theta - theta_t) has the shape of
    the outputs z. `ridge` lambda adds lambda * sum of mean(delta^2).
    """

    def expand(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if has_kernel(self.loss, z):
            return cross_entropy_expansion(z, y, v, prox=True)
        outputs = z.to(torch.promote_types(z.dtype, torch.float32)) + v
        if type(self.loss) is CrossEntropy:
            return self.loss.value(z, y), *self.loss.value_and_gradient(outputs, y)
        return self.loss.value(z, y), self.loss.value(outputs, y), self.loss.gradient(outputs, y)


def cross_entropy_expansion(z: Tensor, y: Tensor, v: Tensor, prox: bool) -> tuple[Tensor, Tensor, Tensor]:
    from gnlib import kernels  # needs Triton

    return kernels.cross_entropy_expansion(z, y, v, prox)


@torch.no_grad()
def curvature_product(
    model: nn.Module, loss: ConvexLoss, delta: Parameters, inputs: Tensor, targets: Tensor
) -> Parameters:
    """G delta = J^T H J delta of the mean loss on a batch:  delta -> J delta -> H J delta -> J^T H J delta.

    `delta` holds tensors of the parameters' shapes by name, as the result does; parameters without one are fixed.
    """
    with torch.enable_grad():
        here = linearise(model, inputs)
    return here.pullback(loss.hessian_product(here.outputs.detach(), targets, here.tangent(delta)), list(delta))


def forward_loss(loss: ConvexLoss, compiled: bool = False) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """(model, inputs, targets) -> L without a graph, for evaluation and line search."""
    features = torch.compile(Decoder.features) if compiled else Decoder.features

    @torch.no_grad()
    def value(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if not is_plain(model):
            return loss.value(outputs_of(model, inputs), targets)
        x = features(model, inputs, fused=True).flatten(0, -2)
        return head.mean_loss(x, model.head.weight, targets.flatten(), loss, compiled)

    return value


def build_objective(method: MethodConfig, loss: ConvexLoss, compiled: bool = False) -> Objective:
    """The objective that a method's inner solver minimises."""
    if method.objective == "loss":
        return TrueLoss(loss, compiled)
    kind = {"gauss_newton": GaussNewtonObjective, "prox_linear": ProxLinearObjective}[method.objective]
    return kind(loss, method.ridge, compiled)
