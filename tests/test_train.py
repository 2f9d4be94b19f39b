"""One loop for every method: what it counts, where it starts, when it stops, and that it survives a kill."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.data import TokenFiles, validation_batches
from gnlib.files import exclusive, read_tensors
from gnlib.methods import METHODS
from gnlib.model import Decoder, parameter_count
from gnlib.outer_step import OuterStep, StepInfo, Stream
from gnlib.prepare import prepare
from gnlib.profiles import PROFILES, run_config
from gnlib.record import Record, Row
from gnlib.train import pinned, run_folder, start_config, train

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    return tmp_path


def cold(method: str, **changes: Any) -> RunConfig:
    """A run of the tiny profile from the initialisation; fields with `__` for the dots."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return run_config("tiny", method, changes={"start.chinchilla_fraction": 0.0} | dotted, use_tuned=False)


def run(config: RunConfig, **settings: Any) -> Record:
    return train(config, CPU, **settings)


def compared(rows: list[Row]) -> list[dict[str, Any]]:
    """The columns that are the same for the same run on any day."""
    return [{name: value for name, value in row.items() if name not in ("wall_s", "peak_bytes")} for row in rows]


def record_path(config: RunConfig) -> Path:
    return run_folder(pinned(config)) / "record.jsonl"


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the run's name with every outer step."""
    taken: list[str] = []
    real = OuterStep.step

    def step(self: OuterStep, stream: Stream) -> StepInfo:
        taken.append(self.config.run_id)
        return real(self, stream)

    monkeypatch.setattr(OuterStep, "step", step)
    return taken


def no_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: OuterStep, stream: Stream) -> StepInfo:
        pytest.fail("it was trained again")

    monkeypatch.setattr(OuterStep, "step", step)


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize(("method", "searched"), [("gauss_newton", 16), ("layerwise", 16), ("adamw", 0)])
def test_tokens_counted_are_tokens_read_search_included(
    method: str, searched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 sequences of 16 tokens a step, and a quarter as many for the search, all taken from the training file."""
    sequences = 0
    real = TokenFiles.gather

    def gather(self: TokenFiles, split: Any, indices: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        nonlocal sequences
        sequences += len(indices) if split == "train" else 0
        return real(self, split, indices, *rest)

    monkeypatch.setattr(TokenFiles, "gather", gather)
    read: list[int] = []
    rows = run(cold(method, outer_steps=3), on_row=lambda config, row: read.append(16 * sequences)).rows
    assert [row["tokens_train"] for row in rows] == [64 * 16 * step for step in range(4)]
    assert [row["tokens_search"] for row in rows] == [searched * 16 * step for step in range(4)]
    assert [row["tokens_train"] + row["tokens_search"] for row in rows] == read


def test_the_flops_column_is_what_a_hand_count_gives() -> None:
    """Width 16, MLP 32, 2 blocks, 16 tokens, vocabulary 300; 64 sequences a step.

    A training sequence costs 3 forward passes in a baseline and 5 in Gauss-Newton (forward, tangent 2, pullback 2);
    its search tries 6 step sizes on 16 sequences.
    """
    matrices, attention, head = 4 * 16 * 16 + 2 * 16 * 32, 2 * 16 * 16 * 16, 2 * 16 * 16 * 300
    forward = 2 * (2 * 16 * matrices + attention) + head
    for method, passes in (("adamw", 64 * 3), ("gauss_newton", 64 * 5 + 16 * 6)):
        rows = run(cold(method, outer_steps=2)).rows
        assert [row["flops"] for row in rows] == pytest.approx([0, forward * passes, 2 * forward * passes], rel=1e-12)


def test_seconds_are_those_of_all_steps_so_far_without_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is read before and after each step and ticks once a reading."""
    ticks = itertools.count()
    monkeypatch.setattr("gnlib.train.time.perf_counter", lambda: float(next(ticks)))
    assert [row["wall_s"] for row in run(cold("adamw", outer_steps=3)).rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(("factor", "status"), [(1.49, "finished"), (1.51, "diverged")])
def test_a_run_has_diverged_above_one_and_a_half_times_the_loss_at_its_start(
    factor: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = itertools.chain([4.0], itertools.repeat(4.0 * factor))
    monkeypatch.setattr("gnlib.train._Run.evaluate", lambda _: next(losses))
    assert run(cold("adamw", outer_steps=2)).status == status


def test_rows_are_of_the_start_each_evaluation_and_the_last_step() -> None:
    seen: list[Row] = []
    record = run(cold("gauss_newton", outer_steps=5, evaluation__every=2), on_row=lambda config, row: seen.append(row))
    assert [row["outer_step"] for row in record.rows] == [0, 2, 4, 5]
    assert seen == record.rows and record.status == "finished"
    assert records.read(record_path(record.config)) == record
    start, *others = record.rows
    assert (start["train_loss"], start["step_size"], start["search_gain"]) == (None, None, None)
    assert all(row["search_gain"] is not None and row["search_gain"] >= 0 for row in others)
    assert all(row["wall_s"] > 0 and row["peak_bytes"] > 1e8 for row in others)
    each = run(cold("gauss_newton", outer_steps=5)).rows
    assert compared([each[step] for step in (0, 2, 4, 5)]) == compared(record.rows)


def test_a_run_that_is_for_a_target_ends_at_its_first_evaluation_below_it_and_is_otherwise_the_same() -> None:
    whole = run(cold("adamw", outer_steps=6, evaluation__every=2)).rows
    target = whole[2]["val_loss"]
    short = run(cold("adamw", outer_steps=6, evaluation__every=2, evaluation__stop_below=target))
    assert [row["outer_step"] for row in short.rows] == [0, 2, 4] and short.status == "finished"
    assert compared(short.rows) == compared(whole[:3])


# ---------------------------------------------------------------- a finished run


def test_a_finished_run_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cold("adamw", outer_steps=2)
    first = run(config)
    path = record_path(config)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    no_more_steps(monkeypatch)
    assert run(config) == first and first.status == "finished"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not (path.parent / "checkpoint.pt").exists()


def test_weights_asked_for_later_are_those_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cold("adamw", outer_steps=2)
    first = run(config)
    path = record_path(config).with_name("weights.pt")
    assert not path.exists()
    again = run(config, keep_weights=True)
    assert compared(again.rows) == compared(first.rows)
    weights = torch.load(path, weights_only=True)
    assert _validation_loss(config, weights) == pytest.approx(first.rows[-1]["val_loss"], rel=1e-5)
    no_more_steps(monkeypatch)
    assert run(config, keep_weights=True) == again


# ---------------------------------------------------------------- the shared start


@pytest.mark.parametrize("profile", PROFILES)
def test_the_start_takes_at_most_2_15_tokens_at_once_whatever_the_runs_own_micro_batch_is(profile: str) -> None:
    """The eager logits of the paper's batch of 128 sequences of 1024 and 32000 tokens would fill a GPU."""
    config = run_config(profile, "adamw", use_tuned=False)
    start = start_config(config)
    at_once = start.compute.micro_batch
    assert at_once * start.data.sequence_length <= 1 << 15 and start.outer_batch % at_once == 0
    assert start_config(config.replace({"compute.micro_batch": 1})) == start


def test_every_method_starts_from_one_checkpoint_that_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted_steps(monkeypatch)
    fraction = 0.005
    changes = {"start.chinchilla_fraction": fraction, "outer_steps": 1}
    runs = {
        (method, seed): run(run_config("tiny", method, seed, changes, use_tuned=False))
        for method in METHODS for seed in (1, 2)
    }  # fmt: skip
    starts = {record.rows[0]["val_loss"] for record in runs.values()}
    assert len(starts) == 1

    (start,) = {start_config(record.config).run_id for record in runs.values()}
    steps = math.ceil(fraction * 20 * parameter_count(cold("adamw")) / (8 * 16))  # batches of 8 sequences of 16 tokens
    assert taken.count(start) == steps == 11 and len(taken) == 11 + len(runs)
    folders = record_path(runs["adamw", 1].config).parents[1]
    assert [path.parent.name for path in folders.glob("*/weights.pt")] == [start]
    trained = records.read(folders / start / "record.jsonl")
    assert trained is not None and trained.status == "finished"
    assert trained.rows[-1]["val_loss"] == pytest.approx(starts.pop(), rel=1e-6)
    initial = run(cold("adamw", outer_steps=1)).rows[0]["val_loss"]
    assert trained.rows[0]["val_loss"] == pytest.approx(initial, rel=1e-6)
    assert trained.config.method.inner.optimizer == "adamw" and trained.config.seed == 10_000


def test_a_start_killed_before_its_weights_were_written_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config("tiny", "adamw", 1, {"start.chinchilla_fraction": 0.001, "outer_steps": 1}, use_tuned=False)
    first = run(config)
    weights = record_path(start_config(first.config)).with_name("weights.pt")
    weights.unlink()
    record_path(config).unlink()
    assert compared(run(config).rows) == compared(first.rows)
    assert weights.exists()


def test_data_that_do_not_fit_are_refused_before_anything_runs(home: Path) -> None:
    with pytest.raises(ConfigError, match="one sequence needs 1000001"):
        run(cold("adamw").replace({"data.sequence_length": 1_000_000}))
    with pytest.raises(ConfigError, match=r"outer_batch: 1000000 sequences; allowed: at most the text's [0-9]+"):
        run(cold("adamw").replace({"outer_batch": 1_000_000}))
    with pytest.raises(ConfigError, match=r"^start\.batch: 1000000 sequences; allowed: at most the text's [0-9]+$"):
        run(run_config("tiny", "adamw", changes={"start.batch": 1_000_000}))
    assert pinned(cold("adamw", start__batch=1_000_000)).start.batch == 1_000_000  # of no start, which is not made
    assert not (home / "data" / "runs").exists()


def test_one_runs_settings_do_not_leak_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile and a method may have whole sections as values, which every run must copy."""
    for table, name in ((PROFILES, "h200"), (METHODS, "gauss_newton")):
        monkeypatch.setitem(table, name, copy.deepcopy(table[name]))  # type: ignore[misc]
    before = run_config("h200", "gauss_newton", use_tuned=False)
    changes = {"method.line_search.candidates": 2, "data.vocabulary": 300, "start.lr": 0.5}
    changed = run_config("h200", "gauss_newton", changes=changes, use_tuned=False)
    run_config("h200", "adamw", use_tuned=False)
    assert run_config("h200", "gauss_newton", use_tuned=False) == before != changed


# ---------------------------------------------------------------- evaluation


def _validation_loss(config: RunConfig, parameters: dict[str, Tensor]) -> float:
    """Mean over the first validation sequences, one at a time."""
    model = Decoder.from_config(config)
    model.load_state_dict(parameters)
    losses = []
    with torch.no_grad():
        for inputs, targets in validation_batches(prepare(config.data), config.evaluation.sequences, 1):
            losses.append(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("factor", [0.0, 0.6])
def test_the_evaluated_parameters_are_the_weighted_mean_and_with_factor_zero_the_parameters(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the number of sequences, 50, is no multiple of the batch of 16."""
    config = cold("adamw", compute__precision="fp64", evaluation__average=factor, evaluation__sequences=50)
    points: list[dict[str, Tensor]] = []
    real = OuterStep.step

    def step(self: OuterStep, stream: Stream) -> StepInfo:
        info = real(self, stream)
        points.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return info

    monkeypatch.setattr(OuterStep, "step", step)
    rows = run(config).rows
    for t, row in enumerate(rows[1:], 1):
        weights = [factor ** (t - 1 - s) for s in range(t)]  # 0 ** 0 is 1
        past = list(zip(weights, points, strict=False))
        mean = {name: sum(w * point[name] for w, point in past) / sum(weights) for name in points[0]}
        assert row["val_loss"] == pytest.approx(_validation_loss(config, mean), rel=1e-10)


def test_averaging_for_evaluation_does_not_change_the_training() -> None:
    plain, averaged = (run(cold("adamw", evaluation__average=factor)).rows for factor in (0.0, 0.9))
    assert [row["train_loss"] for row in plain] == [row["train_loss"] for row in averaged]
    assert plain[-1]["val_loss"] != averaged[-1]["val_loss"]


# ---------------------------------------------------------------- divergence


def strict(path: Path) -> list[Any]:
    """The lines of a record as JSON proper, which has no NaN."""
    refuse: Callable[[str], Any] = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_run_that_blows_up_stops_and_is_recorded_as_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cold("adamw", method__inner__lr=1e4, method__inner__clip=None)
    record = run(config)
    assert record.status == "diverged" and record.rows[-1]["outer_step"] < config.outer_steps
    lines = strict(record_path(config))
    assert lines[-1] == {"status": "diverged"} and len(lines) == len(record.rows) + 2
    assert not record_path(config).with_name("checkpoint.pt").exists()
    no_more_steps(monkeypatch)
    assert run(config) == record


def test_a_validation_loss_that_is_not_a_number_is_null_and_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OuterStep.step

    def step(self: OuterStep, stream: Stream) -> StepInfo:
        info = real(self, stream)
        if self.done == 2:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.nan)
        return info

    monkeypatch.setattr(OuterStep, "step", step)
    record = run(cold("adamw"))
    assert record.status == "diverged" and record.rows[-1]["outer_step"] == 2
    assert record.rows[-1]["val_loss"] is None and record.rows[-1]["train_loss"] is not None
    assert strict(record_path(record.config))[-2]["val_loss"] is None


def test_a_training_loss_that_is_not_a_number_ends_the_run_between_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = OuterStep.step

    def step(self: OuterStep, stream: Stream) -> StepInfo:
        info = real(self, stream)
        return info if self.done < 2 else replace(info, train_loss=math.nan)

    monkeypatch.setattr(OuterStep, "step", step)
    record = run(cold("adamw", outer_steps=9, evaluation__every=5))
    assert record.status == "diverged" and [row["outer_step"] for row in record.rows] == [0, 2]
    assert record.rows[-1]["train_loss"] is None and record.rows[-1]["val_loss"] is not None
    assert strict(record_path(record.config))[-1] == {"status": "diverged"}


def test_a_start_whose_loss_is_not_a_number_ends_the_run_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Decoder.initialise

    def initialise(self: Decoder, seed: int) -> None:
        real(self, seed)
        with torch.no_grad():
            self.head.weight.fill_(float("nan"))

    monkeypatch.setattr(Decoder, "initialise", initialise)
    record = run(cold("adamw"))
    assert record.status == "diverged" and [row["val_loss"] for row in record.rows] == [None]
    assert len(strict(record_path(record.config))) == 3


def test_a_line_search_that_finds_nothing_better_leaves_the_losses_at_the_start() -> None:
    """Where a baseline with that learning rate diverges, Gauss-Newton with 0 among its step sizes stays."""
    rows = run(cold("gauss_newton", method__inner__lr=1e4, method__inner__clip=None)).rows
    assert {row["step_size"] for row in rows[1:]} == {0.0} and len({row["val_loss"] for row in rows}) == 1


# ---------------------------------------------------------------- killed at any moment

# A process that trains with a checkpoint after every outer step and kills itself with SIGKILL at a moment:
KILLED = """
import os, signal, sys
import torch
from gnlib import record, train
from gnlib.config import RunConfig
from gnlib.outer_step import OuterStep

config, moment, last = RunConfig.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
append, save, gradients = record.append, torch.save, OuterStep._gradients
calls = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying_append(path, line):  # the row is written, or half of it
    if line.get("outer_step") == last and moment == "torn row":
        with open(path, "a") as file:
            file.write(record._line(line)[:40])
        die()
    append(path, line)
    if line.get("outer_step") == last and moment == "row":
        die()

def dying_save(state, path):  # half a checkpoint
    save(state, path)
    if state["method"]["done"] == last and moment == "checkpoint":
        os.truncate(path, os.path.getsize(path) // 2)
        die()

def dying_gradients(self, stream, sequences):  # in the middle of a step
    global calls
    calls += self.done == last - 1
    if moment == "step" and calls == max(1, self.config.method.inner.steps // 2):
        die()
    return gradients(self, stream, sequences)

record.append, torch.save, OuterStep._gradients = dying_append, dying_save, dying_gradients
train.train(config, torch.device("cpu"), checkpoint_seconds=0)
"""


def environment(data: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "GNLIB_DATA": str(data)}


@pytest.mark.parametrize(
    ("method", "moments"),
    [
        ("gauss_newton", [("row", 2), ("step", 4)]),  # with warm start: inner solution and state carry over
        ("soap", [("checkpoint", 2), ("row", 4)]),
        ("muon", [("torn row", 3), ("step", 5)]),
    ],
)
def test_a_run_killed_twice_and_resumed_is_the_uninterrupted_one_bit_for_bit(
    method: str, moments: list[tuple[str, int]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cold(method, outer_steps=6, evaluation__average=0.9)
    assert config.method.inner.warm_start
    file = home / "config.json"
    file.write_text(config.model_dump_json())
    path, checkpoint = record_path(config), record_path(config).with_name("checkpoint.pt")
    for moment, step in moments:
        command = [sys.executable, "-c", KILLED, str(file), moment, str(step)]
        killed = subprocess.run(command, env=environment(home / "data"), capture_output=True, text=True)
        assert killed.returncode == -9, killed.stderr
        left = records.read(path)
        assert left is not None and left.status == "unfinished"
        assert left.rows[-1]["outer_step"] == (step - 1 if moment in ("step", "torn row") else step)
        assert path.read_bytes().endswith(b"\n") == (moment != "torn row")
        assert torch.load(checkpoint, weights_only=True)["method"]["done"] == step - 1
    taken = counted_steps(monkeypatch)
    resumed = run(config)
    assert len(taken) == 6 - (moments[-1][1] - 1)  # it went on from the last checkpoint
    assert resumed.status == "finished" and records.read(path) == resumed and not checkpoint.exists()

    monkeypatch.setenv("GNLIB_DATA", str(home / "whole"))
    whole = run(config)
    assert compared(resumed.rows) == compared(whole.rows) and len(whole.rows) == 7
    assert len(taken) == 6 - (moments[-1][1] - 1) + 6


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"junk" * 40])
def test_a_damaged_checkpoint_is_one_line_that_names_it_and_without_it_the_run_starts_anew(
    damage: Callable[[bytes], bytes], home: Path
) -> None:
    config = cold("adamw", outer_steps=6)
    file = home / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-c", KILLED, str(file), "row", "3"]
    subprocess.run(command, env=environment(home / "data"), capture_output=True)
    checkpoint = record_path(config).with_name("checkpoint.pt")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: damaged \(\w+\); delete it, and it is made anew$"):
        run(config)
    checkpoint.unlink()
    assert [row["outer_step"] for row in run(config).rows] == list(range(7))


class Noisy(torch.optim.SGD):
    """Draws numbers from torch's own generator."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * (p.grad + 0.1 * torch.randn_like(p))


def interrupted(config: RunConfig, at: int) -> None:
    """Stopped after a row, with the checkpoint of the step before."""

    def stop(config: RunConfig, row: Row) -> None:
        if row["outer_step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, on_row=stop, checkpoint_seconds=0.0)


def test_an_optimiser_that_draws_numbers_repeats_and_resumes_bit_for_bit(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cold("sgd", method__inner__optimizer=f"{__name__}.Noisy", method__inner__lr=0.1)
    rows = []
    for place, stopped in (("first", False), ("second", False), ("third", True)):
        monkeypatch.setenv("GNLIB_DATA", str(home / place))
        if stopped:
            interrupted(config, at=3)
        rows.append(compared(run(config).rows))
        torch.rand(3)  # what is drawn elsewhere in the process does not matter
    assert rows[0] == rows[1] == rows[2]


def test_a_record_that_lost_rows_of_which_the_checkpoint_knows_is_begun_anew() -> None:
    """As after a power cut: with a hole, steps to the target would be interpolated over it."""
    config = cold("adamw", outer_steps=5)
    interrupted(config, at=4)
    path = record_path(config)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))  # of the steps 0 and 1
    assert [row["outer_step"] for row in run(config).rows] == list(range(6))


def test_a_file_that_cannot_be_read_for_another_reason_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """One would delete it."""
    for error in (torch.OutOfMemoryError("full"), PermissionError("closed")):
        monkeypatch.setattr(torch, "load", raising(error))
        with pytest.raises(type(error)):
            read_tensors(Path("checkpoint.pt"), torch.device("cpu"))


def raising(error: Exception) -> Callable[..., Any]:
    def load(*arguments: Any, **named: Any) -> Any:
        raise error

    return load


def test_a_second_process_on_a_run_says_that_it_waits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, flushed = io.StringIO(), threading.Event()
    monkeypatch.setattr(said, "flush", flushed.set)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr("gnlib.files.PATIENCE", 0.05)
    with ThreadPoolExecutor(1) as threads:
        with exclusive(home / "run"):
            second = threads.submit(_held, home / "run")
            told = flushed.wait(timeout=60)
            waiting = not second.done()
        assert told and waiting and second.result(timeout=60)
    assert said.getvalue() == f"gnlib: {home / 'run'}: another process is at it; waiting\n"


def _held(path: Path) -> bool:
    with exclusive(path):
        return True


def test_a_run_killed_before_its_first_checkpoint_starts_anew() -> None:
    config = cold("adamw", outer_steps=3)
    whole = run(config)
    path = record_path(config)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:30])  # two rows and a torn one
    assert compared(run(config).rows) == compared(whole.rows)
    assert [set(line) for line in strict(path)] == [set(json.loads(line)) for line in lines]


def test_the_same_configuration_gives_the_same_losses_in_two_processes_from_scratch(home: Path) -> None:
    """Start, Gauss-Newton and SOAP, whatever the seed of Python's hashes."""
    code = (
        "import sys, torch; from gnlib.config import RunConfig; from gnlib.train import train\n"
        "for path in sys.argv[1:]: train(RunConfig.load(path), torch.device('cpu'))"
    )
    paths = []
    for method in ("gauss_newton", "soap"):
        config = run_config("tiny", method, 1, {"start.chinchilla_fraction": 0.005}, use_tuned=False)
        paths.append(home / f"{method}.json")
        paths[-1].write_text(config.model_dump_json())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, paths)],
            env=environment(home / str(number)) | {"PYTHONHASHSEED": str(number)},
        )
        for number in (1, 2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    found = []
    for number in (1, 2):
        folders = sorted((home / str(number) / "runs").iterdir())
        read = [records.read(folder / "record.jsonl") for folder in folders]
        found.append({record.config.run_id: compared(record.rows) for record in read if record})
    assert found[0] == found[1] and len(found[0]) == 3


def test_another_seed_gives_other_losses_from_the_same_start() -> None:
    first, second = (run(cold("adamw", seed=seed, outer_steps=1)).rows for seed in (1, 2))
    assert first[0]["val_loss"] == second[0]["val_loss"] and first[1]["val_loss"] != second[1]["val_loss"]


def test_rows_of_the_start_are_told_too_where_it_has_to_be_made() -> None:
    config = pinned(run_config("tiny", "adamw", changes={"start.chinchilla_fraction": 0.001, "outer_steps": 1}))
    seen: list[tuple[str, int]] = []
    for seed in (0, 1):
        run(config.replace({"seed": seed}), on_row=lambda of, row: seen.append((of.run_id, row["outer_step"])))
    start = pinned(start_config(config))
    made, own = [step for name, step in seen if name == start.run_id], [s for n, s in seen if n != start.run_id]
    assert made == list(range(start.outer_steps + 1)) and own == [0, 1, 0, 1]


def test_the_record_of_a_run_stays_while_it_runs_again_for_its_weights() -> None:
    config = pinned(cold("adamw"))
    done = run(config)
    folder = run_folder(config)

    def stop(config: RunConfig, row: Row) -> None:
        if row["outer_step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, keep_weights=True, on_row=stop, checkpoint_seconds=0.0)
    assert records.read(folder / "record.jsonl") == done
    seen: list[int] = []
    run(config, keep_weights=True, on_row=lambda _, row: seen.append(row["outer_step"]))
    assert seen[0] > 1  # from the checkpoint
    assert (folder / "weights.pt").exists() and not (folder / "again").exists()
    assert records.read(folder / "record.jsonl") == done


def test_a_folder_that_holds_a_run_made_with_other_defaults_is_refused_and_stays() -> None:
    """A later version's default may be another while the name, of what differs from the defaults, is the same."""
    config = pinned(cold("adamw"))
    other = run(config)
    other.config = config.replace({"evaluation.every": 2})
    records.write(run_folder(config) / "record.jsonl", other)
    with pytest.raises(ConfigError, match=r"holds a run made with other defaults; move it away$"):
        run(config)
    assert records.read(run_folder(config) / "record.jsonl") == other
