"""The search over settings on score surfaces that are known, in place of runs."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_results import made

from gnlib import cli, study
from gnlib import record as records
from gnlib import tune as tuning
from gnlib.config import ConfigError, RunConfig
from gnlib.executors import StudyError
from gnlib.files import replacing
from gnlib.methods import ALL_METHODS
from gnlib.profiles import PROFILES, TUNABLE, find_profile, run_config
from gnlib.record import Record
from gnlib.studies import STUDIES
from gnlib.tune import STEPS, axes_of, command_for, ensure_tuned, ladder, open_fields, score, tune
from gnlib.variants import VARIANTS, Setting, setting_config

pytestmark = pytest.mark.usefixtures("home")

TARGET = find_profile("laptop").target

Surface = Callable[[float, int], float]  # learning rate, outer steps -> steps to the target


def ran(config: RunConfig, steps: float) -> Record:
    """A record that reaches the target after this many steps; if the run is shorter, it ends as far above it."""
    reached = steps <= config.outer_steps
    last = TARGET if reached else TARGET + 0.01 * (steps - config.outer_steps)
    record = made("adamw", [TARGET + 1, last], profile="laptop")
    record.config, record.rows[1]["outer_step"] = config, steps if reached else config.outer_steps  # type: ignore
    return record


class Runs:
    """`run_study` on a surface with its best warm-up at 3, where the search starts; remembers what it ran."""

    def __init__(self, surface: Callable[[RunConfig], float]) -> None:
        self.surface, self.rounds = surface, []  # type: ignore[var-annotated]

    def __call__(self, configs: Sequence[RunConfig], profile: str, *_: Any, **__: Any) -> list[Record]:
        self.rounds.append(list(configs))
        return [ran(config, self.surface(config) + 0.001 * abs(config.method.inner.warmup - 3)) for config in configs]

    @property
    def configs(self) -> list[RunConfig]:
        return [config for configs in self.rounds for config in configs]


def runs_on(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs(lambda config: surface(config.method.inner.lr, config.outer_steps))
    monkeypatch.setattr(tuning, "run_study", runs)
    return runs


def bowl(lr: float, steps: int) -> Surface:
    """Worse by one step for each factor of two away from the optimum."""
    return lambda at, length: 2 + abs(math.log2(at / lr)) + abs(math.log2(length / steps))


def table(home: Path) -> dict[str, Any]:
    return json.loads((home / "data" / "records" / "laptop" / "tuned.json").read_text())


@pytest.mark.parametrize(("lr", "steps"), [(0.16, 12), (0.00125, 20), (0.01, 96)])
def test_the_search_ends_at_the_optimum_with_worse_neighbours_on_both_sides(
    lr: float, steps: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 0.01 and 32 steps; 96 is the profile's cap: nothing above it was tried."""
    runs_on(bowl(lr, steps), monkeypatch)
    entry = tune("laptop", "adamw")
    assert entry["settings"] == {"method.inner.lr": lr, "outer_steps": steps, "method.inner.warmup": 3}
    assert entry["interior"] is (steps < 96)
    tried = {(trial["method.inner.lr"], trial["outer_steps"]) for trial in entry["trials"]}
    rung = STEPS.index(steps)
    beside = [(lr, STEPS[rung - 1])] + [(lr, STEPS[rung + 1])] * (steps < 96)
    assert {(lr / 2, steps), (2 * lr, steps), *beside} <= tried
    assert table(home) == {"adamw": entry}
    assert run_config("laptop", "adamw", seed=2).method.inner.lr == lr
    assert run_config("laptop", "adamw", seed=2).outer_steps == steps


def test_the_two_learning_rates_of_muon_are_tuned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def surface(config: RunConfig) -> float:
        inner = config.method.inner
        assert inner.adam_lr is not None
        return 2 + abs(math.log2(inner.lr / 0.025)) + abs(math.log2(inner.adam_lr / 0.08))

    monkeypatch.setattr(tuning, "run_study", Runs(surface))
    entry = tune("laptop", "muon")
    rates = {"method.inner.lr": 0.025, "method.inner.adam_lr": 0.08}
    assert entry["settings"] == rates | {"outer_steps": 32, "method.inner.warmup": 3}
    assert entry["interior"] is True


def test_no_setting_runs_twice_and_trials_are_listed_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.08, 24), monkeypatch)
    entry = tune("laptop", "adamw")
    names = [config.recipe_id for config in runs.configs]
    assert len(names) == len(set(names)) == len(entry["trials"])
    assert {trial["run"] for trial in entry["trials"]} == set(names)
    scores = [trial["steps_to_target"] for trial in entry["trials"]]
    assert scores == sorted(scores) and scores[0] == pytest.approx(2.0)
    best = next(config for config in runs.configs if config.recipe_id == entry["trials"][0]["run"])
    assert (best.method.inner.lr, best.outer_steps) == (0.08, 24)


def test_a_cap_below_the_ladders_first_rung_is_its_only_one() -> None:
    """As at a batch so large that one step is all that a scaled cap allows."""
    axis = ladder("outer_steps", 4, STEPS, 1)
    assert [axis.value(index) for index in (-1, 0, 1)] == [None, 1, None]


def test_the_number_of_steps_stays_on_the_ladder_and_below_the_profiles_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A surface that rewards ever longer runs, and one that rewards ever shorter ones."""
    runs = runs_on(lambda lr, steps: 3 - steps / 10, monkeypatch)
    entry = tune("laptop", "gauss_newton")
    assert entry["settings"]["outer_steps"] == 6 and entry["interior"] is False  # longer ones were not tried
    shortening = runs_on(lambda lr, steps: 1 + steps / 1000, monkeypatch)
    entry = tune("laptop", "gauss_newton")
    assert entry["settings"]["outer_steps"] == STEPS[0] and entry["interior"] is True
    lengths = {config.outer_steps for config in runs.configs + shortening.configs}
    assert lengths == {2, 3, 4, 5, 6}  # the cap of Gauss-Newton methods is 6


def test_among_equal_scores_the_start_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(lambda lr, steps: 1.0, monkeypatch)
    entry = tune("laptop", "adamw")
    assert entry["settings"] == {"method.inner.lr": 0.01, "outer_steps": 32, "method.inner.warmup": 3}
    assert entry["interior"] is True
    assert len(runs.rounds) == 1 and len(runs.configs) == 7  # the start and two neighbours on three axes


def test_without_a_run_that_reaches_the_target_the_final_loss_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(lambda lr, steps: 100 + abs(math.log2(lr / 0.04)), monkeypatch)
    entry = tune("laptop", "adamw")
    assert entry["settings"] == {"method.inner.lr": 0.04, "outer_steps": 96, "method.inner.warmup": 3}
    assert entry["interior"] is False  # at the cap
    assert all(trial["steps_to_target"] is None for trial in entry["trials"])
    assert entry["trials"][0]["final_loss"] == pytest.approx(TARGET + 0.04)


def test_nothing_is_interior_where_every_trial_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(lambda lr, steps: 1.0, monkeypatch)
    monkeypatch.setattr(tuning, "score", lambda record, target: (math.inf, math.inf))
    assert tune("laptop", "adamw")["interior"] is False


def test_the_score_prefers_reaching_the_target_then_the_lower_loss_and_divergence_is_last() -> None:
    ordered = [
        made("adamw", [5.0, TARGET, TARGET]),
        made("adamw", [5.0, 4.5, TARGET]),
        made("adamw", [5.0, 4.5, 4.4]),
        made("adamw", [5.0, 4.5, 4.45]),
        made("adamw", [5.0, 4.5, None], status="diverged"),
    ]
    scores = [score(record, TARGET) for record in ordered]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)
    assert scores[-1] == score(made("adamw", [5.0, 9.0], status="diverged"), TARGET) == (math.inf, math.inf)


def test_an_entry_whose_search_was_cut_short_says_that_it_is_not_interior(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_on(bowl(10.24, 32), monkeypatch)  # ten doublings away
    entry = tune("laptop", "adamw", rounds=3)
    assert len(runs.rounds) == 3 and entry["interior"] is False
    assert entry["settings"] == {"method.inner.lr": 0.08, "outer_steps": 32, "method.inner.warmup": 3}
    assert table(home)["adamw"]["interior"] is False


@pytest.mark.parametrize(("gain", "interior"), [(0.02, False), (0.007, False), (0.0045, True), (0.003, True)])
def test_run_length_at_its_cap_is_interior_only_where_the_last_extension_gained_hardly_anything(
    gain: float, interior: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer schedules approach a constant rate, so that the best of them may have no end."""
    lengths = [steps for steps in STEPS if steps <= find_profile("laptop").most_steps[1]]
    runs_on(lambda lr, steps: 10 * (1 - gain) ** lengths.index(steps) + abs(math.log2(lr / 0.01)), monkeypatch)
    entry = tune("laptop", "adamw")
    assert entry["settings"]["outer_steps"] == lengths[-1] and entry["interior"] is interior


def test_a_search_that_ends_at_the_cap_with_nothing_shorter_tried_is_open() -> None:
    axes = axes_of("laptop", Setting("adamw"))
    index = [axis.field for axis in axes].index("outer_steps")
    end = max(i for i in range(-20, 20) if axes[index].value(i) is not None)
    point = tuple(end if i == index else 0 for i in range(len(axes)))
    assert "outer_steps" in open_fields(axes, {point: ((2.0, 4.0), run_config("laptop", "adamw"))})


def test_tuning_uses_seed_zero_only_and_no_result_does(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.04, 16), monkeypatch)
    tune("laptop", "adamw")
    assert {config.seed for config in runs.configs} == {0}
    assert all(0 not in find_profile(name).seeds for name in ("tiny", "laptop", "h200"))


def test_tuning_again_starts_from_the_profile_and_not_from_the_tuned_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.04, 16), monkeypatch)
    first = tune("laptop", "adamw")
    count = len(runs.rounds)
    assert tune("laptop", "adamw") == first
    assert runs.rounds[:count] == runs.rounds[count:]


def test_two_methods_tuned_at_once_both_end_in_the_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have searched before either writes, and writing takes long: without a lock one entry would be lost."""
    runs_on(bowl(0.01, 32), monkeypatch)
    both, merge = threading.Barrier(2), tuning._merge

    def together(*arguments: Any) -> None:
        both.wait(30)
        merge(*arguments)

    @contextmanager
    def slowly(path: Path) -> Iterator[Path]:
        time.sleep(0.3)
        with replacing(path) as temporary:
            yield temporary

    monkeypatch.setattr(tuning, "_merge", together)
    monkeypatch.setattr(tuning, "replacing", slowly)
    entries: dict[str, Any] = {}

    def work(method: str) -> None:
        entries[method] = tune("laptop", method)

    threads = [threading.Thread(target=work, args=[method]) for method in ("soap", "adamw")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert table(home) == entries and list(table(home)) == ["adamw", "soap"]


def test_without_running_the_search_goes_by_the_records_there_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_training(*_: Any) -> None:
        pytest.fail("a run was started")

    monkeypatch.setattr(study, "execute", no_training)
    with pytest.raises(StudyError, match="gnlib tune"):
        tune("laptop", "adamw", allow_run=False)
    for lr in (0.01, 0.02):  # the start and one neighbour
        config = run_config("laptop", "adamw", changes={"method.inner.lr": lr}, use_tuned=False)
        records.write(home / "data" / "runs" / config.run_id / "record.jsonl", ran(config, 0.1 / lr))
    entry = tune("laptop", "adamw", allow_run=False)
    assert entry["settings"] == {"method.inner.lr": 0.02, "outer_steps": 32, "method.inner.warmup": 3}
    assert entry["interior"] is False and len(entry["trials"]) == 2


def test_an_unknown_method_is_refused_before_anything_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.01, 32), monkeypatch)
    with pytest.raises(ConfigError, match="no method 'adamm'; near or allowed: adam"):
        tune("laptop", "adamm")
    assert not runs.rounds and not list(home.iterdir())


def test_what_is_recorded_is_walked_before_anything_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a finer or wider search costs only what it adds."""
    runs = runs_on(bowl(0.08, 32), monkeypatch)
    for lr in (0.01, 0.02, 0.04):
        config = run_config("laptop", "adamw", changes={"method.inner.lr": lr}, use_tuned=False)
        records.write(home / "data" / "runs" / config.run_id / "record.jsonl", ran(config, 0.1 / lr))
    monkeypatch.setattr(tuning, "pinned", lambda config: config)
    tune("laptop", "adamw")
    assert {config.method.inner.lr for config in runs.rounds[0]} == {0.04, 0.08}  # around the best of the recorded


@pytest.mark.parametrize("ci", ["", "true"])
def test_trials_of_another_text_end_the_search_before_it_trains_and_fresh_leaves_them_out(
    ci: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is trained where $CI is set too."""
    monkeypatch.setenv("CI", ci)
    runs, asked = runs_on(bowl(0.08, 32), monkeypatch), []
    monkeypatch.setattr(tuning, "pinned", lambda config: config.replace({"data.fingerprint": "b" * 16}))
    config = run_config("laptop", "adamw", changes={"data.fingerprint": "a" * 16}, use_tuned=False)
    records.write(home / "data" / "records" / "laptop" / f"{config.recipe_id}.jsonl", ran(config, 10.0))
    with pytest.raises(StudyError, match=r"^adamw: the trials there are come from another text; --fresh tunes it"):
        tune("laptop", "adamw")
    assert not runs.rounds
    monkeypatch.setattr(tuning, "run_study", lambda *args, **named: asked.append(named) or runs(*args, **named))
    assert tune("laptop", "adamw", fresh=True)["interior"]
    assert {(named["fresh"], named["allow_run"]) for named in asked} == {(True, True)}


@pytest.mark.parametrize(
    ("better", "expected"),
    [
        ({"method.inner.lr": 0.2, "outer_steps": 12, "steps_to_target": 10.0}, True),
        ({"method.inner.lr": 0.1, "outer_steps": 16, "steps_to_target": 9.96}, False),  # 0.4 % fewer, in a longer run
        ({"method.inner.lr": 0.1, "outer_steps": 16, "steps_to_target": 9.94}, True),
        ({"method.inner.lr": 0.1, "outer_steps": 8, "steps_to_target": 9.96}, True),
        ({"method.inner.lr": 0.2, "outer_steps": 16, "steps_to_target": 9.96}, True),
        ({"method.inner.lr": 0.1, "outer_steps": 16, "steps_to_target": None}, True),  # by the loss alone
    ],
)
def test_a_setting_is_outdone_by_a_better_one_but_not_by_a_longer_run_that_gains_hardly_anything(
    better: dict[str, Any], expected: bool
) -> None:
    used = {"method.inner.lr": 0.1, "outer_steps": 12}
    trials = [better, used | {"steps_to_target": 10.0}]
    assert tuning.outdone({"settings": used, "interior": True, "trials": trials}) is expected
    assert not tuning.outdone({"settings": used, "interior": True, "trials": trials[::-1]})
    assert not tuning.outdone({"settings": used, "interior": True})


def test_the_profiles_cap_closes_no_axis_but_that_of_its_length() -> None:
    """A higher learning rate was not tried, and the next lower one is as good within half a per cent."""
    axes, config = [tuning.geometric("method.inner.lr", 0.01)], run_config("laptop", "adamw")
    assert open_fields(axes, {(0,): ((10.0, 4.0), config), (-1,): ((10.01, 4.0), config)}) == ["method.inner.lr"]


def test_a_grid_starts_where_it_is_told_to() -> None:
    axis = tuning.geometric("method.inner.lr", 0.0123456)
    assert [axis.value(i) for i in (-1, 0, 1)] == [0.006173, 0.0123456, 0.02469]


def test_the_warm_up_of_a_baseline_is_tuned_and_gauss_newton_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "run_study", Runs(lambda config: 5 + abs(config.method.inner.warmup - 12)))
    assert tune("laptop", "soap")["settings"]["method.inner.warmup"] == 12
    assert "method.inner.warmup" not in tune("laptop", "gauss_newton")["settings"]


def test_records_are_found_again_where_the_search_has_another_start_than_it_had(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile's start moves, here from 0.01 to 0.32, where nothing was run: known trials lie around the old best."""
    ran_before = runs_on(bowl(0.02, 32), monkeypatch)
    first = tune("laptop", "adamw")
    kept = {config.recipe_id: ran(config, ran_before.surface(config)) for config in ran_before.configs}
    monkeypatch.setattr(tuning, "find", lambda configs, *_: [kept.get(config.recipe_id) for config in configs])
    monkeypatch.setitem(find_profile("laptop").methods, "adamw", {"method.inner.lr": 0.32})
    again = tune("laptop", "adamw", allow_run=False)
    assert again["settings"] == first["settings"] and again["interior"]
    assert {trial["run"] for trial in again["trials"]} == {trial["run"] for trial in first["trials"]}


# ---------------------------------------------------------------- other settings than a method's own


def test_another_batch_is_tuned_from_the_scaled_settings_and_kept_apart(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(lambda config: 10 + abs(math.log2(config.method.inner.lr / 0.02)))
    monkeypatch.setattr(tuning, "run_study", runs)
    entry = tune("laptop", Setting("adamw", 512))
    first = runs.rounds[0][0]
    assert (first.method.inner.lr, first.outer_steps) == (0.01, 64)  # the method's own rate, twice its steps
    assert entry["settings"]["method.inner.lr"] == 0.02 and list(table(home)) == ["adamw@512"]
    assert {config.outer_batch for config in runs.configs} == {512}
    assert run_config("laptop", "adamw").method.inner.lr == 0.01
    assert setting_config("laptop", Setting("adamw", 512)).method.inner.lr == 0.02


def test_at_a_budget_the_final_loss_decides_and_the_length_is_given(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the target is reached early."""

    def trained(configs: Sequence[RunConfig], *_: Any, **__: Any) -> list[Record]:
        found = []
        for config in configs:
            loss = TARGET - 1 + abs(math.log2(config.method.inner.lr / 0.04))
            record = made("adamw", [TARGET + 1, loss], profile="laptop")
            record.config = config
            found.append(record)
        return found

    monkeypatch.setattr(tuning, "run_study", trained)
    entry = tune("laptop", Setting("gauss_newton", 2048, budget=True))
    assert entry["settings"]["method.inner.lr"] == 0.04 and "outer_steps" not in entry["settings"]
    assert entry["trials"][0]["steps_to_target"] is None and entry["interior"] is True
    assert list(table(home)) == ["gauss_newton@2048:budget"]


def test_a_profile_of_dear_trials_says_which_fields_are_searched() -> None:
    assert len(axes_of("h200", Setting("muon"))) == 4
    assert [axis.field for axis in axes_of("english-45m", Setting("adamw"))] == ["method.inner.lr"]
    for method in ("gauss_newton", "muon"):
        fields = [axis.field for axis in axes_of("english-45m", Setting(method))]
        assert fields == ["method.inner.lr", "method.inner.adam_lr"]


def test_the_fields_that_a_profile_may_name_are_those_of_all_axes() -> None:
    names = {axis.field for name in (*ALL_METHODS, *VARIANTS) for axis in axes_of("laptop", Setting(name))}
    assert names == set(TUNABLE) and len(TUNABLE) == len(names)


def test_a_method_without_any_of_the_fields_that_its_profile_tunes_is_refused_with_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], tuned=("method.inner.adam_lr",)))
    with pytest.raises(ConfigError) as caught:
        tune("tiny", "adamw")
    fields = "method.inner.lr, outer_steps, method.inner.warmup"
    assert str(caught.value) == f"profile: 'tiny' tunes none of the fields that adamw is tuned by: {fields}"
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("profile", "setting", "last", "interior"),
    [
        ("laptop", Setting("soap", 2048, budget=True), 8, True),
        ("laptop", Setting("soap"), 96, False),
        ("h200", Setting("adamw", 256, budget=True), 128, False),  # of 512 steps
    ],
)
def test_a_warm_up_of_the_whole_run_is_interior_at_a_budget_only(
    profile: str, setting: Setting, last: int, interior: bool
) -> None:
    """At a budget nothing is beyond the whole run; else the profile's cap or the ladder's end stopped it."""
    axis = axes_of(profile, setting)[-1]
    end = max(index for index in range(-20, 20) if axis.value(index) is not None)
    assert axis.value(end) == last
    config = setting_config(profile, setting)
    trials = {(end - 1,): ((3.0, 4.0), config), (end,): ((2.0, 4.0), config)}
    assert open_fields([axis], trials) == ([] if interior else ["method.inner.warmup"])


def test_conjugate_gradients_are_tuned_by_their_damping_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no learning rate and no schedule."""
    best = 0.16

    def surface(config: RunConfig) -> float:
        return 2 + abs(math.log2(float(config.method.inner.options["damping"]) / best))

    monkeypatch.setattr(tuning, "run_study", Runs(surface))
    entry = tune("laptop", "inner_cg")
    assert entry["settings"] == {"method.inner.options.damping": best} and entry["interior"] is True
    options = setting_config("laptop", Setting("inner_cg")).method.inner.options
    assert options == {"damping": best, "fraction": 1 / 16}


def test_the_damping_moves_by_factors_of_four() -> None:
    (axis,) = axes_of("laptop", Setting("inner_cg"))
    assert [axis.value(index) for index in (-1, 0, 1)] == [0.0025, 0.01, 0.04]


def test_the_length_is_tuned_only_where_the_schedule_depends_on_it() -> None:
    """Along an axis that changes nothing there is no best, and a search would walk to its cap."""
    tuned = {name: [axis.field for axis in axes_of("laptop", Setting(name))] for name in STUDIES["schedules"].methods}
    having = {name for name, fields in tuned.items() if "outer_steps" in fields}
    assert having == {"gauss_newton", "global_inner_cosine"}


def test_a_variant_with_its_methods_settings_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.01, 32), monkeypatch)
    with pytest.raises(ConfigError, match="half_n runs with the settings of gauss_newton, tune that"):
        tune("laptop", "half_n")
    assert not runs.rounds


@pytest.mark.parametrize("setting", [Setting("adamw"), Setting("constant", 128), Setting("soap", 512, budget=True)])
def test_the_command_that_is_named_tunes_that_setting(
    setting: Setting, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[Setting] = []

    def found(profile: str, chosen: Setting, *_: Any, **__: Any) -> dict[str, Any]:
        tuned.append(chosen)
        return {"settings": {}, "interior": True, "trials": []}

    monkeypatch.setattr(cli, "tune_method", found)
    monkeypatch.setattr("sys.argv", command_for("laptop", setting).split())
    cli.main()
    assert tuned == [setting]


def test_what_is_not_tuned_yet_is_tuned_or_left_out_and_named_where_nothing_may_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_on(bowl(0.01, 32), monkeypatch)
    settings = [Setting("adamw"), Setting("adamw", 512)]
    with pytest.raises(StudyError, match=r"^2 of 2 settings are not tuned; run: gnlib tune .* --methods adamw$"):
        ensure_tuned("laptop", settings, allow_run=False)
    tune("laptop", settings[0])
    before = len(runs.rounds)
    monkeypatch.setenv("CI", "true")
    for allow_run in (False, True):
        assert ensure_tuned("laptop", settings, allow_run) == settings[:1]
        said = capsys.readouterr().out
        assert said.startswith("1 of 2 settings are not tuned, left out: adamw@512; the first: gnlib tune --profile ")
    monkeypatch.delenv("CI")
    assert ensure_tuned("laptop", settings, allow_run=True) == settings
    assert {config.outer_batch for round in runs.rounds[before:] for config in round} == {512}


def test_trials_on_different_texts_are_refused_and_nothing_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another Python version, whose docstrings are others: the better score may be the easier text's."""
    runs = Runs(lambda config: 10.0)

    def on_two_texts(configs: Sequence[RunConfig], profile: str, **_: Any) -> list[Record]:
        records = runs(configs, profile)
        for index, record in enumerate(records):
            record.config = record.config.replace({"data.fingerprint": f"{index % 2:016d}"})
        return records

    monkeypatch.setattr(tuning, "run_study", on_two_texts)
    with pytest.raises(StudyError, match="tuning: its records come from different texts"):
        tune("laptop", "adamw")
    assert not (home / "data" / "records" / "laptop" / "tuned.json").exists()


def test_trials_of_a_later_round_on_another_text_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(lambda config: 10.0 + abs(math.log2(config.method.inner.lr / 0.08)))

    def on_two_texts(configs: Sequence[RunConfig], profile: str, **_: Any) -> list[Record]:
        records = runs(configs, profile)
        for record in records:
            record.config = record.config.replace({"data.fingerprint": f"{min(len(runs.rounds), 2):016d}"})
        return records

    monkeypatch.setattr(tuning, "run_study", on_two_texts)
    with pytest.raises(StudyError, match="different texts"):
        tune("laptop", "adamw")
    assert len(runs.rounds) == 2
