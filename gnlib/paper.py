"""The questions that the papers raise: a claim with the paper's figure, the study and the measure that answer it, and
the bound that decides.

Sources: arXiv 2510.09378, sections 1 and 5; of the stateless optimisers arXiv 2502.06742 and 2412.13148.
"""

from __future__ import annotations

from gnlib import measures
from gnlib.measures import BASELINES
from gnlib.questions import Question, StepCost, first_batches, largest_batch, middle_batch
from gnlib.stateless import tokens_to_final_loss
from gnlib.studies import STUDIES
from gnlib.variants import find_setting


def _steps_claim(
    claim: str,
    paper: str,
    study: str,
    method: str,
    reference: str = "gauss_newton",
    at_least: float | None = None,
    at_most: float | None = None,
    also_in: str = "",
) -> Question:
    """A claim about the steps of one method over those of another, at the profile's outer batch."""
    label = find_setting(reference).label
    unit = f"steps to target / {label}'s" if "," not in label else f"steps to target / those of {label}"
    measure = measures.step_ratio(method, reference)
    return Question(claim, paper, unit, study, (reference, method), measure, at_least, at_most, also_in=also_in)


def _batches_claim(
    claim: str,
    paper: str,
    method: str,
    reference: str = "gauss_newton",
    at_least: float | None = None,
    at_most: float | None = None,
) -> Question:
    """A claim about the steps of a variant over those of another at two batches; the figure is that of the batch which
    decides (`measures.deciding_batch`)."""
    which = "smaller" if at_most is None else "larger"
    unit = f"steps to target / {find_setting(reference).label}'s; the {which} of two"
    measure = measures.deciding_batch(measures.step_ratio(method, reference), at_least, at_most)
    return Question(claim, paper, unit, "variants", (reference, method), measure, at_least, at_most)


def _tokens_claim(claim: str, paper: str, method: str, at_most: float) -> Question:
    """A claim about the tokens of a method to Adam's final loss (arXiv 2502.06742, 2412.13148), here AdamW's."""
    measure = tokens_to_final_loss(method, "adamw")
    return Question(claim, paper, "tokens / AdamW's", "stateless", (method, "adamw"), measure, at_most=at_most)


_STEPS = "iteration_complexity"
QUESTIONS = (
    Question(
        "GN needs at least 3x fewer steps than the best of tuned Muon, SOAP and AdamW",
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
    _steps_claim(
        "Layerwise GN needs at most 1.4x the steps of GN",
        "1.4 (78 / 54 = 1.44)",
        _STEPS,
        "layerwise",
        at_most=1.4,
        also_in="layerwise",
    ),
    _steps_claim(
        "With ten step lengths, as in the paper's 150 M model, layerwise GN needs at most 1.4x the steps of GN",
        "1.4 (78 / 54 = 1.44)",
        "layerwise",
        "layerwise_ten_lengths",
        at_most=1.4,
    ),
    _steps_claim(
        "GN-prox-linear is close to GN: at most 1.1x its steps",
        "about 1",
        _STEPS,
        "prox_linear",
        at_most=1.1,
        also_in="prox_linear",
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
        "critical batch / the smaller of theirs",
        "critical_batch_size",
        ("adamw", "soap", "muon"),
        measures.critical_ratio("adamw", ("soap", "muon"), least=True),
        at_most=1.0,
        decided_by=first_batches,
    ),
    Question(
        "At the largest batch SOAP needs at least 5.4x the steps of GN",
        "5.4",
        "steps to target / GN's",
        "critical_batch_size",
        ("gauss_newton", "soap"),
        measures.step_ratio("soap"),
        at_least=5.4,
        decided_by=largest_batch,
    ),
    Question(
        "After a fixed number of tokens at the largest batch GN is at least 0.1 nats below every baseline",
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
    _steps_claim(
        "Where both have ten step lengths, per-matrix GN needs at least the steps of layerwise GN",
        "left open",
        "layerwise",
        "matrixwise",
        "layerwise_ten_lengths",
        at_least=1.0,
    ),
    Question(
        "No other schedule beats the global cosine by more than 5 % at the middle batch",
        "global cosine best overall",
        "best other schedule's steps / the global cosine's",
        "schedules",
        STUDIES["schedules"].methods,
        measures.best_schedule_ratio,
        at_least=0.95,
        decided_by=middle_batch,
    ),
    Question(
        "At the largest batch a cosine inside each outer step beats the global cosine",
        "helps at large batches",
        "constant + inner cosine's steps / the global cosine's",
        "schedules",
        ("gauss_newton", "constant_inner_cosine"),
        measures.best_schedule_ratio,
        at_most=1.0,
        decided_by=largest_batch,
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
    _batches_claim(
        "At the middle and the largest batch GN-prox-linear takes at most 1.1x GN's steps",
        "about 1",
        "prox_linear",
        at_most=1.1,
    ),
    _batches_claim(
        "At the middle and the largest batch GN-prox-linear takes at most 1.1x its steps without line search",
        "none needed",
        "prox_linear_no_search",
        "prox_linear",
        at_most=1.1,
    ),
    _batches_claim(
        "At the middle and the largest batch GN takes at least 1.05x the steps without line search",
        "needed for stability",
        "gauss_newton_no_search",
        at_least=1.05,
    ),
    _batches_claim(
        "At the middle and the largest batch GN takes at least 1.05x the steps without warm start",
        "needed",
        "cold_start",
        at_least=1.05,
    ),
    _batches_claim(
        "At the middle and the largest batch GN takes at least 1.05x the steps with AdamW inside for Muon",
        "better",
        "inner_adamw",
        at_least=1.05,
    ),
    Question(
        "No other value of what is not tuned for a baseline saves it more than 5 % of its steps",
        "sweeps them",
        "each data order's best other value's steps / the baseline's, where it saves most",
        "baseline_settings",
        STUDIES["baseline_settings"].methods,
        measures.best_setting_ratio,
        at_least=0.95,
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


SUBJECTS = tuple(dict.fromkeys(name for one in QUESTIONS for name in (one.study, one.also_in) if name))
"""What claims are about: studies, not all of them, and `gnlib bench`."""
