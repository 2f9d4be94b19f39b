"""Batching the matrices of one shape changes nothing but rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gnlib.muon import BatchedMuon

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8), (1, 8)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("iteration", [{}, {"ns_steps": 2}, {"ns_coefficients": (2.0, -1.5, 0.5)}, {"eps": 30.0}])
def test_batched_muon_is_torch_muon(nesterov: bool, adjust: str, iteration: dict[str, Any]) -> None:
    """Within a few units of bf16's last place after five steps, whose updates are of size lr."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    chosen = {"nesterov": nesterov, "adjust_lr_fn": adjust} | iteration
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9} | chosen
    ends = []
    for kind in (torch.optim.Muon, BatchedMuon):
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = kind(parameters, **settings)
        gradients = torch.Generator().manual_seed(1)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=gradients)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    moved = (ends[0] - torch.cat([p.flatten() for p in start])).norm()
    assert (ends[1] - ends[0]).norm() < 0.02 * moved


@pytest.mark.parametrize(("first", "second"), [(torch.optim.Muon, BatchedMuon), (BatchedMuon, torch.optim.Muon)])
def test_a_checkpoint_of_one_muon_continues_in_the_other(first: Any, second: Any) -> None:
    gradients = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
    ends = []
    for kind in (first, second):
        parameter = torch.nn.Parameter(torch.ones(4, 6))
        optimizer = first([parameter], lr=0.1, momentum=0.9)
        for index, gradient in enumerate(gradients):
            if index == 2:
                saved, optimizer = optimizer.state_dict(), kind([parameter], lr=0.1, momentum=0.9)
                optimizer.load_state_dict(saved)
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=2e-3)
    assert (ends[0] - 1).norm() > 0.1
