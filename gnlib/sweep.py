"""Whole studies on one machine: what they need is tuned, then their data orders run, all settings side by side.

Each setting is a chain of its own, tuning trials first; the chains share the machine's slots, so that no core or GPU
waits for one setting's last trial. What is there is skipped, so the same command continues an interrupted sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Timer

from tqdm.auto import tqdm

from gnlib.config import ConfigError
from gnlib.executors import Slots, StudyError, UnfinishedError, default_jobs
from gnlib.profiles import tuning
from gnlib.studies import STUDIES, check_possible, study_runs
from gnlib.study import run_study
from gnlib.train import pinned
from gnlib.tune import told, tune
from gnlib.variants import Setting, key, setting_config, starts_near, tunable


def sweep(
    names: Sequence[str],
    profile: str,
    jobs: int | None = None,
    minutes: float | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tuned: bool = True,
    fresh: bool = False,
) -> None:
    """Tune every setting of the studies until it is interior (if `tuned`), and run its data orders.

    `fresh` runs data orders, and trials of what is not interior, whose records are only shipped, which may be of
    another text; shipped settings that are interior stay. After `minutes`, what is under way is stopped:
    UnfinishedError, which says what is left for the next time.
    StudyError, once all else has ended, with a line for each chain that failed.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes: {minutes:g}; more than 0")
    if not names:
        raise ConfigError(f"study: name at least one; allowed: {', '.join(STUDIES)}")
    for name in names:
        check_possible(name, profile)
    runs = [run for name in names for run in study_runs(name, profile, seeds, methods, batches)]
    if not runs:
        there = [run.config for name in names for run in study_runs(name, profile, seeds, methods)]
        allowed = sorted({config.outer_batch for config in there})
        raise ConfigError(f"batches: {', '.join(map(str, batches or ()))}; allowed: {', '.join(map(str, allowed))}")
    slots = Slots(default_jobs([run.config for run in runs]) if jobs is None else jobs)
    pinned(runs[0].config)  # tokenises the text once, before many would wait for it
    chains = _chains(profile, [run.setting for run in runs])
    with tqdm(total=len(chains), desc=f"{len(chains)} settings", unit="setting") as bar:
        orders = list(dict.fromkeys(run.config.seed for run in runs))
        swept = _Sweep(profile, orders, tuned, fresh, slots, bar)
        with ThreadPoolExecutor(len(chains)) as threads, _stopping(slots, minutes):
            for name in sorted(chains, key=lambda name: len(_waits_for(profile, chains[name]))):  # what others wait for
                swept.chains[name] = threads.submit(swept.follow, name, chains[name])
            failed, stopped = _problems(swept.chains)
    if failed:
        raise StudyError("\n".join(failed))
    if stopped:
        raise UnfinishedError(f"{len(stopped)} of {len(chains)} settings are left: {', '.join(stopped)}")


@dataclass
class _Sweep:
    """What its chains share."""

    profile: str
    orders: Sequence[int]
    tuned: bool
    fresh: bool
    slots: Slots
    bar: tqdm[None]
    chains: dict[str, Future[None]] = field(default_factory=dict)

    def follow(self, name: str, members: Sequence[Setting]) -> None:
        """One chain: wait for those that it starts from, tune, run the data orders."""
        for other in _waits_for(self.profile, members):
            if other in self.chains:
                self.chains[other].exception()
        if self.tuned and not tuning(self.profile, name).get("interior"):
            entry = tune(self.profile, tunable(members[0]), jobs=self.slots, fresh=self.fresh)
            self.bar.write(f"{name}: {told(entry)}")
        configs = [setting_config(self.profile, setting, seed) for setting in members for seed in self.orders]
        run_study(configs, self.profile, fresh=self.fresh, jobs=self.slots, allow_run=True)
        self.bar.update()


def _waits_for(profile: str, members: Sequence[Setting]) -> set[str]:
    """The entries on whose best settings it depends where a chain's search starts: its method's at the profile's batch,
    and those near its own."""
    setting = tunable(members[0])
    near = {key(profile, one) for one in starts_near(profile, setting)}
    return {setting.base, *near} - {key(profile, setting)}


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


def _problems(chains: Mapping[str, Future[None]]) -> tuple[list[str], list[str]]:
    """A line for each chain that failed and the names of those that were stopped; waits for all of them."""
    failed, stopped = [], []
    for name, future in chains.items():
        try:
            future.result()
        except UnfinishedError:
            stopped.append(name)
        except (StudyError, ConfigError, OSError) as error:
            failed += [f"{name}: {line}" for line in str(error).splitlines()]
    return failed, stopped
