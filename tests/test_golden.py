"""Losses of ten outer steps of every method, as they were when golden_losses.json was written.

The other tests compare parts with oracles; this one notices a change of the numbers that none of them was meant to
make. After a wanted change run

    python tests/test_golden.py --update

and say in the commit why the losses moved.

Everything is in fp64, where another CPU's order of sums moves a loss by 1e-15 or so, and TOLERANCE leaves room for
what grows from it. Two exceptions:

- torch's Muon orthogonalises in bf16 whatever the parameters are. Other roundings there (random ones of one bit, or
  products in fp32 rounded to bf16) moved the losses by up to 2e-4 and never changed a choice of the line search; a
  learning rate 1 % larger moves them by more than 1.3e-3. The tolerance is between the two.
- SOAP's basis is arbitrary where a matrix's gradients span less than its rows, and Adam in another basis is another
  method: a change of 1e-15 became 3e-3. So SOAP preconditions here only the sides whose gradients span them, at every
  step; its QR in fp32 then costs 1e-7.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gnlib.methods import METHODS
from gnlib.profiles import run_config
from gnlib.train import train

GOLDEN = Path(__file__).with_name("golden_losses.json")
TOLERANCE = {"adamw": 1e-6, "soap": 1e-6}  # relative
MUON_TOLERANCE = 5e-4  # of all that have Muon inside

Losses = dict[str, list[float]]  # "train": of each step; "validation": of the start and after each step


def losses(method: str, lr_factor: float = 1.0) -> Losses:
    changes: dict[str, Any] = {"start.chinchilla_fraction": 0.0, "outer_steps": 10, "compute.precision": "fp64"}
    if method == "soap":
        changes["method.inner.options"] = {"max_precondition_dim": 16, "precondition_frequency": 1}
    config = run_config("tiny", method, changes=changes, use_tuned=False)
    config = config.replace({"method.inner.lr": lr_factor * config.method.inner.lr})
    rows = train(config, torch.device("cpu"), checkpoint_seconds=1e9).rows
    columns = {"train": [row["train_loss"] for row in rows[1:]], "validation": [row["val_loss"] for row in rows]}
    return {name: [value for value in column if value is not None] for name, column in columns.items()}


def distance(found: Losses, golden: Losses) -> float:
    """Largest relative difference of two runs' losses."""
    pairs = [pair for name in golden for pair in zip(found[name], golden[name], strict=True)]
    return max(abs(a - b) / b for a, b in pairs)


def tolerance(method: str) -> float:
    return TOLERANCE.get(method, MUON_TOLERANCE)


@pytest.fixture(scope="module", autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNLIB_DATA", str(tmp_path_factory.mktemp("golden")))
        yield


@pytest.fixture(scope="module")
def golden() -> dict[str, Losses]:
    return json.loads(GOLDEN.read_text())


def test_every_method_has_golden_losses_of_ten_steps(golden: dict[str, Losses]) -> None:
    assert list(golden) == list(METHODS)
    assert {(len(run["train"]), len(run["validation"])) for run in golden.values()} == {(10, 11)}


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_golden_ones(method: str, golden: dict[str, Losses]) -> None:
    assert distance(losses(method), golden[method]) < tolerance(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_one_percent_larger_is_noticed(method: str, golden: dict[str, Losses]) -> None:
    assert distance(losses(method, 1.01), golden[method]) > 1.5 * tolerance(method)


def update() -> None:
    """Write golden_losses.json anew, to twelve digits."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNLIB_DATA", folder)
        table = {method: losses(method) for method in METHODS}
    rounded = {m: {name: [float(f"{x:.12g}") for x in xs] for name, xs in run.items()} for m, run in table.items()}
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", required=True, help="write golden_losses.json anew")
    parser.parse_args()
    update()
