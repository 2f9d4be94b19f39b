"""One outer step of any method: solve a subproblem by inner steps, search the step length, move.

    theta_hat = N optimiser steps on the objective around theta_t, each on a fresh inner batch
    alpha     = line search along theta_hat - theta_t on fresh batches (1 without a search)
    theta_t+1 = theta_t + alpha (theta_hat - theta_t)

Full Gauss-Newton, layerwise, prox-linear and the baselines are this one step with different objectives, blocks and N
(arXiv 2510.09378, section 3): a baseline is one step (N = 1) on the loss itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gnlib.blocks import hidden_matrices, partition
from gnlib.config import CONJUGATE_GRADIENT, RunConfig
from gnlib.conjugate_gradient import HessianFree
from gnlib.line_search import line_search, move
from gnlib.losses import ConvexLoss
from gnlib.objective import build_objective, forward_loss
from gnlib.optimizers import Solver
from gnlib.precision import matmul_precision
from gnlib.schedules import learning_rate_factor

Purpose = Literal["train", "search"]


class Stream(Protocol):
    """Where batches come from; it counts the tokens (`gnlib.data.TokenStream`)."""

    def take(self, count: int, purpose: Purpose = "train") -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class StepInfo:
    """What one outer step did. Losses are in the loss's unit: nats per token for the language model."""

    train_loss: float
    """Mean loss at theta_t over the step's training batches."""
    step_size: float
    """alpha; 1 without a line search."""
    search_gain: float | None
    """Search loss at theta_t minus at theta_{t+1}; None without a search that includes 0."""
    forward_passes: float
    """Matmul cost, in forward passes of one sequence."""


class OuterStep:
    """The state of a method: its inner solution theta_hat, its optimisers, its place in the schedule.

    The model holds theta_t. The inner solution and the optimisers' state carry over from one outer step to the next
    (warm start) or start afresh; a baseline always starts at theta_t and keeps its optimiser's state.
    """

    def __init__(self, model: nn.Module, loss: ConvexLoss, config: RunConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.loss = loss
        self.forward_loss = forward_loss(loss, config.compute.compile)
        self.objective = build_objective(config.method, loss, config.compute.compile)
        self.blocks = partition(model, config.method.blocks)
        moving = {name for block in self.blocks for name in block}  # frozen ones stay as the model has them
        named = [(name, p) for name, p in model.named_parameters() if name in moving]
        self.solution = {name: p.detach().clone().requires_grad_() for name, p in named}
        self._renew_solvers()
        self.done = 0

    def _renew_solvers(self) -> None:
        method, hidden = self.config.method, hidden_matrices(self.model)
        self.solvers: list[Solver] = []
        self.hessian_free: HessianFree | None = None
        if method.inner.optimizer == CONJUGATE_GRADIENT:
            self.hessian_free = HessianFree(self.model, self.loss, method, self.blocks)
        else:
            blocks = [{name: self.solution[name] for name in block} for block in self.blocks]
            self.solvers = [Solver(block, hidden, method.inner) for block in blocks]

    @property
    def search_sequences(self) -> int:
        """What the line search of one outer step reads, at least; 0 without one."""
        search = self.config.method.line_search
        return max(1, round(search.fraction * self.config.outer_batch)) if search else 0

    def step(self, stream: Stream) -> StepInfo:
        """One outer step on fresh batches of `stream`; the model ends at theta_{t+1}.

        If it breaks off, the model is at theta_t and the next step starts afresh.
        """
        parameters = dict(self.model.named_parameters())
        anchor = {name: parameters[name].detach().clone() for name in self.solution}
        try:
            info = self._step_from(anchor, stream)
        except BaseException:  # a batch that does not fit, or Ctrl-C in a notebook
            move(self.model, {}, anchor, 1.0)
            self._place(anchor)
            self._renew_solvers()
            raise
        self.done += 1
        return info

    def _step_from(self, anchor: dict[str, Tensor], stream: Stream) -> StepInfo:
        self._start(anchor)
        train_loss, passes = self._conjugate(stream, self.hessian_free) if self.hessian_free else self._descend(stream)
        search = self.config.method.line_search
        if search is None:
            move(self.model, anchor, self.solution, 1.0)
            step_size, gain = 1.0, None
        else:
            batches = self._micro_batches(stream, self.search_sequences, "search")
            with matmul_precision(self.config.compute, self.device):
                found = line_search(self.model, self.forward_loss, anchor, self.solution, batches, search)
            step_size = found.step_size
            gain = found.losses[0.0] - found.losses[step_size] if search.zero else None
            passes += found.forward_passes
        return StepInfo(train_loss, step_size, gain, passes)

    def _start(self, anchor: dict[str, Tensor]) -> None:
        """From the last inner solution; afresh without a warm start, at the first step, or if it is not finite."""
        method = self.config.method
        baseline = method.objective == "loss"
        if not baseline and method.inner.warm_start and self.done and self._is_finite():
            return
        self._place(anchor)
        if not baseline and self.done:
            self._renew_solvers()

    @torch.no_grad()
    def _place(self, anchor: dict[str, Tensor]) -> None:
        for name, theta in self.solution.items():
            theta.copy_(anchor[name])

    def _is_finite(self) -> bool:
        return bool(torch.stack([theta.isfinite().all() for theta in self.solution.values()]).all())

    def _conjugate(self, stream: Stream, solver: HessianFree) -> tuple[float, float]:
        """Conjugate gradients on the whole outer batch; returns the loss at theta_t and the cost."""
        batches = list(self._micro_batches(stream, self.config.outer_batch, "train"))
        with matmul_precision(self.config.compute, self.device):
            return solver.solve(self.solution, batches)

    def _descend(self, stream: Stream) -> tuple[float, float]:
        """The inner steps; returns the mean loss at theta_t and the cost."""
        inner = self.config.method.inner
        size = self.config.outer_batch // inner.steps
        losses, passes = [], 0.0
        for solver in self.solvers:
            solver.train()
        for index in range(inner.steps):
            factor = learning_rate_factor(inner, self.done, index, self.config.outer_steps)
            loss, units = self.inner_step(stream, size, factor)
            losses.append(loss)
            passes += units * size
        for solver in self.solvers:
            solver.eval()
        return torch.stack(losses).double().mean().item(), passes

    def inner_step(self, stream: Stream, sequences: int, lr_factor: float) -> tuple[Tensor, float]:
        """One optimiser step of every block's solver on a fresh batch; returns the loss and the cost per sequence."""
        gradients, loss, units = self._gradients(stream, sequences)
        for solver, gradient in zip(self.solvers, gradients, strict=True):
            solver.step(gradient, lr_factor)
        return loss, units

    def _gradients(self, stream: Stream, sequences: int) -> tuple[list[dict[str, Tensor]], Tensor, float]:
        """Each block's gradient on the same fresh batch, the mean loss, and the cost per sequence asked for."""
        points = [{name: self.solution[name].detach() for name in block} for block in self.blocks]
        totals: list[dict[str, Tensor]] = []
        loss, units = torch.zeros((), device=self.device), 0.0
        batches = list(self._micro_batches(stream, sequences, "train"))
        # in the parameters' own precision: K-FAC takes eigenvectors of what it sees
        shown = [inputs for inputs, _ in batches]
        anchored = self.config.method.objective != "loss"  # a subproblem's curvature is that at theta_t
        seen = [solver.observe(self.model, self.loss, shown, anchored) for solver in self.solvers]
        for inputs, targets in batches:
            with matmul_precision(self.config.compute, self.device):
                evaluations = self.objective.evaluate(self.model, points, inputs, targets)
            units = sum(e.forward_units for e in evaluations)
            loss = loss + evaluations[0].loss / len(batches)
            gradients = [e.gradient for e in evaluations]
            totals = gradients if not totals else [_summed(t, g) for t, g in zip(totals, gradients, strict=True)]
        if len(batches) > 1:
            totals = [{name: g / len(batches) for name, g in total.items()} for total in totals]
        read = sum(len(inputs) for inputs, _ in batches)
        return totals, loss, (units + sum(seen)) * read / sequences

    def _micro_batches(self, stream: Stream, sequences: int, purpose: Purpose) -> Iterator[tuple[Tensor, Tensor]]:
        """Equal batches of at most `compute.micro_batch` sequences, so that the mean of means is the mean.

        Rounded up where `sequences` cannot be split so, which only a line search's can.
        """
        count = math.ceil(sequences / self.config.compute.micro_batch)
        for _ in range(count):
            yield stream.take(math.ceil(sequences / count), purpose)

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "solution": {name: theta.detach() for name, theta in self.solution.items()},
            "solvers": [solver.state_dict() for solver in self.solvers],
            "hessian_free": self.hessian_free.state_dict() if self.hessian_free else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        for name, theta in state["solution"].items():
            self.solution[name].copy_(theta)
        for solver, saved in zip(self.solvers, state["solvers"], strict=True):
            solver.load_state_dict(saved)
        if self.hessian_free:
            self.hessian_free.load_state_dict(state["hessian_free"])


def _summed(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + second[name] for name, tensor in first.items()}
