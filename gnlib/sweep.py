"""Whole studies on one machine: what they need is tuned, then their data orders run, all settings side by side.

Each setting is a chain of its own, tuning trials first; the chains share the machine's slots, so that no core or GPU
waits for one setting's last trial. What is there is skipped, so the same command continues an interrupted sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Timer

from gnlib.config import ConfigError
from gnlib.profiles import tuning
from gnlib.studies import study_runs
from gnlib.study import Slots, StudyError, default_jobs, run_study
from gnlib.train import pinned
from gnlib.tune import tune
from gnlib.variants import Setting, key, setting_config, tunable


def sweep(
    names: Sequence[str],
    profile: str,
    jobs: int | None = None,
    minutes: float | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tuned: bool = True,
) -> None:
    """Tune every setting of the studies until it is interior (if `tuned`), and run its data orders.

    After `minutes`, what is under way is stopped and continues next time. StudyError, once all else has ended, with a
    line for each chain that failed or was stopped.
    """
    runs = [run for name in names for run in study_runs(name, profile, seeds, methods, batches)]
    if not runs:
        raise ConfigError(f"batches: none of {', '.join(map(str, batches or ()))} is one of the studies'")
    chains = _chains(profile, [run.setting for run in runs])
    slots = Slots(default_jobs([run.config for run in runs]) if jobs is None else jobs)
    pinned(runs[0].config)  # tokenises the text once, before many would wait for it
    orders = list(dict.fromkeys(run.config.seed for run in runs))
    waited_for: dict[str, Future[None]] = {}

    def follow(name: str, members: list[Setting]) -> None:
        base = tunable(members[0]).base
        if base != name and base in waited_for:  # where the search starts depends on what is best for the base
            waited_for[base].exception()
        if tuned and not tuning(profile, name).get("interior"):
            tune(profile, tunable(members[0]), jobs=slots)
        run_study([setting_config(profile, s, seed) for s in members for seed in orders], profile, jobs=slots,
                  allow_run=True)  # fmt: skip

    with ThreadPoolExecutor(len(chains)) as threads, _stopping(slots, minutes):
        for name in sorted(chains, key=lambda name: name != tunable(chains[name][0]).base):  # bases first
            waited_for[name] = threads.submit(follow, name, chains[name])
        problems = _problems(waited_for)
    if problems:
        raise StudyError("\n".join(problems))


def _chains(profile: str, settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Settings by the tuned entry that they run with, each once."""
    chains: dict[str, list[Setting]] = {}
    for setting in settings:
        members = chains.setdefault(key(profile, setting), [])
        if setting not in members:
            members.append(setting)
    return chains


@contextmanager
def _stopping(slots: Slots, minutes: float | None) -> Iterator[None]:
    """Close the slots when the time is over, or at Ctrl-C."""
    timer = Timer(60 * minutes, slots.close) if minutes is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    except BaseException:
        slots.close()
        raise
    finally:
        if timer:
            timer.cancel()


def _problems(chains: Mapping[str, Future[None]]) -> list[str]:
    """A line for each chain that failed, in the order of the chains; waits for all of them."""
    found = []
    for name, future in chains.items():
        try:
            future.result()
        except (StudyError, ConfigError, OSError) as error:
            found += [f"{name}: {line}" for line in str(error).splitlines()]
    return found
