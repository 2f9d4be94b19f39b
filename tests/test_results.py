"""Steps and tokens to a target, ratios and intervals, on curves short enough to do by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from gnlib import results
from gnlib.methods import METHODS, find_method
from gnlib.profiles import run_config
from gnlib.record import Record, Row
from gnlib.results import (
    Crossing,
    Estimate,
    by_method,
    crossing,
    curves,
    estimate,
    ratio,
    steps_to_target,
    summary,
    value_at,
)

TRAIN, SEARCH = 1000, 250  # tokens of a step in `made`


def made(
    method: str,
    losses: Sequence[float | None],
    seed: int = 1,
    status: str = "finished",
    every: int = 1,
    profile: str = "tiny",
) -> Record:
    """A record with these validation losses, evaluated every few steps; only Gauss-Newton methods search."""
    search = SEARCH if find_method(method).is_gauss_newton else 0
    rows: list[Row] = [
        {
            "outer_step": step, "tokens_train": TRAIN * step, "tokens_search": search * step, "flops": 1e6 * step,
            "wall_s": 0.5 * step, "peak_bytes": 1, "train_loss": loss, "val_loss": loss,
            "step_size": 1.0 if step else None, "search_gain": None,
        }
        for step, loss in zip(range(0, every * len(losses), every), losses, strict=True)
    ]  # fmt: skip
    return Record(run_config(profile, method, seed, use_tuned=False), {}, rows, status)


# ---------------------------------------------------------------- crossing


def test_the_target_is_crossed_between_two_evaluations_by_linear_interpolation() -> None:
    """5.0 -> 4.6 -> 4.2 at steps 0, 10, 20: 4.3 is three quarters from 4.6 to 4.2."""
    assert crossing(made("adamw", [5.0, 4.6, 4.2], every=10), 4.3) == Crossing(
        pytest.approx(17.5), pytest.approx(17_500), False
    )


def test_tokens_to_the_target_include_those_of_the_line_search() -> None:
    reached = crossing(made("gauss_newton", [5.0, 4.0]), 4.25)
    assert reached == Crossing(pytest.approx(0.75), pytest.approx(0.75 * (TRAIN + SEARCH)), False)


def test_the_first_crossing_counts_when_the_loss_rises_again() -> None:
    assert crossing(made("adamw", [5.0, 4.0, 4.8, 3.0]), 4.5).steps == pytest.approx(0.5)


def test_a_start_at_or_below_the_target_takes_no_steps() -> None:
    for start in (4.0, 3.9):
        assert crossing(made("adamw", [start, 4.5, 3.0]), 4.0) == Crossing(0, 0, False)


def test_the_target_is_not_reached_across_an_evaluation_without_a_loss() -> None:
    record = made("adamw", [5.0, None, 3.0], profile="laptop")
    found = crossing(record, 4.0)
    assert found.censored and found.steps == 2


def test_a_loss_exactly_at_the_target_has_reached_it() -> None:
    assert crossing(made("adamw", [5.0, 4.5, 4.0, 3.0]), 4.5) == Crossing(1.0, TRAIN, False)
    assert crossing(made("adamw", [5.0, 4.5]), 4.5) == Crossing(1.0, TRAIN, False)


def test_a_run_that_ends_above_the_target_is_censored_at_its_last_step() -> None:
    assert crossing(made("gauss_newton", [5.0, 4.6, 4.2]), 4.1) == Crossing(2, 2 * (TRAIN + SEARCH), True)


@pytest.mark.parametrize("last", [None, 99.0])
def test_a_run_that_diverges_above_the_target_is_censored(last: float | None) -> None:
    assert crossing(made("adamw", [5.0, 4.6, last], status="diverged"), 4.1) == Crossing(2, 2 * TRAIN, True)


def test_a_run_that_diverges_after_the_target_has_reached_it() -> None:
    assert crossing(made("adamw", [5.0, 4.0, None], status="diverged"), 4.5).steps == pytest.approx(0.5)


# ---------------------------------------------------------------- estimates


def test_the_interval_is_students_t() -> None:
    """1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, t = 4.303 for 2 degrees of freedom."""
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.n, found.censored) == (pytest.approx(3.0), 3, 0)
    assert found.half_width == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-6)
    two = estimate([1.0, 3.0])  # standard error 1, t = 12.706
    assert two.half_width == pytest.approx(12.706)
    many = estimate([0.0, 2.0] * 5)  # variance 10/9, t = 2.262 for 9 degrees of freedom
    assert many.half_width == pytest.approx(2.262 / 3)


def test_the_table_of_students_points_is_that_of_its_distribution() -> None:
    """P(|t| < x) by the sum of Abramowitz and Stegun 26.7.3-4, exact for whole degrees of freedom."""
    for n, point in enumerate(results._T95, 1):
        angle = math.atan(point / math.sqrt(n))
        terms, term = [], math.cos(angle) if n % 2 else 1.0
        for k in range(1 if n % 2 else 0, n - 1, 2):
            terms.append(term)
            term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
        total = math.sin(angle) * sum(terms)
        share = 2 / math.pi * (angle + total) if n % 2 else total
        assert share == pytest.approx(0.95, abs=6e-5), n  # points have three decimals


def test_one_seed_has_no_interval() -> None:
    assert estimate([2.5]) == Estimate(2.5, None, 1, 0)


def test_an_estimate_prints_its_interval_and_whether_it_is_a_bound() -> None:
    assert str(Estimate(3.14159, 0.5, 3)) == "3.14 ± 0.50"
    assert str(Estimate(3.14159, None, 1)) == "3.14"
    assert estimate([math.inf, 1.0, 2.0]) == Estimate(math.inf, None, 3, 0)  # nor have figures that are not finite
    assert str(estimate([6.0, 6.0], [True, False])) == "≥ 6.00"  # bounds have no interval


# ---------------------------------------------------------------- ratios


def steps(reached: Crossing) -> float:
    return reached.steps


def falling(method: str, reached_at: int, seed: int, length: int = 8) -> Record:
    """5.0 until the step before `reached_at`, 4.0 from it on: 4.0 is reached exactly there."""
    return made(method, [4.0 if step >= reached_at else 5.0 for step in range(length + 1)], seed)


def test_a_ratio_is_paired_by_seed() -> None:
    """6/3 and 4/1 have mean 3; the ratio of the means would be 2.5."""
    slow, fast = [falling("adamw", 6, 1), falling("adamw", 4, 2)], [falling("gauss_newton", 1, 2)]
    fast += [falling("gauss_newton", 3, 1), falling("gauss_newton", 8, 3)]  # in another order; seed 3 has no partner
    found = ratio(slow, fast, 4.0, steps)
    assert (found.mean, found.n, found.censored) == (pytest.approx(3.0), 2, 0)
    assert found.half_width == pytest.approx(12.706)


def test_a_ratio_may_be_of_tokens() -> None:
    found = ratio([falling("adamw", 6, 1)], [falling("gauss_newton", 2, 1)], 4.0, lambda c: c.tokens)
    assert found.mean == pytest.approx(6 * TRAIN / (2 * (TRAIN + SEARCH)))


def test_a_censored_numerator_makes_the_ratio_a_lower_bound() -> None:
    slow = [falling("adamw", 6, 1), falling("adamw", 99, 2)]
    found = ratio(slow, [falling("gauss_newton", 2, seed) for seed in (1, 2)], 4.0, steps)
    assert (found.mean, found.n, found.censored) == (pytest.approx(3.5), 2, 1)  # 6/2 and at least 8/2
    assert str(found).startswith("≥ 3.50")


def test_a_censored_or_zero_reference_gives_no_ratio() -> None:
    slow = [falling("adamw", 6, seed) for seed in (1, 2)]
    for reached_at in (99, 0):
        found = ratio(slow, [falling("gauss_newton", 2, 1), falling("gauss_newton", reached_at, 2)], 4.0, steps)
        assert math.isnan(found.mean) and found.half_width is None
    assert math.isnan(ratio(slow, [falling("gauss_newton", 2, 3)], 4.0, steps).mean)  # no shared seed


# ---------------------------------------------------------------- tables


def everything() -> list[Record]:
    """All methods over two seeds, in the reverse of the order that tables have."""
    return [falling(name, index + 1, seed) for seed in (2, 1) for index, name in reversed(list(enumerate(METHODS)))]


def test_groups_are_in_the_order_of_the_methods_with_seeds_ascending() -> None:
    other = everything()[0]
    other.config = other.config.replace({"method.inner.optimizer": "torch.optim.Adagrad"})
    groups = by_method([other, *everything()])
    assert list(groups) == ["GN", "Layerwise GN", "GN-prox-linear", "Muon", "SOAP", "AdamW", "torch.optim.Adagrad"]
    assert all([record.config.seed for record in groups[method.label]] == [1, 2] for method in METHODS.values())


def test_curves_have_one_row_an_evaluation_with_all_columns_of_the_record() -> None:
    frame = curves([made("gauss_newton", [5.0, 4.5, None], status="diverged"), made("adamw", [5.0, 4.0], seed=2)])
    names = ["method", "batch", "seed", "status", "run", *Row.__annotations__, "tokens", "gradients"]
    assert list(frame.columns) == names and len(frame) == 5
    assert frame["method"].tolist() == ["GN"] * 3 + ["AdamW"] * 2
    assert frame["status"].tolist() == ["diverged"] * 3 + ["finished"] * 2
    assert frame["seed"].tolist() == [1, 1, 1, 2, 2]
    assert frame["tokens"].tolist() == [0, 1250, 2500, 0, 1000]
    assert set(frame["batch"]) == {64 * 16}
    assert frame["val_loss"].isna().tolist() == [False, False, True, False, False]


def test_the_table_of_runs_has_steps_tokens_and_final_loss() -> None:
    runs = [made("gauss_newton", [5.0, 4.0]), made("soap", [5.0, 4.8, None], status="diverged")]
    frame = steps_to_target(runs, 4.5)
    identity = ["method", "batch", "seed", "status", "run"]
    axes = ["outer_step", "flops", "gradients", "wall_s"]  # there, beside tokens
    assert list(frame.columns) == [*identity, "steps", "tokens", "censored", *axes, "final_loss"]
    assert frame["steps"].tolist() == [0.5, 2] and frame["tokens"].tolist() == [625, 2000]
    assert frame["censored"].tolist() == [False, True]
    assert frame["final_loss"][0] == 4.0 and math.isnan(frame["final_loss"][1])
    assert frame["run"].tolist() == [run.config.recipe_id for run in runs]


def test_the_summary_has_a_row_a_method_with_ratios_to_gauss_newton() -> None:
    runs = [falling("adamw", 6, 1), falling("adamw", 99, 2), *(falling("gauss_newton", 2, seed) for seed in (2, 1))]
    table = summary(runs, 4.0)
    assert list(table.index) == ["GN", "AdamW"]
    assert list(table.columns) == ["n", "reached", "steps", "steps / GN", "Mtokens", "tokens / GN", "final loss"]
    newton, adamw = table.loc["GN"], table.loc["AdamW"]
    assert (newton["n"], newton["reached"], newton["steps"], newton["steps / GN"]) == (
        2, "2 of 2", "2.00 ± 0.00", "1.00 ± 0.00",
    )  # fmt: skip
    assert (adamw["n"], adamw["reached"], adamw["steps"]) == (2, "1 of 2", "≥ 7.00")
    assert adamw["steps / GN"] == "≥ 3.50"  # 3 and 4
    assert adamw["tokens / GN"] == "≥ 2.80"  # GN reads 1.25 times as many a step
    assert adamw["final loss"] == "4.50 ± 6.35"


def test_the_settings_of_a_method_are_those_of_its_runs() -> None:
    changes = {"outer_steps": 7, "method.inner.steps": 4, "method.inner.lr": 0.3, "method.inner.adam_lr": 0.2}
    records = [made("muon", [5.0, 4.0]), made("gauss_newton", [5.0, 4.0])]
    records[0].config = records[0].config.replace(changes | {"method.inner.warmup": 3, "method.inner.steps": 1})
    records[1].config = records[1].config.replace(changes | {"method.inner.warmup": 2, "method.inner.adam_lr": None})
    frame = results.settings(records)
    assert list(frame.loc["Muon"])[:-1] == [1024, 7, 1, "muon", "0.3", "0.2", 3]
    assert list(frame.loc["GN"])[:-1] == [1024, 7, 4, "muon", "0.3", "", 2]
    solved = {"method.inner.optimizer": "conjugate_gradient", "method.inner.schedule": "constant"}
    records[1].config = records[1].config.replace(solved)
    assert results.settings(records).loc["GN", "lr"] == ""  # which has none


def test_beyond_its_end_a_run_keeps_its_last_value_and_between_evaluations_it_is_interpolated() -> None:
    record = made("adamw", [5.0, 4.0, 3.0], every=10)
    losses = [value_at(record, step, lambda row: row["val_loss"]) for step in (0, 5, 10, 15, 20, 70)]
    assert losses == [5.0, 4.5, 4.0, 3.5, 3.0, 3.0]


def test_the_interval_has_students_points_up_to_sixteen_seeds_and_beyond_the_last_which_is_wider() -> None:
    for n, point in ((15, 2.145), (16, 2.131), (17, 2.131)):
        half = estimate([1.0, 3.0] + [2.0] * (n - 2)).half_width
        assert half == pytest.approx(point * math.sqrt(2 / (n - 1)) / math.sqrt(n))


def test_the_summary_counts_tokens_in_millions() -> None:
    record = made("gauss_newton", [5.0, 4.0])
    record.rows[1] |= {"tokens_train": 2_000_000, "tokens_search": 500_000}  # type: ignore[typeddict-item]
    assert summary([record], 4.0).loc["GN", "Mtokens"] == "2.50"
