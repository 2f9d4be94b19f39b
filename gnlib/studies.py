"""The studies by name: which runs each figure is made of, in each profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gnlib.config import ConfigError, RunConfig
from gnlib.methods import METHODS
from gnlib.profiles import find_profile
from gnlib.record import Record
from gnlib.study import find, run_study
from gnlib.variants import UNTUNED, Setting, find_setting, home_batch, key, setting_config, tunable


@dataclass(frozen=True)
class Study:
    """A grid: methods and variants x outer batches x seeds."""

    methods: tuple[str, ...]
    """Names of `methods.ALL_METHODS` and `variants.VARIANTS`."""
    batches: Literal["own", "small", "two", "three", "all", "larger"] = "own"
    """The profile's outer batch; a small one; the middle and the largest (of two they are the same); these three; all
    of its `batches`; or all and the `larger` ones."""
    budget: bool = False
    """Runs end at the profile's token budget."""

    def settings(self, profile: str, methods: Sequence[str]) -> list[Setting]:
        return [find_setting(name, batch, self.budget) for batch in self._batches(profile) for name in methods]

    def _batches(self, profile: str) -> tuple[int, ...]:
        """Empty where the profile lacks what the study needs."""
        every = find_profile(profile).batches
        if self.lacks(profile):
            return ()
        if self.batches == "own":
            return (home_batch(profile),)
        small = every[len(every) > 3]  # where there are many, the smallest has too many steps
        two = every[len(every) // 2], every[-1]
        chosen = {"small": {small}, "two": set(two), "three": {small, *two}, "all": set(every)}
        chosen["larger"] = {*every, *find_profile(profile).larger}
        return tuple(sorted(chosen[self.batches]))

    def lacks(self, profile: str) -> str:
        """The profile's field without which the study has no runs; empty if there is none."""
        found = find_profile(profile)
        if self.batches != "own" and len(found.batches) < 2:
            return "batches (two at least)"
        return "budget" if self.budget and not found.budget else ""


_BASELINES = ("muon", "soap", "adamw")

STUDIES: dict[str, Study] = {
    "iteration_complexity": Study(tuple(METHODS)),
    "critical_batch_size": Study(tuple(METHODS), "larger"),
    "fixed_budget": Study(("gauss_newton", *_BASELINES), "all", budget=True),
    "prox_linear": Study(("gauss_newton", "prox_linear", "gauss_newton_no_search", "prox_linear_no_search")),
    "layerwise": Study(("gauss_newton", "layerwise", "layerwise_ten_lengths", "matrixwise")),
    "schedules": Study(("gauss_newton", "global_inner_cosine", "constant_inner_cosine", "constant"), "three"),
    "line_search": Study(
        (
            "gauss_newton",
            "gauss_newton_no_search",
            "search_without_zero",
            "search_on_all",
            "search_on_16th",
            "cold_start",
            "muon",
            "muon_search",
        )
    ),
    "step_lengths": Study(("gauss_newton", "ten_lengths", "layerwise", "layerwise_ten_lengths"), "all"),
    "inner_solver": Study(("gauss_newton", "inner_adamw", "inner_soap", "inner_cg", "quarter_n", "half_n", "double_n")),
    "variants": Study(
        (
            "gauss_newton",
            "prox_linear",
            "gauss_newton_no_search",
            "prox_linear_no_search",
            "search_without_zero",
            "search_on_all",
            "search_on_16th",
            "cold_start",
            "inner_adamw",
            "inner_soap",
            "quarter_n",
            "half_n",
            "double_n",
        ),
        "two",
    ),
    "baseline_settings": Study((*_BASELINES, *UNTUNED)),
    "more_baselines": Study(("shampoo", "kfac", "sophia_g", "schedule_free", "adam", "sgd")),
    "stateless": Study(("sinkgd", "swan", "sinkgd_stateless", "muon", "adamw", "adam", "sgd"), "small", budget=True),
}


class Run(NamedTuple):
    setting: Setting
    config: RunConfig


def find_study(name: str) -> Study:
    """By name; ConfigError with the allowed names for another."""
    if name not in STUDIES:
        raise ConfigError(f"study: no study {name!r}; allowed: {', '.join(STUDIES)}")
    return STUDIES[name]


def check_possible(name: str, profile: str) -> None:
    """ConfigError if the profile has no runs of the study, as one of your own without batches."""
    if lacks := find_study(name).lacks(profile):
        raise ConfigError(f"study: {name} needs {lacks}, which profile {profile!r} does not have")


def study_runs(
    name: str,
    profile: str,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
) -> list[Run]:
    """The runs of a study; the profile's own seeds and the study's own methods and batches (sequences) by default.

    Empty where the profile lacks what the study needs (`check_possible`).
    """
    study = find_study(name)
    if isinstance(methods, str):
        raise ConfigError(f"methods: {methods!r}; a list of names such as [{methods!r}]")
    settings = study.settings(profile, list(dict.fromkeys(methods or study.methods)))  # each once
    settings = [setting for setting in settings if not batches or setting.batch in batches]
    chosen = dict.fromkeys(seeds or find_profile(profile).seeds)
    return [Run(setting, setting_config(profile, setting, seed)) for seed in chosen for setting in settings]


def study_configs(
    name: str, profile: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[RunConfig]:
    """The configurations of a study's runs (`study_runs`)."""
    return [run.config for run in study_runs(name, profile, seeds, methods)]


def study_records(
    name: str,
    profile: str,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    fresh: bool = False,
    allow_run: bool | None = None,
) -> list[Record]:
    """Records of a study's runs, labelled by their settings; what is missing is run first (`study.run_study`).

    Of a profile that is shown in part (`Profile.in_part`) only the complete settings are taken, if there are any, and a
    printed line names the others, unless `methods` asks for them, or `fresh` for everything. What is missing at the
    profile's `larger` batches is always left out.
    """
    check_possible(name, profile)
    runs = study_runs(name, profile, seeds, methods)
    complete = complete_settings(name, profile, seeds, methods, fresh)
    missing = {run.setting for run in runs} - complete.keys()
    if fresh or methods or not (complete and find_profile(profile).in_part):
        missing = {setting for setting in missing if setting.batch in find_profile(profile).larger}
    given = tuple(seeds or ())
    options = f" --seeds {' '.join(map(str, given))}" if given not in ((), find_profile(profile).seeds) else ""
    command = f"{name} --profile {profile}{options}"
    _say_left_out(missing, f"gnlib sweep {command}")
    runs = [run for run in runs if run.setting not in missing]
    records = run_study([run.config for run in runs], profile, fresh, allow_run, command=f"gnlib study {command}")
    return labelled(runs, records)


def _say_left_out(settings: Iterable[Setting], command: str) -> None:
    by_batch: dict[int, list[str]] = {}
    for setting in sorted(settings, key=lambda setting: (setting.batch or 0, setting.label)):
        by_batch.setdefault(setting.batch or 0, []).append(setting.label)
    for batch, labels in by_batch.items():
        at = f" at {batch} sequences" if batch else ""
        print(f"not all runs are there, left out: {'; '.join(labels)}{at}; run: {command}")


def complete_settings(
    name: str,
    profile: str,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    fresh: bool = False,
) -> dict[Setting, list[Record]]:
    """The labelled records of each setting (a method at a batch) that has all of its runs; runs nothing."""
    runs = study_runs(name, profile, seeds, methods)
    complete: dict[Setting, list[Record]] = {run.setting: [] for run in runs}
    for run, record in zip(runs, find([run.config for run in runs], profile, fresh), strict=True):
        if record is None:
            complete.pop(run.setting, None)
        elif run.setting in complete:
            complete[run.setting] += labelled([run], [record])
    return complete


def existing_records(name: str, profile: str, seeds: Sequence[int] | None = None) -> list[Record]:
    """The records of the complete settings together."""
    return [record for records in complete_settings(name, profile, seeds).values() for record in records]


def is_complete(name: str, profile: str) -> bool:
    """Whether all of a study's runs are there, on the profile's own seeds."""
    return {run.setting for run in study_runs(name, profile)} == complete_settings(name, profile).keys()


def labelled(runs: Sequence[Run], records: Sequence[Record]) -> list[Record]:
    """Each record with its setting's label."""
    for run, record in zip(runs, records, strict=True):
        record.label = run.setting.label
    return list(records)


def tuned_settings(name: str, profile: str, methods: Sequence[str] | None = None) -> dict[str, Setting]:
    """What a study (some of its methods) has to be tuned for: tuned.json's key -> setting."""
    study = find_study(name)
    settings: dict[str, Setting] = {}
    at_home_first = sorted(study.settings(profile, methods or study.methods), key=lambda one: not one.at_home(profile))
    for setting in at_home_first:  # others start from it
        settings.setdefault(key(profile, setting), tunable(setting))
    return settings
