"""A study: a declared list of runs. Finds what exists, has what is missing run, reports what failed.

The executor is chosen by name (`gnlib.executors`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from threading import Lock

from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.estimate import cost, estimate
from gnlib.executors import Jobs, StudyError, default_jobs, describe, execute
from gnlib.files import data_folder
from gnlib.profiles import records_folder
from gnlib.record import Record
from gnlib.train import check, pinned, run_folder, start_config

_STARTING = Lock()


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
    at_a_time = default_jobs(configs) if jobs is None else jobs
    return estimate(configs, (record for record in measured if record.ended)).with_jobs(at_a_time)


def _unended(config: RunConfig) -> bool:
    return not (run_folder(config) / "weights.pt").exists()
