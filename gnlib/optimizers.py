"""One registry of optimisers, used as baselines and as inner solvers; a user's own goes by its import path.

Every entry takes named parameters and an `InnerConfig` and returns torch.optim.Optimizer objects, each of which keeps
its base learning rate in its groups' `initial_lr`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gnlib.config import ConfigError, InnerConfig
from gnlib.muon import BatchedMuon

Named = Mapping[str, Tensor]
Build = Callable[[Named, Named, InnerConfig], list[Optimizer]]  # hidden matrices, the other parameters, settings


@dataclass(frozen=True)
class Entry:
    """An optimiser by name."""

    label: str
    """As in tables and figures."""
    source: str
    """Paper and implementation."""
    build: Build


class Solver:
    """The optimisers of one block of parameters, with one learning-rate factor, clipping and one state."""

    def __init__(self, parameters: Named, hidden: set[str], inner: InnerConfig) -> None:
        matrices = {name: p for name, p in parameters.items() if name in hidden}
        others = {name: p for name, p in parameters.items() if name not in hidden}
        self.parameters, self.clip = parameters, inner.clip
        self.optimizers = find(inner.optimizer).build(matrices, others, inner)
        for group in self._groups():
            group["initial_lr"] = group["lr"]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, gradient: Named, lr_factor: float) -> Tensor:
        """One step along a gradient (by parameter name); returns its norm before clipping."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name].to(parameter.dtype)
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.clip or float("inf"))
        for group in self._groups():
            group["lr"] = group["initial_lr"] * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def find(name: str) -> Entry:
    """The registry's entry, or one made from an import path such as `my_package.MyOptimizer`.

    Raises ConfigError for an unknown name (with the near ones), a path that does not import, or another kind of class.
    """
    if name in registry:
        return registry[name]
    if "." in name:
        return _from_path(name)
    near = difflib.get_close_matches(name, registry) or sorted(registry)
    allowed = f"near or allowed: {', '.join(near)}, or an import path"
    raise ConfigError(f"method.inner.optimizer: no optimiser {name!r}; {allowed}")


def _from_path(path: str) -> Entry:
    kind = imported(path)
    return Entry(kind.__name__, path, lambda matrices, others, inner: [construct(kind, {**matrices, **others}, inner)])


def imported(path: str) -> type[Optimizer]:
    """The torch.optim.Optimizer class at an import path; ConfigError if there is none."""
    module_name, _, class_name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"method.inner.optimizer: cannot import {path!r} ({error})") from None
    if not (inspect.isclass(kind) and issubclass(kind, Optimizer)):
        raise ConfigError(f"method.inner.optimizer: {path!r} is no torch.optim.Optimizer class")
    return kind


def construct(kind: type[Optimizer], parameters: Named, inner: InnerConfig, **settings: Any) -> Optimizer:
    """`kind` on the parameters with lr, weight decay and betas where it has them, `settings`, then the user's options.

    An option that the class does not take is an error, since some optimisers swallow unknown keywords, and so is one
    that has come from a field of InnerConfig. A class with another number of betas keeps its own.
    """
    known = inspect.signature(kind.__init__).parameters
    common: dict[str, Any] = {"lr": inner.lr, "weight_decay": inner.weight_decay}
    own_betas = known["betas"].default if "betas" in known else ()
    if not isinstance(own_betas, tuple) or len(own_betas) == len(inner.betas):
        common["betas"] = inner.betas
    fields = (common | settings).keys() & type(inner).model_fields.keys()  # these are set as fields
    reserved = {"self", "params", "args", "kwargs", *fields}
    unknown = [name for name in inner.options if name not in known or name in reserved]
    if unknown:
        allowed = [name for name in known if name not in reserved]
        names = ", ".join(allowed)
        raise ConfigError(f"method.inner.options: {kind.__name__} takes no {unknown[0]!r}; allowed: {names}")
    arguments = {name: value for name, value in common.items() if name in known} | settings | inner.options
    try:
        return kind(list(parameters.values()), **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method.inner.options: {kind.__name__}: {error}") from None


def _adamw(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    return [construct(torch.optim.AdamW, {**matrices, **others}, inner)]


def _sgd(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    return [construct(torch.optim.SGD, {**matrices, **others}, inner, momentum=inner.momentum)]


def _muon(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    optimizers: list[Optimizer] = []
    if matrices:  # a layerwise block may have only one of the two kinds
        on_gpu = next(iter(matrices.values())).is_cuda  # on CPU there is nothing to gain from batching
        kind = BatchedMuon if on_gpu else torch.optim.Muon
        optimizers.append(construct(kind, matrices, inner, momentum=inner.momentum, adjust_lr_fn="original"))
    if others:
        beside = inner.model_copy(update={"lr": inner.adam_lr or inner.lr, "options": {}})
        optimizers.append(construct(torch.optim.AdamW, others, beside))
    return optimizers


def _soap(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    from pytorch_optimizer import SOAP  # 1.5 s to import

    return [construct(SOAP, {**matrices, **others}, inner)]


registry: dict[str, Entry] = {
    "adamw": Entry("AdamW", "arXiv 1711.05101; torch.optim.AdamW", _adamw),
    "muon": Entry("Muon", "Jordan et al. 2024; torch.optim.Muon on hidden matrices, AdamW on the rest", _muon),
    "soap": Entry("SOAP", "arXiv 2409.11321; pytorch_optimizer.SOAP", _soap),
    "sgd": Entry("SGD", "torch.optim.SGD with momentum; its weight decay is coupled (L2)", _sgd),
}
