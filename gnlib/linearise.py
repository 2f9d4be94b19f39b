"""A model at its current parameters and inputs, with its Jacobian J = d outputs / d parameters in two directions.

    delta --tangent--> v = J delta          (parameter space -> output space)
    u --pullback--> J^T u                   (output space -> parameter space)

Both share one primal pass. `linearise` picks the decoder's hand-written tangents (`gnlib.tangents`) or, for any other
nn.Module, `torch.func.jvp`; the second is the readable reference that the tests hold the first against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gnlib import head, pullbacks, tangents
from gnlib.flops import gradient_units
from gnlib.head import Expansion
from gnlib.model import Block, BlockTape, Decoder, is_plain
from gnlib.precision import compiled_once
from gnlib.pullbacks import Attention

Parameters = Mapping[str, Tensor]
Rule = Callable[..., Any]


def outputs_of(model: nn.Module, inputs: Tensor, parameters: Parameters | None = None) -> Tensor:
    """f(inputs), at other parameters if they are given; of a Hugging Face ModelOutput its `logits`."""
    found = model(inputs) if parameters is None else torch.func.functional_call(model, dict(parameters), (inputs,))
    return found if isinstance(found, Tensor) else found.logits


def linearise(model: nn.Module, inputs: Tensor, compiled: bool = False) -> Linearisation:
    """`model` at its parameters and `inputs`; the fast implementation where the model has one."""
    if is_plain(model):
        return DecoderLinearisation(model, inputs, compiled)
    return Linearisation(model, inputs)


class Linearisation:
    """Through autograd and torch.func: any nn.Module that maps a tensor of inputs to a tensor of outputs."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.outputs = outputs_of(model, inputs)

    def tangent(self, delta: Parameters) -> Tensor:
        """v = J delta for the named parameters, all others fixed; the shape of `outputs`, without a graph."""

        def outputs(changed: dict[str, Tensor]) -> Tensor:
            return outputs_of(self.model, self.inputs, changed)

        parameters = dict(self.model.named_parameters())
        anchor = {name: parameters[name].detach() for name in delta}
        # MATH: the fused attention kernels have no forward-mode derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(outputs, (anchor,), (dict(delta),))[1]

    def pullback(self, cotangent: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """J^T u for the named parameters; may be called again."""
        return self._gradients(self.outputs, cotangent, names, keep=True)

    def _gradients(self, of: Tensor, cotangent: Tensor, names: Sequence[str], keep: bool) -> dict[str, Tensor]:
        """Of a parameter that the outputs do not depend on: zero. The last pullback need not keep the graph, whose
        memory is freed as it goes."""
        if not names:
            return {}
        parameters = dict(self.model.named_parameters())
        chosen = [parameters[name] for name in names]
        u = cotangent.view_as(of).to(of.dtype)
        gradients = torch.autograd.grad(of, chosen, u, retain_graph=keep, materialize_grads=True)
        return dict(zip(names, gradients, strict=True))

    def derivatives(
        self, deltas: Sequence[Parameters], targets: Tensor, expansion: Expansion
    ) -> tuple[Tensor, list[tuple[Tensor, dict[str, Tensor]]]]:
        """L at the outputs z and, for each delta, the expansion's value at v = J delta and its gradient in delta.

        delta -> v = J delta -> u of the expansion at (z, targets, v) -> J^T u. Ends the life of the graph.
        """
        z = self.outputs.detach()
        found = []
        for index, delta in enumerate(deltas):
            loss, value, cotangent = expansion(z, targets, self.tangent(delta))
            keep = index + 1 < len(deltas)
            found.append((value, self._gradients(self.outputs, cotangent, list(delta), keep)))
        return loss, found

    def forward_units(self, names: Sequence[str]) -> float:
        """Matmul cost of one tangent and one pullback for these parameters, in forward passes."""
        return 5.0  # jvp with its own primal: 3; pullback: 2


class DecoderLinearisation(Linearisation):
    """For `gnlib.model.Decoder`, by hand: tangents start at the first change, pullbacks end at the lowest parameter.

    Both read one tape of the primal, which runs without autograd (`gnlib.pullbacks` says why).
    """

    model: Decoder

    @torch.no_grad()
    def __init__(self, model: Decoder, inputs: Tensor, compiled: bool = False) -> None:
        self.model, self.inputs = model, inputs
        self.compiled = compiled
        self.rotation = model.rotation[:, : inputs.shape[1]]
        self.tapes: list[BlockTape | None] = []
        self.attentions: list[Attention | None] = []
        x = model.embedding(inputs)
        for block in model.blocks:
            x = self._through(block, x)  # type: ignore[arg-type]
        self.last, self.features = x, self.run(_normed)(model.final_norm, x)

    def run(self, rule: Rule) -> Rule:
        return compiled_once(rule) if self.compiled else rule

    def _through(self, block: Block, x: Tensor) -> Tensor:
        attention_in, query, key, q, k, v = self.run(Block.before)(block, x, self.rotation, fused=True)
        attention = Attention.of(q, k, v)
        y = attention.y.detach()
        middle, mlp_in, hidden, activated, out = self.run(Block.after)(block, x, y)
        self.tapes.append(BlockTape(x, attention_in, query, key, q, k, v, y, middle, mlp_in, hidden, activated))
        self.attentions.append(attention)
        return out

    @cached_property
    def outputs(self) -> Tensor:  # type: ignore[override]
        """Without a graph."""
        with torch.no_grad():
            return self.model.head(self.features)

    @torch.no_grad()
    def tangent(self, delta: Parameters) -> Tensor:
        dx, dweight = self.feature_tangent(delta), delta.get("head.weight")
        dlogits = tangents.linear(self.features, self.model.head.weight, dx, dweight)
        return torch.zeros_like(self.outputs) if dlogits is None else dlogits

    @torch.no_grad()
    def pullback(self, cotangent: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        u, weight = cotangent.view_as(self.outputs).to(self.outputs.dtype), self.model.head.weight
        found = self.feature_pullback(u @ weight, names)
        if "head.weight" in names:
            found["head.weight"] = pullbacks.weight_gradient(self.features, weight, u)
        return {name: found[name] for name in names}

    @torch.no_grad()
    def feature_tangent(self, delta: Parameters) -> Tensor | None:
        """[B, S, D], from the first changed layer up to the head; None if nothing below the head changes."""
        model = self.model
        dembedding = delta.get("embedding.weight")
        dx = None if dembedding is None else torch.nn.functional.embedding(self.inputs, dembedding)
        for index, (block, tape) in enumerate(zip(model.blocks, self.tapes, strict=True)):
            prefix = f"blocks.{index}."
            changed = {name.removeprefix(prefix): d for name, d in delta.items() if name.startswith(prefix)}
            if dx is not None or changed:
                dx = self.run(tangents.block)(block, self.rotation, tape, dx, changed)  # type: ignore[arg-type]
        return self.run(tangents.rms_norm)(self.last, model.final_norm.weight, dx, delta.get("final_norm.weight"))

    def derivatives(
        self, deltas: Sequence[Parameters], targets: Tensor, expansion: Expansion
    ) -> tuple[Tensor, list[tuple[Tensor, dict[str, Tensor]]]]:
        """As of any model, with the head and the loss in chunks of tokens (`gnlib.head`) that all deltas share."""
        changes = []
        for delta in deltas:
            dx = head.cast(self.feature_tangent(delta))  # those of all deltas are held together
            changes.append(head.Change(None if dx is None else dx.flatten(0, -2), delta.get("head.weight")))
        with torch.no_grad():
            x, weight = self.features.flatten(0, -2), self.model.head.weight
            total, parts = head.derivatives(x, weight, targets.flatten(), changes, expansion)
        found = []
        for index, (delta, part) in enumerate(zip(deltas, parts, strict=True)):
            gradients = {}
            if part.features is not None:
                below = [name for name in delta if name != "head.weight"]
                gradients = self.feature_pullback(part.features, below, keep=index + 1 < len(deltas))
            if part.weight is not None:
                gradients["head.weight"] = part.weight
            found.append((part.value, gradients))
        return total, found

    @torch.no_grad()
    def feature_pullback(self, cotangent: Tensor, names: Sequence[str], keep: bool = True) -> dict[str, Tensor]:
        """Gradients of the named parameters below the head from the features' cotangent [B S, D].

        The last pullback need not keep the tape, whose memory is freed as it goes.
        """
        model, layers = self.model, self.model.layers()[:-1]
        touched = [index for index, layer in enumerate(layers) if not set(names).isdisjoint(layer)]
        if not touched:
            return {}
        u = cotangent.view_as(self.features).to(self.features.dtype)
        u, scale = self.run(pullbacks.rms_norm)(self.last, model.final_norm.weight, u)
        found = {"final_norm.weight": scale}
        for index in reversed(range(max(touched[0] - 1, 0), len(model.blocks))):
            prefix = f"blocks.{index}."
            wanted = tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))
            further = index + 1 > touched[0]
            if not (wanted or further):  # only the final norm is
                break
            u, gradients = self._back_through(index, u, wanted, further, keep)
            found |= {prefix + name: gradient for name, gradient in gradients.items()}
        if "embedding.weight" in names:
            found["embedding.weight"] = pullbacks.embedding(self.inputs, model.embedding.weight, u)
        return {name: found[name] for name in names if name in found}

    def _back_through(
        self, index: int, u: Tensor, names: Sequence[str], further: bool, keep: bool
    ) -> tuple[Tensor, pullbacks.Gradients]:
        """Of one block; `further` if something below it is wanted."""
        block, tape, attention = self.model.blocks[index], self.tapes[index], self.attentions[index]
        assert isinstance(block, Block) and tape is not None and attention is not None
        if not keep:
            self.tapes[index] = self.attentions[index] = None
        below = further or not set(names).issubset(pullbacks.AFTER)
        u, uy, found = self.run(pullbacks.after)(block, tape, u, names, below)
        if uy is None:
            return u, found
        together, scales = pullbacks.normed_and_rotated(block, self.rotation, tape, attention.pullback(uy, keep), names)
        found |= scales
        if further:
            u, more = self.run(pullbacks.before)(block, tape, u, together, names)
            return u, found | more
        return u, found | self.run(pullbacks.last_before)(block, tape, together, names)

    def forward_units(self, names: Sequence[str]) -> float:
        return gradient_units(self.model, [names]) - 1.0


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x)
