"""Disjoint parameter blocks, each solved with all others held fixed (arXiv 2510.09378, section 3.2).

    full        one block: Gauss-Newton of the whole model
    layerwise   embedding, each transformer block (the last one with the final norm), output head
    matrix      every parameter tensor by itself
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from gnlib.model import Decoder

Block = list[str]  # names of parameters


def partition(model: nn.Module, kind: Literal["full", "layerwise", "matrix"]) -> list[Block]:
    """The model's trainable parameters, each in exactly one block.

    The layers of a foreign module are its direct children, a ModuleList or Sequential counting as its members.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if kind == "full":
        return [names]
    if kind == "matrix":
        return [[name] for name in names]
    layers = model.layers() if isinstance(model, Decoder) else _by_child(model, names)
    trainable = [[name for name in layer if name in set(names)] for layer in layers]
    return [layer for layer in trainable if layer]


def _by_child(model: nn.Module, names: list[str]) -> list[Block]:
    modules = [(name, module) for name, module in model.named_modules() if name]
    lists = tuple(f"{name}." for name, module in modules if isinstance(module, (nn.ModuleList, nn.Sequential)))
    layers: dict[str, Block] = {}
    for name in names:
        inside = max((prefix for prefix in lists if name.startswith(prefix)), key=len, default="")
        layers.setdefault(inside + name.removeprefix(inside).split(".")[0], []).append(name)
    return list(layers.values())


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon treats as matrices: 2-D, neither embedding nor output head.

    Of a foreign module, the last nn.Linear counts as its head.
    """
    if isinstance(model, Decoder):
        return set(model.hidden_matrices())
    excluded = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    excluded.update(linears[-1:])
    return {
        name for name, p in model.named_parameters() if p.ndim == 2 and name.rpartition(".")[0] not in excluded
    }
