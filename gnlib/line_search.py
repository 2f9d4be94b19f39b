"""Step length along a direction, by the true loss on data of its own (arXiv 2510.09378, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnlib.config import LineSearchConfig

Batches = Iterable[tuple[Tensor, Tensor]]
ForwardLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, inputs, targets) -> mean loss


class Search(NamedTuple):
    step_size: float
    losses: dict[float, float]  # step size -> mean search loss
    forward_passes: int  # of one sequence


def step_sizes(search: LineSearchConfig) -> list[float]:
    """2^(-i/2) for i = 0 .. K-1, and 0."""
    return [2.0 ** (-i / 2) for i in range(search.candidates)] + ([0.0] if search.zero else [])


@torch.no_grad()
def move(model: nn.Module, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], step_size: float) -> None:
    """Set the model's parameters to anchor + step_size (target - anchor); exactly at the ends."""
    parameters = dict(model.named_parameters())
    for name, end in target.items():
        if step_size in (0.0, 1.0):
            parameters[name].copy_(end if step_size else anchor[name])
        else:
            torch.lerp(anchor[name], end, step_size, out=parameters[name])


@torch.no_grad()
def line_search(
    model: nn.Module,
    forward_loss: ForwardLoss,
    anchor: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    batches: Batches,
    search: LineSearchConfig,
) -> Search:
    """Move the model to the best of the step sizes from anchor to target, by mean loss over the batches.

    A step size whose loss is not finite never wins; if none is finite the model stays at the anchor.
    """
    candidates = step_sizes(search)
    totals = torch.zeros(len(candidates), dtype=torch.float64)
    count, passes = 0, 0
    for inputs, targets in batches:
        count += 1
        passes += len(inputs) * len(candidates)
        losses = []
        for candidate in candidates:
            move(model, anchor, target, candidate)
            losses.append(forward_loss(model, inputs, targets))
        totals += torch.stack(losses).double().cpu()
    means = (totals / count).tolist()
    finite = [(mean, -candidate) for mean, candidate in zip(means, candidates, strict=True) if math.isfinite(mean)]
    best = -min(finite)[1] if finite else 0.0
    move(model, anchor, target, best)
    return Search(best, dict(zip(candidates, means, strict=True)), passes)
