"""The paper's claims beside what our records say, row by row. A claim without records says so and has no number.

Sources: arXiv 2510.09378, sections 1 and 5. Whether a claim holds is decided by a bound stated in its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gnlib.profiles import METHODS, find_profile
from gnlib.record import Record
from gnlib.results import Crossing, Estimate, by_method, crossing, estimate, ratio
from gnlib.studies import STUDIES, study_configs
from gnlib.study import find

NOT_RUN = "not run"


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
    measure: Measure | None  # None: no study for it yet
    at_least: float | None = None
    at_most: float | None = None

    def answer(self, records: Sequence[Record | None], target: float) -> Claim:
        present = [record for record in records if record is not None]
        if self.measure is None or not records or len(present) < len(records):
            return Claim(self.claim, self.paper, None, 0, self.unit, NOT_RUN)
        found = self.measure(by_method(present), target)
        return Claim(self.claim, self.paper, str(found), found.n, self.unit, self._holds(found))

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
    """Steps to target of the baseline that is fastest on average, over Gauss-Newton's."""
    ratios = [step_ratio(name)(groups, target) for name, method in METHODS.items() if not method.is_gauss_newton]
    return min(ratios, key=lambda r: math.inf if math.isnan(r.mean) else r.mean)


def early_lead(groups: Groups, target: float) -> Estimate:
    """Share of the way from start to target that the best baseline has made by the step at which GN has made half."""
    newton = {record.config.seed: record for record in groups["GN"]}
    others = [record for label, records in groups.items() for record in records if label in _baselines()]
    shares = []
    for seed, record in newton.items():
        start = record.rows[0]["val_loss"] or math.nan
        steps = crossing(record, (start + target) / 2).steps
        losses = [_loss_at(other, steps) for other in others if other.config.seed == seed]
        shares.append((start - min(losses)) / (start - target))
    return estimate(shares)


def _baselines() -> set[str]:
    return {method.label for method in METHODS.values() if not method.is_gauss_newton}


def _loss_at(record: Record, step: float) -> float:
    """Validation loss at a step between two evaluations, by linear interpolation; inf once diverged."""
    for before, after in zip(record.rows, record.rows[1:], strict=False):
        if before["outer_step"] <= step <= after["outer_step"]:
            high, low = before["val_loss"], after["val_loss"]
            if high is None or low is None:
                return math.inf
            return high + (low - high) * (step - before["outer_step"]) / (after["outer_step"] - before["outer_step"])
    return record.rows[-1]["val_loss"] or math.inf


_RATIO = "steps to target / GN's"
_IC = "iteration_complexity"

QUESTIONS = (
    Question("GN needs at least 3x fewer steps than the best tuned baseline", "5.4 (SOAP)", _RATIO, _IC,
             best_baseline_ratio, at_least=3.0),
    Question("SOAP needs at least 3x the steps of GN", "5.4", _RATIO, _IC, step_ratio("soap"), at_least=3.0),
    Question("Muon needs at least 3x the steps of GN", "16", _RATIO, _IC, step_ratio("muon"), at_least=3.0),
    Question("AdamW needs at least 3x the steps of GN", "> 16", _RATIO, _IC, step_ratio("adamw"), at_least=3.0),
    Question("Layerwise GN needs at most 1.6x the steps of GN", "1.4", _RATIO, _IC, step_ratio("layerwise"),
             at_most=1.6),
    Question("GN-prox-linear is close to GN: at most 1.3x its steps", "about 1", _RATIO, _IC,
             step_ratio("prox_linear"), at_most=1.3),
    Question("When GN is half-way to the target, the best baseline has gone at most a quarter", "barely moved",
             "share of the way from start to target", _IC, early_lead, at_most=0.25),
    *(Question(claim, paper, unit, study, None) for claim, paper, unit, study in (
        ("Critical batch size: AdamW < SOAP, Muon < GN", "4M, 12M, 12M, > 40M", "tokens", "critical_batch_size"),
        ("Loss at a fixed token budget: GN ahead of SOAP at large batches", "3.45 at 120M", "nats per token",
         "fixed_budget"),
        ("Muon is a better inner solver than AdamW", "better", "steps ratio", "inner_solver"),
        ("Line search and warm start are both needed", "both", "steps ratio", "line_search"),
    )),
    Question("A GN inner step costs at most 1.75x a standard step", "1.5", "time ratio", "bench", None, at_most=1.75),
)  # fmt: skip


def claims(profile: str, fresh: bool = False, seeds: Sequence[int] | None = None) -> list[Claim]:
    """Every claim, answered from the profile's records (`fresh`: from data/runs alone); trains nothing."""
    target = find_profile(profile).target
    answers = []
    for question in QUESTIONS:
        known = question.study in STUDIES
        records = find(study_configs(question.study, profile, seeds), profile, fresh) if known else []
        answers.append(question.answer(records, target))
    return answers


def as_json(rows: Sequence[Claim]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def as_text(rows: Sequence[Claim]) -> str:
    """An aligned table; columns claim, paper, ours, n, holds."""
    cells = [("claim", "paper", "ours", "n", "holds")]
    cells += [(row.claim, row.paper, row.ours or "-", str(row.n or "-"), row.verdict) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
