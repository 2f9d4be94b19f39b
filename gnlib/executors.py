"""How runs are run on this machine: several processes at a time, or one after another; by name.

`processes` makes each run a process of its own (`gnlib train --config`), so that a failing one does not stop the others
and a killed study loses nothing that a run has checkpointed; `jobs` of them run at once, dealt out over the GPUs if
there are any. `inline` trains one after another in this process (tests, debuggers).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

import torch
from tqdm.auto import tqdm

from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.estimate import cost
from gnlib.files import home, replacing
from gnlib.methods import label
from gnlib.record import Row
from gnlib.train import PARENT, OnRow, is_start, run_folder, train

POLL_SECONDS = 0.2
_INLINE = Lock()


class StudyError(RuntimeError):
    """Runs that failed, or that are missing where nothing may be trained; one line a run."""


class UnfinishedError(StudyError):
    """Stopped when its time was over, or for Ctrl-C; the same command continues."""


class Slots:
    """Places for runs of this machine, `count` at a time, which the threads of a sweep share, dealt out to its GPUs."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ConfigError(f"jobs: {count}; at least 1")
        self.count, self.closed = count, False
        self.gpus = [_gpu(slot) for slot in range(count)]
        self._work: dict[int, float] = {}  # of the slots that are taken
        self._lock = Lock()

    def take(self, work: float) -> int | None:
        """A free slot of the GPU with the least work under way (in any unit), or None."""
        with self._lock:
            free = [slot for slot in range(self.count) if slot not in self._work]
            if not free:
                return None
            chosen = min(free, key=self._load)
            self._work[chosen] = work
            return chosen

    def give(self, slot: int) -> None:
        with self._lock:
            del self._work[slot]

    def _load(self, slot: int) -> float:
        """On a slot's GPU."""
        return sum(work for other, work in self._work.items() if self.gpus[other] == self.gpus[slot])

    def close(self) -> None:
        """Have every thread end its runs; they continue from their checkpoints next time."""
        self.closed = True


Jobs = int | Slots | None
"""Runs at a time; None is one per core or GPU."""


def describe(config: RunConfig, method: str | None = None) -> str:
    """A run in a few words, with the name of its folder, or before its text is prepared that of a shipped record;
    `method` is the label of a variant, which its configuration does not tell."""
    name = config.run_id if config.data.fingerprint else config.recipe_id
    who = method or ("the start of all runs" if is_start(config) else label(config))
    what = f"{who}, batch {config.outer_batch}, lr {config.method.inner.lr:g}"
    return f"{what}, seed {config.seed} ({name})"


@dataclass
class _Job:
    config: RunConfig
    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    bar: tqdm[None]


def executor_named(name: str | None) -> Executor:
    """Of EXECUTORS: the one named, else $GNLIB_EXECUTOR, else processes; ConfigError for another."""
    name = name or os.environ.get("GNLIB_EXECUTOR", "processes")
    if name not in EXECUTORS:
        raise ConfigError(f"executor: no executor {name!r}; allowed: {', '.join(EXECUTORS)}")
    return EXECUTORS[name]


def check_arguments(jobs: int | None, executor: str | None) -> None:
    """ConfigError for what `run_study` would refuse once it came to it."""
    if jobs is not None:
        Slots(jobs)
    executor_named(executor)


def execute(
    configs: Sequence[RunConfig], jobs: Jobs = None, keep_weights: bool = False, executor: str | None = None
) -> None:
    """Run configurations by an executor (`executor_named`)."""
    executor_named(executor)(configs, jobs, keep_weights)


def run_inline(configs: Sequence[RunConfig], jobs: Jobs, keep_weights: bool) -> None:
    """One after another in this process, whatever `jobs`; a sweep that is over begins no other."""
    for config in configs:
        with _INLINE:
            if isinstance(jobs, Slots) and jobs.closed:
                raise UnfinishedError(f"stopped before {describe(config)}")
            train(config, keep_weights=keep_weights)


def run_processes(configs: Sequence[RunConfig], jobs: Jobs, keep_weights: bool) -> None:
    """`jobs` at a time (default: one a GPU, else as many as the cores allow), each with a progress bar."""
    waiting, failed = list(configs), []
    running: list[_Job] = []
    shared = isinstance(jobs, Slots)  # by a sweep, which has a bar of its own
    slots = jobs if isinstance(jobs, Slots) else Slots(default_jobs(configs) if jobs is None else jobs)
    overall = tqdm(total=len(waiting), desc=f"{len(waiting)} runs", unit="run", disable=shared or len(waiting) < 2)
    try:
        while waiting or running:
            if slots.closed:
                raise UnfinishedError(f"stopped with {len(waiting) + len(running)} to run")
            while waiting and (slot := slots.take(cost(waiting[0]))) is not None:
                running.append(_launched(slots, slot, waiting.pop(0), keep_weights))
            for job in running.copy():
                _show(job)
                if job.process.poll() is not None:
                    running.remove(job)
                    slots.give(job.slot)
                    job.bar.close()
                    overall.update()
                    if job.process.returncode:
                        failed.append(_report(job))
            time.sleep(POLL_SECONDS)  # here, so that another thread may take what was given back
    finally:
        for job in running:  # Ctrl-C: the runs continue from their checkpoints next time
            job.process.terminate()
            job.bar.close()
        for job in running:
            job.process.wait()  # its memory is free before another run takes the slot
            slots.give(job.slot)
        overall.close()
    if failed:
        raise StudyError("\n".join(failed))


Executor = Callable[[Sequence[RunConfig], Jobs, bool], None]  # runs, how many at once, whether to keep weights
EXECUTORS: dict[str, Executor] = {"processes": run_processes, "inline": run_inline}


def default_jobs(configs: Sequence[RunConfig]) -> int:
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    threads = max((config.compute.threads for config in configs), default=1)
    return max(1, len(os.sched_getaffinity(0)) // threads)


def _launched(slots: Slots, slot: int, config: RunConfig, keep_weights: bool) -> _Job:
    """A run that cannot be launched gives its slot back."""
    try:
        return _launch(config, slot, slots.gpus[slot], keep_weights)
    except BaseException:
        slots.give(slot)
        raise


def _launch(config: RunConfig, slot: int, gpu: str, keep_weights: bool) -> _Job:
    folder = run_folder(config)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(config.model_dump_json(indent=1) + "\n")
    command = [sys.executable, "-m", "gnlib", "train", "--config", str(folder / "config.json"), "--quiet"]
    command += ["--keep-weights"] if keep_weights else []
    environment = os.environ | {"OMP_NUM_THREADS": str(config.compute.threads), "GNLIB_HOME": str(home())}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = folder / "log.txt"
    with open(log, "wb") as file:
        process = _spawn(command, environment, file)
    bar = tqdm(total=config.outer_steps, desc=describe(config), unit="step", position=slot + 1, leave=False)
    return _Job(config, slot, process, log, bar)


def _gpu(slot: int) -> str:
    """The GPUs that this process may see, in turn; their numbers are the machine's, not this process's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(max(1, torch.cuda.device_count()))]
    return names[slot % len(names)]


def _spawn(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    known = environment | {PARENT: str(os.getpid())}
    return subprocess.Popen(command, env=known, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _show(job: _Job) -> None:
    record = records.read(run_folder(job.config) / "record.jsonl")
    if record is not None and record.rows and record.rows[-1]["outer_step"] > job.bar.n:
        show_row(job.bar, record.rows[-1])


@contextmanager
def progress_bars(config: RunConfig, quiet: bool = False) -> Iterator[OnRow]:
    """What `train` calls with its rows: a bar of the run, and one below it while its start is made."""
    with ExitStack() as open_bars:

        def opened(of: RunConfig, name: str, position: int) -> tqdm[None]:
            below = {"position": position, "leave": position == 0, "disable": quiet}
            return open_bars.enter_context(tqdm(total=of.outer_steps, desc=name, unit="step", **below))

        bars = {config.run_id: opened(config, describe(config), 0)}

        def on_row(of: RunConfig, row: Row) -> None:
            if of.run_id not in bars:
                bars[of.run_id] = opened(of, describe(of), 1)
            show_row(bars[of.run_id], row)

        yield on_row


def show_row(bar: tqdm[None], row: Row) -> None:
    """Bring a run's progress bar to an evaluated step."""
    loss = row["val_loss"]
    bar.set_postfix_str("loss -" if loss is None else f"loss {loss:.3f}", refresh=False)
    bar.update(row["outer_step"] - bar.n)


def _report(job: _Job) -> str:
    tail = job.log.read_text(errors="replace").strip().splitlines()[-3:] or ["no output"]
    return f"{describe(job.config)} failed with exit code {job.process.returncode}: {' | '.join(tail)}"
