"""What the claims of studies 02-08 measure, on records whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_results import made

from gnlib import measures
from gnlib.critical_batch import CriticalBatch
from gnlib.measures import Groups
from gnlib.questions import largest_batch, middle_batch
from gnlib.record import Record
from gnlib.results import Estimate, by_method
from gnlib.variants import Setting, find_setting

TARGET = 4.0


def run(method: str, steps: float, seed: int = 1, batch: int = 64, label: str | None = None) -> Record:
    """Reaches the target after so many steps, at this batch."""
    record = made(method, [5.0, TARGET], seed)
    record.rows[1]["outer_step"] = steps  # type: ignore[typeddict-item]
    record.config = record.config.replace(outer_batch=batch, **{"compute.micro_batch": 1})
    record.label = label
    return record


def scaling(method: str, critical: float, seed: int = 1) -> list[Record]:
    """Linear scaling from 16 sequences, then, from the batch `critical` on, none at all (B* is 1.2 times that)."""
    return [run(method, 1024 / min(batch, critical), seed, batch) for batch in (16, 64, 256, 1024)]


def groups(*records: list[Record]) -> Groups:
    return by_method([record for some in records for record in some])


def test_the_critical_ratio_is_over_the_larger_of_the_others() -> None:
    found = measures.critical_ratio("gauss_newton", ("soap", "muon"))(
        groups(scaling("gauss_newton", 256), scaling("soap", 16), scaling("muon", 64)), TARGET
    )
    assert (found.mean, found.n, found.censored) == (pytest.approx(4.0), 1, 0)


def test_the_critical_ratio_to_be_below_all_is_over_the_smaller_of_the_others() -> None:
    both = groups(scaling("adamw", 16), scaling("soap", 16), scaling("muon", 64))
    assert measures.critical_ratio("adamw", ("soap", "muon"), least=True)(both, TARGET).mean == pytest.approx(1)
    lost = groups(scaling("adamw", 16), ended_above(scaling("soap", 64), 16), scaling("muon", 64))
    assert math.isnan(measures.critical_ratio("adamw", ("soap", "muon"), least=True)(lost, TARGET).mean)


def test_below_all_of_several_is_a_lower_bound_where_one_of_them_may_be_smaller() -> None:
    soap = ended_above(scaling("soap", 64), 256, 1024)  # B* is at most 1.2 times 64
    for muon in (16, 64):
        both = groups(scaling("adamw", 16), soap, scaling("muon", muon))
        found = measures.critical_ratio("adamw", ("soap", "muon"), least=True)(both, TARGET)
        assert found.censored == 1 and found.mean == pytest.approx(16 / muon)


def test_a_method_that_still_scales_gives_a_lower_bound_of_the_ratio() -> None:
    ratio = measures.critical_ratio("gauss_newton", ("soap", "muon"))
    found = ratio(groups(scaling("gauss_newton", 1024), scaling("soap", 16), scaling("muon", 64)), TARGET)
    assert (found.mean, found.censored) == (pytest.approx(1024 / (1.2 * 64)), 1)
    other = ratio(groups(scaling("gauss_newton", 64), scaling("soap", 16), scaling("muon", 1024)), TARGET)
    assert math.isnan(other.mean)  # the ratio is below 1 by an unknown factor


def ended_above(records: list[Record], *batches: int) -> list[Record]:
    for record in records:
        if record.config.outer_batch in batches:
            record.rows[1]["val_loss"] = TARGET + 0.5
    return records


def test_a_critical_batch_that_is_an_upper_bound_bounds_the_ratio_below_or_tells_nothing() -> None:
    ratio = measures.critical_ratio("gauss_newton", ("soap", "muon"))
    muon = ended_above(scaling("muon", 64), 256, 1024)  # B* is at most 1.2 times 64
    found = ratio(groups(scaling("gauss_newton", 256), scaling("soap", 16), muon), TARGET)
    assert found.censored == 1 and found.mean == pytest.approx(4)
    own = ended_above(scaling("gauss_newton", 64), 256, 1024)
    assert math.isnan(ratio(groups(own, scaling("soap", 16), scaling("muon", 16)), TARGET).mean)


def test_one_of_the_others_without_a_critical_batch_leaves_no_ratio() -> None:
    soap = ended_above(scaling("soap", 16), 16)
    for others in (("soap", "muon"), ("muon", "soap")):
        ratio = measures.critical_ratio("gauss_newton", others)
        assert math.isnan(ratio(groups(scaling("gauss_newton", 256), soap, scaling("muon", 16)), TARGET).mean)


def test_the_best_baseline_is_none_that_diverged_above_the_target_on_a_seed() -> None:
    records = [run("gauss_newton", 2, seed) for seed in (1, 2)] + [run("muon", 8, seed) for seed in (1, 2)]
    records += [run("adamw", 20, seed) for seed in (1, 2)] + [run("soap", 4, seed) for seed in (1, 2)]
    assert measures.best_baseline_ratio(by_method(records), TARGET).mean == 2
    records[-1].status = "diverged"
    assert measures.best_baseline_ratio(by_method(records), TARGET).mean == 2  # after it had reached the target
    records[-1].rows[1]["val_loss"] = None
    assert measures.best_baseline_ratio(by_method(records), TARGET).mean == 4


def test_the_best_baseline_is_the_fastest_of_each_seed() -> None:
    """Muon's mean is lower, but on a seed SOAP is far faster: a claim about the best may not overlook it."""
    records = [run("gauss_newton", 2, seed) for seed in (1, 2)] + [run("adamw", 40, seed) for seed in (1, 2)]
    records += [run("muon", 8, seed) for seed in (1, 2)] + [run("soap", 2, 1), run("soap", 16, 2)]
    found = measures.best_baseline_ratio(by_method(records), TARGET)
    assert found.mean == pytest.approx((1 + 4) / 2) and found.within(2.0, None) is None


def test_a_bound_of_a_critical_ratio_keeps_how_far_its_seeds_are_apart() -> None:
    """Else one seed that still scales would decide what the same figures leave open."""
    ratio = measures.critical_ratio("gauss_newton", ("soap", "muon"))
    newton = scaling("gauss_newton", 1024) + scaling("gauss_newton", 64, seed=2)
    others = [r for name in ("soap", "muon") for seed in (1, 2) for r in scaling(name, 16, seed=seed)]
    found = ratio(groups(newton, others), TARGET)
    assert found.censored and found.mean > 3 and found.half_width and found.within(3.0, None) is None


def test_the_best_baseline_may_be_a_bound_and_where_all_diverged_there_is_none() -> None:
    baselines = [run(name, steps) for name, steps in (("muon", 20), ("soap", 8), ("adamw", 10))]
    records = [run("gauss_newton", 2), *baselines]
    for record in baselines:
        record.rows[1]["val_loss"] = TARGET + 0.5  # ended above the target, and well
    found = measures.best_baseline_ratio(by_method(records), TARGET)
    assert (found.mean, found.censored) == (4, 1)
    for record in baselines:
        record.status = "diverged"
    assert math.isnan(measures.best_baseline_ratio(by_method(records), TARGET).mean)


def test_the_interval_of_a_critical_ratio_comes_from_both() -> None:
    def both(method: str) -> list[Record]:
        return scaling(method, 16, seed=1) + scaling(method, 64, seed=2)

    found = measures.critical_ratio("gauss_newton", ("muon",))(groups(both("gauss_newton"), both("muon")), TARGET)
    half = 12.706 * math.log(4) / 2  # of either logarithm
    assert found.mean == pytest.approx(1) and found.half_width == pytest.approx(math.expm1(math.sqrt(2) * half))


def test_the_interval_of_a_critical_ratio_scales_with_the_ratio_and_one_seed_has_none() -> None:
    found = measures._quotient(CriticalBatch(8e6, 4e6, 16e6, 3), CriticalBatch(2e6, 2e6, 2e6, 3))
    assert (found.mean, found.half_width) == (pytest.approx(4), pytest.approx(4))  # up to 8 = 16e6 / 2e6
    one = groups(scaling("gauss_newton", 256), scaling("muon", 64))
    found = measures.critical_ratio("gauss_newton", ("muon",))(one, TARGET)
    assert found.half_width is None and str(found) == "4.00"


def final(method: str, loss: float | None, seed: int, batch: int) -> Record:
    record = made(method, [5.0, loss], seed, "diverged" if loss is None else "finished")
    record.config = record.config.replace(outer_batch=batch)
    for row in record.rows:
        row["tokens_search"] = 0
    return record


def test_the_budget_lead_is_over_the_best_baseline_of_a_seed_at_the_largest_batch() -> None:
    records = [final("gauss_newton", 3.0, seed, 256) for seed in (1, 2)] + [final("gauss_newton", 4.0, 1, 64)]
    records += [final("muon", loss, seed, 256) for seed, loss in ((1, 3.5), (2, 3.9))] + [final("muon", 1.0, 1, 64)]
    records += [final("soap", loss, seed, 256) for seed, loss in ((1, 3.8), (2, 3.3))]
    records += [final("adamw", 1.0, seed, 256) for seed in (1, 2)]
    for record in records[-2:]:
        record.status = "diverged"  # after whatever loss
    found = measures.budget_lead(by_method(records), TARGET)
    assert (found.mean, found.n) == (pytest.approx((0.5 + 0.3) / 2), 2)


def test_the_budget_lead_counts_the_tokens_of_the_line_search() -> None:
    """20 tokens are trained on; the search's 5 + 5 put the 20th half-way through the second step: at 3.5 of 4 to 3."""
    record = final("gauss_newton", 3.0, 1, 256)
    record.rows[:] = [
        record.rows[0] | {"tokens_train": train, "tokens_search": search, "val_loss": loss}
        for train, search, loss in ((0, 0, 5.0), (10, 5, 4.0), (20, 5, 3.0))
    ]
    records = [record, *(final(name, 3.6, 1, 256) for name in measures.BASELINES)]
    assert measures.budget_lead(by_method(records), TARGET).mean == pytest.approx(3.6 - 3.5)


def schedule_ratio(decided_by: Any, records: dict[Setting, list[Record]]) -> Estimate:
    """The measure as a question asks for it: of the settings that decide."""
    chosen = [record for setting in decided_by(list(records), records, TARGET) for record in records[setting]]
    return measures.best_schedule_ratio(by_method(chosen), TARGET)


def test_the_best_other_schedule_is_compared_at_the_middle_and_at_the_largest_batch() -> None:
    names = {name: find_setting(name).label for name in ("constant", "constant_inner_cosine")}
    steps = {"gauss_newton": (8, 4, 2), "constant": (8, 6, 1), "constant_inner_cosine": (8, 5, 4)}
    records = {
        Setting(name, batch): [run("gauss_newton", count, batch=batch, label=names.get(name))]
        for name, counts in steps.items()
        for batch, count in zip((16, 64, 256), counts, strict=True)
    }
    found = [schedule_ratio(decided_by, records) for decided_by in (middle_batch, largest_batch)]
    assert [estimate.mean for estimate in found] == [pytest.approx(5 / 4), pytest.approx(1 / 2)]


def test_the_middle_of_two_batches_is_the_larger_as_in_the_studies() -> None:
    label = find_setting("constant").label
    records = {Setting("gauss_newton", batch): [run("gauss_newton", 4, batch=batch, label=None)] for batch in (16, 64)}
    for batch, steps in ((16, 8), (64, 6)):
        records[Setting("constant", batch)] = [run("gauss_newton", steps, batch=batch, label=label)]
    assert schedule_ratio(middle_batch, records).mean == pytest.approx(1.5)


def by_setting(**steps: tuple[int, ...]) -> Groups:
    """Steps to the target of methods and variants, one a data order."""
    return by_method(
        [
            run(find_setting(name).base, count, seed, label=find_setting(name).label)
            for name, counts in steps.items()
            for seed, count in enumerate(counts)
        ]
    )


def test_the_best_setting_is_that_of_the_baseline_which_gains_most_by_seed() -> None:
    """Muon's best variants take 9 and 8 of its 10 steps, SOAP's all of 20, AdamW's 30 of 20."""
    steps = {"muon": (10, 10), "muon_decay_0.1": (9, 12), "muon_beta2_0.95": (11, 8), "adamw": (20, 20)}
    steps |= {"soap": (20, 20), "soap_decay_0.1": (20, 20), "adamw_averaged": (30, 30)}
    found = measures.best_setting_ratio(by_setting(**steps), TARGET)
    assert (found.mean, found.n) == (pytest.approx((0.9 + 0.8) / 2), 2)
    del steps["adamw"]
    assert math.isnan(measures.best_setting_ratio(by_setting(**steps), TARGET).mean)


def test_where_all_settings_are_slower_it_is_the_one_that_may_be_lowest() -> None:
    """SOAP's of 1 and 4 times its steps, not Muon's of 1.5 twice; and no method is among its own variants."""
    steps = {"muon": (10, 10), "muon_decay_0.1": (15, 15), "soap": (20, 20), "soap_decay_0.1": (20, 80)}
    steps |= {"adamw": (20, 20), "adamw_averaged": (40, 40)}
    assert measures.best_setting_ratio(by_setting(**steps), TARGET).mean == pytest.approx((1 + 4) / 2)


RATIOS = {"wide": ((4, 5), (4, 9)), "one and a half": ((4, 6), (4, 6)), "one": ((4, 4), (4, 4))}  # GN's, Muon's


def decided(small: str, large: str, **bounds: float) -> Estimate:
    """Over a batch of 16 and one of 64 sequences."""
    records = [
        run(name, count, seed, batch)
        for batch, ratios in ((16, small), (64, large))
        for seed, counts in enumerate(RATIOS[ratios])
        for name, count in zip(("gauss_newton", "muon"), counts, strict=True)
    ]
    return measures.deciding_batch(measures.step_ratio("muon"), **bounds)(by_method(records), TARGET)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_batch_that_decides_what_is_at_least_so_much_is_where_the_interval_begins_lowest(swapped: bool) -> None:
    """A mean of 1.75 from 1.25 and 2.25 reaches further down than 1.5 does."""
    names = ("wide", "one and a half")
    assert decided(*names[:: -1 if swapped else 1], at_least=1.2).mean == pytest.approx(1.75)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_batch_that_decides_what_is_at_most_so_much_is_where_it_is_most(swapped: bool) -> None:
    """Where the interval ends highest; where even its lower end is above the bound, whatever ends higher."""
    order = -1 if swapped else 1
    assert decided(*("wide", "one and a half")[::order], at_most=2.0).mean == pytest.approx(1.75)
    assert decided(*("one", "one and a half")[::order], at_most=2.0).mean == pytest.approx(1.5)
    assert decided(*("wide", "one and a half")[::order], at_most=1.4).mean == pytest.approx(1.5)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_batch_that_decides_is_where_the_claim_is_refuted_if_it_is(swapped: bool) -> None:
    """However far down the interval at another batch reaches."""
    names = ("wide", "one")
    assert decided(*names[:: -1 if swapped else 1], at_least=1.2).mean == pytest.approx(1.0)


def test_the_figure_of_the_batch_that_decides_may_be_a_lower_bound_and_is_none_where_one_is_missing() -> None:
    small = [run("gauss_newton", 4, batch=16), run("muon", 8, batch=16)]
    large = [run("gauss_newton", 4, batch=64), *ended_above([run("muon", 6, batch=64)], 64)]
    measure = measures.deciding_batch(measures.step_ratio("muon"), 1.2)
    found = measure(groups(small, large), TARGET)
    assert (found.mean, found.censored) == (pytest.approx(1.5), 1)
    lost = [*ended_above([run("gauss_newton", 4, batch=64)], 64), run("muon", 6, batch=64)]
    assert math.isnan(measure(groups(small, lost), TARGET).mean)
    refuted = [run("gauss_newton", 4, batch=16), run("muon", 4, batch=16)]
    assert measure(groups(refuted, lost), TARGET).mean == pytest.approx(1.0)
    close = measures.deciding_batch(measures.step_ratio("muon"), at_most=2.0)(groups(small, large), TARGET)
    assert (close.mean, close.censored) == (pytest.approx(1.5), 1)  # not the 2 of the other batch: it may be more
