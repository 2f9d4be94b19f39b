"""The subproblems' values, gradients and curvature against dense algebra and autograd, and the identities they obey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KINDS, Case, decoder_case, direction, linear_case, regression_case
from oracles import Subproblem, assert_all_close, assert_close, dense_jacobian, flatten, ridge_penalty, unflatten
from torch import Tensor, nn

from gnlib.blocks import partition
from gnlib.config import MethodConfig
from gnlib.losses import CrossEntropy, MeanSquaredError
from gnlib.model import Block, Decoder
from gnlib.objective import (
    GaussNewtonObjective,
    LinearisedObjective,
    ProxLinearObjective,
    TrueLoss,
    build_objective,
    curvature_product,
    forward_loss,
)

LINEARISED: dict[str, type[LinearisedObjective]] = {
    "gauss_newton": GaussNewtonObjective,
    "prox_linear": ProxLinearObjective,
}
RIDGES = (0.0, 0.7)


def _delta(case: Case, theta: dict[str, Tensor]) -> dict[str, Tensor]:
    anchor = case.anchor(list(theta))
    return {name: theta[name] - anchor[name] for name in theta}


def _points(case: Case, kind: str) -> list[dict[str, Tensor]]:
    return [case.point(block, seed=i) for i, block in enumerate(partition(case.model, kind))]  # type: ignore[arg-type]


# ---------------------------------------------------------------- a Decoder that is not the plain one


class Wrapped(nn.Module):
    """The same function, of which no rule is written by hand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


class Capped(Decoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2.0 * (super().forward(tokens) / 2.0).tanh()


class Doubled(Block):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2.0 * super().forward(*args, **kwargs)


def _tied(model: Decoder) -> None:
    model.head.weight = model.embedding.weight


def _hooked(model: Decoder) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: 2.0 * output)


def _with_a_bias(model: Decoder) -> None:
    model.head.bias = nn.Parameter(torch.ones(model.head.out_features, dtype=torch.float64))


def _own_forward(module: nn.Module) -> None:
    """As tools that wrap a model set it, on the instance."""
    real = module.forward
    module.forward = lambda *args, **kwargs: 2.0 * real(*args, **kwargs)


def _replaced(model: Decoder, name: str, kind: type[nn.Module], **settings: Any) -> None:
    layer = kind(6, **settings).double()
    with torch.no_grad():
        layer.weight.copy_(model.get_parameter(f"{name}.weight"))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


PLAIN_NORM = {"eps": 1e-6, "bias": False}
MODIFIED: dict[str, Callable[[Any], None]] = {
    "tied head": _tied,
    "its own forward": lambda model: setattr(model, "__class__", Capped),
    "a block of its own": lambda model: setattr(model.blocks[1], "__class__", Doubled),
    "a hook": _hooked,
    "a hook before": lambda model: model.blocks[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])),
    "a layer's hook": lambda model: model.head.register_forward_hook(lambda module, args, output: 2.0 * output),
    "a hook on the way back": lambda model: model.head.register_full_backward_hook(lambda _, u, _out: (2.0 * u[0],)),
    "a forward on the instance": _own_forward,
    "a layer's forward on the instance": lambda model: _own_forward(model.blocks[0].up),
    "another norm of queries": lambda model: _replaced(model, "blocks.0.query_norm", nn.RMSNorm, eps=1e-6),
    "another norm of a block": lambda model: _replaced(model, "blocks.1.norm1", nn.LayerNorm, **PLAIN_NORM),
    "another last norm": lambda model: _replaced(model, "final_norm", nn.LayerNorm, **PLAIN_NORM),
    "another eps": lambda model: setattr(model.blocks[0].norm2, "eps", 0.5),
    "a token without gradient": lambda model: setattr(model.embedding, "padding_idx", 3),
    "a bias": _with_a_bias,
    "a parameter beside the blocks": lambda model: model.register_parameter("spare", nn.Parameter(torch.ones(2))),
    "a layer beside the blocks": lambda model: model.add_module("spare", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("modified", MODIFIED)
@pytest.mark.parametrize("objective", LINEARISED)
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_decoder_that_somebody_changed_is_linearised_as_it_is(objective: str, modified: str) -> None:
    """The rules by hand are for the plain one: a tied head, say, has the gradients of both its uses."""
    case = decoder_case()
    MODIFIED[modified](case.model)
    point = case.point([name for name, _ in case.model.named_parameters()])
    here = (case.inputs, case.targets)
    (found,) = LINEARISED[objective](case.loss).evaluate(case.model, [point], *here)
    wrapped = Wrapped(case.model)
    (expected,) = LINEARISED[objective](case.loss).evaluate(
        wrapped, [{f"model.{name}": theta for name, theta in point.items()}], *here
    )
    assert_close(found.value, expected.value)
    assert_all_close({f"model.{name}": g for name, g in found.gradient.items()}, expected.gradient)
    assert_close(forward_loss(case.loss)(case.model, *here), case.loss.value(wrapped(case.inputs), case.targets))
    for kind in KINDS:
        assert {name for block in partition(case.model, kind) for name in block} == point.keys()


def test_the_gradient_of_a_parameter_that_the_loss_does_not_depend_on_is_zero() -> None:
    case = decoder_case()
    case.model.add_module("spare", nn.Linear(2, 2).double())
    point = case.point([name for name, _ in case.model.named_parameters()])
    (found,) = TrueLoss(case.loss).evaluate(case.model, [point], case.inputs, case.targets)
    assert not found.gradient["spare.weight"].any() and found.gradient["head.weight"].any()


# ---------------------------------------------------------------- against the oracles


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", LINEARISED)
def test_value_and_gradient_are_those_of_the_equation(case: Case, objective: str, kind: str, ridge: float) -> None:
    """Value from J, g and H; gradient from J^T H J and by autograd of that value."""
    points = _points(case, kind)
    found = LINEARISED[objective](case.loss, ridge).evaluate(case.model, points, case.inputs, case.targets)
    assert len(found) == len(points)
    for theta, evaluation in zip(points, found, strict=True):
        dense = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, list(theta), ridge)
        delta = flatten(_delta(case, theta))
        assert_close(evaluation.value, dense.value(objective, delta))
        assert_all_close(evaluation.gradient, unflatten(dense.gradient(objective, delta), theta))
        by_autograd = torch.func.grad(lambda d, dense=dense: dense.value(objective, d))(delta)
        assert_all_close(evaluation.gradient, unflatten(by_autograd, theta))
        assert_close(evaluation.loss, case.dense_loss.value(dense.z, case.targets))


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_product_is_the_dense_gauss_newton_matrix(case: Case, kind: str) -> None:
    for block in partition(case.model, kind):  # type: ignore[arg-type]
        delta = direction(case.anchor(block))
        dense = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, block, 0.0)
        found = curvature_product(case.model, case.loss, delta, case.inputs, case.targets)
        assert_all_close(found, unflatten(dense.curvature @ flatten(delta), delta))


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_loss_and_its_gradient_are_those_of_autograd(case: Case, kind: str) -> None:
    points = _points(case, kind)
    found = TrueLoss(case.loss).evaluate(case.model, points, case.inputs, case.targets)
    for theta, evaluation in zip(points, found, strict=True):

        def value(changed: dict[str, Tensor]) -> Tensor:
            z = torch.func.functional_call(case.model, changed, (case.inputs,))
            return case.dense_loss.value(z, case.targets)

        assert_close(evaluation.value, value(theta))
        assert_close(evaluation.loss, value(theta))
        leaves = {name: t.clone().requires_grad_() for name, t in theta.items()}
        expected = torch.autograd.grad(value(leaves), list(leaves.values()))
        assert_all_close(evaluation.gradient, dict(zip(theta, expected, strict=True)))


class _Smoothed(CrossEntropy):
    """A loss of one's own that inherits from ours: 0.9 of cross-entropy and 0.1 of a quadratic."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.9 * super().value(z, y) + 0.05 * z.square().sum() / y.numel()

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.9 * super().gradient(z, y) + 0.1 * z / y.numel()

    def hessian_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return 0.9 * super().hessian_product(z, y, v) + 0.1 * v / y.numel()


@pytest.mark.parametrize("objective", LINEARISED)
def test_a_loss_derived_from_cross_entropy_is_expanded_by_its_own_methods(objective: str) -> None:
    """The shared softmax is cross-entropy's alone; any other loss has its value, gradient and Hessian product."""
    z, y, v = direction({"z": torch.zeros(4, 5)})["z"].double(), torch.tensor([0, 4, 2, 2]), torch.rand(4, 5).double()
    loss = _Smoothed()
    _, value, u = LINEARISED[objective](loss).expand(z, y, v)

    def model(t: Tensor) -> Tensor:
        if objective == "prox_linear":
            return loss.value(z + t, y)
        return loss.value(z, y) + (loss.gradient(z, y) * t).sum() + 0.5 * (loss.hessian_product(z, y, t) * t).sum()

    assert_close(value, model(v))
    assert_close(u, torch.func.grad(model)(v))


# ---------------------------------------------------------------- identities


def test_the_ggn_is_the_hessian_of_the_loss_over_the_linearised_model(case: Case) -> None:
    """d2/d delta2 of L(z + J delta, y) at 0 = J^T H J."""
    names = [name for name, _ in case.model.named_parameters()]
    jacobian, z = dense_jacobian(case.model, case.inputs, names), case.model(case.inputs).detach()

    def over_linearised_model(delta: Tensor) -> Tensor:
        return case.loss.value(z + (jacobian @ delta).reshape(z.shape), case.targets)

    delta = direction(case.anchor())
    found = curvature_product(case.model, case.loss, delta, case.inputs, case.targets)
    vector = flatten(delta)
    zero = torch.zeros_like(vector)
    _, expected = torch.func.jvp(torch.func.grad(over_linearised_model), (zero,), (vector,))
    assert_close(flatten(found), expected)
    if len(vector) < 100:
        assert_close(flatten(found), torch.func.hessian(over_linearised_model)(zero) @ vector)


def _curvature_matrix(case: Case, names: list[str]) -> Tensor:
    like = case.anchor(names)
    size = sum(p.numel() for p in like.values())
    columns = [
        flatten(curvature_product(case.model, case.loss, unflatten(e, like), case.inputs, case.targets))
        for e in torch.eye(size, dtype=torch.float64)
    ]
    return torch.stack(columns)


def test_the_curvature_is_symmetric_and_positive_semi_definite(case: Case) -> None:
    names = ["blocks.1.query.weight"] if case.name == "decoder" else [n for n, _ in case.model.named_parameters()]
    curvature = _curvature_matrix(case, names)
    assert_close(curvature, curvature.T, 1e-13)
    eigenvalues = torch.linalg.eigvalsh(curvature)
    assert eigenvalues.max() > 1e-4
    assert eigenvalues.min() > -1e-14 * eigenvalues.max() * len(eigenvalues)


def test_the_curvature_of_the_whole_decoder_is_symmetric_and_non_negative() -> None:
    case = decoder_case()
    u, v = direction(case.anchor(), seed=1), direction(case.anchor(), seed=2)
    gu = flatten(curvature_product(case.model, case.loss, u, case.inputs, case.targets))
    gv = flatten(curvature_product(case.model, case.loss, v, case.inputs, case.targets))
    assert_close(flatten(u) @ gv, flatten(v) @ gu)
    assert flatten(u) @ gu > 0 and flatten(v) @ gv > 0


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("objective", LINEARISED)
def test_a_subproblem_touches_the_loss_at_the_anchor(case: Case, objective: str, ridge: float) -> None:
    """Value and gradient at delta = 0 are those of the true loss, ridge or not."""
    here = [case.anchor()]
    found = LINEARISED[objective](case.loss, ridge).evaluate(case.model, here, case.inputs, case.targets)[0]
    true = TrueLoss(case.loss).evaluate(case.model, here, case.inputs, case.targets)[0]
    assert_close(found.value, true.value)
    assert_close(found.loss, true.value)
    assert_all_close(found.gradient, true.gradient)


def test_gauss_newton_gradient_is_that_of_the_loss_plus_the_curvature_product(case: Case) -> None:
    """J^T (g + H J delta) = grad L + G delta."""
    theta = case.point(list(case.anchor()))
    found = GaussNewtonObjective(case.loss).evaluate(case.model, [theta], case.inputs, case.targets)[0]
    true = TrueLoss(case.loss).evaluate(case.model, [case.anchor()], case.inputs, case.targets)[0]
    product = curvature_product(case.model, case.loss, _delta(case, theta), case.inputs, case.targets)
    assert_all_close(found.gradient, {name: true.gradient[name] + product[name] for name in theta})


@pytest.mark.parametrize("ridge", RIDGES)
def test_prox_linear_equals_gauss_newton_for_squared_error(ridge: float) -> None:
    """A quadratic loss has no higher-order terms to keep."""
    case = regression_case()
    theta = case.point(list(case.anchor()))
    found = ProxLinearObjective(case.loss, ridge).evaluate(case.model, [theta], case.inputs, case.targets)[0]
    expected = GaussNewtonObjective(case.loss, ridge).evaluate(case.model, [theta], case.inputs, case.targets)[0]
    assert_close(found.value, expected.value)
    assert_all_close(found.gradient, expected.gradient)


def test_prox_linear_differs_from_gauss_newton_for_cross_entropy() -> None:
    """Its third-order terms are there: at a distance the gradients part."""
    case = decoder_case()
    theta = case.point(list(case.anchor()), scale=0.5)
    found = ProxLinearObjective(case.loss).evaluate(case.model, [theta], case.inputs, case.targets)[0]
    other = GaussNewtonObjective(case.loss).evaluate(case.model, [theta], case.inputs, case.targets)[0]
    assert (flatten(found.gradient) - flatten(other.gradient)).norm() > 0.1 * flatten(other.gradient).norm()


def test_all_three_objectives_agree_for_a_linear_model_with_squared_error() -> None:
    case = linear_case()
    theta = case.point(["weight"], scale=1.0)
    true = TrueLoss(case.loss).evaluate(case.model, [theta], case.inputs, case.targets)[0]
    for objective in LINEARISED.values():
        found = objective(case.loss).evaluate(case.model, [theta], case.inputs, case.targets)[0]
        assert_close(found.value, true.value)
        assert_all_close(found.gradient, true.gradient)


@pytest.mark.parametrize("objective", [*LINEARISED, "loss"])
def test_blocks_evaluated_together_equal_blocks_evaluated_alone(case: Case, objective: str) -> None:
    built = build_objective(MethodConfig(objective=objective), case.loss)  # type: ignore[arg-type]
    points = _points(case, "layerwise")
    together = built.evaluate(case.model, points, case.inputs, case.targets)
    for theta, found in zip(points, together, strict=True):
        alone = built.evaluate(case.model, [theta], case.inputs, case.targets)[0]
        assert_close(found.value, alone.value)
        assert_all_close(found.gradient, alone.gradient)


def test_the_value_decreases_against_the_gradient(case: Case) -> None:
    """The sign, by the value itself: f(theta - h grad) - f(theta) = -h |grad|^2 + O(h^2)."""
    for objective in LINEARISED.values():
        theta = case.point(list(case.anchor()))
        built = objective(case.loss, ridge=0.3)
        here = built.evaluate(case.model, [theta], case.inputs, case.targets)[0]
        h = 1e-6
        moved = {name: theta[name] - h * g for name, g in here.gradient.items()}
        there = built.evaluate(case.model, [moved], case.inputs, case.targets)[0]
        assert_close((here.value - there.value) / h, flatten(here.gradient).square().sum(), 1e-3)


# ---------------------------------------------------------------- ridge


class _Shared(nn.Module):
    """Autograd gives both biases one gradient in the same memory, and the scale one of stride 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = (nn.Parameter(torch.full((3,), i + 1.0).double()) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first + self.second + self.scale.sum()


def test_the_ridge_is_added_once_where_gradients_share_memory() -> None:
    model, ridge = _Shared(), 0.7
    x, y = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = {name: p.detach() + 0.1 * (index + 1) for index, (name, p) in enumerate(model.named_parameters())}
    plain, ridged = (
        GaussNewtonObjective(MeanSquaredError(), r).evaluate(model, [theta], x, y)[0].gradient for r in (0.0, ridge)
    )
    for index, name in enumerate(theta):
        expected = torch.full((3,), 2 * ridge / 3 * 0.1 * (index + 1), dtype=torch.float64)
        assert_close(ridged[name] - plain[name], expected)


@pytest.mark.parametrize("objective", LINEARISED)
def test_the_ridge_adds_lambda_times_the_mean_square_of_each_tensor(case: Case, objective: str) -> None:
    theta, ridge = case.point(list(case.anchor())), 0.7
    delta = _delta(case, theta)
    evaluations = [
        LINEARISED[objective](case.loss, r).evaluate(case.model, [theta], case.inputs, case.targets)[0]
        for r in (ridge, 0.0)
    ]
    assert_close(evaluations[0].value - evaluations[1].value, ridge_penalty(delta, ridge))
    added = {name: evaluations[0].gradient[name] - evaluations[1].gradient[name] for name in theta}
    assert_all_close(added, {name: 2 * ridge / d.numel() * d for name, d in delta.items()})


@pytest.mark.parametrize("objective", LINEARISED)
def test_the_ridge_moves_the_minimiser_to_its_closed_form(objective: str) -> None:
    """delta* = -(G + 2 lambda / numel)^-1 grad: there the gradient vanishes, and the step is shorter than without."""
    case, ridge = linear_case(), 2.0
    dense = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, ["weight"], ridge)
    plain = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, ["weight"], 0.0)
    step = dense.minimiser()
    assert step.norm() < 0.9 * plain.minimiser().norm()
    theta = {"weight": case.anchor()["weight"] + step.reshape(2, 3)}
    built = LINEARISED[objective](case.loss, ridge)
    at_minimiser = built.evaluate(case.model, [theta], case.inputs, case.targets)[0]
    at_anchor = built.evaluate(case.model, [case.anchor()], case.inputs, case.targets)[0]
    assert flatten(at_minimiser.gradient).norm() < 1e-12 * flatten(at_anchor.gradient).norm()
    assert at_minimiser.value < at_anchor.value


def test_one_newton_step_on_the_objective_is_the_least_squares_solution() -> None:
    """A linear model: W* = (sum x x^T)^-1 sum x y^T, reached by -G^-1 grad with G from the curvature product."""
    case = linear_case()
    curvature = _curvature_matrix(case, ["weight"])
    anchor = case.anchor()
    gradient = GaussNewtonObjective(case.loss).evaluate(case.model, [anchor], case.inputs, case.targets)[0].gradient
    step = -torch.linalg.solve(curvature, flatten(gradient)).reshape(2, 3)
    solution = torch.linalg.lstsq(case.inputs, case.targets).solution.T
    assert_close(anchor["weight"] + step, solution)


# ---------------------------------------------------------------- cost and construction


def test_one_evaluation_of_the_decoder_costs_five_forwards_linearised_and_three_plain() -> None:
    case = decoder_case()
    here = [case.anchor()]
    for objective in LINEARISED.values():
        found = objective(case.loss).evaluate(case.model, here, case.inputs, case.targets)[0]
        assert found.forward_units == pytest.approx(5.0, rel=1e-12)
    assert TrueLoss(case.loss).evaluate(case.model, here, case.inputs, case.targets)[0].forward_units == 3.0


def test_layerwise_shares_one_primal_pass() -> None:
    case = decoder_case()
    points = _points(case, "layerwise")
    together = GaussNewtonObjective(case.loss).evaluate(case.model, points, case.inputs, case.targets)
    alone = [GaussNewtonObjective(case.loss).evaluate(case.model, [p], case.inputs, case.targets)[0] for p in points]
    total = sum(e.forward_units for e in together)
    assert total == pytest.approx(sum(e.forward_units for e in alone) - (len(points) - 1), rel=1e-12)
    assert total < 5.0 * len(points)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [("loss", TrueLoss), ("gauss_newton", GaussNewtonObjective), ("prox_linear", ProxLinearObjective)],
)
def test_a_method_names_its_objective(objective: str, kind: type) -> None:
    case = regression_case()
    ridge = 0.0 if objective == "loss" else 0.25
    built = build_objective(MethodConfig(objective=objective, ridge=ridge), case.loss)  # type: ignore[arg-type]
    assert type(built) is kind
    assert getattr(built, "ridge", 0.0) == ridge


def test_evaluation_leaves_the_model_at_the_anchor(case: Case) -> None:
    before = case.anchor()
    for objective in (*LINEARISED, "loss"):
        built = build_objective(MethodConfig(objective=objective), case.loss)  # type: ignore[arg-type]
        built.evaluate(case.model, [case.point(list(before))], case.inputs, case.targets)
    for name, p in case.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
