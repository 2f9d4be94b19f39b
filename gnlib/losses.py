"""Convex losses of a model's outputs, each by its value, gradient and Hessian product in output space.

z are outputs, y targets, v a tangent of z. All three average over predictions (tokens for the language model).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib.config import ConfigError
from gnlib.precision import triton_takes


class ConvexLoss(Protocol):
    """What `gnlib.objective` needs of a loss L(z, y), convex in z. Implement the three for a loss of your own.

    z are the model's outputs and y the targets, as the model and the batches have them; those of a `gnlib.Decoder` may
    come as [B, S, V] and [B, S] or flattened, [T, V] and [T]. So L is a mean over predictions, in any order.
    """

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
        return _minus_target(_wide(z).softmax(-1), y)

    def hessian_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        p = _wide(z).softmax(-1)
        pv = p * v
        return pv.addcmul_(p, pv.sum(-1, keepdim=True), value=-1).div_(y.numel())

    def value_and_gradient(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both from one softmax."""
        z = _wide(z)
        p = z.softmax(-1)
        return self._value_from(p, z, y), _minus_target(p, y)

    def quadratic_model(self, z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(z), L + g.v + 1/2 v.Hv and its derivative u = g + Hv in v, all from one softmax.

        u = (p (1 + v - p.v) - onehot(y)) / n, and the value is L + 1/2 (g.v + u.v).
        """
        z = _wide(z)
        p = z.softmax(-1)
        loss = self._value_from(p, z, y)
        u = p * v
        mean = u.sum(-1, keepdim=True)
        slope = (mean - _chosen(v, y)).mean()  # g.v
        u = _minus_target(u.addcmul_(p, 1 - mean), y)
        return loss, loss + 0.5 * (slope + (u * v).sum()), u

    def _value_from(self, p: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """L of p = softmax(z): log sum exp z = max z - log max p, and max p >= 1/V cannot underflow as p[y] can."""
        return (z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log() - _chosen(z, y)).mean()

    def predictions(self, z: Tensor) -> int:
        """The n that means are over."""
        return z[..., 0].numel()

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

    def predictions(self, z: Tensor) -> int:
        return len(z)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from the model, y ~ N(z, 1), the shape of z; `generator` is of the CPU."""
        # not torch.randn, whose numbers depend on how many are drawn at once
        uniform = torch.rand(z.shape, generator=generator, dtype=torch.float64).clamp_(min=2.0**-54)
        return z + torch.special.ndtri(uniform).to(z)


def has_kernel(loss: ConvexLoss, z: Tensor) -> bool:
    """Whether `gnlib.kernels` computes the loss of outputs like z [n, V]."""
    # not isinstance: a class derived from it may change the loss
    return triton_takes(z) and z.ndim == 2 and type(loss) is CrossEntropy


def _minus_target(p: Tensor, y: Tensor) -> Tensor:
    """(p - onehot(y)) / n in the place of p [..., V], which is large."""
    index = y.unsqueeze(-1)
    return p.scatter_add_(-1, index, torch.full_like(p[..., :1], -1.0)).div_(y.numel())


def _chosen(z: Tensor, y: Tensor) -> Tensor:
    """z[y] of each token: [..., V] -> [..., 1]."""
    return z.gather(-1, y.unsqueeze(-1))


def _wide(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
