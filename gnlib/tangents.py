"""Tangents of the decoder's layers, by hand: given a layer's input x and its tangent dx, the output's tangent dy.

Forward-mode rules to check against calculus, one function a layer. They run without an autograd graph beside the
ordinary primal, so a Gauss-Newton gradient costs one forward (1 unit), one tangent (2) and one pullback (2): 5/3 of a
standard step. `torch.func.jvp` would recompute the primal and cannot use flash attention.

A tangent that is None is zero: below the first changed layer nothing is computed, which makes layerwise Gauss-Newton
affordable (arXiv 2510.09378, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib.model import NORM_EPS, Block, BlockTape, merge, rotate
from gnlib.precision import in_tf32, triton_takes

Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v or their tangents, each [B, H, S, K]
Tangents = Mapping[str, Tensor]  # parameter name -> tangent of its shape; a missing name is zero
PROJECTIONS = ("query", "key", "value")


def add(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are not zero; None if all are."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def linear(x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> Tensor | None:
    """y = x W^T  ->  dy = dx W^T + x dW^T; where y is wider than x in one product, as two would write a dy more."""
    if dx is not None and dweight is not None and weight.shape[0] <= weight.shape[1]:
        return F.linear(dx, weight) + F.linear(x, dweight)
    return None if dx is None and dweight is None else F.linear(*joined(x, weight, dx, dweight))


def joined(x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A, B) with dy = A B^T: where both moved, [dx, x] and [W, dW], one product in place of two and their sum."""
    if dx is None or dweight is None:
        return (x if dx is None else dx), (weight if dweight is None else dweight)
    return torch.cat([dx.to(x.dtype), x], -1), torch.cat([weight, dweight], -1)


def rms_norm(x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> Tensor | None:
    """n = x r, r = (mean x^2 + eps)^(-1/2), y = w n  ->  dy = w dn + n dw, dn = A dx."""
    return _scaled(*rms_normed(x), weight, dx, dweight)


def layer_norm(x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> Tensor | None:
    """As RMSNorm of the centred x: dx loses its mean as x does."""
    return _scaled(*layer_normed(x), weight, None if dx is None else centred(dx), dweight)


def rms_normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """n and r."""
    r = (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return x * r, r


def layer_normed(x: Tensor) -> tuple[Tensor, Tensor]:
    return rms_normed(centred(x.float() if x.dtype == torch.bfloat16 else x))


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def along_normed(n: Tensor, r: Tensor, dx: Tensor) -> Tensor:
    """A dx = r (dx - n mean(n dx)); A is symmetric, so it is the pullback too."""
    return r * (dx - n * (n * dx).mean(-1, keepdim=True))


def _scaled(n: Tensor, r: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> Tensor | None:
    return add(
        None if dx is None else weight * along_normed(n, r, dx),
        None if dweight is None else n * dweight,
    )


def gelu(x: Tensor, dx: Tensor | None) -> Tensor | None:
    """y = x Phi(x)  ->  dy = (Phi(x) + x phi(x)) dx; elementwise, so the pullback is also the tangent."""
    return None if dx is None else torch.ops.aten.gelu_backward(dx, x)


def attention(heads: Heads, dheads: Heads, y: Tensor) -> Tensor:
    """S = q k^T / sqrt K, P = softmax(S), y = P v  ->  dy = dP v + P dv.

    dP = P (dS - rowsum(P dS)) with dS = (dq k^T + q dk^T) / sqrt K. All [B, H, S, K]. On a GPU in bf16 or TF32 by
    `gnlib.kernels`, without a tensor of S x S.
    """
    if triton_takes(heads[0]) and (heads[0].dtype == torch.bfloat16 or in_tf32()):
        from gnlib.kernels import attention_tangent  # needs Triton

        return attention_tangent(heads, dheads, y)
    return dense_attention(heads, dheads)


def dense_attention(heads: Heads, dheads: Heads) -> Tensor:
    """The rule in plain PyTorch, for any device and precision; holds [B, H, S, S] tensors."""
    (q, k, v), (dq, dk, dv) = heads, dheads
    q, dq = q * q.shape[-1] ** -0.5, dq * q.shape[-1] ** -0.5  # smaller than the scores
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    p = (q @ k.mT).masked_fill_(future, float("-inf")).softmax(-1, torch.float32 if q.dtype == torch.bfloat16 else None)
    pds = p * (torch.cat([dq, q], -1) @ torch.cat([k, dk], -1).mT)  # both products of dS in one
    dp = pds.addcmul(p, pds.sum(-1, keepdim=True), value=-1)
    return torch.cat([dp, p], -1).to(v.dtype) @ torch.cat([v, dv], -2)  # both products of dy in one


def block(block: Block, rotation: Tensor, tape: BlockTape, dx: Tensor | None, d: Tangents) -> Tensor | None:
    """Tangent [B, S, D] of a block's output; `d` holds tangents of the block's parameters by their name in it."""

    def get(name: str) -> Tensor | None:
        return d.get(f"{name}.weight")

    dquery, dkey, dvalue = _projected(block, tape, dx, d)
    dq = _rotated(block, rotation, block.query_norm.weight, tape.query, dquery, get("query_norm"))
    dk = _rotated(block, rotation, block.key_norm.weight, tape.key, dkey, get("key_norm"))
    dmixed = _attention_from(tape, dq, dk, None if dvalue is None else block.split(dvalue))
    dmiddle = add(dx, linear(merge(tape.y), block.out.weight, dmixed, get("out")))
    din = rms_norm(tape.middle, block.norm2.weight, dmiddle, get("norm2"))
    dhidden = gelu(tape.hidden, linear(tape.mlp_in, block.up.weight, din, get("up")))
    return add(dmiddle, linear(tape.activated, block.down.weight, dhidden, get("down")))


def _projected(block: Block, tape: BlockTape, dx: Tensor | None, d: Tangents) -> Sequence[Tensor | None]:
    """Tangents of query, key and value: one product for all three where it can be."""
    weights = [getattr(block, name).weight for name in PROJECTIONS]
    dweights, dnorm = [d.get(f"{name}.weight") for name in PROJECTIONS], d.get("norm1.weight")
    if dx is None and dnorm is not None:
        a, da = rms_normed(tape.x)[0], None
        dweights = [scaled(*pair, block.norm1.weight, dnorm) for pair in zip(weights, dweights, strict=True)]
    else:
        a, da = tape.attention_in, rms_norm(tape.x, block.norm1.weight, dx, dnorm)
    changed = [dweight for dweight in dweights if dweight is not None]
    if len(changed) == len(weights) or (da is not None and not changed):
        together = linear(a, torch.cat(weights), da, torch.cat(changed) if changed else None)
        assert together is not None
        return together.chunk(len(weights), -1)
    return [linear(a, weight, da, dweight) for weight, dweight in zip(weights, dweights, strict=True)]


def scaled(weight: Tensor, dweight: Tensor | None, scale: Tensor, dscale: Tensor) -> Tensor:
    """W diag(w) -> W diag(dw) + dW diag(w): of the matrix after a norm's scale w, where the normed input n stays. One
    product with n then does for two."""
    return weight * dscale if dweight is None else weight * dscale + dweight * scale


def _rotated(
    block: Block, rotation: Tensor, weight: Tensor, x: Tensor, dx: Tensor | None, dweight: Tensor | None
) -> Tensor | None:
    """Of q = RoPE(norm(query)) or k: [B, S, D] -> [B, H, S, K]."""
    if dx is not None and triton_takes(x):
        from gnlib import query_key_kernels  # needs Triton

        return query_key_kernels.tangent(x, weight, dx, dweight, rotation, block.head_count)
    normed = layer_norm(x, weight, dx, dweight)
    return None if normed is None else rotate(block.split(normed), rotation)


def _attention_from(tape: BlockTape, *dheads: Tensor | None) -> Tensor | None:
    if all(change is None for change in dheads):
        return None
    heads = (tape.q, tape.k, tape.v)
    dq, dk, dv = (torch.zeros_like(h) if d is None else d.to(h.dtype) for h, d in zip(heads, dheads, strict=True))
    return merge(attention(heads, (dq, dk, dv), tape.y))
