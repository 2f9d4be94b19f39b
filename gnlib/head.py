"""The output head and the loss, a chunk of tokens at a time, so that no [tokens, vocabulary] tensor is kept.

With features x [T, D], the head's weight W [V, D] and, of a change of the model, their tangents dx and dW:

    z = x W^T    v = dx W^T + x dW^T    u = the expansion's derivative at z, v    pullback: u W [T, D], u^T x [V, D]

Several changes (the blocks of layerwise Gauss-Newton) share z, and those that leave W alone go through each product and
the loss together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib.losses import ConvexLoss, has_kernel
from gnlib.precision import compiled_once, triton_takes
from gnlib.tangents import joined

CHUNK_ELEMENTS = 2**28
"""Of a [tokens, vocabulary] tensor: 512 MiB in bf16, large enough for full speed on an H200."""

Expansion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(outputs z, targets y, output tangent v) -> the loss at z, a model of it at v, that model's derivative in v.

All three are of means over the tokens given. It may overwrite v. For several tangents v [C, n, V] of the outputs [n, V]
there are C values and C derivatives.
"""


class Change(NamedTuple):
    """A direction in which the head's inputs move; None does not."""

    dfeatures: Tensor | None  # [T, D]
    dweight: Tensor | None  # [V, D]


class Derivative(NamedTuple):
    """The expansion's value for a change and its derivative with respect to what moved."""

    value: Tensor
    features: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]


def derivatives(
    x: Tensor, weight: Tensor, targets: Tensor, changes: Sequence[Change], expansion: Expansion
) -> tuple[Tensor, list[Derivative]]:
    """The loss at z and one `Derivative` a change; x [T, D], targets [T]. Means over the T tokens."""
    x, weight, changes = cast(x), cast(weight), [Change(*map(cast, change)) for change in changes]
    together = {i: dx for i, (dx, dweight) in enumerate(changes) if dx is not None and dweight is None}
    if len(together) == 1 or not triton_takes(x):  # a CPU's caches hold the rows of one change, not of several
        together = {}
    # A and B with v = A B^T
    alone = {i: joined(x, weight, *change) for i, change in enumerate(changes) if i not in together}
    losses, sums = [], [_Sum() for _ in changes]
    for rows, share in _chunks(len(x), len(weight)):
        z, y = F.linear(x[rows], weight), targets[rows]
        for index, (inputs, matrix) in alone.items():
            loss, value, u = expansion(z, y, F.linear(inputs[rows], matrix))
            sums[index].add(_pulled_back(changes[index], value, u.to(z.dtype), x[rows], weight), share)
        if together:
            loss, parts = _together(z, y, weight, [dx[rows] for dx in together.values()], expansion)
            for index, part in zip(together, parts, strict=True):
                sums[index].add(part, share)
        losses.append(loss * share)
    return torch.stack(losses).sum(), [total.derivative() for total in sums]


def _pulled_back(change: Change, value: Tensor, u: Tensor, x: Tensor, weight: Tensor) -> Derivative:
    features, of_weight = change.dfeatures is not None, change.dweight is not None
    return Derivative(value, u @ weight if features else None, u.mT @ x if of_weight else None)


def _together(
    z: Tensor, y: Tensor, weight: Tensor, dxs: Sequence[Tensor], expansion: Expansion
) -> tuple[Tensor, list[Derivative]]:
    """The loss and the derivatives of C changes dx [n, D] of the features alone.

    One product dx W^T, one pass over z and one product u W for all, a C-th of the tokens at a time.
    """
    losses, sums = [], [_Sum() for _ in dxs]
    for rows, share in _chunks(len(z), len(weight) * len(dxs), powers=False):
        loss, values, u = expansion(z[rows], y[rows], F.linear(torch.stack([dx[rows] for dx in dxs]), weight))
        for total, value, features in zip(sums, values, u.to(z.dtype) @ weight, strict=True):
            total.add(Derivative(value, features, None), share)
        losses.append(loss * share)
    return torch.stack(losses).sum(), [total.derivative() for total in sums]


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, loss: ConvexLoss, compiled: bool = False) -> Tensor:
    """L(x W^T, targets) for features x [T, D], without a graph."""
    run = _value_by_kernel if has_kernel(loss, x) else compiled_once(_value) if compiled else _value
    weight = cast(weight)
    parts = [run(x[rows], weight, targets[rows], loss) * share for rows, share in _chunks(len(x), len(weight))]
    return torch.stack(parts).sum()


def _chunks(tokens: int, vocabulary: int, powers: bool = True) -> Iterator[tuple[slice, float]]:
    """Nearly equal slices of the tokens with their shares; with `powers` a power of two of them, so that most often all
    are equal and one compilation serves all."""
    count = min(tokens, -(-tokens * vocabulary // CHUNK_ELEMENTS))
    if powers:
        count = 1 << (count - 1).bit_length()
    ends = [tokens * index // count for index in range(count + 1)]
    for first, end in pairwise(ends):
        if end > first:
            yield slice(first, end), (end - first) / tokens


def _value(x: Tensor, weight: Tensor, targets: Tensor, loss: ConvexLoss) -> Tensor:
    return loss.value(F.linear(x, weight), targets)


def _value_by_kernel(x: Tensor, weight: Tensor, targets: Tensor, loss: ConvexLoss) -> Tensor:
    from gnlib import kernels  # needs Triton

    return kernels.cross_entropy(F.linear(x, weight), targets)


class _Sum:
    """A derivative over the chunks so far; the weight's is added up in fp32 at least."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.features: list[Tensor] = []
        self.weight: Tensor | None = None

    def add(self, part: Derivative, share: float) -> None:
        self.values.append(part.value * share)
        if part.features is not None:
            self.features.append(part.features * share)
        if part.weight is not None:
            weight = part.weight * share
            if self.weight is None:
                self.weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            else:
                self.weight += weight

    def derivative(self) -> Derivative:
        features = torch.cat(self.features) if self.features else None
        return Derivative(torch.stack(self.values).sum(), features, self.weight)


def cast(tensor: Tensor | None) -> Any:
    """In autocast's dtype, once for all chunks."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
