"""Sophia-G: a diagonal second-order method with clipping (arXiv 2305.14342, algorithms 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from gnlib.sampled import SampledLoss

EPS = 1e-15


class SophiaG(Optimizer):
    """theta <- (1 - lr weight_decay) theta - lr clip(m / max(gamma h, eps), 1), m and h averages of g and n g^ g^.

    g^ is the gradient of the sampled loss over the n predictions of the batch (`gnlib.sampled`); h, the diagonal of the
    Gauss-Newton matrix, is refreshed before every `period`-th step, the first included. No bias correction, as there.

    Args:
        betas: Of m and h; the authors' (0.965, 0.99).
        gamma: The authors' 0.05.
        period: The authors' k = 10, steps.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.965, 0.99),
        weight_decay: float = 0.0,
        gamma: float = 0.05,
        period: int = 10,
    ) -> None:
        if gamma <= 0 or period < 1:
            raise ValueError(f"gamma {gamma} must be positive, period {period} at least 1")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "gamma": gamma, "period": period}
        super().__init__(params, defaults | {"taken": 0})
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    def due(self) -> bool:
        group = self.param_groups[0]
        return group["taken"] % group["period"] == 0

    @torch.no_grad()
    def observe(self, sampled: SampledLoss) -> float:
        with torch.enable_grad():
            gradient, predictions = sampled.gradient(seed=self.param_groups[0]["taken"])
        for group in self.param_groups:
            for p in group["params"]:
                g = gradient[sampled.names[id(p)]]
                self.state[p]["h"].lerp_(predictions * g.square(), 1 - group["betas"][1])
        return 3.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["taken"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                m, h = self.state[p]["m"], self.state[p]["h"]
                m.lerp_(p.grad, 1 - group["betas"][0])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (m / (group["gamma"] * h).clamp(min=EPS)).clamp(-1, 1))
        return loss
