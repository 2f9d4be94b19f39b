"""Notebook 00: two problems small enough for dense matrices, and outer steps on them.

Dense Jacobians and Hessians are for the eye and for comparison; training never builds one (`gnlib.objective`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from gnlib.config import LineSearchConfig
from gnlib.line_search import line_search
from gnlib.losses import ConvexLoss, CrossEntropy
from gnlib.model import Decoder
from gnlib.objective import forward_loss

VOCABULARY, MODEL_WIDTH, MLP_WIDTH, BLOCKS, HEADS, LENGTH, SEQUENCES = 6, 4, 4, 2, 2, 6, 4


# ---------------------------------------------------------------- problems


class LogisticCurve(nn.Module):
    """P(y = 1 | x) = sigmoid(a (x - b)) as two logits (0, a (x - b)); theta = (slope a, threshold b)."""

    def __init__(self, slope: float, threshold: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([slope, threshold], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        slope, threshold = self.theta
        logit = slope * (x - threshold)
        return torch.stack([torch.zeros_like(logit), logit], dim=-1)


@dataclass(frozen=True)
class Problem:
    """A model, a loss and one batch as functions of one parameter vector theta [P], as textbooks write them."""

    model: nn.Module
    loss: ConvexLoss
    inputs: Tensor
    targets: Tensor

    @property
    def theta(self) -> Tensor:
        """The model's parameters now, in the order of `named_parameters`."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """theta [P] by parameter name and in the parameters' shapes: what gnlib works with."""
        parameters = dict(self.model.named_parameters())
        pieces = theta.split([p.numel() for p in parameters.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}

    def outputs(self, theta: Tensor) -> Tensor:
        """f: theta [P] -> logits z, flattened."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            return functional_call(self.model, self.named(theta), (self.inputs,)).flatten()

    def output_loss(self, z: Tensor) -> Tensor:
        """The convex loss L(z, y) of flattened logits."""
        return self.loss.value(z.view(*self.targets.shape, -1), self.targets)

    def objective(self, theta: Tensor) -> Tensor:
        """L(f(theta), y)."""
        return self.output_loss(self.outputs(theta))

    def gradient(self) -> Tensor:
        return grad(self.objective)(self.theta)

    def gauss_newton(self) -> Tensor:
        """G = J^T H J [P, P]."""
        J = jacrev(self.outputs)(self.theta)
        H = jacrev(grad(self.output_loss))(self.outputs(self.theta))
        return J.T @ H @ J

    def hessian(self) -> Tensor:
        """The Hessian of the objective [P, P]: G plus the model's own curvature, weighted by dL/dz."""
        return jacrev(grad(self.objective))(self.theta)


def logistic_problem(seed: int, slope: float, threshold: float, samples: int = 400) -> Problem:
    """Labels drawn from the curve of slope 2 and threshold 1; the model starts at the given slope and threshold."""
    x = torch.linspace(-3, 3, samples, dtype=torch.float64)
    chance = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Problem(LogisticCurve(slope, threshold), CrossEntropy(), x, (chance < torch.sigmoid(2 * (x - 1))).long())


def decoder_problem(seed: int) -> Problem:
    """A language model of a few hundred parameters at random initialisation, on random tokens."""
    model = Decoder(VOCABULARY, MODEL_WIDTH, MLP_WIDTH, BLOCKS, HEADS, LENGTH).double()
    model.initialise(seed)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return Problem(model, CrossEntropy(), tokens[:, :-1], tokens[:, 1:])


# ---------------------------------------------------------------- steps

Step = Callable[[Problem], Tensor]  # delta [P] at the model's parameters


def gauss_newton_step(problem: Problem) -> Tensor:
    """-G^-1 gradient."""
    return -torch.linalg.solve(problem.gauss_newton(), problem.gradient())


def newton_step(problem: Problem) -> Tensor:
    """-(Hessian)^-1 gradient: to the stationary point of the second-order expansion, minimum or not."""
    return -torch.linalg.solve(problem.hessian(), problem.gradient())


class Path(NamedTuple):
    """Outer steps: where they were, the loss there, and the step size that led there (1 for the start)."""

    points: Tensor  # [steps + 1, P]
    losses: list[float]
    step_sizes: list[float]


def outer_steps(problem: Problem, step: Step, steps: int, search: LineSearchConfig) -> Path:
    """`steps` times a direction, then a line search on the same batch; the problem's own model is left alone."""
    here = Problem(copy.deepcopy(problem.model), problem.loss, problem.inputs, problem.targets)
    points, sizes = [here.theta], [1.0]
    for _ in range(steps):
        anchor, target = here.named(here.theta), here.named(here.theta + step(here))
        batches = [(here.inputs, here.targets)]
        sizes.append(line_search(here.model, forward_loss(here.loss), anchor, target, batches, search).step_size)
        points.append(here.theta)
    return Path(torch.stack(points), [here.objective(point).item() for point in points], sizes)
