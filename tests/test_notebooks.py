"""Notebooks are thin, clean and executed; what is generated from records is up to date with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gnlib import bench, compare, readme, results, tables
from gnlib.blocks import partition
from gnlib.executors import StudyError
from gnlib.files import home
from gnlib.flops import gradient_units
from gnlib.model import shapes_only
from gnlib.profiles import find_profile, run_config
from gnlib.record import Record
from gnlib.studies import existing_records, study_records, study_runs
from gnlib.variants import base_label

Table = Callable[[list[Record], float], Any]  # records, target -> the table behind the figure


def curves(records: list[Record], target: float) -> Any:
    return results.curves(records)


def ends(records: list[Record], target: float) -> Any:
    return results.ends(records)


FIGURES: dict[str, tuple[str, Table]] = {  # notebook -> study, table
    "01_iteration_complexity": ("iteration_complexity", curves),
    "02_critical_batch_size": ("critical_batch_size", results.steps_to_target),
    "03_fixed_budget": ("fixed_budget", ends),
    "04_prox_linear": ("prox_linear", curves),
    "05_layerwise": ("layerwise", curves),
    "06_schedules": ("schedules", results.steps_to_target),
    "07_line_search": ("line_search", curves),
    "08_inner_solver": ("inner_solver", curves),
    "09_stateless_optimizers": ("stateless", curves),
    "13_variants": ("variants", tables.ratios),
    "14_baseline_settings": ("baseline_settings", partial(tables.ratios, over=base_label)),
}
DRAWN = {  # profile -> notebooks whose figure is committed
    "laptop": list(FIGURES),
    "h200": list(FIGURES),
    "english-45m": ["01_iteration_complexity"],
}
ORDERS = {"english-45m": [0]}  # data orders drawn, where they are not the profile's own

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


RUNNING = [path for path in NOTEBOOKS if not path.stem.startswith(("00", "12"))]  # these have no runs
CHOSEN: dict[str, dict[str, Any]] = {
    "10_your_own_optimizer": {"methods": ["gauss_newton", "adamw"], "batches": [64], "trials": 1},
    "11_learning_rates": {"methods": ["adamw"]},
}  # less of these


@pytest.mark.parametrize("path", RUNNING, ids=lambda path: path.stem)
def test_papermill_trains_what_is_missing_in_the_tiny_profile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty run folder to the figure, its table and the claims."""
    import papermill

    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_EXECUTOR", "inline")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GNLIB_DATA", raising=False)
    parameters = {"profile": "tiny", "seeds": [1], "rerun": True} | CHOSEN.get(path.stem, {})
    executed = tmp_path / "executed.ipynb"
    papermill.execute_notebook(path, executed, parameters, kernel_name="python3", progress_bar=False)
    written = {file.name for file in (tmp_path / "figures" / "tiny").iterdir()}
    assert {f"{path.stem}.{suffix}" for suffix in ("png", "pdf", "csv")} <= written
    assert len(list((tmp_path / "data" / "runs").glob("*/record.jsonl"))) > 3  # the start and some runs


def cell(path: Path, name: str) -> str:
    return next("".join(cell["source"]) for cell in code_cells(path) if cell["id"] == name)


@pytest.mark.parametrize("stem", FIGURES)
def test_without_one_of_its_records_a_notebook_leaves_the_setting_out_or_fails_in_ci_if_asked_for_it(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of h200, whose text is not shipped; either way it names the command to run."""
    path, study = next(path for path in NOTEBOOKS if path.stem == stem), FIGURES[stem][0]
    shutil.copytree(home() / "data" / "records", tmp_path / "data" / "records")
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.delenv("GNLIB_DATA", raising=False)
    monkeypatch.setenv("CI", "true")
    names: dict[str, Any] = {}
    exec(cell(path, "parameters") + "\n" + cell(path, "imports"), names)
    names["profile"] = profile = "h200"
    exec(cell(path, "study"), names)
    before = names["records"]
    larger = find_profile(profile).larger  # where some may be missing whatever is asked for
    lost = [record for record in before if record.config.outer_batch not in larger][-1].config.recipe_id
    setting = next(run.setting for run in study_runs(study, profile) if run.config.recipe_id == lost)
    (tmp_path / "data" / "records" / profile / f"{lost}.jsonl").unlink()
    exec(cell(path, "study"), names)
    assert len(names["records"]) == len(before) - len(find_profile(profile).seeds)
    said = [line for line in capsys.readouterr().out.splitlines() if f"at {setting.batch} sequences" in line][-1]
    assert setting.label in said and said.endswith(f"; run: gnlib sweep {study} --profile {profile}")
    names["methods"] = [setting.name]
    with pytest.raises(StudyError, match=f"records are missing.*; run: gnlib study {study} --profile {profile}"):
        exec(cell(path, "study"), names)


@pytest.mark.parametrize(("profile", "stem"), [(p, stem) for p, stems in DRAWN.items() for stem in stems])
def test_the_figures_table_is_that_of_the_shipped_records(profile: str, stem: str) -> None:
    study, table = FIGURES[stem]
    records = study_records(study, profile, ORDERS.get(profile), allow_run=False)
    found = table(records, find_profile(profile).target)
    assert found.to_csv(index=False, float_format="%.6g", lineterminator="\n") == committed(profile, stem)


def test_the_table_of_the_example_optimiser_is_that_of_the_shipped_records() -> None:
    seeds = find_profile("laptop").seeds
    found = compare.figure_table(compare.compare(compare.EXAMPLE, "laptop", seeds=seeds, allow_run=False))
    csv = found.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    assert csv == committed("laptop", "10_your_own_optimizer")


def test_the_table_of_what_a_step_costs_is_that_of_the_shipped_measurement() -> None:
    found = bench.table(bench.shipped("h200")).reset_index()
    assert found.to_csv(index=False, float_format="%.6g", lineterminator="\n") == committed("h200", "12_step_cost")


def committed(profile: str, stem: str) -> str:
    """The table as committed: `make reproduce` leaves a newly trained one in its place."""
    path = f"figures/{profile}/{stem}.csv"
    shown = subprocess.run(["git", "-C", str(home()), "show", f"HEAD:{path}"], capture_output=True, text=True)
    return (home() / path).read_text() if shown.returncode else shown.stdout


def test_the_readme_table_is_that_of_the_shipped_records() -> None:
    assert readme.updated() == page("README.md"), "run: gnlib readme"


@pytest.mark.parametrize("profile", ["h200", "laptop"])
def test_what_is_said_of_soap_without_its_first_step_is_that_of_the_shipped_records(profile: str) -> None:
    """That step only starts the preconditioner: the loss after it is the start's."""
    records = study_records("iteration_complexity", profile, methods=["gauss_newton", "soap"], allow_run=False)
    groups, target = results.by_method(records), find_profile(profile).target
    assert all(record.rows[0]["val_loss"] == record.rows[1]["val_loss"] for record in groups["SOAP"])
    found = _without_first_step(groups["SOAP"], groups["GN"], target)
    assert f"{found} ({profile})" in " ".join(page("docs/results.md").split()) and found.n == 3


def _without_first_step(soap: list[Record], newton: list[Record], target: float) -> results.Estimate:
    """SOAP's steps over Gauss-Newton's, by data order."""
    steps = [[results.crossing(record, target).steps for record in runs] for runs in (soap, newton)]
    return results.estimate([(own - 1) / its for own, its in zip(*steps, strict=True)])


def page(name: str) -> str:
    return (home() / name).read_text(encoding="utf-8")


def rows_of(name: str, header: str) -> dict[str, list[str]]:
    """First cell -> the others, of the page's table that begins so, without daggers and what is in brackets."""
    _, found, after = page(name).partition(header)
    assert found
    rows = [line.strip().strip("|").split("|") for line in after.split("\n\n")[0].splitlines()[2:]]
    return {first.strip(): [re.split(r"†|\(", cell)[0].strip() for cell in rest] for first, *rest in rows}


def test_what_is_said_of_larger_batches_is_that_of_the_shipped_records() -> None:
    batches, target = results.batches(existing_records("critical_batch_size", "h200")), find_profile("h200").target
    found: dict[str, list[str]] = {}
    for batch in (4096, 16384, 65536):
        groups = results.by_method(batches[batch])
        for name in ("SOAP", "Muon", "AdamW", "Layerwise GN", "GN-prox-linear"):
            runs = groups.get(name)
            steps = str(results.ratio(runs, groups["GN"], target, lambda c: c.steps)) if runs else "not run"
            found.setdefault(name, []).append(steps)
    assert rows_of("README.md", "| steps / GN's | 2.1 M | 8.4 M | 33.6 M |") == found


def test_what_is_said_of_the_fixed_budget_is_that_of_the_shipped_records() -> None:
    records = existing_records("fixed_budget", "h200")
    leads = tables.leads(records)["GN's lead"]
    said = rows_of("docs/results.md", "| batch (tokens) | GN | Muon | SOAP | AdamW | GN's lead |")
    for (batch, runs), row in zip(results.batches(records).items(), said.values(), strict=True):
        groups = results.by_method(runs)
        for name, cell in zip(("GN", "Muon", "SOAP", "AdamW"), row, strict=False):
            if name in groups:
                assert cell == f"{tables.mean_loss(groups[name]).mean:.2f}", (batch, name)
        assert row[-1].split(" over")[0] in str(leads[runs[0].config.outer_batch_tokens])


def test_what_is_said_of_layerwise_in_products_is_what_the_code_counts() -> None:
    models = [shapes_only(run_config(profile, "layerwise")) for profile in ("paper-45m", "paper-150m")]
    shares = [gradient_units(model, partition(model, "layerwise")) / 3 for model in models]
    assert "layerwise is {:.1f} and {:.1f} standard steps".format(*shares) in " ".join(page("docs/results.md").split())


def test_the_losses_on_another_text_are_those_of_shipped_runs() -> None:
    folder = home() / "data" / "records" / "english-45m"
    runs = json.loads((folder / "heldout.json").read_text())["runs"]
    assert runs and all((folder / f"{run['run']}.jsonl").exists() for run in runs)
