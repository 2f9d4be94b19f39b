"""A claim holds when its bound does, and says "not run" when there are no records to tell."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_results import made

from gnlib import bench
from gnlib import record as records
from gnlib.claims import as_json, as_markdown, as_text, claims
from gnlib.config import ConfigError, RunConfig
from gnlib.executors import StudyError
from gnlib.measures import early_lead
from gnlib.methods import METHODS, method_of
from gnlib.paper import QUESTIONS
from gnlib.profiles import PROFILES, find_profile
from gnlib.questions import NOT_RUN, UNDECIDED, Claim, Question, first_batches, middle_batch
from gnlib.record import Record
from gnlib.results import Estimate, by_method
from gnlib.studies import study_configs, study_runs
from gnlib.variants import Setting

SEEDS = (1, 2)
REACHED = {"gauss_newton": 2, "layerwise": 3, "prox_linear": 2, "muon": 20, "soap": 8, "adamw": 99}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    return tmp_path


def reaching(step: int) -> list[float]:
    """3.75, the target of tiny, is reached at this step; 24 steps."""
    return [3.75 if t >= step else 4.75 for t in range(25)]


def ship(home: Path, seeds: Sequence[int] = SEEDS, **curves: list[float | None]) -> dict[str, Path]:
    """Records of Figure 1 that reach the target at the steps of REACHED; or with the given losses by method."""
    paths = {}
    table = home / "data" / "records" / "tiny" / "tuned.json"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps({method: {"settings": {}, "interior": True} for method in METHODS}))
    for config in study_configs("iteration_complexity", "tiny", seeds):
        method = method_of(config)
        record = made(method, curves.get(method) or reaching(REACHED[method]), config.seed)
        record.config = config
        path = home / "data" / "records" / "tiny" / f"{config.recipe_id}.jsonl"
        records.write(path, record)
        paths[f"{method} {config.seed}"] = path
    return paths


def about(rows: Sequence[Claim], words: str) -> Claim:
    return next(row for row in rows if words in row.claim)


def verdict_on(found: Estimate, **bounds: float) -> Claim:
    """The answer to a question about AdamW, which is shipped, whose measure gives `found`."""
    asked = Question("claim", "5", "ratio", "iteration_complexity", ("adamw",), lambda groups, target: found, **bounds)
    return asked.answer("tiny", SEEDS, fresh=False)


def test_without_records_every_claim_says_not_run_and_has_no_number() -> None:
    rows = claims("tiny")
    assert len(rows) == len(QUESTIONS) > 8
    assert all((row.ours, row.n, row.holds, row.verdict) == (None, 0, NOT_RUN, "not run") for row in rows)


def test_claims_are_answered_from_shipped_records_over_the_seeds(home: Path) -> None:
    ship(home)
    rows = claims("tiny", seeds=SEEDS)
    expected = {
        "SOAP needs": ("4.00 ± 0.00", True),
        "Muon needs": ("10.00 ± 0.00", True),
        "AdamW needs": ("≥ 12.00", True),  # not reached in 24 steps
        "best of tuned": ("4.00 ± 0.00", True),
        "Layerwise GN needs": ("1.50 ± 0.00", False),
        "GN-prox-linear": ("1.00 ± 0.00", True),
    }
    assert {words: (about(rows, words).ours, about(rows, words).holds) for words in expected} == expected
    assert all(about(rows, words).n == 2 for words in expected)
    assert about(rows, "half-way").holds is True


def test_a_claim_whose_bound_is_missed_does_not_hold(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REACHED, "soap", 4)
    monkeypatch.setitem(REACHED, "layerwise", 4)
    ship(home)
    rows = claims("tiny", seeds=SEEDS)
    for words in ("SOAP needs", "best of tuned", "Layerwise GN needs"):
        assert about(rows, words).ours == "2.00 ± 0.00" and about(rows, words).holds is False
    assert about(rows, "Muon needs").holds is True


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.claim)
def test_the_bound_of_a_claim_is_the_number_in_its_text(question: Question) -> None:
    said = [float(number) for number in re.findall(r"(\d+(?:\.\d+)?)(?=x| %| nats)", question.claim)]
    bound = question.at_least if question.at_least is not None else question.at_most
    assert bound is not None
    allowed = [v for number in said for v in (number, number / 100, 1 - number / 100)]
    allowed += [0.25] * ("a quarter" in question.claim) + [1.0] * (not said)
    assert any(math.isclose(bound, value) for value in allowed)
    most = bool(re.search(r"at most|is below those|outer step beats", question.claim))
    assert (question.at_least is None, question.at_most is None) == (most, not most)


def test_a_claim_with_a_record_missing_or_unfinished_is_not_run_and_others_are(home: Path) -> None:
    path = ship(home)["layerwise 2"]
    whole = path.read_text().splitlines(keepends=True)
    for left in (whole[:-1], []):  # without its status, then nothing
        path.write_text("".join(left))
        rows = claims("tiny", seeds=SEEDS)
        assert about(rows, "Layerwise GN needs").holds == NOT_RUN and about(rows, "Layerwise GN needs").ours is None
        assert about(rows, "SOAP needs").holds is True
    assert about(claims("tiny", seeds=[1]), "Layerwise GN needs").n == 1  # all of seed 1 are there
    ship(home)["gauss_newton 1"].unlink()
    assert {row.holds for row in claims("tiny", seeds=SEEDS)} == {NOT_RUN}


def ship_as(home: Path, config: RunConfig, record: Record) -> None:
    """The record as that of this run."""
    record.config = config
    records.write(home / "data" / "records" / "tiny" / f"{config.recipe_id}.jsonl", record)


def ship_batches(home: Path, study: str, steps: dict[str, tuple[int, ...]]) -> None:
    """One data order of some methods at the batches of tiny, smallest first, reaching the target at these steps."""
    batches = find_profile("tiny").batches
    for setting, config in study_runs(study, "tiny", [1], list(steps), batches):
        if (index := batches.index(setting.batch or 0)) < len(steps[setting.name]):
            ship_as(home, config, made(setting.name, reaching(steps[setting.name][index]), 1))


def test_a_critical_batch_needs_no_records_beyond_the_batch_where_scaling_fails(home: Path) -> None:
    """With the smallest batch of Muon alone, of which nobody knows how it scales, nothing can be said; Gauss-Newton,
    which still scales at its last batch, gives a lower bound."""
    assert len(find_profile("tiny").batches) > 1
    words = "GN's critical batch"
    ship_batches(home, "critical_batch_size", {"gauss_newton": (20, 5), "muon": (20,), "soap": (20, 20)})
    assert about(claims("tiny", seeds=[1]), words).holds == UNDECIDED
    ship_batches(home, "critical_batch_size", {"muon": (20, 20)})
    answer = about(claims("tiny", seeds=[1]), words)
    assert answer.holds is True and answer.ours is not None and answer.ours.startswith("≥ ")
    assert about(claims("tiny", seeds=[1]), "AdamW's critical batch").holds == NOT_RUN


def test_a_claim_about_the_middle_batch_is_decided_there_alone() -> None:
    settings = [Setting(name, batch) for batch in (64, 4, 16) for name in ("gauss_newton", "constant")]
    assert middle_batch(settings, {}, 4.0) == [Setting("gauss_newton", 16), Setting("constant", 16)]
    assert middle_batch(settings[:4], {}, 4.0) == settings[:2]  # as in the studies of two
    assert middle_batch([], {}, 4.0) == []


def test_the_claim_at_the_largest_batch_needs_that_batch_alone(home: Path) -> None:
    largest = find_profile("tiny").batches[-1]
    for setting, config in study_runs("critical_batch_size", "tiny", [1], ["gauss_newton", "soap"]):
        if setting.batch == largest:
            ship_as(home, config, made(setting.name, reaching(2 if setting.is_gauss_newton else 12), 1))
    assert (about(claims("tiny", seeds=[1]), "At the largest batch SOAP").ours or "").startswith("6.00")


def test_a_batch_larger_than_the_profiles_decides_once_all_of_its_runs_are_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "tiny", replace(find_profile("tiny"), larger=(256,)))
    ship_batches(home, "critical_batch_size", {"gauss_newton": (20, 5), "soap": (20, 10)})
    answers = []
    for method, steps in (("gauss_newton", 2), ("soap", 8)):
        answers.append(about(claims("tiny", seeds=[1]), "At the largest batch SOAP").ours or "")
        for setting, config in study_runs("critical_batch_size", "tiny", [1], [method]):
            if setting.batch == 256:
                ship_as(home, config, made(method, reaching(steps), 1))
    answers.append(about(claims("tiny", seeds=[1]), "At the largest batch SOAP").ours or "")
    assert [answer[:4] for answer in answers] == ["2.00", "2.00", "4.00"]


def runs_of(setting: Setting, *steps: int) -> list[Record]:
    """At the setting's batch, which takes these steps to the target on as many data orders."""
    found = [made(setting.name, reaching(count), seed) for seed, count in enumerate(steps)]
    for record in found:
        record.config = record.config.replace(outer_batch=setting.batch)
    return found


def test_batches_count_up_to_the_first_whose_runs_are_missing() -> None:
    settings = [Setting("soap", batch) for batch in (1024, 256, 4096)] + [Setting("muon", 256)]
    steps, target = {256: 16, 1024: 4, 4096: 1}, find_profile("tiny").target  # larger batches scale on
    there = {setting: runs_of(setting, steps[setting.batch or 0]) for setting in settings}
    lost = {setting: runs for setting, runs in there.items() if setting.batch != 1024}
    assert first_batches(settings, lost, target) == [settings[1], settings[3]]
    assert first_batches(settings, there, target) == [settings[1], settings[0], settings[2], settings[3]]


def test_batches_count_up_to_the_first_past_the_critical_one_on_all_data_orders() -> None:
    """How the larger ones were tuned is no matter of the claim's."""
    settings, target = [Setting("soap", batch) for batch in (256, 1024, 4096, 16384)], find_profile("tiny").target
    past = {1: (16, 10, 10, 10), 2: (16, 4, 3, 3), 3: (16, 4, 1, 1)}  # steps, by the batch at which 1.2 is exceeded
    for first, second, count in ((1, 1, 2), (1, 2, 3), (2, 1, 3), (3, 1, 4), (1, 3, 4)):
        steps = zip(settings, past[first], past[second], strict=True)
        there = {setting: runs_of(setting, *both) for setting, *both in steps}
        assert first_batches(settings, there, target) == settings[:count]
    mixed = [(16, 16), (25, 4), (25, 1), (25, 1)]  # on one order the second batch ends above the target
    there = {setting: runs_of(setting, *both) for setting, both in zip(settings, mixed, strict=True)}
    assert first_batches(settings, there, target) == settings


def test_adamws_critical_batch_is_compared_with_the_smaller_of_soaps_and_muons(home: Path) -> None:
    for other in ("soap", "muon"):
        scaling = {"adamw": (20, 8), "soap": (20, 8), "muon": (20, 8)}  # B* is 1.71 times the first batch
        scaling[other] = (20, 20)  # 1.2 times
        ship_batches(home, "critical_batch_size", scaling)
        assert (about(claims("tiny", seeds=[1]), "AdamW's critical").ours or "").startswith("1.43")


SHIPPED = {  # study -> steps to the target by setting
    "prox_linear": {"gauss_newton": 2, "prox_linear": 4, "gauss_newton_no_search": 9, "prox_linear_no_search": 6},
    "layerwise": {"gauss_newton": 2, "layerwise": 4, "matrixwise": 5},
    "line_search": {"gauss_newton": 2, "gauss_newton_no_search": 9, "cold_start": 5, "muon": 20, "muon_search": 12},
    "inner_solver": {"gauss_newton": 2, "inner_adamw": 3},
}
RATIOS = {  # claim -> figure; marked where a variant runs with its method's settings
    "GN-prox-linear needs no line search": "1.50 †",
    "A finer partition": "1.25 †",
    "Line search is needed": "4.50 †",
    "Warm start is needed": "2.50 †",
    "The line search explains little": "6.00 †",
    "Muon is the better inner solver": "1.50 †",
}


@pytest.mark.parametrize("words", RATIOS)
def test_each_claim_on_steps_is_over_the_method_that_it_names(words: str, home: Path) -> None:
    for study, steps in SHIPPED.items():
        for setting, config in study_runs(study, "tiny", [1], list(steps)):
            ship_as(home, config, made(setting.base, reaching(steps[setting.name]), 1))
    assert about(claims("tiny", seeds=[1]), words).ours == RATIOS[words]


def test_a_variant_with_the_settings_of_its_method_is_marked_even_where_these_are_interior(home: Path) -> None:
    """One that is not tuned by itself, and one that is not tuned yet; and it is outdone where its method is."""
    ship(home)  # all methods are interior there
    names = ["muon", "muon_search", "muon_decay_0.1", "gauss_newton"]
    for setting, config in study_runs("line_search", "tiny", [1], names):
        ship_as(home, config, made(setting.base, reaching(2 if setting.name == "gauss_newton" else 5), 1))
    asked = Question("claim", "5", "ratio", "line_search", ("muon_decay_0.1",), lambda *_: Estimate(1.0, None, 1))
    assert asked.answer("tiny", [1], fresh=False).marks == "†"
    assert about(claims("tiny", seeds=[1]), "The line search explains").marks == "†"
    table = home / "data" / "records" / "tiny" / "tuned.json"
    better = [{"method.inner.lr": 0.5, "steps_to_target": 3.0}]
    entries = json.loads(table.read_text())
    entries["muon"] = {"settings": {"method.inner.lr": 0.04}, "interior": True, "trials": better}
    table.write_text(json.dumps(entries))
    for _, config in study_runs("line_search", "tiny", [1], names):
        ship_as(home, config, made("muon", reaching(5), 1))
    assert about(claims("tiny", seeds=[1]), "The line search explains").marks == "†‡"
    assert asked.answer("tiny", [1], fresh=False).marks == "†‡"


def test_stateless_methods_are_counted_in_tokens_to_adamws_final_loss(home: Path) -> None:
    curves = {"adamw": [5.0, 4.5, 4.4, 4.0], "sinkgd": [5.0, 4.0, 3.9, 3.8], "swan": [5.0, 4.5, 4.0, 3.9]}
    for setting, config in study_runs("stateless", "tiny", [1], list(curves)):
        ship_as(home, config, made(setting.name, curves[setting.name], 1))
    rows = claims("tiny", seeds=[1])
    assert [(about(rows, name).ours, about(rows, name).holds) for name in ("SinkGD", "SWAN")] == [
        ("0.33 †", True),
        ("0.67 †", True),
    ]


@pytest.mark.parametrize("loss", [None, 9.0])
def test_tokens_to_the_final_loss_of_a_run_that_diverged_are_no_figure(loss: float | None, home: Path) -> None:
    for setting, config in study_runs("stateless", "tiny", [1], ["adamw", "sinkgd"]):
        end, status = (loss, "diverged") if setting.name == "adamw" else (4.0, "finished")
        ship_as(home, config, made(setting.name, [5.0, end], 1, status))
    assert about(claims("tiny", seeds=[1]), "SinkGD").holds == UNDECIDED


@pytest.mark.parametrize("order", [1, -1])
def test_the_step_cost_is_gauss_newtons_at_the_size_where_it_costs_most_wherever_it_stands(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [("small", "gn", 1.5), ("large", "gn", 1.7), ("large", "layerwise", 7.9), ("small", "layerwise", 4.0)]
    rows = [
        {"size": size, "method": method, "precision": "bf16", "ratio_to_standard": ratio, "n": 20}
        for size, method, ratio in costs
    ]
    monkeypatch.setattr(bench, "shipped", lambda profile: rows[::order])
    answer = about(claims("tiny"), "inner step")
    assert (answer.ours, answer.holds, answer.n) == ("1.70 (large, bf16)", True, 20)


def test_the_claim_at_a_fixed_budget_needs_the_largest_batch_alone(home: Path) -> None:
    largest = find_profile("tiny").batches[-1]
    for setting, config in study_runs("fixed_budget", "tiny", [1]):
        if setting.batch == largest:
            record = made(setting.name, [5.0, 3.0 if setting.is_gauss_newton else 4.0], 1)
            for row in record.rows:
                row["tokens_search"] = 0
            ship_as(home, config, record)
    answer = about(claims("tiny", seeds=[1]), "fixed number of tokens")
    assert answer.holds is True and answer.ours is not None and answer.ours.startswith("1.00")


def test_claims_may_be_those_of_one_study(home: Path) -> None:
    ship(home)
    rows = claims("tiny", seeds=SEEDS, study="iteration_complexity")
    assert [row.claim for row in rows] == [q.claim for q in QUESTIONS if q.study == "iteration_complexity"]
    assert len(rows) >= 7 and NOT_RUN not in {row.holds for row in rows}
    assert [row.claim[:9] for row in claims("tiny", seeds=SEEDS, study="layerwise")] == [
        *("Layerwise", "With ten ", "A finer p", "Where bot")
    ]
    with pytest.raises(ConfigError, match="no claims on 'iteration'; allowed: iteration_complexity, "):
        claims("tiny", study="iteration")


def test_a_claim_on_a_method_whose_tuning_is_not_interior_is_marked(home: Path) -> None:
    ship(home)
    table = home / "data" / "records" / "tiny" / "tuned.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | {"muon": {"settings": {}, "interior": False}}))
    rows = claims("tiny", seeds=SEEDS)
    assert {row.claim[:4] for row in rows if row.ours and row.ours.endswith("†")} == {"Muon", "GN n", "When"}
    assert "†" in as_text(rows).splitlines()[-1]  # with a footnote


def test_a_claim_from_the_data_order_of_tuning_is_marked(home: Path) -> None:
    ship(home, seeds=(0, 1))
    for seeds, mark in ((1,), ""), ((0,), " †"), ((0, 1), " †"):
        found = about(claims("tiny", seeds=seeds), "SOAP needs").ours
        assert found is not None and found.removeprefix("4.00 ± 0.00").removeprefix("4.00") == mark


def test_a_claim_on_a_method_of_which_a_better_setting_was_found_since_is_marked(home: Path) -> None:
    ship(home)
    table, best = home / "data" / "records" / "tiny" / "tuned.json", {"method.inner.weight_decay": 0.1, "run": "b"}
    entry = {"settings": {}, "interior": True, "trials": [best, {"method.inner.weight_decay": 1e-3, "run": "a"}]}
    table.write_text(json.dumps(json.loads(table.read_text()) | {"muon": entry}))
    assert not [row for row in claims("tiny", seeds=SEEDS) if row.ours and "‡" in row.ours]
    entry["settings"] = {"method.inner.weight_decay": 1e-3}  # as the records have it
    table.write_text(json.dumps(json.loads(table.read_text()) | {"muon": entry}))
    rows = claims("tiny", seeds=SEEDS)
    outdone = [row for row in rows if row.ours and row.ours.endswith("‡")]
    assert {row.claim[:4] for row in outdone} == {"Muon", "GN n", "When"}
    assert {row.holds for row in outdone} == {UNDECIDED}
    assert "‡" in as_text(rows).splitlines()[-1]


def test_records_of_different_texts_are_not_compared(home: Path) -> None:
    path = ship(home)["muon 1"]
    record = records.read(path)
    assert record is not None
    record.config = record.config.replace({"data.fingerprint": "another"})
    records.write(path, record)
    with pytest.raises(StudyError, match="different texts"):
        claims("tiny", seeds=SEEDS)


def test_fresh_claims_ignore_shipped_records(home: Path) -> None:
    ship(home)
    assert {row.holds for row in claims("tiny", fresh=True, seeds=SEEDS)} == {NOT_RUN}


@pytest.mark.parametrize(
    ("bounds", "found", "holds"),
    [
        ({"at_least": 3.0}, Estimate(3.0, None, 1), True),
        ({"at_least": 3.0}, Estimate(2.99, None, 1), False),
        ({"at_least": 3.0}, Estimate(3.5, None, 1, censored=1), True),  # at least 3.5 is at least 3
        ({"at_least": 3.0}, Estimate(math.nan, None, 1), UNDECIDED),
        ({"at_least": 3.0}, Estimate(2.5, None, 1, censored=1), UNDECIDED),  # at least 2.5 may be 3
        ({"at_least": 3.0}, Estimate(3.1, 0.2, 1, censored=1), UNDECIDED),  # its spread goes below
        ({"at_most": 1.6}, Estimate(1.6, None, 1), True),
        ({"at_most": 1.6}, Estimate(1.61, None, 1), False),
        ({"at_most": 1.6}, Estimate(1.2, None, 1, censored=1), UNDECIDED),  # at least 1.2 may be anything above
        ({"at_most": 1.6}, Estimate(1.7, None, 1, censored=1), False),
        ({"at_most": 1.6}, Estimate(math.nan, None, 1), UNDECIDED),
        ({"at_least": 1.0, "at_most": 2.0}, Estimate(1.5, None, 1), True),
        ({"at_least": 1.0, "at_most": 2.0}, Estimate(2.5, None, 1), False),
        ({"at_least": 3.0}, Estimate(3.2, 0.1, 1), True),
        ({"at_least": 3.0}, Estimate(3.2, 0.3, 1), UNDECIDED),  # the interval has the bound in it
        ({"at_least": 3.0}, Estimate(2.8, 0.3, 1), UNDECIDED),
        ({"at_least": 3.0}, Estimate(2.8, 0.1, 1), False),
        ({"at_most": 1.0}, Estimate(0.94, 0.08, 1), UNDECIDED),
        ({"at_most": 1.0}, Estimate(0.94, 0.05, 1), True),
    ],
)
def test_a_claim_holds_with_all_of_its_interval_in_the_bounds_and_a_lower_bound_never_shows_at_most(
    bounds: dict[str, float], found: Estimate, holds: bool | str, home: Path
) -> None:
    ship(home)
    answer = verdict_on(found, **bounds)
    assert answer.holds is holds and answer.verdict == {True: "yes", False: "NO"}.get(holds, holds)
    assert (answer.claim, answer.paper, answer.ours, answer.n, answer.unit) == ("claim", "5", str(found), 1, "ratio")


# ---------------------------------------------------------------- the early lead


HALF_WAY = [6.0, 5.5, 4.5, 4.0]  # from 6 to 4: Gauss-Newton is at 5 after 1.5 steps


def lead(**curves: list[float | None]) -> Estimate:
    """The early lead on the way from 6 to 4, seed 1; baselines without a curve stay at 6."""
    idle: dict[str, list[float | None]] = {name: [6.0] * 4 for name in ("muon", "soap", "adamw")}
    return early_lead(by_method([made(name, losses) for name, losses in (idle | curves).items()]), 4.0)


def test_the_early_lead_is_the_best_baselines_share_of_the_way_when_gauss_newton_is_half_way() -> None:
    """Muon is then at 5.7 and AdamW at 5.9: 15 % of the way."""
    found = lead(gauss_newton=HALF_WAY, muon=[6.0, 5.8, 5.6, 4.0], adamw=[6.0, 6.0, 5.8, 5.0])
    assert (found.mean, found.n) == (pytest.approx(0.15), 1)


def test_the_early_lead_is_paired_by_seed() -> None:
    """A baseline's other seed, however good, is compared with Gauss-Newton's other seed only."""
    runs = [made("gauss_newton", HALF_WAY, seed) for seed in (1, 2)]
    runs += [made(name, [6.0] * 4, seed) for name in ("muon", "soap") for seed in (1, 2)]
    runs += [made("adamw", [6.0, 5.8, 5.6, 4.0], 1), made("adamw", [6.0, 5.0, 4.0, 4.0], 2)]
    found = early_lead(by_method(runs), 4.0)
    assert (found.mean, found.n) == (pytest.approx((0.15 + 0.75) / 2), 2)


@pytest.mark.parametrize("gone", ["muon", "soap", "adamw"])
def test_whichever_baseline_has_diverged_by_then_the_early_lead_is_that_of_the_others(gone: str) -> None:
    others: dict[str, list[float | None]] = {name: [6.0, 6.0, 5.8, 5.0] for name in ("muon", "soap", "adamw")}
    found = lead(gauss_newton=HALF_WAY, **(others | {gone: [6.0, 4.1, None]}))
    assert found.mean == pytest.approx(0.05)


def test_where_every_baseline_has_diverged_by_then_nothing_is_said_of_the_early_lead(home: Path) -> None:
    gone: list[float | None] = [6.0, 5.9, None]
    assert math.isnan(lead(gauss_newton=HALF_WAY, muon=gone, soap=gone, adamw=gone).mean)
    ship(home, gauss_newton=HALF_WAY, muon=gone, soap=gone, adamw=gone)
    assert about(claims("tiny", seeds=SEEDS), "half-way").holds == UNDECIDED


def test_there_is_no_early_lead_to_speak_of_when_gauss_newton_never_gets_half_way(home: Path) -> None:
    stuck: list[float | None] = [6.0, 5.9, 5.9]
    ship(home, gauss_newton=stuck, muon=stuck, soap=stuck, adamw=stuck)
    assert about(claims("tiny", seeds=SEEDS), "half-way").holds == UNDECIDED


# ---------------------------------------------------------------- output


def test_json_has_exactly_the_documented_keys(home: Path) -> None:
    ship(home)
    tree = json.loads(json.dumps(as_json(claims("tiny", seeds=SEEDS)), allow_nan=False))
    assert len(tree) == len(QUESTIONS)
    shown = ("claim", "paper", "ours", "n", "unit", "holds")
    numbers = ("mean", "half_width", "is_lower_bound", "at_least", "at_most", "marks")
    assert {tuple(row) for row in tree} == {(*shown, *numbers)}
    soap, adamw = (next(row for row in tree if row["claim"].startswith(f"{name} needs")) for name in ("SOAP", "AdamW"))
    assert [soap[name] for name in numbers] == [4.0, 0.0, False, 3.0, None, ""]
    assert [adamw[name] for name in numbers] == [12.0, pytest.approx(0.0), True, 3.0, None, ""]
    assert [tree[-1][name] for name in numbers] == [None, None, False, None, None, ""]
    assert {row["holds"] for row in tree} >= {True, NOT_RUN}


def test_the_table_is_aligned_and_holds_a_line_a_claim() -> None:
    rows = [
        Claim("short", "5.4 (SOAP)", "≥ 12.00 ± 0.50", 3, "ratio", True),
        Claim("a much longer claim", "3", "1.00", 10, "ratio", False),
        Claim("not there yet", "about 1", None, 0, "ratio", NOT_RUN),
    ]
    assert as_text(rows).splitlines() == [
        "claim                paper       ours            n   holds",
        "-------------------  ----------  --------------  --  -------",
        "short                5.4 (SOAP)  ≥ 12.00 ± 0.50  3   yes",
        "a much longer claim  3           1.00            10  NO",
        "not there yet        about 1     -               -   not run",
    ]


def test_the_readmes_table_has_a_row_a_claim_and_a_column_a_profile(home: Path) -> None:
    ship(home, seeds=[1])  # the seed of tiny
    header, rule, *rows = as_markdown(["tiny", "laptop"]).splitlines()
    assert header == "| claim | unit | paper | tiny | laptop |" and set(rule) == set("| -")
    assert len(rows) == len(QUESTIONS) and {row.count("|") for row in [header, rule, *rows]} == {6}
    (soap,) = (row for row in rows if "SOAP needs at least 3x" in row)
    assert soap.endswith("| 5.4 | 4.00, n = 1: yes | not run |")
