"""Tokens to another method's final loss, bytes of state by shapes, and the time of a step."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from cases import ListStream
from test_results import made

from gnlib import plots
from gnlib.losses import CrossEntropy
from gnlib.methods import ALL_METHODS
from gnlib.model import Decoder
from gnlib.outer_step import OuterStep
from gnlib.profiles import run_config
from gnlib.results import by_method
from gnlib.stateless import state_bytes, step_times, summary, tokens_to_final_loss

BASELINES = [name for name, method in ALL_METHODS.items() if not method.is_gauss_newton]


def test_tokens_to_the_final_loss_are_a_share_of_the_references_paired_by_seed() -> None:
    """Adam ends at 4 after 4 steps; SinkGD is there after 2 of them, and after 1.5 of the other seed's."""
    runs = [made("adam", [6.0, 5.5, 5.0, 4.5, 4.0], 1), made("adam", [6.0, 5.0, 4.5, 4.5, 4.5], 2)]
    runs += [made("sinkgd", [6.0, 5.0, 4.0, 3.5, 3.0], 1), made("sinkgd", [6.0, 5.0, 4.0, 4.0, 4.0], 2)]
    found = tokens_to_final_loss("sinkgd", "adam")(by_method(runs), 0.0)
    assert found.mean == pytest.approx((0.5 + 0.375) / 2) and (found.n, found.censored) == (2, 0)


def test_a_method_that_never_has_that_loss_gives_a_lower_bound_and_the_reference_one() -> None:
    runs = [made("adam", [6.0, 5.0, 4.0], 1), made("sgd", [6.0, 5.5, 5.0], 1)]
    found = tokens_to_final_loss("sgd", "adam")(by_method(runs), 0.0)
    assert str(found) == "≥ 1.00"
    assert str(tokens_to_final_loss("adam", "adam")(by_method(runs), 0.0)) == "1.00"


def test_tokens_to_the_final_loss_count_those_of_a_line_search() -> None:
    runs = [made("adam", [6.0, 5.0, 4.0], 1), made("gauss_newton", [6.0, 4.0, 3.0], 1)]
    assert tokens_to_final_loss("gauss_newton", "adam")(by_method(runs), 0.0).mean == pytest.approx(1250 / 2000)


@pytest.mark.parametrize("method", BASELINES)
def test_state_counted_by_shapes_is_that_of_a_run(method: str) -> None:
    config = run_config("tiny", method, changes={"outer_batch": 2}, use_tuned=False)
    step = OuterStep(Decoder.from_config(config), CrossEntropy(), config)
    tokens = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(0))
    stream = ListStream(tokens, tokens)
    for _ in range(2):
        step.step(stream)
    found = state_bytes(config)
    assert found == {name: size for solver in step.solvers for name, size in solver.state_bytes().items()}
    assert found.keys() == dict(step.model.named_parameters()).keys()


def test_the_summary_has_a_row_a_method_with_its_state() -> None:
    runs = [made(name, [6.0, 5.0, 4.0], seed) for name in ("adam", "sgd", "sinkgd_stateless") for seed in (1, 2)]
    table = summary(runs, reference="adam")
    assert list(table.index) == ["Adam", "SGD", "SinkGD, stateless"]
    assert list(table["n"]) == [2, 2, 2] and list(table["final loss"]) == ["4.00 ± 0.00"] * 3
    assert list(table["state / parameters"]) == [2.0, 1.0, 0.0]
    assert list(table["of the blocks' matrices"]) == [2 * 16.4, 16.4, 0.0]  # 2 blocks of 4 x 16 x 16 + 2 x 16 x 32
    assert list(table["tokens to Adam's final loss"]) == ["1.00 ± 0.00"] * 3
    assert list(summary(runs, reference="adamw")["tokens to AdamW's final loss"]) == ["not run"] * 3


def test_the_summary_is_in_the_units_it_names_and_a_diverged_loss_is_none() -> None:
    runs = [made("adam", [6.0, 5.0, 4.0], 1), made("adam", [6.0, 5.0, 4.0], 2), made("sgd", [6.0, None], 1, "diverged")]
    runs[0].rows[-1]["peak_bytes"], runs[1].rows[-1]["peak_bytes"] = 5_000_000, 7_000_000
    table = summary(runs, reference="adam")
    assert table.loc["Adam", "peak (MB)"] == 7 and table.loc["SGD", "final loss"] == "-"
    assert table.loc["Adam", "state (kB)"] == round(sum(state_bytes(runs[0].config).values()) / 1000, 1) > 10


def test_step_times_are_a_table_of_methods_by_sizes() -> None:
    times = step_times(["sgd", "sinkgd"], [4, 8], steps=1)
    assert list(times.index) == ["SGD", "SinkGD"] and list(times.columns) == [4, 8]
    assert (times > 0).all().all()
    (axes,) = plots.step_times(times).axes
    assert [line.get_label() for line in axes.get_lines()] == ["SGD", "SinkGD"]


def test_step_times_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr("gnlib.stateless.time.perf_counter", lambda: 0.002 * next(clock))
    assert step_times(["sgd"], [4], steps=3).loc["SGD", 4] == pytest.approx(2.0)
