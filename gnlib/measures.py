"""What the claims measure: records grouped by label and the target loss -> one figure with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from gnlib.critical_batch import CriticalBatch, critical
from gnlib.methods import METHODS
from gnlib.record import Record
from gnlib.results import Crossing, Estimate, batches, crossing, estimate, final_loss, ratio, value_at
from gnlib.variants import base_label, find_setting

Groups = dict[str, list[Record]]  # label -> records
Measure = Callable[[Groups, float], Estimate]  # groups, target loss -> figure
BASELINES = tuple(name for name, method in METHODS.items() if not method.is_gauss_newton)


def _steps(c: Crossing) -> float:
    return c.steps


def _named(groups: Groups, name: str) -> list[Record]:
    return groups[find_setting(name).label]


def step_ratio(method: str, reference: str = "gauss_newton") -> Measure:
    """Steps to target of one method over another's."""
    return lambda groups, target: ratio(_named(groups, method), _named(groups, reference), target, _steps)


def best_baseline_ratio(groups: Groups, target: float) -> Estimate:
    """Steps to target of each seed's fastest baseline, over Gauss-Newton's."""
    return _best_ratio([_named(groups, name) for name in BASELINES], _named(groups, "gauss_newton"), target)


def _best_ratio(others: Sequence[Sequence[Record]], reference: Sequence[Record], target: float) -> Estimate:
    """Steps to target of the fastest of several methods on a seed over the reference's, mean over the seeds: on one of
    them it may be another than by the mean. None that on any seed diverged above the target."""
    sound = [record for runs in others if not any(_failed(r, target) for r in runs) for record in runs]
    if not sound:
        return Estimate(math.nan, None, 0)
    fastest = {record.config.seed: record for record in sorted(sound, key=lambda r: -crossing(r, target).steps)}
    return ratio(list(fastest.values()), reference, target, _steps)


def best_setting_ratio(groups: Groups, target: float) -> Estimate:
    """Steps of a seed's best variant of a baseline over the baseline's own; of the baseline whose interval reaches
    lowest. NaN where one of them, or all of its variants, are missing."""
    found = []
    for label in [find_setting(name).label for name in BASELINES]:
        others = [records for name, records in groups.items() if name != label and base_label(name) == label]
        found.append(_best_ratio(others, groups.get(label, []), target))
    unknown = [one for one in found if math.isnan(one.mean)]
    return min(unknown or found, key=lambda one: one.interval[0])


def _failed(record: Record, target: float) -> bool:
    """Diverged before it was there: the steps that it had say nothing."""
    return record.status != "finished" and crossing(record, target).censored


def early_lead(groups: Groups, target: float) -> Estimate:
    """Share of the way from start to target that the best baseline has made by the step at which GN has made half.

    NaN where on a seed GN never has, or every baseline has diverged by then.
    """
    others = [record for name in BASELINES for record in _named(groups, name)]
    shares = []
    for record in _named(groups, "gauss_newton"):
        start = record.rows[0]["val_loss"] or math.nan
        half_way = crossing(record, (start + target) / 2)
        best = min(_loss_at(other, half_way.steps) for other in others if other.config.seed == record.config.seed)
        said = not half_way.censored and math.isfinite(best)
        shares.append((start - best) / (start - target) if said else math.nan)
    return estimate(shares)


def _loss_at(record: Record, step: float) -> float:
    """Validation loss at a step between two evaluations; inf once diverged."""
    loss = value_at(record, step, lambda row: row["val_loss"])
    return math.inf if math.isnan(loss) else loss


def critical_ratio(method: str, others: Sequence[str], least: bool = False) -> Measure:
    """Critical batch of one method over the largest (or `least`) of the others'; a lower bound where its own is one."""

    def measure(groups: Groups, target: float) -> Estimate:
        own = critical(_named(groups, method), target)
        theirs = [critical(_named(groups, name), target) for name in others]
        chosen = max(theirs, key=_size)
        if least and not math.isnan(chosen.mean):
            chosen = min(theirs, key=_size)
        if own.bound == "below" or "above" in {other.bound for other in theirs}:
            return Estimate(math.nan, None, own.n)  # nothing can be said either way
        found = _quotient(own, chosen)
        unknown = least and "below" in {other.bound for other in theirs}  # another may be the smallest
        return replace(found, censored=found.n) if unknown else found

    return measure


def _size(batch: CriticalBatch) -> float:
    return math.inf if math.isnan(batch.mean) else batch.mean


def _quotient(own: CriticalBatch, other: CriticalBatch) -> Estimate:
    """With the interval of a quotient of independent figures, from those of their logarithms: its wider, upper half;
    also of a lower bound, whose seeds may differ as much."""
    mean, bounds = own.mean / other.mean, own.n if own.bound or other.bound else 0
    if own.n == 1:
        return Estimate(mean, None, own.n, bounds)
    half = math.hypot(*(math.log(batch.high / batch.low) / 2 for batch in (own, other)))
    return Estimate(mean, mean * math.expm1(half), own.n, bounds)


def budget_lead(groups: Groups, target: float) -> Estimate:
    """At the largest batch: final loss of the best baseline of a seed minus Gauss-Newton's (`lead`)."""
    others = [record for name in BASELINES for record in largest_batch(_named(groups, name))]
    return lead(largest_batch(_named(groups, "gauss_newton")), others)


def lead(own: Sequence[Record], others: Sequence[Record]) -> Estimate:
    """The lowest final loss of the others on a seed minus that of Gauss-Newton, mean over the seeds.

    Gauss-Newton's is that after as many tokens as a baseline reads, its line search's counted, between two evaluations.
    """
    newton = {record.config.seed: _loss_after(record, record.rows[-1]["tokens_train"]) for record in own}
    best = {seed: min(_ended(record) for record in others if record.config.seed == seed) for seed in newton}
    return estimate([best[seed] - newton[seed] for seed in newton])


def _loss_after(record: Record, tokens: int) -> float:
    """Validation loss after so many tokens, the line search's counted; the last one of a run that reads no more."""
    return value_at(record, tokens, lambda row: row["val_loss"], lambda row: row["tokens_train"] + row["tokens_search"])


def _ended(record: Record) -> float:
    return math.inf if record.status == "diverged" else final_loss(record)


def largest_batch(records: Sequence[Record]) -> list[Record]:
    return list(batches(records).values())[-1]


def deciding_batch(measure: Measure, at_least: float | None = None, at_most: float | None = None) -> Measure:
    """The measure at the batch that decides whether it is `at_least`, or `at_most`, so much at all of them.

    One where it is not, with all of its interval; else nan if it is nan at one; else where its interval reaches
    furthest to the bound's other side.
    """

    def furthest(found: Estimate) -> float:
        low, high = found.interval
        return low if at_most is None else -high

    def measured(groups: Groups, target: float) -> Estimate:
        found = [measure(_at(groups, batch), target) for batch in _sizes(groups)]
        refuted = [one for one in found if one.within(at_least, at_most) is False]
        unknown = [one for one in found if math.isnan(one.mean)]
        return min(refuted or unknown or found, key=furthest)

    return measured


def _sizes(groups: Groups) -> list[int]:
    return list(batches([record for records in groups.values() for record in records]))


def _at(groups: Groups, batch: int) -> Groups:
    return {name: batches(records).get(batch, []) for name, records in groups.items()}


def best_schedule_ratio(groups: Groups, target: float) -> Estimate:
    """Steps of a seed's best other schedule over the global cosine's, at one batch."""
    cosine = find_setting("gauss_newton").label
    return _best_ratio([records for name, records in groups.items() if name != cosine], groups[cosine], target)
