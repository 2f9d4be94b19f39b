"""K-FAC and EKFAC for nn.Linear weights, with Gauss-Newton factors from labels that the model draws itself.

A layer with inputs a_t and output gradients g_t of the summed sampled loss, over the T predictions of a batch, has

    G  ~  S (x) A,   S = mean of g_t g_t^T [out, out],   A = mean of a_t a_t^T [in, in]       (arXiv 1503.05671)

What is approximated: other layers and biases are left out, positions of a sequence count as independent examples
("expand" of arXiv 2311.00636), and the mean of the products is the product of the means. With S = P diag(s) P^T and
A = Q diag(r) Q^T the direction for a gradient D is

    P [ (P^T D Q) / (c + damping mean(c)) ] Q^T
    K-FAC: c_ij = s_i r_j,   EKFAC: c_ij = mean of (P^T g)_i^2 (Q^T a)_j^2    (arXiv 1806.03884, positions as examples)

with Tikhonov damping, relative to the layer's mean curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gnlib.config import ConfigError
from gnlib.sampled import SampledLoss

Statistic = Callable[[str, Tensor, Tensor], dict[str, Tensor]]  # layer's weight, a [T, in], g [T, out] -> by name


class KFAC(Optimizer):
    """v <- momentum v + direction(gradient); theta <- (1 - lr weight_decay) theta - lr v.

    Args:
        params: Weights of nn.Linear layers.
        damping: Added to the curvature's eigenvalues, as a share of their mean in the layer.
        decay: Averaging factor of S and A over refreshes; the first one is taken as it is.
        period: Steps between refreshes of the factors and their eigenvectors.
        ekfac: Measure c in the new eigenvectors, by a second pass over the same labels.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        damping: float = 0.1,
        decay: float = 0.95,
        period: int = 10,
        ekfac: bool = False,
    ) -> None:
        if damping <= 0 or not 0 <= decay < 1 or period < 1:
            raise ValueError(f"damping {damping} must be positive, decay {decay} in [0, 1), period {period} at least 1")
        settings = {"momentum": momentum, "damping": damping, "decay": decay, "period": period, "ekfac": ekfac}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings, "taken": 0})

    def due(self) -> bool:
        group = self.param_groups[0]
        return group["taken"] % group["period"] == 0

    @torch.no_grad()
    def observe(self, sampled: SampledLoss) -> float:
        group = self.param_groups[0]
        layers = {sampled.names[id(p)]: self.state[p] for group in self.param_groups for p in group["params"]}
        batch = _Layers(sampled, list(layers), seed=group["taken"])
        for name, factors in batch.mean(lambda name, a, g: {"A": a.mT @ a, "S": g.mT @ g}).items():
            state = layers[name]
            for key, factor in factors.items():
                state[key] = factor.lerp(state[key], group["decay"]) if key in state else factor
            (s, state["P"]), (r, state["Q"]) = torch.linalg.eigh(state["S"]), torch.linalg.eigh(state["A"])
            state["c"] = s.clamp(min=0)[:, None] * r.clamp(min=0)
        if not group["ekfac"]:
            return 3.0
        rotated = {name: (state["P"], state["Q"]) for name, state in layers.items()}
        squares = batch.mean(
            lambda name, a, g: {"c": (g @ rotated[name][0]).square().mT @ (a @ rotated[name][1]).square()}
        )
        for name, state in layers.items():
            state |= squares[name]
        return 6.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Along the gradient itself as long as no batch was observed."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["taken"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                direction = preconditioned(p.grad, state, group["damping"]) if "c" in state else p.grad
                state["v"] = group["momentum"] * state["v"] + direction if "v" in state else direction.clone()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * state["v"])
        return loss


def preconditioned(gradient: Tensor, curvature: Mapping[str, Tensor], damping: float) -> Tensor:
    """P [ (P^T D Q) / (c + damping mean(c)) ] Q^T for D and c [out, in], P [out, out], Q [in, in]."""
    p, q, c = (curvature[name] for name in "PQc")
    ridge = (damping * c.mean()).clamp(min=torch.finfo(c.dtype).tiny)
    return p @ ((p.mT @ gradient @ q) / (c + ridge)) @ q.mT


class _Layers:
    """Linear layers of a model on a batch with sampled labels: means of what can be said of their a and g."""

    def __init__(self, sampled: SampledLoss, names: list[str], seed: int) -> None:
        self.sampled, self.names, self.seed = sampled, names, seed
        self.modules = [sampled.model.get_submodule(name.rpartition(".")[0]) for name in names]
        for name, module in zip(names, self.modules, strict=True):
            if not isinstance(module, nn.Linear):
                raise ConfigError(
                    f"method.inner.optimizer: kfac is for nn.Linear; {name} is of {type(module).__name__}"
                )

    def mean(self, statistic: Statistic) -> dict[str, dict[str, Tensor]]:
        """By layer, over all positions of the batch; `statistic` gives sums over those of one micro-batch."""
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
        positions = 0
        for count, pairs in self._pairs():
            positions += count
            for name, (a, g) in pairs.items():
                for key, value in statistic(name, a, g).items():
                    sums[name][key] = sums[name].get(key, 0) + value
        return {name: {key: value / positions for key, value in found.items()} for name, found in sums.items()}

    def _pairs(self) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
        """Of each micro-batch, its positions and by layer a [positions, in] and g [positions, out]."""
        uses: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in self.modules}

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            uses[module].append((inputs[0].detach().flatten(0, -2), output))  # more than one where weights are shared

        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_hook(keep).remove)
            stack.enter_context(torch.enable_grad())
            for value, count in self.sampled.values(self.seed):
                for name, module in zip(self.names, self.modules, strict=True):
                    if not uses[module]:
                        raise ConfigError(f"method.inner.optimizer: kfac; the forward pass does not use {name}")
                outputs = [output for module in self.modules for _, output in uses[module]]
                gradients = iter(torch.autograd.grad(count * value, outputs))
                pairs = {}
                for name, module in zip(self.names, self.modules, strict=True):
                    inputs = [a for a, _ in uses[module]]
                    pairs[name] = torch.cat(inputs), torch.cat([next(gradients).flatten(0, -2) for _ in inputs])
                    uses[module].clear()
                yield count, pairs
