"""Precision of matrix products. Parameters, optimiser states, norms, softmax and losses stay in fp32 (or fp64)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from gnlib.config import ComputeConfig


def matmul_precision(compute: ComputeConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context for forward passes and their derivatives; optimisers stay outside it, in full precision."""
    torch.set_float32_matmul_precision("high" if compute.precision == "tf32" else "highest")
    return torch.autocast(device.type, torch.bfloat16) if compute.precision == "bf16" else nullcontext()
