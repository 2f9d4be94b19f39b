"""Disjoint parameter blocks, each solved with all others held fixed (arXiv 2510.09378, section 3.2).

full        one block: Gauss-Newton of the whole model
layerwise   embedding, each transformer block (the last one with the final norm), output head
matrix      every matrix of a layer with the biases and norm scales after it; those before the first one join it
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import nn

from gnlib.model import has_own_layers

Block = list[str]  # names of parameters


def partition(model: nn.Module, kind: Literal["full", "layerwise", "matrix"]) -> list[Block]:
    """The model's trainable parameters, each in exactly one block.

    The layers of a foreign module, and of a Decoder with parameters tied, added or parametrised, are its direct
    children, where a ModuleList or Sequential counts as its members and a child that has a ModuleList of its own (the
    trunk of a Hugging Face model) as its children. A tied weight belongs to the layer that comes first.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if kind == "full":
        return [names]
    layers = model.layers() if has_own_layers(model) else _layers(model)
    trainable = [[name for name in layer if name in set(names)] for layer in layers]
    blocks = [layer for layer in trainable if layer]
    return blocks if kind == "layerwise" else [part for layer in blocks for part in _matrices(model, layer)]


def _matrices(model: nn.Module, layer: Block) -> list[Block]:
    """A layer's matrices (of two dimensions or more), each with its vectors; a layer of vectors stays whole."""
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    starts = [index for index, name in enumerate(layer) if shapes[name] > 1][1:]
    return [layer[first:end] for first, end in pairwise([0, *starts, len(layer)])]


def _layers(model: nn.Module) -> list[Block]:
    names = [name for name, _ in model.named_parameters()]  # each tensor once, by its first name
    starts = list(_starts(model))
    layers: dict[str, Block] = {}
    for name in names:
        layers.setdefault(max((start for start in starts if f"{name}.".startswith(start)), key=len), []).append(name)
    return list(layers.values())


def _starts(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """How the parameters' names of each layer start, in the module's order."""
    for name, _ in module.named_parameters(prefix.removesuffix("."), recurse=False):
        yield f"{name}."
    for name, child in module.named_children():
        opened = isinstance(child, (nn.ModuleList, nn.Sequential))
        trunk = not isinstance(module, nn.ModuleList) and any(isinstance(m, nn.ModuleList) for m in child.modules())
        if opened or trunk:
            yield from _starts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}."


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon treats as matrices: 2-D, neither embedding nor output head.

    Of a foreign module, the last nn.Linear counts as its head.
    """
    if has_own_layers(model):
        return set(model.hidden_matrices())
    excluded = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    excluded.update(linears[-1:])
    prefixes = tuple(f"{name}." for name in excluded)  # also of a parametrised one
    return {name for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(prefixes)}
