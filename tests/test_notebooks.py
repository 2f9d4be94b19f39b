"""Notebooks are thin, clean and executed; what is generated from records is up to date with them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from gnlib import readme, results
from gnlib.files import home
from gnlib.studies import study_configs
from gnlib.study import run_study

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@named
def test_every_code_cell_was_run_in_order_without_error(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


@named
def test_notebooks_are_thin(path: Path) -> None:
    """Declared studies, tables and figures: no loops and no functions of their own."""
    lines = [line for cell in code_cells(path) for line in cell["source"]]
    assert not [line for line in lines if line.startswith(("def ", "for ", "while ", "class "))]
    assert all(len(cell["source"]) <= 20 for cell in code_cells(path))


@named
def test_the_first_code_cell_holds_the_parameters(path: Path) -> None:
    assert "parameters" in code_cells(path)[0]["metadata"].get("tags", [])


@named
def test_no_trace_of_one_execution_is_left(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert "papermill" not in notebook["metadata"]
    assert not any({"papermill", "execution"} & cell["metadata"].keys() for cell in notebook["cells"])


def test_papermill_trains_what_is_missing_in_the_tiny_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty run folder to the figure, its table and the claims."""
    import papermill

    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GNLIB_DATA", raising=False)
    papermill.execute_notebook(
        home_of_notebook("01_iteration_complexity"),
        tmp_path / "executed.ipynb",
        {"profile": "tiny", "seeds": [1], "rerun": True},
        kernel_name="python3",
        progress_bar=False,
    )
    written = {path.name for path in (tmp_path / "figures" / "tiny").iterdir()}
    assert written == {f"01_iteration_complexity.{suffix}" for suffix in ("png", "pdf", "csv")}
    assert len(list((tmp_path / "data" / "runs").glob("*/record.jsonl"))) == 7  # six methods and their start


def test_papermill_tunes_and_compares_an_optimiser_in_the_tiny_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one batch with one trial; the references are trained too."""
    import papermill

    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GNLIB_DATA", raising=False)
    parameters = {"profile": "tiny", "seeds": [1], "methods": ["gauss_newton", "adamw"], "batches": [64], "trials": 1}
    papermill.execute_notebook(
        home_of_notebook("10_your_own_optimizer"),
        tmp_path / "executed.ipynb",
        parameters | {"optimizer": "torch.optim.Adagrad", "kwargs": {"lr": 0.1}, "rerun": True},
        kernel_name="python3",
        progress_bar=False,
    )
    written = {path.name for path in (tmp_path / "figures" / "tiny").iterdir()}
    assert written == {f"10_your_own_optimizer.{suffix}" for suffix in ("png", "pdf", "csv")}
    assert len(list((tmp_path / "data" / "runs").glob("*/record.jsonl"))) == 5  # start, two references, trial, seed 1


def home_of_notebook(stem: str) -> Path:
    return next(path for path in NOTEBOOKS if path.stem == stem)


DRAWN = {"laptop": None, "h200": ["gauss_newton", "prox_linear", "muon", "soap", "adamw"]}  # methods; None is all


@pytest.mark.parametrize("profile", DRAWN)
def test_the_figures_table_is_that_of_the_shipped_records(profile: str) -> None:
    configs = study_configs("iteration_complexity", profile, methods=DRAWN[profile])
    curves = results.curves(run_study(configs, profile, allow_run=False))
    assert curves.to_csv(index=False, float_format="%.6g", lineterminator="\n") == committed(profile)


def committed(profile: str) -> str:
    """The table as committed: `make reproduce` leaves a newly trained one in its place."""
    path = f"figures/{profile}/01_iteration_complexity.csv"
    shown = subprocess.run(["git", "-C", str(home()), "show", f"HEAD:{path}"], capture_output=True, text=True)
    return (home() / path).read_text() if shown.returncode else shown.stdout


def test_the_readme_table_is_that_of_the_shipped_records() -> None:
    assert readme.updated() == (home() / "README.md").read_text(encoding="utf-8"), "run: gnlib readme"
