"""The critical batch size of a method, from steps to the target at several batches.

Perfect scaling from the smallest batch B_0 would take S(B_0) B_0 / B steps. The critical batch B* is where the steps
exceed that by 20 %: the first crossing of

    excess(B) = S(B) B / (S(B_0) B_0) = 1.2

by linear interpolation in log B and log excess, for each seed; then the geometric mean over seeds with a 95 % interval
(Student's t of the logarithms). A seed that stays below 20 % at the largest batch gives a lower bound. The fit
S(B) = a + c / B (least squares of the relative error, a >= 0), again for each seed, tells the floor a and the scale
c / a, at which steps are twice the floor. By it B* = 1.2 B_0 + 0.2 c / a: even a method that gains nothing from a
larger batch has 1.2 B_0, so that ratios of B* understate how far apart two methods are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gnlib.record import Record
from gnlib.results import Crossing, by_method, crossing, estimate

if TYPE_CHECKING:
    import pandas as pd

EXCESS = 1.2


@dataclass(frozen=True)
class CriticalBatch:
    """Tokens."""

    mean: float
    """Geometric, over the seeds."""
    low: float
    high: float
    """95 % interval; the mean itself for one seed."""
    n: int
    bound: str = ""
    """`above` or `below` where the mean is only a bound."""

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if self.bound or self.n == 1:
            return f"{self.bound} {in_tokens(self.mean)}".strip()
        return f"{in_tokens(self.mean)} ({in_tokens(self.low)} to {in_tokens(self.high)})"


def critical_batch(steps: Mapping[int, Crossing]) -> tuple[float, str]:
    """B* of one seed from its steps by batch (tokens), and `above` or `below` if it is only a bound.

    Where the smallest batch itself did not reach the target there is no reference (nan); where a larger one did not,
    its steps are a lower bound and so B* is at most what they give.
    """
    batches = sorted(steps)
    first = batches[0]
    if steps[first].censored or not steps[first].steps:
        return math.nan, ""
    work = steps[first].steps * first
    excess = {batch: steps[batch].steps * batch / work for batch in batches}
    for below, above in pairwise(batches):
        if excess[above] >= EXCESS:
            share = math.log(EXCESS / excess[below]) / math.log(excess[above] / excess[below])
            return below * (above / below) ** share, "below" if steps[above].censored else ""
        if steps[above].censored:  # its excess may be anything from here on
            return float(below), "above"
    return float(batches[-1]), "above"


def critical(records: Sequence[Record], target: float) -> CriticalBatch:
    """Of one method's records at several batches, over the seeds."""
    found = [critical_batch(steps) for steps in _by_seed(records, target).values()]
    bounds = {bound for _, bound in found if bound}
    if any(math.isnan(value) for value, _ in found) or len(bounds) > 1:
        return CriticalBatch(math.nan, math.nan, math.nan, len(found))
    return _geometric([value for value, _ in found], "".join(bounds))


def scales_on(records: Sequence[Record], target: float) -> bool:
    """Whether B* of one method's records is above their largest batch on one seed at least."""
    return any(critical_batch(steps)[1] == "above" for steps in _by_seed(records, target).values())


def by_name(records: Sequence[Record], target: float) -> dict[str, CriticalBatch]:
    """Method -> B*; nan where the runs at the smallest batch are missing, from which the others' is reckoned."""
    smallest, unknown = _smallest(records), CriticalBatch(math.nan, math.nan, math.nan, 0)
    return {
        name: critical(runs, target) if _smallest(runs) == smallest else unknown
        for name, runs in by_method(records).items()
    }


def _smallest(records: Sequence[Record]) -> int:
    return min((record.config.outer_batch for record in records), default=0)


def _geometric(values: Sequence[float], bound: str = "") -> CriticalBatch:
    logs = estimate([math.log(value) for value in values])
    mean, half = math.exp(logs.mean), logs.half_width or 0.0
    return CriticalBatch(mean, mean / math.exp(half), mean * math.exp(half), len(values), bound)


def _by_seed(records: Sequence[Record], target: float) -> dict[int, dict[int, Crossing]]:
    seeds: dict[int, dict[int, Crossing]] = {}
    for record in sorted(records, key=lambda record: record.config.seed):
        seeds.setdefault(record.config.seed, {})[record.config.outer_batch_tokens] = crossing(record, target)
    return seeds


def fit(records: Sequence[Record], target: float) -> tuple[float, float]:
    """(a, c) of steps = a + c / batch (tokens), over the runs that reached the target; nan for fewer than 3 batches, as
    two are met exactly."""
    pairs = [(record.config.outer_batch_tokens, crossing(record, target)) for record in records]
    reached = [(batch, c.steps) for batch, c in pairs if not c.censored and c.steps]
    if len({batch for batch, _ in reached}) < 3:
        return math.nan, math.nan
    batch, steps = (np.array(column, dtype=float) for column in zip(*reached, strict=True))
    (floor, slope), *_ = np.linalg.lstsq(np.stack([1 / steps, 1 / (batch * steps)], 1), np.ones(len(steps)), rcond=None)
    if floor >= 0:
        return float(floor), float(slope)
    through = 1 / (batch * steps)  # without a floor: steps = c / batch
    return 0.0, float(through.sum() / (through**2).sum())


def table(records: Sequence[Record], target: float) -> pd.DataFrame:
    """One row a method: B*, and the floor and the scale of the fit, each over the seeds."""
    import pandas as pd

    rows, found = {}, by_name(records, target)
    for name, runs in by_method(records).items():
        seeds = sorted({record.config.seed for record in runs})
        fits = [fit([record for record in runs if record.config.seed == seed], target) for seed in seeds]
        rows[name] = {
            "n": len(seeds),
            "B* (tokens)": str(found[name]),
            "floor a (steps)": str(estimate([floor for floor, _ in fits])),
            "c / a (tokens)": _scale(fits),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _scale(fits: Sequence[tuple[float, float]]) -> str:
    if any(math.isnan(floor) or slope <= 0 for floor, slope in fits):  # or the steps grow with the batch
        return "-"
    return str(_geometric([slope / floor for floor, slope in fits])) if all(floor for floor, _ in fits) else "no floor"


def in_tokens(tokens: float) -> str:
    """Three digits and k or M, as in tables and figures."""
    return f"{tokens / 1e6:.3g} M" if tokens >= 1e6 else f"{tokens / 1e3:.3g} k"
