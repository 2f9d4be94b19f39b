"""Named configurations: a profile is a model, its data and its budgets, in which a method of `gnlib.methods` runs.

    run_config("laptop", "gauss_newton", seed=1)        -> RunConfig, with the tuned learning rates if there are any

Tuned settings are not written here: `gnlib tune` derives them from records and writes
data/records/<profile>/tuned.json, which `run_config` reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnlib.config import ConfigError, RunConfig
from gnlib.files import home
from gnlib.methods import ALL_METHODS, Changes, check_name, find_method


@dataclass(frozen=True)
class Profile:
    name: str
    summary: str
    base: Changes
    """What all its runs share, the outer batch included."""
    gauss_newton: Changes
    """Inner solver and budget of the Gauss-Newton methods, before tuning."""
    baseline: Changes
    """Budget of the baselines, before tuning."""
    target: float
    """Validation loss that steps are counted to, nats per token."""
    most_steps: tuple[int, int]
    """Outer steps at most: of the Gauss-Newton methods, of the baselines. A run that has not reached the target by
    then is censored."""
    longer: dict[str, int] = field(default_factory=dict)
    """A higher cap for single methods, whose best run was as long as that allowed."""
    methods: dict[str, Changes] = field(default_factory=dict)
    """What single methods have beyond that."""
    tuned: tuple[str, ...] | None = None
    """Fields that `gnlib tune` searches, of TUNABLE, where a trial is too dear for all that a method has; None for
    all."""
    batches: tuple[int, ...] = ()
    """Outer batches of the studies over batch size, sequences; ascending powers of 4, `base`'s outer batch among
    them."""
    larger: tuple[int, ...] = ()
    """Batches beyond those, at which the critical batch size alone is studied, and methods may be missing."""
    budget: int = 0
    """Training sequences of a run at a fixed budget; a multiple of every batch."""
    shows_claims: bool = True
    """Whether notebooks assert the claims on it; too small a model cannot show them."""
    in_part: bool = False
    """Whether notebooks show a study as far as its runs are there and leave out the others: dear ones, on a text that
    is not shipped."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Data orders that results are reported on; tuning uses seed 0."""


TUNABLE = (
    "method.inner.lr",
    "method.inner.adam_lr",
    "method.inner.options.damping",
    "outer_steps",
    "method.inner.warmup",
)
"""The fields of all axes of `gnlib.tune`."""

_PAPER_INNER = {"method.inner.weight_decay": 1e-3, "method.inner.clip": 1.0}

_C4 = {
    "source": "c4",
    "tokenizer": "google-t5/t5-base",
    "vocabulary": 32128,
    "sequence_length": 1024,
    "validation_fraction": 0.001,
}

_PAPER_45M = {
    "model": {"width": 512, "mlp_width": 2048, "blocks": 4, "heads": 8},
    "start": {"batch": 128, "lr": 3e-3, "warmup": 50},
    "outer_batch": 4096,
    "evaluation.sequences": 1024,
    "compute": {"precision": "tf32", "compile": True, "micro_batch": 32},
}

_LAPTOP_TARGET = 4.05

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "tiny",
            "seconds, on synthetic tokens; for tests",
            {
                "model": {"width": 16, "mlp_width": 32, "blocks": 2, "heads": 2},
                "data": {"source": "synthetic", "vocabulary": 300, "sequence_length": 16},
                "start.batch": 8,
                "start.lr": 1e-2,
                "outer_batch": 64,
                "evaluation.sequences": 64,
                "compute.micro_batch": 16,
            },
            {"method.inner.steps": 8, "outer_steps": 3, "method.line_search.fraction": 0.25},
            {"outer_steps": 6, "method.inner.warmup": 1},
            target=3.75,
            most_steps=(3, 6),
            batches=(16, 64),
            budget=128,
            shows_claims=False,
            seeds=(1,),
        ),
        Profile(
            "laptop",
            "230 k parameters on CPython's docstrings; minutes on 2 cores",
            {"outer_batch": 2048, "evaluation.sequences": 512, "start.lr": 1.4e-2, "start.warmup": 40},
            {
                "method.inner.steps": 128,
                "method.inner.adam_lr": 0.01,
                "outer_steps": 5,
                "method.line_search.fraction": 0.25,
            },
            {"outer_steps": 32, "method.inner.warmup": 3, "compute.micro_batch": 32},
            target=_LAPTOP_TARGET,
            most_steps=(6, 96),
            longer={"sophia_g": 256},
            batches=(128, 512, 2048),
            budget=16384,
            methods={
                "muon": {"method.inner.lr": 0.1, "method.inner.adam_lr": 0.02},
                "soap": {"method.inner.lr": 0.01, "method.inner.options": {"precondition_frequency": 1}},
                "adamw": {"method.inner.lr": 0.01},
                "adam": {"method.inner.lr": 0.08},
                "sgd": {"method.inner.lr": 2.0},
                "swan": {"method.inner.lr": 0.04, "method.inner.adam_lr": 0.32},
                "sinkgd": {"method.inner.lr": 0.04, "method.inner.adam_lr": 0.32},
                "sinkgd_stateless": {"method.inner.lr": 0.02},
                "shampoo": {"method.inner.lr": 0.8, "method.inner.adam_lr": 0.08},
                "schedule_free": {"method.inner.lr": 0.05},
                "kfac": {
                    "method.inner.lr": 0.008,
                    "method.inner.adam_lr": 0.08,
                    "method.inner.options": {"period": 1},
                },
                "sophia_g": {  # ends at the target: its best schedules are ten times as long
                    "method.inner.lr": 0.005,
                    "method.inner.options": {"period": 1},
                    "method.inner.warmup": 2,
                    "outer_steps": 128,
                    "evaluation.stop_below": _LAPTOP_TARGET,
                },
            },
        ),
        Profile(
            "h200",
            "6.8 M parameters on your own English text (data/corpus/english.jsonl.zst); a minute a run on one H200",
            {
                "model": {"width": 256, "mlp_width": 1024, "blocks": 6, "heads": 4},
                "data": {
                    "source": "data/corpus/english.jsonl.zst",
                    "vocabulary": 4096,
                    "sequence_length": 512,
                    "validation_fraction": 0.01,
                },
                "start": {"batch": 16, "lr": 4e-3, "warmup": 80},
                "outer_batch": 4096,
                "evaluation.sequences": 1024,
                "compute": {"precision": "bf16", "compile": True, "micro_batch": 64},
            },
            {
                "method.inner.steps": 64,
                "method.inner.lr": 0.04,
                "method.inner.adam_lr": 0.006,
                "outer_steps": 6,
                "method.line_search.fraction": 0.125,
            },
            {"outer_steps": 48, "method.inner.warmup": 8, "compute.micro_batch": 256},
            target=4.1,
            most_steps=(12, 96),
            longer={"adamw": 192, "soap": 128},
            batches=(256, 1024, 4096, 16384),
            larger=(65536,),
            budget=131072,
            methods={
                "muon": {"method.inner.lr": 0.04, "method.inner.adam_lr": 0.02},
                "soap": {"method.inner.lr": 0.01, "method.inner.options": {"precondition_frequency": 1}},
                "adamw": {"method.inner.lr": 0.004, "outer_steps": 64},
                "adam": {"method.inner.lr": 0.004},
                "sgd": {"method.inner.lr": 0.5},
                "swan": {"method.inner.lr": 0.004, "method.inner.adam_lr": 0.01},
                "sinkgd": {"method.inner.lr": 0.004, "method.inner.adam_lr": 0.01},
                "sinkgd_stateless": {"method.inner.lr": 0.004},
                "shampoo": {"method.inner.lr": 0.5, "method.inner.adam_lr": 0.01},
                "schedule_free": {"method.inner.lr": 0.008},
                "kfac": {
                    "method.inner.lr": 0.004,
                    "method.inner.adam_lr": 0.01,
                    "method.inner.options": {"period": 1},
                },
                "sophia_g": {"method.inner.lr": 0.004, "method.inner.options": {"period": 1}},
            },
            in_part=True,
        ),
        Profile(
            "english-45m",
            "the paper's 45M model on your own English text (files in data/corpus/english); minutes a run on an H100",
            {
                **_PAPER_45M,
                "compute.precision": "bf16",
                "data": {
                    "source": "data/corpus/english",
                    "vocabulary": 32000,
                    "sequence_length": 1024,
                    "validation_fraction": 0.02,
                    "group": "id",
                },
            },
            {
                "method.inner.steps": 128,
                "method.inner.lr": 0.01,
                "method.inner.adam_lr": 0.003,
                "outer_steps": 8,
                "method.line_search.fraction": 0.125,
            },
            {"outer_steps": 40, "method.inner.warmup": 8},
            target=4.45,
            most_steps=(12, 96),
            tuned=("method.inner.lr", "method.inner.adam_lr"),
            batches=(256, 1024, 4096, 16384),
            budget=131072,
            methods={
                "layerwise": {"outer_steps": 12},
                "muon": {"method.inner.lr": 0.02, "method.inner.adam_lr": 0.003},
                "soap": {"method.inner.lr": 0.005, "method.inner.options": {"precondition_frequency": 1}},
                "adamw": {"method.inner.lr": 0.002},
            },
            in_part=True,
            seeds=(1,),
        ),
        Profile(
            "paper-45m",
            "the paper's 45M model on C4 with the T5 tokenizer (arXiv 2510.09378, section 4)",
            {**_PAPER_45M, "data": {**_C4, "max_tokens": 1_000_000_000}},
            {
                "method.inner.steps": 128,
                "method.inner.lr": 0.01,
                "method.inner.schedule": "constant_inner_cosine",
                "method.line_search.candidates": 5,
                "outer_steps": 50,
            },
            {"outer_steps": 300, "method.inner.warmup": 20},
            target=3.6,
            most_steps=(50, 300),
            batches=(256, 1024, 4096, 16384),
            budget=262144,
            in_part=True,
        ),
        Profile(
            "paper-150m",
            "the paper's 150M model on C4 with the T5 tokenizer (arXiv 2510.09378, section 4)",
            {
                "model": {"width": 768, "mlp_width": 3072, "blocks": 12, "heads": 16},
                "data": {**_C4, "max_tokens": 3_000_000_000},
                "start": {"batch": 256, "lr": 1e-3, "warmup": 100},
                "outer_batch": 122880,
                "evaluation.sequences": 1024,
                "compute": {"precision": "tf32", "compile": True, "micro_batch": 128},
            },
            {
                "method.inner.steps": 960,
                "method.inner.lr": 0.003,
                "method.ridge": 0.01,
                "method.line_search.candidates": 10,
                "outer_steps": 60,
            },
            {"outer_steps": 900, "method.inner.warmup": 50},
            target=3.25,
            most_steps=(60, 900),
            batches=(1920, 7680, 30720, 122880),
            budget=2949120,
            in_part=True,
        ),
    )
}


def find_profile(name: str) -> Profile:
    """By name; ConfigError with the allowed names for another, and for one whose fields do not fit together."""
    if name not in PROFILES:
        raise ConfigError(f"profile: no profile {name!r}; allowed: {', '.join(PROFILES)}")
    _check_batches(name, PROFILES[name])
    _check_names(name, PROFILES[name])
    return PROFILES[name]


def _check_batches(name: str, found: Profile) -> None:
    own, them = found.base.get("outer_batch", RunConfig().outer_batch), ", ".join(map(str, found.batches))
    if list(found.batches) != sorted(set(found.batches)):
        raise ConfigError(f"profile: the batches of {name!r}, {them}, do not ascend")
    beyond = (*found.batches[-1:], *found.larger)
    if found.larger and (not found.batches or list(beyond) != sorted(set(beyond))):
        larger = ", ".join(map(str, found.larger))
        raise ConfigError(f"profile: the larger batches of {name!r}, {larger}, do not ascend beyond the others, {them}")
    if found.batches and own not in found.batches:
        raise ConfigError(f"profile: the outer batch of {name!r}, {own}, is not among its batches {them}")
    if any(found.budget % batch or 0 < found.budget < 2 * batch for batch in found.batches):
        raise ConfigError(f"profile: the budget of {name!r}, {found.budget}, is no multiple, twice or more, of {them}")


def _check_names(name: str, found: Profile) -> None:
    """Of methods and of tuned fields, which would be ignored where they are misspelt."""
    for what, names in (("methods", found.methods), ("longer", found.longer)):
        for method in names:
            check_name(method, ALL_METHODS, f"profile: {what} of {name!r}")
    for tuned in found.tuned or ():
        if tuned not in TUNABLE:
            allowed = ", ".join(TUNABLE)
            raise ConfigError(f"profile: tuned of {name!r}: no field {tuned!r} is tuned; allowed: {allowed}")


def records_folder(profile: str) -> Path:
    """Where a profile's shipped records and tuned settings lie."""
    return home() / "data" / "records" / profile


def tuning(profile: str, method: str) -> dict[str, Any]:
    """The entry of a method in the profile's tuned.json (`gnlib.tune.tune`); empty before it was tuned."""
    path = records_folder(profile) / "tuned.json"
    try:
        return json.loads(path.read_text()).get(method, {}) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None


def run_config(
    profile: str, method: str, seed: int = 0, changes: Changes | None = None, use_tuned: bool = True
) -> RunConfig:
    """The run of a method in a profile: the profile's settings, then the tuned ones, then `changes`."""
    setting, kind = find_profile(profile), find_method(method)
    layers = [
        setting.base,
        kind.changes,
        _PAPER_INNER,
        setting.gauss_newton if kind.is_gauss_newton else setting.baseline,
        setting.methods.get(method, {}),
        tuning(profile, method).get("settings", {}) if use_tuned else {},
        {"seed": seed},
        changes or {},
    ]
    return RunConfig().replace(*layers)
