"""Tables of the studies on records short enough to do by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_results import SEARCH, TRAIN, made

from gnlib import tables
from gnlib.config import ConfigError
from gnlib.files import home
from gnlib.record import Record
from gnlib.results import ends, steps_to_target
from gnlib.variants import Setting, base_label, find_setting


def at_batch(record: Record, sequences: int, label: str | None = None) -> Record:
    record.config = record.config.replace(outer_batch=sequences)
    record.label = label
    return record


def test_costs_are_read_off_where_the_target_is_crossed() -> None:
    """4.25 is three quarters into the only step, which makes 8 inner steps."""
    frame = tables.costs([made("gauss_newton", [5.0, 4.0]), made("muon", [5.0, 4.5, 4.0])], 4.25)
    assert list(frame.index) == ["GN", "Muon"]
    assert list(frame.loc["GN"]) == ["0.75", "0.00", "6.00", "0.00"]
    assert list(frame.loc["Muon"]) == ["1.50", "0.00", "1.50", "0.00"]
    large = made("adamw", [5.0, 4.0])
    large.rows[1] |= {"tokens_train": 3_000_000, "flops": 7e12}  # type: ignore[typeddict-item]
    assert list(tables.costs([large], 4.0).loc["AdamW"]) == ["1.00", "3.00", "1.00", "7.00"]
    reached = steps_to_target([made("gauss_newton", [5.0, 4.0])], 4.25).iloc[0]
    assert reached["tokens"] == pytest.approx(0.75 * (TRAIN + SEARCH)) and reached["flops"] == pytest.approx(0.75e6)
    assert reached["wall_s"] == pytest.approx(0.375) and reached["gradients"] == pytest.approx(6)


def test_a_cost_of_a_run_that_ended_above_the_target_is_a_lower_bound() -> None:
    frame = tables.costs([made("muon", [5.0, 4.5])], 4.25)
    assert list(frame.loc["Muon"]) == ["≥ 1.00", "≥ 0.00", "≥ 1.00", "≥ 0.00"]


def test_cells_are_means_over_the_seeds_of_a_method_at_a_batch() -> None:
    ran = ((4.0, 1, 64), (4.2, 2, 64), (3.0, 1, 16))
    records = [at_batch(made("muon", [5.0, loss], seed), size) for loss, seed, size in ran]
    records += [at_batch(made("adamw", [5.0, 4.5]), 64, "Another name")]
    frame = tables.by_batch(records, tables.mean_loss)
    assert list(frame.columns) == ["Muon", "Another name"] and list(frame.index) == [256, 1024]
    assert frame.loc[1024, "Muon"].startswith("4.10 ± ") and frame.loc[256, "Muon"] == "3.00"
    assert frame.loc[1024, "Another name"] == "4.50" and frame.loc[256, "Another name"] == "-"
    ran_last = [at_batch(made("muon", [5.0, 4.0]), 64), at_batch(made("adamw", [5.0, 4.0]), 16)]
    assert list(tables.by_batch(ran_last, tables.mean_loss).index) == [256, 1024]


def test_leads_are_after_equal_tokens_over_the_best_baseline_there_at_each_batch() -> None:
    """Gauss-Newton reads its search's tokens too: at as many as its training read it is between two evaluations."""
    newton = at_batch(made("gauss_newton", [5.0, 4.0, 3.0]), 64)
    half = newton.rows[-1]["tokens_train"] / (newton.rows[-1]["tokens_train"] + newton.rows[-1]["tokens_search"])
    records = [newton, *(at_batch(made(name, [5.0, loss]), 64) for name, loss in (("muon", 4.5), ("adamw", 4.2)))]
    records += [at_batch(made("muon", [5.0, 4.5]), 16), at_batch(made("gauss_newton", [5.0, 4.0]), 256)]  # alone
    frame = tables.leads(records)
    assert list(frame.index) == [1024] and frame.loc[1024, "over the best of"] == "Muon, AdamW"
    assert frame.loc[1024, "GN's lead"] == f"{4.2 - (5.0 - 2 * half):.2f}" != "1.20"


def test_ratios_are_over_gauss_newtons_at_the_same_batch_paired_by_seed() -> None:
    """A run from 5.0 to 4.0 crosses 4.25 after 0.75 steps, by way of 4.5 after 1.5, of 4.5 and 4.4 after 2.375."""
    fast, slow, slower = [5.0, 4.0], [5.0, 4.5, 4.0], [5.0, 4.5, 4.4, 4.0]
    records = [at_batch(made("gauss_newton", fast, seed), 64) for seed in (1, 2)]
    records += [at_batch(made("gauss_newton", slow, seed), 16) for seed in (1, 2)]
    records += [at_batch(made("muon", losses, seed), 64) for seed, losses in ((1, slow), (2, fast))]
    records += [at_batch(made("muon", slower, seed), 16) for seed in (1, 2)]
    records += [at_batch(made("adamw", [5.0] + [4.5] * steps, steps), 16) for steps in (1, 2)]
    records += [at_batch(made("soap", fast), 32)]  # where there is no Gauss-Newton
    frame = tables.ratios(records, 4.25).set_index(["method", "batch"])
    assert list(frame.index) == [("Muon", 256), ("Muon", 1024), ("AdamW", 256)] and set(frame["n"]) == {2}
    assert list(frame["ratio"]) == pytest.approx([2.375 / 1.5, 1.5, 1.0])
    assert list(frame["half_width"])[:2] == pytest.approx([0.0, 12.706 * 0.5])
    assert list(frame["lower_bound"]) == [False, False, True] and math.isnan(frame["half_width"].iloc[2])


def test_ratios_can_be_over_another_method_for_each() -> None:
    averaged = made("muon", [5.0, 4.5, 4.0])
    averaged.label = find_setting("muon_averaged").label
    frame = tables.ratios([made("muon", [5.0, 4.0]), averaged, made("soap", [5.0, 4.0])], 4.25, base_label)
    assert frame[["method", "ratio"]].values.tolist() == [["Muon, weights averaged", pytest.approx(2.0)]]


def test_where_ratios_have_nothing_to_be_over_or_of_one_line_says_what_is_missing_and_what_makes_it() -> None:
    averaged = made("muon", [5.0, 4.5, 4.0])
    averaged.label = find_setting("muon_averaged").label
    newton, muon, soap = (made(name, [5.0, 4.0]) for name in ("gauss_newton", "muon", "soap"))

    def said(*records: Record, **over: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            tables.ratios(records, 4.25, **over)
        return str(caught.value)

    run = "run: gnlib study NAME --profile PROFILE"
    asked = f"ask for gauss_newton too, or {run} --methods gauss_newton"
    assert said(muon, soap) == f"methods: no runs of GN at the batches of Muon; SOAP, which ratios are over; {asked}"
    assert said(averaged, soap, over=base_label) == (
        "methods: no runs of Muon at the batches of Muon, weights averaged, which ratios are over; "
        f"ask for muon too, or {run} --methods muon"
    )
    newton.config = newton.config.replace({"outer_batch": 2 * muon.config.outer_batch})
    assert said(newton, muon) == f"methods: no runs of GN at the batches of Muon, which ratios are over; {asked}"
    nothing = "and no runs of others are there"
    assert said(newton) == f"methods: ratios are of others over GN, {nothing}; {run}"
    assert said(muon, soap, over=base_label) == f"methods: ratios are of others over Muon; SOAP, {nothing}; {run}"


def test_steps_and_rates_by_batch() -> None:
    records = [made("muon", [5.0, 4.0]), made("adamw", [5.0, 4.5])]
    steps = tables.by_batch(records, tables.mean_steps(4.25))
    assert list(steps.loc[1024]) == ["0.75", "≥ 1.00"]
    assert list(tables.by_batch(records, tables.rates).loc[1024]) == ["0.02, 6 steps", "0.02, 6 steps"]
    both = made("muon", [5.0, 4.0])
    both.config = both.config.replace({"method.inner.adam_lr": 0.005})
    assert tables.rates([both]) == "0.02 / 0.005, 6 steps"


def test_a_diverged_run_has_no_final_loss_to_speak_of() -> None:
    diverged = made("muon", [5.0, 9.0], status="diverged")
    assert tables.mean_loss([diverged]).mean == math.inf
    assert str(tables.mean_loss([diverged, made("muon", [5.0, 4.0], 2)])) == "inf"


def test_ends_have_a_row_a_run_with_its_last_values() -> None:
    frame = ends([made("gauss_newton", [5.0, 4.5, 4.0]), made("adamw", [5.0, 4.2])])
    assert list(frame["final_loss"]) == [4.0, 4.2] and list(frame["outer_step"]) == [2, 1]
    assert list(frame["tokens"]) == [2 * (TRAIN + SEARCH), TRAIN] and list(frame["gradients"]) == [16, 1]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    trials = [
        {"method.inner.lr": 0.1, "outer_steps": 24, "steps_to_target": 10.0, "final_loss": 3.5, "run": "a"},
        {"method.inner.lr": 0.2, "outer_steps": 24, "steps_to_target": 15.0, "final_loss": 3.4, "run": "b"},
        {"method.inner.lr": 0.4, "outer_steps": 24, "steps_to_target": None, "final_loss": 4.2, "run": "c"},
    ]
    entry = {"settings": {"method.inner.lr": 0.1, "outer_steps": 24}, "interior": False, "trials": trials}
    path = tmp_path / "data" / "records" / "laptop" / "tuned.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"muon": entry, "muon@128:budget": entry}))


@pytest.mark.usefixtures("table")
def test_the_tuning_table_has_what_was_chosen_and_whether_it_is_interior() -> None:
    frame = tables.tuned("laptop", [Setting("muon"), Setting("muon", 128, budget=True)])
    assert list(frame.index) == ["muon", "muon@128:budget"]
    assert frame.loc["muon"].to_dict() == {"lr": 0.1, "outer_steps": 24, "score": 10.0, "trials": 3, "interior": False}
    assert frame.loc["muon@128:budget", "score"] == 3.5


@pytest.mark.usefixtures("table")
def test_the_score_is_that_of_the_chosen_settings_wherever_they_stand_among_the_trials() -> None:
    path = home() / "data" / "records" / "laptop" / "tuned.json"
    entry = json.loads(path.read_text())["muon"]
    path.write_text(json.dumps({"muon": entry | {"trials": entry["trials"][::-1]}}))
    assert tables.tuned("laptop", [Setting("muon")]).loc["muon", "score"] == 10.0


@pytest.mark.usefixtures("table")
def test_trials_are_scored_against_the_best_of_their_entry() -> None:
    frame = tables.trials("laptop", [Setting("muon"), Setting("muon", 128, budget=True)])
    own = frame[frame["entry"] == "muon"]
    assert list(own["excess"])[:2] == [1.0, 1.5] and math.isnan(own["excess"].iloc[2])
    assert set(own["batch"]) == {2048 * 64} and set(own["method"]) == {"Muon"}
    budget = frame[frame["entry"] == "muon@128:budget"]
    assert list(budget["score"]) == [3.5, 3.4, 4.2] and set(budget["batch"]) == {128 * 64}
