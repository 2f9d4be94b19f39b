"""Tables -> figures, one function each; the same colour for a method everywhere. Needs the `figures` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gnlib.files import home, replacing
from gnlib.profiles import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {
    "outer_step": "Outer step",
    "tokens": "Tokens processed, line search included",
    "flops": "Matrix-product FLOPs",
    "wall_s": "Seconds",
}
WIDTH = 5.5  # inches: one column


def colours() -> dict[str, tuple[float, float, float]]:
    """Method label -> colour of seaborn's colour-blind palette."""
    import seaborn as sns

    return dict(zip((method.label for method in METHODS.values()), sns.color_palette("colorblind"), strict=False))


def loss_curves(curves: pd.DataFrame, target: float, axis: str = "outer_step", title: str = "") -> Figure:
    """Validation loss against `axis` (a key of AXES), one line a method, seeds as a band from lowest to highest."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    with sns.axes_style("whitegrid", {"grid.color": "0.9"}), sns.plotting_context("paper", rc={"grid.linewidth": 0.6}):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.7), layout="constrained")
        order = [name for name in colours() if name in set(curves["method"])]
        for name in order:
            _band(axes, curves[curves["method"] == name], axis, name)
        axes.axhline(target, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
        axes.text(0.99, target, f"target {target:g}", ha="right", va="bottom", transform=axes.get_yaxis_transform())
        n = curves.groupby("method")["seed"].nunique().max()
        note = "1 seed" if n == 1 else f"mean of {n} seeds, band: lowest to highest"
        axes.set(xlabel=AXES[axis], ylabel="Validation loss (nats per token)")
        axes.set_title(f"{title}\n{note}", fontsize="medium")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)  # the notebook shows the returned figure once
    return figure


def _band(axes: Axes, frame: pd.DataFrame, axis: str, name: str) -> None:
    """Mean over the seeds that got as far; a run that ended early leaves the band."""
    by_step, colour = frame.groupby("outer_step"), colours().get(name, "black")  # your own is black
    x, loss = by_step[axis].mean(), by_step["val_loss"]
    axes.plot(x, loss.mean(), color=colour, label=name, marker="o", markersize=2.5, linewidth=1.2)
    axes.fill_between(x, loss.min(), loss.max(), color=colour, alpha=0.2, linewidth=0)


def curves_by_batch(curves: pd.DataFrame, target: float, title: str = "") -> Figure:
    """Validation loss against outer step, a panel a batch size, the largest first."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    batches, present = sorted(set(curves["batch"]), reverse=True), set(curves["method"])
    size, known = (WIDTH if len(batches) == 1 else 1.5 * WIDTH, 3.7), colours()
    with sns.axes_style("whitegrid", {"grid.color": "0.9"}), sns.plotting_context("paper", rc={"grid.linewidth": 0.6}):
        figure, row = plt.subplots(ncols=len(batches), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, batch in zip(row[0], batches, strict=True):
            for name in [*(name for name in known if name in present), *sorted(present - known.keys())]:
                _band(axes, curves[(curves["method"] == name) & (curves["batch"] == batch)], "outer_step", name)
            axes.axhline(target, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
            axes.set(xlabel=AXES["outer_step"])
            axes.set_title(f"batch of {batch} tokens", fontsize="medium")
        row[0, 0].set(ylabel="Validation loss (nats per token)")
        figure.legend(*row[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{title}, target {target:g}", fontsize="medium")
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
