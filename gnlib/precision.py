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
    torch.compiler.assume_constant_result(in_tf32)  # not where it is defined: this imports the compiler, half of torch
    return torch.compile(rule)


def in_tf32() -> bool:
    """Whether products of fp32 matrices on a GPU are in TF32 now."""
    return torch.backends.cuda.matmul.allow_tf32


def triton_takes(x: Tensor) -> bool:
    """Whether what is computed of tensors like x, without a graph, can go through the project's kernels."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32)
