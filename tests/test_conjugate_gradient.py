"""Conjugate gradients against dense solves, and as the solver of an outer step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from cases import KINDS, Case, ListStream, classifier_case, linear_case, normal, run_config
from oracles import Subproblem, assert_all_close, assert_close, flatten, unflatten
from torch import Tensor

from gnlib.blocks import partition
from gnlib.config import ConfigError, RunConfig
from gnlib.conjugate_gradient import OPTIONS, HessianFree, adjustment, conjugate_gradient, curved_sequences
from gnlib.outer_step import OuterStep


def positive_definite(size: int, condition: float = 100.0) -> Tensor:
    """Eigenvalues from 1 to `condition`."""
    basis = torch.linalg.qr(normal((size, size), torch.Generator().manual_seed(1))).Q
    return basis @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ basis.T


def vector(size: int, seed: int = 2) -> Tensor:
    return normal((size,), torch.Generator().manual_seed(seed))


def config(sequences: int, kind: str = "full", **changes: object) -> RunConfig:
    solver = {
        "method.objective": "gauss_newton", "method.blocks": kind, "method.inner.optimizer": "conjugate_gradient",
        "outer_batch": sequences, "compute.micro_batch": sequences, "method.inner.steps": 1,
    }  # fmt: skip
    return run_config(**(solver | changes))


def hessian_free(case: Case, kind: str = "full", steps: int = 200, **options: float) -> HessianFree:
    method = config(len(case.inputs), kind).method
    inner = method.inner.model_copy(update={"steps": steps, "options": {"tolerance": 0.0, "fraction": 1.0} | options})
    return HessianFree(case.model, case.loss, method.model_copy(update={"inner": inner}), partition(case.model, kind))


# ---------------------------------------------------------------- the iterations


def test_conjugate_gradients_solve_a_system_from_any_start() -> None:
    matrix, gradient = positive_definite(12), vector(12)
    expected = -torch.linalg.solve(matrix, gradient)
    for start in (torch.zeros_like(gradient), 10 * vector(12, seed=3)):
        found = conjugate_gradient(lambda d: matrix @ d, gradient, start, most=60, tolerance=0.0)
        assert_close(found.direction, expected, 1e-9)
        assert found.value == pytest.approx((gradient @ expected / 2).item(), rel=1e-9)


def test_each_iteration_minimises_over_the_krylov_space_so_far() -> None:
    matrix, gradient = positive_definite(12), vector(12)
    space = gradient[:, None]
    for iterations in (1, 2, 3, 4):
        found = conjugate_gradient(lambda d: matrix @ d, gradient, torch.zeros_like(gradient), iterations, 0.0)
        basis = torch.linalg.qr(space).Q
        best = -basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ gradient)
        assert found.iterations == iterations
        assert_close(found.direction, best, 1e-9)
        space = torch.cat([space, (matrix @ space[:, -1])[:, None]], 1)


def test_iterations_end_where_the_last_ten_lowered_the_model_by_less_than_their_share() -> None:
    """Against every iteration by itself, q from its definition."""
    matrix, gradient, tolerance = positive_definite(60), vector(60), 5e-4

    def at(most: int, bound: float) -> Tensor:
        return conjugate_gradient(lambda d: matrix @ d, gradient, torch.zeros(60).double(), most, bound).direction

    values = [(gradient @ d + d @ matrix @ d / 2).item() for d in (at(most, 0.0) for most in range(60))]
    small = [i for i in range(11, 60) if (values[i] - values[i - 10]) / values[i] < 10 * tolerance]
    stopped = conjugate_gradient(lambda d: matrix @ d, gradient, torch.zeros(60).double(), 60, tolerance)
    assert 11 < stopped.iterations == small[0] < 59


def test_beyond_a_hundred_iterations_the_window_is_a_tenth_of_them() -> None:
    """A spectrum on which the last ten iterations and the last tenth of all decide at different places."""
    size, tolerance = 300, 1e-3
    diagonal, gradient = torch.logspace(0, 5, size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)

    def at(most: int, bound: float) -> Tensor:
        return conjugate_gradient(lambda d: diagonal * d, gradient, torch.zeros_like(gradient), most, bound).direction

    values = [(gradient @ d + d @ (diagonal * d) / 2).item() for d in (at(most, 0.0) for most in range(220))]

    def first(window: Callable[[int], int]) -> int:
        pairs = [(i, window(i)) for i in range(11, 220)]
        return next(i for i, k in pairs if i > k and (values[i] - values[i - k]) / values[i] < k * tolerance)

    found = conjugate_gradient(lambda d: diagonal * d, gradient, torch.zeros_like(gradient), 220, tolerance)
    assert found.iterations == first(lambda i: max(10, i // 10)) > 110 and found.iterations != first(lambda i: 10)


def test_from_the_solution_the_first_iteration_that_may_be_the_last_is_the_eleventh() -> None:
    matrix, gradient = positive_definite(60), vector(60)
    start = -torch.linalg.solve(matrix, gradient) + 1e-6 * vector(60, seed=3)
    assert conjugate_gradient(lambda d: matrix @ d, gradient, start, 60, 5e-4).iterations == 11


def test_at_the_minimum_nothing_moves() -> None:
    matrix, gradient = positive_definite(5), torch.zeros(5, dtype=torch.float64)
    found = conjugate_gradient(lambda d: matrix @ d, gradient, gradient, 10, 0.0)
    assert found.iterations == 0 and not found.direction.any() and found.value == 0


# ---------------------------------------------------------------- the subproblem


@pytest.mark.parametrize("kind", KINDS)
def test_the_direction_solves_each_blocks_damped_gauss_newton_system(case: Case, kind: str) -> None:
    damping = 0.3
    solver, anchor, solution = hessian_free(case, kind, damping=damping), case.anchor(), case.anchor()
    loss, _ = solver.solve(solution, [(case.inputs, case.targets)])
    for block in partition(case.model, kind):
        dense = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, block, ridge=0.0)
        damped = dense.curvature + damping * torch.eye(len(dense.curvature), dtype=torch.float64)
        expected = unflatten(-torch.linalg.solve(damped, dense.jacobian.T @ dense.g), dense.anchor)
        assert_all_close({n: solution[n] - anchor[n] for n in block}, expected, 1e-6)
    assert loss == pytest.approx(case.loss.value(case.model(case.inputs), case.targets).item())


def test_the_damping_follows_the_reduction_ratio() -> None:
    assert adjustment(-0.2, -1.0) == 1.5 and adjustment(0.5, -1.0) == 1.5
    assert adjustment(-0.5, -1.0) == 1.0
    assert adjustment(-0.8, -1.0) == adjustment(-2.0, -1.0) == pytest.approx(2 / 3)
    assert adjustment(math.nan, -1.0) == adjustment(math.inf, -1.0) == adjustment(-0.5, 0.0) == 1.5


def test_the_damping_changes_at_a_quarter_and_at_three_quarters() -> None:
    assert [adjustment(-r, -1.0) for r in (0.24, 0.26, 0.74, 0.76)] == [1.5, 1.0, 1.0, pytest.approx(2 / 3)]


def test_what_no_record_names_has_the_values_that_were_run() -> None:
    assert OPTIONS == {"damping": 0.1, "tolerance": 5e-4, "fraction": 0.125}


def test_a_quadratic_loss_is_predicted_exactly_so_that_the_damping_falls() -> None:
    case = linear_case()
    solver = hessian_free(case, damping=1e-6)
    solver.solve(case.anchor(), [(case.inputs, case.targets)])
    assert solver.dampings == [pytest.approx(1e-6 * 2 / 3)]


def test_curvature_may_come_from_a_share_of_the_batch_and_the_gradient_never_does(case: Case) -> None:
    """Of two micro-batches that differ, the first has the curvature."""
    moved = case.inputs.roll(1, 0) if case.inputs.is_floating_point() else (case.inputs + 1) % 7
    batches = [(case.inputs, case.targets), (moved, case.targets)]
    solver, solution = hessian_free(case, damping=0.3, fraction=0.5), case.anchor()
    solver.solve(solution, batches)
    names = list(case.anchor())
    first, second = (Subproblem(case.model, case.dense_loss, *batch, names, ridge=0.0) for batch in batches)
    gradient = (first.jacobian.T @ first.g + second.jacobian.T @ second.g) / 2
    damped = first.curvature + 0.3 * torch.eye(len(gradient), dtype=torch.float64)
    found = flatten(solution) - flatten(case.anchor())
    assert_close(found, -torch.linalg.solve(damped, gradient), 1e-6)


def test_the_share_of_the_batch_is_the_nearest_whole_number_of_sequences_and_at_least_one() -> None:
    assert [curved_sequences(fraction, 8) for fraction in (0.01, 0.125, 0.4, 0.45, 1.0)] == [1, 1, 3, 4, 8]


@pytest.mark.parametrize("fraction", [0.5, 0.75, 1.0])
def test_the_direction_does_not_depend_on_how_the_batch_is_cut(fraction: float) -> None:
    """A record is found by a name that leaves out the micro-batch."""
    case, found = classifier_case(), []
    inputs, targets = case.inputs[:4].repeat(2, 1), case.targets[:4].repeat(2)
    inputs = inputs + torch.arange(8, dtype=inputs.dtype)[:, None] / 8  # eight that differ
    for size in (1, 2, 4, 8):
        solver, solution = hessian_free(case, damping=0.3, fraction=fraction), case.anchor()
        solver.solve(solution, list(zip(inputs.split(size), targets.split(size), strict=True)))
        found.append(flatten(solution))
    for other in found[1:]:
        assert_close(other, found[0], 1e-7)


def test_with_several_micro_batches_gradient_curvature_and_loss_are_means_over_them(case: Case) -> None:
    moved = case.inputs.roll(1, 0) if case.inputs.is_floating_point() else (case.inputs + 1) % 7
    batches = [(case.inputs, case.targets), (moved, case.targets)]
    solver, solution = hessian_free(case, damping=0.3), case.anchor()
    loss, _ = solver.solve(solution, batches)
    both = [case.loss.value(case.model(inputs), targets).item() for inputs, targets in batches]
    assert loss == pytest.approx(sum(both) / 2)
    names = list(case.anchor())
    first, second = (Subproblem(case.model, case.dense_loss, *batch, names, ridge=0.0) for batch in batches)
    gradient = (first.jacobian.T @ first.g + second.jacobian.T @ second.g) / 2
    damped = (first.curvature + second.curvature) / 2 + 0.3 * torch.eye(len(gradient), dtype=torch.float64)
    assert_close(flatten(solution) - flatten(case.anchor()), -torch.linalg.solve(damped, gradient), 1e-6)


def test_each_block_keeps_its_own_damping_and_direction_and_its_change_is_that_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: list[float] = []

    def seen(change: float, predicted: float) -> float:
        changes.append(change)
        return 1.0 + len(changes)

    monkeypatch.setattr("gnlib.conjugate_gradient.adjustment", seen)
    case = classifier_case()
    batches = [(case.inputs, case.targets), (case.inputs.roll(1, 0), case.targets)]
    solver, anchor, solution = hessian_free(case, "layerwise", damping=0.3), case.anchor(), case.anchor()
    loss, _ = solver.solve(solution, batches)
    blocks = partition(case.model, "layerwise")
    assert len(blocks) > 1 and solver.dampings == pytest.approx([0.3 * (2 + i) for i in range(len(blocks))])
    for block, direction, change in zip(blocks, solver.directions, changes, strict=True):
        assert_close(direction, flatten({n: solution[n] - anchor[n] for n in block}), 1e-12)
        point = {n: solution[n] for n in block}
        losses = [case.loss.value(torch.func.functional_call(case.model, point, (x,)), y).item() for x, y in batches]
        assert change == pytest.approx(sum(losses) / 2 - loss, rel=1e-9)


# ---------------------------------------------------------------- the outer step


def test_least_squares_takes_one_outer_step() -> None:
    case = linear_case()
    options = {"damping": 1e-9, "tolerance": 0.0, "fraction": 1.0}
    step = OuterStep(case.model, case.loss, config(12, **{"method.inner.options": options, "method.inner.steps": 12}))
    step.step(ListStream(case.inputs, case.targets))
    expected = torch.linalg.lstsq(case.inputs, case.targets).solution.T
    assert_close(case.model.weight.detach(), expected, 1e-6)  # type: ignore[arg-type]


def test_the_outer_batch_is_read_once_and_its_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient 3 and the new loss 1 on 12; products of 6 (torch.func's 5 and the primal) on the first 6 of them."""
    case = linear_case()
    changes = {"method.inner.options": {"fraction": 0.5, "tolerance": 0.0}, "method.inner.steps": 2}
    stream = ListStream(case.inputs, case.targets)
    info = OuterStep(case.model, case.loss, config(12, **changes, **{"compute.micro_batch": 6})).step(stream)
    assert stream.taken == [(6, "train"), (6, "train")]
    assert info.forward_passes == 12 * (3 + 1) + 6 * 6 * (1 + 2)  # one product for the residual at the start


@pytest.mark.parametrize("warm_start", [True, False])
def test_warm_start_begins_at_the_last_direction(case: Case, warm_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []
    real = conjugate_gradient

    def spy(product, gradient, start, most, tolerance):  # type: ignore[no-untyped-def]
        starts.append(start.clone())
        return real(product, gradient, start, most, tolerance)

    monkeypatch.setattr("gnlib.conjugate_gradient.conjugate_gradient", spy)
    anchor = flatten(case.anchor())
    step = OuterStep(case.model, case.loss, config(len(case.inputs), **{"method.inner.warm_start": warm_start}))
    stream = ListStream(case.inputs, case.targets)
    step.step(stream)
    moved = flatten({name: p.detach() for name, p in case.model.named_parameters()}) - anchor
    step.step(stream)
    assert not starts[0].any() and moved.any()
    assert torch.allclose(starts[1], moved if warm_start else torch.zeros_like(moved), atol=1e-12)


def test_a_saved_and_loaded_state_continues_bit_identically(case: Case) -> None:
    size = len(case.inputs)
    stream = ListStream(case.inputs, case.targets)
    step = OuterStep(case.model, case.loss, config(size, **{"method.line_search": {}}))
    step.step(stream)
    file = io.BytesIO()
    torch.save({"step": step.state_dict(), "model": case.model.state_dict()}, file)
    step.step(stream)
    expected = {name: p.detach().clone() for name, p in case.model.named_parameters()}

    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    case.model.load_state_dict(state["model"])
    again = OuterStep(case.model, case.loss, config(size, **{"method.line_search": {}}))
    again.load_state_dict(state["step"])
    again.step(stream)
    assert all(torch.equal(p, expected[name]) for name, p in case.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.objective": "prox_linear"}, "needs objective gauss_newton"),
        ({"method.objective": "loss"}, "needs objective gauss_newton"),
        ({"method.ridge": 0.1}, "without a ridge"),
        ({"method.inner.options": {"dampening": 0.1}}, "takes no 'dampening'; allowed: damping, tolerance, fraction"),
        ({"method.inner.options": {"damping": 0.0}}, "damping > 0"),
        ({"method.inner.options": {"fraction": 1.5}}, "fraction <= 1"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, object], message: str) -> None:
    case = linear_case()
    with pytest.raises(ConfigError, match=message):
        OuterStep(case.model, case.loss, config(12, **changes))
