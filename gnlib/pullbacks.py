"""Pullbacks of the decoder's layers, by hand: from an output's cotangent u to those of the input and the weights.

The transposes of `gnlib.tangents`, from the same tape. Autograd would do, and does in the reference that the tests
compare with, but a compiled graph's backward computes the gradients of all its parameters whatever is asked for, and
keeps tensors of its own beside the tape. Here a block above those asked for passes its cotangent on and nothing else,
and the tape is all that is kept.

Only attention is left to autograd, whose fused kernels differ from device to device: a graph of that one operation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gnlib.model import Block, BlockTape, attention, merge, rotate
from gnlib.precision import triton_takes
from gnlib.tangents import PROJECTIONS, Heads, along_normed, centred, gelu, layer_normed, rms_normed

Gradients = dict[str, Tensor]  # by a block's own parameter names
SCALES = ("query_norm.weight", "key_norm.weight")
AFTER = ("down.weight", "up.weight", "norm2.weight", "out.weight")  # the way back


class Attention(NamedTuple):
    """One causal attention with its own small graph."""

    heads: Heads  # q, k, v, leaves of the graph
    y: Tensor  # [B, H, S, K]

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> Attention:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            return Attention((q, k, v), attention(q, k, v))

    def pullback(self, u: Tensor, keep: bool) -> Heads:
        """Cotangents of q, k, v from that of y."""
        return torch.autograd.grad(self.y, self.heads, u.to(self.y.dtype), retain_graph=keep)  # type: ignore[return-value]


def weight_gradient(x: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """y = x W^T  ->  u^T x, in the weight's precision."""
    return (u.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)


def scale_gradient(n: Tensor, u: Tensor) -> Tensor:
    """y = w n  ->  sum over tokens of n u."""
    return (n * u).flatten(0, -2).sum(0)


def rms_norm(x: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """y = w n  ->  A (w u), and the weight's gradient."""
    n, r = rms_normed(x)
    return along_normed(n, r, weight * u), scale_gradient(n, u)


def layer_norm(x: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As RMSNorm of the centred x."""
    n, r = layer_normed(x)
    return along_normed(n, r, centred(weight * u)), scale_gradient(n, u)


def embedding(inputs: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """y = W[inputs]  ->  each word's sum of u over its tokens, as autograd adds it up."""
    return torch.ops.aten.embedding_dense_backward(u, inputs, len(weight), -1, False)


def unrotate(u: Tensor, rotation: Tensor) -> Tensor:
    """RoPE is orthogonal: its transpose turns back."""
    cosine, sine = rotation
    return rotate(u, (cosine, -sine))


def after(
    block: Block, tape: BlockTape, u: Tensor, names: Collection[str], below: bool
) -> tuple[Tensor, Tensor | None, Gradients]:
    """From the block's output to the residual stream beside attention [B, S, D] and to the heads' y [B, H, S, K].

        m + W_down gelu(W_up norm2(m))    m = x + W_out y

    It ends at the lowest of its gradients, y's cotangent being None, unless something `below` is wanted.
    """
    found: Gradients = {}
    wanted = [name for name in AFTER if name in names]
    if "down.weight" in names:
        found["down.weight"] = weight_gradient(tape.activated, block.down.weight, u)
    if below or len(found) < len(wanted):
        uhidden: Tensor = gelu(tape.hidden, (u @ block.down.weight).to(tape.hidden.dtype))  # type: ignore[assignment]
    if "up.weight" in names:
        found["up.weight"] = weight_gradient(tape.mlp_in, block.up.weight, uhidden)
    if below or len(found) < len(wanted):
        umiddle, scale = rms_norm(tape.middle, block.norm2.weight, uhidden @ block.up.weight)
        u = u + umiddle
    if "norm2.weight" in names:
        found["norm2.weight"] = scale
    if "out.weight" in names:
        found["out.weight"] = weight_gradient(merge(tape.y), block.out.weight, u)
    return u, block.split(u @ block.out.weight) if below else None, found


def normed_and_rotated(
    block: Block, rotation: Tensor, tape: BlockTape, uheads: Heads, names: Collection[str]
) -> tuple[Tensor, Gradients]:
    """From q, k, v to query, key and value side by side [B, S, 3 D], and gradients of the norms' scales.

        q = RoPE(norm(query)), k = RoPE(norm(key)), v = value

    Not to be compiled: its kernels write parts of one tensor, and compiled by torch 2.11 they reached outside of memory
    (width 768, 16 heads, 32 sequences of 1024).
    """
    inputs, scales = (tape.query, tape.key), (block.query_norm.weight, block.key_norm.weight)
    if triton_takes(uheads[0]):
        from gnlib import query_key_kernels  # needs Triton

        scaled = not set(SCALES).isdisjoint(names)
        together, gradients = query_key_kernels.pullback(inputs, scales, uheads, rotation, scaled)
    else:
        unrotated = [merge(unrotate(u, rotation)) for u in uheads[:2]]
        parts = [layer_norm(x, scale, u) for x, scale, u in zip(inputs, scales, unrotated, strict=True)]
        together = torch.cat([*(u.to(uheads[2].dtype) for u, _ in parts), merge(uheads[2])], -1)
        gradients = [gradient for _, gradient in parts]
    return together, {name: gradient for name, gradient in zip(SCALES, gradients, strict=False) if name in names}


def before(
    block: Block, tape: BlockTape, u: Tensor, together: Tensor, names: Collection[str]
) -> tuple[Tensor, Gradients]:
    """From query, key and value [B, S, 3 D] to the block's input, where the residual stream's u [B, S, D] joins.

        query = W_q a, key = W_k a, value = W_v a    a = norm1(x)
    """
    weights = [getattr(block, name).weight for name in PROJECTIONS]
    found = _projection_gradients(tape.attention_in, weights, together, names)
    uin = together @ torch.cat(weights)
    ux, found["norm1.weight"] = rms_norm(tape.x, block.norm1.weight, uin)
    return u + ux, {name: gradient for name, gradient in found.items() if name in names}


def last_before(block: Block, tape: BlockTape, together: Tensor, names: Collection[str]) -> Gradients:
    """As `before` in the lowest block, whose input's cotangent nobody asks for.

    With the normed input n and a = n diag(w), query = n (W_q diag(w))^T: one product u^T n =: G gives the matrix's
    gradient G diag(w) and its share of the scale's, the column sums of W_q G by elements.
    """
    weights = [getattr(block, name).weight for name in PROJECTIONS]
    if "norm1.weight" not in names:
        return _projection_gradients(tape.attention_in, weights, together, names)
    g = weight_gradient(rms_normed(tape.x)[0], weights[0], together)
    found = {f"{name}.weight": part * block.norm1.weight for name, part in zip(PROJECTIONS, g.chunk(3), strict=True)}
    found["norm1.weight"] = (torch.cat(weights) * g).sum(0)
    return {name: gradient for name, gradient in found.items() if name in names}


def _projection_gradients(x: Tensor, weights: Sequence[Tensor], u: Tensor, names: Collection[str]) -> Gradients:
    """Those asked for, of query, key and value; u [B, S, 3 D]. One product if all are."""
    wanted = [f"{name}.weight" in names for name in PROJECTIONS]
    if all(wanted):
        gradients: Sequence[Tensor] = weight_gradient(x, weights[0], u).chunk(len(weights))
        return {f"{name}.weight": gradient for name, gradient in zip(PROJECTIONS, gradients, strict=True)}
    parts = zip(PROJECTIONS, wanted, weights, u.chunk(len(weights), -1), strict=True)
    return {f"{name}.weight": weight_gradient(x, weight, part) for name, want, weight, part in parts if want}
