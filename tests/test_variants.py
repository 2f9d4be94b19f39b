"""Settings: what a variant, another batch or a budget changes of a method's run, and where their tuning is found."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gnlib.config import ConfigError, RunConfig
from gnlib.measures import BASELINES
from gnlib.methods import METHODS
from gnlib.profiles import PROFILES, find_profile, run_config
from gnlib.studies import STUDIES, study_runs, tuned_settings
from gnlib.train import check
from gnlib.variants import (
    UNTUNED,
    VARIANTS,
    Setting,
    borrows,
    find_setting,
    home_batch,
    key,
    most_steps,
    setting_config,
)

BATCHES = {name: profile.batches for name, profile in PROFILES.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    return tmp_path


def tuned(home: Path, profile: str = "laptop", **entries: dict[str, Any]) -> None:
    path = home / "data" / "records" / profile / "tuned.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: {"settings": settings} for name, settings in entries.items()}))


def changed(before: RunConfig, after: RunConfig) -> set[str]:
    """Dotted names of the fields that differ."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for name, value in tree.items():
            rows |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return rows

    first, second = (flat(config.model_dump(mode="json")) for config in (before, after))
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


# ---------------------------------------------------------------- every study


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_every_study_can_be_built_and_none_comes_twice(name: str, profile: str) -> None:
    runs = study_runs(name, profile, seeds=[1])
    assert len({run.config.recipe_id for run in runs}) == len(runs) >= 3 or profile.startswith("paper")
    for config in {run.config.recipe_id: run.config for run in runs}.values():
        if config.model.width <= 64:  # building the large ones takes long, and they differ in size only
            check(config)


@pytest.mark.parametrize("profile", PROFILES)
def test_batches_are_powers_of_four_apart_with_the_profiles_own_and_divide_the_budget(profile: str) -> None:
    batches = BATCHES[profile]
    assert home_batch(profile) in batches and len(batches) >= (2 if profile == "tiny" else 3)
    assert all(larger == 4 * smaller for smaller, larger in pairwise(batches))
    budget = find_profile(profile).budget
    assert budget >= 2 * batches[-1] and all(budget % batch == 0 for batch in batches)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"outer_batch": 128}}, "the outer batch of 'tiny', 128, is not among its batches 16, 64"),
        ({"budget": 100}, "the budget of 'tiny', 100, is no multiple, twice or more, of 16, 64"),
        ({"budget": 64}, "the budget of 'tiny', 64, is no multiple, twice or more, of 16, 64"),
        ({"batches": (64, 16)}, "the batches of 'tiny', 64, 16, do not ascend"),
        ({"batches": (16, 64, 64)}, "the batches of 'tiny', 16, 64, 64, do not ascend"),
        ({"larger": (64,)}, "the larger batches of 'tiny', 64, do not ascend beyond the others, 16, 64"),
        ({"larger": (1024, 256)}, "the larger batches of 'tiny', 1024, 256, do not ascend beyond the others, 16, 64"),
        ({"larger": (256,), "batches": ()}, "the larger batches of 'tiny', 256, do not ascend beyond the others, "),
        ({"methods": {"gauss_newtn": {}}}, "methods of 'tiny': no method 'gauss_newtn'; near or allowed: gauss_newton"),
        ({"longer": {"sophia": 9}}, "longer of 'tiny': no method 'sophia'; near or allowed: sophia_g, soap"),
        ({"tuned": ("outer_steps", "inner.lr")}, "tuned of 'tiny': no field 'inner.lr' is tuned; allowed: method.*"),
    ],
)
def test_a_profile_whose_fields_do_not_fit_together_or_would_be_ignored_is_refused(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], **changes))
    with pytest.raises(ConfigError, match=f"^profile: {words}$"):
        find_profile("tiny")


def test_the_schedules_are_studied_at_a_small_a_medium_and_a_large_batch() -> None:
    batches = {p: sorted({run.config.outer_batch for run in study_runs("schedules", p)}) for p in ("laptop", "h200")}
    assert batches == {"laptop": [128, 512, 2048], "h200": [1024, 4096, 16384]}  # h200 has a smaller one
    assert {run.config.outer_batch for run in study_runs("stateless", "h200")} == {1024}


def test_the_variants_are_studied_at_the_middle_and_the_largest_batch() -> None:
    for profile, batches in (("laptop", [512, 2048]), ("h200", [4096, 16384])):
        assert sorted({run.setting.batch for run in study_runs("variants", profile)}) == batches


def test_studies_at_a_budget_read_as_many_tokens_whatever_the_batch() -> None:
    for name in ("fixed_budget", "stateless"):
        runs = study_runs(name, "laptop", [1])
        assert {run.config.outer_steps * run.config.outer_batch for run in runs} == {find_profile("laptop").budget}
        assert all(run.setting.budget for run in runs)


def test_a_method_named_twice_runs_once() -> None:
    assert len(study_runs("layerwise", "tiny", [1, 1], ["layerwise", "layerwise"])) == 1


def test_what_a_study_is_tuned_for_are_its_methods_and_the_variants_with_settings_of_their_own() -> None:
    found = tuned_settings("line_search", "laptop", ["search_on_all", "gauss_newton_no_search"])
    assert found == {
        "gauss_newton": Setting("gauss_newton", 2048),
        "gauss_newton_no_search": Setting("gauss_newton_no_search", 2048),
    }


@pytest.mark.parametrize(
    ("study", "names"),
    [
        ("schedules", {"gauss_newton", "global_inner_cosine", "constant_inner_cosine", "constant"}),
        ("line_search", {"gauss_newton", "gauss_newton_no_search", "cold_start", "muon", "muon_search"}),
        ("baseline_settings", {"muon", "soap", "adamw"}),
    ],
)
def test_what_a_study_tunes_comes_first_at_the_profiles_batch(study: str, names: set[str]) -> None:
    """Searches at other batches start from there."""
    found = tuned_settings(study, "laptop")
    assert {name for name in found if "@" not in name} == set(list(found)[: len(names)]) == names


def test_a_variant_that_is_not_tuned_follows_the_data_order_and_the_settings_of_its_method(home: Path) -> None:
    tuned(home, gauss_newton={"method.inner.lr": 0.123})
    config = setting_config("laptop", Setting("half_n"), seed=3)
    assert (config.seed, config.method.inner.lr) == (3, 0.123)


def test_at_a_larger_batch_gauss_newton_starts_with_the_root_of_the_steps_and_a_baseline_with_as_many(
    home: Path,
) -> None:
    tuned(home, gauss_newton={"outer_steps": 8}, adamw={"outer_steps": 48, "method.inner.warmup": 6})
    newton, adamw = (setting_config("laptop", Setting(name, 4 * 2048)) for name in ("gauss_newton", "adamw"))
    assert (newton.outer_steps, adamw.outer_steps, adamw.method.inner.warmup) == (4, 48, 6)


def test_the_loss_is_evaluated_less_often_at_a_smaller_batch_and_eight_times_over_a_budget() -> None:
    sequences = run_config("laptop", "adamw").evaluation.sequences
    for batch in BATCHES["laptop"][:-1]:
        assert setting_config("laptop", Setting("adamw", batch)).evaluation.every == max(1, sequences // (2 * batch))
        budget = setting_config("laptop", Setting("adamw", batch, budget=True))
        assert budget.evaluation.every == max(1, budget.outer_steps // 8)


def test_no_warm_up_is_longer_than_half_a_budget_and_no_batch_too_small_for_an_inner_step(home: Path) -> None:
    tuned(home, adamw={"method.inner.warmup": 24})
    config = setting_config("laptop", Setting("adamw", 2048, budget=True))
    assert (config.outer_steps, config.method.inner.warmup) == (8, 4)
    assert setting_config("laptop", Setting("gauss_newton", 8)).method.inner.steps == 1


def test_a_method_without_warm_up_has_none_at_another_batch() -> None:
    for batch in (128, 8192):
        assert setting_config("laptop", Setting("gauss_newton", batch)).method.inner.warmup == 0


def test_a_constant_rate_runs_to_the_cap_whatever_length_is_tuned(home: Path) -> None:
    tuned(home, gauss_newton={"outer_steps": 5})
    setting = Setting("constant")
    assert setting_config("laptop", setting).outer_steps == most_steps("laptop", setting) > 5


def test_a_search_at_a_larger_batch_does_not_cut_off_a_schedule_whose_length_it_cannot_change(home: Path) -> None:
    cosine = Setting("constant_inner_cosine", 16384)
    searched = setting_config("h200", cosine, use_tuned=False)
    assert searched.outer_steps == most_steps("h200", cosine) == 24
    assert searched.evaluation.stop_below == find_profile("h200").target
    borrowed, newton = setting_config("h200", cosine), setting_config("h200", Setting("gauss_newton", 16384))
    assert borrowed.outer_steps == newton.outer_steps < 24
    assert setting_config("h200", Setting("constant_inner_cosine", 1024), use_tuned=False).evaluation.stop_below is None


def test_a_variant_of_the_line_search_searches_on_its_share_with_its_candidates() -> None:
    names = ("search_on_16th", "muon_search", "search_on_all", "matrixwise")
    searches = [setting_config("laptop", Setting(name)).method.line_search for name in names]
    assert [search and search.fraction for search in searches[:3]] == [1 / 16, 1 / 4, 1.0]
    assert searches[3] is not None and searches[3].candidates == 10


def test_an_inner_solver_has_the_settings_that_it_is_compared_with() -> None:
    soap, conjugate = (setting_config("laptop", Setting(name)).method.inner for name in ("inner_soap", "inner_cg"))
    assert soap.options["precondition_frequency"] == 10
    assert (conjugate.steps, conjugate.schedule) == (64, "constant")


def test_runs_at_the_profiles_own_batch_are_those_of_figure_1() -> None:
    """So that they are trained once."""
    shared = {run.config.recipe_id for run in study_runs("iteration_complexity", "laptop")}
    for name in ("critical_batch_size", "prox_linear", "layerwise", "schedules", "line_search", "inner_solver"):
        own = [run for run in study_runs(name, "laptop") if run.setting.name in METHODS]
        assert {run.config.recipe_id for run in own if run.config.outer_batch == 2048} <= shared


def test_an_unknown_method_names_the_near_ones_and_a_batch_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="no method 'inner_adam'; near or allowed: inner_adamw"):
        find_setting("inner_adam")
    with pytest.raises(ConfigError, match="batch: 0; at least 1"):
        find_setting("adamw", 0)


# ---------------------------------------------------------------- other batches and a budget


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["gauss_newton", "layerwise"])
def test_gauss_newton_keeps_its_inner_batch_and_rate_at_every_batch(method: str, profile: str) -> None:
    own = run_config(profile, method)
    for batch in BATCHES[profile]:
        config = setting_config(profile, Setting(method, batch))
        assert config.outer_batch == batch
        assert batch / config.method.inner.steps == own.outer_batch / own.method.inner.steps
        assert config.method.inner.lr == own.method.inner.lr


def test_a_baselines_rates_start_at_those_of_the_profiles_batch_and_its_run_ends_at_the_target(home: Path) -> None:
    tuned(home, muon={"method.inner.lr": 0.1, "method.inner.adam_lr": 0.04, "outer_steps": 24})
    config = setting_config("laptop", Setting("muon", 128))
    assert (config.method.inner.lr, config.method.inner.adam_lr, config.outer_steps) == (0.1, 0.04, 96)
    assert config.evaluation.stop_below == find_profile("laptop").target
    assert run_config("laptop", "muon").evaluation.stop_below is None


def test_a_budget_gives_the_number_of_steps_and_is_read_to_its_end() -> None:
    for batch in BATCHES["laptop"]:
        for method in ("gauss_newton", "adamw"):
            config = setting_config("laptop", Setting(method, batch, budget=True))
            assert config.outer_steps * config.outer_batch == find_profile("laptop").budget
            assert config.method.inner.warmup <= config.outer_steps / 2
            assert config.evaluation.stop_below is None


@pytest.mark.parametrize("batch", [48, 128, 256])  # no divisor; one step; none
@pytest.mark.parametrize("name", ["adamw", "gauss_newton", "cold_start"])
def test_a_batch_that_does_not_divide_the_budget_into_two_steps_or_more_is_refused(name: str, batch: int) -> None:
    """The run would read another number of tokens than the budget."""
    allowed = "allowed: one that divides the budget of profile 'tiny', 128, into 2 steps or more"
    with pytest.raises(ConfigError, match=f"^batch: {batch} sequences; {allowed}$"):
        setting_config("tiny", Setting(name, batch, budget=True))
    assert setting_config("tiny", Setting(name, 32, budget=True)).outer_steps == 4


def test_what_was_tuned_for_a_setting_is_used_there_and_nowhere_else(home: Path) -> None:
    rates = {"adamw": 0.02, "adamw@128": 0.003, "adamw@128:budget": 0.007, "inner_adamw": 0.5}
    tuned(home, **{name: {"method.inner.lr": lr} for name, lr in rates.items()})
    settings = [Setting("adamw"), Setting("adamw", 128), Setting("adamw", 128, True), Setting("adamw", 512)]
    settings.append(Setting("inner_adamw"))
    found = {key("laptop", each): setting_config("laptop", each).method.inner.lr for each in settings}
    assert found == rates | {"adamw@512": 0.02}
    start = setting_config("laptop", Setting("adamw", 128), use_tuned=False)
    assert start.method.inner.lr == 0.02  # what was tuned at the profile's batch


def test_changes_asked_for_outweigh_what_was_tuned(home: Path) -> None:
    tuned(home, **{"adamw@128": {"method.inner.lr": 0.003}})
    found = setting_config("laptop", Setting("adamw", 128), changes={"method.inner.lr": 0.5})
    assert found.method.inner.lr == 0.5


# ---------------------------------------------------------------- variants


FIELDS = {  # in which a variant that is not tuned yet differs from its base
    "gauss_newton_no_search": {f"method.line_search.{name}" for name in ("candidates", "fraction", "zero")},
    "matrixwise": {"method.blocks", "method.line_search.candidates"},
    "constant_inner_cosine": {"method.inner.schedule"},
    "constant": {"method.inner.schedule", "outer_steps", "evaluation.stop_below"},
    "search_without_zero": {"method.line_search.zero"},
    "search_on_all": {"method.line_search.fraction"},
    "cold_start": {"method.inner.warm_start"},
    "double_n": {"method.inner.steps"},
    "soap_beta2_0.999": {"method.inner.betas", "evaluation.stop_below"},
    "muon_momentum_0.98": {"method.inner.momentum", "evaluation.stop_below"},
    "adamw_decay_0.1": {"method.inner.weight_decay", "evaluation.stop_below"},
    "adamw_averaged": {"evaluation.average", "evaluation.stop_below"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_variant_changes_what_it_is_named_for(name: str) -> None:
    base = run_config("laptop", VARIANTS[name].base)
    found = changed(base, setting_config("laptop", Setting(name)))
    assert found == FIELDS[name]


def test_what_is_not_tuned_for_the_baselines_differs_from_what_they_have() -> None:
    configs = [setting_config("laptop", Setting(name)) for name in (*BASELINES, *UNTUNED)]
    assert len({config.recipe_id for config in configs}) == len(configs) == 3 + 17
    assert {VARIANTS[name].base for name in UNTUNED} == set(BASELINES)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("adamw_averaged", {"evaluation.average": 0.9}),
        ("soap_beta2_0.99", {"method.inner.betas": (0.9, 0.99)}),
        ("muon_momentum_0.9", {"method.inner.momentum": 0.9}),
    ],
)
def test_what_is_not_tuned_has_the_value_that_it_is_named_for(name: str, changes: dict[str, Any]) -> None:
    config = setting_config("laptop", Setting(name))
    assert config == config.replace(changes)


def test_inner_steps_of_a_variant_are_one_at_least(home: Path) -> None:
    assert setting_config("tiny", Setting("quarter_n", 16)).method.inner.steps == 1


def test_inner_steps_of_a_variant_are_a_multiple_of_its_methods() -> None:
    steps = [setting_config("laptop", Setting(name)).method.inner.steps for name in ("quarter_n", "half_n", "double_n")]
    assert steps == [32, 64, 256]


def test_a_variant_without_tuning_of_its_own_runs_with_its_methods_at_the_same_batch(home: Path) -> None:
    tuned(home, **{"muon": {"method.inner.lr": 0.3}, "muon@128": {"method.inner.lr": 0.07}})
    for batch, lr in ((None, 0.3), (128, 0.07)):
        config = setting_config("laptop", Setting("muon_decay_0.1", batch))
        assert config.method.inner.lr == lr and config.method.inner.weight_decay == 0.1
        assert borrows("laptop", Setting("muon_decay_0.1", batch))
    assert "muon_decay_0.1" not in tuned_settings("baseline_settings", "laptop")


def test_a_variant_runs_with_its_methods_settings_until_it_is_tuned_at_the_same_batch(home: Path) -> None:
    """Else its records at other batches were lost once it is tuned at the profile's; its search starts from there."""
    entries = {"muon": {"method.inner.lr": 0.3}, "muon@128": {"method.inner.lr": 0.07}}
    tuned(home, **entries)
    setting = Setting("muon_search", 128)
    assert setting_config("laptop", setting).method.inner.lr == 0.07 and borrows("laptop", setting)
    assert setting_config("laptop", setting, use_tuned=False).method.inner.lr == 0.3
    tuned(home, **entries, muon_search={"method.inner.lr": 0.2})
    assert setting_config("laptop", setting).method.inner.lr == 0.07 and borrows("laptop", setting)
    assert setting_config("laptop", setting, use_tuned=False).method.inner.lr == 0.2
    tuned(home, **entries, **{"muon_search@128": {"method.inner.lr": 0.1}})
    assert setting_config("laptop", setting).method.inner.lr == 0.1 and not borrows("laptop", setting)
    assert not borrows("laptop", Setting("muon", 128)) and not borrows("laptop", Setting("adamw", 128))


def test_past_the_profiles_batch_a_baseline_starts_with_as_many_steps(home: Path) -> None:
    tuned(home, muon={"outer_steps": 24, "method.inner.warmup": 6})
    larger = setting_config("laptop", Setting("muon", 8192))
    assert (larger.outer_steps, larger.method.inner.warmup) == (24, 6)


def test_at_a_budget_the_search_starts_from_the_rates_tuned_at_the_same_batch(home: Path) -> None:
    rates = {"method.inner.lr": 0.3, "method.inner.adam_lr": 0.2}
    tuned(home, **{"muon": {"method.inner.lr": 0.1}, "muon@128": rates | {"outer_steps": 24}})
    found = setting_config("laptop", Setting("muon", 128, budget=True), use_tuned=False)
    assert (found.method.inner.lr, found.method.inner.adam_lr, found.outer_steps) == (0.3, 0.2, 128)
    elsewhere = setting_config("laptop", Setting("muon", 512, budget=True), use_tuned=False)
    assert elsewhere.method.inner.lr == 0.1


def test_beyond_the_profiles_batches_the_search_starts_from_all_that_was_tuned_at_the_next_smaller(home: Path) -> None:
    """Where a baseline gains nothing from the batch any more, its length stays too."""
    at_home = {"method.inner.lr": 0.3, "outer_steps": 24, "method.inner.warmup": 6}
    smaller = {"method.inner.lr": 0.1, "outer_steps": 20, "method.inner.warmup": 4}
    tuned(home, "h200", **{"muon": at_home, "muon@16384": smaller})
    inner = (found := setting_config("h200", Setting("muon", 65536))).method.inner
    assert (inner.lr, found.outer_steps, inner.warmup) == (0.1, 20, 4)
    tuned(home, "h200", muon=at_home)
    inner = (found := setting_config("h200", Setting("muon", 65536))).method.inner
    assert (inner.lr, found.outer_steps, inner.warmup) == (0.3, 24, 6)  # as many as at home


def test_a_variant_starts_at_another_batch_from_its_own_rates_and_its_methods_length(home: Path) -> None:
    rates = {"method.inner.lr": 0.005, "method.inner.adam_lr": 0.0015}
    tuned(home, gauss_newton={"outer_steps": 4}, gauss_newton_no_search=rates | {"outer_steps": 8})
    found = setting_config("laptop", Setting("gauss_newton_no_search", 128), use_tuned=False)
    assert (found.method.inner.lr, found.method.inner.adam_lr, found.outer_steps) == (0.005, 0.0015, 64)
    tuned(home, inner_adamw={"method.inner.lr": 0.07}, inner_cg={"method.inner.options.damping": 0.5})
    adamw, cg = (setting_config("laptop", Setting(name, 128), use_tuned=False) for name in ("inner_adamw", "inner_cg"))
    assert adamw.method.inner.lr == 0.07 and cg.method.inner.options["damping"] == 0.5
    tuned(home, gauss_newton_no_search=rates)
    found = setting_config("laptop", Setting("gauss_newton_no_search", 128, True), use_tuned=False)
    assert found.method.inner.lr == 0.005
    at_home = setting_config("laptop", Setting("gauss_newton_no_search"), use_tuned=False)
    assert at_home.method.inner.lr == run_config("laptop", "gauss_newton").method.inner.lr
    tuned(home, **{"gauss_newton": rates, "gauss_newton@128": {"method.inner.lr": 0.3}})
    borrowed = setting_config("laptop", Setting("cold_start", 128))  # not tuned yet
    assert borrowed.method.inner.lr == 0.3


def test_a_variant_may_take_twice_the_steps_of_its_method() -> None:
    assert most_steps("laptop", Setting("gauss_newton")) == 6
    assert most_steps("laptop", Setting("cold_start")) == 12
    assert most_steps("laptop", Setting("gauss_newton", 128)) == 96
    assert most_steps("laptop", Setting("gauss_newton", 8192)) == 6  # no fewer at a larger batch
    assert most_steps("laptop", Setting("adamw", 128)) == 384


def test_a_method_may_have_a_higher_cap_of_its_own() -> None:
    assert most_steps("h200", Setting("adamw")) == 192
    assert most_steps("h200", Setting("muon")) == 96
    assert most_steps("h200", Setting("adamw", 1024)) == 384  # follows the batch as every cap does
    assert most_steps("h200", Setting("adamw", 16384)) == 192  # no fewer at a larger batch
    assert setting_config("laptop", Setting("sophia_g")).evaluation.stop_below == find_profile("laptop").target


def test_a_run_at_a_budget_goes_on_below_the_target() -> None:
    for name in ("sophia_g", "adamw", "gauss_newton"):
        assert setting_config("laptop", Setting(name, 128, budget=True)).evaluation.stop_below is None
