"""Jacobian products: layer rules against torch.func.jvp, the fast linearisation against the reference and dense J."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import KINDS, LENGTH, VOCABULARY, Case, direction, normal, tiny_decoder, tokens
from oracles import assert_all_close, assert_close, dense_jacobian, flatten
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gnlib import tangents
from gnlib.blocks import partition
from gnlib.flops import tangent_flops
from gnlib.linearise import DecoderLinearisation, Linearisation, linearise
from gnlib.losses import CrossEntropy
from gnlib.model import NORM_EPS, Decoder
from gnlib.objective import GaussNewtonObjective

PARAMETERS = [name for name, _ in tiny_decoder().named_parameters()]
SHAPES = [(2, LENGTH), (1, LENGTH), (3, LENGTH - 1), (1, 1)]  # sequences, tokens


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return normal(shape, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- layer rules


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, NORM_EPS)


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, eps=NORM_EPS)


RULES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor | None], tuple[int, ...]]] = {
    "linear": (F.linear, tangents.linear, (4, 7)),
    "rms_norm": (_rms_norm, tangents.rms_norm, (7,)),
    "layer_norm": (_layer_norm, tangents.layer_norm, (7,)),
}


@pytest.mark.parametrize("moved", ["both", "input", "weight"])
@pytest.mark.parametrize("rule", RULES)
def test_a_layer_rule_is_the_forward_derivative_of_its_layer(rule: str, moved: str) -> None:
    layer, tangent, weight_shape = RULES[rule]
    x, weight = 0.5 + _normal(2, 3, 7, seed=0), 1 + 0.5 * _normal(*weight_shape, seed=1)
    dx = _normal(2, 3, 7, seed=2) if moved != "weight" else None
    dweight = _normal(*weight_shape, seed=3) if moved != "input" else None
    zeros = (torch.zeros_like(x) if dx is None else dx, torch.zeros_like(weight) if dweight is None else dweight)
    expected = torch.func.jvp(layer, (x, weight), zeros)[1]
    found = tangent(x, weight, dx, dweight)
    assert found is not None
    assert_close(found, expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_rule_of_zero_tangents_is_zero(rule: str) -> None:
    _, tangent, weight_shape = RULES[rule]
    assert tangent(_normal(2, 3, 7), _normal(*weight_shape), None, None) is None


def test_a_norm_rule_includes_epsilon() -> None:
    """Inputs so small that r is eps^(-1/2): a rule without eps would be wrong by orders of magnitude."""
    x, weight, dx = 1e-3 * _normal(2, 7, seed=0), _normal(7, seed=1), _normal(2, 7, seed=2)
    for rule in ("rms_norm", "layer_norm"):
        layer, tangent, _ = RULES[rule]
        found = tangent(x, weight, dx, None)
        assert found is not None
        assert_close(found, torch.func.jvp(lambda t, layer=layer: layer(t, weight), (x,), (dx,))[1])


def test_the_gelu_rule_is_the_forward_derivative_of_gelu() -> None:
    x, dx = 2 * _normal(3, 5, seed=0), _normal(3, 5, seed=1)
    found = tangents.gelu(x, dx)
    assert found is not None
    assert_close(found, torch.func.jvp(F.gelu, (x,), (dx,))[1])
    assert tangents.gelu(x, None) is None


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    visible = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("moved", ["qkv", "q", "k", "v"])
def test_the_attention_rule_is_the_forward_derivative_of_attention(moved: str, length: int) -> None:
    heads = tuple(_normal(2, 3, length, 4, seed=seed) for seed in range(3))
    dheads = tuple(_normal(2, 3, length, 4, seed=9 + i) * (name in moved) for i, name in enumerate("qkv"))
    found = tangents.attention(heads, dheads, _attention(*heads))  # type: ignore[arg-type]
    expected = torch.func.jvp(_attention, heads, dheads)[1]
    if length == 1 and moved in "qk":  # one token attends to itself whatever its score
        assert expected.norm() == 0 and found.norm() < 1e-15
    else:
        assert_close(found, expected)


def test_a_block_below_every_change_has_no_tangent() -> None:
    here = DecoderLinearisation(tiny_decoder(), tokens(2, LENGTH))
    assert tangents.block(here.model.blocks[0], here.rotation, here.tapes[0], None, {}) is None  # type: ignore[arg-type]


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_linearisation_equals_the_reference_for_every_block(kind: str, shape: tuple[int, int]) -> None:
    model = tiny_decoder()
    for block in partition(model, kind):  # type: ignore[arg-type]
        _compare(model, tokens(*shape, seed=3), block, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_linearisation_in_float32_equals_the_float64_reference(kind: str) -> None:
    double, single = tiny_decoder(), tiny_decoder().float()
    inputs = tokens(3, LENGTH, seed=3)
    reference, fast = Linearisation(double, inputs), DecoderLinearisation(single, inputs)
    cotangent = _normal(*reference.outputs.shape, seed=8)
    assert_close(fast.outputs, reference.outputs, 1e-5)
    for block in partition(double, kind):  # type: ignore[arg-type]
        delta = direction({name: p for name, p in double.named_parameters() if name in block})
        found = fast.tangent({name: d.float() for name, d in delta.items()})
        assert found.dtype == torch.float32
        assert_close(found, reference.tangent(delta), 1e-5)
        assert_all_close(fast.pullback(cotangent.float(), block), reference.pullback(cotangent, block), 1e-5)


def _compare(model: Decoder, inputs: Tensor, names: list[str], tolerance: float) -> None:
    reference, fast = Linearisation(model, inputs), DecoderLinearisation(model, inputs)
    assert_close(fast.outputs, reference.outputs, tolerance)
    delta = direction({name: p.detach() for name, p in model.named_parameters() if name in names})
    expected = reference.tangent(delta)
    if expected.norm() < 1e-14:  # the query and key of a single token
        assert inputs.shape[1] == 1 and fast.tangent(delta).norm() < 1e-14
    else:
        assert_close(fast.tangent(delta), expected, tolerance)
    cotangent = _normal(*fast.outputs.shape, seed=8)
    found, expected_pullback = fast.pullback(cotangent, names), reference.pullback(cotangent, names)
    if flatten(expected_pullback).norm() < 1e-14:
        assert inputs.shape[1] == 1 and flatten(found).norm() < 1e-14
    else:
        assert_all_close(found, expected_pullback, tolerance)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_fast_linearisation_of_one_parameter_is_its_dense_jacobian(name: str) -> None:
    model, inputs = tiny_decoder(), tokens(2, LENGTH, seed=3)
    jacobian = dense_jacobian(model, inputs, [name])
    fast = DecoderLinearisation(model, inputs)
    delta = direction({name: model.get_parameter(name).detach()})
    assert_close(fast.tangent(delta).reshape(-1), jacobian @ flatten(delta))
    cotangent = _normal(*fast.outputs.shape, seed=8)
    assert_close(flatten(fast.pullback(cotangent, [name])), jacobian.T @ cotangent.reshape(-1))


def test_tangent_and_pullback_are_the_dense_jacobian_and_its_transpose(case: Case) -> None:
    names = [name for name, _ in case.model.named_parameters()]
    jacobian = dense_jacobian(case.model, case.inputs, names)
    here = linearise(case.model, case.inputs)
    delta, cotangent = direction(case.anchor()), _normal(*here.outputs.shape, seed=8)
    assert_close(here.tangent(delta).reshape(-1), jacobian @ flatten(delta))
    assert_close(flatten(here.pullback(cotangent, names)), jacobian.T @ cotangent.reshape(-1))


def test_pullback_is_the_adjoint_of_tangent(case: Case) -> None:
    """<u, J delta> = <J^T u, delta>."""
    here = linearise(case.model, case.inputs)
    delta, u = direction(case.anchor()), _normal(*here.outputs.shape, seed=8)
    left = (u * here.tangent(delta)).sum()
    assert_close(flatten(here.pullback(u, list(delta))) @ flatten(delta), left)


def test_the_tangent_is_the_limit_of_finite_differences(case: Case) -> None:
    """(f(theta + h delta) - f(theta - h delta)) / 2h -> J delta; error O(h^2) = 1e-8."""
    delta, anchor, h = direction(case.anchor()), case.anchor(), 1e-4

    def outputs(step: float) -> Tensor:
        moved = {name: anchor[name] + step * d for name, d in delta.items()}
        return torch.func.functional_call(case.model, moved, (case.inputs,))

    here = linearise(case.model, case.inputs)
    assert_close(here.tangent(delta), (outputs(h) - outputs(-h)) / (2 * h), 1e-5)


def test_the_tangent_of_no_change_is_zero() -> None:
    here = DecoderLinearisation(tiny_decoder(), tokens(2, LENGTH))
    assert torch.equal(here.tangent({}), torch.zeros_like(here.outputs))


def test_pullback_may_be_called_again() -> None:
    here = DecoderLinearisation(tiny_decoder(), tokens(2, LENGTH))
    u = _normal(*here.outputs.shape)
    first, again = (flatten(here.pullback(u, PARAMETERS)) for _ in range(2))
    assert torch.equal(first, again)


def test_linearisation_leaves_the_parameters_and_their_gradients_alone(case: Case) -> None:
    before = case.anchor()
    here = linearise(case.model, case.inputs)
    here.pullback(here.tangent(direction(before)), list(before))
    for name, p in case.model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])


def test_a_sequence_longer_than_the_model_is_an_error_not_a_wrong_result() -> None:
    with pytest.raises(RuntimeError):
        DecoderLinearisation(tiny_decoder(), tokens(2, LENGTH + 1))


def test_only_the_decoder_takes_the_fast_path() -> None:
    assert type(linearise(tiny_decoder(), tokens(1, 2))) is DecoderLinearisation
    assert type(linearise(nn.Linear(2, 2), torch.ones(1, 2))) is Linearisation


# ---------------------------------------------------------------- cost


class _Products(TorchDispatchMode):
    """Counts matrix products; attention's are inside its kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_a_pullback_computes_no_weight_gradient_above_the_layers_that_are_asked_for() -> None:
    """Query, key and value are one product: four a block for the activations, four for the weights of one asked for,
    the lowest of which needs no product for the cotangent of its input."""
    model = Decoder(VOCABULARY, 8, 16, 4, 2, LENGTH).double()
    here = DecoderLinearisation(model, tokens(2, LENGTH))
    expected = {"embedding": 4 * 4, "block 0": 4 * 4 + 3, "block 2": 4 * 2 + 3, "block 3": 4 + 3, "final norm": 0}
    layers = model.layers()
    asked = dict(zip(expected, [layers[0], layers[1], layers[3], layers[4], ["final_norm.weight"]], strict=True))
    for name, names in asked.items():
        with _Products() as products:
            here.feature_pullback(_normal(2 * LENGTH, 8), names)
        assert products.count == expected[name], name


def test_the_last_pullback_frees_the_tape_and_earlier_ones_keep_it() -> None:
    here = DecoderLinearisation(tiny_decoder(), tokens(2, LENGTH))
    u, names = _normal(2 * LENGTH, here.model.final_norm.weight.numel()), PARAMETERS[:-1]
    first = here.feature_pullback(u, names, keep=True)
    assert all(tape is not None for tape in here.tapes)
    last = here.feature_pullback(u, names, keep=False)
    assert not any(here.tapes) and not any(here.attentions)
    assert all(torch.equal(first[name], last[name]) for name in names)


def test_nothing_is_kept_for_the_pullback_beside_the_tape() -> None:
    """But attention's row sums: no autograd graph holds a second copy of an activation."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        here = DecoderLinearisation(Decoder(VOCABULARY, 32, 64, 2, 2, LENGTH), tokens(2, LENGTH))
    kept = {t.untyped_storage().data_ptr() for tape in here.tapes if tape is not None for t in tape}
    beside = [t for t in saved if t.untyped_storage().data_ptr() not in kept]
    assert all(t.numel() <= 2 * LENGTH * 2 for t in beside), [t.shape for t in beside]


def test_tangent_and_pullback_of_the_whole_decoder_cost_four_forwards() -> None:
    here = DecoderLinearisation(tiny_decoder(), tokens(1, LENGTH))
    assert here.forward_units(PARAMETERS) == pytest.approx(4.0, rel=1e-12)


def test_the_layers_cost_more_together_than_the_whole_and_less_than_as_many_wholes() -> None:
    here = DecoderLinearisation(tiny_decoder(), tokens(1, LENGTH))
    layers = here.model.layers()
    costs = [here.forward_units(layer) for layer in layers]
    assert 4.0 < sum(costs) + 1.0 < 5.0 * len(layers)
    assert costs[1:] == sorted(costs[1:], reverse=True), "a change nearer to the output costs less"


def test_the_head_costs_its_own_products_alone() -> None:
    """x dW in the tangent and its transpose in the pullback: twice the head's share of a forward."""
    here = DecoderLinearisation(tiny_decoder(), tokens(1, LENGTH))
    flops = here.model.layer_flops()
    assert here.forward_units(["head.weight"]) == pytest.approx(2 * flops[-1] / sum(flops), rel=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "parameter"])
def test_the_cost_of_a_block_is_that_of_the_products_with_weights_that_pytorch_counts(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Attention, whose products here are dense, is left out on both sides."""
    monkeypatch.setattr(Decoder, "attention_flops", lambda self: 0.0)
    model, inputs, targets = tiny_decoder(), tokens(2, LENGTH), tokens(2, LENGTH)
    blocks = [[name] for name in PARAMETERS] if kind == "parameter" else partition(model, kind)  # type: ignore[arg-type]
    for names in blocks:
        here = DecoderLinearisation(model, inputs)
        delta = direction({name: dict(model.named_parameters())[name] for name in names})
        with FlopCounterMode(display=False) as counter:
            here.derivatives([delta], targets, GaussNewtonObjective(CrossEntropy()).expand)
        counted = counter.get_flop_counts()["Global"]
        done = sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))
        primal = len(inputs) * model.layer_flops()[-1]  # z = x W^T
        units = here.forward_units(names) * sum(model.layer_flops())
        assert len(inputs) * units == pytest.approx(done - primal, rel=1e-12), names


@pytest.mark.parametrize("changed", ["blocks.1.query.weight", "blocks.1.key_norm.weight", "blocks.0.down.weight"])
def test_attention_that_moves_costs_four_forwards_and_other_attention_nothing(
    monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Four products for two in the tangent, as in the pullback; above each of these changes there is one attention."""
    here = DecoderLinearisation(tiny_decoder(), tokens(1, LENGTH))
    total, attention = sum(here.model.layer_flops()), here.model.attention_flops()
    units = here.forward_units([changed]) * total
    monkeypatch.setattr(Decoder, "attention_flops", lambda self: 0.0)
    assert units - here.forward_units([changed]) * sum(here.model.layer_flops()) == pytest.approx(4 * attention)


def test_beyond_ten_blocks_a_change_still_costs_one_block_more_the_lower_it_is() -> None:
    """`blocks.1` is the beginning of `blocks.10`."""
    model = Decoder(VOCABULARY, 8, 16, 12, 2, LENGTH)
    costs = [tangent_flops(model, layer) for layer in model.layers()[1:13]]
    steps = [below - above for below, above in pairwise(costs)]
    assert min(steps) == max(steps) > 0
