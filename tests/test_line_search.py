"""The line search by loops: which step size wins, what it costs, where the model ends."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, classifier_case, decoder_case, direction, regression_case
from oracles import assert_all_close, assert_close
from torch import Tensor, nn

from gnlib.config import ComputeConfig, LineSearchConfig
from gnlib.line_search import line_search, move, step_sizes
from gnlib.objective import forward_loss
from gnlib.precision import matmul_precision


class Scripted(nn.Module):
    """One parameter theta; the output is looked up at theta, so that a loss of any shape can be searched."""

    def __init__(self, table: dict[float, float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.table, self.visited = table, []  # type: ignore[var-annotated]

    def forward(self, inputs: Tensor) -> Tensor:
        theta = self.theta.item()
        self.visited.append(theta)
        nearest = min(self.table, key=lambda known: abs(known - theta))
        return torch.full((len(inputs),), self.table[nearest], dtype=torch.float64)


def _output(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is the mean output."""
    return model(inputs).mean()


def _search(table: dict[float, float], **settings: object) -> tuple[Scripted, float, dict[float, float]]:
    """Search from theta = 0 to theta = 1."""
    model = Scripted(table)
    ends = ({"theta": torch.tensor(0.0).double()}, {"theta": torch.tensor(1.0).double()})
    batches = [(torch.zeros(2), torch.zeros(2))] * 3
    found = line_search(model, _output, *ends, batches, LineSearchConfig.model_validate(settings))
    return model, found.step_size, found.losses


def test_step_sizes_are_powers_of_the_root_of_a_half_and_zero() -> None:
    expected = [1.0, math.sqrt(0.5), 0.5, math.sqrt(0.125), 0.25]
    assert step_sizes(LineSearchConfig(candidates=5)) == pytest.approx([*expected, 0.0], abs=1e-16)
    assert step_sizes(LineSearchConfig(candidates=5, zero=False)) == pytest.approx(expected, abs=1e-16)
    assert step_sizes(LineSearchConfig(candidates=10))[9] == pytest.approx(2**-4.5)


@pytest.mark.parametrize("best", [0, 1, 2, 3, 4])
def test_the_step_size_with_the_least_loss_wins(best: int) -> None:
    sizes = [2 ** (-i / 2) for i in range(5)]
    table = {0.0: 1.0} | {size: 2.0 + i for i, size in enumerate(sizes)} | {sizes[best]: 0.5}
    model, step_size, losses = _search(table)
    assert step_size == pytest.approx(sizes[best])
    assert model.theta.item() == pytest.approx(sizes[best], abs=1e-15)
    assert losses == pytest.approx({size: table[size] for size in (*sizes, 0.0)})


def test_a_step_that_raises_the_search_loss_is_never_accepted() -> None:
    sizes = [2 ** (-i / 2) for i in range(5)]
    model, step_size, _ = _search({0.0: 1.0} | dict.fromkeys(sizes, 1.0 + 1e-9))
    assert step_size == 0.0 and model.theta.item() == 0.0


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_the_search_loss_does_not_rise_along_random_directions(case: Case, seed: int, scale: float) -> None:
    anchor, target = case.anchor(), case.point(list(case.anchor()), scale, seed)
    before = case.dense_loss.value(case.model(case.inputs), case.targets).item()
    batches = [(case.inputs, case.targets)]
    found = line_search(case.model, forward_loss(case.loss), anchor, target, batches, LineSearchConfig())
    after = case.dense_loss.value(case.model(case.inputs), case.targets).item()
    assert after <= before * (1 + 1e-12)
    assert found.losses[found.step_size] == pytest.approx(after, rel=1e-10)
    assert found.losses[0.0] == pytest.approx(before, rel=1e-10)


def test_without_zero_the_best_of_the_others_is_taken_even_if_it_raises_the_loss() -> None:
    sizes = [2 ** (-i / 2) for i in range(3)]
    model, step_size, losses = _search({0.0: 1.0} | {s: 2 + s for s in sizes}, candidates=3, zero=False)
    assert step_size == 0.5 and model.theta.item() == 0.5
    assert 0.0 not in losses


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_wins(bad: float) -> None:
    sizes = [2 ** (-i / 2) for i in range(5)]
    model, step_size, _ = _search({0.0: 3.0} | dict.fromkeys(sizes, 2.0) | {1.0: bad, sizes[2]: bad, sizes[1]: 1.0})
    assert step_size == pytest.approx(sizes[1])
    assert model.theta.item() == pytest.approx(sizes[1], abs=1e-15)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_model_stays_at_the_anchor_if_no_loss_is_finite(bad: float, zero: bool) -> None:
    model, step_size, _ = _search({0.0: bad, 1.0: bad}, zero=zero)
    assert step_size == 0.0 and model.theta.item() == 0.0


def test_one_bad_batch_is_enough_to_lose() -> None:
    """The mean over batches counts, not the last batch."""

    class BadOnce(Scripted):
        def forward(self, inputs: Tensor) -> Tensor:
            z = super().forward(inputs)
            return z * math.nan if len(self.visited) == 1 else z  # first batch, first candidate: step size 1

    model = BadOnce({0.0: 3.0, 1.0: 1.0, 0.5: 2.0, math.sqrt(0.5): 2.5})
    ends = ({"theta": torch.tensor(0.0).double()}, {"theta": torch.tensor(1.0).double()})
    batches = [(torch.zeros(2), torch.zeros(2))] * 3
    found = line_search(model, _output, *ends, batches, LineSearchConfig(candidates=3))
    assert found.step_size == 0.5


def test_the_loss_of_a_candidate_is_its_mean_over_the_batches() -> None:
    case = regression_case()
    anchor, target = case.anchor(), case.point(list(case.anchor()), 0.3)
    batches = [(case.inputs[:4], case.targets[:4]), (case.inputs[4:], case.targets[4:])]
    found = line_search(case.model, forward_loss(case.loss), anchor, target, batches, LineSearchConfig())
    for size, loss in found.losses.items():
        theta = {name: (1 - size) * anchor[name] + size * target[name] for name in anchor}
        z = torch.func.functional_call(case.model, theta, (case.inputs,))
        assert_close(torch.tensor(loss, dtype=torch.float64), case.dense_loss.value(z, case.targets))


@pytest.mark.parametrize(
    ("candidates", "zero", "forwards"), [(5, True, 6), (5, False, 5), (10, True, 11), (1, False, 1)]
)
def test_every_batch_costs_one_forward_per_candidate(candidates: int, zero: bool, forwards: int) -> None:
    case = regression_case()
    calls = []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    settings = LineSearchConfig(candidates=candidates, zero=zero)
    target = case.point(list(case.anchor()))
    batches = [(case.inputs, case.targets)] * 3
    found = line_search(case.model, forward_loss(case.loss), case.anchor(), target, iter(batches), settings)
    assert found.forward_passes == 3 * len(case.inputs) * forwards
    assert len(calls) == 3 * forwards


def test_moving_by_zero_or_one_is_exact() -> None:
    """Values whose difference rounds: anchor + 1 (target - anchor) would not be target."""
    model = nn.Linear(2, 1, bias=False)
    anchor, target = {"weight": torch.tensor([[1.0, -3e7]])}, {"weight": torch.tensor([[1e-8, 0.1]])}
    assert not torch.equal(anchor["weight"] + (target["weight"] - anchor["weight"]), target["weight"])
    move(model, anchor, target, 1.0)
    assert torch.equal(model.weight, target["weight"])
    move(model, anchor, target, 0.0)
    assert torch.equal(model.weight, anchor["weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moving_back_from_a_solution_that_diverged_is_exact(bad: float) -> None:
    """0 times infinity is not a number: the anchor must be copied, not interpolated."""
    model = nn.Linear(2, 1, bias=False)
    anchor, target = {"weight": torch.tensor([[1.0, -3.0]])}, {"weight": torch.tensor([[bad, 0.1]])}
    move(model, anchor, target, 0.0)
    assert torch.equal(model.weight, anchor["weight"])


def test_moving_interpolates_and_leaves_its_arguments_alone(case: Case) -> None:
    anchor, target = case.anchor(), case.point(list(case.anchor()))
    copies = {n: t.clone() for n, t in anchor.items()}, {n: t.clone() for n, t in target.items()}
    for size in (0.25, math.sqrt(0.5), 1.0, 0.0):
        move(case.model, anchor, target, size)
        assert_all_close(case.anchor(), {n: anchor[n] + size * (target[n] - anchor[n]) for n in anchor}, 1e-14)
    for before, after in zip(copies, (anchor, target), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_among_equal_losses_the_longest_step_wins() -> None:
    _, step_size, _ = _search({0.0: 1.0, 1.0: 1.0})
    assert step_size == 1.0


def test_the_search_needs_no_gradients() -> None:
    case = regression_case()
    target = case.point(list(case.anchor()))
    batches = [(case.inputs, case.targets)]
    line_search(case.model, forward_loss(case.loss), case.anchor(), target, batches, LineSearchConfig())
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in case.model.parameters())


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_in_bf16_every_candidate_is_judged_by_its_own_weights(kind: str) -> None:
    """Autocast would keep the rounded weights of the first candidate for all of them."""
    case = decoder_case() if kind == "decoder" else classifier_case()
    model, bf16, cpu = case.model.float(), ComputeConfig(precision="bf16"), torch.device("cpu")
    inputs = case.inputs.float() if case.inputs.is_floating_point() else case.inputs
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    target = {name: p + direction(anchor)[name] for name, p in anchor.items()}
    loss = forward_loss(case.loss)
    with matmul_precision(bf16, cpu):
        found = line_search(model, loss, anchor, target, [(inputs, case.targets)], LineSearchConfig())
    for candidate, searched in found.losses.items():
        move(model, anchor, target, candidate)
        with matmul_precision(bf16, cpu):
            assert loss(model, inputs, case.targets).item() == searched
    assert len(set(found.losses.values())) == len(found.losses)
