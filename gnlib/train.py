"""The only training loop, for every method: outer steps, evaluation, record, checkpoint.

A run lives in data/runs/<run_id>/ with record.jsonl, checkpoint.pt while it is under way, and weights.pt if asked for.
The same call continues a killed run, with the losses bit for bit those of an uninterrupted one on CPU, and does
nothing for a finished one.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnlib import record as records
from gnlib.average import Average
from gnlib.config import ConfigError, MethodConfig, RunConfig
from gnlib.data import TokenStream, validation_batches
from gnlib.files import data_folder, exclusive, read_tensors, replacing
from gnlib.import_path import source_hash
from gnlib.losses import CrossEntropy
from gnlib.model import Decoder, parameter_count, shapes_only
from gnlib.objective import forward_loss
from gnlib.optimizers import try_out
from gnlib.outer_step import OuterStep, StepInfo
from gnlib.precision import matmul_precision
from gnlib.prepare import prepare
from gnlib.processor import use_processor
from gnlib.record import Record, Row

TOKENS_PER_PARAMETER = 20  # Chinchilla (arXiv 2203.15556)
START_TOKENS = 1 << 15
DIVERGED = 1.5  # times the loss at the start

OnRow = Callable[[RunConfig, Row], None]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_folder(config: RunConfig) -> Path:
    return data_folder() / "runs" / config.run_id


PARENT = "GNLIB_PARENT"  # in the environment of a run that a study has started: the study's process


def _orphaned() -> bool:
    """Whether the study that started this process is gone, as with a notebook's kernel that was killed."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)


def pinned(config: RunConfig, progress: bool = True) -> RunConfig:
    """The configuration with its data prepared and their fingerprint filled in, which makes the run's name final.

    ConfigError if its batch or that of its start is larger than the text: it would hold some sequences twice.
    """
    files = prepare(config.data, progress)
    most, start = files.sequences("train"), config.start.batch if config.start.chinchilla_fraction else 0
    for field, batch in (("outer_batch", config.outer_batch), ("start.batch", start)):
        if batch > most:
            raise ConfigError(f"{field}: {batch} sequences; allowed: at most the text's {most}")
    known = {"data.fingerprint": files.fingerprint, "method.inner.source": source_hash(config.method.inner.optimizer)}
    return config.replace(known)


def train(
    config: RunConfig,
    device: torch.device | None = None,
    on_row: OnRow | None = None,
    checkpoint_seconds: float = 20.0,
    keep_weights: bool = False,
) -> Record:
    """Run a configuration to its end, or continue it, and return its record.

    `on_row` is called with every new row, and with those of the start if that has to be made first. A checkpoint is
    written when `checkpoint_seconds` have passed since the last one: a killed run loses at most that. Raises
    ConfigError before anything runs if the data do not fit.

    The process is left with `compute.threads` threads, with torch's generators where the run left them, and with its
    choice of attention kernels and of determinism.
    """
    check(config)
    config = pinned(config)
    folder = run_folder(config)
    with exclusive(folder / "run"):
        done = records.read(folder / "record.jsonl")
        if done is not None and done.config != config:
            raise ConfigError(f"{folder}: holds a run made with other defaults; move it away")
        if done is not None and done.ended and (not keep_weights or (folder / "weights.pt").exists()):
            return done
        ended = done if done is not None and done.ended else None  # its record stays: it runs again for its weights
        run = _Run(config, device or default_device(), folder / "again" if ended else folder, on_row)
        run.loop(checkpoint_seconds)
        if keep_weights:
            _save(folder / "weights.pt", run.model.state_dict())
        if ended:
            shutil.rmtree(folder / "again")
        return ended or run.record


def check(config: RunConfig) -> None:
    """Raise ConfigError for a method that cannot be built, before any text is prepared: on a model without memory; and
    for an optimiser of your own that cannot step."""
    try_out(config.method.inner)
    OuterStep(shapes_only(config), CrossEntropy(), config)


def start_config(config: RunConfig) -> RunConfig:
    """The AdamW run whose last weights every run with the same model, data and `start` begins from."""
    start = config.start
    tokens = start.chinchilla_fraction * TOKENS_PER_PARAMETER * parameter_count(config)
    steps = math.ceil(tokens / (start.batch * config.data.sequence_length))
    inner = {"optimizer": "adamw", "lr": start.lr, "warmup": start.warmup, "final": 0.1}
    return RunConfig.parse(
        {
            "model": config.model,
            "data": config.data,
            "start": {"chinchilla_fraction": 0.0},
            "method": MethodConfig.model_validate({"inner": inner}),
            "outer_steps": steps,
            "outer_batch": start.batch,
            "evaluation": {"every": max(1, steps // 10), "sequences": config.evaluation.sequences},
            # eager and deterministic: every machine of a kind makes the same start
            "compute": config.compute.model_copy(
                update={"micro_batch": _start_micro_batch(config), "compile": False, "deterministic": True}
            ),
            "seed": start.seed,
        }
    )


def is_start(config: RunConfig) -> bool:
    """Whether it is what `start_config` makes of the runs that begin from it, of any length."""
    if config.start.chinchilla_fraction:
        return False
    inner = config.method.inner
    own = {"batch": config.outer_batch, "lr": inner.lr, "warmup": inner.warmup, "seed": config.seed}
    begins = {f"start.{name}": value for name, value in own.items()} | {"start.chinchilla_fraction": 1.0}
    length = {"outer_steps": config.outer_steps, "evaluation.every": config.evaluation.every}
    return start_config(config.replace(begins)).replace(length) == config


def _start_micro_batch(config: RunConfig) -> int:
    """Sequences at once, whatever the run's own are, so that all runs have one start: the most that divide the batch
    and have at most 2^15 tokens, whose logits fit a GPU in eager mode."""
    batch, most = config.start.batch, max(1, START_TOKENS // config.data.sequence_length)
    return next(size for size in range(min(batch, most), 0, -1) if batch % size == 0)


def start_weights(config: RunConfig, device: torch.device, on_row: OnRow | None = None) -> dict[str, Tensor] | None:
    """Weights of the shared start checkpoint, made if missing; None for a start from the initialisation."""
    if config.start.chinchilla_fraction == 0:
        return None
    start = pinned(start_config(config))
    train(start, device, on_row, keep_weights=True)
    return dict(read_tensors(run_folder(start) / "weights.pt", device))


class _Run:
    """One run's state: everything that a checkpoint holds."""

    def __init__(self, config: RunConfig, device: torch.device, folder: Path, on_row: OnRow | None) -> None:
        self.config, self.device, self.folder = config, device, folder
        self.on_row = on_row or (lambda config, row: None)
        files = prepare(config.data)
        self.model = Decoder.from_config(config).to(device)
        weights = start_weights(config, device, on_row)  # may train, with settings of its own
        if weights is not None:
            self.model.load_state_dict(weights)
        if device.type == "cuda":  # what the start or a run before in this process took is not this run's
            torch.cuda.reset_peak_memory_stats(device)
        use_processor(config.compute.threads)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
        torch.use_deterministic_algorithms(config.compute.deterministic, warn_only=True)
        if device.type == "cuda":  # the fused attention backward adds up in any order
            for fused in ("flash", "mem_efficient", "cudnn"):
                getattr(torch.backends.cuda, f"enable_{fused}_sdp")(not config.compute.deterministic)
        torch.manual_seed(config.seed)  # for optimisers of one's own that draw numbers; ours have generators
        loss = CrossEntropy()
        self.stream = TokenStream(files, config.seed, device)
        self.method = OuterStep(self.model, loss, config)
        self.average = Average(self.model, config.evaluation.average)
        self.forward_loss = forward_loss(loss, config.compute.compile)
        size = min(config.compute.micro_batch, config.evaluation.sequences)
        self.validation = list(validation_batches(files, config.evaluation.sequences, size, device))
        self.sequence_flops = sum(self.model.layer_flops())
        self.flops, self.wall_s, self.peak_bytes = 0.0, 0.0, 0
        self.record = Record(config, records.environment(device))
        self._resume()

    def loop(self, checkpoint_seconds: float) -> None:
        every, last = self.config.evaluation.every, self.config.outer_steps
        if not self.record.rows:
            self._append(self._row(None))
        saved = time.monotonic()
        while self.method.done < last and not self._diverged() and not self._reached():
            if _orphaned():
                raise KeyboardInterrupt
            info = self._timed_step()
            if self.method.done % every == 0 or self.method.done == last or not math.isfinite(info.train_loss):
                self._append(self._row(info))
            if time.monotonic() - saved > checkpoint_seconds:
                _save(self.folder / "checkpoint.pt", self._state())
                saved = time.monotonic()
        self.record.status = "diverged" if self._diverged() else "finished"
        records.append(self.folder / "record.jsonl", {"status": self.record.status})
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def _timed_step(self) -> StepInfo:
        began = time.perf_counter()
        info = self.method.step(self.stream)  # ends with .item(), so the GPU is done
        self.average.update(self.model)
        self.wall_s += time.perf_counter() - began
        self.flops += info.forward_passes * self.sequence_flops
        self.peak_bytes = max(self.peak_bytes, _peak_bytes(self.device))
        return info

    def _row(self, info: StepInfo | None) -> Row:
        return Row(
            outer_step=self.method.done,
            tokens_train=self.stream.tokens_train,
            tokens_search=self.stream.tokens_search,
            flops=self.flops,
            wall_s=round(self.wall_s, 3),
            peak_bytes=self.peak_bytes,
            train_loss=records.finite(info.train_loss) if info else None,
            val_loss=records.finite(self.evaluate()),
            step_size=info.step_size if info else None,
            search_gain=records.finite(info.search_gain) if info and info.search_gain is not None else None,
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the validation sequences, nats per token, of the averaged parameters if asked for."""
        total, sequences = 0.0, 0
        with self.average.in_place(self.model), matmul_precision(self.config.compute, self.device):
            for inputs, targets in self.validation:
                total += self.forward_loss(self.model, inputs, targets).item() * len(inputs)
                sequences += len(inputs)
        return total / sequences

    def _diverged(self) -> bool:
        """A loss that is not finite, or far above the start."""
        rows = self.record.rows
        loss, start = rows[-1]["val_loss"], rows[0]["val_loss"]
        missing = len(rows) > 1 and rows[-1]["train_loss"] is None
        return loss is None or start is None or missing or loss > DIVERGED * start

    def _reached(self) -> bool:
        """The loss that is all this run was for."""
        loss, stop = self.record.rows[-1]["val_loss"], self.config.evaluation.stop_below
        return stop is not None and loss is not None and loss <= stop

    def _append(self, row: Row) -> None:
        self.record.rows.append(row)
        if len(self.record.rows) == 1:
            records.write(self.folder / "record.jsonl", self.record)
        else:
            records.append(self.folder / "record.jsonl", row)
        self.on_row(self.config, row)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "stream": self.stream.state_dict(),
            "average": self.average.state_dict(),
            "costs": [self.flops, self.wall_s, self.peak_bytes],
            "generators": _generators(self.device),
            "rows": len(self.record.rows),
        }

    def _resume(self) -> None:
        """Continue from the checkpoint if there is one, with the record cut back to it; else start anew."""
        checkpoint, path = self.folder / "checkpoint.pt", self.folder / "record.jsonl"
        earlier = records.read(path)
        if earlier is None or not checkpoint.exists():
            checkpoint.unlink(missing_ok=True)  # without the rows before it, it is of no use
            return
        state = read_tensors(checkpoint, self.device)
        rows = [row for row in earlier.rows if row["outer_step"] <= state["method"]["done"]]
        if len(rows) < state.get("rows", 0):  # a machine that went down may have kept the checkpoint and not the rows
            checkpoint.unlink()
            return
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        self.stream.load_state_dict(state["stream"])
        self.average.load_state_dict(state["average"])
        self.flops, self.wall_s, self.peak_bytes = state["costs"]
        self.record.rows = rows
        _set_generators(state.get("generators", {}), self.device)  # an older checkpoint has none
        records.write(path, self.record)


def _save(path: Path, state: Any) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's own."""
    found = {"cpu": torch.get_rng_state()}
    return found | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else found


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
