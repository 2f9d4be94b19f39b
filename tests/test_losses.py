"""The convex losses against autograd and against dense loops."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from oracles import DenseCrossEntropy, DenseLoss, DenseSquaredError, assert_close
from torch import Tensor

from gnlib.losses import ConvexLoss, CrossEntropy, MeanSquaredError

CROSS_ENTROPY = (CrossEntropy(), DenseCrossEntropy())
SQUARED_ERROR = (MeanSquaredError(), DenseSquaredError())


def _outputs(shape: tuple[int, ...], seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOSSES: dict[str, tuple[ConvexLoss, DenseLoss, Tensor, Tensor]] = {
    "tokens": (*CROSS_ENTROPY, _outputs((2, 3, 5), 0), torch.tensor([[0, 4, 1], [2, 2, 3]])),
    "classes": (*CROSS_ENTROPY, _outputs((4, 3), 1), torch.tensor([2, 0, 0, 1])),
    "vectors": (*SQUARED_ERROR, _outputs((4, 3), 2), _outputs((4, 3), 3)),
    "numbers": (*SQUARED_ERROR, _outputs((5,), 4), _outputs((5,), 5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_is_the_mean_over_predictions(name: str) -> None:
    loss, dense, z, y = LOSSES[name]
    assert_close(loss.value(z, y), dense.value(z, y))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative_of_the_value(name: str) -> None:
    loss, dense, z, y = LOSSES[name]
    assert_close(loss.gradient(z, y), torch.func.grad(lambda outputs: loss.value(outputs, y))(z))
    assert_close(loss.gradient(z, y).reshape(-1), dense.gradient(z, y))


@pytest.mark.parametrize("name", LOSSES)
def test_hessian_product_is_the_second_derivative_of_the_value(name: str) -> None:
    loss, dense, z, y = LOSSES[name]
    v = _outputs(tuple(z.shape), 9)
    hessian = torch.func.hessian(lambda outputs: loss.value(outputs, y))(z).reshape(z.numel(), z.numel())
    assert_close(loss.hessian_product(z, y, v).reshape(-1), hessian @ v.reshape(-1))
    assert_close(loss.hessian_product(z, y, v).reshape(-1), dense.hessian(z, y) @ v.reshape(-1))


@pytest.mark.parametrize("name", LOSSES)
def test_hessian_is_positive_semi_definite(name: str) -> None:
    loss, _, z, y = LOSSES[name]
    basis = torch.eye(z.numel(), dtype=z.dtype).reshape(z.numel(), *z.shape)
    columns = torch.stack([loss.hessian_product(z, y, v).reshape(-1) for v in basis])
    assert_close(columns, columns.T, 1e-14)
    assert torch.linalg.eigvalsh(columns).min() > -1e-15


def test_cross_entropy_ignores_a_shift_of_all_logits_of_a_token() -> None:
    loss, _, z, y = LOSSES["tokens"]
    ones = torch.ones_like(z)
    assert_close(loss.value(z + 300.0, y), loss.value(z, y))
    assert loss.hessian_product(z, y, ones).norm() < 1e-15
    assert loss.gradient(z, y).sum(-1).norm() < 1e-15


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    loss, _, z, y = LOSSES["tokens"]
    low = z.bfloat16()
    results = (loss.value(low, y), loss.gradient(low, y), loss.hessian_product(low, y, z.float()))
    expected = (loss.value(low.double(), y), loss.gradient(low.double(), y), loss.hessian_product(low.double(), y, z))
    for found, reference in zip(results, expected, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, reference, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tokens", "classes"])
def test_sharing_one_softmax_gives_the_three_derivatives_that_are_computed_apart(name: str, dtype: torch.dtype) -> None:
    loss, (_, _, z, y) = CrossEntropy(), LOSSES[name]
    z, v = z.to(dtype), _outputs(tuple(z.shape), 9).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    value, g, hv = loss.value(z, y), loss.gradient(z, y), loss.hessian_product(z, y, v)
    for found, expected in zip(loss.value_and_gradient(z, y), (value, g), strict=True):
        assert_close(found, expected, tolerance)
    expected = (value, value + ((g + 0.5 * hv) * v).sum(), g + hv)
    for found, reference in zip(loss.quadratic_model(z, y, v), expected, strict=True):
        assert found.dtype == reference.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(found, reference, tolerance)


def test_a_shared_softmax_survives_targets_of_vanishing_probability_and_large_logits() -> None:
    z, y = torch.tensor([[3000.0, -3000.0, 0.0], [-5000.0, -4900.0, 0.0]], dtype=torch.float32), torch.tensor([1, 0])
    assert_close(CrossEntropy().value_and_gradient(z, y)[0], torch.tensor(5500.0), 1e-6)
    assert_close(CrossEntropy().quadratic_model(z, y, torch.ones_like(z))[1], torch.tensor(5500.0), 1e-6)


def test_losses_of_the_cases_are_finite_and_not_at_a_minimum(case: Case) -> None:
    loss: ConvexLoss = case.loss
    z = case.model(case.inputs).detach()
    assert_close(loss.value(z, case.targets), case.dense_loss.value(z, case.targets))
    assert loss.gradient(z, case.targets).norm() > 1e-3
