"""Multi-normalised gradient descent: a step of unit size in several matrix norms at once, without any state.

For norms g_1 .. g_k the direction is a fixed point of the alternation x <- P_k(... P_1(x)), where P_i(x) maximises
<x, z> over g_i(z) = 1 (arXiv 2502.06742, section 3). Shapes: [..., m, n], a stack of m x n matrices.

    name        g(x)                                  P(x)
    row         max over rows |x_i| / sqrt(n)         every row scaled to length sqrt(n)
    column      max over columns |x_j| / sqrt(m)      every column scaled to length sqrt(m)
    spectral    sigma_max(x) / sqrt(max(m, n))        U V^T sqrt(max(m, n)): all singular values equal
    frobenius   |x|_F / sqrt(m n)                     x scaled to root mean square 1
    sign        max |x_ij|                            the sign of every entry

All are scaled so that P(x) has a root mean square entry of 1 (where no row, column or entry is zero; a zero one
stays), so that they can hold together, and so that a learning rate is the size of a weight's change, as for Adam.
For m <= n the spectral target is the sqrt(n) of arXiv 2502.06742; for m > n that would contradict the row norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

# a, b, c of x <- a x + b x^3 + c x^5 on singular values: six with slope 3.4 at 0, four with fixed point 1
POLYNOMIALS = [(3.4445, -4.7750, 2.0315)] * 6 + [(1.5, -0.5, 0.0)] * 4


@dataclass(frozen=True)
class Norm:
    """A matrix norm g by its value and its normalisation P, both of stacks of matrices."""

    value: Callable[[Tensor], Tensor]
    """g(x): [..., m, n] -> [...]."""
    normalise: Callable[[Tensor], Tensor]
    """P(x): [..., m, n] -> [..., m, n]."""


def _row_value(x: Tensor) -> Tensor:
    return x.norm(dim=-1).amax(-1) / x.shape[-1] ** 0.5


def _rows(x: Tensor) -> Tensor:
    return x * (x.shape[-1] ** 0.5 / _positive(x.norm(dim=-1, keepdim=True)))


def _spectral_value(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, 2) / max(x.shape[-2:]) ** 0.5


def whiten(x: Tensor) -> Tensor:
    """(x x^T)^(-1/2) x sqrt(max(m, n)) by ten Newton-Schulz steps x <- a x + b (x x^T) x + c (x x^T)^2 x.

    Six steps lift small singular values by 3.4 each (the polynomial of Muon, Jordan et al. 2024), four bring all to 1:
    those above |x|_F / 1000 end within 1e-5 of their target, smaller ones stay too small. SWAN's authors take ten steps
    too (arXiv 2412.13148, algorithm 2), with another polynomial.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / _positive(y.norm(dim=(-2, -1), keepdim=True))
    for a, b, c in POLYNOMIALS:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y) * max(x.shape[-2:]) ** 0.5


def _frobenius_value(x: Tensor) -> Tensor:
    return x.norm(dim=(-2, -1)) / (x.shape[-2] * x.shape[-1]) ** 0.5


def _frobenius(x: Tensor) -> Tensor:
    return x / _positive(_frobenius_value(x)[..., None, None])


def _positive(length: Tensor) -> Tensor:
    """Lengths to divide by: what is zero stays zero. The least is one whose square is not rounded to zero."""
    return length.clamp(min=torch.finfo(length.dtype).tiny ** 0.5)


NORMS: dict[str, Norm] = {
    "row": Norm(_row_value, _rows),
    "column": Norm(lambda x: _row_value(x.mT), lambda x: _rows(x.mT).mT),
    "spectral": Norm(_spectral_value, whiten),
    "frobenius": Norm(_frobenius_value, _frobenius),
    "sign": Norm(lambda x: x.abs().amax((-2, -1)), torch.sign),
}


def sweep(x: Tensor, norms: Sequence[str]) -> Tensor:
    """Each norm's normalisation once, in order: P_k(... P_1(x)), the shape of x [..., m, n]."""
    for name in norms:
        x = NORMS[name].normalise(x)
    return x


class FixedPoint(NamedTuple):
    """Where the alternation ended."""

    x: Tensor  # [..., m, n]
    sweeps: int
    change: float  # in the last sweep: largest |x' - x|_F / |x'|_F over the stack
    excess: float  # largest |g_i(x) - 1| over the norms and the stack; 0 where all hold at once
    converged: bool  # change <= tolerance


def fixed_point(x: Tensor, norms: Sequence[str], tolerance: float = 1e-6, limit: int = 100) -> FixedPoint:
    """Sweep x [..., m, n] until nothing changes by more than `tolerance`, at most `limit` times."""
    change, sweeps = float("inf"), 0
    while change > tolerance and sweeps < limit:
        moved, sweeps = sweep(x, norms), sweeps + 1
        distance = (moved - x).norm(dim=(-2, -1)) / _positive(moved.norm(dim=(-2, -1)))
        change, x = distance.max().item(), moved
    excess = max((NORMS[name].value(x) - 1).abs().max().item() for name in norms)
    return FixedPoint(x, sweeps, change, excess, change <= tolerance)


class MultiNormalised(Optimizer):
    """theta <- (1 - lr weight_decay) theta - lr x, with x the gradient after `sweeps` sweeps over `norms`.

    A vector counts as a matrix of one row, a tensor of more dimensions as its first against the others. No state:
    `state_dict()` holds the settings alone. Matrices of one shape are normalised together.

    Args:
        params: Parameters or parameter groups.
        lr: Root mean square of a weight's change.
        weight_decay: Decoupled, as AdamW's.
        norms: Names of `NORMS`, in the order in which they are applied.
        sweeps: How often; a fixed number and no test of convergence, which would make a GPU wait.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        norms: Sequence[str] = ("frobenius",),
        sweeps: int = 1,
    ) -> None:
        unknown = [name for name in norms if name not in NORMS]
        if unknown:
            raise ValueError(f"no norm {unknown[0]!r}; allowed: {', '.join(NORMS)}")
        if lr < 0 or weight_decay < 0 or sweeps < 1:
            raise ValueError(
                f"lr {lr} and weight_decay {weight_decay} must not be negative, sweeps {sweeps} at least 1"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "norms": list(norms), "sweeps": sweeps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p.grad is not None]
            for kind in dict.fromkeys((p.shape, p.dtype, p.device) for p in chosen):
                alike = [p for p in chosen if (p.shape, p.dtype, p.device) == kind]
                x = torch.stack([p.grad.reshape(1, -1) if p.ndim < 2 else p.grad.flatten(1) for p in alike])
                for _ in range(group["sweeps"]):
                    x = sweep(x, group["norms"])
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(alike, [u.view(kind[0]) for u in x], alpha=-group["lr"])
        return loss


class SWAN(MultiNormalised):
    """Rows, then whitening, `sweeps` = once (arXiv 2412.13148, with the uncentred rows of arXiv 2502.06742)."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, sweeps: int = 1) -> None:
        super().__init__(params, lr, weight_decay, ("row", "spectral"), sweeps)


class SinkGD(MultiNormalised):
    """Rows and columns in turn, `sweeps` = 5 times (arXiv 2502.06742, algorithm 3)."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, sweeps: int = 5) -> None:
        super().__init__(params, lr, weight_decay, ("row", "column"), sweeps)
