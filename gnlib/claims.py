"""The paper's claims beside what our records say, row by row. A claim without records says so and has no number.

Sources: arXiv 2510.09378, sections 1 and 5. Whether a claim holds is decided by a bound stated in its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gnlib.profiles import METHODS, find_profile, tuning
from gnlib.record import Record
from gnlib.results import Crossing, Estimate, by_method, crossing, estimate, ratio
from gnlib.studies import study_configs
from gnlib.study import StudyError, find

NOT_RUN = "not run"
NOT_INTERIOR = "†"
FOOTNOTE = f"{NOT_INTERIOR} the best setting of a method in the row lies at the edge of what was tried"


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
    """Whether our figure is within the bound of the claim's text; `not run` without records."""

    @property
    def verdict(self) -> str:
        return self.holds if isinstance(self.holds, str) else ("yes" if self.holds else "NO")


Groups = dict[str, list[Record]]  # method label -> records
Measure = Callable[[Groups, float], Estimate]  # groups, target loss -> figure


@dataclass(frozen=True)
class Question:
    """A claim before it is answered."""

    claim: str
    paper: str
    unit: str
    study: str
    methods: tuple[str, ...] = ()
    """Names of `profiles.METHODS` whose records it needs, on every seed."""
    measure: Measure | None = None
    """None: there is no study for it yet."""
    at_least: float | None = None
    at_most: float | None = None

    def answer(self, profile: str, seeds: Sequence[int] | None, fresh: bool) -> Claim:
        unanswered = Claim(self.claim, self.paper, None, 0, self.unit, NOT_RUN)
        if self.measure is None:
            return unanswered
        configs = study_configs(self.study, profile, seeds, self.methods)
        present = [record for record in find(configs, profile, fresh) if record is not None]
        if len(present) < len(configs):
            return unanswered
        if len({record.config.data.fingerprint for record in present}) > 1:
            raise StudyError(f"{self.study}, profile {profile}: its records come from different texts; see --fresh")
        found = self.measure(by_method(present), find_profile(profile).target)
        mark = "" if all(tuning(profile, name).get("interior") for name in self.methods) else f" {NOT_INTERIOR}"
        return Claim(self.claim, self.paper, f"{found}{mark}", found.n, self.unit, self._holds(found))

    def _holds(self, found: Estimate) -> bool:
        if math.isnan(found.mean):
            return False
        if self.at_least is not None and found.mean < self.at_least:
            return False
        # a lower bound can show that a ratio is at least something, never that it is at most something
        return self.at_most is None or (found.mean <= self.at_most and not found.censored)


def _steps(c: Crossing) -> float:
    return c.steps


def step_ratio(method: str, reference: str = "gauss_newton") -> Measure:
    """Steps to target of one method over another's."""
    above, below = METHODS[method].label, METHODS[reference].label
    return lambda groups, target: ratio(groups[above], groups[below], target, _steps)


def best_baseline_ratio(groups: Groups, target: float) -> Estimate:
    """Steps to target of the baseline that is fastest on average, over Gauss-Newton's; a diverged one is never it."""
    sound = [name for name in _BASELINES if all(r.status == "finished" for r in groups[METHODS[name].label])]
    ratios = [step_ratio(name)(groups, target) for name in sound] or [Estimate(math.nan, None, 0)]
    return min(ratios, key=lambda r: math.inf if math.isnan(r.mean) else r.mean)


def early_lead(groups: Groups, target: float) -> Estimate:
    """Share of the way from start to target that the best baseline has made by the step at which GN has made half."""
    newton = {record.config.seed: record for record in groups["GN"]}
    others = [record for name in _BASELINES for record in groups[METHODS[name].label]]
    shares = []
    for seed, record in newton.items():
        start = record.rows[0]["val_loss"] or math.nan
        half_way = crossing(record, (start + target) / 2)
        losses = [_loss_at(other, half_way.steps) for other in others if other.config.seed == seed]
        shares.append(math.nan if half_way.censored else (start - min(losses)) / (start - target))
    return estimate(shares)


def _loss_at(record: Record, step: float) -> float:
    """Validation loss at a step between two evaluations, by linear interpolation; inf once diverged."""
    for before, after in zip(record.rows, record.rows[1:], strict=False):
        if before["outer_step"] <= step <= after["outer_step"]:
            high, low = before["val_loss"], after["val_loss"]
            if high is None or low is None:
                return math.inf
            return high + (low - high) * (step - before["outer_step"]) / (after["outer_step"] - before["outer_step"])
    return record.rows[-1]["val_loss"] or math.inf


_BASELINES = tuple(name for name, method in METHODS.items() if not method.is_gauss_newton)
_RATIO = "steps to target / GN's"


def _steps_claim(claim: str, paper: str, method: str, **bound: float) -> Question:
    """A claim about the steps of one method over those of Gauss-Newton."""
    methods = ("gauss_newton", method)
    return Question(claim, paper, _RATIO, "iteration_complexity", methods, step_ratio(method), **bound)


QUESTIONS = (
    Question(
        "GN needs at least 3x fewer steps than the best tuned baseline",
        "5.4 (SOAP)",
        _RATIO,
        "iteration_complexity",
        ("gauss_newton", *_BASELINES),
        best_baseline_ratio,
        at_least=3.0,
    ),
    _steps_claim("SOAP needs at least 3x the steps of GN", "5.4", "soap", at_least=3.0),
    _steps_claim("Muon needs at least 3x the steps of GN", "16", "muon", at_least=3.0),
    _steps_claim("AdamW needs at least 3x the steps of GN", "> 16", "adamw", at_least=3.0),
    _steps_claim("Layerwise GN needs at most 1.6x the steps of GN", "1.4", "layerwise", at_most=1.6),
    _steps_claim("GN-prox-linear is close to GN: at most 1.3x its steps", "about 1", "prox_linear", at_most=1.3),
    Question(
        "When GN is half-way to the target, the best baseline has gone at most a quarter",
        "barely moved",
        "share of the way from start to target",
        "iteration_complexity",
        ("gauss_newton", *_BASELINES),
        early_lead,
        at_most=0.25,
    ),
    Question("Critical batch size: AdamW < SOAP, Muon < GN", "4M, 12M, > 40M", "tokens", "critical_batch_size"),
    Question("Loss at a fixed token budget: GN ahead at large batches", "3.45 at 120M", "nats", "fixed_budget"),
    Question("Muon is a better inner solver than AdamW", "better", "steps ratio", "inner_solver"),
    Question("Line search and warm start are both needed", "both", "steps ratio", "line_search"),
    Question("A GN inner step costs about 1.5x a standard step", "1.5", "time ratio", "bench"),
)


def claims(
    profile: str, fresh: bool = False, seeds: Sequence[int] | None = None, study: str | None = None
) -> list[Claim]:
    """Every claim (of one study), answered from the profile's records; trains nothing.

    `fresh` reads data/runs alone. ConfigError for an unknown profile.
    """
    find_profile(profile)
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
    return _with_footnote("\n".join(lines))


def _with_footnote(table: str) -> str:
    return f"{table}\n\n{FOOTNOTE}" if NOT_INTERIOR in table else table


def as_text(rows: Sequence[Claim]) -> str:
    """An aligned table; columns claim, paper, ours, n, holds."""
    cells = [("claim", "paper", "ours", "n", "holds")]
    cells += [(row.claim, row.paper, row.ours or "-", str(row.n or "-"), row.verdict) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return _with_footnote("\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]))
