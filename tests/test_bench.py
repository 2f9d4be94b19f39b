"""The benchmark's rows: what they say of themselves, and that it refuses what it does not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gnlib.bench import METHODS, as_text, bench, kernel_times, matmul_rate, random_batch, table, timed
from gnlib.cli import app
from gnlib.config import ComputeConfig, ConfigError
from gnlib.precision import matmul_precision
from gnlib.profiles import run_config

KEYS = {"size", "method", "precision", "device", "ms", "tokens_per_s", "peak_gib", "ratio_to_standard", "n"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return bench(["tiny"], ["fp32"], steps=2)


def test_every_method_has_a_row_with_what_was_promised(rows: list[dict[str, object]]) -> None:
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row.keys() >= KEYS for row in rows)
    json.dumps(rows)


def test_ratios_are_to_the_standard_step_which_is_timed_twice(rows: list[dict[str, object]]) -> None:
    standard = rows[0]
    assert standard["ratio_to_standard"] == 1.0 and standard["n"] == 4
    for row in rows[1:]:
        assert row["n"] == 2
        ratio = row["ms"] / standard["ms"]  # type: ignore[operator]
        assert row["ratio_to_standard"] == pytest.approx(ratio, rel=0.02, abs=6e-4)  # it has three digits


def test_the_operators_that_take_most_of_a_step_are_named_the_longest_first() -> None:
    standard, newton = bench(["tiny"], ["fp32"], ["gn"], steps=2, kernels=4)
    for row in (standard, newton):
        times = [one["ms"] for one in row["kernels"]]
        assert len(times) == 4 and times == sorted(times, reverse=True) and times[-1] >= 0
        assert all(one["name"] in as_text(row) and one["calls"] >= 1 for one in row["kernels"])
    assert any(one["name"] in ("aten::mm", "aten::addmm", "aten::bmm") for one in newton["kernels"])


def test_the_profiler_says_nothing_of_its_own_amid_the_table() -> None:
    command = "bench --size tiny --methods standard --steps 1 --kernels 2"
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "gnlib", *command.split()], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and len(done.stdout.splitlines()) == 4  # heading, row, kernels


def test_each_kernel_has_the_time_and_the_calls_of_one_step() -> None:
    a, b = torch.randn(2, 384, 384)
    began = time.perf_counter()
    found = kernel_times(lambda: [a @ b for _ in range(3)], CPU, steps=4)
    wall = 1e3 * (time.perf_counter() - began)
    assert (found[0]["name"], found[0]["calls"]) == ("aten::mm", 3)
    assert 4 * sum(one["ms"] for one in found) < wall  # one after another
    assert found[0]["ms"] > 0.5 * 3 * min(timed(lambda: a @ b, 10, CPU))


def test_flops_are_those_of_the_layers(rows: list[dict[str, object]]) -> None:
    """A standard step is 3 forwards, a Gauss-Newton inner step 5, the loss 1; layerwise is between 5 and all layers."""
    tflop = {str(row["method"]): float(row["tflop"]) for row in rows}  # type: ignore[arg-type]
    assert tflop["standard"] == pytest.approx(3 * tflop["forward"], rel=0.2)  # rounded to 1e-6
    assert tflop["gn"] == tflop["prox_linear"] > tflop["standard"]
    assert tflop["layerwise"] > tflop["gn"]


def test_the_parts_of_a_gauss_newton_step_are_those_of_one_gradient(rows: list[dict[str, object]]) -> None:
    (parts,) = [row["parts"] for row in rows if "parts" in row]
    assert list(parts) == ["primal", "tangent", "head and loss", "pullback", "optimiser"]  # type: ignore[call-overload]


def test_a_row_is_one_line_under_the_heading(rows: list[dict[str, object]]) -> None:
    assert all("\n" not in as_text(row) and len(as_text(row)) == len(as_text(None)) for row in rows)


def test_a_table_of_nothing_measured_says_how_to_measure() -> None:
    with pytest.raises(ConfigError, match="gnlib bench --json"):
        table([])


def test_time_is_measured_on_random_tokens() -> None:
    batch = random_batch(run_config("tiny", "adamw"), 4, CPU)
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert len(batch.inputs.unique()) > 20 and not torch.equal(batch.inputs, batch.targets)


def test_steps_are_measured_with_the_threads_that_training_uses() -> None:
    torch.set_num_threads(2)
    bench(["tiny"], ["fp32"], ["standard"], steps=1)
    assert torch.get_num_threads() == run_config("tiny", "adamw").compute.threads == 1


def test_every_timed_step_has_a_time_and_the_warm_up_has_none() -> None:
    calls: list[int] = []
    assert len(timed(lambda: calls.append(1), 3, CPU)) == 3
    assert len(calls) > 3


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_precision_of_products_is_as_it_was_once_they_are_done(precision: str) -> None:
    """The optimisers' own, SOAP's or K-FAC's, are in full precision."""
    torch.set_float32_matmul_precision("medium")
    try:
        with matmul_precision(ComputeConfig(precision=precision), CPU):
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_rate_of_a_matrix_product_leaves_the_precision_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    assert matmul_rate("tf32", CPU) > 0
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("sizes", "precisions", "methods", "steps", "message"),
    [
        (["huge"], ["fp32"], ["gn"], 1, "size: no size 'huge'; allowed: tiny, laptop"),
        (["tiny"], ["fp8"], ["gn"], 1, "precision: no precision 'fp8'; allowed: fp32, tf32, bf16"),
        (["tiny"], ["fp32"], ["newton"], 1, "method: no method 'newton'; allowed: standard, gn"),
        (["tiny"], ["fp32"], ["gn"], 0, "steps: 0; at least 1"),
    ],
)
def test_an_unknown_name_is_one_line(
    sizes: list[str], precisions: list[str], methods: list[str], steps: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(sizes, precisions, methods, steps)


def test_the_command_writes_its_rows_as_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    app.cli(prog="gnlib", args=["bench", "--size", "tiny", "--methods", "forward", "--steps", "1", "--json", str(file)])
    assert [row["method"] for row in json.loads(file.read_text())] == ["standard", "forward"]
