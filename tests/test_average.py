"""The average that is evaluated, against a sum over all earlier parameters written out."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from gnlib.average import Average


def walk(steps: int) -> list[dict[str, Tensor]]:
    """Parameters of a small model after each of some steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in small().named_parameters()}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(steps)
    ]


def small() -> nn.Module:
    return nn.Linear(3, 2).double()


def followed(points: list[dict[str, Tensor]], factor: float) -> tuple[nn.Module, Average]:
    """A model taken through the points, with its average."""
    model = small()
    average = Average(model, factor)
    for point in points:
        model.load_state_dict(point)
        average.update(model)
    return model, average


def held(model: nn.Module, average: Average) -> dict[str, Tensor]:
    with average.in_place(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def weighted_mean(points: list[dict[str, Tensor]], factor: float) -> dict[str, Tensor]:
    """sum_s b^(t-s) theta_s / sum_s b^(t-s), every point kept."""
    weights = [factor ** (len(points) - 1 - s) for s in range(len(points))]
    total = sum(weights)
    return {
        name: torch.stack([w / total * p[name] for w, p in zip(weights, points, strict=True)]).sum(0)
        for name in points[0]
    }


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_average_is_the_mean_of_all_parameters_with_geometric_weights(factor: float, steps: int) -> None:
    points = walk(steps)
    model, average = followed(points, factor)
    expected = weighted_mean(points, factor)
    for name, tensor in held(model, average).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


def test_factor_zero_evaluates_the_parameters_themselves() -> None:
    points = walk(3)
    model, average = followed(points, 0.0)
    assert all(torch.equal(tensor, points[-1][name]) for name, tensor in held(model, average).items())


def test_before_the_first_step_the_average_is_the_start() -> None:
    model = small()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(tensor, start[name]) for name, tensor in held(model, Average(model, 0.9)).items())


def test_the_model_has_its_own_parameters_back_after_evaluation_even_a_failed_one() -> None:
    points = walk(3)
    model, average = followed(points, 0.9)
    assert not torch.equal(held(model, average)["weight"], points[-1]["weight"])
    assert all(torch.equal(p, points[-1][name]) for name, p in model.named_parameters())
    with pytest.raises(KeyboardInterrupt), average.in_place(model):
        raise KeyboardInterrupt
    assert all(torch.equal(p, points[-1][name]) for name, p in model.named_parameters())


def test_an_average_restored_from_its_saved_state_continues_identically() -> None:
    points = walk(6)
    model, whole = followed(points, 0.9)
    _, first = followed(points[:4], 0.9)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    restored = Average(small(), 0.9)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    for point in points[4:]:
        model.load_state_dict(point)
        restored.update(model)
    expected = held(model, whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held(model, restored).items())
