"""An optimiser of your own against the oracle: tuned with a few trials, run beside the shipped records, its ratios.

It takes AdamW's place in a profile: the same start, data, clipping and schedule, the same run length to begin with.
Apart from the learning rate, what its class has as defaults stays. Steps to the profile's target are counted as in the
claims, at the profile's outer batch and at a sixteenth of it. Its runs lie in data/runs; no shipped file changes.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnlib.config import ConfigError, RunConfig
from gnlib.executors import StudyError, check_arguments
from gnlib.files import data_folder, replacing
from gnlib.import_path import imported, source_hash
from gnlib.methods import METHODS, Changes
from gnlib.optimizers import try_out
from gnlib.profiles import find_profile, records_folder, run_config
from gnlib.record import Record
from gnlib.results import by_method, crossing, curves, mean_steps, ratio
from gnlib.studies import study_configs
from gnlib.study import find, load, run_study
from gnlib.tune import SEED, STEPS, WARMUPS, Axis, Trials, entry_of, geometric, ladder, open_fields, search

if TYPE_CHECKING:
    import pandas as pd

EXAMPLE = "torch.optim.RMSprop"  # of notebook 10; its runs are shipped
TRIALS = 4  # a batch size; with one seed, both batches take under 10 minutes on 2 cores in the laptop profile
WIDTH = 2  # trials at a time; fixed, so that the search does not depend on the machine
SMALL = 16  # the profile's outer batch over the small one
RATE, LENGTH, WARMUP = "method.inner.lr", "outer_steps", "method.inner.warmup"


@dataclass(frozen=True)
class Comparison:
    """One optimiser at one batch size."""

    path: str
    profile: str
    batch: int
    """Sequences."""
    axes: list[Axis]
    trials: Trials
    records: list[Record]
    references: list[Record]
    """Of the paper's methods, at this batch and on these seeds, as far as they exist."""
    study: str
    """Where the references are from."""

    @property
    def tokens(self) -> int:
        return self.batch * self.records[0].config.data.sequence_length


def check_packages() -> None:
    """ConfigError, before the training, without what the table and the figure are made with."""
    if missing := [name for name in ("pandas", "matplotlib", "seaborn") if find_spec(name) is None]:
        raise ConfigError(f"compare: table and figure need {', '.join(missing)}: pip install 'gnlib[figures]'")


def compare(
    path: str,
    profile: str = "laptop",
    kwargs: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    trials: int = TRIALS,
    fresh: bool = False,
    allow_run: bool | None = None,
    jobs: int | None = None,
) -> list[Comparison]:
    """Tune the torch.optim.Optimizer class at an import path and run it on the seeds; a recorded run is not repeated.

    At each batch size (sequences; by default the profile's and a sixteenth of it), `trials` runs at the tuning seed, in
    pairs, walk the grid of learning rate, run length and warm-up. `kwargs` are arguments of the class; with `lr` the
    search starts there, not at AdamW's. Seeds: the profile's first by default. `fresh`, `allow_run` and `jobs` as in
    `study.run_study`. ConfigError, before anything runs, for a path, a class or an argument that cannot be.
    """
    check_arguments(jobs, None)
    start = start_of(path, profile, kwargs or {})
    sizes = sorted(set(batches or _sizes(profile)), reverse=True)
    seeds = list(dict.fromkeys(seeds or find_profile(profile).seeds[:1]))
    if trials < 1:
        raise ConfigError(f"trials: {trials}; at least 1")
    if sizes[-1] < 1:
        raise ConfigError(f"batches: {sizes[-1]}; at least 1 sequence")
    if SEED in seeds:
        raise ConfigError(f"seeds: {SEED} is the data order of tuning; allowed: any other")
    for size in sizes:
        try_out(_config(profile, scaled(start, size), SEED).method.inner)
    command = f"gnlib compare {path} --profile {profile} --seeds {' '.join(map(str, seeds))} --trials {trials}"
    command += f" --kwargs {' '.join(f'{name}={value}' for name, value in kwargs.items())}" if kwargs else ""
    run = partial(run_study, profile=profile, fresh=fresh, allow_run=allow_run, jobs=jobs, command=command)
    searches: list[tuple[list[Axis], Trials]] = []
    finals: list[RunConfig] = []
    for size in sizes:  # each starts from what was best at the larger one
        start = scaled(start, size)
        searches.append(_walk(profile, start, trials, run))
        start |= entry_of(*searches[-1])["settings"]
        finals += [_config(profile, start, seed) for seed in seeds]
    records = run(finals)
    parts = [records[i : i + len(seeds)] for i in range(0, len(records), len(seeds))]
    return [
        Comparison(path, profile, size, *walked, part, *_references(profile, size, seeds, fresh))
        for size, walked, part in zip(sizes, searches, parts, strict=True)
    ]


def start_of(path: str, profile: str, kwargs: Mapping[str, Any]) -> Changes:
    """AdamW's settings in the profile, but with the class at `path`, its defaults and `kwargs`, as changes of a run."""
    kind = imported(path)
    parameters = inspect.signature(kind.__init__).parameters
    known = {name: p.default for name, p in list(parameters.items())[2:]}  # after self and what it optimises
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise ConfigError(f"kwargs: {kind.__name__} takes no {unknown[0]!r}; allowed: {', '.join(known)}")
    if "lr" not in known:
        raise ConfigError(f"{path}: it takes no lr, which is what is tuned")
    decay, betas = known.get("weight_decay"), known.get("betas")
    own: dict[str, Any] = {"weight_decay": decay} if isinstance(decay, (int, float)) else {}
    own |= {"betas": betas} if isinstance(betas, tuple) and len(betas) == 2 else {}  # see optimizers.construct
    if "betas" in kwargs and isinstance(betas, tuple) and len(betas) != 2:
        raise ConfigError(f"kwargs: betas of {kind.__name__} are {len(betas)}, not 2; they stay its defaults, {betas}")
    own |= kwargs
    fields = {name: own.pop(name) for name in ("lr", "weight_decay", "betas") if name in own}
    adamw = run_config(profile, "adamw", use_tuned=False)
    start = {
        "method.inner.optimizer": path,
        "method.inner.source": source_hash(path),
        "method.inner.options": own,
        "outer_batch": adamw.outer_batch,
        "evaluation.every": adamw.evaluation.every,
        RATE: adamw.method.inner.lr,
        LENGTH: adamw.outer_steps,
        WARMUP: adamw.method.inner.warmup,
    }
    return start | {f"method.inner.{name}": value for name, value in fields.items()}


def scaled(start: Changes, batch: int) -> Changes:
    """The same at another batch: the lengths by the root of the batches' ratio; the rate stays, as the optima of the
    shipped methods hardly moved (`variants.scaled`)."""
    root = math.sqrt(start["outer_batch"] / batch)
    lengths = {name: round(start[name] * root) for name in (LENGTH, WARMUP)}
    every = max(1, round(start["evaluation.every"] * root))
    return start | lengths | {"outer_batch": batch, "evaluation.every": every}


def _sizes(profile: str) -> tuple[int, int]:
    whole = run_config(profile, "adamw").outer_batch
    return whole, max(1, whole // SMALL)


def _walk(
    profile: str, start: Changes, trials: int, run: Callable[[list[RunConfig]], list[Record]]
) -> tuple[list[Axis], Trials]:
    """Over learning rate, run length and warm-up; the profile's cap on the length grows as the length itself."""
    most = find_profile(profile).most_steps[1] * math.sqrt(_sizes(profile)[0] / start["outer_batch"])
    axes = [
        geometric(RATE, start[RATE]),
        ladder(LENGTH, start[LENGTH], STEPS, round(most)),
        ladder(WARMUP, start[WARMUP], WARMUPS, round(most)),
    ]

    def config(settings: Changes) -> RunConfig:
        return _config(profile, start | settings, SEED)

    target = find_profile(profile).target
    return axes, search(axes, target, config, run, rounds=math.ceil(trials / WIDTH), width=WIDTH, most=trials)


def _config(profile: str, changes: Changes, seed: int) -> RunConfig:
    return run_config(profile, "adamw", seed, changes, use_tuned=False)


def _references(profile: str, batch: int, seeds: Sequence[int], fresh: bool) -> tuple[list[Record], str]:
    """Records of the paper's methods at this batch, with `fresh` rather those of data/runs, and their study."""
    study = "iteration_complexity" if batch == _sizes(profile)[0] else "critical_batch_size"
    wanted = [config for config in study_configs(study, profile, seeds) if config.outer_batch == batch]
    pairs = zip(find(wanted, profile, fresh), find(wanted, profile), strict=True)
    return [record for pair in pairs if (record := pair[0] or pair[1])], study


def best_baseline(references: Sequence[Record], target: float) -> str:
    """Label of the baseline that reaches the target in the fewest steps on average; empty without one."""
    groups = by_method(references)
    labels = [method.label for method in METHODS.values() if not method.is_gauss_newton]
    steps = {label: mean_steps(groups[label], target) for label in labels if label in groups}
    return min((label for label in steps if not steps[label].censored), key=lambda label: steps[label].mean, default="")


def table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Steps to target and their ratio to GN, to layerwise GN and to the best baseline, by batch.

    Mean and 95 % interval over n seeds, ratios paired by seed; `≥` marks lower bounds, from runs that ended above the
    target; `-`: the reference itself ended above it.
    """
    import pandas as pd

    rows = [row for comparison in comparisons for row in _rows(comparison)]
    return pd.DataFrame(rows).set_index(["batch (tokens)", "reference"])


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    target, groups = find_profile(comparison.profile).target, by_method(comparison.references)
    best = best_baseline(comparison.references, target)
    shown_as = {"GN": "GN", "Layerwise GN": "Layerwise GN", best: f"{best}, best baseline".removeprefix(", ")}
    rows = []
    diverged = any(record.status == "diverged" and crossing(record, target).censored for record in comparison.records)
    for name, shown in shown_as.items():
        runs = groups.get(name, [])
        over = ratio(comparison.records, runs, target, lambda c: c.steps)
        rows.append(
            {
                "batch (tokens)": comparison.tokens,
                "reference": shown,
                "steps": "diverged" if diverged else str(mean_steps(comparison.records, target)),
                "its steps": str(mean_steps(runs, target)) if runs else "not run",
                "ratio": "-" if diverged else str(over),
                "n": over.n,
            }
        )
    return rows


def notes(comparisons: Sequence[Comparison]) -> list[str]:
    """How each batch was tuned, and what the table lacks."""
    lines = []
    for comparison in comparisons:
        best = entry_of(comparison.axes, comparison.trials)["settings"]
        beside = open_fields(comparison.axes, comparison.trials)
        short = {RATE: "lr", LENGTH: "steps", WARMUP: "warm-up"}
        chosen = ", ".join(f"{short[name]} {value:g}" for name, value in best.items())
        where = f"not bracketed: {', '.join(short[name] for name in beside)}" if beside else "interior"
        options = "".join(f", {name}={value}" for name, value in _options(comparison).items())
        best_of = f"best of {len(comparison.trials)} trials, {where}"
        lines.append(f"batch of {comparison.tokens} tokens: {chosen}{options}; {best_of}")
        texts = {r.config.data.fingerprint for r in [*comparison.records, *comparison.references]}
        if len(texts) > 1:
            lines.append("  the references were run on another text (of another Python version); see --fresh")
        if any(record.status == "diverged" for record in comparison.records):
            lines.append("  runs of it diverged")
        if missing := _missing(comparison):
            lines.append(f"  {missing}")
    return lines


def _options(comparison: Comparison) -> dict[str, Any]:
    return comparison.records[0].config.method.inner.options


def _missing(comparison: Comparison) -> str:
    """Which references are not there, why, and what runs them; empty if all data orders have Gauss-Newton's."""
    batches, batch = find_profile(comparison.profile).batches, comparison.batch
    if batch not in (*batches, _sizes(comparison.profile)[0]):
        allowed = ", ".join(map(str, batches))
        return f"no study has references at this batch of {batch} sequences; allowed: {allowed} sequences"
    there = {record.config.seed for record in by_method(comparison.references).get("GN", [])}
    seeds = " ".join(str(seed) for record in comparison.records if (seed := record.config.seed) not in there)
    command = f"gnlib study {comparison.study} --profile {comparison.profile} --seeds {seeds}"
    return f"the references of data order {seeds} are not run at this batch; run: {command}" if seeds else ""


def figure_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Loss curves of the optimiser and of all its references (`results.curves`)."""
    return curves([record for c in comparisons for record in [*c.records, *c.references]])


def save(comparisons: Sequence[Comparison]) -> Path:
    """Write data/compare/<import path>/<profile>.png, .pdf, .csv and .json (trials and ratios); returns the figure.

    The class's options are in the names: `laptop,momentum=0.5.png`.
    """
    from gnlib import plots

    first = comparisons[0]
    shown = figure_table(comparisons)
    target = find_profile(first.profile).target
    options = ", ".join(f"{name}={value}" for name, value in _options(first).items())
    called = f"{first.path}({options})" if options else first.path
    figure = plots.curves_by_batch(shown, target, f"{called}, {first.profile} profile")
    folder = data_folder() / "compare" / first.path
    name = ",".join([first.profile, *(f"{option}={value}" for option, value in _options(first).items())])
    plots.save(figure, shown, first.profile, name, folder)
    report = {
        "kwargs": _options(first),
        "ratios": table(comparisons).reset_index().to_dict("records"),
        "tuning": {c.tokens: entry_of(c.axes, c.trials) for c in comparisons},
    }
    with replacing(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder / f"{name}.png"


def example_runs(profile: str) -> set[str]:
    """Names (`recipe_id`) of all runs of the shipped example on the profile's seeds; before they are complete, of those
    that are shipped."""
    try:
        comparisons = compare(EXAMPLE, profile, seeds=find_profile(profile).seeds, allow_run=False)
    except StudyError:
        shipped = load(records_folder(profile).glob("*.jsonl"))
        return {record.config.recipe_id for record in shipped if record.config.method.inner.optimizer == EXAMPLE}
    trials = {config.recipe_id for c in comparisons for _, config in c.trials.values()}
    return trials | {record.config.recipe_id for c in comparisons for record in c.records}
