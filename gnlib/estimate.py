"""What runs will cost before they start: tokens exactly, time from the measured speed of the records there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Literal

from gnlib.blocks import partition
from gnlib.config import CONJUGATE_GRADIENT, ConfigError, DataConfig, ModelConfig, RunConfig
from gnlib.conjugate_gradient import most_passes
from gnlib.flops import gradient_units
from gnlib.line_search import step_sizes
from gnlib.model import shapes_only
from gnlib.record import Record


@dataclass(frozen=True)
class Cost:
    """Of several runs at most: a run may stop early."""

    runs: int
    tokens: int
    """For training and line search."""
    seconds: float | None
    """Of one process after the other; None where there is no record to measure speed by."""

    def __str__(self) -> str:
        time = "time unknown" if self.seconds is None else f"about {_duration(self.seconds)} of one process"
        return f"{self.runs} to run, at most {self.tokens / 1e6:.1f} M tokens, {time}"

    def with_jobs(self, jobs: int) -> str:
        """The same with what `jobs` runs at a time would take; ConfigError for none at a time."""
        if jobs < 1:
            raise ConfigError(f"jobs: {jobs}; at least 1")
        jobs = min(jobs, self.runs)
        return str(self) if self.seconds is None else f"{self}, {_duration(self.seconds / jobs)} with {jobs} at a time"


def estimate(configs: Sequence[RunConfig], measured: Iterable[Record]) -> Cost:
    """The cost of `configs`, by the median speed of measured runs of the same kind; of all runs if there is none."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for record in measured:
        if (seconds := record.rows[-1]["wall_s"]) > 0:
            speeds.setdefault(_kind(record.config), []).append(cost(record.config, steps_done(record)) / seconds)
    everything = [speed for group in speeds.values() for speed in group]
    tokens = sum(sequences_read(config) * config.data.sequence_length for config in configs)
    if not everything:
        return Cost(len(configs), tokens, None)
    seconds = sum(cost(config) / median(speeds.get(_kind(config), everything)) for config in configs)
    return Cost(len(configs), tokens, seconds)


def cost(config: RunConfig, steps: int | None = None) -> float:
    """Of a run of so many outer steps (all by default), in forward passes of a sequence, evaluation not included; with
    conjugate gradients at most, as they may end before their last iteration."""
    method, steps = config.method, config.outer_steps if steps is None else steps
    units = 3.0
    if method.inner.optimizer == CONJUGATE_GRADIENT:
        units = most_passes(_units_by_block(config.model, config.data, method.blocks), method, config.outer_batch)
    elif method.objective != "loss":
        units = 1.0 + sum(alone - 1.0 for alone in _units_by_block(config.model, config.data, method.blocks))
    searched = len(step_sizes(method.line_search)) * method.line_search.fraction if method.line_search else 0.0
    return steps * config.outer_batch * (units + searched)


@cache
def _units_by_block(size: ModelConfig, data: DataConfig, blocks: Literal["full", "layerwise", "matrix"]) -> list[float]:
    """Of each block's gradient by itself, its own primal included."""
    model = shapes_only(RunConfig(model=size, data=data))
    return [gradient_units(model, [block]) for block in partition(model, blocks)]


def sequences_read(config: RunConfig) -> int:
    """For training and line search, by a run that takes all its steps."""
    searched = config.method.line_search.fraction if config.method.line_search else 0.0
    return round(config.outer_steps * config.outer_batch * (1 + searched))


def steps_done(record: Record) -> int:
    return record.rows[-1]["outer_step"]


def _kind(config: RunConfig) -> tuple[str, str]:
    return config.method.blocks, config.method.inner.optimizer if config.method.objective == "loss" else "linearised"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
