"""A claim as a question to records: which of a study's settings decide it, what is measured on them, whether it holds.

`gnlib.paper` has the questions that the papers raise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from gnlib import bench
from gnlib.critical_batch import scales_on
from gnlib.measures import Measure
from gnlib.profiles import find_profile, tuning
from gnlib.record import Record
from gnlib.results import Estimate, by_method
from gnlib.studies import complete_settings, study_runs
from gnlib.study import of_one_text
from gnlib.tune import SEED, outdone
from gnlib.variants import Setting, borrows, key

NOT_RUN, UNDECIDED = "not run", "undecided"
NOT_INTERIOR, OUTDONE = "†", "‡"


@dataclass(frozen=True)
class Claim:
    claim: str
    paper: str
    """The paper's figure."""
    ours: str | None
    """Mean and 95 % interval over seeds; None without records."""
    n: int
    """Seeds."""
    unit: str
    holds: bool | str
    """Whether our figure is within the bound of the claim's text, with all of its interval (true) or with none of it
    (false); else `undecided`, as without a figure, or where a better setting of one of its methods was found
    since; `not run` without records."""
    found: Estimate | None = None
    at_least: float | None = None
    at_most: float | None = None
    marks: str = ""
    """Of `claims.FOOTNOTES`."""

    @property
    def verdict(self) -> str:
        return self.holds if isinstance(self.holds, str) else ("yes" if self.holds else "NO")


Complete = Mapping[Setting, Sequence[Record]]  # the settings that have all of their runs


def every(settings: Sequence[Setting], complete: Complete, target: float) -> list[Setting]:
    """All settings decide."""
    return list(settings)


def largest_batch(settings: Sequence[Setting], complete: Complete, target: float) -> list[Setting]:
    """The claim is about the largest batch alone."""
    return _at_batch(settings, -1)


def middle_batch(settings: Sequence[Setting], complete: Complete, target: float) -> list[Setting]:
    """The claim is about the middle batch alone, of two the larger."""
    return _at_batch(settings, len({setting.batch for setting in settings}) // 2)


def _at_batch(settings: Sequence[Setting], index: int) -> list[Setting]:
    """Those at a batch by its place among theirs."""
    sizes = sorted({setting.batch or 0 for setting in settings})
    return [setting for setting in settings if (setting.batch or 0) == sizes[index]]


def first_batches(settings: Sequence[Setting], complete: Complete, target: float) -> list[Setting]:
    """Of each method the batches up to the first that is past its critical batch on all data orders, or whose runs are
    missing: where scaling first fails does not depend on larger ones, and where it does not fail yet, that is a bound.
    """
    chosen = []
    for name in dict.fromkeys(setting.name for setting in settings):
        smallest, *larger = sorted((s for s in settings if s.name == name), key=lambda setting: setting.batch or 0)
        own = [smallest, *takewhile(complete.__contains__, larger)]
        runs = [[record for s in own[:count] for record in complete.get(s, ())] for count in range(2, len(own))]
        past = (count for count, records in enumerate(runs, 2) if not scales_on(records, target))
        chosen += own[: next(past, len(own))]
    return chosen


def _without_missing(
    settings: Iterable[Setting], complete: Collection[Setting], batches: Collection[int]
) -> list[Setting]:
    """Without those of these batches at which runs of one of the settings are missing."""
    missing = {setting.batch for setting in settings if setting not in complete}
    return [setting for setting in settings if setting.batch not in missing.intersection(batches)]


@dataclass(frozen=True)
class Question:
    """A claim before it is answered."""

    claim: str
    paper: str
    unit: str
    study: str
    methods: tuple[str, ...] = ()
    """The study's methods and variants that it is about."""
    measure: Measure | None = None
    at_least: float | None = None
    at_most: float | None = None
    decided_by: Callable[[Sequence[Setting], Complete, float], list[Setting]] = every
    """Which of their settings need all of their runs, of all and of the complete ones, for a target loss."""
    also_in: str = ""
    """Another study that has the same runs, whose notebook shows it too."""

    def answer(self, profile: str, seeds: Sequence[int] | None, fresh: bool) -> Claim:
        unanswered = Claim(self.claim, self.paper, None, 0, self.unit, NOT_RUN)
        if self.measure is None:
            return unanswered
        complete = complete_settings(self.study, profile, seeds, self.methods, fresh)
        settings = dict.fromkeys(run.setting for run in study_runs(self.study, profile, seeds, self.methods))
        target = find_profile(profile).target
        decisive = self.decided_by(_without_missing(settings, complete, find_profile(profile).larger), complete, target)
        if not decisive or not complete.keys() >= set(decisive):  # none where the profile lacks what the study needs
            return unanswered
        records = [record for setting in decisive for record in complete[setting]]
        of_one_text(records, f"{self.study}, profile {profile}")
        found = self.measure(by_method(records), target)
        of_tuning = any(record.config.seed == SEED for record in records)
        borrowed = [replace(setting, name=setting.base) for setting in decisive if borrows(profile, setting)]
        entries = [tuning(profile, name) for name in {key(profile, setting) for setting in (*decisive, *borrowed)}]
        marks = _marks(entries, bool(borrowed) or of_tuning)
        return self._answered(found, f"{found} {marks}".rstrip(), marks)

    def _answered(self, found: Estimate, ours: str, marks: str = "") -> Claim:
        bounds = self.at_least, self.at_most
        within = None if OUTDONE in marks else found.within(*bounds)
        holds = UNDECIDED if within is None else within
        return Claim(self.claim, self.paper, ours, found.n, self.unit, holds, found, *bounds, marks)


def _marks(entries: Sequence[dict[str, Any]], rough: bool) -> str:
    """What has to be said of the tuning behind a row, from entries of tuned.json; `rough` if a variant runs with the
    settings of its method, or a run is of the data order that they were tuned on."""
    rough = rough or not all(entry.get("interior") for entry in entries)
    return (NOT_INTERIOR if rough else "") + (OUTDONE if any(outdone(entry) for entry in entries if entry) else "")


class StepCost(Question):
    """Answered by `gnlib bench`, from the size at which Gauss-Newton's ratio is largest."""

    def answer(self, profile: str, seeds: Sequence[int] | None, fresh: bool) -> Claim:
        rows = [row for row in bench.shipped(profile) if row["method"] == "gn"]
        if not rows:
            return Claim(self.claim, self.paper, None, 0, self.unit, NOT_RUN)
        row = max(rows, key=lambda row: row["ratio_to_standard"])
        found = Estimate(row["ratio_to_standard"], None, row["n"])
        return self._answered(found, f"{found} ({row['size']}, {row['precision']})")
