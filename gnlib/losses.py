"""Convex losses of a model's outputs, each by its value, gradient and Hessian product in output space.

z are outputs, y targets, v a tangent of z. All three average over predictions (tokens for the language model).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib.config import ConfigError


class ConvexLoss(Protocol):
    """What `gnlib.objective` needs of a loss L(z, y), convex in z. Implement the three for a loss of your own."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """L(z, y), a scalar."""

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """dL/dz, the shape of z."""

    def hessian_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """(d2L/dz2) v, the shape of z."""


class CrossEntropy:
    """L = mean over tokens of -log softmax(z)[y]; z [..., V] logits, y [...] class indices.

    With p = softmax(z) and n tokens: gradient (p - onehot(y)) / n, Hessian product (p v - p (p.v)) / n
    (arXiv 2510.09378, section 3). Computed in fp32 at least.
    """

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(_wide(z).flatten(0, -2), y.flatten())

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        p = _wide(z).softmax(-1)
        minus_one = torch.full_like(p[..., :1], -1.0)
        return p.scatter_add_(-1, y.unsqueeze(-1), minus_one).div_(y.numel())  # in place: [tokens, V] is large

    def hessian_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        p = _wide(z).softmax(-1)
        pv = p * v
        return pv.addcmul_(p, pv.sum(-1, keepdim=True), value=-1).div_(y.numel())

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from the model, y ~ softmax(z): [..., V] -> [...]; `generator` is of the CPU."""
        cumulative = _wide(z).softmax(-1).cumsum(-1)
        uniform = torch.rand(*z.shape[:-1], 1, generator=generator, dtype=torch.float64).to(cumulative)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:]).squeeze(-1)
        return drawn.clamp(max=z.shape[-1] - 1)


class MeanSquaredError:
    """L = mean over the n predictions of 1/2 |z - y|^2; z and y [n, features] or [n], of one shape.

    Gradient (z - y) / n, Hessian product v / n. Half of torch's `MSELoss`, which also averages over features.
    """

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        if z.shape != y.shape:  # they would be broadcast
            raise ConfigError(f"mse: outputs {list(z.shape)} and targets {list(y.shape)} must have the same shape")
        return 0.5 * (z - y).square().sum() / len(z)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y) / len(z)

    def hessian_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v / len(z)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from the model, y ~ N(z, 1), the shape of z; `generator` is of the CPU."""
        return z + torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)


def _wide(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
