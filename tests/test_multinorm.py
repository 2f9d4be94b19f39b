"""Normalisations are what they say, their alternation ends where all norms hold, and the optimisers keep no state."""

from __future__ import annotations

import math

import pytest
import torch
from cases import normal
from oracles import assert_close, sinkgd, whitening
from torch import Tensor

from gnlib.multinorm import NORMS, SWAN, MultiNormalised, SinkGD, fixed_point, sweep, whiten

SHAPES = [(4, 8), (8, 4), (6, 6), (1, 5), (7, 3)]
# Newton-Schulz leaves 2e-6 (stated: 1e-5), the others only rounding
ACCURACY = {"spectral": 1e-5}


def matrix(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return normal(shape, torch.Generator().manual_seed(seed))


def with_singular_values(values: Tensor, rows: int) -> Tensor:
    n = len(values)
    left, right = (torch.linalg.qr(matrix((size, n), seed))[0] for size, seed in ((rows, 1), (n, 2)))
    return (left * values) @ right.T


# ---------------------------------------------------------------- one norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_a_normalised_matrix_has_norm_one_and_root_mean_square_one(name: str, shape: tuple[int, int]) -> None:
    x = NORMS[name].normalise(1e-4 * matrix(shape))
    assert NORMS[name].value(x).item() == pytest.approx(1, abs=ACCURACY.get(name, 1e-12))
    assert x.square().mean().sqrt().item() == pytest.approx(1, abs=ACCURACY.get(name, 1e-12))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_no_other_matrix_of_norm_one_is_better_aligned(name: str, shape: tuple[int, int]) -> None:
    """P(x) maximises <x, z> over g(z) = 1: against 200 random z, half of them near P(x)."""
    x = matrix(shape)
    norm, best = NORMS[name], NORMS[name].normalise(x)
    noise = matrix((200, *shape), seed=3)
    others = torch.cat([noise[:100], best + 0.1 * noise[100:]])
    others = others / norm.value(others)[:, None, None]
    assert (others * x).sum((-2, -1)).max() <= (best * x).sum() * (1 + ACCURACY.get(name, 1e-12))


@pytest.mark.parametrize("name", NORMS)
def test_a_stack_is_normalised_as_its_matrices_one_by_one(name: str) -> None:
    x = matrix((2, 3, 5, 4))
    one_by_one = torch.stack([torch.stack([NORMS[name].normalise(m) for m in row]) for row in x])
    assert_close(NORMS[name].normalise(x), one_by_one, 1e-12)
    assert NORMS[name].value(x).shape == (2, 3)


@pytest.mark.parametrize("name", NORMS)
def test_zero_rows_and_columns_stay_zero(name: str) -> None:
    x = matrix((5, 4))
    x[1], x[:, 2] = 0.0, 0.0
    done = NORMS[name].normalise(x)
    assert done.isfinite().all() and done[1].norm() < 1e-12 and done[:, 2].norm() < 1e-12


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(3, 2), (300, 64), (64, 300)])
def test_a_zero_matrix_stays_zero_in_single_precision(name: str, shape: tuple[int, int]) -> None:
    """Where 1 / the smallest number times a root of the size would overflow."""
    assert torch.equal(NORMS[name].normalise(torch.zeros(shape)), torch.zeros(shape))


def test_a_step_leaves_the_rows_of_absent_tokens_alone_and_is_finite() -> None:
    """The gradient of an embedding, in the stateless variant."""
    p = torch.nn.Parameter(torch.ones(300, 64))
    p.grad = torch.zeros(300, 64)
    p.grad[:100] = 1e-5 * matrix((100, 64)).float()
    SinkGD([p], lr=0.1).step()
    assert p.isfinite().all() and torch.equal(p[100:], torch.ones(200, 64)) and (p[:100] != 1).all()


@pytest.mark.parametrize("rows", [12, 20])
def test_whitening_is_exact_to_a_hundred_thousandth_for_singular_values_above_a_thousandth(rows: int) -> None:
    values = torch.logspace(0, -2.9, 12, dtype=torch.float64)
    x = with_singular_values(values / values.norm(), rows)
    for wide in (x, x.mT):
        assert_close(whiten(wide), whitening(wide), 1e-5)
        assert_close(whiten(wide.float()), whitening(wide), 1e-5)


def test_whitening_leaves_far_smaller_singular_values_too_small() -> None:
    """What the stated accuracy does not promise."""
    values = torch.tensor([1.0, 1e-5], dtype=torch.float64)
    found = torch.linalg.svdvals(whiten(with_singular_values(values, 4))) / 2  # sqrt(max(4, 2))
    assert found[0].item() == pytest.approx(1, abs=1e-5) and 0 < found[1] < 0.5


# ---------------------------------------------------------------- several norms


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (6, 6)])
@pytest.mark.parametrize(
    "norms", [("row", "column"), ("row", "spectral"), ("row", "column", "spectral", "frobenius"), ("sign", "row")]
)
def test_a_fixed_point_has_all_norms_at_once(norms: tuple[str, ...], shape: tuple[int, int]) -> None:
    end = fixed_point(matrix((3, *shape)), norms, tolerance=1e-9, limit=300)
    assert end.converged and end.change <= 1e-9 and 1 < end.sweeps < 300
    assert end.excess < 1e-5  # that of Newton-Schulz
    for name in norms:
        assert (NORMS[name].value(end.x) - 1).abs().max() <= end.excess
        assert_close(NORMS[name].normalise(end.x), end.x, 1e-5)


def test_one_sweep_is_no_fixed_point_of_rows_and_columns() -> None:
    x = sweep(matrix((4, 8)), ("row", "column"))
    assert NORMS["column"].value(x).item() == pytest.approx(1)
    assert abs(NORMS["row"].value(x).item() - 1) > 0.01


def test_swan_is_at_its_fixed_point_after_one_sweep_of_a_wide_matrix_and_not_of_a_tall_one() -> None:
    """Orthogonal rows of equal length have the row norm already (arXiv 2502.06742, section 3)."""
    excess = [abs(NORMS["row"].value(sweep(matrix(s), ("row", "spectral"))).item() - 1) for s in [(4, 8), (8, 4)]]
    assert excess[0] < 1e-5 and excess[1] > 0.01


def test_the_sweep_limit_ends_the_alternation_and_says_so() -> None:
    end = fixed_point(matrix((4, 8)), ("row", "column"), tolerance=1e-12, limit=2)
    assert (end.sweeps, end.converged) == (2, False) and end.change > 1e-3 and end.excess > 1e-4
    assert torch.equal(end.x, sweep(sweep(matrix((4, 8)), ("row", "column")), ("row", "column")))


def test_the_change_and_the_excess_of_a_stack_are_the_largest_of_its_matrices() -> None:
    """Nine that are at their fixed point hide none that is not."""
    norms = ("row", "column")
    done, other = fixed_point(matrix((4, 8)), norms, tolerance=1e-9).x, matrix((4, 8), seed=5)
    end = fixed_point(torch.stack([*[done] * 9, other]), norms, tolerance=1e-3, limit=3)
    before = sweep(sweep(other, norms), norms)
    after = sweep(before, norms)
    assert end.change == pytest.approx(((after - before).norm() / after.norm()).item(), rel=1e-6)
    assert end.change > 1e-3 and not end.converged
    assert end.excess == pytest.approx(max(abs(NORMS[name].value(after).item() - 1) for name in norms), rel=1e-6)


def test_a_looser_tolerance_stops_earlier() -> None:
    loose, tight = (fixed_point(matrix((4, 8)), ("row", "column"), t) for t in (1e-2, 1e-6))
    assert loose.sweeps < tight.sweeps and 1e-6 < loose.change <= 1e-2 and tight.change <= 1e-6


# ---------------------------------------------------------------- the optimisers


def stepped(kind: type[MultiNormalised], start: Tensor, gradient: Tensor, **settings: object) -> Tensor:
    p = torch.nn.Parameter(start.clone())
    p.grad = gradient.clone()
    kind([p], **settings).step()
    assert torch.equal(p.grad, gradient), "the gradient is the caller's"
    return p.detach()


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (6, 6)])
def test_swan_steps_along_the_closed_form_whitening_of_the_normalised_rows(shape: tuple[int, int]) -> None:
    start, gradient = matrix(shape), matrix(shape, seed=1)
    rows = torch.stack([row * math.sqrt(shape[1]) / row.norm() for row in gradient])
    moved = stepped(SWAN, start, gradient, lr=0.1, weight_decay=0.3)
    assert_close(moved, (1 - 0.03) * start - 0.1 * whitening(rows), 1e-5)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (6, 6)])
@pytest.mark.parametrize("sweeps", [None, 1, 7])
def test_sinkgd_follows_its_algorithm_with_five_sweeps_by_default(shape: tuple[int, int], sweeps: int | None) -> None:
    start, gradient = matrix(shape), matrix(shape, seed=1)
    moved = stepped(SinkGD, start, gradient, lr=0.1, weight_decay=0.3, **({"sweeps": sweeps} if sweeps else {}))
    assert_close(moved, (1 - 0.03) * start - 0.1 * sinkgd(gradient, sweeps or 5), 1e-12)


def test_a_step_takes_the_signs_of_a_vector_for_sinkgd_and_scales_it_for_swan() -> None:
    start, gradient = matrix((5,)), matrix((5,), seed=1)
    assert_close(stepped(SinkGD, start, gradient, lr=0.1), start - 0.1 * gradient.sign(), 1e-12)
    assert_close(stepped(SWAN, start, gradient, lr=0.1), start - 0.1 * math.sqrt(5) * gradient / gradient.norm(), 1e-6)


def test_a_tensor_of_four_dimensions_counts_as_its_first_against_the_others() -> None:
    start, gradient = matrix((4, 3, 2, 2)), matrix((4, 3, 2, 2), seed=1)
    expected = sinkgd(gradient.reshape(4, 12), 5).reshape(4, 3, 2, 2)
    assert_close(stepped(SinkGD, start, gradient, lr=1.0), start - expected, 1e-12)


def test_parameters_of_one_shape_step_as_each_by_itself_and_groups_keep_their_settings() -> None:
    shapes = [(4, 8), (8, 4), (4, 8), (5,), (4, 8)]
    starts = [matrix(shape, seed) for seed, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    for seed, p in enumerate(parameters):
        p.grad = matrix(tuple(p.shape), seed + 10)
    idle = torch.nn.Parameter(torch.ones(4, 8))  # no gradient
    SinkGD([{"params": [*parameters[:3], idle]}, {"params": parameters[3:], "lr": 0.5, "sweeps": 2}], lr=0.1).step()
    for index, (start, p) in enumerate(zip(starts, parameters, strict=True)):
        settings = {"lr": 0.1} if index < 3 else {"lr": 0.5, "sweeps": 2}
        assert_close(p, stepped(SinkGD, start, p.grad, **settings), 1e-12)
    assert torch.equal(idle, torch.ones(4, 8))


def test_parameters_of_one_shape_may_differ_in_precision() -> None:
    parameters = [torch.nn.Parameter(matrix((4, 8)).to(dtype)) for dtype in (torch.float32, torch.float64)]
    for p in parameters:
        p.grad = matrix((4, 8), seed=1).to(p.dtype)
    SinkGD(parameters, lr=0.1).step()
    assert_close(parameters[0].double(), parameters[1], 1e-6)


def test_a_closure_is_evaluated_with_gradients() -> None:
    p = torch.nn.Parameter(matrix((2, 3)))

    def closure() -> Tensor:
        loss = p.square().sum() / 2
        loss.backward()
        return loss

    before = p.detach().clone()
    assert SWAN([p], lr=0.1).step(closure).item() == pytest.approx(before.square().sum().item() / 2)
    assert not torch.equal(p, before)


@pytest.mark.parametrize("kind", [SWAN, SinkGD])
def test_there_is_no_state_and_the_settings_survive_a_checkpoint(kind: type[MultiNormalised], tmp_path) -> None:
    p = torch.nn.Parameter(matrix((4, 8)))
    p.grad = matrix((4, 8), seed=1)
    optimizer = kind([p], lr=0.1, sweeps=3)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = kind([p], lr=0.7)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {k: other.param_groups[0][k] for k in ("lr", "sweeps")} == {"lr": 0.1, "sweeps": 3}


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"weight_decay": -0.1}, {"sweeps": 0}, {"norms": ["row", "diagonal"]}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must not be negative|no norm 'diagonal'; allowed: row, column"):
        MultiNormalised([torch.nn.Parameter(torch.ones(2, 2))], **wrong)
