"""What the studies run beyond the methods at the profile's own batch: variants of a method, other batches, a budget.

A `Setting` names such a run apart from its data order and `setting_config` makes its configuration: the base method as
tuned at the profile's outer batch, scaled to the setting's batch and length, then the variant's changes, then what was
tuned nearby, then what `gnlib tune` found for the setting itself (tuned.json's entry `key`). A variant without such an
entry is its base at the same batch, as tuned there, with its changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gnlib.config import ConfigError, RunConfig
from gnlib.methods import ALL_METHODS, METHODS, Changes, check_name
from gnlib.profiles import find_profile, run_config, tuning
from gnlib.schedules import WITHOUT_LENGTH


@dataclass(frozen=True)
class Variant:
    label: str
    """As in tables and figures."""
    base: str
    """Name of the method it changes, of `methods.METHODS`."""
    changes: Changes = field(default_factory=dict)
    tuned: bool = True
    """Whether it is tuned by itself; else, and until it is, it runs with the settings of its base at the same batch."""
    inner_steps: float = 1.0
    """Inner steps N, times those of the base."""
    line: tuple[str | int, int] = ("", 1)
    """In figures: a method whose colour it takes (its base's by default) or the index of a colour that no method has,
    and the index of the dashes."""


def _scheduled(label: str, name: str, colour: int) -> Variant:
    return Variant(f"GN, {label}", "gauss_newton", {"method.inner.schedule": name}, line=(colour, 0))


def _searching(method: str, colour: int) -> Variant:
    label, own = f"{METHODS[method].label} with line search", {"method.line_search.fraction": 0.25}
    return Variant(label, method, {"method.line_search": {}} | own, line=(colour, 1))


def _search(label: str, colour: int, **changes: object) -> Variant:
    own = {f"method.line_search.{name}": value for name, value in changes.items()}
    return Variant(f"GN, {label}", "gauss_newton", own, tuned=False, line=(colour, 0))


def _solved_by(label: str, optimizer: str, line: tuple[str | int, int], **changes: object) -> Variant:
    own = {f"method.inner.{name}": value for name, value in changes.items()}
    solver = {"method.inner.optimizer": optimizer, "method.inner.adam_lr": None}
    return Variant(f"GN by {label}", "gauss_newton", solver | own, line=line)


def _untuned() -> dict[str, Variant]:
    """Values beside those that the baselines always have: what the paper sweeps for them and we do not tune (arXiv
    2510.09378, section 4)."""
    beta_2 = {"muon": (0.95, 0.99), "soap": (0.99, 0.999), "adamw": (0.95, 0.99)}
    found = {}
    for method, betas in beta_2.items():
        values: dict[str, tuple[str, Changes]] = {
            f"beta2_{beta}": (f"beta_2 {beta}", {"method.inner.betas": (0.9, beta)}) for beta in betas
        }
        for momentum in (0.9, 0.98) if method == "muon" else ():
            values[f"momentum_{momentum}"] = (f"momentum {momentum}", {"method.inner.momentum": momentum})
        for decay in (0.01, 0.1):
            values[f"decay_{decay}"] = (f"weight decay {decay}", {"method.inner.weight_decay": decay})
        values["averaged"] = ("weights averaged", {"evaluation.average": 0.9})
        for index, (name, (label, changes)) in enumerate(values.items()):
            own = f"{METHODS[method].label}, {label}"
            found[f"{method}_{name}"] = Variant(own, method, changes, tuned=False, line=(index % 4, index // 4))
    return found


UNTUNED = _untuned()
TEN_LENGTHS: Changes = {"method.line_search.candidates": 10}
"""Down to 1/23 of the subproblem's solution, where others go to 1/4."""
VARIANTS: dict[str, Variant] = {
    "gauss_newton_no_search": Variant("GN, no line search", "gauss_newton", {"method.line_search": None}),
    "prox_linear_no_search": Variant(
        "GN-prox-linear, no line search", "prox_linear", {"method.line_search": None}, line=("", 2)
    ),
    "matrixwise": Variant(
        "Per-matrix GN",
        "gauss_newton",
        TEN_LENGTHS | {"method.blocks": "matrix"},  # in a model of many matrices even 1/4 of their sum is too far
        line=("layerwise", 1),
    ),
    "global_inner_cosine": _scheduled("global + inner cosine", "global_inner_cosine", 0),
    "constant_inner_cosine": _scheduled("constant + inner cosine", "constant_inner_cosine", 1),
    "constant": _scheduled("constant", "constant", 3),
    "search_without_zero": _search("no step 0", 0, zero=False),
    "search_on_all": _search("search on 1/1", 1, fraction=1.0),
    "search_on_16th": _search("search on 1/16", 3, fraction=1 / 16),
    "ten_lengths": Variant("GN, ten step lengths", "gauss_newton", TEN_LENGTHS, tuned=False, line=("", 3)),
    "layerwise_ten_lengths": Variant(
        "Layerwise GN, ten step lengths", "layerwise", TEN_LENGTHS, tuned=False, line=("layerwise", 3)
    ),
    "cold_start": Variant("GN, no warm start", "gauss_newton", {"method.inner.warm_start": False}, line=("", 2)),
    "muon_search": _searching("muon", 0),
    "soap_search": _searching("soap", 1),
    "adamw_search": _searching("adamw", 3),
    "inner_adamw": _solved_by("AdamW", "adamw", ("adamw", 1), lr=0.01),
    "inner_soap": _solved_by("SOAP", "soap", ("soap", 1), lr=0.01, options={"precondition_frequency": 10}),
    "inner_cg": _solved_by(
        "conjugate gradients",
        "conjugate_gradient",
        (1, 0),
        steps=64,
        schedule="constant",
        options={"damping": 0.01, "fraction": 1 / 16},  # of the outer batch for products, which are 64 a step
    ),
    "quarter_n": Variant("GN, N / 4", "gauss_newton", tuned=False, inner_steps=0.25, line=(0, 2)),
    "half_n": Variant("GN, N / 2", "gauss_newton", tuned=False, inner_steps=0.5, line=(3, 3)),
    "double_n": Variant("GN, 2 N", "gauss_newton", tuned=False, inner_steps=2.0),
    **UNTUNED,
}


@dataclass(frozen=True)
class Setting:
    """A run apart from its data order."""

    name: str
    """Of `methods.ALL_METHODS` or `VARIANTS`."""
    batch: int | None = None
    """Sequences of the outer batch; None is the profile's."""
    budget: bool = False
    """Run for the profile's token budget, for the loss at its end, not for steps to the target."""

    @property
    def base(self) -> str:
        return VARIANTS[self.name].base if self.name in VARIANTS else self.name

    @property
    def label(self) -> str:
        """The method's or variant's name in tables and figures."""
        return (VARIANTS | ALL_METHODS)[self.name].label

    @property
    def is_gauss_newton(self) -> bool:
        return ALL_METHODS[self.base].is_gauss_newton

    def at_home(self, profile: str) -> bool:
        """Whether batch and length are the profile's own."""
        return not self.budget and self.batch in (None, home_batch(profile))


def find_setting(name: str, batch: int | None = None, budget: bool = False) -> Setting:
    """ConfigError with the near names for an unknown one."""
    check_name(name, ALL_METHODS | VARIANTS)
    if batch is not None and batch < 1:
        raise ConfigError(f"batch: {batch}; at least 1 sequence")
    return Setting(name, batch, budget)


def base_label(label: str) -> str:
    """The label of the method that a variant of this label changes; a method's own."""
    return next((METHODS[v.base].label for v in VARIANTS.values() if v.label == label), label)


def home_batch(profile: str) -> int:
    """The profile's own outer batch, sequences."""
    return int(find_profile(profile).base.get("outer_batch", RunConfig().outer_batch))


def tunable(setting: Setting) -> Setting:
    """The setting that is tuned for it: itself, or for a variant that is not tuned its base."""
    variant = VARIANTS.get(setting.name)
    return setting if variant is None or variant.tuned else replace(setting, name=variant.base)


def key(profile: str, setting: Setting) -> str:
    """The name of that setting's entry in tuned.json."""
    name = tunable(setting).name
    if setting.at_home(profile):
        return name
    return f"{name}@{setting.batch or home_batch(profile)}{':budget' if setting.budget else ''}"


def borrows(profile: str, setting: Setting) -> bool:
    """Whether a variant runs with its base's settings at the same batch: not tuned by itself, or not yet there."""
    return setting.name in VARIANTS and (tunable(setting) != setting or not tuning(profile, key(profile, setting)))


def setting_config(
    profile: str, setting: Setting, seed: int = 0, changes: Changes | None = None, use_tuned: bool = True
) -> RunConfig:
    """The run of a setting; without `use_tuned`, where the search for its own tuned settings starts."""
    variant = VARIANTS.get(setting.name)
    if variant is None and setting.at_home(profile):
        return run_config(profile, setting.name, seed, changes, use_tuned)
    own: Changes = {}
    near: Changes = {}
    borrowed = tunable(setting) != setting or (use_tuned and borrows(profile, setting))
    if borrowed:
        start = setting_config(profile, replace(setting, name=setting.base), seed)
    else:
        start, near = scaled(profile, run_config(profile, setting.base, seed), setting), _near(profile, setting)
        own = tuning(profile, key(profile, setting)).get("settings", {}) if use_tuned else {}
    return start.replace(_varied(start, variant), near, _ending(profile, setting, borrowed), own, changes or {})


def scaled(profile: str, config: RunConfig, setting: Setting) -> RunConfig:
    """The base method's run at the setting's batch and length.

    Learning rates stay: where they were tuned until interior, their optimum hardly moved with the batch. Gauss-Newton
    keeps its inner batch, so that N follows the outer batch. Steps and warm-up by `length`.
    """
    batch = setting.batch or config.outer_batch
    if setting.at_home(profile):
        return config
    ratio, inner = batch / config.outer_batch, config.method.inner
    steps = _budget_steps(profile, batch) if setting.budget else length(config.outer_steps, ratio, setting)
    evaluated = steps // 8 if setting.budget else config.evaluation.sequences // (2 * batch)
    changes: Changes = {
        "outer_batch": batch,
        "outer_steps": steps,
        "method.inner.warmup": min(steps // 2, length(inner.warmup, ratio, setting)) if inner.warmup else 0,
        "evaluation.every": max(1, evaluated),
    }
    if setting.is_gauss_newton:
        changes["method.inner.steps"] = max(1, round(inner.steps * ratio))
    return config.replace(changes)


def _budget_steps(profile: str, batch: int) -> int:
    """ConfigError for a batch at which a run would not read the whole budget, or in less than two steps."""
    budget = find_profile(profile).budget
    if not budget:
        raise ConfigError(f"budget: profile {profile!r} has none")
    if budget % batch or budget < 2 * batch:
        allowed = f"one that divides the budget of profile {profile!r}, {budget}, into 2 steps or more"
        raise ConfigError(f"batch: {batch} sequences; allowed: {allowed}")
    return budget // batch


def starts_near(profile: str, setting: Setting) -> list[Setting]:
    """The settings from whose tuned ones a search away from home starts, the nearest first: at a budget the same batch
    without one, at a batch beyond the profile's the next smaller one, and the profile's own batch, where a variant may
    need other rates than its method."""
    near, found = [Setting(setting.name)], find_profile(profile)
    if setting.budget:
        near.insert(0, replace(setting, budget=False))
    elif setting.batch in found.larger:
        smaller = max(batch for batch in (*found.batches, *found.larger) if batch < setting.batch)
        near.insert(0, replace(setting, batch=smaller))
    return near


def _near(profile: str, setting: Setting) -> Changes:
    """What the search for a setting's own rates starts from, of the first of those near that is tuned: its learning
    rates or damping, and at a batch beyond the profile's, past the critical one of most methods, its length too."""
    if setting.at_home(profile):
        return {}
    for one in starts_near(profile, setting):
        if found := tuning(profile, key(profile, one)).get("settings"):
            scaled_already = one.batch in (None, setting.batch)  # by `scaled`, with the batch or the budget
            lengths = ("outer_steps", "method.inner.warmup") if scaled_already else ()
            return {name: value for name, value in found.items() if name not in lengths}
    return {}


def length(steps: int, ratio: float, setting: Setting) -> int:
    """Outer steps at `ratio` times the batch, to begin with: Gauss-Newton needs as many tokens of a smaller batch; a
    baseline is between that and as many steps, and so is Gauss-Newton at a larger batch, where a baseline, past its
    critical batch, gains nothing."""
    smaller, larger = (1.0, 0.5) if setting.is_gauss_newton else (0.5, 0.0)
    return max(2, round(steps / ratio ** (smaller if ratio < 1 else larger)))


def most_steps(profile: str, setting: Setting) -> int:
    """The profile's cap, at the setting's batch; a variant may be slower than its method, and gets twice as many."""
    newton, limits = setting.is_gauss_newton, find_profile(profile)
    most = limits.longer.get(setting.base, limits.most_steps[not newton])
    ratio = (setting.batch or home_batch(profile)) / home_batch(profile)
    own = most if ratio > 1 else length(most, ratio, setting)
    return own * (2 if setting.name in VARIANTS else 1)


def _ending(profile: str, setting: Setting, borrowed: bool) -> Changes:
    """Runs that only show steps to the target end there: the baselines' beyond Figure 1, and those whose learning rate
    is constant, for which the number of steps is a cap. So it is for a cosine inside each step where the steps to begin
    with (`length`) could be too few: no search lengthens them, as the rate does not depend on them."""
    schedule = _changes(setting).get("method.inner.schedule")
    larger = not borrowed and (setting.batch or 0) > home_batch(profile)
    constant = schedule == "constant" or (larger and schedule in WITHOUT_LENGTH)
    if setting.budget:
        return {"evaluation.stop_below": None}
    if setting.is_gauss_newton and not constant:
        return {}
    cap = {"outer_steps": most_steps(profile, setting)} if constant else {}
    return {"evaluation.stop_below": find_profile(profile).target} | cap


def _changes(setting: Setting) -> Changes:
    return VARIANTS[setting.name].changes if setting.name in VARIANTS else {}


def _varied(start: RunConfig, variant: Variant | None) -> Changes:
    if variant is None:
        return {}
    steps = max(1, round(start.method.inner.steps * variant.inner_steps))
    return {"method.inner.steps": steps} | variant.changes
