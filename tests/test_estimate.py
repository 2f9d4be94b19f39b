"""What runs will cost: tokens exactly, time by the speed of records of the same kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_results import made

from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.estimate import cost, estimate, sequences_read
from gnlib.model import shapes_only
from gnlib.profiles import run_config
from gnlib.record import Record
from gnlib.train import train


def timed(method: str, seconds: float, steps: int | None = None) -> Record:
    """A run of tiny that took so long for so many of its outer steps."""
    record = made(method, [5.0, 4.0])
    record.rows[-1] |= {"outer_step": steps or record.config.outer_steps, "wall_s": seconds}  # type: ignore[misc]
    return record


def config(method: str, seed: int = 9, **changes: object) -> RunConfig:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return run_config("tiny", method, seed, dotted, use_tuned=False)


def test_tokens_are_those_that_the_run_then_reads(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    for method in ("gauss_newton", "adamw"):
        chosen = config(method, start__chinchilla_fraction=0.0)
        last = train(chosen).rows[-1]
        read = last["tokens_train"] + last["tokens_search"]
        assert read == sequences_read(chosen) * 16 == estimate([chosen], []).tokens


@pytest.mark.parametrize(
    ("method", "changes"),
    [("gauss_newton", {}), ("layerwise", {}), ("layerwise", {"method__blocks": "matrix"}), ("adamw", {})],
)
def test_cost_is_the_flops_that_the_run_then_has(
    method: str, changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    runs = [config(method, start__chinchilla_fraction=0.0, **changes), config("muon", start__chinchilla_fraction=0.0)]
    flops = [train(run).rows[-1]["flops"] for run in runs]
    assert cost(runs[0]) / cost(runs[1]) == pytest.approx(flops[0] / flops[1], rel=1e-9)


@pytest.mark.parametrize(
    ("blocks", "micro_batch", "options"),
    [
        ("full", 8, {}),  # an eighth of the batch: one of 8 micro-batches
        ("full", 32, {}),  # of which it is one of 2
        ("full", 8, {"fraction": 0.4}),  # 3 of 8
        ("layerwise", 64, {}),
        ("matrix", 16, {"fraction": 0.5}),
    ],
)
def test_cost_of_conjugate_gradients_is_the_flops_of_a_run_that_takes_all_its_iterations_and_more_than_of_another(
    blocks: str, micro_batch: int, options: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    solver = {
        "method__inner__optimizer": "conjugate_gradient", "method__inner__schedule": "constant",
        "method__inner__adam_lr": None, "method__inner__steps": 16, "method__line_search": None,
        "method__blocks": blocks, "outer_steps": 1, "compute__micro_batch": micro_batch,
        "compute__precision": "fp64", "start__chinchilla_fraction": 0.0,
    }  # fmt: skip
    whole, early, other = (
        config("gauss_newton", **solver, method__inner__options=options | {"tolerance": 0.0}),
        config("gauss_newton", **solver, method__inner__options=options | {"tolerance": 0.1}),
        config("muon", start__chinchilla_fraction=0.0, outer_steps=2),
    )
    flops = [train(run).rows[-1]["flops"] for run in (whole, early, other)]
    assert cost(whole) / cost(other) == pytest.approx(flops[0] / flops[2], rel=1e-9)
    assert cost(early) == cost(whole) and flops[1] < flops[0]  # the cost is the most that it may be


@pytest.mark.parametrize("blocks", ["full", "layerwise", "matrix"])
def test_shipped_gauss_newton_records_have_the_flops_that_are_counted_today(blocks: str) -> None:
    """Theirs were corrected where the count was; conjugate gradients may have ended before their last iteration."""
    paths = (Path(__file__).parents[1] / "data" / "records").glob("*/*.jsonl")
    shipped = [record for path in paths if (record := records.read(path))]
    chosen = [r for r in shipped if r.config.method.objective != "loss" and r.config.method.blocks == blocks]
    chosen = [r for r in chosen if r.config.method.inner.optimizer != "conjugate_gradient"]
    assert len(chosen) > 30
    for record in chosen:
        counted = cost(record.config, record.rows[-1]["outer_step"]) * sum(shapes_only(record.config).layer_flops())
        assert record.rows[-1]["flops"] == pytest.approx(counted, rel=1e-9), record.config.recipe_id


def test_time_is_scaled_from_runs_of_the_same_kind() -> None:
    measured = [timed("adamw", 3.0), timed("muon", 100.0), timed("gauss_newton", 50.0)]
    assert estimate([config("adamw"), config("adamw", seed=8)], measured).seconds == pytest.approx(6.0)
    assert estimate([config("adamw", outer_steps=60)], measured).seconds == pytest.approx(30.0)
    assert estimate([config("gauss_newton")], measured).seconds == pytest.approx(50.0)


def test_speed_is_the_median_of_its_kind_and_of_the_same_partition_and_of_no_run_that_ended_at_once() -> None:
    three = [timed("adamw", seconds) for seconds in (2.0, 4.0, 40.0)]
    assert estimate([config("adamw")], three).seconds == pytest.approx(4.0)
    both = [timed("gauss_newton", 50.0), timed("layerwise", 7.0)]
    assert estimate([config("layerwise")], both).seconds == pytest.approx(7.0)
    assert estimate([config("gauss_newton")], both).seconds == pytest.approx(50.0)
    assert estimate([config("adamw")], [timed("adamw", 0.0)]).seconds is None


def test_a_kind_that_was_never_run_is_scaled_from_all_of_them() -> None:
    newton, layerwise = config("gauss_newton"), config("layerwise")
    found = estimate([layerwise], [timed("gauss_newton", 50.0)])
    assert found.seconds == pytest.approx(50.0 * cost(layerwise) / cost(newton))


def test_a_run_that_ended_early_measures_speed_by_the_steps_it_took() -> None:
    assert estimate([config("adamw")], [timed("adamw", 1.0, steps=2)]).seconds == pytest.approx(3.0)  # of 6


def test_the_text_says_tokens_time_and_jobs() -> None:
    found = estimate([config("adamw"), config("adamw", seed=8)], [timed("adamw", 600.0)])
    assert str(found) == "2 to run, at most 0.0 M tokens, about 20 min of one process"
    assert found.with_jobs(8) == f"{found}, 10 min with 2 at a time"  # no more than there are runs
    assert str(estimate([config("adamw")], [])).endswith("time unknown")


@pytest.mark.parametrize("measured", [[], [timed("adamw", 600.0)]])
def test_no_runs_at_a_time_are_refused_and_not_replaced(measured: list[Record]) -> None:
    with pytest.raises(ConfigError, match="jobs: 0; at least 1"):
        estimate([config("adamw")], measured).with_jobs(0)
