"""One registry of optimisers, used as baselines and as inner solvers; a user's own goes by its import path.

Every entry takes named parameters and an `InnerConfig` and returns torch.optim.Optimizer objects, each of which keeps
its base learning rate in its groups' `initial_lr`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gnlib.config import ConfigError, InnerConfig
from gnlib.import_path import imported
from gnlib.kfac import KFAC
from gnlib.losses import ConvexLoss
from gnlib.multinorm import SWAN, SinkGD
from gnlib.muon import BatchedMuon
from gnlib.sampled import Observer, SampledLoss
from gnlib.sophia import SophiaG

Named = dict[str, Tensor]
Build = Callable[[Named, Named, InnerConfig], list[Optimizer]]  # hidden matrices, the other parameters, settings


@dataclass(frozen=True)
class Entry:
    """An optimiser by name."""

    label: str
    """As in tables and figures."""
    source: str
    """Paper and implementation."""
    build: Build
    adam_beside: bool = False
    """Only for hidden matrices: embedding, head and vectors go to AdamW with `adam_lr`."""


class Solver:
    """The optimisers of one block of parameters, with one learning-rate factor, clipping and one state."""

    def __init__(self, parameters: Named, hidden: set[str], inner: InnerConfig) -> None:
        matrices = {name: p for name, p in parameters.items() if name in hidden}
        others = {name: p for name, p in parameters.items() if name not in hidden}
        self.parameters, self.clip = parameters, inner.clip
        self.optimizers = find(inner.optimizer).build(matrices, others, inner)
        for group in self._groups():
            if "lr" not in group:
                raise ConfigError(f"method.inner.optimizer: {inner.optimizer} has no learning rate lr")
            group["initial_lr"] = group["lr"]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, gradient: Named, lr_factor: float) -> Tensor:
        """One step along a gradient (by parameter name, used up); returns its norm before clipping."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name].to(parameter.dtype)
        norm = self._clipped()
        for group in self._groups():
            group["lr"] = group["initial_lr"] * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def _clipped(self) -> Tensor:
        """The gradients' norm, to which they are clipped if it is larger than `clip`."""
        parameters = list(self.parameters.values())
        if self.clip is None:  # not by infinity: a norm that overflows would make NaN of them
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return torch.nn.utils.clip_grad_norm_(parameters, self.clip)

    def observe(self, model: nn.Module, loss: ConvexLoss, batches: Sequence[Tensor], anchored: bool = False) -> float:
        """Show the coming step's inputs, in equal micro-batches, to the optimisers that learn curvature from them.

        At their own parameters or, `anchored`, at the model's. Returns the cost in forward passes of the batch.
        """
        due = [o for o in self.optimizers if isinstance(o, Observer) and o.due()]
        return sum(o.observe(SampledLoss(model, loss, self.parameters, batches, anchored)) for o in due)

    def train(self) -> None:
        """Put the parameters where gradients are wanted: schedule-free methods train beside what they evaluate."""
        self._switch("train")

    def eval(self) -> None:
        """Put the parameters where they are to be evaluated, and where they are saved."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers:
            getattr(optimizer, mode, lambda: None)()

    def state_bytes(self) -> dict[str, int]:
        """Size of the tensors that the optimisers keep for each parameter, by name; what a checkpoint holds."""
        kept = {id(p): values for o in self.optimizers for p, values in o.state.items()}
        return {name: _tensor_bytes(kept.get(id(p))) for name, p in self.parameters.items()}

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _tensor_bytes(kept: Any) -> int:
    """Of a tensor, or of all in lists, tuples and dictionaries of them."""
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    if isinstance(kept, Mapping):
        kept = list(kept.values())
    return sum(map(_tensor_bytes, kept)) if isinstance(kept, (list, tuple)) else 0


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


START = 2.0**-10
"""Of the parameters of a trial: beside ones small steps would be lost to rounding."""


def try_out(inner: InnerConfig) -> None:
    """A few steps with an optimiser of your own, at its rate and at half of it: ConfigError for what cannot work."""
    if "." not in inner.optimizer:  # the registry's have their tests
        return
    try:
        moved, moved_at_half = (_two_steps(inner, share) for share in (1.0, 0.5))
    except ConfigError:
        raise
    except Exception as error:  # of the user's code: anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"{inner.optimizer}: a trial step failed with {type(error).__name__}: {reason}") from None
    if inner.lr < 1e-4:  # what it moves may be lost all the same
        return
    if not moved.any():
        raise ConfigError(f"{inner.optimizer}: two trial steps at the rate {inner.lr:g} moved nothing")
    if moved.equal(moved_at_half):
        why = "which is how the rate is scheduled; see its options"
        raise ConfigError(f"{inner.optimizer}: its steps do not follow the lr of its parameter groups, {why}")


def _two_steps(inner: InnerConfig, share: float) -> Tensor:
    """How far two steps at a share of the rate move a matrix and a vector; the same numbers are drawn each time."""
    shapes = {"matrix": (4, 3), "vector": (3,)}
    parameters = {name: torch.full(shape, START, requires_grad=True) for name, shape in shapes.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU's alone
        solver = Solver(parameters, {"matrix"}, inner)
        for _ in range(2):
            solver.step({name: torch.full_like(p, 0.1) for name, p in parameters.items()}, share)
    return torch.cat([(p.detach() - START).flatten() for p in parameters.values()])


def construct(kind: type[Optimizer], parameters: Named, inner: InnerConfig, **settings: Any) -> Optimizer:
    """`kind` on the parameters with lr, weight decay and betas where it has them, `settings`, then the user's options.

    An option that the class does not take is an error, since some optimisers swallow unknown keywords, and so is one
    that has come from a field of InnerConfig. A class with another number of betas keeps its own.
    """
    known = _arguments(kind)
    common: dict[str, Any] = {"lr": inner.lr, "weight_decay": inner.weight_decay}
    own_betas = known["betas"].default if "betas" in known else ()
    if not isinstance(own_betas, tuple) or len(own_betas) == len(inner.betas):
        common["betas"] = inner.betas
    fields = (common | settings).keys() & type(inner).model_fields.keys()  # these are set as fields
    reserved = {"self", "params", "defaults", "args", "kwargs", *fields}
    unknown = [name for name in inner.options if name not in known or name in reserved]
    if unknown:
        allowed = [name for name in known if name not in reserved]
        names = ", ".join(allowed)
        raise ConfigError(f"method.inner.options: {kind.__name__} takes no {unknown[0]!r}; allowed: {names}")
    own = inspect.signature(kind).parameters
    wraps = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())  # perhaps another optimiser
    taken = {name: value for name, value in common.items() if name in known or (name == "lr" and wraps)}
    try:
        made = kind(list(parameters.values()), **taken | settings | inner.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method.inner.options: {kind.__name__}: {error}") from None
    if "lr" not in own and any(group.get("lr") != inner.lr for group in made.param_groups):
        raise ConfigError(f"method.inner.optimizer: {kind.__name__} takes no learning rate by the name lr")
    return made


def _arguments(kind: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """Of its constructor, and of those of the classes it derives from if it passes on to them what it does not name."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in base.__dict__:
            own = inspect.signature(base.__init__).parameters  # type: ignore[misc]
            found = {**own, **found}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return found


def _adamw(parameters: Named, inner: InnerConfig) -> Optimizer:
    on_gpu = all(p.is_cuda for p in parameters.values())
    return construct(torch.optim.AdamW, parameters, inner, **({"fused": True} if on_gpu else {}))


def _on_all(kind: type[Optimizer], **settings: Any) -> Build:
    """One optimiser for every parameter."""
    return lambda matrices, others, inner: [construct(kind, {**matrices, **others}, inner, **settings)]


def _on_matrices(kind: type[Optimizer], **settings: Any) -> Build:
    """`kind` for the hidden matrices and AdamW, with its own learning rate, for the rest."""

    def build(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
        beside = inner.model_copy(update={"lr": inner.adam_lr or inner.lr, "options": {}})
        # a layerwise block may have only one of the two kinds
        first = [construct(kind, matrices, inner, **settings)] if matrices else []
        return [*first, _adamw(others, beside)] if others else first

    return build


def _sgd(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    return _on_all(torch.optim.SGD, momentum=inner.momentum)(matrices, others, inner)


def _muon(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    on_gpu = any(p.is_cuda for p in matrices.values())  # on CPU there is nothing to gain from batching
    kind = BatchedMuon if on_gpu else torch.optim.Muon
    return _on_matrices(kind, momentum=inner.momentum, adjust_lr_fn="original")(matrices, others, inner)


def _soap(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    """As published, its first step moves nothing: it only starts the preconditioner."""
    from pytorch_optimizer import SOAP  # 1.5 s to import

    return _on_all(SOAP)(matrices, others, inner)


def _shampoo(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    from pytorch_optimizer import Shampoo

    return _on_matrices(Shampoo, weight_decouple=True)(matrices, others, inner)


def _kfac(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    return _on_matrices(KFAC, momentum=inner.momentum)(matrices, others, inner)


def _schedule_free(matrices: Named, others: Named, inner: InnerConfig) -> list[Optimizer]:
    from pytorch_optimizer import ScheduleFreeAdamW

    if inner.schedule != "constant":
        raise ConfigError(
            f"method.inner.schedule: schedule_free needs 'constant', with or without warm-up (got {inner.schedule!r})"
        )
    return _on_all(ScheduleFreeAdamW)(matrices, others, inner)


_REST = "on hidden matrices, AdamW on the rest"

registry: dict[str, Entry] = {
    "adamw": Entry("AdamW", "arXiv 1711.05101; torch.optim.AdamW", lambda m, rest, inner: [_adamw(m | rest, inner)]),
    "muon": Entry("Muon", f"Jordan et al. 2024; torch.optim.Muon {_REST}", _muon, adam_beside=True),
    "soap": Entry("SOAP", "arXiv 2409.11321; pytorch_optimizer.SOAP", _soap),
    "sgd": Entry("SGD", "torch.optim.SGD with momentum; its weight decay is coupled (L2)", _sgd),
    "adam": Entry(
        "Adam", "arXiv 1412.6980; torch.optim.Adam, its weight decay is coupled (L2)", _on_all(torch.optim.Adam)
    ),
    "swan": Entry("SWAN", f"arXiv 2412.13148; gnlib.multinorm.SWAN {_REST}", _on_matrices(SWAN), adam_beside=True),
    "sinkgd": Entry(
        "SinkGD", f"arXiv 2502.06742; gnlib.multinorm.SinkGD {_REST}", _on_matrices(SinkGD), adam_beside=True
    ),
    "sinkgd_stateless": Entry(
        "SinkGD, stateless",
        "arXiv 2502.06742; gnlib.multinorm.SinkGD on everything, which for vectors is signSGD (arXiv 1802.04434)",
        _on_all(SinkGD),
    ),
    "shampoo": Entry(
        "Shampoo",
        f"arXiv 1802.09568, without momentum or grafting; pytorch_optimizer.Shampoo {_REST}",
        _shampoo,
        adam_beside=True,
    ),
    "schedule_free": Entry(
        "Schedule-free AdamW",
        "arXiv 2405.15682; pytorch_optimizer.ScheduleFreeAdamW; evaluated at its average",
        _schedule_free,
    ),
    "kfac": Entry(
        "K-FAC",
        f"arXiv 1503.05671, expand of 2311.00636 (EKFAC by option, 1806.03884); gnlib.kfac.KFAC {_REST}",
        _kfac,
        adam_beside=True,
    ),
    "sophia_g": Entry("Sophia-G", "arXiv 2305.14342; gnlib.sophia.SophiaG", _on_all(SophiaG)),
}
