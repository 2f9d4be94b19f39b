"""Cross-entropy's Hessian for many changes of the features at once, as the blocks of layerwise Gauss-Newton make them.

Of a token with features x, logits z = W x and p = softmax(z), a change dx of the features alone moves z by v = W dx,
and p.v = dx.(W^T p). So with g = W^T p - W[y] and h = W^T (p (v - p.v)), a vector of D features each,

    L + dx.(g + h / 2)  is the quadratic model,    g + h  its derivative in dx:

no sum over the vocabulary but in products with W, whose first carries out p (v - p.v) on its tiles before it writes
them. In bf16 p no longer sums to one; p.v is then the mean by p over its sum, so that a change that moves all logits
alike still costs nothing. One at a time (`gnlib.kernels.cross_entropy_expansion`), each change reads z and reads and
writes v once more; all together take one product more, p W, which `gnlib.flops` does not count, as it counts what the
method needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gnlib.kernels import SWEEP, row_normaliser
from gnlib.precision import compiled_once

TOKENS = 128  # of a tile


@triton.jit
def _softmax(Z, Y, LOSS, SUM, z_row, vocabulary, COLUMNS: tl.constexpr):
    """One token's loss in a sweep over its logits; p takes their place in a second, out of the cache."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_row
    lanes = tl.arange(0, COLUMNS)
    normaliser = row_normaliser(Z, vocabulary, COLUMNS)
    tl.store(LOSS + row, normaliser - tl.load(Z + tl.load(Y + row)).to(tl.float32))
    tl.debug_barrier()  # z[chosen] is read before it is overwritten
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        inside = start + lanes < vocabulary
        z = tl.load(Z + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.exp(z - normaliser).to(Z.dtype.element_ty)
        total += p.to(tl.float32)
        tl.store(Z + start + lanes, p, mask=inside)
    tl.store(SUM + row, tl.sum(total, 0))


@triton.jit
def _curved_product(
    DX, W, P, MEAN, OUT, n, mean_row, changes, vocabulary,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of p (dx W^T - mean); a tile's changes follow each other, for they share its p."""
    tile = tl.program_id(0)
    change = tile % changes
    row = tile // changes % tl.cdiv(n, ROWS) * ROWS
    word = tile // changes // tl.cdiv(n, ROWS) * WORDS
    rows, words = row + tl.arange(0, ROWS), word + tl.arange(0, WORDS)
    inside = (rows[:, None] < n) & (words[None, :] < vocabulary)
    # asked for before the product, so that it comes meanwhile
    p = tl.load(P + rows.to(tl.int64)[:, None] * vocabulary + words[None, :], mask=inside, other=0.0)
    mean = tl.load(MEAN + change * mean_row + rows, mask=rows < n, other=0.0)
    v = tl.zeros([ROWS, WORDS], tl.float32)
    for depth in range(0, FEATURES, DEPTH):
        v = tl.dot(DX.load([change, row, depth]).reshape([ROWS, DEPTH]), W.load([word, depth]).T, v)
    u = p.to(tl.float32) * (v - mean[:, None])
    OUT.store([change, row, word], u.to(OUT.dtype).reshape([1, ROWS, WORDS]))


def softmax(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L(z), p = softmax(z) in the place of z, the sums of p [n] in fp32); z [n, V] contiguous, y [n].

    L is a mean over the n rows. What is summed is p as rounded to the type of z.
    """
    n, vocabulary = z.shape
    loss, total = torch.empty(2, n, dtype=torch.float32, device=z.device)
    columns = min(SWEEP, triton.next_power_of_2(vocabulary))
    warps = max(4, columns // 512)
    _softmax[(n,)](z, y.contiguous(), loss, total, z.stride(0), vocabulary, COLUMNS=columns, num_warps=warps)
    return loss.mean(), z, total


def curved_product(p: Tensor, dx: Tensor, weight: Tensor, mean: Tensor, tile: tuple[int, ...] = ()) -> Tensor:
    """p (v - mean) of v = dx W^T: p [n, V], dx [C, n, D], weight [V, D] -> [C, n, V] in bf16; mean [C, n] in fp32.

    V and D are multiples of 8. `tile` is (rows, words, depth, warps, stages).
    """
    changes, n, features = dx.shape
    out = torch.empty(changes, n, len(weight), dtype=p.dtype, device=p.device)
    rows, words, depth, warps, stages = tile or (TOKENS, 128, 64, 4, 3)
    _curved_product[(triton.cdiv(n, rows) * triton.cdiv(len(weight), words) * changes,)](
        TensorDescriptor.from_tensor(dx, [1, rows, depth]), TensorDescriptor.from_tensor(weight, [words, depth]),
        p, mean, TensorDescriptor.from_tensor(out, [1, rows, words]), n, mean.stride(0), changes, len(weight),
        FEATURES=features, ROWS=rows, WORDS=words, DEPTH=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def quadratic_models(
    z: Tensor, y: Tensor, weight: Tensor, dxs: Sequence[Tensor], most: int, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the C models' values [C] and their derivatives [C, n, D], means over the n tokens; overwrites z [n, V].

    At most so many elements of [C, tokens, V] are held at once.
    """
    means, sums = map(compiled_once, (_means, _sums)) if compiled else (_means, _sums)
    loss, p, total = softmax(z, y)
    drawn = torch.mm(p, weight, out_dtype=torch.float32) / total[:, None]  # W^T p, [n, D]
    dx, mean = means(dxs, drawn)
    h, step = torch.empty_like(dx), max(TOKENS, most // (len(weight) * len(dxs)) // TOKENS * TOKENS)
    for first in range(0, len(p), step):
        rows = slice(first, first + step)
        u = curved_product(p[rows], dx[:, rows], weight, mean[:, rows])
        h[:, rows] = u @ weight
    values, derivatives = sums(dx, drawn, weight[y], h)
    return loss, loss + values, derivatives


def _means(dxs: Sequence[Tensor], drawn: Tensor) -> tuple[Tensor, Tensor]:
    """All dx as one [C, n, D], and p.v [C, n] in fp32."""
    dx = torch.stack(list(dxs))
    return dx, (dx.float() * drawn).sum(-1)


def _sums(dx: Tensor, drawn: Tensor, chosen: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dx.(g + h / 2) [C] in fp32 and g + h [C, n, D]; both over the n tokens."""
    g, curved = drawn - chosen.float(), h.float()
    value = (dx.float() * (g + 0.5 * curved)).sum((1, 2)) / h.shape[1]
    return value, ((g + curved) / h.shape[1]).to(h.dtype)
