"""The output head and the loss, a chunk of tokens at a time, so that no [tokens, vocabulary] tensor is kept.

With features x [T, D], the head's weight W [V, D] and, of a change of the model, their tangents dx and dW:

    z = x W^T    v = dx W^T + x dW^T    u = the expansion's derivative at z, v    pullback: u W [T, D], u^T x [V, D]

Several changes (the blocks of layerwise Gauss-Newton) share z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib.losses import ConvexLoss, has_kernel
from gnlib.precision import compiled_once
from gnlib.tangents import joined

CHUNK_ELEMENTS = 2**28
"""Of a [tokens, vocabulary] tensor: 512 MiB in bf16, large enough for full speed on an H200."""

Expansion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(outputs z, targets y, output tangent v) -> the loss at z, a model of it at v, that model's derivative in v.

All three are of means over the tokens given. It may overwrite v.
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
    x, weight = cast(x), cast(weight)
    products = [joined(x, weight, *map(cast, change)) for change in changes]  # A and B with v = A B^T
    losses, sums = [], [_Sum() for _ in changes]
    for rows, share in _chunks(len(x), len(weight)):
        z = F.linear(x[rows], weight)
        for change, (inputs, matrix), total in zip(changes, products, sums, strict=True):
            loss, value, u = expansion(z, targets[rows], F.linear(inputs[rows], matrix))
            u = u.to(z.dtype)
            features = None if change.dfeatures is None else (u @ weight) * share
            total.add(Derivative(value * share, features, None if change.dweight is None else (u.mT @ x[rows]) * share))
        losses.append(loss * share)
    return torch.stack(losses).sum(), [total.derivative() for total in sums]


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, loss: ConvexLoss, compiled: bool = False) -> Tensor:
    """L(x W^T, targets) for features x [T, D], without a graph."""
    run = _value_by_kernel if has_kernel(loss, x) else compiled_once(_value) if compiled else _value
    weight = cast(weight)
    parts = [run(x[rows], weight, targets[rows], loss) * share for rows, share in _chunks(len(x), len(weight))]
    return torch.stack(parts).sum()


def _chunks(tokens: int, vocabulary: int) -> Iterator[tuple[slice, float]]:
    """Nearly equal slices of the tokens with their shares; a power of two of them, so that most often all are equal
    and one compilation serves all."""
    count = 1
    while count < tokens and tokens * vocabulary > count * CHUNK_ELEMENTS:
        count *= 2
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

    def add(self, part: Derivative) -> None:
        self.values.append(part.value)
        if part.features is not None:
            self.features.append(part.features)
        if part.weight is not None:
            if self.weight is None:
                self.weight = part.weight.to(torch.promote_types(part.weight.dtype, torch.float32))
            else:
                self.weight += part.weight

    def derivative(self) -> Derivative:
        features = torch.cat(self.features) if self.features else None
        return Derivative(torch.stack(self.values).sum(), features, self.weight)


def cast(tensor: Tensor | None) -> Any:
    """In autocast's dtype, once for all chunks."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
