"""What a step costs: time, memory and matrix-product FLOPs of every method's inner step, beside a standard step.

All methods of a size are measured in one process, on random tokens and random weights, through the code that trains:
`OuterStep.inner_step`, optimiser and clipping included, on a CPU with a run's threads (one by default). `standard` is
AdamW on the loss, compiled where the others are.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gnlib import head
from gnlib.config import ComputeConfig, ConfigError, RunConfig
from gnlib.linearise import DecoderLinearisation
from gnlib.losses import CrossEntropy
from gnlib.methods import Changes
from gnlib.model import Decoder
from gnlib.objective import LinearisedObjective
from gnlib.outer_step import OuterStep, Purpose
from gnlib.precision import matmul_precision
from gnlib.processor import use_processor
from gnlib.profiles import find_profile, records_folder, run_config
from gnlib.record import environment

if TYPE_CHECKING:
    import pandas as pd

_PAPER = {"data.vocabulary": 32_000}
SIZES: dict[str, tuple[str, int, Changes]] = {
    "tiny": ("tiny", 8, {}),
    "laptop": ("laptop", 16, {}),
    "h200": ("h200", 64, {}),
    "45m": ("paper-45m", 32, _PAPER),
    "150m": ("paper-150m", 32, _PAPER),
}
"""Size -> profile, sequences of an inner batch, what differs from the profile."""
METHODS = {"standard": "adamw", "gn": "gauss_newton", "prox_linear": "prox_linear", "layerwise": "layerwise",
           "forward": "adamw"}  # fmt: skip
PRECISIONS = ("fp32", "tf32", "bf16")
WARM_UP = 5  # steps before the timed ones, the first of which compiles


@dataclass(frozen=True)
class Batch:
    """One batch of random tokens, again and again (`gnlib.outer_step.Stream`)."""

    inputs: Tensor
    targets: Tensor

    def take(self, count: int, purpose: Purpose = "train") -> tuple[Tensor, Tensor]:
        return self.inputs[:count], self.targets[:count]


def bench(
    sizes: Sequence[str], precisions: Sequence[str], methods: Sequence[str] = tuple(METHODS), steps: int = 20,
    compiled: bool | None = None, on_row: Callable[[dict[str, Any]], None] = lambda row: None, kernels: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per size, precision and method; `on_row` is called with each. ConfigError for an unknown name.

    A row has size, method, precision, device, ms (median over n steps), tokens_per_s, peak_gib (GPU only),
    ratio_to_standard, n; then first_call_s (compilation included), tflop (counted from the layers' shapes), ceiling
    (share of the rate of one large matrix product measured in the same run), parts (ms, for gn) and the versions; and,
    if asked for, the `kernels` that take most of a step (`kernel_times`).
    """
    for what, names, allowed in (("size", sizes, SIZES), ("precision", precisions, PRECISIONS),
                                 ("method", methods, METHODS)):  # fmt: skip
        for name in names:
            if name not in allowed:
                raise ConfigError(f"{what}: no {what} {name!r}; allowed: {', '.join(allowed)}")
    if steps < 1:
        raise ConfigError(f"steps: {steps}; at least 1")
    if kernels < 0:
        raise ConfigError(f"kernels: {kernels}; at least 0")
    rows = []
    for size in sizes:
        for precision in precisions:
            for row in _compare(size, precision, list(dict.fromkeys(["standard", *methods])), steps, compiled, kernels):
                on_row(row)
                rows.append(row)
    return rows


def _compare(
    size: str, precision: str, methods: Sequence[str], steps: int, compiled: bool | None, kernels: int
) -> Any:
    """Rows of one size and precision; the standard step is timed before and after all others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {method: _Run(size, method, precision, device, compiled) for method in methods}
    use_processor(runs["standard"].config.compute.threads)  # as training does
    ceiling = matmul_rate(precision, device)
    found = {method: run.measure(steps, kernels) for method, run in runs.items()}
    again = runs["standard"].measure(steps)
    standard = statistics.median([*found["standard"].pop("times"), *again["times"]])
    for method, row in found.items():
        times = row.pop("times", None)
        ms = standard if times is None else statistics.median(times)
        rate = row["tflop"] / ms * 1e3
        yield {
            "size": size, "method": method, "precision": precision, "device": _device_name(device), "ms": round(ms, 3),
            "tokens_per_s": round(row.pop("tokens") / ms * 1e3), "peak_gib": row.pop("peak_gib"),
            "ratio_to_standard": round(ms / standard, 3), "n": 2 * steps if times is None else steps, **row,
            "ceiling": round(rate / ceiling, 3), "ceiling_tflop_per_s": round(ceiling, 2), **_versions(device),
        }  # fmt: skip


class _Run:
    """One method of one size; its model lives while it is measured, so that the peak of memory is its own."""

    def __init__(self, size: str, method: str, precision: str, device: torch.device, compiled: bool | None) -> None:
        profile, self.sequences, changes = SIZES[size]
        self.method, self.device = method, device
        self.config = run_config(profile, METHODS[method], use_tuned=False).replace(
            changes,
            {
                "compute.precision": precision,
                "compute.compile": device.type == "cuda" if compiled is None else compiled,
                "compute.micro_batch": self.sequences,
                "method.inner.steps": 1,
                "outer_batch": self.sequences,
            },
        )

    def measure(self, steps: int, kernels: int = 0) -> dict[str, Any]:
        config, device = self.config, self.device
        torch._dynamo.reset()
        model = Decoder.from_config(config).to(device)
        outer = OuterStep(model, CrossEntropy(), config)
        batch = random_batch(config, self.sequences, device)
        step = self._forward(outer, batch) if self.method == "forward" else self._inner(outer, batch)
        _reset_peak(device)
        began = time.perf_counter()
        units = step()
        _synchronise(device)
        first = time.perf_counter() - began
        times = timed(step, steps, device)
        row = {
            "times": times,
            "tokens": batch.inputs.numel(),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
            "first_call_s": round(first, 2),
            "tflop": round(units * self.sequences * sum(model.layer_flops()) / 1e12, 6),
        }
        if self.method == "gn":
            row["parts"] = _parts(outer, batch, statistics.median(times), steps)
        if kernels:
            row["kernels"] = kernel_times(step, device)[:kernels]
        del model, outer, step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def _inner(self, outer: OuterStep, batch: Batch) -> Callable[[], float]:
        return lambda: outer.inner_step(batch, self.sequences, 1e-3)[1]  # a small rate: the weights stay sound

    def _forward(self, outer: OuterStep, batch: Batch) -> Callable[[], float]:
        def loss() -> float:
            with matmul_precision(self.config.compute, self.device):
                outer.forward_loss(outer.model, batch.inputs, batch.targets)
            return 1.0

        return loss


def shipped(profile: str) -> list[dict[str, Any]]:
    """The rows measured on the profile's machine (data/records/<profile>/bench.json); none if it was not."""
    find_profile(profile)
    path = records_folder(profile) / "bench.json"
    return json.loads(path.read_text()) if path.exists() else []


def random_batch(config: RunConfig, sequences: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (2, sequences, config.data.sequence_length)
    inputs, targets = torch.randint(config.data.vocabulary, shape, generator=generator).to(device)
    return Batch(inputs, targets)


def timed(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each step, one after another as in training: on a GPU by events, without waiting in between."""
    for _ in range(WARM_UP):
        step()
    _synchronise(device)
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        _synchronise(device)
        return [before.elapsed_time(after) for before, after in pairwise(events)]
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def kernel_times(step: Callable[[], object], device: torch.device, steps: int = 5) -> list[dict[str, Any]]:
    """The kernels of a step, on a CPU torch's operators, by torch's profiler: {name, ms and calls a step}, the longest
    first. The time of each is its own, without those that it calls."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its notes of every start and stop are above errors, at 5
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(steps):
            step()
        _synchronise(device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    rows = [
        {"name": event.key, "ms": round(getattr(event, own) / 1e3 / steps, 4), "calls": event.count / steps}
        for event in profiled.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def matmul_rate(precision: str, device: torch.device) -> float:
    """TFLOP/s of one large product of random matrices in that precision: what a step could reach at most."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with matmul_precision(ComputeConfig(precision=precision), device):
        ms = statistics.median(timed(lambda: a @ b, 10, device))
    return 2 * size**3 / ms / 1e9


def _parts(outer: OuterStep, batch: Batch, total: float, steps: int) -> dict[str, float]:
    """Milliseconds of a Gauss-Newton inner step by part, each timed by itself; the optimiser takes the rest."""
    model, objective, compute = outer.model, outer.objective, outer.config.compute
    assert isinstance(model, Decoder) and isinstance(objective, LinearisedObjective)
    anchor = {name: p.detach() for name, p in model.named_parameters()}
    delta = {name: outer.solution[name].detach() - p for name, p in anchor.items()}
    targets = batch.targets.flatten()
    with matmul_precision(compute, outer.device):

        def primal() -> DecoderLinearisation:
            return DecoderLinearisation(model, batch.inputs, compute.compile)

        here = primal()
        dx = here.feature_tangent(delta)
        assert dx is not None
        change = head.Change(dx.flatten(0, -2), delta["head.weight"])

        @torch.no_grad()
        def logits() -> head.Derivative:
            x = here.features.detach().flatten(0, -2)
            return head.derivatives(x, anchor["head.weight"], targets, [change], objective.expand)[1][0]

        cotangent = logits().features
        assert cotangent is not None
        below = [name for name in delta if name != "head.weight"]
        pieces = {
            "primal": primal,
            "tangent": lambda: here.feature_tangent(delta),
            "head and loss": logits,
            "pullback": lambda: here.feature_pullback(cotangent, below),
        }
        parts = {name: statistics.median(timed(piece, steps, outer.device)) for name, piece in pieces.items()}
    parts["optimiser"] = max(0.0, total - sum(parts.values()))
    return {name: round(ms, 3) for name, ms in parts.items()}


def _versions(device: torch.device) -> dict[str, Any]:
    found = environment(device)
    return {name: found[name] for name in ("torch", "python", "gnlib")}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per size, precision and method: what a step takes, and its share of the matrix-product ceiling."""
    import pandas as pd

    if not rows:
        raise ConfigError("rows: none were measured; `gnlib bench --json FILE` does (h200's are shipped)")
    columns = ["ms", "tokens_per_s", "peak_gib", "ratio_to_standard", "ceiling", "first_call_s", "n"]
    return pd.DataFrame(rows).set_index(["size", "precision", "method"])[columns]


def as_text(row: dict[str, Any] | None) -> str:
    """One line a row, then one a kernel; None gives the heading."""
    if row is None:
        return f"{'size':7}{'method':13}{'prec.':7}{'ms':>9}{'tokens/s':>12}{'GiB':>7}{'/ standard':>12}{'ceiling':>9}"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return (
        f"{row['size']:7}{row['method']:13}{row['precision']:7}{row['ms']:9.2f}{row['tokens_per_s']:12,d}{peak:>7}"
        f"{row['ratio_to_standard']:12.2f}{row['ceiling']:9.0%}"
        + "".join(f"\n{one['ms']:36.2f}  {one['calls']:4g} x {one['name'][:60]}" for one in row.get("kernels", ()))
    )
