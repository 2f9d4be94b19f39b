"""An average of the parameters over outer steps, for evaluation only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gnlib.line_search import move


class Average:
    """Bias-corrected exponential average of the parameters over outer steps, the same for every method.

    mean_t = (1 - b) sum_s b^(t-s) theta_s / (1 - b^t): without the correction, b = 0.999 would leave most of the
    weight on the first parameters for hundreds of steps.
    """

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.factor, self.steps = factor, 0
        self.sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()} if factor else {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        for name, parameter in model.named_parameters() if self.factor else ():
            self.sums[name].lerp_(parameter, 1 - self.factor)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model holds the average (its own parameters before the first step, or with factor 0)."""
        if not self.factor or not self.steps:
            yield
            return
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        correction = 1 - self.factor**self.steps
        move(model, {}, {name: total / correction for name, total in self.sums.items()}, 1.0)
        try:
            yield
        finally:
            move(model, {}, kept, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.sums = state["steps"], state["sums"]
