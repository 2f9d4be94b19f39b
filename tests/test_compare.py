"""An optimiser of one's own: how it is tuned on surfaces that are known, its ratios by hand, and a real one, run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_results import made
from test_study import of
from test_tune import TARGET, ran

from gnlib import cli
from gnlib import compare as comparing
from gnlib import record as records
from gnlib.compare import EXAMPLE, best_baseline, compare, figure_table, notes, save, scaled, start_of, table
from gnlib.config import RunConfig
from gnlib.executors import StudyError
from gnlib.export import export
from gnlib.optimizers import Solver
from gnlib.profiles import PROFILES, run_config
from gnlib.record import Record
from gnlib.train import run_folder

LARGE, LITTLE = 2048, 128  # sequences: the laptop's outer batch and a sixteenth


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.delenv("GNLIB_DATA", raising=False)
    monkeypatch.delenv("CI", raising=False)
    return tmp_path


class Runs:
    """`run_study` on a surface (configuration -> steps to target); remembers what it was asked for."""

    def __init__(self, surface: Callable[[RunConfig], float]) -> None:
        self.surface, self.rounds = surface, []  # type: ignore[var-annotated]

    def __call__(self, configs: Sequence[RunConfig], **_: Any) -> list[Record]:
        self.rounds.append(list(configs))
        return [ran(config, self.surface(config)) for config in configs]


def runs_on(surface: Callable[[RunConfig], float], monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs(surface)
    monkeypatch.setattr(comparing, "run_study", runs)
    return runs


def bowl(lr: float) -> Callable[[RunConfig], float]:
    """Least at this learning rate, whatever the lengths."""
    return lambda config: 20 + 2 * abs(math.log2(config.method.inner.lr / lr))


# ---------------------------------------------------------------- where the search starts


def test_an_optimiser_takes_adamws_place_and_keeps_the_defaults_of_its_class() -> None:
    """RMSprop's weight decay is 0, not the profile's 1e-3."""
    config = run_config("laptop", "adamw", 0, start_of("torch.optim.RMSprop", "laptop", {}), use_tuned=False)
    adamw = run_config("laptop", "adamw", use_tuned=False)
    assert config == adamw.replace(
        {"method.inner.optimizer": "torch.optim.RMSprop", "method.inner.weight_decay": 0.0}
    )


def test_arguments_reach_the_class_and_are_seen_in_the_configuration() -> None:
    """Also `momentum`, which InnerConfig has for Muon and SGD."""
    kwargs = {"momentum": 0.8, "alpha": 0.95, "weight_decay": 0.3, "lr": 0.07}
    config = run_config("laptop", "adamw", 0, start_of("torch.optim.RMSprop", "laptop", kwargs), use_tuned=False)
    inner = config.method.inner
    assert (inner.lr, inner.weight_decay, inner.options) == (0.07, 0.3, {"momentum": 0.8, "alpha": 0.95})
    [optimizer] = Solver({"p": torch.ones(3, requires_grad=True)}, set(), inner).optimizers
    assert {name: optimizer.param_groups[0][name] for name in kwargs} == kwargs


def test_at_another_batch_lengths_scale_with_the_root_of_the_ratio_and_the_rate_stays() -> None:
    start = start_of(EXAMPLE, "laptop", {})
    small = scaled(start, LITTLE)
    changed = {"outer_batch", "outer_steps", "method.inner.warmup", "evaluation.every"}
    assert {name for name in start if start[name] != small[name]} == changed
    assert [small[name] for name in sorted(changed)] == [4, 4 * 3, LITTLE, 4 * 32]
    assert scaled(small, LARGE) == start


def test_at_a_larger_batch_the_loss_is_still_evaluated_at_least_every_step() -> None:
    start = start_of(EXAMPLE, "laptop", {})
    assert start["evaluation.every"] == 1 and scaled(start, 16 * LARGE)["evaluation.every"] == 1


# ---------------------------------------------------------------- the search


def test_each_batch_gets_its_trials_two_at_a_time_and_then_the_seeds_run_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = runs_on(bowl(0.02), monkeypatch)
    large, small = compare(EXAMPLE, "laptop", seeds=[1, 2], trials=4)
    shape = [[(config.outer_batch, config.seed) for config in configs] for configs in runs.rounds]
    assert shape == [[(LARGE, 0)] * 2] * 2 + [[(LITTLE, 0)] * 2] * 2 + [
        [(LARGE, 1), (LARGE, 2), (LITTLE, 1), (LITTLE, 2)]
    ]
    assert [c.config.method.inner.lr for c in large.records] == [0.02, 0.02]
    assert (len(large.trials), len(small.trials)) == (4, 4)
    assert (large.tokens, small.tokens) == (LARGE * 64, LITTLE * 64)


def test_the_small_batch_starts_from_what_was_best_at_the_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.02), monkeypatch)
    compare(EXAMPLE, "laptop", trials=4)
    first = next(config for configs in runs.rounds for config in configs if config.outer_batch == LITTLE)
    assert (first.method.inner.lr, first.outer_steps, first.evaluation.every) == (0.02, 128, 4)


def test_with_trials_enough_the_optimum_is_bracketed_and_otherwise_it_is_said_what_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs_on(bowl(0.02), monkeypatch)
    few = notes(compare(EXAMPLE, "laptop", batches=[LARGE], trials=4))
    assert few[0] == "batch of 131072 tokens: lr 0.02, steps 32, warm-up 3; best of 4 trials, not bracketed: " + (
        "lr, steps, warm-up"
    )
    many = notes(compare(EXAMPLE, "laptop", batches=[LARGE], trials=12))
    assert many[0].endswith("trials, interior")


@pytest.mark.parametrize("trials", [1, 3])
def test_as_many_trials_run_as_are_asked_for(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(bowl(0.02), monkeypatch)
    assert [len(found.trials) for found in compare(EXAMPLE, "laptop", trials=trials)] == [trials, trials]


def test_a_repeated_comparison_walks_the_same_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a notebook finds in the records what the command ran."""
    runs = runs_on(bowl(0.04), monkeypatch)
    compare(EXAMPLE, "laptop", trials=6)
    count = len(runs.rounds)
    compare(EXAMPLE, "laptop", trials=6)
    assert runs.rounds[:count] == runs.rounds[count:]


def test_batches_are_walked_from_the_largest_whatever_order_they_are_named_in(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_on(bowl(0.02), monkeypatch)
    found = compare(EXAMPLE, "laptop", trials=1, batches=[LITTLE, LARGE])
    assert [c.batch for c in found] == [LARGE, LITTLE] and runs.rounds[0][0].outer_batch == LARGE


def test_a_comparison_passes_on_whether_to_run_afresh_and_how_many_runs_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[bool, int]] = []
    runs = Runs(bowl(0.02))

    def run(configs: Sequence[RunConfig], fresh: bool, jobs: int, **_: Any) -> list[Record]:
        asked.append((fresh, jobs))
        return runs(configs)

    monkeypatch.setattr(comparing, "run_study", run)
    compare(EXAMPLE, "laptop", trials=1, batches=[LARGE], fresh=True, jobs=3)
    assert set(asked) == {(True, 3)}


# ---------------------------------------------------------------- what cannot be compared


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


class ThreeBetas(torch.optim.Optimizer):
    """A step of signs; its betas are three, as Adan's."""

    def __init__(self, params: Any, lr: float = 0.1, betas: tuple[float, ...] = (0.9, 0.9, 0.9)) -> None:
        assert len(betas) == 3
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


def test_a_class_with_another_number_of_betas_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(bowl(0.02), monkeypatch)
    [found] = compare(f"{__name__}.ThreeBetas", "laptop", batches=[LARGE], trials=2)
    assert found.records[0].config.method.inner.optimizer == f"{__name__}.ThreeBetas"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.optim.RMSpro"], "cannot import 'torch.optim.RMSpro'"),
        (["no_such_package.Optimizer"], "cannot import 'no_such_package.Optimizer'"),
        (["torch.nn.Linear"], "'torch.nn.Linear' is no torch.optim.Optimizer class"),
        (["torch.optim.LBFGS"], "torch.optim.LBFGS: a trial step failed with TypeError"),
        ([f"{__name__}.NoRate"], "it takes no lr, which is what is tuned"),
        ([EXAMPLE, "--jobs", "0"], "jobs: 0; at least 1"),
        ([EXAMPLE, "--kwargs", "warp=9"], "kwargs: RMSprop takes no 'warp'; allowed: lr, alpha"),
        ([EXAMPLE, "--kwargs", "alpha"], "--kwargs alpha: expected field=value"),
        ([EXAMPLE, "--kwargs", "lr=-1"], "method.inner.lr: "),
        ([EXAMPLE, "--kwargs", "alpha=fast"], "RMSprop: "),
        (["torch.optim.Adam", "--kwargs", "betas=[0.9]"], "method.inner.betas"),
        ([f"{__name__}.ThreeBetas", "--kwargs", "betas=[0.5,0.5]"], "betas of ThreeBetas are 3, not 2; they stay its"),
        ([EXAMPLE, "--profile", "lapdog"], "no profile 'lapdog'"),
        ([EXAMPLE, "--trials", "0"], "trials: 0; at least 1"),
        ([EXAMPLE, "--batches", "-4"], "batches: -4; at least 1 sequence"),
        ([EXAMPLE, "--seeds", "0"], "seeds: 0 is the data order of tuning"),
        ([EXAMPLE, "--batches", "2048", "33"], "33 sequences"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line_before_anything_runs(
    arguments: list[str], message: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_on(bowl(0.02), monkeypatch)
    monkeypatch.setattr(sys, "argv", ["gnlib", "compare", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not runs.rounds and not list(home.iterdir())


@pytest.mark.parametrize("missing", [["pandas"], ["matplotlib", "seaborn"]])
def test_without_the_packages_of_the_figure_the_extra_is_named_before_anything_runs(
    missing: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_on(bowl(0.02), monkeypatch)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["gnlib", "compare", EXAMPLE])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    why = f"gnlib: compare: table and figure need {', '.join(missing)}: pip install 'gnlib[figures]'\n"
    assert (stop.value.code, *capsys.readouterr()) == (2, "", why)
    assert not runs.rounds and not list(home.iterdir())


# ---------------------------------------------------------------- ratios


STEPS = {"gauss_newton": 2.0, "layerwise": 4.0, "muon": 10.0, "soap": 8.0, "adamw": 20.0}


def shipped(home: Path, seeds: Sequence[int], methods: Sequence[str] = tuple(STEPS)) -> None:
    """References that reach the target after STEPS, one more for each further seed."""
    for name in methods:
        for seed in seeds:
            config = run_config("laptop", name, seed, {"outer_steps": 30})
            record = made(name, [TARGET + 1, TARGET], seed)
            record.config, record.rows[1]["outer_step"] = run_config("laptop", name, seed), STEPS[name] + seed - 1  # type: ignore
            records.write(home / "data" / "records" / "laptop" / f"{record.config.recipe_id}.jsonl", record)
            assert config.seed == seed


def test_the_ratios_are_steps_over_those_of_gn_of_layerwise_gn_and_of_the_best_baseline(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(home, [1])
    runs_on(lambda config: 24.0, monkeypatch)
    found = table(compare(EXAMPLE, "laptop", seeds=[1], trials=2)).reset_index()
    assert found.to_dict("records")[:3] == [
        {"batch (tokens)": 131072, "reference": name, "steps": "24.00", "its steps": steps, "ratio": over, "n": 1}
        for name, steps, over in [
            ("GN", "2.00", "12.00"), ("Layerwise GN", "4.00", "6.00"), ("SOAP, best baseline", "8.00", "3.00"),
        ]
    ]  # fmt: skip
    assert set(found["its steps"][3:]) == {"not run"} and set(found["ratio"][3:]) == {"-"}


def test_several_seeds_have_an_interval_and_a_run_above_the_target_gives_a_bound(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 / 2 and 24 / 3: 10 ± 12.7 x 2; then never within 32 steps."""
    shipped(home, [1, 2])
    runs_on(lambda config: 24.0, monkeypatch)
    [over, *_] = table(compare(EXAMPLE, "laptop", seeds=[1, 2], trials=2, batches=[LARGE]))["ratio"]
    assert over == "10.00 ± 25.41"
    runs_on(lambda config: 1000.0, monkeypatch)
    found = table(compare(EXAMPLE, "laptop", seeds=[1], trials=2, batches=[LARGE]))
    assert list(found["ratio"]) == ["≥ 16.00", "≥ 8.00", "≥ 4.00"] and set(found["steps"]) == {"≥ 32.00"}


def test_the_best_baseline_is_that_of_the_least_mean_not_of_the_best_seed_nor_one_that_misses_on_a_seed() -> None:
    def runs(name: str, *steps: float) -> list[Record]:
        return [ran(run_config("laptop", name, i, {"outer_steps": 100}), s) for i, s in enumerate(steps)]

    muon, missed = runs("muon", 9.0, 9.0), runs("soap", 4.0, 4.0)
    assert best_baseline([*runs("soap", 4.0, 8.0, 9.0), *muon], TARGET) == "SOAP"
    assert best_baseline([*runs("soap", 4.0, 20.0), *muon], TARGET) == "Muon"
    missed[1].rows[-1]["val_loss"] = TARGET + 1
    assert best_baseline([*missed, *muon], TARGET) == "Muon"
    assert best_baseline(missed, TARGET) == ""


def test_references_that_are_missing_are_named_with_the_command_that_makes_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(home, [1], ["gauss_newton"])
    runs_on(lambda config: 24.0, monkeypatch)
    found = compare(EXAMPLE, "laptop", seeds=[1], trials=2)
    assert list(table(found)["its steps"])[:3] == ["2.00", "not run", "not run"]
    small = [line for line in notes(found) if line.startswith("  ")]
    command = "gnlib study critical_batch_size --profile laptop --seeds 1"
    assert small == [f"  the references of data order 1 are not run at this batch; run: {command}"]


def test_data_orders_without_references_are_named_beside_those_with(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(home, [1])
    runs_on(lambda config: 24.0, monkeypatch)
    lines = notes(compare(EXAMPLE, "laptop", seeds=[1, 2], trials=2, batches=[LARGE]))
    command = "gnlib study iteration_complexity --profile laptop --seeds 2"
    assert lines[1:] == [f"  the references of data order 2 are not run at this batch; run: {command}"]


def test_the_options_of_the_class_are_named_with_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(bowl(0.02), monkeypatch)
    kwargs = {"momentum": 0.9, "alpha": 0.95}
    found = compare(EXAMPLE, "laptop", kwargs=kwargs, seeds=[1], trials=2, batches=[LARGE])
    assert ", momentum=0.9, alpha=0.95; best of 2 trials" in notes(found)[0]
    figure = save(found)
    assert figure.exists() and figure.name == "laptop,momentum=0.9,alpha=0.95.png"
    assert json.loads((figure.parent / f"{figure.stem}.json").read_text())["kwargs"] == kwargs


def test_references_on_another_text_are_marked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped(home, [1])
    runs_on(lambda config: 24.0, monkeypatch)
    [found] = compare(EXAMPLE, "laptop", seeds=[1], trials=2, batches=[LARGE])
    assert len(notes([found])) == 1
    found.records[0].config = found.records[0].config.replace({"data.fingerprint": "0123456789abcdef"})
    assert "another text" in notes([found])[1]


def test_fresh_references_are_rather_those_of_this_machine_and_missing_ones_are_shipped(home: Path) -> None:
    wanted = comparing.study_configs("iteration_complexity", "tiny", [1])
    batch = run_config("tiny", "adamw").outer_batch
    for config in wanted:
        records.write(home / "data" / "records" / "tiny" / f"{config.recipe_id}.jsonl", of(config, loss=4.0))
    records.write(run_folder(wanted[0]) / "record.jsonl", of(wanted[0], loss=3.0))
    for fresh, first in ((False, 4.0), (True, 3.0)):
        found, _ = comparing._references("tiny", batch, [1], fresh)
        assert [record.rows[-1]["val_loss"] for record in found] == [first, *[4.0] * (len(wanted) - 1)]


def test_the_figure_has_the_references_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped(home, [1])
    runs_on(lambda config: 24.0, monkeypatch)
    found = figure_table(compare(EXAMPLE, "laptop", seeds=[1], trials=1, batches=[LARGE]))
    assert set(found["method"]) == {"GN", "Layerwise GN", "Muon", "SOAP", "AdamW", EXAMPLE}


def test_the_report_is_a_figure_with_its_table_and_a_file_for_programs(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(home, [1])
    runs_on(lambda config: 24.0, monkeypatch)
    folder = home / "data" / "compare" / EXAMPLE
    assert save(compare(EXAMPLE, "laptop", seeds=[1], trials=2)) == folder / "laptop.png"
    assert {path.name for path in folder.iterdir()} == {f"laptop.{end}" for end in ("png", "pdf", "csv", "json")}
    report = json.loads((folder / "laptop.json").read_text(encoding="utf-8"))
    assert report["ratios"][0]["ratio"] == "12.00" and len(report["tuning"]["131072"]["trials"]) == 2
    assert "torch.optim.RMSprop" in (folder / "laptop.csv").read_text()


# ---------------------------------------------------------------- the shipped example


def test_all_runs_of_the_example_are_shipped_and_none_of_an_incomplete_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_on(lambda config: 4.0, monkeypatch)
    compare(EXAMPLE, "tiny", seeds=[1])
    wanted = {config.recipe_id: ran(config, 4.0) for configs in runs.rounds for config in configs}
    monkeypatch.undo()
    monkeypatch.setenv("GNLIB_HOME", str(home))
    *most, last = wanted
    for name in most:
        records.write(home / "data" / "runs" / name / "record.jsonl", wanted[name])
    assert export("tiny")[0] == 0
    records.write(home / "data" / "runs" / last / "record.jsonl", wanted[last])
    assert export("tiny")[0] == len(wanted)
    assert {path.stem for path in (home / "data" / "records" / "tiny").glob("*.jsonl")} == set(wanted)
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], seeds=(1, 2)))  # another data order, not run yet
    assert export("tiny")[0] == len(wanted)


def test_where_nothing_may_be_trained_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(StudyError, match=r"run: gnlib compare torch\.optim\.RMSprop --profile tiny"):
        compare(EXAMPLE, "tiny")


def test_runs_that_diverged_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(lambda config: 3.0, monkeypatch)
    (found,) = compare(EXAMPLE, "laptop", seeds=[1], trials=1, batches=[LARGE])
    assert not [line for line in notes([found]) if "diverged" in line]
    found.records[0].status = "diverged"
    assert "  runs of it diverged" in notes([found])
    assert set(table([found])["steps"]) == {"3.00"}  # after it had reached the target
    found.records[0].rows[-1]["val_loss"] = None
    assert set(table([found])["steps"]) == {"diverged"} and set(table([found])["ratio"]) == {"-"}


def test_a_batch_that_no_study_has_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on(lambda config: 24.0, monkeypatch)
    lines = notes(compare(EXAMPLE, "tiny", seeds=[1], trials=1, batches=[32]))
    assert "  no study has references at this batch of 32 sequences; allowed: 16, 64 sequences" in lines


# ---------------------------------------------------------------- for real


def test_an_optimiser_from_the_users_directory_is_tuned_run_and_drawn(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the processes that runs are, too; its argument arrives."""
    source = Path(__file__).read_text()
    own = source[source.index("class ThreeBetas") : source.index("def test_a_class_with_another")]
    (home / "my_package.py").write_text(f"import torch\nfrom typing import Any\n\n{own}")
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    arguments = ["my_package.ThreeBetas", "--kwargs", "lr=0.02", "--trials", "1", "--batches", "64"]
    monkeypatch.setattr(sys, "argv", ["gnlib", "compare", *arguments, "--profile", "tiny"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli.main()
    out, _ = capsys.readouterr()
    assert "best of 1 trials" in out and out.rstrip().endswith("tiny.png")
    assert (home / "data" / "compare" / "my_package.ThreeBetas" / "tiny.png").exists()
    made_runs = [record.config for record in comparing_runs(home)]
    assert sorted(config.seed for config in made_runs) == [0, 1]
    assert {config.method.inner.lr for config in made_runs} == {0.02}
    before = start_of("my_package.ThreeBetas", "tiny", {})["method.inner.source"]
    assert {config.method.inner.source for config in made_runs} == {before}
    with open(home / "my_package.py", "a") as file:
        file.write("# edited\n")
    assert start_of("my_package.ThreeBetas", "tiny", {})["method.inner.source"] != before  # another run


def comparing_runs(home: Path) -> list[Record]:
    found = [records.read(path) for path in (home / "data" / "runs").glob("*/record.jsonl")]
    return [record for record in found if record and record.config.method.inner.optimizer.startswith("my_package")]
