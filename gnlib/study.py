"""A study: a declared list of runs. Finds what exists, runs what is missing on this machine, reports what failed.

The executor is chosen by name. `processes` makes each run a process of its own (`gnlib train --config`), so that a
failing one does not stop the others and a killed study loses nothing that a run has checkpointed; `jobs` of them run at
once, dealt out over the GPUs if there are any. `inline` trains one after another in this process (tests, debuggers).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

import torch
from tqdm.auto import tqdm

from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.estimate import cost, estimate
from gnlib.files import data_folder, home, replacing
from gnlib.methods import label
from gnlib.profiles import records_folder
from gnlib.record import Record, Row
from gnlib.train import PARENT, OnRow, check, pinned, run_folder, start_config, train

POLL_SECONDS = 0.2
_STARTING, _INLINE = Lock(), Lock()


class StudyError(RuntimeError):
    """Runs that failed, or that are missing where nothing may be trained; one line a run."""


class UnfinishedError(StudyError):
    """Stopped when its time was over, or for Ctrl-C; the same command continues."""


class Slots:
    """Places for runs of this machine, `count` at a time, which the threads of a sweep share."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ConfigError(f"jobs: {count}; at least 1")
        self.count, self.closed = count, False
        self._free = deque(range(count))  # its operations are atomic

    def take(self) -> int | None:
        """A free slot, or None."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def give(self, slot: int) -> None:
        self._free.append(slot)

    def close(self) -> None:
        """Have every thread end its runs; they continue from their checkpoints next time."""
        self.closed = True


Jobs = int | Slots | None
"""Runs at a time; None is one per core or GPU."""


def find(configs: Sequence[RunConfig], profile: str, fresh: bool = False) -> list[Record | None]:
    """The ended record of each configuration, or None.

    Shipped records, named by their recipes, come first and data/runs second; `fresh` looks at data/runs alone. A record
    counts if its recipe is the same, and there its text where the configuration names one: on another Python version
    the default corpus differs a little, and the shipped record says which it was.
    """
    names = [config.recipe_id for config in configs]
    found: dict[str, Record] = {}
    if not fresh:
        shipped = (path for name in names if (path := records_folder(profile) / f"{name}.jsonl").exists())
        found = {record.config.recipe_id: record for record in load(shipped) if record.ended}
    if missing := set(names) - found.keys():
        texts = {config.recipe_id: config.data.fingerprint for config in configs}
        for record in load(run_files(), missing):
            if record.ended and texts[record.config.recipe_id] in (None, record.config.data.fingerprint):
                found[record.config.recipe_id] = record
    return [found.get(name) for name in names]


def run_files() -> list[Path]:
    """The records of this machine, the latest last: of a recipe that was run on several texts it counts."""
    return sorted((data_folder() / "runs").glob("*/record.jsonl"), key=lambda path: (path.stat().st_mtime, path))


def of_one_text(records: list[Record], what: str) -> list[Record]:
    """The records, or StudyError if they were not all run on the same text: their losses cannot be compared.

    CPython's docstrings differ between its versions, and a recipe does not name the version.
    """
    texts = sorted({str(record.config.data.fingerprint) for record in records})
    if len(texts) > 1:
        raise StudyError(f"{what}: its records come from different texts ({', '.join(texts)}); see --fresh")
    return records


def load(paths: Iterable[Path], recipes: Container[str] | None = None) -> Iterable[Record]:
    """The records in files, or only those of some recipes; unreadable ones are skipped with a warning."""
    for path in paths:
        try:
            config = records.read_config(path) if recipes is not None else None
            chosen = recipes is None or (config is not None and config.recipe_id in recipes)
            record = records.read(path) if chosen else None
        except ConfigError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        if record is not None:
            yield record


def run_study(
    configs: Sequence[RunConfig],
    profile: str,
    fresh: bool = False,
    allow_run: bool | None = None,
    jobs: Jobs = None,
    command: str = "gnlib study",
    executor: str | None = None,
) -> list[Record]:
    """Records of all configurations, in order; what is missing is run first, with progress bars.

    `fresh` ignores shipped records; `executor` is a name of EXECUTORS. With `allow_run` False (the default where $CI is
    set) a missing record raises StudyError, naming `command`. Runs that fail raise StudyError after all others have
    ended.
    """
    if allow_run is None:
        allow_run = not os.environ.get("CI")
    if fresh and allow_run:
        configs = [pinned(config) for config in configs]  # of the text there is now, not of one that it replaced
    missing = [config for config, record in zip(configs, find(configs, profile, fresh), strict=True) if record is None]
    if missing and not allow_run:
        raise StudyError(
            f"{len(missing)} of {len(configs)} records are missing, the first is {describe(missing[0])}; run: {command}"
        )
    if missing:
        for config in missing:
            check(config)
        missing = sorted((pinned(config) for config in missing), key=cost, reverse=True)  # the longest first
        starts = {start.run_id: start for start in map(start_config, missing) if start.outer_steps}
        if starts:
            with _STARTING:  # the settings of a sweep share it
                unended = [start for start in starts.values() if _unended(start)]
                execute(unended, jobs, keep_weights=True, executor=executor)
        execute(missing, jobs, executor=executor)
    return of_one_text(_all_there(configs, find(configs, profile, fresh)), f"profile {profile}")


def _all_there(configs: Sequence[RunConfig], found: Sequence[Record | None]) -> list[Record]:
    """The records, or StudyError if one is missing though no run failed: a run is named by what it read as it began."""
    lost = [config for config, record in zip(configs, found, strict=True) if record is None]
    if lost:
        why = "the file of its optimiser or the text was changed meanwhile; run the same command again"
        raise StudyError(f"{describe(lost[0])}: what was trained is not what was asked for, as {why}")
    return [record for record in found if record is not None]


def expected(configs: Sequence[RunConfig], profile: str, jobs: int | None = None) -> str:
    """What running them will cost, by the speed of the profile's records."""
    if not configs:
        return "0 to run"
    measured = load([*run_files(), *records_folder(profile).glob("*.jsonl")])
    return estimate(configs, (record for record in measured if record.ended)).with_jobs(jobs or default_jobs(configs))


def describe(config: RunConfig) -> str:
    """A run in a few words, with the name of its folder, or before its text is prepared that of a shipped record."""
    name = config.run_id if config.data.fingerprint else config.recipe_id
    return f"{label(config)}, batch {config.outer_batch}, lr {config.method.inner.lr:g}, seed {config.seed} ({name})"


def _unended(config: RunConfig) -> bool:
    return not (run_folder(config) / "weights.pt").exists()


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
            while waiting and (slot := slots.take()) is not None:
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
        return _launch(config, slot, keep_weights)
    except BaseException:
        slots.give(slot)
        raise


def _launch(config: RunConfig, slot: int, keep_weights: bool) -> _Job:
    folder = run_folder(config)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(config.model_dump_json(indent=1) + "\n")
    command = [sys.executable, "-m", "gnlib", "train", "--config", str(folder / "config.json"), "--quiet"]
    command += ["--keep-weights"] if keep_weights else []
    environment = os.environ | {"OMP_NUM_THREADS": str(config.compute.threads), "GNLIB_HOME": str(home())}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = _gpu(slot)
    log = folder / "log.txt"
    with open(log, "wb") as file:
        process = _spawn(command, environment, file)
    bar = tqdm(total=config.outer_steps, desc=describe(config), unit="step", position=slot + 1, leave=False)
    return _Job(config, slot, process, log, bar)


def _gpu(slot: int) -> str:
    """The GPUs that this process may see, in turn; their numbers are the machine's, not this process's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
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
                bars[of.run_id] = opened(of, "the start of all runs", 1)
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
