"""Notebook 00's dense matrices and steps agree with the package and with the equations, and its figures draw."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracles import assert_close, dense_jacobian, flatten
from torch import Tensor

from gnlib import by_hand, plots_by_hand
from gnlib.blocks import partition
from gnlib.config import LineSearchConfig
from gnlib.objective import curvature_product


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def curve() -> by_hand.Problem:
    return by_hand.logistic_problem(seed=1, slope=1.0, threshold=-1.0)


def central_difference(problem: by_hand.Problem, index: int, step: float = 1e-6) -> Tensor:
    """d objective / d theta[index]."""
    shift = torch.zeros_like(problem.theta)
    shift[index] = step
    return (problem.objective(problem.theta + shift) - problem.objective(problem.theta - shift)) / (2 * step)


def test_the_curve_is_the_sigmoid_of_slope_times_distance_to_the_threshold(curve: by_hand.Problem) -> None:
    assert_close(curve.model(curve.inputs).softmax(-1)[:, 1], 1 / (1 + torch.exp(-1.0 * (curve.inputs + 1.0))))


@pytest.mark.parametrize("make", [by_hand.decoder_problem, lambda seed: by_hand.logistic_problem(seed, 1.0, -1.0)])
def test_the_flat_problem_is_the_model(make) -> None:
    problem = make(2)
    names = [name for name, _ in problem.model.named_parameters()]
    assert_close(problem.outputs(problem.theta), problem.model(problem.inputs).flatten())
    J = torch.func.jacrev(problem.outputs)(problem.theta)
    assert_close(J, dense_jacobian(problem.model, problem.inputs, names))
    assert_close(problem.gradient()[1], central_difference(problem, 1), 1e-6)


def test_dense_curvature_times_a_vector_is_the_matrix_free_product() -> None:
    problem = by_hand.decoder_problem(3)
    delta = torch.randn(problem.theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = curvature_product(problem.model, problem.loss, problem.named(delta), problem.inputs, problem.targets)
    assert_close(problem.gauss_newton() @ delta, flatten(product), 1e-12)


def test_an_outer_step_is_a_share_of_the_direction_and_leaves_the_problem_alone(curve: by_hand.Problem) -> None:
    before = curve.theta.clone()
    path = by_hand.outer_steps(curve, by_hand.gauss_newton_step, 3, LineSearchConfig())
    step = -torch.linalg.inv(curve.gauss_newton()) @ curve.gradient()
    assert_close(path.points[1], before + path.step_sizes[1] * step)
    assert torch.equal(curve.theta, before)
    assert path.losses == sorted(path.losses, reverse=True)


def test_newtons_step_is_stationary_for_the_second_order_expansion(curve: by_hand.Problem) -> None:
    assert_close(curve.hessian() @ by_hand.newton_step(curve), -curve.gradient())


def test_every_figure_draws(curve: by_hand.Problem) -> None:
    theta, step = curve.theta, by_hand.gauss_newton_step(curve)
    steps = {"gradient": -curve.gradient(), "Newton": by_hand.newton_step(curve), "Gauss-Newton": step}
    path = by_hand.outer_steps(curve, by_hand.gauss_newton_step, 1, LineSearchConfig())
    decoder = by_hand.decoder_problem(0)
    matrices = {"a": decoder.gauss_newton(), "b": torch.zeros(len(decoder.theta), len(decoder.theta))}
    line = torch.linspace(0, 1, 3)
    for figure in (
        plots_by_hand.curve_figure(curve, {"start": theta, "minimum": theta + step}),
        plots_by_hand.contour_figure(curve, steps, theta),
        plots_by_hand.direction_figure(line, {"Gauss-Newton": line, "true loss": line}, {1.0: 0.3, 0.0: 0.5}),
        plots_by_hand.loss_figure({"Gauss-Newton": path}, 0.0),
        plots_by_hand.matrix_figure(matrices, decoder, partition(decoder.model, "layerwise")),
        plots_by_hand.spectrum_figure({"Gauss-Newton": line, "Newton": -line}),
    ):
        figure.canvas.draw()


def test_layers_are_outlined_at_their_sizes_on_the_diagonal() -> None:
    problem = by_hand.decoder_problem(0)
    G, layers = problem.gauss_newton(), partition(problem.model, "layerwise")
    parameters = dict(problem.model.named_parameters())
    outlined = plots_by_hand.matrix_figure({"G": G}, problem, layers).axes[0].patches
    sizes = [sum(parameters[name].numel() for name in layer) for layer in layers]
    assert [patch.get_width() for patch in outlined] == sizes
    assert [patch.get_x() + 0.5 for patch in outlined] == [sum(sizes[:i]) for i in range(len(sizes))]
