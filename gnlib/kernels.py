"""Triton kernels for a GPU: the tangent of causal attention, and the loss with its expansion over logits.

Attention, without an S x S tensor: with S = q k^T / sqrt K, P = softmax(S), y = P v, dS = (dq k^T + q dk^T) / sqrt K,

    dy = (P * dS) v + P dv - rowsum(P * dS) y,

so that one sweep over the keys with a running maximum, as in flash attention (arXiv 2205.14135), accumulates all of it:
five products of a tile where the forward has two. `gnlib.tangents.dense_attention` is the same in plain PyTorch.

Cross-entropy, in one sweep over a row of logits, and its expansion in two, the second out of the cache, or for a short
row with its exponentials kept in registers: `gnlib.losses` has the same in plain PyTorch, whose compiled form takes
three times as long over them.

Triton comes with the CUDA builds of torch; this module is imported where a GPU runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SWEEP = 2**13  # logits of a row that a program reads at once
SHORT = 2**15  # logits whose exponentials it can keep in registers


@triton.jit
def _sweep(
    state, q, dq, K, V, DK, DV, key_strides, value_strides, dkey_strides, dvalue_strides, rows, low, high, length,
    SCALE: tl.constexpr, HEAD: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `low` to `high` of one tile of queries; MASKED where some of them are in the future or beyond the end."""
    top, total, change, out = state
    features = tl.arange(0, FEATURES)
    for first in range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns[:, None] < length) & (features[None, :] < HEAD)
        k = tl.load(K + columns[:, None] * key_strides + features[None, :], mask=inside, other=0.0)
        dk = tl.load(DK + columns[:, None] * dkey_strides + features[None, :], mask=inside, other=0.0)
        v = tl.load(V + columns[:, None] * value_strides + features[None, :], mask=inside, other=0.0)
        dv = tl.load(DV + columns[:, None] * dvalue_strides + features[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * 1.4426950408889634)  # powers of two are faster
        ds = tl.dot(dq, tl.trans(k), input_precision=PRECISION)
        ds = tl.dot(q, tl.trans(dk), ds, input_precision=PRECISION) * SCALE
        if MASKED:
            s = tl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        pds = p * ds
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        change = change * shrink + tl.sum(pds, 1)
        out = tl.dot(pds.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        out = tl.dot(p.to(v.dtype), dv, out, input_precision=PRECISION)
        top = new_top
    return top, total, change, out


@triton.jit
def _attention_tangent(
    Q, K, V, DQ, DK, DV, Y, DY,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    y_b, y_h, y_s, dy_b, dy_h, dy_s, heads, length,
    SCALE: tl.constexpr, HEAD: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS queries of one head; the tiles with most keys start first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    sequence, head = sequence.to(tl.int64), head.to(tl.int64)
    Q += sequence * q_b + head * q_h
    K += sequence * k_b + head * k_h
    V += sequence * v_b + head * v_h
    DQ += sequence * dq_b + head * dq_h
    DK += sequence * dk_b + head * dk_h
    DV += sequence * dv_b + head * dv_h
    Y += sequence * y_b + head * y_h
    DY += sequence * dy_b + head * dy_h
    rows, features = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, FEATURES)
    inside = (rows[:, None] < length) & (features[None, :] < HEAD)
    q = tl.load(Q + rows[:, None] * q_s + features[None, :], mask=inside, other=0.0)
    dq = tl.load(DQ + rows[:, None] * dq_s + features[None, :], mask=inside, other=0.0)
    zeros = tl.zeros([ROWS], tl.float32)
    state = (zeros - float("inf"), zeros, zeros, tl.zeros([ROWS, FEATURES], tl.float32))
    past = tile * ROWS  # a multiple of COLUMNS: keys before it are visible to every query of the tile
    state = _sweep(
        state, q, dq, K, V, DK, DV, k_s, v_s, dk_s, dv_s, rows, 0, past, length,
        SCALE, HEAD, FEATURES, COLUMNS, False, PRECISION,
    )  # fmt: skip
    state = _sweep(
        state, q, dq, K, V, DK, DV, k_s, v_s, dk_s, dv_s, rows, past, tl.minimum(past + ROWS, length), length,
        SCALE, HEAD, FEATURES, COLUMNS, True, PRECISION,
    )  # fmt: skip
    _, total, change, out = state
    y = tl.load(Y + rows[:, None] * y_s + features[None, :], mask=inside, other=0.0)
    dy = (out - change[:, None] * y) / total[:, None]
    tl.store(DY + rows[:, None] * dy_s + features[None, :], dy.to(DY.dtype.element_ty), mask=inside)


def attention_tangent(
    heads: tuple[Tensor, Tensor, Tensor], dheads: tuple[Tensor, Tensor, Tensor], y: Tensor, tile: tuple[int, ...] = ()
) -> Tensor:
    """dy [B, H, S, K] (stored as [B, S, H, K]) of y = attention(q, k, v); all of one dtype and shape [B, H, S, K].

    K need be no power of two: a tile holds the next one, memory does not. `tile` is (queries, keys, warps, stages).
    """
    q = heads[0]  # fp32 is rounded to TF32 in the products
    sequences, count, length, features = q.shape
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in (*heads, *dheads, y)]
    dy = torch.empty(sequences, length, count, features, dtype=q.dtype, device=q.device).transpose(1, 2)
    rows, columns, warps, stages = tile or ((64, 32, 4, 3) if q.dtype == torch.bfloat16 else (128, 64, 8, 2))
    strides = [stride for t in (*tensors, dy) for stride in t.stride()[:3]]
    _attention_tangent[(triton.cdiv(length, rows), sequences * count)](
        *tensors, dy, *strides, count, length,
        SCALE=features**-0.5, HEAD=features, FEATURES=max(16, triton.next_power_of_2(features)),
        ROWS=rows, COLUMNS=columns, PRECISION="tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dy


@triton.jit
def _expansion(
    Z, V, Y, LOSS, VALUE, z_row, v_row, vocabulary, count, PROX: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One token: its loss, the value at v and the cotangent, which takes the place of v."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_row
    V += row * v_row
    lanes = tl.arange(0, COLUMNS)
    top, top_moved = float("-inf"), float("-inf")  # running maxima of z and z + v
    total = tl.zeros([COLUMNS], tl.float32)  # sums of exp(z - top), of it times v, of it times v^2
    first = tl.zeros([COLUMNS], tl.float32)
    second = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        inside = start + lanes < vocabulary
        z = tl.load(Z + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        v = tl.load(V + start + lanes, mask=inside, other=0.0).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        shrink, e = tl.exp(top - new_top), tl.exp(z - new_top)
        total = total * shrink + e
        top = new_top
        if PROX:  # `first` sums exp(z + v - top_moved)
            new_moved = tl.maximum(top_moved, tl.max(z + v, 0))
            first = first * tl.exp(top_moved - new_moved) + tl.exp(z + v - new_moved)
            top_moved = new_moved
        else:
            first = first * shrink + e * v
            second = second * shrink + e * v * v
    chosen = tl.load(Y + row)
    z_chosen = tl.load(Z + chosen).to(tl.float32)
    v_chosen = tl.load(V + chosen).to(tl.float32)
    normaliser = top + tl.log(tl.sum(total, 0))
    loss = normaliser - z_chosen
    if PROX:
        normaliser = top_moved + tl.log(tl.sum(first, 0))
        mean = 0.0
        value = normaliser - z_chosen - v_chosen
    else:
        mean = tl.sum(first, 0) / tl.sum(total, 0)  # p.v
        value = loss + mean - v_chosen + 0.5 * (tl.sum(second, 0) / tl.sum(total, 0) - mean * mean)
    tl.store(LOSS + row, loss)
    tl.store(VALUE + row, value)
    tl.debug_barrier()  # v[chosen] is read before it is overwritten
    for start in range(0, vocabulary, COLUMNS):
        inside = start + lanes < vocabulary
        z = tl.load(Z + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        v = tl.load(V + start + lanes, mask=inside, other=0.0).to(tl.float32)
        u = tl.exp(z + v - normaliser) if PROX else tl.exp(z - normaliser) * (1.0 + v - mean)
        u = tl.where(start + lanes == chosen, u - 1.0, u) / count
        tl.store(V + start + lanes, u.to(V.dtype.element_ty), mask=inside)


@triton.jit
def _short_expansion(
    Z, V, Y, LOSS, VALUE, z_row, v_row, vocabulary, count, PROX: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The same for a row whose exponentials registers hold: z is read once, v a second time out of the cache."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_row
    V += row * v_row
    lanes = tl.arange(0, COLUMNS)
    z = tl.load(Z + lanes, mask=lanes < vocabulary, other=float("-inf")).to(tl.float32)
    v = tl.load(V + lanes, mask=lanes < vocabulary, other=0.0).to(tl.float32)
    chosen = tl.load(Y + row)
    z_chosen = tl.load(Z + chosen).to(tl.float32)
    v_chosen = tl.load(V + chosen).to(tl.float32)
    top = tl.max(z, 0)
    e = tl.exp(z - top)
    total = tl.sum(e, 0)
    loss = top + tl.log(total) - z_chosen
    mean = 0.0
    if PROX:
        top = tl.max(z + v, 0)
        e = tl.exp(z + v - top)
        total = tl.sum(e, 0)
        value = top + tl.log(total) - z_chosen - v_chosen
    else:
        mean = tl.sum(e * v, 0) / total  # p.v
        value = loss + mean - v_chosen + 0.5 * (tl.sum(e * v * v, 0) / total - mean * mean)
    tl.store(LOSS + row, loss)
    tl.store(VALUE + row, value)
    tl.debug_barrier()  # v[chosen] is read before it is overwritten; and v again, to free its registers
    if PROX:
        u = e / total
    else:
        u = e * ((1.0 + tl.load(V + lanes, mask=lanes < vocabulary, other=0.0).to(tl.float32) - mean) / total)
    u = tl.where(lanes == chosen, u - 1.0, u) / count
    tl.store(V + lanes, u.to(V.dtype.element_ty), mask=lanes < vocabulary)


def cross_entropy_expansion(z: Tensor, y: Tensor, v: Tensor, prox: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(L(z), the subproblem's value at v, its derivative in v), means over the n rows; overwrites v with the last.

    z, v [n, V], y [n]; `prox` keeps the whole loss (GN-prox-linear), else its quadratic model (GN).
    """
    n, vocabulary = z.shape
    z, y = _rows(z), y.contiguous()
    v = _rows(v) if v.stride(0) >= vocabulary else v.contiguous()  # it is written to
    loss, value = torch.empty(2, n, dtype=torch.float32, device=z.device)
    whole = triton.next_power_of_2(vocabulary)
    kernel, columns = (_short_expansion, whole) if SWEEP < whole <= SHORT else (_expansion, min(SWEEP, whole))
    warps = 32 if kernel is _short_expansion else max(4, columns // 512)
    kernel[(n,)](
        z, v, y, loss, value, z.stride(0), v.stride(0), vocabulary, n, PROX=prox, COLUMNS=columns, num_warps=warps
    )
    return loss.mean(), value.mean(), v


def _rows(z: Tensor) -> Tensor:
    """With each row contiguous, as the kernels read it."""
    return z if z.stride(-1) == 1 else z.contiguous()


@triton.jit
def _loss(Z, Y, LOSS, z_row, vocabulary, COLUMNS: tl.constexpr):
    """One token's loss, in one sweep over its logits."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_row
    lanes = tl.arange(0, COLUMNS)
    top = float("-inf")
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        z = tl.load(Z + start + lanes, mask=start + lanes < vocabulary, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
        top = new_top
    chosen = tl.load(Z + tl.load(Y + row)).to(tl.float32)
    tl.store(LOSS + row, top + tl.log(tl.sum(total, 0)) - chosen)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Mean over the n rows of -log softmax(z)[y]; z [n, V], y [n]. Computed in fp32."""
    n, vocabulary = z.shape
    z, y = _rows(z), y.contiguous()
    loss = torch.empty(n, dtype=torch.float32, device=z.device)
    columns = min(SWEEP, triton.next_power_of_2(vocabulary))
    _loss[(n,)](z, y, loss, z.stride(0), vocabulary, COLUMNS=columns, num_warps=max(4, columns // 512))
    return loss.mean()
