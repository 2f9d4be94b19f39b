"""The output head and the loss, a chunk of tokens at a time, so that no [tokens, vocabulary] tensor is kept.

With features x [T, D], the head's weight W [V, D] and, of a change of the model, their tangents dx and dW:

    z = x W^T    v = dx W^T + x dW^T    u = the expansion's derivative at z, v    pullback: u W [T, D], u^T x [V, D]

Several changes (the blocks of layerwise Gauss-Newton) share z, and on a GPU those that leave W as it is softmax(z) too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib.losses import ConvexLoss, has_kernel
from gnlib.precision import compiled_once, triton_multiplies
from gnlib.tangents import joined

CHUNK_ELEMENTS = 2**28
"""Of a [tokens, vocabulary] tensor: 512 MiB in bf16, large enough for full speed on an H200."""

Expansion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(outputs z, targets y, output tangent v) -> the loss at z, a model of it at v, that model's derivative in v.

All three are of means over the tokens given. It may overwrite v.
"""
SHARED = 3
"""Changes of the features alone from which on sharing the softmax makes up for writing it and for the product p W."""


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
    x: Tensor, weight: Tensor, targets: Tensor, changes: Sequence[Change], expansion: Expansion,
    by_softmax: bool = False, compiled: bool = False,
) -> tuple[Tensor, list[Derivative]]:  # fmt: skip
    """The loss at z and one `Derivative` a change; x [T, D], targets [T]. Means over the T tokens.

    `by_softmax` if the expansion is the quadratic model of cross-entropy.
    """
    x, weight, changes = cast(x), cast(weight), [Change(*map(cast, change)) for change in changes]
    together = _together(x, weight, changes) if by_softmax else []
    alone = [index for index in range(len(changes)) if index not in together]
    products = {index: joined(x, weight, *changes[index]) for index in alone}  # A and B with v = A B^T
    losses, sums = [], [_Sum() for _ in changes]
    for rows, share in _chunks(len(x), len(weight)):
        z = F.linear(x[rows], weight)
        for index, (inputs, matrix) in products.items():
            loss, value, u = expansion(z, targets[rows], F.linear(inputs[rows], matrix))
            sums[index].add(_pulled_back(changes[index], value, u.to(z.dtype), x[rows], weight), share)
        if together:  # last, as it overwrites z
            from gnlib import head_kernels  # needs Triton

            moved = [changes[index].dfeatures[rows] for index in together]  # type: ignore[index]
            loss, *found = head_kernels.quadratic_models(z, targets[rows], weight, moved, CHUNK_ELEMENTS, compiled)
            for index, value, features in zip(together, *found, strict=True):
                sums[index].add(Derivative(value, features, None), share)
        losses.append(loss * share)
    return torch.stack(losses).sum(), [total.derivative() for total in sums]


def _together(x: Tensor, weight: Tensor, changes: Sequence[Change]) -> list[int]:
    """Which changes share the softmax."""
    found = [index for index, change in enumerate(changes) if change.dweight is None]
    return found if len(found) >= SHARED and triton_multiplies(x, weight, weight.mT) else []


def _pulled_back(change: Change, value: Tensor, u: Tensor, x: Tensor, weight: Tensor) -> Derivative:
    features = None if change.dfeatures is None else u @ weight
    return Derivative(value, features, None if change.dweight is None else u.mT @ x)


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

    def add(self, part: Derivative, share: float) -> None:
        self.values.append(part.value * share)
        if part.features is not None:
            self.features.append(part.features * share)
        if part.weight is not None:
            weight = (part.weight * share).to(torch.promote_types(part.weight.dtype, torch.float32))
            self.weight = weight if self.weight is None else self.weight.add_(weight)

    def derivative(self) -> Derivative:
        features = torch.cat(self.features) if self.features else None
        return Derivative(torch.stack(self.values).sum(), features, self.weight)


def cast(tensor: Tensor | None) -> Any:
    """In autocast's dtype, once for all chunks."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
