"""Every command is one call; bad input is one line and exit code 2, with nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gnlib import arguments, cli
from gnlib import record as records
from gnlib import tune as tuning
from gnlib.config import ConfigError, RunConfig
from gnlib.executors import UnfinishedError
from gnlib.files import data_folder
from gnlib.methods import ALL_METHODS
from gnlib.paper import QUESTIONS
from gnlib.profiles import PROFILES, run_config
from gnlib.record import Record
from gnlib.studies import STUDIES
from gnlib.variants import VARIANTS, Setting, home_batch, setting_config

COMMANDS = ("profiles", "prepare", "train", "study", "sweep", "tune", "compare", "claims", "export", "verify")
SHORT = ("--profile", "tiny", "--method", "adamw", "--set", "start.chinchilla_fraction=0", "--set", "outer_steps=1")
PROC = Path("/proc").is_dir()  # in which nobody can write, whatever its permissions say to root

Call = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("GNLIB_HOME", str(folder))
    monkeypatch.delenv("GNLIB_DATA", raising=False)
    return folder


@pytest.fixture
def gnlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gnlib", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


def trained(home: Path) -> Record:
    """The only record in data/runs."""
    (path,) = (home / "data" / "runs").glob("*/record.jsonl")
    record = records.read(path)
    assert record is not None
    return record


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---------------------------------------------------------------- help and lists


def test_the_help_names_every_command(gnlib: Call) -> None:
    code, out, _ = gnlib("--help")
    assert code == 0 and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, gnlib: Call, home: Path) -> None:
    code, out, err = gnlib(command, "--help")
    assert (code, err) == (0, "") and f"gnlib {command}" in out
    assert not files(home)


def test_every_option_has_its_explanation() -> None:
    """So that `gnlib train --help` is enough; an `Args:` section names all parameters but those explained by type."""
    for command in (cli.train, cli.study, cli.sweep, cli.tune, cli.compare, cli.claims):
        names = [name for name, kind in command.__annotations__.items() if name != "return" and kind != "Subject"]
        assert all(f"{name}: " in (command.__doc__ or "") for name in names)


def test_the_help_of_claims_lists_the_subjects_that_are_accepted_and_so_does_the_error(gnlib: Call) -> None:
    listed = ", ".join(dict.fromkeys(name for one in QUESTIONS for name in (one.study, one.also_in) if name))
    said = " ".join(gnlib("claims", "--help")[1].replace("│", " ").split())
    assert f"one of these: {listed}. (default: None)" in said
    line = refused(gnlib("claims", "--profile", "tiny", "--study", "more_baselines"))
    assert line == f"gnlib: study: no claims on 'more_baselines'; allowed: {listed}\n"
    assert all(gnlib("claims", "--profile", "tiny", "--study", name)[0] == 0 for name in listed.split(", "))


def test_profiles_lists_all_profiles_and_methods_and_variants_with_their_labels(gnlib: Call) -> None:
    code, out, err = gnlib("profiles")
    assert (code, err) == (0, "")
    assert all(name in out for name in [*PROFILES, *STUDIES])
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert all(f"{name} {one.label}" in lines for name, one in (ALL_METHODS | VARIANTS).items())


# ---------------------------------------------------------------- bad input


def refused(result: tuple[int, str, str]) -> str:
    """The one line on stderr of a command that ended with exit code 2."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("gnlib: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train --foo 3", ("--foo", "gnlib --help")),
        ("frob", ("frob", "profiles, prepare, train")),
        ("", ("profiles, prepare, train",)),
        ("claims --n", ("--n;", "near: --json")),
        ("sweep layerwise --jobs x", ("--jobs", "'x'", "Runs at a time")),
        ("bench --steps 1.5", ("--steps", "'1.5'")),
        ("compare", ("missing from gnlib compare", "torch.optim.Optimizer")),
    ],
)
def test_wrong_arguments_are_refused_by_name_with_what_is_allowed(
    words: str, named: tuple[str, ...], gnlib: Call, home: Path
) -> None:
    line = refused(gnlib(*words.split()))
    assert all(name.lower() in line.lower() for name in named), line
    assert not set("│╭─") & set(line) and not files(home)


def test_the_one_line_of_a_box_is_the_same_with_and_without_lines_to_draw_it_with() -> None:
    meant = ["Perhaps you meant:", "--json PATH", "--json again"]
    parts = ["Unrecognized options: --jsn.", "", "A second paragraph.", "{}", *meant]
    drawn = ["╭─ Parsing error ─╮", *(f"│ {row.format('─' * 14):<14} │" for row in parts), "╰─╯"]
    plain = ["Parsing error", "-" * 13, *(row.format("-" * 14) for row in parts)]
    for box in (drawn, plain):
        assert arguments.one_line("\n".join(box)) == "Unrecognized options: --jsn; near: --json"
    assert arguments.one_line("\n-- \n") == "--" and arguments.one_line("one\nrule\n-\ntwo") == "- two"


def test_what_a_command_says_while_it_runs_is_not_held_back_by_the_parsing(
    gnlib: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loud() -> None:
        print("at work", file=sys.stderr)
        raise SystemExit(2)

    commands = arguments.Commands()
    commands.command(loud)
    monkeypatch.setattr(cli, "app", commands)
    assert gnlib("loud") == (2, "", "at work\n")


@pytest.mark.parametrize(
    "command",
    ["prepare", "train", "study iteration_complexity", "sweep schedules", "tune", "claims", "export", "verify"],
)
def test_an_unknown_profile_is_refused_with_the_allowed_ones(command: str, gnlib: Call, home: Path) -> None:
    line = refused(gnlib(*command.split(), "--profile", "lapdog"))
    assert "'lapdog'" in line and all(name in line for name in PROFILES)
    assert not files(home)


@pytest.mark.parametrize("command", ["train --method", "tune --methods", "study iteration_complexity --methods"])
def test_an_unknown_method_is_refused_with_the_near_ones(command: str, gnlib: Call, home: Path) -> None:
    assert "no method 'gaus_newton'; near or allowed: gauss_newton" in refused(gnlib(*command.split(), "gaus_newton"))
    assert not files(home)


def test_an_unknown_method_after_a_known_one_is_refused_before_anything_is_tuned(
    gnlib: Call, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: Any, **__: Any) -> None:
        pytest.fail("a method was tuned")

    monkeypatch.setattr(tuning, "run_study", no_training)
    assert "'nonsense'" in refused(gnlib("tune", "--profile", "tiny", "--methods", "adamw", "nonsense"))
    assert not files(home)


@pytest.mark.parametrize("further", [[], ["--dry-run"], ["--no-run"]])
def test_a_budget_at_a_batch_that_does_not_divide_it_is_refused_before_anything_is_tuned(
    further: list[str], gnlib: Call, home: Path
) -> None:
    tune = ("tune", "--profile", "tiny", "--methods", "adamw", "--budget", "--batch")
    assert "batch: 256 sequences; allowed: one that divides the budget" in refused(gnlib(*tune, "256", *further))
    assert not files(home)


def test_reading_the_tuning_of_a_study_goes_on_after_what_has_no_records_and_names_all_of_it(gnlib: Call) -> None:
    code, _, said = gnlib("tune", "--profile", "tiny", "--study", "line_search", "--no-run")
    assert code == 2 and said.count("no records to tune by") == 5
    assert all(f"{name}, profile tiny: no records" in said for name in ("gauss_newton", "cold_start", "muon_search"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("method.inner.lrr=0.1", "method.inner.lrr: no such field; near: method.inner.lr, "),
        ("metod.inner.lr=0.1", "metod.inner.lr: no such field; near: "),
        ("precision=fp64", "precision: no such field; near: compute.precision\n"),
        ("data.zzz=1", "data.zzz: no such field; allowed: data.source, data.tokenizer, "),
        ("zzz=1", "zzz: no such field; allowed: model, data, "),
        ("method.line_search.zzz=1", "method.line_search.zzz: no such field; near: method.line_search.zero, "),
        ("=3", "--set =3: expected field=value"),
        ("evaluation.stop_below=-1", "evaluation.stop_below: "),
        ("method.inner.lr=fast", "method.inner.lr: "),
        ("method.inner.lr=-1", "method.inner.lr: "),
        ("method.inner.steps=3", "outer_batch: 64 sequences must be a multiple of method.inner.steps 3"),
        ("outer_steps", "--set outer_steps: expected field=value"),
    ],
)
def test_an_unknown_field_or_a_wrong_value_is_refused_by_its_name(
    assignment: str, message: str, gnlib: Call, home: Path
) -> None:
    assert message in refused(gnlib("train", "--profile", "tiny", "--set", assignment))
    assert not files(home)


def test_an_unknown_study_is_refused_with_the_allowed_ones(gnlib: Call, home: Path) -> None:
    line = refused(gnlib("study", "everything", "--profile", "tiny"))
    assert "no study 'everything'" in line and all(name in line for name in STUDIES)
    assert not files(home)


def test_a_configuration_file_that_is_missing_or_no_configuration_is_refused(
    gnlib: Call, home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    assert f"{path}: no such configuration file" in refused(gnlib("train", "--config", str(path)))
    path.write_text("{")
    assert f"{path}: not JSON" in refused(gnlib("train", "--config", str(path)))
    path.write_text('{"outer_stepz": 3}')
    assert "outer_stepz: no such field" in refused(gnlib("train", "--config", str(path)))
    path.write_text("[]")
    assert "expected an object" in refused(gnlib("train", "--config", str(path)))
    assert not files(home)


def test_a_folder_or_a_file_that_is_no_text_is_refused_as_configuration(gnlib: Call, tmp_path: Path) -> None:
    assert str(tmp_path) in refused(gnlib("train", "--config", str(tmp_path)))
    path = tmp_path / "weights.pt"
    path.write_bytes(b"PK\xff\xfe")
    assert str(path) in refused(gnlib("train", "--config", str(path)))


def test_a_users_optimiser_that_cannot_step_is_refused_before_the_run(gnlib: Call, home: Path) -> None:
    said = refused(gnlib("train", "--profile", "tiny", "--set", "method.inner.optimizer=torch.optim.LBFGS"))
    assert "torch.optim.LBFGS: a trial step failed with TypeError" in said
    assert not (home / "data" / "runs").exists()


def test_a_configuration_file_does_not_go_with_a_method(gnlib: Call, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(run_config("tiny", "adamw").model_dump_json())
    assert "config: it has profile, method and seed" in refused(gnlib("train", "--config", str(path), "--seed", "3"))


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_result_that_could_not_be_written_is_refused_before_the_work(gnlib: Call, path: str) -> None:
    assert "is a folder" in refused(gnlib("bench", "--size", "tiny", "--json", path))


def test_a_home_that_is_not_there_is_one_line_and_not_a_checkout_without_records(
    gnlib: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path / "slip"))
    for command in ("claims", "verify", "train"):
        code, said, why = gnlib(command)
        assert (code, said) == (2, "") and why == f"gnlib: GNLIB_HOME: no folder '{tmp_path / 'slip'}'\n"
    assert not (tmp_path / "slip").exists()
    (tmp_path / "slip").touch()
    assert gnlib("claims")[0] == 2


def test_an_unnamed_data_folder_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_DATA", "")  # not the working directory, which Path("") would be
    assert data_folder() == tmp_path / "data"


@pytest.mark.parametrize("command", ["prepare", "train", "study layerwise --fresh", "sweep layerwise", "claims"])
@pytest.mark.parametrize("place", ["a_file", "a_file/below", "/proc/nowhere"])
def test_a_data_folder_that_cannot_be_is_one_line_that_names_its_variable(
    command: str, place: str, gnlib: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / place))
    result = gnlib(*command.split(), "--profile", "tiny")
    if place != "/proc/nowhere":
        assert f"gnlib: GNLIB_DATA: '{tmp_path / 'a_file'}' is no folder; " in refused(result)
    elif command != "claims":  # which writes nothing
        assert "gnlib: GNLIB_DATA: cannot make the folder '/proc/nowhere/prepared' (" in refused(result)


def test_sigterm_ends_the_command_as_an_exit_would_so_that_its_runs_are_stopped(
    gnlib: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.app, "cli", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert gnlib()[0] == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_changed_shipped_record_is_refused_by_name(gnlib: Call, home: Path) -> None:
    assert "no records under" in refused(gnlib("verify"))
    folder = home / "data" / "records" / "tiny"
    folder.mkdir(parents=True)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  0123456789ab.jsonl\n")
    assert "0123456789ab.jsonl: missing" in refused(gnlib("verify"))


# ---------------------------------------------------------------- what commands do


def test_verify_trains_a_shipped_record_again_and_says_what_came_out(
    gnlib: Call, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNLIB_EXECUTOR", "inline")
    assert gnlib("train", *SHORT)[0] == 0
    record = trained(home)
    folder = home / "data" / "records" / "tiny"
    records.write(folder / f"{record.config.recipe_id}.jsonl", record)
    digest = hashlib.sha256((folder / f"{record.config.recipe_id}.jsonl").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  {record.config.recipe_id}.jsonl\n")
    code, out, _ = gnlib("verify", "--again", "1", "--profile", "tiny")
    intact, cost, found, end = out.splitlines()
    assert code == 0 and intact == "1 shipped records are intact"
    assert cost.startswith("1 of profile tiny again: 1 to run, ")
    assert found == f"equal, bit for bit: AdamW, batch 64, lr 0.02, seed 0 ({record.config.run_id})"
    assert end == "1 of 1 within 0.01 nats"
    assert "again: 2; allowed: 1 to 1" in refused(gnlib("verify", "--again", "2", "--profile", "tiny"))
    once = ("verify", "--again", "1", "--profile", "tiny")
    for jobs in ("-2", "0"):
        assert f"jobs: {jobs}; at least 1" in refused(gnlib(*once, "--jobs", jobs))
    record.config = record.config.replace({"data.source": "corpus/mine.txt"})
    records.write(next(folder.glob("*.jsonl")), record)
    line = refused(gnlib(*once))  # before anything else is said
    assert "profile: the text of 'tiny' is not here; data.source: corpus/mine.txt: no such source" in line


def test_train_takes_numbers_words_and_null(gnlib: Call, home: Path) -> None:
    changes = {
        "method.inner.lr": "0.5e-2", "method.inner.schedule": "constant", "method.inner.clip": "null",
        "method.inner.betas": "[0.8, 0.9]", "compute.deterministic": "true",
    }  # fmt: skip
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    code, out, err = gnlib("train", *SHORT, "--seed", "5", *sets, "--quiet")
    assert (code, err) == (0, "")
    record = trained(home)
    inner = record.config.method.inner
    assert (inner.lr, inner.schedule, inner.clip, inner.betas) == (0.005, "constant", None, (0.8, 0.9))
    assert record.config.compute.deterministic and record.config.seed == 5 and record.status == "finished"
    assert out.startswith("finished at step 1, validation loss ") and record.config.run_id in out


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("false", False), ("None", None), ("(0.9, 0.95)", (0.9, 0.95)), ("muon", "muon"), ("2", 2)],
)
def test_values_are_read_as_json_or_python_writes_them(text: str, value: object) -> None:
    """`nesterov=False` must not become a text, which is true."""
    assert arguments.assignment(f"nesterov={text}") == ("nesterov", value)


@pytest.mark.parametrize("method", [*ALL_METHODS, *VARIANTS])
def test_every_method_and_variant_can_be_trained_by_name_as_its_studies_run_it(
    method: str, gnlib: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunConfig] = []

    def looked_at(config: RunConfig) -> None:
        asked.append(config)
        raise ConfigError("looked at")

    monkeypatch.setattr(cli, "check", looked_at)
    for profile in PROFILES:
        gnlib("train", "--profile", profile, "--method", method, "--seed", "3", "--set", "start.seed=5")
    changes = {"start.seed": 5}
    for profile, config in zip(PROFILES, asked, strict=True):
        own = setting_config(profile, Setting(method, home_batch(profile)), 3, changes)
        assert config.run_id == own.run_id
        assert method in VARIANTS or own.run_id == run_config(profile, method, 3, changes).run_id


def test_train_shows_progress_unless_quiet(gnlib: Call) -> None:
    assert "1/1" in gnlib("train", *SHORT)[2]


def test_train_shows_that_the_start_is_made_where_it_is_missing(gnlib: Call) -> None:
    short = ("--profile", "tiny", "--method", "adamw", "--set", "start.chinchilla_fraction=0.001")
    said = gnlib("train", *short, "--set", "outer_steps=1")[2]
    assert re.search(r"the start of all runs, batch 8, lr .*: .* 0/3 ", said)
    assert "start" not in gnlib("train", *short, "--set", "outer_steps=2")[2]  # it is there


def test_a_configuration_file_is_the_run_it_describes(gnlib: Call, home: Path, tmp_path: Path) -> None:
    config = run_config("tiny", "adamw", seed=4, changes={"start.chinchilla_fraction": 0.0, "outer_steps": 2})
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    code, _, err = gnlib("train", "--config", str(path), "--set", "outer_steps=1", "--keep-weights", "--quiet")
    assert (code, err) == (0, "")
    record = trained(home)
    assert record.config.recipe_id == config.replace(outer_steps=1).recipe_id
    assert (home / "data" / "runs" / record.config.run_id / "weights.pt").exists()


def test_prepare_says_how_much_text_there_is(gnlib: Call, home: Path) -> None:
    code, out, _ = gnlib("prepare", "--profile", "tiny")
    assert code == 0 and "12499 training and 1249 validation sequences" in out  # (200,000 - 1) / 16, (20,000 - 1) / 16
    assert (home / "data" / "prepared").exists()


def test_a_dry_run_lists_what_is_missing_and_writes_nothing(gnlib: Call, home: Path) -> None:
    code, out, err = gnlib("study", "iteration_complexity", "--profile", "tiny", "--seeds", "1", "2", "--dry-run")
    lines = out.splitlines()
    assert (code, err) == (0, "") and not files(home)
    assert lines[0] == "iteration_complexity, profile tiny: 12 runs, 12 to run, at most 0.1 M tokens, time unknown"
    assert lines[1].startswith("not tuned, or not until interior: gauss_newton, layerwise, ") and len(lines) == 14
    assert "GN, batch 64, lr 0.02, seed 1" in lines[2] and "3 steps of 1024 tokens" in lines[2]


def test_a_study_may_be_of_some_methods_only(gnlib: Call) -> None:
    _, out, _ = gnlib("study", "iteration_complexity", "--profile", "tiny", "--methods", "soap", "adamw", "--dry-run")
    assert out.startswith("iteration_complexity, profile tiny: 2 runs") and "SOAP" in out and "Muon" not in out


def test_tune_says_which_optima_are_not_interior(gnlib: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(profile: str, setting: Setting, *_: Any, **__: Any) -> dict[str, Any]:
        return {"settings": {"method.inner.lr": 0.1}, "interior": setting.name == "soap", "trials": [{}] * 7}

    monkeypatch.setattr(cli, "tune_method", found)
    code, out, _ = gnlib("tune", "--profile", "tiny", "--methods", "soap", "adamw")
    assert code == 0 and out.splitlines() == [
        "soap: {'method.inner.lr': 0.1}, interior among 7 trials",
        "adamw: {'method.inner.lr': 0.1}, NOT interior among 7 trials",
    ]


def test_claims_print_a_table_or_json(gnlib: Call, home: Path) -> None:
    code, out, err = gnlib("claims", "--profile", "tiny", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    numbers = ("mean", "half_width", "is_lower_bound", "at_least", "at_most", "marks")
    assert {tuple(row) for row in rows} == {("claim", "paper", "ours", "n", "unit", "holds", *numbers)}
    assert {row["holds"] for row in rows} == {"not run"}
    code, out, err = gnlib("claims", "--profile", "tiny")
    assert (code, err) == (0, "") and out.splitlines()[0].split() == ["claim", "paper", "ours", "n", "holds"]
    assert sum(line.endswith("not run") for line in out.splitlines()) == len(rows) and not files(home)
    assert max(map(len, out.splitlines())) <= 120


def test_export_says_how_many_records_it_ships(gnlib: Call, home: Path) -> None:
    code, out, _ = gnlib("export", "--profile", "tiny")
    assert (code, out) == (0, f"0 records in {home / 'data' / 'records' / 'tiny'}\n")


@pytest.mark.parametrize(
    ("command", "work", "then"),
    [
        (("train", *SHORT, "--quiet"), "gnlib.cli.train_run", "continues"),
        (("sweep", "layerwise", "--profile", "tiny"), "gnlib.cli.sweep_studies", "continues"),
        (("verify", "--again", "1", "--profile", "tiny"), "gnlib.repeat.drawn", "starts anew"),
        (("bench", "--size", "tiny"), "gnlib.bench.bench", "starts anew"),
    ],
)
def test_interrupting_is_one_line_and_says_whether_the_same_command_continues(
    command: tuple[str, ...], work: str, then: str, gnlib: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    code, _, err = gnlib(*command)
    assert (code, err) == (130, f"gnlib: interrupted; the same command {then}\n")


def test_python_m_gnlib_is_the_same_command(home: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "gnlib"]
    good = subprocess.run([*command, "profiles"], env=environment, capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "") and "tiny" in good.stdout
    bad = subprocess.run([*command, "claims", "--profile", "lapdog"], env=environment, capture_output=True, text=True)
    assert "'lapdog'" in refused((bad.returncode, bad.stdout, bad.stderr))
    assert not files(home)


def test_a_sweep_whose_time_is_up_says_so_with_an_exit_code_of_its_own(
    gnlib: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise UnfinishedError("2 of 7 settings are left: soap, muon")

    monkeypatch.setattr(cli, "sweep_studies", stopped)
    code, out, err = gnlib("sweep", "iteration_complexity", "--profile", "tiny")
    assert (code, out) == (3, "")
    assert err == "gnlib: time is up; 2 of 7 settings are left: soap, muon; the same command continues\n"


def test_a_dry_run_names_the_variants(gnlib: Call, home: Path) -> None:
    _, out, _ = gnlib("study", "baseline_settings", "--profile", "tiny", "--seeds", "1", "--dry-run")
    lines = [line for line in out.splitlines() if line.startswith("  Muon, weights averaged, batch ")]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "0"), "jobs: 0; at least 1"),
        (("--executor", "slurm"), "executor: no executor 'slurm'; allowed: processes, inline"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(arguments: tuple[str, str], message: str, gnlib: Call, home: Path) -> None:
    line = refused(gnlib("study", "iteration_complexity", "--profile", "tiny", "--dry-run", *arguments))
    assert message in line and not files(home)


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("nowhere", "json: no folder {}"),
        pytest.param("/proc", "json: cannot write in {} (", marks=pytest.mark.skipif(not PROC, reason="no /proc")),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    folder: str, why: str, gnlib: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        pytest.fail("it began")

    monkeypatch.setattr(cli.benchmark, "bench", no_work)
    monkeypatch.setattr(cli, "heldout", no_work)
    path = tmp_path / folder / "found.json"
    for command in (("bench", "--size", "tiny"), ("evaluate", "run", "text.txt")):
        assert why.format(path.parent) in refused(gnlib(*command, "--json", str(path)))
    assert not path.exists() and not (tmp_path / "nowhere").exists()
