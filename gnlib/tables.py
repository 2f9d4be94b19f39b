"""Records and tuning -> the tables of the studies: cost to the target, cells by batch, what was tuned.

pandas is imported where it is used; it comes with the `figures` extra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gnlib import results
from gnlib.config import ConfigError
from gnlib.measures import lead
from gnlib.methods import ALL_METHODS
from gnlib.profiles import tuning
from gnlib.record import Record
from gnlib.results import Estimate, batches, by_method, estimate, final_loss, steps_to_target
from gnlib.variants import VARIANTS, Setting, home_batch, key, setting_config

if TYPE_CHECKING:
    import pandas as pd

_COSTS = {  # column -> axis, unit
    "steps": ("outer_step", 1.0),
    "Mtokens": ("tokens", 1e6),
    "gradients": ("gradients", 1.0),
    "TFLOPs": ("flops", 1e12),
}


def costs(records: Sequence[Record], target: float) -> pd.DataFrame:
    """Per method: what reaching the target takes on every axis but time, mean and interval over the seeds."""
    import pandas as pd

    frame, rows = steps_to_target(records, target), {}
    for name in by_method(records):
        own = frame[frame["method"] == name]
        censored = list(own["censored"])
        rows[name] = {title: str(estimate(list(own[axis] / unit), censored)) for title, (axis, unit) in _COSTS.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def by_batch(records: Sequence[Record], measure: Callable[[Sequence[Record]], object]) -> pd.DataFrame:
    """A table of `measure` over the seeds: one row a batch, one column a method."""
    import pandas as pd

    cells: dict[str, dict[int, str]] = {}
    for name, runs in by_method(records).items():
        for chosen in batches(runs).values():
            cells.setdefault(name, {})[chosen[0].config.outer_batch_tokens] = str(measure(chosen))
    return pd.DataFrame(cells).fillna("-").sort_index().rename_axis("batch (tokens)")


def mean_steps(target: float) -> Callable[[Sequence[Record]], Estimate]:
    """Steps to the target."""
    return lambda records: results.mean_steps(records, target)


def ratios(records: Sequence[Record], target: float, over: Callable[[str], str] = lambda name: "GN") -> pd.DataFrame:
    """Steps to the target over those of a method's reference (of both the labels), Gauss-Newton by default, at the same
    batch (tokens), paired by seed: one row a method and batch at which both were run, with the half width of the 95 %
    interval (nan for one seed, and for a lower bound). ConfigError, naming what is missing, where no method has its
    reference beside it at one of its batches."""
    import pandas as pd

    groups, rows = by_method(records), []
    others = {name: reference for name in groups if (reference := over(name)) != name}
    for name, other in others.items():
        theirs = batches(groups.get(other, []))
        for batch, own in batches(groups[name]).items():
            if batch in theirs:
                found = results.ratio(own, theirs[batch], target, lambda c: c.steps)
                half = math.nan if found.half_width is None or found.censored else found.half_width
                rows.append((name, own[0].config.outer_batch_tokens, found.n, found.mean, half, bool(found.censored)))
    if not rows:
        raise ConfigError(f"methods: {_lacking(list(others or groups), list(dict.fromkeys(others.values())))}")
    return pd.DataFrame(rows, columns=["method", "batch", "n", "ratio", "half_width", "lower_bound"])


def _lacking(labels: Sequence[str], references: Sequence[str]) -> str:
    """What ratios of these labels lack, and the command for it; `references` are those that they are over, if any.

    A record does not say which study and profile asked for it, so that the command leaves these to the reader.
    """
    command = "gnlib study NAME --profile PROFILE"
    if not references:
        return f"ratios are of others over {'; '.join(labels)}, and no runs of others are there; run: {command}"
    names = " ".join(name for name, one in (ALL_METHODS | VARIANTS).items() if one.label in references)
    missing = f"no runs of {'; '.join(references)} at the batches of {'; '.join(labels)}, which ratios are over"
    return f"{missing}; ask for {names} too, or run: {command} --methods {names}"


def rates(records: Sequence[Record]) -> str:
    """Learning rates (for Muon, that of the AdamW part second) and run length."""
    inner, steps = records[0].config.method.inner, records[0].config.outer_steps
    beside = f" / {inner.adam_lr:.3g}" if inner.optimizer == "muon" and inner.adam_lr else ""
    return f"{inner.lr:.3g}{beside}, {steps} steps"


def mean_loss(records: Sequence[Record]) -> Estimate:
    """The final validation loss, nats per token; infinite for a diverged run."""
    return estimate([math.inf if record.status == "diverged" else final_loss(record) for record in records])


def leads(records: Sequence[Record]) -> pd.DataFrame:
    """Gauss-Newton's lead at a fixed budget after equal tokens (`measures.lead`), nats, over the best of the baselines
    that were run: one row a batch (tokens) at which there are both."""
    import pandas as pd

    rows = {}
    for runs in batches(records).values():
        groups = by_method(runs)
        newton = groups.pop("GN", [])
        if newton and groups:
            found = lead(newton, [record for others in groups.values() for record in others])
            rows[runs[0].config.outer_batch_tokens] = {"GN's lead": str(found), "over the best of": ", ".join(groups)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("batch (tokens)")


def trials(profile: str, settings: Sequence[Setting]) -> pd.DataFrame:
    """What the search for tuned settings tried: one row a trial, with the tuned fields by their last names, the score
    (steps to the target, or the loss at the budget; nan where the target was not reached) and its excess over the
    best, a ratio."""
    import pandas as pd

    rows = [_trial(profile, setting, trial) for setting in settings for trial in _entry(profile, setting)["trials"]]
    frame = pd.DataFrame(rows)
    frame["excess"] = frame["score"] / frame.groupby("entry")["score"].transform("min")
    return frame


def _entry(profile: str, setting: Setting) -> dict[str, Any]:
    return tuning(profile, key(profile, setting))


def _trial(profile: str, setting: Setting, trial: dict[str, Any]) -> dict[str, Any]:
    length = setting_config(profile, setting).data.sequence_length
    tuned = {name.rpartition(".")[2]: value for name, value in trial.items() if name.startswith(("method.", "outer"))}
    score = trial["final_loss"] if setting.budget else trial["steps_to_target"]
    return {
        "entry": key(profile, setting),
        "method": setting.label,
        "batch": (setting.batch or home_batch(profile)) * length,
        **tuned,
        "score": math.nan if score is None else score,
        "final_loss": trial["final_loss"],
    }


def tuned(profile: str, settings: Sequence[Setting]) -> pd.DataFrame:
    """One row an entry of tuned.json: what was chosen, its score, among how many trials, and whether it is interior."""
    import pandas as pd

    rows = {}
    for setting in settings:
        entry = _entry(profile, setting)
        chosen = {name.rpartition(".")[2]: value for name, value in entry["settings"].items()}
        run = next(trial for trial in entry["trials"] if entry["settings"].items() <= trial.items())
        score = run["final_loss" if setting.budget else "steps_to_target"]
        tail = {"score": score, "trials": len(entry["trials"]), "interior": entry["interior"]}
        rows[key(profile, setting)] = chosen | tail
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-")
