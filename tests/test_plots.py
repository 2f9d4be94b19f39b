"""Figures: one colour a method, lines that can be told apart, every axis, the same bytes from the same records."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from test_results import made

from gnlib import plots, results
from gnlib.config import ConfigError
from gnlib.critical_batch import CriticalBatch
from gnlib.methods import ALL_METHODS, METHODS
from gnlib.studies import STUDIES
from gnlib.variants import VARIANTS, find_setting

mpl.use("agg")

RECORDS = [
    made("gauss_newton", [5.0, 4.5, 4.0], seed=1),
    made("gauss_newton", [5.0, 4.4, 3.9], seed=2),
    made("muon", [5.0, 4.8, 4.6, 4.4], seed=1),
]
TARGET = 4.2


def lines(figure) -> dict:  # type: ignore[no-untyped-def,type-arg]
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


@pytest.mark.parametrize("study", sorted(STUDIES.keys() - {"variants", "baseline_settings"}))  # drawn as points
def test_no_two_lines_of_a_study_look_alike(study: str) -> None:
    styles = [plots.styles()[find_setting(name).label] for name in STUDIES[study].methods]
    assert len({str(style) for style in styles}) == len(styles)


def test_every_method_and_variant_has_a_line_and_methods_are_solid_but_for_one() -> None:
    """GN-prox-linear runs on top of Gauss-Newton's line, which would not be seen."""
    styles = plots.styles()
    assert set(styles) == {kind.label for kind in (ALL_METHODS | VARIANTS).values()}
    solid = [name for name, method in METHODS.items() if styles[method.label]["linestyle"] == "-"]
    assert solid == [name for name in METHODS if name != "prox_linear"]


@pytest.mark.parametrize("axis", plots.AXES)
def test_a_loss_curve_is_the_mean_over_seeds_on_every_axis(axis: str) -> None:
    curves = results.curves(RECORDS)
    found = lines(plots.loss_curves(curves, TARGET, axis))
    assert set(found) == {"GN", "Muon"}
    assert list(found["GN"].get_ydata()) == pytest.approx([5.0, 4.45, 3.95])
    own = curves[(curves["method"] == "GN") & (curves["seed"] == 1)]
    assert list(found["GN"].get_xdata()) == pytest.approx(list(own[axis]))


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match="no axis 'steps'; allowed: outer_step, tokens, flops, gradients, wall_s"):
        plots.loss_curves(results.curves(RECORDS), TARGET, "steps")


def batches() -> list:  # type: ignore[type-arg]
    found = []
    for size, loss in ((16, 4.0), (64, 4.1), (256, 4.4)):
        record = made("muon", [5.0, 4.5, loss])
        record.config = record.config.replace(outer_batch=size)
        found.append(record)
    return found


def test_the_scaling_line_starts_at_the_smallest_batch_and_bounds_are_marked() -> None:
    reached = results.steps_to_target(batches(), TARGET)
    (axes,) = plots.cost_by_batch(reached).axes
    curve, bounds, ideal = axes.lines
    assert list(curve.get_xdata()) == [256, 1024, 4096] and list(bounds.get_xdata()) == [4096]
    assert list(ideal.get_ydata()) == pytest.approx([curve.get_ydata()[0] / factor for factor in (1, 4, 16)])
    (tokens,) = plots.cost_by_batch(reached, "tokens").axes
    assert len(tokens.lines) == 2  # linear scaling is a statement about steps


def test_a_method_that_was_not_run_at_the_smallest_batch_has_no_scaling_line() -> None:
    late = made("soap", [5.0, 4.5, 4.0])
    late.config = late.config.replace(outer_batch=64)
    (axes,) = plots.cost_by_batch(results.steps_to_target([*batches(), late], TARGET)).axes
    assert len([line for line in axes.lines if line.get_linestyle() == ":"]) == 1


def test_a_stroke_marks_a_critical_batch_between_two_batches_on_1_2_times_the_scaling_line() -> None:
    reached = results.steps_to_target(batches(), TARGET)
    inside, beyond = CriticalBatch(512.0, 500.0, 520.0, 3), CriticalBatch(4096.0, 4096.0, 4096.0, 3, "above")
    (axes,) = plots.cost_by_batch(reached, critical={"Muon": inside}).axes
    curve, _, ideal, stroke = axes.lines
    assert list(stroke.get_xdata()) == [512.0] and stroke.get_color() == curve.get_color()
    assert list(stroke.get_ydata()) == pytest.approx([1.2 * ideal.get_ydata()[0] / 2])  # twice the smallest batch
    unknown = CriticalBatch(math.nan, math.nan, math.nan, 3)
    for axis, one in (("outer_step", beyond), ("outer_step", unknown), ("tokens", inside)):
        (axes,) = plots.cost_by_batch(reached, axis, critical={"Muon": one}).axes
        assert "|" not in [line.get_marker() for line in axes.lines] and "stroke" not in axes.get_title()


def test_the_mean_ends_where_the_first_of_the_runs_does() -> None:
    """Beyond that it would be a mean of fewer, and jump."""
    curves = results.curves([made("muon", [5.0, 4.5, 4.0], seed=1), made("muon", [5.0, 4.3], seed=2)])
    for figure in (plots.loss_curves(curves, TARGET), plots.curves_by_batch(curves, TARGET)):
        drawn = lines(figure)["Muon"]
        assert list(drawn.get_xdata()) == [0, 1] and list(drawn.get_ydata()) == pytest.approx([5.0, 4.4])
    blown_up = [made("muon", [5.0, 4.9, 4.8], seed=1), made("muon", [5.0, 3.0, None], seed=2, status="diverged")]
    drawn = lines(plots.loss_curves(results.curves(blown_up), TARGET))["Muon"]
    assert list(drawn.get_ydata()) == pytest.approx([5.0, 3.95])


def test_a_line_of_many_points_has_no_markers_which_would_fill_its_gaps() -> None:
    for count, marker in ((plots.MARKED, "o"), (plots.MARKED + 1, "None")):
        curves = results.curves([made("muon", [5.0] * count)])
        assert lines(plots.loss_curves(curves, TARGET))["Muon"].get_marker() == marker


def test_a_rate_that_never_reached_the_target_is_a_cross_above_every_point() -> None:
    rows = [("muon", 0.1, 1.0), ("muon", 0.4, 3.0), ("muon", 0.2, None)]
    for suffix, label in (("", "Steps to target"), (":budget", "Final loss")):
        trials = pd.DataFrame(rows, columns=["entry", "lr", "excess"]).assign(method="Muon")
        (axes,) = plots.sweeps(trials.assign(entry=trials["entry"] + suffix)).axes
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        low, high = axes.get_ylim()
        assert list(cross.get_xdata()) == [0.2] and cross.get_ydata()[0] > (3.0 - low) / (high - low)
        assert axes.get_ylabel().startswith(label)


@pytest.mark.parametrize(("axis", "x"), [("batch", [256, 1024, 4096]), ("tokens", [2000, 2000, 2000])])
def test_the_loss_at_a_budget_is_drawn_against_the_batch_or_what_it_cost(axis: str, x: list[int]) -> None:
    found = lines(plots.loss_by_batch(results.ends(batches()), axis))["Muon"]
    assert list(found.get_xdata()) == x and list(found.get_ydata()) == [4.0, 4.1, 4.4]


def test_the_same_records_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("GNLIB_HOME", str(tmp_path / name))
        curves = results.curves(RECORDS)
        folder = plots.save(plots.loss_curves(curves, TARGET), curves, "tiny", "stem")
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"stem.png", "stem.pdf", "stem.csv"}


def test_a_method_whose_trials_all_ended_above_the_target_has_no_tuned_rate_to_show() -> None:
    rows = [("muon", "Muon", 0.1, 10.0), ("muon", "Muon", 0.2, 12.0), ("adamw", "AdamW", 0.1, None)]
    trials = pd.DataFrame(rows, columns=["entry", "method", "lr", "score"]).assign(batch=1024)
    shown = lines(plots.rates_by_batch(trials))
    assert list(shown) == ["Muon"] and list(shown["Muon"].get_ydata()) == [0.1]


def test_a_figure_of_the_tunings_own_data_order_says_so() -> None:
    told = {seed: plots.loss_curves(results.curves([made("muon", [5.0, 4.0], seed=seed)]), TARGET) for seed in (0, 1)}
    titles = {seed: figure.axes[0].get_title() for seed, figure in told.items()}
    assert "the one of tuning" in titles[0] and "tuning" not in titles[1]


def test_ratios_stand_beside_their_methods_a_colour_a_batch_and_bounds_are_open() -> None:
    rows = [("Muon", 256, 3, 1.5, 0.2, False), ("Muon", 1024, 3, 2.0, 0.1, False)]
    rows.append(("AdamW", 1024, 3, 4.0, float("nan"), True))
    table = pd.DataFrame(rows, columns=["method", "batch", "n", "ratio", "half_width", "lower_bound"])
    (axes,) = plots.ratios(table, "title").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["Muon", "AdamW"]
    drawn = [(bars[0], bars[2][0]) for bars in axes.containers if len(bars[0].get_xdata())]
    points = {float(line.get_xdata()[0]): line for line, _ in drawn}
    assert set(points) == {1.5, 2.0, 4.0}
    assert [points[x].get_marker() for x in (1.5, 2.0, 4.0)] == ["o", "o", ">"]
    assert points[4.0].get_fillstyle() == "none"
    assert points[2.0].get_color() == points[4.0].get_color() != points[1.5].get_color()
    spans = {float(line.get_xdata()[0]): bars.get_segments()[0][:, 0] for line, bars in drawn}
    assert list(spans[1.5]) == pytest.approx([1.3, 1.7]) and list(spans[4.0]) == [4.0, 4.0]
    place = {text.get_text(): y for text, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    above, below, alone = (points[x].get_ydata()[0] for x in (1.5, 2.0, 4.0))
    assert place["AdamW"] < place["Muon"] and abs(alone - place["AdamW"]) < 0.3
    assert 0.05 < above - place["Muon"] < 0.3 and 0.05 < place["Muon"] - below < 0.3
    assert [1, 1] in [list(line.get_xdata()) for line in axes.lines] and "mean of 3 data orders" in axes.get_title()
    assert axes.get_legend_handles_labels()[1] == ["batch of 0.256 k tokens", "batch of 1.02 k tokens"]
    (axes,) = plots.ratios(table[table["batch"] == 256].assign(n=1), "title", over="the baseline's").axes
    assert axes.get_xlabel() == "Outer steps to the target / the baseline's"
    [[point, *_]] = [bars for bars in axes.containers if len(bars[0].get_xdata())]
    assert point.get_ydata()[0] == axes.get_yticks()[0] and axes.get_title().endswith("\n1 data order")
