"""The command line: thin. Every command is one call into the package; bad input is one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gnlib import bench as benchmark
from gnlib import claims as claim_rows
from gnlib import compare as comparing
from gnlib import export as exports
from gnlib import readme as readme_table
from gnlib import repeat as repeats
from gnlib.arguments import Commands, assignment, writable
from gnlib.config import ConfigError, RunConfig
from gnlib.executors import StudyError, UnfinishedError, check_arguments, describe, progress_bars
from gnlib.files import replacing
from gnlib.heldout import heldout
from gnlib.methods import METHODS, MORE_METHODS
from gnlib.optimizers import registry
from gnlib.paper import SUBJECTS
from gnlib.prepare import prepare as prepare_data
from gnlib.profiles import PROFILES, run_config, tuning
from gnlib.studies import STUDIES, check_possible, study_runs, tuned_settings
from gnlib.study import expected, find, run_study
from gnlib.sweep import sweep as sweep_studies
from gnlib.train import check, pinned, run_folder
from gnlib.train import train as train_run
from gnlib.tune import command_for, told
from gnlib.tune import tune as tune_method
from gnlib.variants import VARIANTS, find_setting, key, setting_config

app = Commands()
Name = Annotated[str, tyro.conf.Positional]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # no --no-... beside it
_ON = tyro.conf.arg(help=f"Only the claims on one of these: {', '.join(SUBJECTS)}.")
Subject = Annotated[str | None, _ON]
CONTINUED = ("prepare", "train", "study", "sweep", "tune", "compare")  # by the same command, after Ctrl-C
UNFINISHED = 3  # exit code of a sweep that its --minutes ended, for scripts that call it again


@app.command
def profiles() -> None:
    """List the profiles, the studies, the methods and variants with their labels, the optimisers with their sources."""
    for profile in PROFILES.values():
        print(f"{profile.name:12} {profile.summary}")
    print("studies:    ", ", ".join(STUDIES))
    _list("methods", {name: method.label for name, method in METHODS.items()})
    _list("methods beyond the paper's, by name", {name: method.label for name, method in MORE_METHODS.items()})
    _list("variants", {name: variant.label for name, variant in VARIANTS.items()})
    _list("optimisers, also inside Gauss-Newton", {name: entry.source for name, entry in registry.items()})


def _list(heading: str, explained: dict[str, str]) -> None:
    """Names with what they are, a line each."""
    print(f"{heading}:")
    for name, what in explained.items():
        print(f"  {name:{max(map(len, explained))}} {what}")


@app.command
def prepare(profile: str = "laptop") -> None:
    """Tokenise the profile's text, so that runs find it ready.

    Args:
        profile: A name listed by `gnlib profiles`.
    """
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
    keep_weights: Flag = False,
    quiet: Flag = False,
) -> None:
    """Run one configuration to its end, or continue it.

    Args:
        profile: A name listed by `gnlib profiles`.
        method: A method or variant listed by `gnlib profiles`.
        seed: Data order.
        set: A field and its value, e.g. --set method.inner.lr=0.01; may be repeated.
        config: A JSON file with the whole configuration, instead of profile, method and seed.
        keep_weights: Also save the last weights, as weights.pt in the run's folder.
        quiet: No progress bar.
    """
    changes = dict(assignment(text) for text in set)
    if config and (profile, method, seed) != ("laptop", "gauss_newton", 0):
        raise ConfigError("config: it has profile, method and seed; change it by --set")
    if config:
        chosen = RunConfig.load(config).replace(changes)
    else:
        chosen = setting_config(profile, find_setting(method), seed, changes)
    check(chosen)
    chosen = pinned(chosen, not quiet)  # what is wrong with the text is said before there is a bar
    with progress_bars(chosen, quiet) as on_row:
        record = train_run(chosen, on_row=on_row, keep_weights=keep_weights)
    last = record.rows[-1]
    where = run_folder(record.config)
    loss = "not finite" if last["val_loss"] is None else f"{last['val_loss']:.4f}"
    print(f"{record.status} at step {last['outer_step']}, validation loss {loss}: {where}")


@app.command
def evaluate(run: Name, text: Name, documents: int | None = None, json: Path | None = None) -> None:
    """Measure a run's loss on another text, read with the run's tokenizer.

    Args:
        run: Name or folder of a run made with `gnlib train --keep-weights`.
        text: A .txt, .jsonl or .parquet file (also .gz, .zst), a folder of them, docstrings or c4.
        documents: Only so many, from the start; needed for c4.
        json: Where to write the figures as an object.
    """
    writable(json)
    found = heldout(run, text, documents)
    print(f"{found.loss:.4f} nats per token, {found.bits_per_byte:.4f} bits per byte: {text}")
    print(f"{found.documents:,} documents, {found.tokens:,} tokens")
    if json:
        with replacing(json) as temporary:
            temporary.write_text(_dumps({"run": run, "text": text, **found._asdict()}) + "\n")


@app.command
def study(
    name: Name,
    profile: str = "laptop",
    seeds: tuple[int, ...] = (),
    methods: tuple[str, ...] = (),
    jobs: int | None = None,
    fresh: Flag = False,
    dry_run: Flag = False,
    executor: str | None = None,
) -> None:
    """Run what is missing of a study.

    Args:
        name: A study listed by `gnlib profiles`.
        profile: A name listed by `gnlib profiles`.
        seeds: Data orders; the profile's own by default.
        methods: Only these methods or variants, of those listed by `gnlib profiles`; the study's own by default.
        jobs: Runs at a time; one per core or GPU by default.
        fresh: Do not count shipped records as done.
        dry_run: Only say what exists, what is missing and what it would cost.
        executor: processes, or inline for one after the other in this process.
    """
    check_arguments(jobs, executor)  # in a dry run too
    check_possible(name, profile)
    runs = study_runs(name, profile, seeds, methods)
    configs = [run.config for run in runs]
    if fresh and not dry_run:
        configs = [pinned(config) for config in configs]  # what there is of another text does not count
    records = find(configs, profile, fresh)
    missing = [config for config, record in zip(configs, records, strict=True) if record is None]
    print(f"{name}, profile {profile}: {len(configs)} runs, {expected(missing, profile, jobs)}", flush=True)
    rough = [entry for entry in tuned_settings(name, profile, methods) if not tuning(profile, entry).get("interior")]
    if missing and rough:
        print(f"not tuned, or not until interior: {', '.join(rough)}; `gnlib sweep {name} --profile {profile}` does")
    if dry_run:
        for (setting, config), record in zip(runs, records, strict=True):
            if record is None:
                steps = f"{config.outer_steps} steps of {config.outer_batch_tokens} tokens"
                print(f"  {describe(config, setting.label)}, {steps}")
    else:
        run_study(configs, profile, fresh, allow_run=True, jobs=jobs, executor=executor)


@app.command
def sweep(
    names: Annotated[tuple[str, ...], tyro.conf.Positional],
    profile: str = "laptop",
    seeds: tuple[int, ...] = (),
    methods: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    jobs: int | None = None,
    minutes: float | None = None,
    tune: bool = True,
    fresh: Flag = False,
) -> None:
    """Tune what studies need and run their data orders, all settings side by side, on every core or GPU.

    Args:
        names: Studies listed by `gnlib profiles`.
        profile: A name listed by `gnlib profiles`.
        seeds: Data orders; the profile's own by default.
        methods: Only these methods or variants, of those listed by `gnlib profiles`; the studies' own by default.
        batches: Only these outer batches, sequences; the studies' own by default.
        jobs: Runs at a time; one per core or GPU by default.
        minutes: Stop after so many, with exit code 3 if something is left; the same command continues.
        tune: Tune what is not interior yet, before its data orders run.
        fresh: Run what is only shipped, which may be of another text, but for the trials of settings that are interior.
    """
    sweep_studies(names, profile, jobs, minutes, methods, seeds, batches, tune, fresh)


@app.command
def tune(
    profile: str = "laptop",
    methods: tuple[str, ...] = tuple(METHODS),
    batch: int | None = None,
    budget: Flag = False,
    study: str | None = None,
    jobs: int | None = None,
    fresh: Flag = False,
    no_run: Flag = False,
    dry_run: Flag = False,
) -> None:
    """Tune methods until each optimum is interior to its grid, and write the profile's tuned.json.

    Args:
        profile: A name listed by `gnlib profiles`.
        methods: Names listed by `gnlib profiles`; the paper's six by default.
        batch: Sequences of the outer batch; the profile's own by default.
        budget: For the loss at the profile's token budget, not for steps to its target.
        study: All that a study listed by `gnlib profiles` needs, instead of methods, batch and budget.
        jobs: Runs at a time; one per core or GPU by default.
        fresh: Ignore shipped trials, which may be of another text.
        no_run: Only read the records there are.
        dry_run: Only print a command for each, to be run apart, and whether tuned.json has it.
    """
    named = [find_setting(name, batch, budget) for name in methods]
    settings = list(tuned_settings(study, profile).values()) if study else named
    for setting in settings:  # all names and the batch before the first hour
        setting_config(profile, setting)
    unread = []
    for setting in settings:
        if dry_run:
            interior = tuning(profile, key(profile, setting)).get("interior")
            state = {None: "missing", True: "interior", False: "not interior"}[interior]
            print(f"{command_for(profile, setting)}  # {state}")
            continue
        try:
            entry = tune_method(profile, setting, jobs, allow_run=not no_run, fresh=fresh)
        except StudyError as error:
            if not no_run:
                raise
            unread.append(str(error))  # of the others there may be records
        else:
            print(f"{key(profile, setting)}: {told(entry)}", flush=True)
    if unread:
        raise StudyError("\n".join(unread))


@app.command
def compare(
    optimizer: Name,
    profile: str = "laptop",
    kwargs: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    batches: tuple[int, ...] = (),
    trials: int = comparing.TRIALS,
    fresh: Flag = False,
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
    comparing.check_packages()
    arguments = dict(assignment(text, "--kwargs") for text in kwargs)
    found = comparing.compare(optimizer, profile, arguments, seeds, batches, trials, fresh, True, jobs)
    print(comparing.table(found).to_string())
    print(*comparing.notes(found), sep="\n")
    print(f"figure: {comparing.save(found)}")


@app.command
def claims(
    profile: str = "laptop",
    fresh: Flag = False,
    seeds: tuple[int, ...] = (),
    study: Subject = None,
    json: Flag = False,
) -> None:
    """Compare the paper's claims with the records, row by row.

    Args:
        profile: A name listed by `gnlib profiles`.
        fresh: Only records of data/runs, not the shipped ones.
        seeds: Data orders; the profile's own by default.
        json: A list of objects {claim, paper, ours, n, unit, holds, mean, half_width, is_lower_bound, at_least,
            at_most, marks}.
    """
    rows = claim_rows.claims(profile, fresh, seeds or None, study)
    print(_dumps(claim_rows.as_json(rows)) if json else claim_rows.as_text(rows))


@app.command
def export(profile: str = "laptop") -> None:
    """Copy the ended records of the profile's studies and tuning from data/runs to data/records, with a manifest;
    records there of other settings, such as those of an older tuning, are removed.

    Args:
        profile: A name listed by `gnlib profiles`.
    """
    kept, removed = exports.export(profile)
    print(f"{kept} records in {exports.records_folder(profile)}")
    if removed:
        print(f"removed, as no study or tuning has their settings any more: {', '.join(removed)}")


@app.command
def verify(again: int = 0, profile: str | None = None, seed: int = 0, jobs: int | None = None) -> None:
    """Check that the shipped records are those of their manifests, and train some of them again.

    Args:
        again: Train so many, drawn at random, from the text on in an empty folder; their losses are to differ by less
            than 0.01 nats.
        profile: Only this one's, a name listed by `gnlib profiles`; all by default, and for --again the laptop's.
        seed: Of the draw of --again.
        jobs: Of the runs of --again at a time; one per core or GPU by default.
    """
    check_arguments(jobs, None)
    drawn_from = profile or "laptop"
    shipped = repeats.drawn(drawn_from, again, seed) if again else []
    print(f"{exports.verify(profile)} shipped records are intact", flush=True)
    if again:
        cost = expected([record.config for record in shipped], drawn_from, jobs)
        print(f"{again} of profile {drawn_from} again: {cost}", flush=True)
        print(*repeats.repeat(drawn_from, shipped, jobs), sep="\n")
        print(f"{again} of {again} within {repeats.TOLERANCE} nats")


@app.command
def readme() -> None:
    """Bring the claims table in README.md and docs/api.md up to date with records and docstrings."""
    readme_table.update()


@app.command
def bench(
    size: tuple[str, ...] = ("laptop",),
    precision: tuple[str, ...] = (),
    methods: tuple[str, ...] = tuple(benchmark.METHODS),
    steps: int = 20,
    compile: bool | None = None,
    kernels: int = 0,
    json: Path | None = None,
) -> None:
    """Measure every method's inner step beside a standard AdamW step, in one process, on random tokens.

    Args:
        size: laptop, h200, 45m or 150m (tiny for tests); several may be given.
        precision: fp32, tf32, bf16; bf16 on a GPU and fp32 on a CPU by default.
        methods: standard, gn, prox_linear, layerwise, forward (the loss alone); standard always runs.
        steps: Timed steps after 5 of warm-up; the median counts.
        compile: torch.compile; on a GPU by default.
        kernels: Also show so many of the kernels that take most of each method's step (on a CPU operators), ms a step.
        json: Where to write the rows as a list of objects.
    """
    chosen = precision or (("bf16",) if torch.cuda.is_available() else ("fp32",))
    writable(json)
    heading = iter([benchmark.as_text(None)])  # goes before the first row: an error has a line of its own

    def show(row: dict[str, object]) -> None:
        print(*heading, benchmark.as_text(row), sep="\n", flush=True)

    rows = benchmark.bench(size, chosen, methods, steps, compile, show, kernels)
    if json:
        with replacing(json) as temporary:
            temporary.write_text(_dumps(rows) + "\n")


def _dumps(tree: object) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False)


def main() -> None:
    """Entry point of the `gnlib` command."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a user's own optimisers, as `python -m gnlib` finds them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or a study would leave its runs behind
    try:
        app.cli(prog="gnlib", description="Full Gauss-Newton as the oracle for language-model optimisers.")
    except BrokenPipeError:  # `gnlib ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UnfinishedError as error:
        print(f"gnlib: time is up; {error}; the same command continues", file=sys.stderr)
        sys.exit(UNFINISHED)
    except (ConfigError, StudyError, OSError) as error:
        print(f"gnlib: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        command = next(iter(sys.argv[1:]), "")
        goes_on = "continues" if command in CONTINUED else "starts anew"
        print(f"gnlib: interrupted; the same command {goes_on}", file=sys.stderr)
        sys.exit(130)
