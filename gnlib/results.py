"""Records -> tidy tables: curves, steps and tokens to a target loss, ratios with intervals.

pandas is imported where it is used; it comes with the `figures` extra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from gnlib.config import CONJUGATE_GRADIENT
from gnlib.methods import ALL_METHODS
from gnlib.methods import label as method_label
from gnlib.record import Record, Row

if TYPE_CHECKING:
    import pandas as pd

# two-sided 95 % points of Student's t for n - 1 = 1, 2, ... degrees of freedom; beyond, the last
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Crossing:
    """Where a run first reached the target, between two evaluations by linear interpolation of the loss."""

    steps: float
    """Outer steps; where censored, those the run had, a lower bound."""
    tokens: float
    """Tokens for training and line search together."""
    censored: bool
    """The run ended, or diverged, above the target."""


def crossing(record: Record, target: float) -> Crossing:
    """Steps and tokens to `target` (nats per token)."""
    rows = record.rows
    for before, after in zip([rows[0], *rows], rows, strict=False):
        high, low = before["val_loss"], after["val_loss"]
        if high is None or low is None or low > target:
            continue
        share = 1.0 if high <= target else (high - target) / (high - low)
        steps = before["outer_step"] + share * (after["outer_step"] - before["outer_step"])
        tokens = [row["tokens_train"] + row["tokens_search"] for row in (before, after)]
        return Crossing(steps, tokens[0] + share * (tokens[1] - tokens[0]), False)
    last = rows[-1]
    return Crossing(last["outer_step"], last["tokens_train"] + last["tokens_search"], True)


def label(record: Record) -> str:
    """What its study calls the run; its method's name for a record of no study."""
    return record.label or method_label(record.config)


def axis_values(record: Record, row: Row) -> dict[str, float]:
    """What a row's loss can be drawn or counted against: the keys of `plots.AXES`."""
    return {
        "outer_step": row["outer_step"],
        "tokens": row["tokens_train"] + row["tokens_search"],
        "flops": row["flops"],
        "gradients": row["outer_step"] * record.config.method.inner.steps,
        "wall_s": row["wall_s"],
    }


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """One row per evaluation: the columns of `record.Row`, with method, batch (tokens), seed, status and run, and the
    other axes: tokens, and sequential gradient evaluations (inner steps; of conjugate gradients, at most)."""
    import pandas as pd

    return pd.DataFrame(
        [_identity(record) | row | axis_values(record, row) for record in records for row in record.rows]
    )


def value_at(
    record: Record,
    place: float,
    value: Callable[[Row], float | None],
    axis: Callable[[Row], float] = lambda row: row["outer_step"],
) -> float:
    """A column at a place between two evaluations, an outer step or on another axis, by linear interpolation; nan where
    it is not finite, and the last value beyond the run's end."""
    for before, after in pairwise(record.rows):
        first, last = axis(before), axis(after)
        if first <= place <= last:
            low, high = value(before), value(after)
            if low is None or high is None:
                return math.nan
            return low + (high - low) * (place - first) / (last - first)
    end = value(record.rows[-1])
    return math.nan if end is None else end


def steps_to_target(records: Sequence[Record], target: float) -> pd.DataFrame:
    """One row per run: steps and tokens to the target and the other axes there, whether censored, the final loss."""
    import pandas as pd

    rows = []
    for record in records:
        reached = crossing(record, target)
        there = {
            axis: value_at(record, reached.steps, lambda row, r=record, a=axis: axis_values(r, row)[a])  # type: ignore[misc]
            for axis in axis_values(record, record.rows[0])
        }
        rows.append(_identity(record) | vars(reached) | there | {"final_loss": final_loss(record)})
    return pd.DataFrame(rows)


def ends(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its last values on every axis and its final loss."""
    import pandas as pd

    return pd.DataFrame(
        [_identity(r) | axis_values(r, r.rows[-1]) | {"final_loss": final_loss(r)} for r in records]
    )


def _identity(record: Record) -> dict[str, object]:
    config = record.config
    return {
        "method": label(record),
        "batch": config.outer_batch_tokens,
        "seed": config.seed,
        "status": record.status,
        "run": config.recipe_id,
    }


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    mean: float
    half_width: float | None
    """Of Student's t interval; None for n = 1."""
    n: int
    censored: int = 0
    """How many of the n are lower bounds, which makes the mean one too."""

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if math.isinf(self.mean):
            return "inf"  # of diverged runs; it has no interval
        if self.censored:
            return f"≥ {self.mean:.2f}"  # bounds have no interval
        return f"{self.mean:.2f}" if self.half_width is None else f"{self.mean:.2f} ± {self.half_width:.2f}"

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends; a lower bound has no upper one."""
        spread = self.half_width or 0.0
        return self.mean - spread, math.inf if self.censored else self.mean + spread

    def within(self, at_least: float | None, at_most: float | None) -> bool | None:
        """Whether all of the interval is within these bounds (true), or none of it (false); else None, as for nan."""
        low, high = self.interval
        least = -math.inf if at_least is None else at_least
        most = math.inf if at_most is None else at_most
        if high < least or low > most:
            return False
        return True if least <= low and high <= most else None


def estimate(values: Sequence[float], censored: Sequence[bool] = ()) -> Estimate:
    """Mean and 95 % interval (Student's t over the seeds)."""
    n = len(values)
    mean = sum(values) / n
    if n == 1 or not math.isfinite(mean):
        return Estimate(mean, None, n, sum(censored))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    t = _T95[min(n - 2, len(_T95) - 1)]  # beyond the table its last, which is wider
    return Estimate(mean, t * deviation / math.sqrt(n), n, sum(censored))


def mean_steps(records: Sequence[Record], target: float) -> Estimate:
    """Steps to the target."""
    reached = [crossing(record, target) for record in records]
    return estimate([c.steps for c in reached], [c.censored for c in reached])


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records grouped by label: the methods in the order of `methods.ALL_METHODS`, then variants as they come; seeds
    ascending."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.config.seed):
        groups.setdefault(label(record), []).append(record)
    order = [method.label for method in ALL_METHODS.values()]
    return {name: groups[name] for name in sorted(groups, key=lambda n: order.index(n) if n in order else len(order))}


def batches(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Records grouped by outer batch, in sequences; the smallest first."""
    groups: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.config.outer_batch):
        groups.setdefault(record.config.outer_batch, []).append(record)
    return groups


def ratio(
    numerator: Sequence[Record], denominator: Sequence[Record], target: float, of: Callable[[Crossing], float]
) -> Estimate:
    """Mean over shared seeds of a quantity's ratio, e.g. steps to target of a baseline over Gauss-Newton's.

    A censored numerator makes it a lower bound; a denominator that is censored, or zero because the start is below the
    target, gives no ratio (nan).
    """
    below = {record.config.seed: crossing(record, target) for record in denominator}
    above = {record.config.seed: crossing(record, target) for record in numerator}
    seeds = sorted(below.keys() & above.keys())
    if not seeds or any(below[seed].censored or not of(below[seed]) for seed in seeds):
        return Estimate(math.nan, None, len(seeds))
    return estimate([of(above[s]) / of(below[s]) for s in seeds], [above[s].censored for s in seeds])


def settings(records: Sequence[Record]) -> pd.DataFrame:
    """What each method ran with: batch, inner steps, learning rates, outer steps, data."""
    import pandas as pd

    rows = {}
    for name, runs in by_method(records).items():
        config = runs[0].config
        inner = config.method.inner
        rows[name] = {
            "batch (tokens)": config.outer_batch_tokens,
            "outer steps": config.outer_steps,
            "inner steps": inner.steps,
            "optimiser": inner.optimizer,
            "lr": "" if inner.optimizer == CONJUGATE_GRADIENT else f"{inner.lr:g}",  # which has none
            "lr of AdamW part": "" if inner.adam_lr is None else f"{inner.adam_lr:g}",
            "warm-up": inner.warmup,
            "data": config.data.fingerprint,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def summary(records: Sequence[Record], target: float, reference: str = "GN") -> pd.DataFrame:
    """Per method: steps and tokens to the target and their ratios to `reference`, mean and interval over the seeds."""
    import pandas as pd

    groups = by_method(records)
    base = groups.get(reference, [])
    rows = []
    for name, runs in groups.items():
        reached = [crossing(record, target) for record in runs]
        censored = [c.censored for c in reached]
        rows.append(
            {
                "method": name,
                "n": len(runs),
                "reached": f"{len(runs) - sum(censored)} of {len(runs)}",
                "steps": str(mean_steps(runs, target)),
                f"steps / {reference}": str(ratio(runs, base, target, lambda c: c.steps)),
                "Mtokens": str(estimate([c.tokens / 1e6 for c in reached], censored)),
                f"tokens / {reference}": str(ratio(runs, base, target, lambda c: c.tokens)),
                "final loss": str(estimate([final_loss(record) for record in runs])),
            }
        )
    return pd.DataFrame(rows).set_index("method")


def final_loss(record: Record) -> float:
    loss = record.rows[-1]["val_loss"]
    return math.nan if loss is None else loss
