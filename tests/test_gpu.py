"""What only a GPU can show: the kernels, the compiled objectives and the precisions against float64 on the CPU.

    pytest -m gpu tests          on a machine with one; elsewhere each of these skips itself
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib import head, pullbacks
from gnlib.config import ComputeConfig, LineSearchConfig
from gnlib.line_search import line_search, move
from gnlib.losses import CrossEntropy
from gnlib.model import NORM_EPS, Decoder, merge, rope_table, rotate
from gnlib.objective import GaussNewtonObjective, LinearisedObjective, ProxLinearObjective, forward_loss
from gnlib.precision import matmul_precision
from gnlib.profiles import run_config
from gnlib.tangents import attention, dense_attention, layer_norm
from gnlib.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOUNDS = {"fp32": 2e-5, "tf32": 4e-3, "bf16": 3e-2}  # relative, of whole gradients
SEEDS = range(4)  # of weights and order of the data
SHAPES = [(2, 3, 256, 64), (1, 2, 200, 48), (3, 1, 1, 16), (1, 4, 129, 32)]  # sequences, heads, length, features


@pytest.fixture(autouse=True)
def _fresh_compilations() -> None:
    """torch.compile gives up on a function after eight kinds of arguments, which all these tests together have."""
    torch._dynamo.reset()


def kernels() -> Any:
    from gnlib import kernels  # needs Triton

    return kernels


def query_key_kernels() -> Any:
    from gnlib import query_key_kernels  # needs Triton

    return query_key_kernels


def _distance(found: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_flash_tangent_is_the_dense_rule(precision: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    q, k, v, dq, dk, dv = torch.randn(6, *shape, generator=generator).to("cuda", dtype)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with matmul_precision(ComputeConfig(precision="tf32"), torch.device("cuda")):
        found = attention((q, k, v), (dq, dk, dv), y)
    expected = dense_attention((q.double(), k.double(), v.double()), (dq.double(), dk.double(), dv.double()))
    assert _distance(found, expected) < BOUNDS[precision]


NORMED = [*SHAPES, (2, 8, 300, 64), (2, 16, 70, 48)]


def _inputs(precision: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors [B, S, D] on the GPU and RoPE's table."""
    generator = torch.Generator().manual_seed(0)
    sequences, heads, length, features = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, dx = torch.randn(2, sequences, length, heads * features, generator=generator).to("cuda", dtype) + 0.3
    return x, dx, rope_table(length + 3, features).float().cuda()[:, :length]


def _cotangents(precision: str, shape: tuple[int, ...]) -> list[Tensor]:
    """Of q, k and v, [B, H, S, K] in memory as [B, S, H, K], [B, H, K, S] and [B, H, S, K]."""
    generator = torch.Generator().manual_seed(1)
    sequences, heads, length, features = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    orders = [(sequences, length, heads, features), (sequences, heads, features, length), shape]
    q, k, v = (torch.randn(order, generator=generator).to("cuda", dtype) for order in orders)
    return [q.transpose(1, 2), k.mT, v]


@pytest.mark.parametrize("shape", NORMED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_normed_and_rotated_queries_are_the_plain_rule(precision: str, shape: tuple[int, ...]) -> None:
    x, _, rotation = _inputs(precision, shape)
    weight = 1 + torch.rand(x.shape[-1], device="cuda")
    found = query_key_kernels().normed_and_rotated(x, weight, rotation, shape[1])
    normed = F.layer_norm(x.double(), weight.shape, weight.double(), eps=NORM_EPS)
    expected = rotate(normed.unflatten(-1, (shape[1], -1)).transpose(1, 2), rotation.double())
    assert found.dtype == x.dtype and _distance(found, expected) < BOUNDS[precision]


@pytest.mark.parametrize("shape", NORMED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_tangent_of_normed_and_rotated_queries_is_the_plain_rule(precision: str, shape: tuple[int, ...]) -> None:
    x, dx, rotation = _inputs(precision, shape)
    weight, dweight = 1 + torch.rand(2, x.shape[-1], device="cuda")
    wide = torch.cat([x, dx], -1)  # a part of a wider tensor, as the projections' one product returns it
    for moved in (None, dweight):
        found = query_key_kernels().tangent(x, weight, wide[..., x.shape[-1] :], moved, rotation, shape[1])
        rule = layer_norm(x.double(), weight.double(), dx.double(), None if moved is None else moved.double())
        assert rule is not None
        expected = rotate(rule.unflatten(-1, (shape[1], -1)).transpose(1, 2), rotation.double())
        assert found.dtype == x.dtype and _distance(found, expected) < BOUNDS[precision]


@pytest.mark.parametrize("shape", NORMED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_pullback_of_queries_keys_and_values_is_the_plain_rule(precision: str, shape: tuple[int, ...]) -> None:
    query, key, rotation = _inputs(precision, shape)
    cotangents = _cotangents(precision, shape)
    weights = 1 + torch.rand(2, query.shape[-1], device="cuda")
    expected, sums = [], []
    for x, weight, u in zip((query, key), weights, cotangents[:2], strict=True):
        unrotated = merge(pullbacks.unrotate(u.double(), rotation.double()))
        ux, gradient = pullbacks.layer_norm(x.double(), weight.double(), unrotated)
        expected.append(ux)
        sums.append(gradient)
    for scaled in (True, False):
        found, gradients = query_key_kernels().pullback((query, key), weights, cotangents, rotation, scaled)
        assert _distance(found, torch.cat([*expected, merge(cotangents[2]).double()], -1)) < BOUNDS[precision]
        assert len(gradients) == 2 * scaled
        for gradient, whole in zip(gradients, sums, strict=False):
            assert _distance(gradient, whole) < BOUNDS[precision]


def _gradients(
    kind: type[LinearisedObjective], width: int, compute: ComputeConfig, device: str, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Of every layer of a small decoder on odd shapes: 130 tokens, a vocabulary that no chunk divides."""
    model = Decoder(301, width, 96, 2, 2, 130)
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(301, (2, 3, 130), generator=generator).to(device)
    noise = {n: 0.1 * torch.randn(p.shape, generator=generator) * p.std() for n, p in model.named_parameters()}
    model = model.to(device, dtype)
    blocks = [[name for name, _ in model.named_parameters()], *model.layers()]
    anchor = {name: p.detach() for name, p in model.named_parameters()}
    points = [{name: anchor[name] + noise[name].to(anchor[name]) for name in block} for block in blocks]
    with matmul_precision(compute, torch.device(device)):
        found = kind(CrossEntropy(), compiled=compute.compile).evaluate(model, points, inputs, targets)
    return [evaluation.gradient for evaluation in found]


def _logits(dtype: torch.dtype, vocabulary: int = 20_001) -> tuple[Tensor, Tensor, Tensor]:
    """z, v and targets."""
    generator = torch.Generator().manual_seed(0)
    z, v = 5 * torch.randn(2, 7, vocabulary, generator=generator)
    y = torch.randint(vocabulary, (7,), generator=generator)
    return z.to("cuda", dtype), v.to("cuda", dtype) / 5, y.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_over_a_large_vocabulary_is_that_of_float64(dtype: torch.dtype) -> None:
    """Logits are given, so that rounding is that of the sums alone."""
    z, _, y = _logits(dtype)
    found = kernels().cross_entropy(z, y).item()
    assert found == pytest.approx(CrossEntropy().value(z.double(), y).item(), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("vocabulary", [301, 20_001, 40_001])  # one sweep; in registers; several sweeps
def test_the_expansion_over_a_vocabulary_is_that_of_float64(
    vocabulary: int, prox: bool, dtype: torch.dtype
) -> None:
    z, v, y = _logits(dtype, vocabulary)
    objective = (ProxLinearObjective if prox else GaussNewtonObjective)(CrossEntropy())
    expected = objective.expand(z.double(), y, v.double())
    loss, value, u = kernels().cross_entropy_expansion(z, y, v, prox)
    assert loss.item() == pytest.approx(expected[0].item(), rel=2e-6)
    assert value.item() == pytest.approx(expected[1].item(), rel=2e-6)
    assert _distance(u, expected[2]) < (4e-3 if dtype == torch.bfloat16 else 2e-6)  # u is rounded to v's dtype


def test_logits_and_targets_may_lie_in_memory_in_any_order() -> None:
    z, v, y = _logits(torch.float32, 301)
    objective = GaussNewtonObjective(CrossEntropy())
    expected = objective.expand(z.double(), y, v.double())
    strided = torch.stack([y, y.flip(0)], -1)[:, 0]
    same_change = v[:1].expand(7, 301)
    for left, right, targets in ((z, v, strided), (z.mT.contiguous().mT, v.mT.contiguous().mT, y)):
        assert kernels().cross_entropy(left, targets).item() == pytest.approx(expected[0].item(), rel=2e-6)
        _, value, u = kernels().cross_entropy_expansion(left, targets, right.clone(), False)
        assert value.item() == pytest.approx(expected[1].item(), rel=2e-6) and _distance(u, expected[2]) < 2e-6
    _, _, u = kernels().cross_entropy_expansion(z, y, same_change, False)
    assert _distance(u, objective.expand(z.double(), y, same_change.double())[2]) < 2e-6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", BOUNDS)
def test_the_line_searchs_loss_agrees_with_float64(
    precision: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 100 * 301)  # several chunks
    model = Decoder(301, 64, 96, 2, 2, 130)
    model.initialise(0)
    inputs, targets = torch.randint(301, (2, 3, 130), generator=torch.Generator().manual_seed(1))
    expected = forward_loss(CrossEntropy())(model.double(), inputs, targets)
    compute = ComputeConfig(precision=precision, compile=compiled)
    with matmul_precision(compute, torch.device("cuda")):
        found = forward_loss(CrossEntropy(), compiled)(model.to("cuda", torch.float32), inputs.cuda(), targets.cuda())
    assert found.item() == pytest.approx(expected.item(), rel=BOUNDS[precision] / 10)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_bf16_every_candidate_of_a_line_search_is_judged_by_its_own_weights(compiled: bool) -> None:
    model = Decoder(301, 64, 96, 2, 2, 130)
    model.initialise(0)
    model.cuda()
    inputs, targets = torch.randint(301, (2, 3, 130), generator=torch.Generator().manual_seed(1)).cuda()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    target = {name: 0.5 * p for name, p in anchor.items()}
    loss, bf16 = forward_loss(CrossEntropy(), compiled), ComputeConfig(precision="bf16", compile=compiled)
    with matmul_precision(bf16, torch.device("cuda")):
        found = line_search(model, loss, anchor, target, [(inputs, targets)], LineSearchConfig())
    for candidate, searched in found.losses.items():
        move(model, anchor, target, candidate)
        with matmul_precision(bf16, torch.device("cuda")):
            assert loss(model, inputs, targets).item() == searched


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [GaussNewtonObjective, ProxLinearObjective])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("width", [64, 96])  # heads of 32 and 48 features
def test_gradients_of_every_layer_agree_with_float64(
    width: int, precision: str, kind: type[LinearisedObjective], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _gradients(kind, width, ComputeConfig(precision="fp64"), "cpu", torch.float64)
    monkeypatch.setattr("gnlib.head.CHUNK_ELEMENTS", 40_000)  # several chunks of unequal length
    compute = ComputeConfig(precision=precision, compile=compiled)  # type: ignore[arg-type]
    found = _gradients(kind, width, compute, "cuda", torch.float32)
    for block, reference in zip(found, expected, strict=True):
        flat = torch.cat([block[name].flatten().float() for name in reference])
        assert _distance(flat, torch.cat([g.flatten() for g in reference.values()])) < BOUNDS[precision]


def _curves(precision: str, device: torch.device, **changes: Any) -> Tensor:
    """Validation losses [seeds, 7] at the start and after each of six outer steps, with heads of 32 features."""
    size = {"model.width": 64, "model.mlp_width": 128, "model.heads": 2, "start.chinchilla_fraction": 0.0}
    plain = {**size, "outer_steps": 6, "compute.precision": precision, "compute.compile": False, **changes}
    found = []
    for seed in SEEDS:
        config = run_config("tiny", "gauss_newton", seed, {**plain, "model.seed": seed}, use_tuned=False)
        rows = train(config, device, checkpoint_seconds=1e9).rows
        found.append([row["val_loss"] for row in rows])
    return torch.tensor(found, dtype=torch.float64)


def _apart(found: Tensor, reference: Tensor) -> float:
    """Largest distance over the steps of two mean curves, in standard errors of the reference's mean over the seeds."""
    error = reference.std(0) / len(reference) ** 0.5
    return float(((found.mean(0) - reference.mean(0)).abs() / error).max())


def test_training_in_low_precision_follows_fp32_within_the_spread_of_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By half a standard error at every step; a learning rate a quarter smaller, for comparison, parts by more."""
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path))
    device = torch.device("cuda")
    reference = _curves("fp32", device)
    assert (reference[:, -1] < reference[:, 0] - 1).all(), "it learns"
    for precision in ("tf32", "bf16"):
        assert _apart(_curves(precision, device), reference) < 0.5, precision
    lr = run_config("tiny", "gauss_newton", use_tuned=False).method.inner.lr
    assert _apart(_curves("fp32", device, **{"method.inner.lr": 0.75 * lr}), reference) > 1.0
