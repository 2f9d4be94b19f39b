"""The critical batch size on laws whose answer is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import pytest
from test_results import made

from gnlib.critical_batch import CriticalBatch, by_name, critical, critical_batch, fit, table
from gnlib.record import Record
from gnlib.results import Crossing

TARGET = 4.0
BATCHES = (64, 256, 1024, 4096)


def crossings(steps: Mapping[int, float], *censored: int) -> dict[int, Crossing]:
    return {batch: Crossing(s, s * batch, batch in censored) for batch, s in steps.items()}


def runs(law: Callable[[int], float], seed: int = 1, batches: tuple[int, ...] = BATCHES) -> list[Record]:
    """Records that reach the target after law(tokens) steps; sequences of tiny have 16 tokens."""
    records = []
    for batch in batches:
        record = made("adamw", [5.0, TARGET], seed)
        record.config = record.config.replace(outer_batch=batch // 16, **{"compute.micro_batch": 1})
        record.rows[1]["outer_step"] = law(batch)  # type: ignore[typeddict-item]
        records.append(record)
    return records


def test_perfect_scaling_has_no_critical_batch_up_to_the_largest() -> None:
    assert critical_batch(crossings({b: 1e5 / b for b in BATCHES})) == (4096.0, "above")


def test_on_a_fine_grid_it_is_where_the_law_exceeds_linear_scaling_by_a_fifth() -> None:
    """S = a + c / B: S B = a B + c is 1.2 (a B_0 + c) at B = 1.2 B_0 + 0.2 c / a."""
    floor, scale = 3.0, 9000.0
    grid = {round(64 * 1.01**i): floor + scale / round(64 * 1.01**i) for i in range(500)}
    found, bound = critical_batch(crossings(grid))
    assert bound == "" and found == pytest.approx(1.2 * 64 + 0.2 * scale / floor, rel=1e-3)


def test_between_batches_it_is_interpolated_in_the_logarithms() -> None:
    """Excess 1 at 64 and 4 at 256, which is constant steps: B* is 1.2 x 64."""
    found, bound = critical_batch(crossings(dict.fromkeys(BATCHES, 10.0)))
    assert bound == "" and found == pytest.approx(1.2 * 64)
    later = crossings({64: 16.0, 256: 4.0, 1024: 2.0, 4096: 2.0})  # excess 1, 1, 2
    assert critical_batch(later)[0] == pytest.approx(256 * 4 ** (math.log(1.2) / math.log(2)))


def test_a_batch_that_scales_better_than_the_smallest_does_not_confuse_it() -> None:
    found, bound = critical_batch(crossings({64: 16.0, 256: 3.0, 1024: 1.5, 4096: 1.5}))
    assert bound == "" and 256 < found < 1024


def test_runs_that_did_not_reach_the_target_bound_it() -> None:
    unreached = crossings({64: 16.0, 256: 4.0, 1024: 3.0, 4096: 3.0}, 1024, 4096)  # at least 3 steps: excess >= 3
    assert critical_batch(unreached) == (pytest.approx(256 * 4 ** (math.log(1.2) / math.log(3))), "below")
    silent = crossings({64: 16.0, 256: 4.0, 1024: 0.5, 4096: 9.0}, 1024)
    assert critical_batch(silent) == (256.0, "above")
    no_reference = critical_batch(crossings({64: 16.0, 256: 4.0}, 64))
    assert math.isnan(no_reference[0])


def test_seeds_are_averaged_geometrically_with_students_interval() -> None:
    records = runs(lambda b: 640 / b, 1, (64,)) + runs(lambda b: 640 / b, 2, (64,))
    records += runs(lambda b: 10.0, 1, (256, 1024)) + runs(lambda b: 2.5, 2, (256, 1024))
    found = critical(records, TARGET)
    values = [1.2 * 64, 1.2 * 256]
    assert found.mean == pytest.approx(math.sqrt(math.prod(values))) and found.n == 2
    half = 12.706 * math.log(values[1] / values[0]) / 2  # t for two seeds; their standard error is half the difference
    assert math.log(found.high / found.low) / 2 == pytest.approx(half)


def unreached(record: Record) -> Record:
    record.rows[1]["val_loss"] = TARGET + 0.5
    return record


def test_seeds_of_which_one_is_bounded_from_above_and_one_from_below_give_no_figure() -> None:
    scales, stuck = runs(lambda b: 1e5 / b, 1), runs(lambda b: 10.0, 2)
    stuck = [record if record.config.outer_batch == 4 else unreached(record) for record in stuck]
    assert critical(scales, TARGET).bound == "above" and critical(stuck, TARGET).bound == "below"
    assert math.isnan(critical(scales + stuck, TARGET).mean)


def test_a_seed_whose_smallest_batch_tells_nothing_leaves_no_figure() -> None:
    first, *rest = runs(lambda b: 10.0, 2)
    found = critical([*runs(lambda b: 10.0, 1), unreached(first), *rest], TARGET)
    assert math.isnan(found.mean) and str(found) == "-" and found.n == 2
    assert math.isnan(critical_batch(crossings({64: 0.0, 256: 0.0}))[0])  # the start is below the target


def test_a_method_without_the_smallest_batch_has_no_critical_batch() -> None:
    """Its own smallest is another reference: it would scale further for having begun later."""
    late = [label(record, "late") for record in runs(lambda b: 10.0, batches=BATCHES[1:])]
    found = by_name([*runs(lambda b: 10.0), *late], TARGET)
    assert math.isnan(found["late"].mean) and str(found["late"]) == "-"
    assert found["AdamW"].mean == pytest.approx(1.2 * 64)
    assert by_name(late, TARGET)["late"].mean == pytest.approx(1.2 * 256)
    assert list(table([*runs(lambda b: 10.0), *late], TARGET)["B* (tokens)"]) == [str(found["AdamW"]), "-"]


def label(record: Record, name: str) -> Record:
    record.label = name
    return record


def test_a_bound_is_said_to_be_one_and_shows_no_interval() -> None:
    found = critical(runs(lambda b: 1e5 / b) + runs(lambda b: 2e5 / b, seed=2), TARGET)
    assert (found.mean, found.low, found.high, found.bound) == (pytest.approx(4096), found.mean, found.mean, "above")
    assert str(found) == "above 4.1 k"
    two = critical(runs(lambda b: 1e5 / b) + runs(lambda b: 2e5 / b, 2, BATCHES[:-1]), TARGET)  # to 4096, to 1024
    assert two.mean == pytest.approx(2048) and two.low < two.mean < two.high  # how far the seeds are apart
    assert str(two) == "above 2.05 k"
    mixed = critical(runs(lambda b: 1e5 / b) + runs(lambda b: 10.0, 2), TARGET)  # one still scales, one never did
    assert mixed.bound == "above" and mixed.mean == pytest.approx(math.sqrt(4096 * 1.2 * 64))


def test_a_critical_batch_prints_its_interval_from_low_to_high_and_one_seed_has_none() -> None:
    assert str(CriticalBatch(2e6, 1e6, 4e6, 3)) == "2 M (1 M to 4 M)"
    assert str(CriticalBatch(2e6, 2e6, 2e6, 1)) == "2 M"


def test_the_fit_recovers_floor_and_slope() -> None:
    assert fit(runs(lambda b: 3 + 9000 / b), TARGET) == (pytest.approx(3), pytest.approx(9000))
    assert fit(runs(lambda b: 9000 / b - 1), TARGET)[0] == 0.0  # steps below proportion: no floor
    assert math.isnan(fit(runs(lambda b: 3 + 9000 / b, batches=(64, 256)), TARGET)[0])  # two are met exactly
    one_batch = runs(lambda b: 3.0, 1, (64,)) + runs(lambda b: 5.0, 2, (64,))
    assert math.isnan(fit(one_batch[:1], TARGET)[0]) and math.isnan(fit(one_batch, TARGET)[0])  # however many seeds
    reached = runs(lambda b: 3 + 9000 / b)
    assert fit([*reached, unreached(runs(lambda b: 500.0, batches=(16384,))[0])], TARGET) == fit(reached, TARGET)


@pytest.mark.parametrize("law", [lambda b: 3 + 9000 / b + 0.01 * b**0.5, lambda b: 9000 / b**1.1])
def test_the_fit_has_the_least_relative_error(law: Callable[[int], float]) -> None:
    """With a floor, and where the best floor would be negative, among the fits without one."""
    floor, slope = fit(runs(law), TARGET)

    def error(a: float, c: float) -> float:
        return sum(((a + c / b) / law(b) - 1) ** 2 for b in BATCHES)

    floors = {floor, 1.01 * floor, 0.99 * floor}
    assert min((error(a, c), a, c) for a in floors for c in (slope, 1.01 * slope, 0.99 * slope))[1:] == (floor, slope)


def test_the_table_has_a_row_a_method() -> None:
    frame = table(runs(lambda b: 3 + 9000 / b), TARGET)
    assert list(frame.index) == ["AdamW"]
    assert frame.loc["AdamW", "floor a (steps)"] == "3.00" and frame.loc["AdamW", "c / a (tokens)"] == "3 k"
    large = table(runs(lambda b: 3 + 9e6 / b), TARGET)
    assert large.loc["AdamW", "c / a (tokens)"] == "3 M"


def test_the_table_counts_seeds_and_says_where_there_is_no_floor() -> None:
    two = table(runs(lambda b: 3 + 9000 / b, 1) + runs(lambda b: 9000 / b - 1, 2), TARGET).loc["AdamW"]
    assert (two["n"], two["floor a (steps)"][:4], two["c / a (tokens)"]) == (2, "1.50", "no floor")
    growing = table(runs(lambda b: b / 1000, 1), TARGET).loc["AdamW"]
    assert growing["c / a (tokens)"] == "-"
    short = table(runs(lambda b: 3.0, 1, (64,)), TARGET).loc["AdamW"]
    assert (short["floor a (steps)"], short["c / a (tokens)"]) == ("-", "-")


def test_floor_and_scale_are_those_of_each_seeds_fit_with_their_intervals() -> None:
    laws = {1: (3.0, 9000.0), 2: (4.0, 8000.0), 3: (5.0, 20000.0)}
    records = [run for seed, (a, c) in laws.items() for run in runs(lambda b, a=a, c=c: a + c / b, seed)]  # type: ignore[misc]
    row = table(records, TARGET).loc["AdamW"]
    spread = 4.302653 / 3**0.5  # Student's t of two degrees of freedom
    assert row["floor a (steps)"] == f"{4:.2f} ± {spread:.2f}"
    logs = [math.log(c / a) for a, c in laws.values()]
    mean, deviation = sum(logs) / 3, statistics.stdev(logs)
    low, high = (math.exp(mean + sign * spread * deviation) / 1e3 for sign in (-1, 1))
    assert row["c / a (tokens)"] == f"{math.exp(mean) / 1e3:.3g} k ({low:.3g} k to {high:.3g} k)"


@pytest.mark.parametrize("floor", [10.0, 1e6])
def test_a_method_that_gains_nothing_from_a_larger_batch_still_has_a_critical_batch(floor: float) -> None:
    steps = critical(runs(lambda b: floor + 1e-3 / b), TARGET)
    assert steps.mean == pytest.approx(1.2 * BATCHES[0])
