"""What the study of stateless optimisers shows: tokens to another method's final loss, bytes of state, time of a step.

pandas is imported where it is used; it comes with the `figures` extra.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from gnlib.blocks import hidden_matrices
from gnlib.config import InnerConfig, RunConfig
from gnlib.losses import CrossEntropy
from gnlib.methods import find_method
from gnlib.model import parameter_count, shapes_only
from gnlib.optimizers import Solver, find
from gnlib.outer_step import OuterStep
from gnlib.record import Record
from gnlib.results import Estimate, by_method, crossing, estimate

if TYPE_CHECKING:
    import pandas as pd

BYTES = 4  # of an fp32 parameter


def tokens_to_final_loss(method: str, reference: str) -> Callable[[dict[str, list[Record]], float], Estimate]:
    """The claim's measure: tokens at which `method` first has `reference`'s final loss, over all of the reference's.

    Paired by seed; a method that never gets there gives a lower bound, a reference that diverged no figure (nan).
    """
    above, below = find_method(method).label, find_method(reference).label
    return lambda groups, target: _tokens_ratio(groups[above], groups[below])


def _tokens_ratio(runs: Sequence[Record], reference: Sequence[Record]) -> Estimate:
    if any(record.status == "diverged" for record in reference):
        return Estimate(math.nan, None, len(runs))
    ends = {record.config.seed: record.rows[-1] for record in reference}
    pairs = [(crossing(r, ends[r.config.seed]["val_loss"] or 0.0), ends[r.config.seed]) for r in runs]
    return estimate([reached.tokens / end["tokens_train"] for reached, end in pairs], [r.censored for r, _ in pairs])


def summary(records: Sequence[Record], reference: str = "adamw") -> pd.DataFrame:
    """Per method: final loss, tokens to the reference's final loss as a share of its tokens, bytes of state.

    The tokens are `not run` where the records have no reference.
    """
    import pandas as pd

    groups, name = by_method(records), find_method(reference).label
    rows = {}
    for label, runs in groups.items():
        kept, config = state_bytes(runs[0].config), runs[0].config
        size, hidden = sum(kept.values()), hidden_matrices(shapes_only(config))
        finals = [record.rows[-1]["val_loss"] for record in runs]
        rows[label] = {
            "n": len(runs),
            "final loss": str(estimate([float("nan") if loss is None else loss for loss in finals])),
            f"tokens to {name}'s final loss": str(_tokens_ratio(runs, groups[name])) if name in groups else "not run",
            "state (kB)": round(size / 1000, 1),
            "of the blocks' matrices": round(sum(kept[name] for name in hidden) / 1000, 1),
            "state / parameters": round(size / (BYTES * parameter_count(config)), 2),
            "peak (MB)": round(max(record.rows[-1]["peak_bytes"] for record in runs) / 1e6),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def state_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes that a run's optimisers keep for each parameter after two steps, by name; from shapes, without memory."""
    model = shapes_only(config)
    solvers = OuterStep(model, CrossEntropy(), config).solvers
    inputs = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    for solver in solvers * 2:
        solver.observe(model, CrossEntropy(), [inputs])
        solver.step({name: torch.zeros_like(p) for name, p in solver.parameters.items()}, 1.0)
    return {name: size for solver in solvers for name, size in solver.state_bytes().items()}


def step_times(methods: Sequence[str], sizes: Sequence[int], steps: int = 5) -> pd.DataFrame:
    """Milliseconds of one step on one n x n matrix of fp32 on this machine, median of `steps`: methods by sizes."""
    import pandas as pd

    rows = {find(name).label: {size: _step_ms(name, size, steps) for size in sizes} for name in methods}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(columns="n")


def _step_ms(name: str, size: int, steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    matrix, gradient = (torch.randn(size, size, generator=generator) for _ in range(2))
    solver = Solver({"matrix": matrix.requires_grad_()}, {"matrix"}, InnerConfig(optimizer=name, clip=None))
    times = []
    for _ in range(1 + steps):  # the first one makes the state
        began = time.perf_counter()
        solver.step({"matrix": gradient.clone()}, 1.0)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])
