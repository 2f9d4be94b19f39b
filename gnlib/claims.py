"""The paper's claims beside what our records say, row by row. A claim without records says so and has no number.

Sources: arXiv 2510.09378, sections 1 and 5. Whether a claim holds is decided by a bound stated in its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile, zip_longest
from textwrap import wrap
from typing import Any

from gnlib import bench, measures
from gnlib.config import ConfigError
from gnlib.measures import BASELINES, Measure
from gnlib.profiles import find_profile, tuning
from gnlib.results import Estimate, by_method
from gnlib.stateless import tokens_to_final_loss
from gnlib.studies import STUDIES, complete_settings, study_runs
from gnlib.study import of_one_text
from gnlib.variants import Setting, find_setting, key, tunable

NOT_RUN, UNDECIDED = "not run", "undecided"
NOT_INTERIOR, OUTDONE = "†", "‡"
FOOTNOTES = {
    NOT_INTERIOR: "a method's setting in the row lies at the edge of what was tried, or is not tuned by itself",
    OUTDONE: "a better setting of one of its methods was found since, on the tuning data order; its runs are missing",
}


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
    """Whether our figure is within the bound of the claim's text; `not run` without records, `undecided` where they
    give no figure, or a lower bound that could still end on either side."""

    @property
    def verdict(self) -> str:
        return self.holds if isinstance(self.holds, str) else ("yes" if self.holds else "NO")


def every(settings: Sequence[Setting], complete: Collection[Setting]) -> list[Setting]:
    """All settings decide."""
    return list(settings)


def largest_batch(settings: Sequence[Setting], complete: Collection[Setting]) -> list[Setting]:
    """The claim is about the largest batch alone."""
    most = max(setting.batch or 0 for setting in settings)
    return [setting for setting in settings if (setting.batch or 0) == most]


def first_batches(settings: Sequence[Setting], complete: Collection[Setting]) -> list[Setting]:
    """Of each method the batches up to the first whose runs are missing: where scaling first fails does not depend on
    larger ones, and where it does not fail yet, that is a bound."""
    chosen = []
    for name in dict.fromkeys(setting.name for setting in settings):
        smallest, *larger = sorted((s for s in settings if s.name == name), key=lambda setting: setting.batch or 0)
        chosen += [smallest, *takewhile(complete.__contains__, larger)]
    return chosen


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
    decided_by: Callable[[Sequence[Setting], Collection[Setting]], list[Setting]] = every
    """Which of their settings need all of their runs, of all and of the complete ones."""

    def answer(self, profile: str, seeds: Sequence[int] | None, fresh: bool) -> Claim:
        unanswered = Claim(self.claim, self.paper, None, 0, self.unit, NOT_RUN)
        if self.measure is None:
            return unanswered
        complete = complete_settings(self.study, profile, seeds, self.methods, fresh)
        settings = dict.fromkeys(run.setting for run in study_runs(self.study, profile, seeds, self.methods))
        decisive = self.decided_by(list(settings), complete)
        if not complete.keys() >= set(decisive):
            return unanswered
        records = [record for setting in decisive for record in complete[setting]]
        of_one_text(records, f"{self.study}, profile {profile}")
        found = self.measure(by_method(records), find_profile(profile).target)
        borrowed = any(tunable(setting) != setting for setting in decisive)
        marks = _marks([tuning(profile, name) for name in {key(profile, s) for s in decisive}], borrowed)
        ours = f"{found} {marks}".rstrip()
        return Claim(self.claim, self.paper, ours, found.n, self.unit, self._holds(found))

    def _holds(self, found: Estimate) -> bool | str:
        if math.isnan(found.mean):
            return UNDECIDED
        if self.at_least is not None and found.mean < self.at_least:
            return UNDECIDED if found.censored else False  # the figure may be larger than its lower bound
        if self.at_most is not None and found.mean <= self.at_most and found.censored:
            return UNDECIDED
        return self.at_most is None or found.mean <= self.at_most


def _marks(entries: Sequence[dict[str, Any]], borrowed: bool) -> str:
    """What has to be said of the tuning behind a row, from entries of tuned.json; `borrowed` if a variant runs with the
    settings of its method."""
    outdone = any(entry["settings"].items() - entry["trials"][0].items() for entry in entries if "trials" in entry)
    rough = borrowed or not all(entry.get("interior") for entry in entries)
    return (NOT_INTERIOR if rough else "") + (OUTDONE if outdone else "")


class StepCost(Question):
    """Answered by `gnlib bench`, from the size at which Gauss-Newton's ratio is largest."""

    def answer(self, profile: str, seeds: Sequence[int] | None, fresh: bool) -> Claim:
        rows = [row for row in bench.shipped(profile) if row["method"] == "gn"]
        if not rows:
            return Claim(self.claim, self.paper, None, 0, self.unit, NOT_RUN)
        row = max(rows, key=lambda row: row["ratio_to_standard"])
        found = Estimate(row["ratio_to_standard"], None, row["n"])
        ours = f"{found} ({row['size']}, {row['precision']})"
        return Claim(self.claim, self.paper, ours, found.n, self.unit, self._holds(found))


def _steps_claim(
    claim: str,
    paper: str,
    study: str,
    method: str,
    reference: str = "gauss_newton",
    at_least: float | None = None,
    at_most: float | None = None,
) -> Question:
    """A claim about the steps of one method over those of another, at the profile's outer batch."""
    unit = f"steps to target / {find_setting(reference).label}'s"
    measure = measures.step_ratio(method, reference)
    return Question(claim, paper, unit, study, (reference, method), measure, at_least, at_most)


def _tokens_claim(claim: str, paper: str, method: str, at_most: float) -> Question:
    """A claim about the tokens of a method to Adam's final loss (arXiv 2502.06742, 2412.13148), here AdamW's."""
    measure = tokens_to_final_loss(method, "adamw")
    return Question(claim, paper, "tokens / AdamW's", "stateless", (method, "adamw"), measure, at_most=at_most)


_STEPS = "iteration_complexity"
QUESTIONS = (
    Question(
        "GN needs at least 3x fewer steps than the best tuned baseline",
        "5.4 (SOAP)",
        "steps to target / GN's",
        _STEPS,
        ("gauss_newton", *BASELINES),
        measures.best_baseline_ratio,
        at_least=3.0,
    ),
    _steps_claim("SOAP needs at least 3x the steps of GN", "5.4", _STEPS, "soap", at_least=3.0),
    _steps_claim("Muon needs at least 3x the steps of GN", "16", _STEPS, "muon", at_least=3.0),
    _steps_claim("AdamW needs at least 3x the steps of GN", "> 16", _STEPS, "adamw", at_least=3.0),
    _steps_claim("Layerwise GN needs at most 1.6x the steps of GN", "1.4", _STEPS, "layerwise", at_most=1.6),
    _steps_claim(
        "GN-prox-linear is close to GN: at most 1.3x its steps", "about 1", _STEPS, "prox_linear", at_most=1.3
    ),
    Question(
        "When GN is half-way to the target, the best baseline has gone at most a quarter",
        "barely moved",
        "share of the way from start to target",
        _STEPS,
        ("gauss_newton", *BASELINES),
        measures.early_lead,
        at_most=0.25,
    ),
    Question(
        "GN's critical batch is at least 3x that of SOAP and of Muon",
        "> 3.3 (above 40M / 12M tokens)",
        "critical batch / the larger of theirs",
        "critical_batch_size",
        ("gauss_newton", "soap", "muon"),
        measures.critical_ratio("gauss_newton", ("soap", "muon")),
        at_least=3.0,
        decided_by=first_batches,
    ),
    Question(
        "AdamW's critical batch is below those of SOAP and of Muon",
        "0.33 (4M / 12M tokens)",
        "critical batch / the larger of theirs",
        "critical_batch_size",
        ("adamw", "soap", "muon"),
        measures.critical_ratio("adamw", ("soap", "muon")),
        at_most=1.0,
        decided_by=first_batches,
    ),
    Question(
        "At a fixed token budget and the largest batch GN ends at least 0.1 nats below every baseline",
        "about 1 (3.45 against > 4.4 for AdamW)",
        "nats below the best baseline",
        "fixed_budget",
        ("gauss_newton", *BASELINES),
        measures.budget_lead,
        at_least=0.1,
        decided_by=largest_batch,
    ),
    _steps_claim(
        "GN-prox-linear needs no line search: without it at most 1.1x the steps",
        "none needed",
        "prox_linear",
        "prox_linear_no_search",
        "prox_linear",
        at_most=1.1,
    ),
    _steps_claim(
        "A finer partition loses more: per-matrix GN needs at least the steps of layerwise GN",
        "left open",
        "layerwise",
        "matrixwise",
        "layerwise",
        at_least=1.0,
    ),
    Question(
        "No other schedule beats the global cosine by more than 5 % at the middle batch",
        "global cosine best overall",
        "best other schedule's steps / the global cosine's",
        "schedules",
        STUDIES["schedules"].methods,
        measures.best_schedule_ratio("middle"),
        at_least=0.95,
    ),
    Question(
        "At the largest batch a cosine inside each outer step beats the global cosine",
        "helps at large batches",
        "constant + inner cosine's steps / the global cosine's",
        "schedules",
        ("gauss_newton", "constant_inner_cosine"),
        measures.best_schedule_ratio("largest"),
        at_most=1.0,
    ),
    _steps_claim(
        "Line search is needed: without it GN takes at least 1.05x the steps",
        "needed for stability",
        "line_search",
        "gauss_newton_no_search",
        at_least=1.05,
    ),
    _steps_claim(
        "Warm start is needed: without it GN takes at least 1.05x the steps",
        "needed",
        "line_search",
        "cold_start",
        at_least=1.05,
    ),
    _steps_claim(
        "The line search explains little: given one, Muon still needs at least 3x GN's steps",
        "left open",
        "line_search",
        "muon_search",
        at_least=3.0,
    ),
    _steps_claim(
        "Muon is the better inner solver: with AdamW GN takes at least 1.05x the steps",
        "better",
        "inner_solver",
        "inner_adamw",
        at_least=1.05,
    ),
    StepCost(
        "A GN inner step takes at most 1.75x the time of a standard AdamW step",
        "about 1.5",
        "time / that of a standard step, n steps",
        "bench",
        at_most=1.75,
    ),
    _tokens_claim("SinkGD has AdamW's final loss with at most 60 % of its tokens", "0.4", "sinkgd", at_most=0.6),
    _tokens_claim("SWAN has AdamW's final loss with at most 75 % of its tokens", "0.5", "swan", at_most=0.75),
)


def claims(
    profile: str, fresh: bool = False, seeds: Sequence[int] | None = None, study: str | None = None
) -> list[Claim]:
    """Every claim (of one study), answered from the profile's records; trains nothing.

    `fresh` reads data/runs alone. ConfigError for an unknown profile, or a study without claims.
    """
    find_profile(profile)
    studies = dict.fromkeys(question.study for question in QUESTIONS)
    if study not in (None, *studies):
        raise ConfigError(f"study: no claims on {study!r}; allowed: {', '.join(studies)}")
    chosen = [question for question in QUESTIONS if study in (None, question.study)]
    return [question.answer(profile, seeds, fresh) for question in chosen]


def as_json(rows: Sequence[Claim]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def as_markdown(profiles: Sequence[str]) -> str:
    """The table of the README: claim, the paper's figure, then ours in each profile with its verdict."""
    answers = [claims(profile) for profile in profiles]
    lines = [
        f"| claim | unit | paper | {' | '.join(profiles)} |",
        "| --- " * (3 + len(profiles)) + "|",
    ]
    for rows in zip(*answers, strict=True):
        cells = [f"{row.ours}, n = {row.n}: {row.verdict}" if row.ours else NOT_RUN for row in rows]
        lines.append(f"| {rows[0].claim} | {rows[0].unit} | {rows[0].paper} | {' | '.join(cells)} |")
    return _with_footnotes("\n".join(lines))


def _with_footnotes(table: str) -> str:
    """The table with what its marks mean, a paragraph each."""
    return "\n\n".join([table, *(f"{mark} {text}" for mark, text in FOOTNOTES.items() if mark in table)])


def as_text(rows: Sequence[Claim]) -> str:
    """An aligned table; columns claim, paper, ours, n, holds; long texts go on in the next line."""
    cells = [("claim", "paper", "ours", "n", "holds")]
    cells += [(row.claim, row.paper, row.ours or "-", str(row.n or "-"), row.verdict) for row in rows]
    wrapped = [[wrap(text, width) for text, width in zip(row, (54, 22, 18, 3, 10), strict=True)] for row in cells]
    widths = [max(len(line) for row in wrapped for line in row[column]) for column in range(5)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(parts, widths, strict=True)).rstrip()
        for row in wrapped
        for parts in zip_longest(*row, fillvalue="")
    ]
    return _with_footnotes("\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]))
