"""The methods beyond the paper's six: each against a reference, resumed bit for bit, and its state counted."""

from __future__ import annotations

import io

import pytest
import torch
from cases import ListStream, linear_case, normal, run_config, tiny_decoder, tokens
from oracles import assert_all_close, assert_close, schedule_free_adamw, shampoo
from test_optimizers import FACTORS, MATRICES, _gradients, _inner, _run, _start
from torch import Tensor

from gnlib import profiles
from gnlib.blocks import hidden_matrices
from gnlib.config import ConfigError, RunConfig
from gnlib.losses import CrossEntropy
from gnlib.methods import ALL_METHODS, METHODS, MORE_METHODS, find_method
from gnlib.optimizers import Solver, registry
from gnlib.outer_step import OuterStep

LRS = [0.1 * factor for factor in FACTORS]


# ---------------------------------------------------------------- equations


def test_adam_couples_its_weight_decay_with_the_gradient() -> None:
    """Adam on g + 0.3 theta: AdamW without decay, one step at a time (arXiv 1412.6980)."""
    start = _start()
    found = _run(_inner(optimizer="adam", lr=0.1, betas=(0.8, 0.95), weight_decay=0.3), start, _gradients(start))
    theta, m, v = start, {}, {}
    for t, (gradient, lr) in enumerate(zip(_gradients(start), LRS, strict=True), 1):
        g = {name: gradient[name] + 0.3 * theta[name] for name in start}
        m = {name: 0.8 * m.get(name, 0.0) + 0.2 * g[name] for name in start}
        v = {name: 0.95 * v.get(name, 0.0) + 0.05 * g[name] ** 2 for name in start}
        unbiased = {name: (m[name] / (1 - 0.8**t), v[name] / (1 - 0.95**t)) for name in start}
        theta = {name: theta[name] - lr * a / (b.sqrt() + 1e-8) for name, (a, b) in unbiased.items()}
    assert_all_close(found, theta)


@pytest.mark.parametrize("name", sorted(MATRICES))
def test_shampoo_follows_its_algorithm_on_matrices(name: str) -> None:
    start = _start([name])
    inner = _inner(optimizer="shampoo", lr=0.1, weight_decay=0.3)
    found = _run(inner, start, _gradients(start))[name]
    expected = shampoo(start[name], [g[name] for g in _gradients(start)], LRS, 0.3)
    assert_close(found - start[name], expected - start[name], 1e-8)


def test_schedule_free_evaluates_its_average_and_takes_gradients_beside_it() -> None:
    """On 1/2 |theta - 1|^2, whose gradient at the training point must match at every step."""
    start = {"matrix": normal((4, 3), torch.Generator().manual_seed(0))}
    theta = {"matrix": start["matrix"].clone().requires_grad_()}
    inner = _inner(optimizer="schedule_free", lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    solver, found = Solver(theta, set(), inner), []
    for factor in FACTORS:
        solver.train()
        solver.step({"matrix": theta["matrix"].detach() - 1}, factor)
        solver.eval()
        found.append(theta["matrix"].detach().clone())
    expected = schedule_free_adamw(start["matrix"], lambda y: y - 1, LRS, (0.8, 0.95), 0.3)
    for x, average in zip(found, expected, strict=True):
        assert_close(x - start["matrix"], average - start["matrix"], 1e-10)


@pytest.mark.parametrize("schedule", ["global_cosine", "constant_inner_cosine"])
def test_schedule_free_refuses_a_schedule(schedule: str) -> None:
    with pytest.raises(ConfigError, match=r"method.inner.schedule: schedule_free needs 'constant'"):
        Solver(_start(["vector"]), set(), _inner(optimizer="schedule_free", schedule=schedule))


# ---------------------------------------------------------------- in an outer step


def steps_of(method: str, **changes: object) -> tuple[OuterStep, ListStream]:
    """A method on a tiny decoder in float64, with its own settings."""
    config = run_config(**{"outer_batch": 4, "outer_steps": 6, **find_method(method).changes, **changes})
    return OuterStep(tiny_decoder(), CrossEntropy(), config), ListStream(tokens(32, 5, 1), tokens(32, 5, 2))


def parameters(method: OuterStep) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.model.named_parameters()}


def test_outer_steps_of_schedule_free_leave_the_model_at_its_average_and_take_gradients_beside_it() -> None:
    """On a least-squares problem with the same batch at every step, against the equations."""
    case = linear_case()
    start = case.model.get_parameter("weight").detach().clone()
    settings = {"method.inner.lr": 0.1, "method.inner.betas": (0.8, 0.95), "outer_batch": 12, "outer_steps": 5}
    method = OuterStep(case.model, case.loss, run_config(**find_method("schedule_free").changes, **settings))
    stream, averages = ListStream(case.inputs, case.targets), []
    for _ in range(5):
        method.step(stream)
        averages.append(case.model.get_parameter("weight").detach().clone())

    def gradient(W: Tensor) -> Tensor:
        return (W @ case.inputs.T - case.targets.T) @ case.inputs / len(case.inputs)

    expected = schedule_free_adamw(start, gradient, [0.1] * 5, (0.8, 0.95), 0.0)
    for found, average in zip(averages, expected, strict=True):
        assert_close(found - start, average - start, 1e-10)


@pytest.mark.parametrize("name", MORE_METHODS)
def test_a_method_resumed_from_its_saved_state_continues_bit_for_bit(name: str) -> None:
    whole, stream = steps_of(name)
    for _ in range(3):
        whole.step(stream)
    file = io.BytesIO()
    torch.save({"method": whole.state_dict(), "model": whole.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = steps_of(name)
    resumed.load_state_dict(saved["method"])
    resumed.model.load_state_dict(saved["model"])
    other.position = stream.position
    for _ in range(3):
        assert whole.step(stream).train_loss == resumed.step(other).train_loss
    assert all(torch.equal(p, parameters(resumed)[n]) for n, p in parameters(whole).items())


@pytest.mark.parametrize("name", MORE_METHODS)
def test_a_method_brings_the_loss_of_its_batch_down(name: str) -> None:
    lr = {"shampoo": 0.3, "sgd": 0.3}.get(name, 0.03)
    method, stream = steps_of(name, **{"outer_batch": 32, "method.inner.lr": lr})
    losses = [method.step(stream).train_loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1


# ---------------------------------------------------------------- state


def state_bytes(name: str) -> tuple[int, int, int]:
    """Bytes of a method's state after two steps, and of the decoder's hidden matrices and other parameters."""
    method, stream = steps_of(name)
    for _ in range(2):
        method.step(stream)
    hidden = hidden_matrices(method.model)
    sizes = {n: p.numel() * p.element_size() for n, p in method.model.named_parameters()}
    matrices = sum(size for n, size in sizes.items() if n in hidden)
    state = sum(sum(solver.state_bytes().values()) for solver in method.solvers)
    return state, matrices, sum(sizes.values()) - matrices


def test_the_stateless_variant_has_no_state_at_all() -> None:
    assert state_bytes("sinkgd_stateless")[0] == 0


@pytest.mark.parametrize("name", ["swan", "sinkgd"])
def test_matrices_have_no_state_and_the_rest_has_adams(name: str) -> None:
    """Two moments a parameter and a step counter of four bytes a tensor."""
    state, _, others = state_bytes(name)
    tensors = sum(n not in hidden_matrices(tiny_decoder()) for n, _ in tiny_decoder().named_parameters())
    assert state == 2 * others + 4 * tensors


def test_state_is_counted_as_equations_have_it() -> None:
    """Adam two moments, SGD one, Muon one for the matrices."""
    tensors = len(list(tiny_decoder().parameters()))
    hidden = len(hidden_matrices(tiny_decoder()))
    counted = {name: state_bytes(name) for name in ("adam", "sgd", "muon")}
    _, matrices, others = counted["adam"]
    assert counted["adam"][0] == 2 * (matrices + others) + 4 * tensors
    assert counted["sgd"][0] == matrices + others
    assert counted["muon"][0] == matrices + 2 * others + 4 * (tensors - hidden)


def test_state_in_lists_is_counted_too() -> None:
    """SOAP's two moments, and for each matrix r x c two factors and their eigenvectors, r^2 and c^2 each."""
    state, matrices, others = state_bytes("soap")
    squares = [sum(size**2 for size in p.shape) for p in tiny_decoder().parameters() if p.ndim == 2]
    assert state >= 2 * (matrices + others) + 2 * 4 * sum(squares)


# ---------------------------------------------------------------- names


def test_every_optimiser_of_the_registry_is_a_method_with_the_same_label() -> None:
    baselines = {name: method.label for name, method in ALL_METHODS.items() if not method.is_gauss_newton}
    assert baselines == {name: entry.label for name, entry in registry.items()}
    assert not METHODS.keys() & MORE_METHODS.keys()


@pytest.mark.parametrize("profile", ["laptop", "h200"])
@pytest.mark.parametrize("method", MORE_METHODS)
def test_every_method_has_a_starting_point_in_the_profiles_that_are_run(method: str, profile: str) -> None:
    config = profiles.run_config(profile, method, use_tuned=False)
    assert isinstance(config, RunConfig) and "method.inner.lr" in profiles.PROFILES[profile].methods[method]
