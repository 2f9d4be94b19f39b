"""What a Gauss-Newton gradient of the decoder costs, counted in products with its matrices and attention's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gnlib.model import Block, Decoder
from gnlib.tangents import PROJECTIONS


def gradient_units(model: Decoder, blocks: Iterable[Sequence[str]]) -> float:
    """Of one primal pass and each block's tangent and pullback, in forward passes: 5 for all parameters as one block
    (5/3 of a standard step's 3)."""
    return 1.0 + sum(2 * tangent_flops(model, names) for names in blocks) / sum(model.layer_flops())


def tangent_flops(model: Decoder, names: Sequence[str]) -> float:
    """Of one sequence's tangent for these parameters; their pullback costs the same.

    A changed matrix costs x dW, one whose input moves dx W, attention that moves twice its forward.
    """
    total, moved = 0.0, "embedding.weight" in names
    for index, block in enumerate(model.blocks):
        changed = {name.split(".")[2] for name in names if name.startswith(f"blocks.{index}.")}
        total += _block_flops(model, block, changed, moved)  # type: ignore[arg-type]
        moved |= bool(changed)
    moved |= "final_norm.weight" in names
    return total + (moved + ("head.weight" in names)) * model.product_flops(model.head)


def _block_flops(model: Decoder, block: Block, changed: set[str], moved: bool) -> float:
    """`moved` if the block's input does; if not, a change of norm1's scale goes into the product of each matrix's own
    (`tangents.scaled`)."""
    total = 0.0
    for norm, names in (("norm1", PROJECTIONS), ("", ("out",)), ("norm2", ("up",)), ("", ("down",))):
        joined = norm == "norm1" and not moved
        for name in names:
            through, own = moved or norm in changed, name in changed
            products = (through or own) if joined else through + own
            total += products * model.product_flops(getattr(block, name))
        moved |= not changed.isdisjoint((norm, *names))
        if norm == "norm1":
            moved |= not changed.isdisjoint(("query_norm", "key_norm"))
            total += moved * 2 * model.attention_flops()
    return total
