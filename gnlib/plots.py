"""Tables -> figures, one function each; the same colour for a method everywhere. Needs the `figures` extra."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnlib.config import ConfigError
from gnlib.critical_batch import EXCESS, CriticalBatch, in_tokens
from gnlib.files import home, replacing
from gnlib.methods import ALL_METHODS, METHODS
from gnlib.tune import SEED
from gnlib.variants import VARIANTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

AXES = {
    "outer_step": "Outer step",
    "tokens": "Tokens processed, line search included",
    "flops": "Matrix-product FLOPs",
    "gradients": "Sequential gradient evaluations",
    "wall_s": "Seconds",
}
WIDTH = 5.5  # inches: one column
LINE = 1.2  # its width, points
MARKED = 24  # points of a line; more of them would fill the gaps of a dashed one
LEGEND = 20  # characters of a label, three of which fit the width
OPEN = "open triangle: lower bound"
LOSS = "Validation loss (nats per token)"

Style = dict[str, Any]  # keyword arguments of Axes.plot


def colours() -> dict[str, tuple[float, float, float]]:
    """Method label -> colour: ten of seaborn's colour-blind palette, then darker ones."""
    import seaborn as sns

    palette = [*sns.color_palette("colorblind"), *sns.color_palette("dark")]
    return dict(zip((method.label for method in ALL_METHODS.values()), palette, strict=False))


def styles() -> dict[str, Style]:
    """Label of a method or variant -> its line everywhere (`variants.Variant.line`)."""
    import seaborn as sns

    own, spare = colours(), sns.color_palette("colorblind")[6:]
    dashes = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
    solid = {"linestyle": dashes[0], "linewidth": LINE}
    found: dict[str, Style] = {name: solid | {"color": colour} for name, colour in own.items()}
    found[METHODS["prox_linear"].label]["linestyle"] = dashes[1]  # it lies on Gauss-Newton's line,
    found[METHODS["gauss_newton"].label]["linewidth"] = 2 * LINE  # which shows below it and below its own variants
    for variant in VARIANTS.values():
        colour, dash = variant.line
        chosen = spare[colour] if isinstance(colour, int) else own[METHODS[colour or variant.base].label]
        found[variant.label] = solid | {"color": chosen, "linestyle": dashes[dash]}
    return found


@contextmanager
def _style() -> Iterator[None]:
    """The house style."""
    import seaborn as sns

    with sns.axes_style("whitegrid", {"grid.color": "0.9"}), sns.plotting_context("paper", rc={"grid.linewidth": 0.6}):
        yield


@contextmanager
def _figure(title: str, note: str, height: float = 3.7) -> Iterator[tuple[Figure, Axes]]:
    """One panel in the house style, with the legend of what is labelled in it below."""
    import matplotlib.pyplot as plt

    with _style():
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        yield figure, axes
        axes.set_title(f"{title}\n{note}", fontsize="medium")
        longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
        figure.legend(loc="outside lower center", ncols=3 if longest <= LEGEND else 2, frameon=False)
    plt.close(figure)  # the notebook shows the returned figure once


def _order(labels: Sequence[str]) -> list[str]:
    return [name for name in styles() if name in set(labels)] + [name for name in labels if name not in styles()]


def _seeds(frame: pd.DataFrame) -> str:
    if set(frame["seed"]) == {SEED}:
        return "1 data order, the one of tuning"
    n = frame.groupby("method")["seed"].nunique().max()
    return "1 data order" if n == 1 else f"mean of {n} data orders, band: lowest to highest"


def _check_axis(axis: str, allowed: Collection[str]) -> None:
    if axis not in allowed:
        raise ConfigError(f"axis: no axis {axis!r}; allowed: {', '.join(allowed)}")


def loss_curves(
    curves: pd.DataFrame, target: float, axis: str = "outer_step", title: str = "", target_name: str = "target"
) -> Figure:
    """Validation loss against `axis` (a key of AXES), one line a method as far as all of its seeds went, and these as a
    band from lowest to highest."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    _check_axis(axis, AXES)
    with _figure(title, _seeds(curves)) as (figure, axes):
        for name in _order(list(curves["method"].unique())):
            by_step = _of_all_seeds(curves[curves["method"] == name])
            _band(axes, by_step[axis].mean(), by_step["val_loss"], name)
        axes.axhline(target, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
        axes.text(1.01, target, f"{target_name}\n{target:g}", va="center", transform=axes.get_yaxis_transform())
        axes.set(xlabel=AXES[axis], ylabel=LOSS)
        if axis in ("tokens", "flops"):
            axes.xaxis.set_major_formatter(EngFormatter())  # 20 M, not 0.2 beside a detached 1e8
        if axis == "outer_step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _of_all_seeds(curves: pd.DataFrame) -> Any:
    """One method's evaluations by outer step, while none of its runs has ended: a mean of fewer would jump."""
    curves = curves.dropna(subset=["val_loss"])  # of a diverged run's last
    seeds = curves.groupby("outer_step")["seed"].transform("nunique")
    return curves[seeds == seeds.max()].groupby("outer_step")


def _band(axes: Axes, x: Any, values: Any, name: str) -> Any:
    """The mean of each group over its lowest to highest; returns the line's colour.

    `values` are grouped, and `x` has one number a group.
    """
    mean = values.mean()
    style, marker = styles().get(name, {"color": "black", "linewidth": LINE}), "o" if len(mean) <= MARKED else None
    (line,) = axes.plot(x, mean, label=name, marker=marker, markersize=2.5, **style)
    axes.fill_between(x, values.min(), values.max(), color=line.get_color(), alpha=0.2, linewidth=0)
    return line.get_color()


def cost_by_batch(
    reached: pd.DataFrame,
    axis: str = "outer_step",
    title: str = "",
    critical: Mapping[str, CriticalBatch] | None = None,
) -> Figure:
    """Cost of the target on `axis` against the outer batch (`results.steps_to_target`), both logarithmic.

    For outer steps, dotted: perfect linear scaling from the smallest batch, for methods that were run there, and a
    stroke where 1.2 times that is the method's `critical` batch, if it is between two batches. Open triangles are lower
    bounds, from batches at which a run ended above the target.
    """
    _check_axis(axis, AXES)
    strokes = {name: one.mean for name, one in (critical or {}).items() if not one.bound and not math.isnan(one.mean)}
    strokes = strokes if axis == "outer_step" else {}
    signs = {"dotted: perfect scaling": axis == "outer_step", "stroke: B*": strokes, OPEN: reached["censored"].any()}
    explained = "; ".join(sign for sign, drawn in signs.items() if drawn)
    with _figure(title, f"{_seeds(reached)}\n{explained}".rstrip(), height=4.2) as (figure, axes):
        for name in _order(list(reached["method"].unique())):
            by_batch = reached[reached["method"] == name].groupby("batch")
            mean, bounds = by_batch[axis].mean(), by_batch["censored"].any()
            colour = _band(axes, mean.index, by_batch[axis], name)
            axes.plot(mean[bounds], "^", color=colour, markersize=7, fillstyle="none")
            work = mean.iloc[0] * mean.index[0]  # tokens, at the smallest batch
            if axis == "outer_step" and mean.index[0] == reached["batch"].min():
                axes.plot(mean.index, work / mean.index, color=colour, lw=0.8, linestyle=":")
            if place := strokes.get(name):
                axes.plot([place], [EXCESS * work / place], "|", color=colour, markersize=14, markeredgewidth=1.5)
        cost = "Outer steps to the target" if axis == "outer_step" else f"{AXES[axis]},\nto the target"
        axes.set(yscale="log", ylabel=cost, ylim=(0.7 * reached[axis].min(), None))
        _batch_axis(axes, reached)
        if axis == "outer_step":
            _plain_ticks(axes.yaxis)
    return figure


def ratios(table: pd.DataFrame, title: str = "", over: str = "GN's") -> Figure:
    """Ratios of steps (`tables.ratios`) with their intervals, a row a method and a colour a batch; `over` says whose
    steps they are over.

    Open triangles are lower bounds, from runs that ended above the target.
    """
    import seaborn as sns

    names, batches = _order(list(table["method"].unique())), sorted(table["batch"].unique())
    place, n = {name: -index for index, name in enumerate(names)}, table["n"].max()
    note = "1 data order" if n == 1 else f"mean of {n} data orders, 95 % interval"
    note += f"\n{OPEN}" if table["lower_bound"].any() else ""
    with _figure(title, note, height=1.6 + 0.26 * len(names)) as (figure, axes):
        for index, (batch, colour) in enumerate(zip(batches, sns.color_palette("colorblind"), strict=False)):
            own, shift = table[table["batch"] == batch], 0.3 * (index - (len(batches) - 1) / 2)
            for bound, marker in ((False, "o"), (True, ">")):
                chosen = own[own["lower_bound"] == bound]
                height = [place[name] - shift for name in chosen["method"]]
                label = None if bound else f"batch of {in_tokens(batch)} tokens"
                style = {"color": colour, "fillstyle": "none" if bound else "full", "label": label}
                halves = chosen["half_width"].fillna(0.0)
                axes.errorbar(chosen["ratio"], height, None, halves, fmt=marker, markersize=5, elinewidth=1.2, **style)
        axes.axvline(1, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
        axes.set_yticks(list(place.values()), names)
        axes.set(xlabel=f"Outer steps to the target / {over}")
    return figure


def _batch_axis(axes: Axes, frame: pd.DataFrame) -> None:
    """Logarithmic, with a tick at each batch."""
    batches = sorted(frame["batch"].unique())
    axes.set(xscale="log", xlabel="Outer batch (tokens)")
    axes.set_xticks(batches, [in_tokens(batch) for batch in batches])
    axes.set_xticks([], minor=True)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, ... on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())  # which would label 3 and 4 where the axis is short


def loss_by_batch(ends: pd.DataFrame, axis: str = "batch", title: str = "") -> Figure:
    """Final validation loss (`results.ends`) against the outer batch, or against what the runs cost on another axis."""
    from matplotlib.ticker import EngFormatter

    _check_axis(axis, ("batch", *AXES))
    with _figure(title, _seeds(ends)) as (figure, axes):
        for name in _order(list(ends["method"].unique())):
            own = ends[ends["method"] == name]
            by_batch = own.groupby("batch")
            _band(axes, own[axis].groupby(own["batch"]).mean(), by_batch["final_loss"], name)
        axes.set(ylabel=LOSS, xlabel=AXES.get(axis))
        if axis == "batch":
            _batch_axis(axes, ends)
        else:
            axes.xaxis.set_major_formatter(EngFormatter())
    return figure


def sweeps(trials: pd.DataFrame, title: str = "") -> Figure:
    """Score against learning rate (`tables.trials`), one line an entry, over the score of the entry's best trial.

    The score is the steps to the target; of runs at a fixed budget, their final loss. A cross at the top: no trial at
    this rate reached the target.
    """
    with _figure(title, "best trial at each rate; cross: none reached the target", height=4.2) as (figure, axes):
        for name, own in trials.groupby("entry", sort=False):
            by_rate = own.groupby("lr")["excess"].min()
            best, missed = by_rate.dropna(), by_rate[by_rate.isna()]
            style = styles()[own["method"].iloc[0]]
            label = own["method"].iloc[0] + "".join(str(name).partition("@")[1:])
            axes.plot(best.index, best, marker="o", markersize=2.5, label=label, **style)
            top = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "marker": "x"}
            axes.plot(missed.index, [0.97] * len(missed), **{**style, **top})
        budget = trials["entry"].str.endswith(":budget").all()
        score = "Final loss / that" if budget else "Steps to target / those"
        axes.set(xscale="log", xlabel="Learning rate", ylabel=f"{score} of the best")
        axes.margins(y=0.1)  # no point is as high as the crosses
        _plain_ticks(axes.xaxis)
    return figure


def rates_by_batch(trials: pd.DataFrame, title: str = "") -> Figure:
    """The tuned learning rate of each method against the outer batch, both logarithmic; no point where no trial reached
    the target."""
    scored = trials.dropna(subset="score")
    best = scored.loc[scored.groupby("entry")["score"].idxmin()].sort_values("batch")
    with _figure(title, "of the best trial") as (figure, axes):
        for name in _order(list(best["method"].unique())):
            own = best[best["method"] == name]
            axes.plot(own["batch"], own["lr"], marker="o", markersize=3, label=name, **styles()[name])
        axes.set(yscale="log", ylabel="Tuned learning rate")
        _plain_ticks(axes.yaxis)
        _batch_axis(axes, best)
    return figure


def step_times(times: pd.DataFrame) -> Figure:
    """Milliseconds of one step against the size of a square matrix, one line a method (`stateless.step_times`)."""
    with _figure("One step on one matrix", "this machine, fp32", height=3.4) as (figure, axes):
        for name, row in times.iterrows():
            axes.plot(times.columns, row, label=name, marker="o", markersize=3, **styles()[str(name)])
        axes.set(xlabel="n, of an n x n matrix", ylabel="Milliseconds", xscale="log", yscale="log")
        axes.set_xticks(list(times.columns), [str(size) for size in times.columns])
        axes.minorticks_off()
    return figure


def curves_by_batch(curves: pd.DataFrame, target: float, title: str = "") -> Figure:
    """Validation loss against outer step, a panel a batch size, the largest first; a method of your own is black."""
    import matplotlib.pyplot as plt

    batches, names = sorted(set(curves["batch"]), reverse=True), _order(list(curves["method"].unique()))
    size = (WIDTH if len(batches) == 1 else 1.5 * WIDTH, 3.7)
    with _style():
        figure, row = plt.subplots(ncols=len(batches), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, batch in zip(row[0], batches, strict=True):
            for name in names:
                by_step = _of_all_seeds(curves[(curves["method"] == name) & (curves["batch"] == batch)])
                _band(axes, by_step["outer_step"].mean(), by_step["val_loss"], name)
            axes.axhline(target, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
            axes.set(xlabel=AXES["outer_step"])
            axes.set_title(f"batch of {in_tokens(batch)} tokens", fontsize="medium")
        row[0, 0].set(ylabel=LOSS)
        figure.legend(*row[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{title}, target {target:g}", fontsize="medium")
    plt.close(figure)
    return figure


def step_parts(rows: Sequence[dict[str, Any]]) -> Figure:
    """Milliseconds of a standard step beside the parts of a Gauss-Newton inner step (`bench.bench`), a pair a size."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    measured = [row for row in rows if "parts" in row]
    standard = {(row["size"], row["precision"]): row["ms"] for row in rows if row["method"] == "standard"}
    tokens = in_tokens(measured[0]["tokens_per_s"] * measured[0]["ms"] / 1e3)
    with _style():
        figure, axes = plt.subplots(figsize=(WIDTH, 1.1 + 0.9 * len(measured)), layout="constrained")
        names = [f"{row['size']}, {row['precision']}" for row in measured]
        whole = [standard[row["size"], row["precision"]] for row in measured]
        axes.barh([f"{kind}, {name}" for name in names for kind in ("standard", "GN")], 0)  # their order
        axes.barh([f"standard, {name}" for name in names], whole, color="0.6")
        left = [0.0] * len(measured)
        for part, colour in zip(measured[0]["parts"], sns.color_palette("colorblind"), strict=False):
            width = [row["parts"][part] for row in measured]
            axes.barh([f"GN, {name}" for name in names], width, left=left, color=colour, label=part)
            left = [before + ms for before, ms in zip(left, width, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="Milliseconds a standard step, or an inner step of GN")
        axes.set_title(f"What a step costs: {measured[0]['device']}, {tokens} tokens a step", fontsize="medium")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)
    return figure


def save(figure: Figure, table: pd.DataFrame, profile: str, stem: str, folder: Path | None = None) -> Path:
    """Write figures/<profile>/<stem>.png, .pdf and .csv (the table behind the figure), or into `folder`; returns it."""
    folder = folder or home() / "figures" / profile
    # no dates: the same records give the same bytes
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with replacing(folder / f"{stem}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, dpi=200, metadata=metadata)
    with replacing(folder / f"{stem}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return folder
