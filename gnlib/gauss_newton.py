"""Gauss-Newton for a model and a training loop of your own, used like an optimiser.

    optimizer = GaussNewton(model, "cross_entropy", inner=InnerConfig(lr=0.01, steps=32))
    info = optimizer.step(batches)          # (inputs, targets) pairs; moves the model's parameters

It is the outer step of every run in this library (`gnlib.outer_step`), on your batches instead of token files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sized
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from gnlib.config import CONJUGATE_GRADIENT, ConfigError, InnerConfig, LineSearchConfig, RunConfig
from gnlib.linearise import linearise, outputs_of
from gnlib.losses import ConvexLoss, CrossEntropy, MeanSquaredError
from gnlib.optimizers import find, try_out
from gnlib.outer_step import OuterStep, Purpose, StepInfo

Batch = tuple[Tensor, Tensor]  # inputs and targets of one forward pass

LOSSES: dict[str, type[CrossEntropy] | type[MeanSquaredError]] = {
    "cross_entropy": CrossEntropy,
    "mse": MeanSquaredError,
}


class GaussNewton:
    """Full Gauss-Newton over the parameters of any nn.Module (arXiv 2510.09378, section 3).

    With z = f(theta_t), J = dz/dtheta, v = J (theta - theta_t), g = dL/dz and H = d2L/dz2, one step is

        theta_hat = N optimiser steps on  L(z) + g.v + 1/2 v.Hv  from the last theta_hat, a fresh batch each
        alpha     = the best of 2^(-i/2), i < K, and 0, by the true loss on fresh batches
        theta_t+1 = theta_t + alpha (theta_hat - theta_t)

    The model is called as `model(inputs)` and returns a tensor or an output with `logits` (Hugging Face); its outputs
    must be the same at each call, so dropout and BatchNorm need `model.eval()`. Tied weights count once, their
    gradients summed; in `blocks="layerwise"` they belong to the layer that comes first (the embedding). Attention
    must have a forward-mode derivative: eager or torch's sdpa, not flash, nor the fast path that torch's Transformer
    layers take in evaluation mode (`torch.backends.mha.set_fastpath_enabled(False)`); some layers, as LSTM, have none.

    Args:
        model: Any nn.Module with float parameters, on any device; those with requires_grad=False stay.
        loss: `cross_entropy` (outputs [..., V] logits, targets [...] class indices, without padding), `mse` (outputs
            and targets of one shape), or any `ConvexLoss`.
        inner: The inner optimiser: a name of `gnlib.optimizers.registry` or the import path of a torch.optim.Optimizer
            class, then with lr 0.01 and N = 32 steps (the paper's 45M model: Muon, lr 0.01, N about 37);
            `conjugate_gradient` (at most N iterations on all batches of the step together); or an `InnerConfig`.
        blocks: `full`, `layerwise` (each layer by itself, section 3.2) or `matrix`.
        line_search: True is K = 5 and as many batches as the inner steps use (the paper's 45M model); a
            `LineSearchConfig` sets both; False takes alpha = 1.
        objective: `gauss_newton`, or `prox_linear`: L(z + v) instead of its second-order expansion.
        ridge: lambda in lambda * sum over tensors of mean((theta - theta_t)^2), added to the subproblem.
        accumulate: Batches averaged in one inner step, for models whose inner batch does not fit into memory.
        outer_steps: T, where it is known: the learning rate then falls by one cosine over all T N inner steps; without
            it by a cosine in each outer step. A schedule set in `inner` stays.
        precision: Of matrix products: `fp32`, `tf32` or `bf16`; parameters keep their own.

    Raises:
        ConfigError: One line for a setting that is unknown or does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | ConvexLoss = "cross_entropy",
        *,
        inner: str | InnerConfig = "muon",
        blocks: str = "full",
        line_search: bool | LineSearchConfig = True,
        objective: str = "gauss_newton",
        ridge: float = 0.0,
        accumulate: int = 1,
        outer_steps: int | None = None,
        precision: str = "fp32",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: a torch.nn.Module is needed, got {type(model).__name__}")
        if not isinstance(inner, (str, InnerConfig)):
            raise ConfigError(f"inner: an optimiser's name or a gnlib.InnerConfig, got {type(inner).__name__}")
        if not _is_count(accumulate):
            raise ConfigError(f"accumulate: {accumulate!r}; a whole number of batches, at least 1")
        if outer_steps is not None and not _is_count(outer_steps):
            raise ConfigError(f"outer_steps: {outer_steps!r}; a whole number, at least 1, or None")
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("model: it has no trainable parameter")
        if isinstance(inner, str):
            if inner != CONJUGATE_GRADIENT:
                find(inner)  # or ConfigError with the near names
            inner = InnerConfig(optimizer=inner, lr=0.01, steps=32)
        try_out(inner)
        if isinstance(line_search, bool):
            line_search = LineSearchConfig() if line_search else None  # type: ignore[assignment]
        method = {"objective": objective, "blocks": blocks, "ridge": ridge, "line_search": line_search}
        config = RunConfig.parse(
            {
                "method": method | {"inner": _scheduled(inner, outer_steps)},
                "outer_batch": inner.steps * accumulate,  # a "sequence" of the outer step is one of your batches
                "outer_steps": outer_steps or 0,
                "compute": {"precision": precision, "micro_batch": 1},
            }
        )
        self.model, self.loss, self.outer_steps = model, _find_loss(loss), outer_steps
        self.outer = OuterStep(model, self.loss, config)
        self._checked: list[bool] | None = None

    @property
    def batches_per_step(self) -> tuple[int, int]:
        """How many batches a step takes: to solve the subproblem, and for the line search."""
        return self.outer.config.outer_batch, self.outer.search_sequences

    def step(self, batches: Iterable[Batch], search: Iterable[Batch] | None = None) -> StepInfo:
        """One outer step; the model's parameters end at theta_{t+1}.

        It takes N x accumulate batches to solve the subproblem, then batches for the line search (`batches_per_step`
        has both numbers), from `search` if given, else further ones from `batches`. An iterator is read on from where
        it is, so one endless iterator may serve all steps; a list must have just as many. Batches weigh the same,
        whatever their size, and go to the model's device. If an error is raised, the model is as it was;
        after one from within the step, as of a batch that does not fit, the next step has no warm start.
        """
        if self.outer_steps is not None and self.outer.done >= self.outer_steps:
            raise ConfigError(f"outer_steps: all {self.outer_steps} steps of the schedule have been taken")
        solving, searching = self.batches_per_step
        if search is None:
            taken = _take(batches, solving + searching, f"{solving} to solve, {searching} for the line search")
        else:
            taken = _take(batches, solving, "to solve") + _take(search, searching, "for the line search")
        if type(self.loss) is CrossEntropy:
            _check_padding(taken)
        stream = _Batches(taken, self.outer.device)
        with torch.enable_grad():
            self._check_model(*stream.peek())
            return self.outer.step(stream)

    def state_dict(self) -> dict[str, Any]:
        """The inner solution, its optimisers' state and the number of steps done, without the model's parameters.

        Plain tensors and values: `torch.load(..., weights_only=True)` reads it. As in torch the tensors are those that
        the next step changes: save it, or deepcopy it, before.
        """
        return self.outer.state_dict() | {"made_with": self._made_with()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit, on the same device, where `state_dict` was taken; load the model's parameters too.

        Learning rates are the state's, as in torch.
        """
        if not (isinstance(state, dict) and state.keys() == self.state_dict().keys()):
            raise ConfigError("state: it is none of a GaussNewton's state_dict()")
        if _shapes(state["solution"]) != _shapes(self.outer.solution):
            raise ConfigError("state: it belongs to a model with other parameters")
        if state["made_with"] != self._made_with():
            raise ConfigError("state: it belongs to another inner optimiser, other options of it or other blocks")
        self.outer.load_state_dict({name: value for name, value in state.items() if name != "made_with"})

    def _made_with(self) -> dict[str, Any]:
        """What a state does not fit without."""
        method = self.outer.config.method
        return {"optimizer": method.inner.optimizer, "options": method.inner.options, "blocks": method.blocks}

    def _check_model(self, inputs: Tensor, targets: Tensor) -> None:
        """Before the first step, and again after model.train() or model.eval()."""
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        changed = trainable.symmetric_difference(name for block in self.outer.blocks for name in block)
        if changed:
            name = min(changed)
            raise ConfigError(f"model: {name} was frozen or unfrozen since GaussNewton was made; make another")
        modes = [module.training for module in self.model.modules()]
        if modes != self._checked:
            check_model(self.model, self.loss, inputs, targets)
            self._checked = modes


def check_model(model: nn.Module, loss: ConvexLoss, inputs: Tensor, targets: Tensor) -> None:
    """Raise ConfigError for a model that cannot be linearised on this batch, or whose outputs are not a function."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # what a forward pass may change
    with torch.no_grad():
        try:
            first, second = (outputs_of(model, inputs, buffers) for _ in range(2))
        except AttributeError as error:
            raise ConfigError(f"model: its output is neither a tensor nor has `logits` ({error})") from None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:  # of a shape, of a token that has no embedding
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"model: its forward pass fails on these inputs ({reason})") from None
        changed = [name for name, buffer in buffers.items() if buffer._version]
        if changed:
            raise ConfigError(f"model: a forward pass changes {changed[0]} (BatchNorm in training?); use model.eval()")
        if not torch.allclose(first, second, rtol=1e-3, equal_nan=True):
            raise ConfigError(
                "model: two forward passes differ (dropout?); use model.eval() or set its probability to 0"
            )
        if type(loss) is CrossEntropy:
            _check_classes(first, targets)
        loss.value(first, targets)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        linearise(model, inputs).tangent({name: torch.zeros_like(p) for name, p in parameters.items()})
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        hint = "for attention use eager or sdpa"
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
            hint = "torch.backends.mha.set_fastpath_enabled(False) gives its Transformer layers one"
        raise ConfigError(f"model: no forward-mode derivative, {hint} ({reason})") from None


def _check_classes(outputs: Tensor, targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ConfigError(f"cross_entropy: targets are class indices, torch.int64; got {targets.dtype}")
    if targets.shape != outputs.shape[:-1]:
        needed = f"outputs {list(outputs.shape)} need targets {list(outputs.shape[:-1])}"
        raise ConfigError(f"cross_entropy: {needed}, got {list(targets.shape)}")
    if targets.numel() and targets.max() >= outputs.shape[-1]:
        raise ConfigError(f"cross_entropy: class {targets.max()} of outputs for {outputs.shape[-1]} classes")


def _shapes(solution: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in solution.items()]


class _Batches:
    """`outer_step.Stream` over given batches: one `take` is one whole batch."""

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self._batches, self._device = iter(batches), device
        self._first = batches[0]

    def peek(self) -> Batch:
        return self._moved(self._first)

    def take(self, count: int, purpose: Purpose = "train") -> Batch:
        return self._moved(next(self._batches))

    def _moved(self, batch: Batch) -> Batch:
        inputs, targets = batch
        return inputs.to(self._device), targets.to(self._device)


def _take(source: Iterable[Batch], count: int, what: str) -> list[Batch]:
    """The next `count` batches of an iterator, or all of a list that has just as many."""
    if isinstance(source, Sized) and len(source) != count:
        raise ConfigError(f"batches: a step takes {count} ({what}), got {len(source)}; an iterator may have more")
    taken = list(islice(source, count))
    if len(taken) < count:
        raise ConfigError(f"batches: a step takes {count} ({what}), the iterator ended after {len(taken)}")
    for batch in taken:
        _check_batch(batch)
    return taken


def _check_batch(batch: Any) -> None:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not (pair and all(isinstance(part, Tensor) for part in batch)):
        raise ConfigError(f"batches: each must be a pair of tensors (inputs, targets), got {type(batch).__name__}")
    if not batch[0].numel():
        raise ConfigError("batches: one is empty")


def _check_padding(batches: list[Batch]) -> None:
    if any(not targets.is_floating_point() and targets.numel() and targets.min() < 0 for _, targets in batches):
        raise ConfigError("batches: negative class indices (padding) cannot be targets; cut the sequences instead")


def _is_count(value: Any) -> bool:
    """1, 2, ...; NumPy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _scheduled(inner: InnerConfig, outer_steps: int | None) -> InnerConfig:
    """With a schedule that fits what is known, unless it has one of its own."""
    known = outer_steps is not None
    if "schedule" not in inner.model_fields_set and inner.optimizer == "schedule_free":
        return inner.model_copy(update={"schedule": "constant"})  # it takes no other
    if "schedule" not in inner.model_fields_set:
        return inner.model_copy(update={"schedule": "global_cosine" if known else "constant_inner_cosine"})
    if inner.schedule.startswith("global") and not known:
        raise ConfigError(f"outer_steps: the schedule {inner.schedule} needs their number")
    return inner


def _said(loss: Any) -> str:
    return f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__


def _find_loss(loss: str | ConvexLoss) -> ConvexLoss:
    if not isinstance(loss, str):
        if isinstance(loss, type) or not all(hasattr(loss, name) for name in ("value", "gradient", "hessian_product")):
            raise ConfigError(f"loss: {', '.join(LOSSES)} or a ConvexLoss object, got {_said(loss)}")
        return loss
    if loss not in LOSSES:
        near = difflib.get_close_matches(loss, LOSSES) or list(LOSSES)
        raise ConfigError(f"loss: no loss {loss!r}; near or allowed: {', '.join(near)}, or a ConvexLoss object")
    return LOSSES[loss]()
