"""A study trains what is missing and nothing else, one process a run; a failing run does not stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_results import made

from gnlib import executors, studies, study
from gnlib import record as records
from gnlib.claims import claims
from gnlib.config import ConfigError, RunConfig
from gnlib.executors import Slots, StudyError, describe, execute
from gnlib.files import data_folder
from gnlib.import_path import source_hash
from gnlib.methods import METHODS, method_of
from gnlib.profiles import PROFILES, find_profile, run_config
from gnlib.record import Record
from gnlib.results import label
from gnlib.studies import study_records, study_runs
from gnlib.study import find, run_study
from gnlib.sweep import sweep
from gnlib.train import pinned, run_folder, start_config, train
from gnlib.tune import tune
from gnlib.variants import Setting

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.02)
    return tmp_path


def short(method: str, seed: int = 1, **changes: Any) -> RunConfig:
    """Two outer steps from the initialisation; fields with `__` for the dots."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    plain = {"start.chinchilla_fraction": 0.0, "outer_steps": 2}
    return run_config("tiny", method, seed, plain | dotted, use_tuned=False)


def of(config: RunConfig, status: str = "finished", loss: float = 4.0) -> Record:
    """A record that was not trained."""
    record = made("adamw", [5.0, loss], status=status)
    record.config = config
    return record


def ship(home: Path, record: Record) -> None:
    records.write(home / "data" / "records" / "tiny" / f"{record.config.recipe_id}.jsonl", record)


def leave(record: Record) -> None:
    """As a run of this machine."""
    records.write(run_folder(record.config) / "record.jsonl", record)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A list that grows by the command of every process that is started."""
    commands: list[list[str]] = []
    real = executors._spawn

    def spawn(command: list[str], *rest: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return real(command, *rest)

    monkeypatch.setattr(executors, "_spawn", spawn)
    return commands


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*_: Any) -> None:
        pytest.fail("a run was started")

    monkeypatch.setattr(executors, "_spawn", spawn)


# ---------------------------------------------------------------- running


def test_only_what_is_missing_is_trained_and_records_come_in_the_order_asked_for(launched: list[list[str]]) -> None:
    configs = [short("muon"), short("adamw"), short("adamw", seed=2)]
    done = train(configs[1], torch.device("cpu"))
    found = run_study(configs, "tiny", jobs=2)
    assert [record.config.recipe_id for record in found] == [config.recipe_id for config in configs]
    assert [record.status for record in found] == ["finished"] * 3 and found[1] == done
    assert [len(record.rows) for record in found] == [3, 3, 3]
    paths = {command[command.index("--config") + 1] for command in launched}
    assert paths == {str(run_folder(pinned(configs[i])) / "config.json") for i in (0, 2)} and len(launched) == 2

    launched.clear()
    assert run_study(configs, "tiny", jobs=2) == found and not launched


def test_a_failing_run_is_reported_with_its_logs_tail_and_does_not_stop_the_others(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same start, which is made first and once."""
    monkeypatch.setattr("gnlib.train.try_out", lambda inner: None)  # here, so that the run itself finds out
    start = {"start__chinchilla_fraction": 0.001}
    bad = short("adamw", method__inner__optimizer="torch.optim.LBFGS", **start)  # wants a closure that it does not get
    good = short("adamw", **start)
    with pytest.raises(StudyError) as caught:
        run_study([bad, good], "tiny", jobs=1)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{describe(pinned(bad))} failed with exit code 2: ")
    assert "missing 1 required positional argument: 'closure'" in line
    assert [record and record.status for record in find([bad, good], "tiny")] == [None, "finished"]
    weights = run_folder(pinned(start_config(good))) / "weights.pt"
    assert weights.exists() and len(launched) == 3
    assert launched[0][-1] == "--keep-weights" and all("--keep-weights" not in command for command in launched[1:])


@pytest.mark.parametrize("profile", PROFILES)
def test_the_start_of_all_runs_is_called_so_and_a_run_of_adamw_that_looks_like_it_is_not(profile: str) -> None:
    run = run_config(profile, "adamw", changes={"start.seed": 5}, use_tuned=False)
    start = start_config(run)
    said = f"the start of all runs, batch {run.start.batch}, lr {run.start.lr:g}, seed 5 ("
    for one in (start, start.replace({"data.fingerprint": "a" * 16, "outer_steps": 500})):
        assert describe(one).startswith(said)
    cold = run.replace({"start.chinchilla_fraction": 0.0})
    assert all(describe(one).startswith("AdamW, ") for one in (run, cold, start.replace({"method.inner.final": 0.2})))


def test_what_runs_cost_is_not_told_for_none_at_a_time() -> None:
    assert "1 to run" in study.expected([short("adamw")], "tiny", jobs=1)
    with pytest.raises(ConfigError, match="jobs: 0; at least 1"):
        study.expected([short("adamw")], "tiny", jobs=0)


def test_a_run_that_cannot_be_built_is_refused_before_anything_runs(launched: list[list[str]]) -> None:
    bad = short("adamw", method__inner__optimizer="no_such_package.Optimizer", start__chinchilla_fraction=0.001)
    with pytest.raises(ConfigError, match=r"cannot import 'no_such_package\.Optimizer'"):
        run_study([bad, short("adamw")], "tiny", jobs=1)
    stuck = short("adamw", method__inner__optimizer="torch.optim.LBFGS", start__chinchilla_fraction=0.001)
    with pytest.raises(ConfigError, match=r"LBFGS: a trial step failed with TypeError"):
        run_study([stuck, short("adamw")], "tiny", jobs=1)
    assert not launched and not data_folder().exists()


def test_a_run_that_is_killed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(executors, "_spawn", lambda *_: subprocess.Popen(killed))
    with pytest.raises(StudyError, match="failed with exit code -9"):
        execute([pinned(short("adamw"))], jobs=1)


def test_each_run_has_its_own_threads_and_as_many_run_at_once_as_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def spawn(command: list[str], environment: dict[str, str], log: object) -> subprocess.Popen[bytes]:
        threads.append(environment["OMP_NUM_THREADS"])
        return subprocess.Popen([sys.executable, "-S", "-c", ""])

    monkeypatch.setattr(executors, "_spawn", spawn)
    configs = [pinned(short("adamw", seed, compute__threads=count)) for seed, count in ((1, 3), (2, 2))]
    execute(configs, jobs=1)
    assert threads == ["3", "2"]
    if not torch.cuda.is_available():
        for cores, jobs in ((8, 2), (2, 1)):
            monkeypatch.setattr(executors.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
            assert executors.default_jobs(configs) == jobs


def test_the_longest_runs_start_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def one_by_one(configs: Sequence[RunConfig], jobs: executors.Jobs, keep_weights: bool) -> None:
        for config in configs:
            order.append(config.outer_steps)
            leave(of(config))

    monkeypatch.setitem(executors.EXECUTORS, "inline", one_by_one)
    run_study([short("adamw", outer_steps=steps) for steps in (2, 9, 4)], "tiny", executor="inline")
    assert order == [9, 4, 2]


def test_less_than_one_job_is_refused(launched: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match="jobs: 0; at least 1"):
        run_study([short("adamw")], "tiny", jobs=0)
    assert not launched


def test_a_run_knows_the_study_that_has_started_it(tmp_path: Path) -> None:
    code = "import os; print(os.environ['GNLIB_PARENT'] == str(os.getppid()))"
    with open(tmp_path / "log", "wb") as log:
        executors._spawn([sys.executable, "-c", code], dict(os.environ), log).wait()
    assert (tmp_path / "log").read_text() == "True\n"


def test_a_run_whose_study_is_gone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a notebook's kernel that is killed: nobody else would stop it."""
    config = run_config("tiny", "adamw", 7, {"start.chinchilla_fraction": 0.0})
    monkeypatch.setenv("GNLIB_PARENT", str(os.getpid()))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setenv("GNLIB_PARENT", str(os.getppid()))
    assert train(config).status == "finished"


def test_interrupting_a_study_ends_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def spawn(*_: Any) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]))
        return processes[-1]

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executors, "_spawn", spawn)
    configs = [pinned(short("adamw", seed)) for seed in (1, 2, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute(configs, jobs=2)
    assert [process.wait(30) for process in processes] == [-15, -15]


def test_no_more_runs_than_jobs_are_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    running: list[int] = []

    def spawn(*_: Any) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(0.1)"]))
        running.append(sum(process.poll() is None for process in processes))
        return processes[-1]

    monkeypatch.setattr(executors, "_spawn", spawn)
    execute([pinned(short("adamw", seed)) for seed in range(5)], jobs=2)
    assert len(processes) == 5 and max(running) <= 2
    assert all(process.returncode == 0 for process in processes)


@pytest.mark.usefixtures("nothing_runs")
def test_where_nothing_may_run_a_missing_record_is_an_error_that_names_the_command(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [short("adamw"), short("muon")]
    ship(home, of(configs[0]))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(StudyError) as caught:
        run_study(configs, "tiny", command="gnlib study iteration_complexity --profile tiny")
    assert str(caught.value) == (
        f"1 of 2 records are missing, the first is {describe(configs[1])}; "
        "run: gnlib study iteration_complexity --profile tiny"
    )
    monkeypatch.delenv("CI")
    with pytest.raises(StudyError, match="2 of 2 records"):
        run_study(configs, "tiny", fresh=True, allow_run=False)
    assert not (home / "elsewhere").exists()


@pytest.mark.usefixtures("nothing_runs")
def test_a_complete_study_is_read_wherever_nothing_may_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    ship(home, of(short("adamw")))
    assert run_study([short("adamw")], "tiny") == [of(short("adamw"))]


@pytest.mark.usefixtures("nothing_runs")
def test_the_inline_executor_trains_in_this_process_with_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [short("adamw", start__chinchilla_fraction=0.001), short("muon", start__chinchilla_fraction=0.001)]
    inline = run_study(configs, "tiny", executor="inline")
    assert [record.status for record in inline] == ["finished"] * 2
    monkeypatch.setenv("GNLIB_EXECUTOR", "inline")  # the default
    assert run_study([short("soap")], "tiny")[0].status == "finished"
    again = train(configs[0], torch.device("cpu"))
    assert [row["val_loss"] for row in again.rows] == [row["val_loss"] for row in inline[0].rows]


def test_an_optimiser_whose_file_is_edited_while_it_trains_is_one_line_that_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run has the name of the edited file; asked for again it is another, and is trained."""
    path = home / "edited_meanwhile.py"
    path.write_text("import torch\nclass Own(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(home)

    def edited_first(configs: Sequence[RunConfig], jobs: executors.Jobs, keep_weights: bool) -> None:
        path.write_text(path.read_text() + "# edited\n")
        executors.run_inline(configs, jobs, keep_weights)

    def asked() -> RunConfig:
        own = "edited_meanwhile.Own"
        return short("adamw", method__inner__optimizer=own, method__inner__source=source_hash(own))

    monkeypatch.setitem(executors.EXECUTORS, "editing", edited_first)
    before = asked()
    with pytest.raises(StudyError) as caught:
        run_study([before], "tiny", executor="editing")
    assert str(caught.value) == (
        f"{describe(before)}: what was trained is not what was asked for, as the file of its optimiser or the text was "
        "changed meanwhile; run the same command again"
    )
    assert asked() != before
    assert run_study([asked()], "tiny", executor="inline")[0].status == "finished"


def test_an_unknown_executor_is_refused(launched: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match="no executor 'slurm'; allowed: processes, inline"):
        run_study([short("adamw")], "tiny", executor="slurm")
    assert not launched


# ---------------------------------------------------------------- finding


def test_fresh_ignores_shipped_records(home: Path) -> None:
    shipped, own = of(short("adamw")), of(short("muon"))
    ship(home, shipped)
    leave(own)
    configs = [shipped.config, own.config]
    assert find(configs, "tiny") == [shipped, own]
    assert find(configs, "tiny", fresh=True) == [None, own]
    assert find(configs, "laptop") == [None, own]


def test_a_record_of_another_text_does_not_count_where_the_text_is_known(home: Path) -> None:
    """So that a run afresh is of the text that is there now."""
    old = of(short("adamw").replace({"data.fingerprint": "old"}))
    leave(old)
    assert find([short("adamw")], "tiny", fresh=True) == [old]
    assert find([short("adamw").replace({"data.fingerprint": "new"})], "tiny", fresh=True) == [None]


def test_a_shipped_record_comes_before_one_of_this_machine(home: Path) -> None:
    config = short("adamw")
    ship(home, of(config, loss=3.0))
    leave(of(config, loss=4.0))
    found = [find([config], "tiny", fresh)[0] for fresh in (False, True)]
    assert [record and record.rows[-1]["val_loss"] for record in found] == [3.0, 4.0]


def test_a_record_made_from_another_machines_corpus_is_found_by_its_recipe(home: Path) -> None:
    """Its run has another name, and it still says which tokens it read."""
    elsewhere = short("adamw").replace({"data.fingerprint": "0123456789abcdef"})
    ship(home, of(elsewhere))
    (found,) = find([short("adamw")], "tiny")
    assert found is not None and found.config.data.fingerprint == "0123456789abcdef"
    assert found.config.run_id != pinned(short("adamw")).run_id
    assert find([short("adamw", seed=2)], "tiny") == [None]


def test_a_diverged_record_counts_and_an_unfinished_one_does_not(home: Path) -> None:
    leave(of(short("adamw"), "diverged"))
    leave(of(short("muon"), "unfinished"))
    found = find([short("adamw"), short("muon")], "tiny")
    assert [record and record.status for record in found] == ["diverged", None]


def test_a_record_of_another_version_is_skipped_with_a_warning(home: Path) -> None:
    here, shipped = short("adamw"), short("muon")
    leave(of(here))
    ship(home, of(shipped))
    for path in [run_folder(here) / "record.jsonl", *(home / "data" / "records" / "tiny").glob("*.jsonl")]:
        path.write_text(path.read_text().replace('"outer_steps"', '"steps_of_old"', 1))
    with pytest.warns(UserWarning, match="of another version") as warned:
        assert find([here, shipped], "tiny") == [None, None]
    first, second = (str(warning.message) for warning in warned)
    assert f"{shipped.recipe_id}.jsonl is of another version" in first
    assert "record.jsonl is of another version" in second and "steps_of_old" in second


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00junk\n", b"no JSON\n"])
def test_a_record_that_is_no_text_or_has_no_rows_is_as_none(damage: bytes, home: Path) -> None:
    config = short("adamw")
    leave(of(config))
    path = run_folder(config) / "record.jsonl"
    first = path.read_bytes().splitlines(keepends=True)[0]
    for content in (damage, first + b'{"status": "finished"}\n'):
        path.write_bytes(content)
        assert find([config], "tiny") == [None]
    path.write_bytes(first + damage)  # a torn row
    assert find([config], "tiny") == [None]


def test_methods_are_a_list_not_a_text() -> None:
    with pytest.raises(ConfigError, match=r"^methods: 'adamw'; a list of names such as \['adamw'\]$"):
        study_runs("iteration_complexity", "tiny", methods="adamw")


def test_a_profile_of_ones_own_without_batches_or_budget_has_the_studies_that_need_neither(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    mine = replace(PROFILES["tiny"], batches=(), budget=0)
    monkeypatch.setitem(PROFILES, "mine", mine)
    assert len(study_runs("iteration_complexity", "mine", [1])) == 6
    for name in ("critical_batch_size", "schedules", "fixed_budget", "stateless"):
        assert study_runs(name, "mine") == []
        for use in (lambda n: study_records(n, "mine"), lambda n: sweep([n], "mine")):
            with pytest.raises(ConfigError, match=f"^study: {name} needs batches .two at least., which profile 'mine'"):
                use(name)
    monkeypatch.setitem(PROFILES, "mine", replace(mine, batches=(16, 64)))
    with pytest.raises(ConfigError, match=r"^study: fixed_budget needs budget, which profile 'mine' does not have$"):
        study_records("fixed_budget", "mine")
    assert {row.holds for row in claims("mine")} == {"not run"}
    with pytest.raises(ConfigError, match=r"^budget: profile 'mine' has none$"):
        tune("mine", Setting("adamw", 64, budget=True))


# ---------------------------------------------------------------- the studies


def test_iteration_complexity_has_every_method_with_every_seed_of_the_profile() -> None:
    configs = studies.study_configs("iteration_complexity", "laptop")
    assert [(method_of(config), config.seed) for config in configs] == [
        (method, seed) for seed in (1, 2, 3) for method in METHODS
    ]
    assert len({config.outer_batch for config in configs}) == len({start_config(c).run_id for c in configs}) == 1
    assert {config.seed for config in studies.study_configs("iteration_complexity", "tiny", [7])} == {7}


def test_records_of_a_study_are_labelled_by_their_settings(home: Path) -> None:
    """The same run may have different names in different studies, and a file holds none."""
    runs = studies.study_runs("prox_linear", "tiny", [1])
    for run in runs:
        ship(home, of(run.config))
    names = ["GN", "GN-prox-linear", "GN, no line search", "GN-prox-linear, no line search"]
    assert [label(record) for record in studies.study_records("prox_linear", "tiny", [1], allow_run=False)] == names
    assert [label(record) for record in studies.existing_records("prox_linear", "tiny", [1])] == names
    assert studies.existing_records("prox_linear", "tiny", [1, 2]) == []
    assert studies.is_complete("prox_linear", "tiny") and not studies.is_complete("layerwise", "tiny")
    assert not any("label" in path.read_text() for path in home.rglob("*.jsonl"))


@pytest.fixture
def shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile tiny."""
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], in_part=True))


@pytest.mark.usefixtures("shown_in_part")
def test_of_a_study_under_way_the_complete_settings_are_shown_and_the_others_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting is a method at a batch; one of the two seeds does not make it complete."""
    small, *_, large = find_profile("tiny").batches
    runs = studies.study_runs("critical_batch_size", "tiny", [1, 2], ["muon", "soap"])
    for setting, config in runs:
        if setting.batch == small or (setting.name, config.seed) == ("soap", 1):
            ship(home, of(config))
    shown = studies.study_records("critical_batch_size", "tiny", [1, 2], allow_run=False)
    assert {(label(r), r.config.outer_batch) for r in shown} == {("Muon", small), ("SOAP", small)} and len(shown) == 4
    said = capsys.readouterr().out
    command = "gnlib sweep critical_batch_size --profile tiny --seeds 1 2"
    assert f"left out: AdamW; GN; GN-prox-linear; Layerwise GN at {small} sequences; run: {command}" in said
    assert f"left out: AdamW; GN; GN-prox-linear; Layerwise GN; Muon; SOAP at {large} sequences; run: {command}" in said
    assert len(studies.study_records("critical_batch_size", "tiny", [1], allow_run=False)) > 2


def test_of_a_profile_that_is_not_shown_in_part_nothing_is_left_out(home: Path) -> None:
    """All studies share Gauss-Newton's runs, so that one is never the first of a user's own profile."""
    (setting, config), *others = studies.study_runs("layerwise", "tiny", [1])
    ship(home, of(config))
    assert setting.name == "gauss_newton" and len(others) == 3
    with pytest.raises(StudyError, match=r"3 of 4 records are missing"):
        studies.study_records("layerwise", "tiny", [1], allow_run=False)


@pytest.mark.usefixtures("shown_in_part")
def test_what_is_asked_for_by_name_or_afresh_is_never_left_out(home: Path) -> None:
    ship(home, of(studies.study_runs("layerwise", "tiny", [1])[0].config))
    named = {"methods": ["gauss_newton", "layerwise", "matrixwise"]}
    for asked, missing in ((named, "2 of 3"), ({"fresh": True}, "4 of 4")):
        with pytest.raises(StudyError, match=f"{missing} records are missing"):
            studies.study_records("layerwise", "tiny", [1], allow_run=False, **asked)  # type: ignore[arg-type]


def test_of_a_recipe_that_was_run_on_two_texts_the_latest_counts(home: Path) -> None:
    """Whatever the names of their folders, which hashes give."""
    configs = [short("adamw", seed) for seed in range(1, 7)]
    for age, text in enumerate("ba"):
        for config in configs:
            record = of(config.replace({"data.fingerprint": text * 16}))
            leave(record)
            os.utime(run_folder(record.config) / "record.jsonl", (1000.0 + age, 1000.0 + age))
    found = find(configs, "tiny", fresh=True)
    assert [record and record.config.data.fingerprint for record in found] == ["a" * 16] * 6


def test_records_of_two_texts_are_no_study(home: Path) -> None:
    configs = [short("adamw", 1), short("adamw", 2)]
    for config, text in zip(configs, "ab", strict=True):
        ship(home, of(config.replace({"data.fingerprint": text * 16})))
    with pytest.raises(StudyError, match="its records come from different texts"):
        run_study(configs, "tiny", allow_run=False)


@pytest.mark.usefixtures("nothing_runs")
def test_afresh_only_runs_on_the_text_that_there_is_count(monkeypatch: pytest.MonkeyPatch) -> None:
    config = short("adamw")
    monkeypatch.setattr(study, "pinned", lambda config: config.replace({"data.fingerprint": "b" * 16}))
    leave(of(config.replace({"data.fingerprint": "b" * 16})))
    leave(of(config.replace({"data.fingerprint": "a" * 16})))  # later
    (found,) = run_study([config], "tiny", fresh=True, allow_run=True)
    assert found.config.data.fingerprint == "b" * 16


def test_what_is_missing_at_a_batch_larger_than_the_profiles_is_left_out_whatever_is_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is dear, and a notebook would train it unasked; what is there is shown."""
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], larger=(256,)))
    names = ["gauss_newton", "soap"]
    runs = studies.study_runs("critical_batch_size", "tiny", [1], names)
    for run in runs:
        if run.setting.batch != 256 or run.setting.name == "soap":
            ship(home, of(run.config))
    shown = studies.study_records("critical_batch_size", "tiny", [1], names, allow_run=False)
    assert len(shown) == len(runs) - 1 and [label(r) for r in shown if r.config.outer_batch == 256] == ["SOAP"]
    assert "left out: GN at 256 sequences; run: gnlib sweep critical_batch_size" in capsys.readouterr().out
    with pytest.raises(StudyError, match=r"12 of 12 records are missing"):  # not of 18
        studies.study_records("critical_batch_size", "tiny", [1], fresh=True, allow_run=False)


def test_a_study_says_which_command_trains_what_is_missing() -> None:
    with pytest.raises(StudyError, match=r"run: gnlib study line_search --profile tiny$"):
        studies.study_records("line_search", "tiny", allow_run=False)
    with pytest.raises(StudyError, match=r"run: gnlib study line_search --profile tiny --seeds 7 8$"):
        studies.study_records("line_search", "tiny", [7, 8], allow_run=False)


def test_an_unknown_study_or_profile_is_refused_in_one_line() -> None:
    for name, profile in (("no_study", "tiny"), ("iteration_complexity", "no_profile")):
        with pytest.raises(ConfigError, match=r"'no_\w+'; allowed: .*(iteration_complexity|tiny)"):
            studies.study_configs(name, profile)


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1", "0"]), ("3", ["3"] * 3), ("5,7", ["5", "7", "5"])])
def test_runs_are_dealt_out_over_the_gpus_that_this_process_may_see(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [executors._gpu(slot) for slot in range(3)] == expected


def test_a_run_goes_to_the_gpu_with_the_least_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the next in turn: of chains in step with each other one would have all of its runs on one GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    slots = Slots(6)
    assert [slots.take(work) for work in (8.0, 1.0, 1.0, 1.0)] == [0, 1, 3, 5]
    assert slots.take(1.0) == 2  # the other GPU has no free slot
    slots.give(3)
    assert [slots.take(1.0), slots.take(1.0), slots.take(1.0)] == [3, 4, None]
