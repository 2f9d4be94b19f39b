"""Tuning a method as a study: a grid around the current best, extended until the best is interior to it.

The score is the one the claims use: steps to the profile's target at the tuning seed 0; among runs that do not reach
it, and at a fixed budget, the final loss. Learning rates move by factors of 2, the damping of conjugate gradients by 4;
the number of outer steps (the length of the schedule) and the baselines' warm-up move along ladders, until the best
setting has worse neighbours on both sides along every axis.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from gnlib.config import CONJUGATE_GRADIENT, ConfigError, RunConfig
from gnlib.executors import Jobs, StudyError
from gnlib.files import exclusive, replacing
from gnlib.methods import Changes
from gnlib.optimizers import find as optimizer
from gnlib.profiles import find_profile, records_folder, tuning
from gnlib.record import Record
from gnlib.results import crossing
from gnlib.schedules import WITHOUT_LENGTH
from gnlib.study import find, of_one_text, run_study
from gnlib.train import pinned
from gnlib.variants import Setting, find_setting, key, most_steps, setting_config, tunable

SEED = 0  # never one of the seeds that results are reported on
WARMUPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MAX_ROUNDS = 12
REACH = 40  # indices from the start of a grid within which a value is looked for
SATURATED = 0.005  # a longer run that gains less has come to its limit, a constant rate

Point = tuple[int, ...]  # one index an axis
Score = tuple[float, float]  # (steps to target or inf, final loss); smaller is better
Trials = dict[Point, tuple[Score, RunConfig]]


class Axis:
    """One tuned field with its grid: index 0 is the value that the search starts from.

    Beyond its upper end there is nothing to try, or (`capped`) what the profile does not allow.
    """

    def __init__(self, field: str, value: Callable[[int], float | int | None], capped: bool = True) -> None:
        self.field, self.value, self.capped = field, value, capped

    def index(self, value: Any) -> int | None:
        """Where a value is on the grid; None for one that is not."""
        return next((index for index in range(-REACH, REACH + 1) if self.value(index) == value), None)


def geometric(field: str, start: float, factor: float = 2.0) -> Axis:
    """start x factor^k."""
    return Axis(field, lambda index: float(f"{start * factor**index:.4g}") if index else start)


def ladder(field: str, start: int, values: Sequence[int], most: int, capped: bool = True) -> Axis:
    """The values up to `most`; None beyond either end."""
    rungs = [value for value in values if value <= most] or [most]
    origin = min(range(len(rungs)), key=lambda i: abs(rungs[i] - start))
    return Axis(field, lambda index: rungs[origin + index] if 0 <= origin + index < len(rungs) else None, capped)


def axes_of(profile: str, setting: Setting) -> list[Axis]:
    """What is tuned: learning rates (also that of an AdamW part) or the damping, the number of outer steps up to a cap
    where a schedule depends on it, and the baselines' warm-up; of these what the profile allows."""
    allowed = find_profile(profile).tuned
    return [axis for axis in _all_axes(profile, setting) if allowed is None or axis.field in allowed]


def _all_axes(profile: str, setting: Setting) -> list[Axis]:
    config = setting_config(profile, setting, use_tuned=False)
    inner, axes = config.method.inner, []
    if inner.optimizer == CONJUGATE_GRADIENT:
        axes.append(geometric("method.inner.options.damping", float(inner.options["damping"]), factor=4.0))
    else:
        axes.append(geometric("method.inner.lr", inner.lr))
        if optimizer(inner.optimizer).adam_beside:
            axes.append(geometric("method.inner.adam_lr", inner.adam_lr or inner.lr))
    most = config.outer_steps if setting.budget else most_steps(profile, setting)
    if not (setting.budget or inner.schedule in WITHOUT_LENGTH):
        axes.append(ladder("outer_steps", config.outer_steps, STEPS, most))
    if setting.is_gauss_newton:
        return axes
    capped = not (setting.budget and most in WARMUPS)  # a warm-up can be the whole run, and no longer
    return [*axes, ladder("method.inner.warmup", inner.warmup, WARMUPS, most, capped)]


def score(record: Record, target: float) -> Score:
    """Steps to target; if it was not reached, infinitely many and the best of the validation losses decides."""
    reached = crossing(record, target)
    final = record.rows[-1]["val_loss"]
    loss = math.inf if final is None or record.status == "diverged" else final
    return (math.inf if reached.censored else reached.steps, loss)


def tune(
    profile: str,
    method: str | Setting,
    jobs: Jobs = None,
    rounds: int = MAX_ROUNDS,
    allow_run: bool = True,
    fresh: bool = False,
) -> dict[str, Any]:
    """Search the grid and write the result to the profile's tuned.json; returns the entry of the method or setting.

    `fresh` ignores shipped records, which may be of another text. With `allow_run` False it goes by the records there
    are: the optimum may then not be interior, and says so.

    The entry holds the settings, the score, whether the optimum is interior, and every trial with its run's name.
    """
    setting = find_setting(method) if isinstance(method, str) else method
    name = key(profile, setting)
    if tunable(setting) != setting:
        raise ConfigError(f"method: {setting.name} runs with the settings of {setting.base}, tune that")
    command = command_for(profile, setting)
    if not (axes := axes_of(profile, setting)):
        own = ", ".join(axis.field for axis in _all_axes(profile, setting))
        raise ConfigError(f"profile: {profile!r} tunes none of the fields that {name} is tuned by: {own}")
    target = -math.inf if setting.budget else find_profile(profile).target

    def config(settings: Changes) -> RunConfig:
        return setting_config(profile, setting, SEED, settings, use_tuned=False)

    texts: set[str | None] = set()

    def known(configs: list[RunConfig]) -> list[Record | None]:
        found = find([pinned(one) for one in configs] if fresh and allow_run else configs, profile, fresh)
        texts.update(record.config.data.fingerprint for record in found if record)
        return found

    def run(configs: list[RunConfig]) -> list[Record]:
        if texts and texts != {pinned(configs[0]).data.fingerprint}:  # what would be trained could not be compared
            raise StudyError(f"{name}: the trials there are come from another text; --fresh tunes it on this one")
        return run_study(configs, profile, fresh=fresh, jobs=jobs, allow_run=True, command=command)

    before = [point for row in tuning(profile, name).get("trials", []) if (point := _point(axes, row))]
    trials = search(axes, target, config, run if allow_run else None, known, rounds, before=before)
    if not trials:
        raise StudyError(f"{name}, profile {profile}: no records to tune by; run: {command}")
    entry = entry_of(axes, trials)
    _merge(profile, name, entry)
    return entry


def search(
    axes: list[Axis],
    target: float,
    config: Callable[[Changes], RunConfig],
    run: Callable[[list[RunConfig]], list[Record]] | None,
    known: Callable[[list[RunConfig]], list[Record | None]] | None = None,
    rounds: int = MAX_ROUNDS,
    width: int | None = None,
    most: int | None = None,
    before: Sequence[Point] = (),
) -> Trials:
    """Walk from the grid's origin to the best neighbour, again and again, until there is no better one.

    What is `known` is walked first, and counts where an earlier search tried it (`before`): the origin may have moved
    since. A round then runs the best setting's untried neighbours, all or the first `width`, until `most` have run.
    """
    trials: Trials = {}
    seen: list[Record] = []
    best: Point = (0,) * len(axes)

    def untried(points: Sequence[Point]) -> dict[Point, RunConfig]:
        new = (point for point in dict.fromkeys(points) if point not in trials)
        return {point: config(settings) for point in new if (settings := _settings(axes, point))}

    while rounds:
        near = [best, *neighbours(best)]
        wanted = untried([*near, *before])
        found = dict(zip(wanted, known(list(wanted.values())), strict=True)) if known else {}
        records = {point: record for point, record in found.items() if record is not None}
        if not records and run and (wanted := untried(near)):
            chosen = dict(list(wanted.items())[:width][:most])
            most = None if most is None else most - len(chosen)
            records = dict(zip(chosen, run(list(chosen.values())), strict=True))
            rounds -= 1
        if not records:
            break
        seen += of_one_text([*seen, *records.values()], "tuning")[len(seen) :]
        trials |= {point: (score(record, target), record.config) for point, record in records.items()}
        best = _best(trials)
    return trials


def _best(trials: Trials) -> Point:
    return min(trials, key=lambda point: trials[point][0])


def open_fields(axes: list[Axis], trials: Trials) -> list[str]:
    """The fields along which the best setting has a neighbour that was not tried.

    The profile's cap on outer steps closes their axis if the last extension gained less than 0.5 %.
    """
    beside = neighbours(_best(trials))
    missing = [point not in trials and not _beyond(axes, point) for point in beside]
    return [
        axis.field
        for index, axis in enumerate(axes)
        if any(missing[2 * index : 2 * index + 2]) and not _saturated(axes, trials, index)
    ]


def _saturated(axes: list[Axis], trials: Trials, index: int) -> bool:
    """Whether the best run has as many outer steps as it may, and the next shorter one takes hardly more to the
    target."""
    best = _best(trials)
    shorter, longer = neighbours(best)[2 * index : 2 * index + 2]
    at_cap = axes[index].field == "outer_steps" and axes[index].value(longer[index]) is None
    return at_cap and shorter in trials and trials[shorter][0][0] <= (1 + SATURATED) * trials[best][0][0] < math.inf


def ensure_tuned(profile: str, settings: Sequence[Setting], allow_run: bool) -> list[Setting]:
    """Tune what tuned.json lacks; where that is not allowed, as where $CI is set, leave it out and name it in a printed
    line, or StudyError with the first command if that is everything. Returns the settings that are tuned."""
    missing = [setting for setting in settings if not tuning(profile, key(profile, setting))]
    if missing and (not allow_run or os.environ.get("CI")):
        what = f"{len(missing)} of {len(settings)} settings are not tuned"
        if len(missing) == len(settings):
            raise StudyError(f"{what}; run: {command_for(profile, missing[0])}")
        names = ", ".join(key(profile, setting) for setting in missing)
        print(f"{what}, left out: {names}; the first: {command_for(profile, missing[0])}")
        return [setting for setting in settings if setting not in missing]
    for setting in missing:
        tune(profile, setting)
    return list(settings)


def command_for(profile: str, setting: Setting) -> str:
    """The command line that tunes a setting."""
    batch = f" --batch {setting.batch}" if setting.batch else ""
    return f"gnlib tune --profile {profile} --methods {setting.name}{batch}{' --budget' if setting.budget else ''}"


def neighbours(point: Point) -> list[Point]:
    """The points one step away along one axis."""
    return [(*point[:axis], point[axis] + step, *point[axis + 1 :]) for axis in range(len(point)) for step in (-1, 1)]


def _beyond(axes: list[Axis], point: Point) -> bool:
    """Beyond an end of an axis where there is nothing to try; at a capped upper end it was the cap that stopped us."""
    pairs = zip(axes, point, strict=True)
    return any(axis.value(i) is None and (axis.value(i + 1) is not None or not axis.capped) for axis, i in pairs)


def _point(axes: list[Axis], settings: Changes) -> Point | None:
    """The point that has these values; None if one of them is missing or not on its grid."""
    indices = [axis.index(settings[axis.field]) if axis.field in settings else None for axis in axes]
    return None if None in indices else tuple(index for index in indices if index is not None)


def _settings(axes: list[Axis], point: Point) -> Changes | None:
    """The point's values by field; None if one is beyond its axis."""
    values = [axis.value(index) for axis, index in zip(axes, point, strict=True)]
    if None in values:
        return None
    return {axis.field: value for axis, value in zip(axes, values, strict=True)}


def entry_of(axes: list[Axis], trials: Trials) -> dict[str, Any]:
    """The best setting, whether it is interior to what was tried, and the trials, best first."""

    def row(point: Point) -> dict[str, Any]:
        (steps, loss), config = trials[point]
        finite = {"steps_to_target": steps, "final_loss": loss}
        return (
            (_settings(axes, point) or {})
            | {name: round(value, 4) if math.isfinite(value) else None for name, value in finite.items()}
            | {"run": config.recipe_id}
        )

    ordered = sorted(trials, key=lambda point: trials[point][0])
    works = any(math.isfinite(value) for value in trials[_best(trials)][0])  # or all of them diverged
    interior = works and not open_fields(axes, trials)
    return {"settings": _settings(axes, _best(trials)), "interior": interior, "trials": [row(p) for p in ordered]}


def outdone(entry: dict[str, Any]) -> bool:
    """Whether a better setting than the one in use was tried since; a longer run that gains less than 0.5 % is none."""
    used, trials = entry["settings"], entry.get("trials")
    if not trials or used.items() <= trials[0].items():
        return False
    best, length = trials[0], "outer_steps"
    if not used.items() - best.items() <= {(length, used.get(length))} or best.get(length, 0) < used[length]:
        return True
    own: dict[str, Any] = next((trial for trial in trials if used.items() <= trial.items()), {})
    steps, fewer = own.get("steps_to_target"), best.get("steps_to_target")
    return steps is None or fewer is None or steps > (1 + SATURATED) * fewer


def told(entry: dict[str, Any]) -> str:
    """An entry in a line."""
    where = "interior" if entry["interior"] else "NOT interior"
    return f"{entry['settings']}, {where} among {len(entry['trials'])} trials"


def _merge(profile: str, name: str, entry: dict[str, Any]) -> None:
    path = records_folder(profile) / "tuned.json"
    with exclusive(path):  # several methods may be tuned at once
        table = json.loads(path.read_text()) if path.exists() else {}
        table[name] = entry
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
