"""The command line: thin. Every command is one call into the package; bad input is one line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from gnlib import claims as claim_rows
from gnlib import compare as comparing
from gnlib import export as exports
from gnlib import readme as readme_table
from gnlib.config import ConfigError, RunConfig
from gnlib.prepare import prepare as prepare_data
from gnlib.profiles import METHODS, PROFILES, find_method, find_profile, run_config
from gnlib.studies import study_configs
from gnlib.study import StudyError, describe, find, run_study, show_row
from gnlib.train import run_folder
from gnlib.train import train as train_run
from gnlib.tune import tune as tune_method

app = tyro.extras.SubcommandApp()
Name = Annotated[str, tyro.conf.Positional]


@app.command
def profiles() -> None:
    """List the profiles and the methods."""
    for profile in PROFILES.values():
        print(f"{profile.name:12} {profile.summary}")
    print("methods:    ", ", ".join(METHODS))


@app.command
def prepare(profile: str = "laptop") -> None:
    """Tokenise the profile's text, so that runs find it ready."""
    files = prepare_data(run_config(profile, "adamw").data)
    print(f"{files.sequences('train')} training and {files.sequences('validation')} validation sequences")
    print(f"of {files.sequence_length} tokens in {files.folder} (fingerprint {files.fingerprint})")


@app.command
def train(
    profile: str = "laptop",
    method: str = "gauss_newton",
    seed: int = 0,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    config: Path | None = None,
    keep_weights: bool = False,
    quiet: bool = False,
) -> None:
    """Run one configuration to its end, or continue it.

    Args:
        profile: A name listed by `gnlib profiles`.
        method: A name listed by `gnlib profiles`.
        seed: Data order.
        set: A field and its value, e.g. --set method.inner.lr=0.01; may be repeated.
        config: A JSON file with the whole configuration, instead of profile, method and seed.
        keep_weights: Also save the last weights, as weights.pt in the run's folder.
        quiet: No progress bar.
    """
    changes = dict(_assignment(text) for text in set)
    chosen = RunConfig.load(config).replace(changes) if config else run_config(profile, method, seed, changes)
    with tqdm(total=chosen.outer_steps, desc=describe(chosen), unit="step", disable=quiet) as bar:
        record = train_run(chosen, on_row=lambda _, row: show_row(bar, row), keep_weights=keep_weights)
    last = record.rows[-1]
    where = run_folder(record.config)
    print(f"{record.status} at step {last['outer_step']}, validation loss {last['val_loss']}: {where}")


@app.command
def study(
    name: Name,
    profile: str = "laptop",
    seeds: tuple[int, ...] = (),
    methods: tuple[str, ...] = tuple(METHODS),
    jobs: int | None = None,
    fresh: bool = False,
    dry_run: bool = False,
) -> None:
    """Run what is missing of a study.

    Args:
        name: iteration_complexity.
        profile: A name listed by `gnlib profiles`.
        seeds: Data orders; the profile's own by default.
        methods: Only these, of those listed by `gnlib profiles`.
        jobs: Runs at a time; one per core or GPU by default.
        fresh: Do not count shipped records as done.
        dry_run: Only say what exists and what is missing.
    """
    configs = study_configs(name, profile, seeds, methods)
    missing = [c for c, record in zip(configs, find(configs, profile, fresh), strict=True) if record is None]
    print(f"{name}, profile {profile}: {len(configs)} runs, {len(missing)} to run", flush=True)
    if dry_run:
        for config in missing:
            print(f"  {describe(config)}, {config.outer_steps} steps of {config.outer_batch_tokens} tokens")
    else:
        run_study(configs, profile, fresh, allow_run=True, jobs=jobs)


@app.command
def tune(
    profile: str = "laptop", methods: tuple[str, ...] = tuple(METHODS), jobs: int | None = None, no_run: bool = False
) -> None:
    """Tune methods until each optimum is interior to its grid, and write the profile's tuned.json.

    Args:
        profile: A name listed by `gnlib profiles`.
        methods: Names listed by `gnlib profiles`; all by default.
        jobs: Runs at a time; one per core or GPU by default.
        no_run: Only read the records there are.
    """
    find_profile(profile)
    for method in methods:  # all names before the first hour
        find_method(method)
    for method in methods:
        entry = tune_method(profile, method, jobs, allow_run=not no_run)
        where = "interior" if entry["interior"] else "NOT interior"
        print(f"{method}: {entry['settings']}, {where} among {len(entry['trials'])} trials")


@app.command
def compare(
    optimizer: Name,
    profile: str = "laptop",
    kwargs: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    batches: tuple[int, ...] = (),
    trials: int = comparing.TRIALS,
    fresh: bool = False,
    jobs: int | None = None,
) -> None:
    """Tune an optimiser of your own and compare it with Gauss-Newton and the best baseline, with a figure.

    Args:
        optimizer: The import path of a torch.optim.Optimizer class; modules in this directory are found.
        profile: A name listed by `gnlib profiles`.
        kwargs: Its arguments, e.g. momentum=0.9; lr is where the search starts.
        seeds: Data orders; the profile's first by default.
        batches: Sequences per step; the profile's outer batch and a sixteenth of it by default.
        trials: Tuning runs at each batch, in pairs.
        fresh: Do not count shipped records as done.
        jobs: Runs at a time; one per core or GPU by default.
    """
    arguments = dict(_assignment(text, "--kwargs") for text in kwargs)
    found = comparing.compare(optimizer, profile, arguments, seeds, batches, trials, fresh, True, jobs)
    print(comparing.table(found).to_string())
    print(*comparing.notes(found), sep="\n")
    print(f"figure: {comparing.save(found) / profile}.png")


@app.command
def claims(profile: str = "laptop", fresh: bool = False, seeds: tuple[int, ...] = (), json: bool = False) -> None:
    """Compare the paper's claims with the records, row by row.

    Args:
        profile: A name listed by `gnlib profiles`.
        fresh: Only records of data/runs, not the shipped ones.
        seeds: Data orders; the profile's own by default.
        json: A list of objects {claim, paper, ours, n, unit, holds}.
    """
    rows = claim_rows.claims(profile, fresh, seeds or None)
    print(_dumps(claim_rows.as_json(rows)) if json else claim_rows.as_text(rows))


@app.command
def export(profile: str = "laptop") -> None:
    """Copy the ended records of the profile's studies and tuning from data/runs to data/records, with a manifest."""
    print(f"{exports.export(profile)} records in {exports.records_folder(profile)}")


@app.command
def verify() -> None:
    """Check that the shipped records are those of their manifests."""
    print(f"{exports.verify()} shipped records are intact")


@app.command
def readme() -> None:
    """Bring the claims table in README.md and docs/api.md up to date with records and docstrings."""
    readme_table.update()


def _assignment(text: str, option: str = "--set") -> tuple[str, object]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{option} {text}: expected field=value")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value  # a bare word


def _dumps(tree: object) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False)


def main() -> None:
    """Entry point of the `gnlib` command."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a user's own optimisers, as `python -m gnlib` finds them
    try:
        app.cli(prog="gnlib", description="Full Gauss-Newton as the oracle for language-model optimisers.")
    except (ConfigError, StudyError, OSError) as error:
        print(f"gnlib: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gnlib: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
