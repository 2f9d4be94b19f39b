"""How the arithmetic is done: compiled or not, and the precision of matrix products.

Parameters, optimiser states, norms, softmax and losses stay in fp32 (or fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gnlib.config import ComputeConfig


@contextmanager
def matmul_precision(compute: ComputeConfig, device: torch.device) -> Iterator[None]:
    """The context for forward passes and their derivatives; optimisers stay outside it, in full precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if compute.precision == "tf32" else "highest")
    try:
        # not cached: a line search moves the parameters in place, and would be given copies from before
        with torch.autocast(device.type, torch.bfloat16, compute.precision == "bf16", cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def compiled_once(rule: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function that serves all its callers, such as blocks of equal shapes."""
    return torch.compile(rule)


def triton_takes(x: Tensor) -> bool:
    """Whether what is computed of tensors like x, without a graph, can go through the project's kernels."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32)
