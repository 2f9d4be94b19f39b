"""Curvature from sampled labels: the labels' distribution, K-FAC's factors and direction, Sophia-G's steps."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from cases import ListStream, classifier_case, linear_case, normal, run_config, tiny_decoder, tokens
from oracles import assert_all_close, assert_close, classifier_factors, dense_jacobian, kronecker_direction
from test_optimizers import _inner
from torch import Tensor, nn

from gnlib.blocks import hidden_matrices
from gnlib.config import ConfigError
from gnlib.kfac import KFAC, _Layers, preconditioned
from gnlib.losses import CrossEntropy, MeanSquaredError
from gnlib.methods import find_method
from gnlib.optimizers import Solver
from gnlib.outer_step import OuterStep
from gnlib.sampled import SampledLoss
from gnlib.sophia import SophiaG


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_classifier(parts: int = 1, seed: int = 0) -> tuple[SampledLoss, Tensor]:
    """The classifier case's batch of 9 in equal parts, and the labels that it draws."""
    case = classifier_case()
    theta = dict(case.model.named_parameters())
    sampled = SampledLoss(case.model, case.loss, theta, case.inputs.chunk(parts))
    return sampled, CrossEntropy().sample(case.model(case.inputs).detach(), seeded(seed))


def decoder_layers(seed: int = 0) -> tuple[KFAC, SampledLoss, list[str]]:
    """K-FAC for the decoder's hidden matrices and a batch of two sequences."""
    model = tiny_decoder()
    names = sorted(hidden_matrices(model))
    theta = dict(model.named_parameters())
    sampled = SampledLoss(model, CrossEntropy(), theta, tokens(2, 5, seed).chunk(2))
    return KFAC([theta[name] for name in names]), sampled, names


# ---------------------------------------------------------------- labels


def test_labels_are_drawn_with_the_models_probabilities() -> None:
    z = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(40_000, 4)
    found = CrossEntropy().sample(z, seeded()).bincount(minlength=4) / 40_000
    assert (found - z[0].softmax(-1)).abs().max() < 0.01  # four standard deviations


def test_values_of_a_regression_are_drawn_with_variance_one_around_the_outputs() -> None:
    z = torch.full((40_000, 1), 3.0)
    drawn = MeanSquaredError().sample(z, seeded()) - z
    assert abs(drawn.mean()) < 0.02 and abs(drawn.var() - 1) < 0.03


@pytest.mark.parametrize("loss", [CrossEntropy(), MeanSquaredError()])
def test_labels_have_the_shape_of_targets_and_depend_on_the_seed_alone(loss: CrossEntropy) -> None:
    z = normal((3, 4, 6), seeded(1))
    first, again, other = (loss.sample(z, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert math.isfinite(loss.value(z, first).item())


@pytest.mark.parametrize("loss", [CrossEntropy(), MeanSquaredError()])
def test_a_batch_cut_into_parts_draws_the_same_labels(loss: CrossEntropy | MeanSquaredError) -> None:
    """Also parts of odd sizes, longer and shorter than a vector of the processor."""
    z, generator = normal((97, 3), seeded()), seeded(4)
    parts = [loss.sample(part, generator) for part in z.split([1, 30, 2, 64])]
    assert torch.equal(torch.cat(parts), loss.sample(z, seeded(4)))


def test_the_gradient_is_that_of_the_loss_with_the_drawn_labels_however_the_batch_is_cut() -> None:
    sampled, labels = on_classifier()
    case = classifier_case()
    value = CrossEntropy().value(case.model(case.inputs), labels)
    expected = torch.autograd.grad(value, list(case.model.parameters()))
    for parts in (1, 3, 9):
        found, predictions = on_classifier(parts)[0].gradient(seed=0)
        assert predictions == 9
        assert_all_close(found, dict(zip(sampled.theta, expected, strict=True)), 1e-12)


def test_the_sampled_gradients_second_moment_is_the_gauss_newton_diagonal() -> None:
    """E[n g^ g^] = diag(J^T H J) for the mean over n predictions; 3000 draws, so to about 5 %."""
    case, (sampled, _) = classifier_case(), on_classifier()
    draws = [sampled.gradient(seed)[0] for seed in range(3000)]
    found = {name: 9 * torch.stack([draw[name].square() for draw in draws]).mean(0) for name in draws[0]}
    J = dense_jacobian(case.model, case.inputs, list(found))
    H = torch.autograd.functional.hessian(
        lambda z: CrossEntropy().value(z.view(9, 4), case.targets), case.model(case.inputs).detach().flatten()
    )
    expected = torch.einsum("oi,op,pi->i", J, H, J)
    assert_close(torch.cat([f.flatten() for f in found.values()]), expected, 0.05)


@pytest.mark.parametrize("shape", [(12,), (12, 1), (4, 3)])
def test_for_a_regression_it_is_the_gauss_newton_diagonal_whatever_the_outputs_shape(shape: tuple[int, ...]) -> None:
    """Of the squared error, whose n is the length of z."""
    layer = nn.Linear(2, math.prod(shape[1:]))
    model = nn.Sequential(layer, nn.Flatten(0)) if len(shape) == 1 else layer
    x = torch.randn(shape[0], 2, generator=seeded(1))
    sampled = SampledLoss(model, MeanSquaredError(), dict(model.named_parameters()), x.chunk(2))
    draws = [sampled.gradient(seed) for seed in range(3000)]
    names = list(draws[0][0])
    found = {name: torch.stack([n * draw[name].square() for draw, n in draws]).mean(0) for name in names}
    J = dense_jacobian(model, x, names)
    expected = J.square().sum(0) / len(model(x))
    assert_close(torch.cat([f.flatten() for f in found.values()]), expected, 0.05)


def test_inside_gauss_newton_curvature_is_that_at_the_anchor_and_for_a_baseline_at_its_own_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A linearised subproblem's Hessian is J^T H J at theta_t, wherever the inner solver has come to."""
    points: list[dict[str, Tensor]] = []

    def gradient(sampled: SampledLoss, seed: int) -> tuple[dict[str, Tensor], int]:
        points.append({name: theta.detach().clone() for name, theta in sampled.theta.items()})
        return {name: torch.ones_like(theta) for name, theta in sampled.theta.items()}, 1

    monkeypatch.setattr(SampledLoss, "gradient", gradient)
    for objective in ("gauss_newton", "loss"):
        points.clear()
        case = classifier_case()
        inner = {"optimizer": "sophia_g", "lr": 0.1, "steps": 2, "options": {"period": 1}}
        changes = {f"method.inner.{name}": value for name, value in inner.items()}
        config = run_config(**{"method.objective": objective, "outer_batch": 6}, **changes)
        outer = OuterStep(case.model, case.loss, config)
        anchor = {name: p.detach().clone() for name, p in case.model.named_parameters()}
        outer.step(ListStream(case.inputs, case.targets))
        first, second = points
        assert all(torch.equal(first[name], anchor[name]) for name in anchor)
        assert all(torch.equal(second[name], anchor[name]) for name in anchor) == (objective == "gauss_newton")


def test_the_sampled_gradient_of_what_the_outputs_do_not_depend_on_is_zero() -> None:
    sampled, _ = on_classifier()
    theta = dict(sampled.model.named_parameters()) | {"spare": torch.ones(2, dtype=torch.float64)}
    sampled.model.register_parameter("spare", nn.Parameter(theta["spare"]))
    gradient, _ = SampledLoss(sampled.model, CrossEntropy(), theta, sampled.batches).gradient(seed=0)
    assert not gradient["spare"].any() and gradient["0.weight"].any()


def test_a_loss_that_cannot_draw_labels_is_a_one_line_error() -> None:
    class Own:
        pass

    with pytest.raises(ConfigError, match="needs a loss that can draw labels; Own cannot"):
        SampledLoss(nn.Linear(2, 2), Own(), {}, [])  # type: ignore[arg-type]


# ---------------------------------------------------------------- Sophia-G


def test_sophia_g_follows_its_equations() -> None:
    """Estimates before steps 1 and 4 (period 3), m and h not corrected, every entry clipped at gamma h."""
    case = classifier_case()
    theta = {name: p.detach().clone().requires_grad_() for name, p in case.model.named_parameters()}
    options = {"gamma": 30.0, "period": 3}  # so large that some entries are clipped and some are not
    inner = _inner(optimizer="sophia_g", lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, options=options)
    solver = Solver(theta, set(), inner)
    expected = {name: p.detach().clone() for name, p in theta.items()}
    m, h = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(2))
    clipped, costs = [], []
    for step in range(5):
        gradient = {name: 0.3 * normal(p.shape, seeded(step + 50)) for name, p in theta.items()}
        if step % 3 == 0:
            drawn, _ = SampledLoss(case.model, case.loss, expected, [case.inputs]).gradient(seed=step)
            h = {name: 0.9 * h[name] + 0.1 * 9 * drawn[name] ** 2 for name in theta}
        m = {name: 0.8 * m[name] + 0.2 * gradient[name] for name in theta}
        ratio = {name: m[name] / (30.0 * h[name]).clamp(min=1e-15) for name in theta}
        clipped += [(r.abs() > 1).double().mean().item() for r in ratio.values()]
        expected = {name: (1 - 0.03) * expected[name] - 0.1 * ratio[name].clamp(-1, 1) for name in theta}
        costs.append(solver.observe(case.model, case.loss, case.inputs.chunk(3)))
        solver.step(gradient, 1.0)
    assert costs == [3.0, 0, 0, 3.0, 0] and 0.1 < sum(clipped) / len(clipped) < 0.9
    assert_all_close({name: p.detach() for name, p in theta.items()}, expected, 1e-10)


# ---------------------------------------------------------------- K-FAC


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ekfac", [False, True])
def test_factors_are_means_over_predictions_of_slow_loops(parts: int, ekfac: bool) -> None:
    sampled, labels = on_classifier(parts)
    names = ["0.weight", "2.weight"]
    model = sampled.model
    optimizer = KFAC([model.get_parameter(name) for name in names], ekfac=ekfac)
    assert optimizer.observe(sampled) == (6.0 if ekfac else 3.0)
    expected = classifier_factors(dict(model.named_parameters()), classifier_case().inputs, labels)
    for name, (pairs, A, S) in zip(names, expected, strict=True):
        state = optimizer.state[model.get_parameter(name)]
        assert_close(state["A"], A, 1e-10)
        assert_close(state["S"], S, 1e-10)
        P, Q = state["P"], state["Q"]
        if ekfac:
            c = sum((P.T @ g)[:, None] ** 2 * (Q.T @ a)[None, :] ** 2 for a, g in pairs) / len(pairs)
            assert_close(state["c"], c, 1e-10)
        else:
            whole = torch.kron(P, Q) @ state["c"].flatten().diag() @ torch.kron(P, Q).T
            assert_close(whole, torch.kron(S, A), 1e-10)


def test_in_the_decoder_inputs_and_output_gradients_make_up_the_sampled_gradient() -> None:
    """Sum over positions of g a^T = n times the gradient, for every matrix of the blocks."""
    _, sampled, names = decoder_layers()
    gradient, predictions = sampled.gradient(seed=0)
    products = _Layers(sampled, names, seed=0).mean(lambda name, a, g: {"product": g.mT @ a})
    assert predictions == 10 and len(names) == 12
    for name in names:
        assert_close(products[name]["product"], gradient[name], 1e-10)


def test_the_direction_is_that_of_the_dense_damped_kronecker_product() -> None:
    D, S, A = normal((3, 4), seeded()), normal((3, 3), seeded(1)), normal((4, 4), seeded(2))
    S, A = S @ S.T, A @ A.T
    (s, P), (r, Q) = torch.linalg.eigh(S), torch.linalg.eigh(A)
    found = preconditioned(D, {"P": P, "Q": Q, "c": s[:, None] * r}, damping=0.1)
    assert_close(found, kronecker_direction(D, S, A, 0.1), 1e-10)


def test_a_layer_without_curvature_and_gradient_does_not_move() -> None:
    curvature = {"P": torch.eye(3), "Q": torch.eye(4), "c": torch.zeros(3, 4)}
    assert torch.equal(preconditioned(torch.zeros(3, 4), curvature, 0.1), torch.zeros(3, 4))


def test_a_step_has_momentum_and_decoupled_decay_and_refreshes_every_period() -> None:
    case = classifier_case()
    theta = {name: p.detach().clone().requires_grad_() for name, p in case.model.named_parameters()}
    options = {"damping": 0.2, "decay": 0.7, "period": 2}
    inner = _inner(optimizer="kfac", lr=0.1, momentum=0.5, weight_decay=0.3, options=options)
    solver, name = Solver(theta, {"0.weight"}, inner), "0.weight"
    W, velocity, A, S = theta[name].detach().clone(), 0.0, None, None
    for step in range(4):
        if step % 2 == 0:
            z = torch.func.functional_call(case.model, {n: p.detach() for n, p in theta.items()}, (case.inputs,))
            labels = CrossEntropy().sample(z, seeded(step))
            _, a, s = classifier_factors({n: p.detach() for n, p in theta.items()}, case.inputs, labels)[0]
            A, S = (a, s) if A is None or S is None else (0.7 * A + 0.3 * a, 0.7 * S + 0.3 * s)
        gradient = {n: normal(p.shape, seeded(step + 50)) for n, p in theta.items()}
        velocity = 0.5 * velocity + kronecker_direction(gradient[name], S, A, 0.2)
        W = (1 - 0.03) * W - 0.1 * velocity
        solver.observe(case.model, case.loss, [case.inputs])
        solver.step(gradient, 1.0)
        assert_close(theta[name], W, 1e-8)


def test_kfac_is_exact_newton_on_one_linear_layer_with_squared_error() -> None:
    """There G = I (x) A: with S = I, no damping to speak of and lr 1 a step lands on the least-squares solution."""
    case = linear_case()
    W = case.model.get_parameter("weight")
    A = case.inputs.T @ case.inputs / len(case.inputs)
    r, Q = torch.linalg.eigh(A)
    gradient = (W @ case.inputs.T - case.targets.T) @ case.inputs / len(case.inputs)
    curvature = {"P": torch.eye(2, dtype=torch.float64), "Q": Q, "c": torch.ones(2, 1) * r}
    step = preconditioned(gradient.detach(), curvature, damping=1e-12)
    assert_close(W - step, torch.linalg.lstsq(case.inputs, case.targets).solution.T, 1e-8)


def test_before_a_batch_was_seen_a_step_is_along_the_gradient() -> None:
    p = nn.Parameter(normal((3, 4), seeded()))
    before, p.grad = p.detach().clone(), normal((3, 4), seeded(1))
    KFAC([p], lr=0.1).step()
    assert_close(p, before - 0.1 * p.grad, 1e-12)


def test_momentum_without_curvature_is_no_view_of_the_gradient() -> None:
    """Whose memory the next backward pass uses again."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer, p.grad = KFAC([p], lr=1.0, momentum=0.5), torch.ones(2, 2)
    optimizer.step()
    p.grad.zero_()
    optimizer.step()
    assert torch.equal(p, torch.full((2, 2), 1 - 1 - 0.5))


def test_observing_leaves_no_hook_on_the_model() -> None:
    kfac, sampled, _ = decoder_layers()
    kfac.observe(sampled)
    assert not any(module._forward_hooks for module in sampled.model.modules())


class Twice(nn.Module):
    """One linear layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(x).tanh()))


def test_a_layer_that_is_used_twice_is_seen_at_both_uses_and_one_that_is_not_used_is_named() -> None:
    torch.manual_seed(0)
    model, inputs = Twice().double(), normal((5, 4), seeded(3))
    sampled = SampledLoss(model, CrossEntropy(), dict(model.named_parameters()), [inputs[:3], inputs[3:]])
    kfac = KFAC([model.inner.weight])
    kfac.observe(sampled)
    between = model.inner(inputs).tanh().detach()
    assert_close(kfac.state[model.inner.weight]["A"], (inputs.T @ inputs + between.T @ between) / 5, 1e-10)
    model.spare = nn.Linear(4, 4, bias=False).double()
    sampled = SampledLoss(model, CrossEntropy(), dict(model.named_parameters()), [inputs])
    with pytest.raises(ConfigError, match=r"kfac; the forward pass does not use spare.weight$"):
        KFAC([model.spare.weight]).observe(sampled)


def test_a_layer_that_is_not_linear_is_a_one_line_error() -> None:
    model = nn.Embedding(7, 3)
    sampled = SampledLoss(model, CrossEntropy(), dict(model.named_parameters()), [tokens(2, 3)])
    with pytest.raises(ConfigError, match=r"kfac is for nn.Linear; weight is of Embedding"):
        KFAC(list(model.parameters())).observe(sampled)


# ---------------------------------------------------------------- in an outer step


@pytest.mark.parametrize("method", ["kfac", "sophia_g"])
def test_curvature_is_measured_in_full_precision_also_where_products_are_in_bf16(method: str) -> None:
    model = tiny_decoder().float()
    changes = {"compute.precision": "bf16", "method.inner.options": {"period": 1}, "compute.micro_batch": 4}
    step = OuterStep(model, CrossEntropy(), run_config(**find_method(method).changes, **changes))
    step.step(ListStream(tokens(8, 5, 1), tokens(8, 5, 2)))
    states = [value for o in step.solvers[0].optimizers for entry in o.state.values() for value in entry.values()]
    assert {value.dtype for value in states if isinstance(value, Tensor)} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["kfac", "sophia_g"])
def test_an_outer_step_counts_the_cost_of_observing_and_does_not_depend_on_the_micro_batch(method: str) -> None:
    """4 sequences: 3 forward passes each for the gradient, 3 more where the curvature is refreshed (steps 1 and 3)."""
    ends, costs = [], []
    for micro in (4, 1):
        changes = {"method.inner.options": {"period": 2}, "outer_batch": 4, "compute.micro_batch": micro}
        step = OuterStep(tiny_decoder(), CrossEntropy(), run_config(**find_method(method).changes, **changes))
        stream = ListStream(tokens(32, 5, 1), tokens(32, 5, 2))
        costs.append([step.step(stream).forward_passes for _ in range(3)])
        ends.append({name: p.detach().clone() for name, p in step.model.named_parameters()})
    assert costs == [[24.0, 12.0, 24.0]] * 2
    assert_all_close(ends[0], ends[1], 1e-10)


@pytest.mark.parametrize("wrong", [{"damping": 0.0}, {"decay": 1.0}, {"decay": -0.1}, {"period": 0}])
def test_impossible_settings_of_kfac_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be positive, decay .* in \[0, 1\), period .* at least 1"):
        KFAC([torch.nn.Parameter(torch.ones(2, 2))], **wrong)  # type: ignore[arg-type]


KFACS = {"weight_decay": 0.0, "momentum": 0.9, "damping": 0.1, "decay": 0.95, "period": 10, "ekfac": False}
SOPHIAS = {"betas": (0.965, 0.99), "weight_decay": 0.0, "gamma": 0.05, "period": 10}


@pytest.mark.parametrize(("kind", "run"), [(KFAC, KFACS), (SophiaG, SOPHIAS)])
def test_settings_that_no_record_names_have_the_values_that_were_run(kind: type, run: dict[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters
    assert {name: p.default for name, p in parameters.items() if name not in ("params", "lr")} == run
