"""Triton kernels between the query and key projections and attention: LayerNorm of the whole vector, then RoPE.

    q = RoPE(w n(query)),  n(x) = (x - mean x) r,  r = (mean (x - mean x)^2 + eps)^(-1/2)

Each reads a token once, where a compiler makes two kernels of a reduction over all heads and a rotation within each:
they save 2.5 of the 32 ms of a Gauss-Newton step at 45M parameters on an H100. `gnlib.tangents` and `gnlib.pullbacks`
have the same rules in plain PyTorch. A tile holds whole tokens, as the two halves of every head, whose features RoPE
turns in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnlib.model import NORM_EPS

ELEMENTS = 1024  # of a tile: 8 a thread
PROGRAMS = 1024  # that share the tokens where sums over them are wanted: several for each multiprocessor


@triton.jit
def _lanes(HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr):
    """Columns of the first halves of all heads, the index within a half, and which lanes are in use."""
    lanes = tl.arange(0, LANES)
    head, feature = lanes // PADDED, lanes % PADDED
    return head * (2 * HALF) + feature, feature, (head < HEADS) & (feature < HALF)


@triton.jit
def _normed(one, two, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """From x in halves [ROWS, LANES]: n likewise and r [ROWS]."""
    one, two = _centred(one, two, inside, WIDTH)
    r = 1.0 / tl.sqrt(tl.sum(one * one + two * two, 1) / WIDTH + EPS)
    return one * r[:, None], two * r[:, None], r


@triton.jit
def _centred(one, two, inside, WIDTH: tl.constexpr):
    """x - mean x; lanes out of use stay zero."""
    mean = (tl.sum(one + two, 1) / WIDTH)[:, None]
    return tl.where(inside, one - mean, 0.0), tl.where(inside, two - mean, 0.0)


@triton.jit
def _along(one, two, n1, n2, r, WIDTH: tl.constexpr):
    """r (u - n mean(n u)) of a centred u: derivative of n, in either direction."""
    mean = (tl.sum(n1 * one + n2 * two, 1) / WIDTH)[:, None]
    return (one - n1 * mean) * r[:, None], (two - n2 * mean) * r[:, None]


@triton.jit
def _store_rotated(TO, one, two, COSINE, SINE, angle, at, inside, HALF: tl.constexpr):
    """RoPE of the pairs (one, two), as `gnlib.model.rotate`."""
    cosine = tl.load(COSINE + angle, mask=inside, other=0.0)
    sine = tl.load(SINE + angle, mask=inside, other=0.0)
    tl.store(TO + at, (one * cosine - two * sine).to(TO.dtype.element_ty), mask=inside)
    tl.store(TO + at + HALF, (two * cosine + one * sine).to(TO.dtype.element_ty), mask=inside)


@triton.jit
def _normed_and_rotated(
    X, DX, W, DW, COSINE, SINE, TO, x_row, dx_row, r_row, tokens, length,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    TANGENT: tl.constexpr, SCALED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: RoPE(w n), or its TANGENT; SCALED where w moves too."""
    WIDTH: tl.constexpr = 2 * HEADS * HALF
    first, feature, used = _lanes(HEADS, HALF, PADDED, LANES)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    inside = (rows < tokens) & used[None, :]
    at = X + rows * x_row + first[None, :]
    one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    n1, n2, r = _normed(one, two, inside, WIDTH, EPS)
    one, two = n1, n2
    if TANGENT:
        at = DX + rows * dx_row + first[None, :]
        one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        one, two = _centred(one, two, inside, WIDTH)
        one, two = _along(one, two, n1, n2, r, WIDTH)
    one *= tl.load(W + first, mask=used, other=0.0)[None, :]
    two *= tl.load(W + first + HALF, mask=used, other=0.0)[None, :]
    if SCALED:
        one += n1 * tl.load(DW + first, mask=used, other=0.0)[None, :]
        two += n2 * tl.load(DW + first + HALF, mask=used, other=0.0)[None, :]
    angle = (rows % length) * r_row + feature[None, :]
    _store_rotated(TO, one, two, COSINE, SINE, angle, rows * WIDTH + first[None, :], inside, HALF)


@triton.jit
def _pullback(
    X, U, W, COSINE, SINE, UX, UW, x_row, u_b, u_h, u_s, ux_row, column, r_row, tokens, length,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Every so many-th tile of ROWS tokens, to columns of UX; SCALED where the sum of w's gradient is wanted."""
    WIDTH: tl.constexpr = 2 * HEADS * HALF
    first, feature, used = _lanes(HEADS, HALF, PADDED, LANES)
    head = tl.arange(0, LANES) // PADDED
    w1 = tl.load(W + first, mask=used, other=0.0)[None, :]
    w2 = tl.load(W + first + HALF, mask=used, other=0.0)[None, :]
    sum1 = tl.zeros([ROWS, LANES], tl.float32)
    sum2 = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
        inside = (rows < tokens) & used[None, :]
        at = X + rows * x_row + first[None, :]
        one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        n1, n2, r = _normed(one, two, inside, WIDTH, EPS)
        at = U + (rows // length) * u_b + (rows % length) * u_s + (head * u_h + feature)[None, :]
        one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        angle = (rows % length) * r_row + feature[None, :]
        cosine = tl.load(COSINE + angle, mask=inside, other=0.0)
        sine = tl.load(SINE + angle, mask=inside, other=0.0)
        back1, back2 = one * cosine + two * sine, two * cosine - one * sine
        if SCALED:
            sum1 += n1 * back1
            sum2 += n2 * back2
        one, two = _centred(w1 * back1, w2 * back2, inside, WIDTH)
        one, two = _along(one, two, n1, n2, r, WIDTH)
        at = UX + rows * ux_row + column + first[None, :]
        tl.store(at, one.to(UX.dtype.element_ty), mask=inside)
        tl.store(at + HALF, two.to(UX.dtype.element_ty), mask=inside)
    if SCALED:
        at = UW + tl.program_id(0) * WIDTH + first
        tl.store(at, tl.sum(sum1, 0), mask=used)
        tl.store(at + HALF, tl.sum(sum2, 0), mask=used)


@triton.jit
def _merge_heads(
    U, UX, u_b, u_h, u_s, ux_row, column, tokens, length,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """U [B, H, S, K] to columns of UX [B, S, ...]."""
    first, feature, used = _lanes(HEADS, HALF, PADDED, LANES)
    head = tl.arange(0, LANES) // PADDED
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    inside = (rows < tokens) & used[None, :]
    at = U + (rows // length) * u_b + (rows % length) * u_s + (head * u_h + feature)[None, :]
    to = UX + rows * ux_row + column + first[None, :]
    tl.store(to, tl.load(at, mask=inside), mask=inside)
    tl.store(to + HALF, tl.load(at + HALF, mask=inside), mask=inside)


def _tile(heads: int, features: int) -> dict[str, int]:
    """What is compiled in: ROWS tokens of LANES pairs, of which PADDED a head and HALF of those in use."""
    padded = triton.next_power_of_2(features // 2)
    lanes = padded * triton.next_power_of_2(heads)
    return {"HEADS": heads, "HALF": features // 2, "PADDED": padded, "LANES": lanes, "ROWS": max(1, ELEMENTS // lanes)}


def normed_and_rotated(x: Tensor, weight: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """RoPE(w n(x)), x [B, S, D] -> [B, H, S, K] in the dtype of x, stored as [B, S, H, K].

    `rotation` [2, S, K/2] holds cosines and sines.
    """
    return _forward(x, weight, None, None, rotation, heads)


def tangent(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor | None, rotation: Tensor, heads: int) -> Tensor:
    """That of `normed_and_rotated` where x moves by dx, and w by dweight if it does."""
    return _forward(x, weight, dx, dweight, rotation, heads)


def _forward(
    x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, rotation: Tensor, heads: int
) -> Tensor:
    """The primal without dx, else the tangent."""
    sequences, length, width = x.shape
    tile, rows = _tile(heads, width // heads), x.flatten(0, 1)
    drows = rows if dx is None else dx.flatten(0, 1)
    found = torch.empty(sequences, length, heads, width // heads, dtype=x.dtype, device=x.device)
    _normed_and_rotated[(triton.cdiv(len(rows), tile["ROWS"]),)](
        rows, drows, weight, weight if dweight is None else dweight, rotation[0], rotation[1], found,
        rows.stride(0), drows.stride(0), rotation.stride(1), len(rows), length,
        **tile, TANGENT=dx is not None, SCALED=dweight is not None, EPS=NORM_EPS, num_warps=4,
    )  # fmt: skip
    return found.transpose(1, 2)


def pullback(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], uheads: Sequence[Tensor], rotation: Tensor, scaled: bool
) -> tuple[Tensor, list[Tensor]]:
    """From the cotangents of q, k and v [B, H, S, K] to those of query, key and value, side by side [B, S, 3 D].

    q = RoPE(w n(query)) and k likewise, of the two `inputs` [B, S, D] with their `weights` w [D]; v is only merged. If
    `scaled`, the gradients of both w come with them.
    """
    # attention without a fused kernel returns k's with another innermost dimension
    *urotated, uvalue = [u if u.stride(-1) == 1 else u.contiguous() for u in uheads]
    sequences, heads, length, features = uvalue.shape
    width, tokens, tile = heads * features, sequences * length, _tile(heads, features)
    tiles = triton.cdiv(tokens, tile["ROWS"])
    programs = min(tiles, PROGRAMS)
    found = torch.empty(sequences, length, 3 * width, dtype=uvalue.dtype, device=uvalue.device)
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=uvalue.device)
    for index, (x, weight, u) in enumerate(zip(inputs, weights, urotated, strict=True)):
        rows = x.flatten(0, 1)
        _pullback[(programs,)](
            rows, u, weight, rotation[0], rotation[1], found, sums[index], rows.stride(0), *u.stride()[:3],
            found.stride(1), index * width, rotation.stride(1), tokens, length,
            **tile, SCALED=scaled, EPS=NORM_EPS, num_warps=4,
        )  # fmt: skip
    strides = (*uvalue.stride()[:3], found.stride(1))
    _merge_heads[(tiles,)](uvalue, found, *strides, 2 * width, tokens, length, **tile, num_warps=4)
    return found, list(sums.sum(1)) if scaled else []
