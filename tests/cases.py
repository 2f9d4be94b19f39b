"""Tiny models with losses and one batch each, in float64 with fixed seeds: what every numerical test runs on.

`CASES` are built by name; the fixture `case` (conftest.py) goes through them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from oracles import DenseCrossEntropy, DenseLoss, DenseSquaredError
from torch import Tensor, nn

from gnlib.config import RunConfig
from gnlib.losses import ConvexLoss, CrossEntropy, MeanSquaredError
from gnlib.model import Decoder

KINDS = ("full", "layerwise", "matrix")
VOCABULARY, WIDTH, MLP_WIDTH, BLOCKS, HEADS, LENGTH = 7, 6, 5, 2, 3, 5


@dataclass(frozen=True)
class Case:
    """A model at an anchor, a loss with its dense oracle, and one batch."""

    name: str
    model: nn.Module
    loss: ConvexLoss
    dense_loss: DenseLoss
    inputs: Tensor
    targets: Tensor

    def point(self, names: Sequence[str], scale: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
        """theta at a random distance from the anchor, for the named parameters."""
        generator = torch.Generator().manual_seed(seed)
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        return {name: parameters[name] + scale * normal(parameters[name].shape, generator) for name in names}

    def anchor(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return parameters if names is None else {name: parameters[name] for name in names}


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def direction(like: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A random tensor for each, of its shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {name: normal(t.shape, generator).to(t.dtype) for name, t in like.items()}


def tiny_decoder(seed: int = 0) -> Decoder:
    """Odd sizes that differ from each other; norm scales away from 1, where they could be forgotten unnoticed."""
    model = Decoder(VOCABULARY, WIDTH, MLP_WIDTH, BLOCKS, HEADS, LENGTH).double()
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * normal(p.shape, generator))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(p.shape, generator) / p.shape[-1] ** 0.5)
    return model


def decoder_case() -> Case:
    inputs, targets = tokens(2, LENGTH, seed=3), tokens(2, LENGTH, seed=4)
    return Case("decoder", tiny_decoder(), CrossEntropy(), DenseCrossEntropy(), inputs, targets)


def regression_case() -> Case:
    generator = torch.Generator().manual_seed(5)
    inputs, targets = normal((8, 4), generator), normal((8, 3), generator)
    return Case("regression", mlp((4, 5, 3), nn.Tanh), MeanSquaredError(), DenseSquaredError(), inputs, targets)


def classifier_case() -> Case:
    generator = torch.Generator().manual_seed(6)
    inputs, targets = normal((9, 5), generator), torch.randint(4, (9,), generator=generator)
    return Case("classifier", mlp((5, 6, 4), nn.GELU), CrossEntropy(), DenseCrossEntropy(), inputs, targets)


def linear_case() -> Case:
    """z = W x with more predictions than weights: the Gauss-Newton subproblem is the least-squares problem itself."""
    generator = torch.Generator().manual_seed(7)
    inputs, targets = normal((12, 3), generator), normal((12, 2), generator)
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(normal((2, 3), generator))
    return Case("linear", model, MeanSquaredError(), DenseSquaredError(), inputs, targets)


CASES: dict[str, Callable[[], Case]] = {
    "decoder": decoder_case, "regression": regression_case, "classifier": classifier_case,
}


class ListStream:
    """`gnlib.outer_step.Stream` over given predictions in order, again from the start after the last one."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.position = inputs, targets, 0
        self.taken: list[tuple[int, str]] = []

    def take(self, count: int, purpose: str = "train") -> tuple[Tensor, Tensor]:
        chosen = [(self.position + i) % len(self.inputs) for i in range(count)]
        self.position += count
        self.taken.append((count, purpose))
        return self.inputs[chosen], self.targets[chosen]

    def total(self, purpose: str) -> int:
        return sum(count for count, what in self.taken if what == purpose)


def run_config(**changes: object) -> RunConfig:
    """A configuration for `OuterStep` on these cases: AdamW, no clipping or decay, constant rate; then `changes`."""
    plain: dict[str, object] = {
        "method.inner.optimizer": "adamw", "method.inner.lr": 0.01, "method.inner.clip": None,
        "method.inner.weight_decay": 0.0, "method.inner.schedule": "constant", "outer_batch": 4,
    }
    return RunConfig().replace(**(plain | changes))
