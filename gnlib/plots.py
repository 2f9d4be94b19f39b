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
        _panel(axes, curves, target, axis)
        axes.set(ylabel="Validation loss (nats per token)")
        axes.set_title(f"{title}\n{_seeds(curves)}", fontsize="medium")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)  # the notebook shows the returned figure once
    return figure


def loss_by_batch(curves: pd.DataFrame, target: float, title: str = "") -> Figure:
    """Validation loss against outer step, a panel a batch size, the largest first."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    batches = sorted(set(curves["batch"]), reverse=True)
    with sns.axes_style("whitegrid", {"grid.color": "0.9"}), sns.plotting_context("paper", rc={"grid.linewidth": 0.6}):
        size = (WIDTH if len(batches) == 1 else 1.5 * WIDTH, 3.7)
        figure, panels = plt.subplots(
            ncols=len(batches), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axes, batch in zip(panels[0], batches, strict=True):
            _panel(axes, curves[curves["batch"] == batch], target, "outer_step")
            axes.set_title(f"batch of {batch} tokens", fontsize="medium")
        panels[0, 0].set(ylabel="Validation loss (nats per token)")
        shown = {name: line for axes in panels[0] for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{title}\n{_seeds(curves)}", fontsize="medium")
    plt.close(figure)
    return figure


def _panel(axes: Axes, curves: pd.DataFrame, target: float, axis: str) -> None:
    """A line a method in the order of `profiles.METHODS`, your own last and black, and the target."""
    present, known = set(curves["method"]), colours()
    for name in [*(name for name in known if name in present), *sorted(present - known.keys())]:
        _band(axes, curves[curves["method"] == name], axis, name, known.get(name, (0, 0, 0)))
    axes.axhline(target, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
    axes.text(0.99, target, f"target {target:g}", ha="right", va="bottom", transform=axes.get_yaxis_transform())
    axes.set(xlabel=AXES[axis])


def _seeds(curves: pd.DataFrame) -> str:
    n = curves.groupby("method")["seed"].nunique().max()
    return "1 seed" if n == 1 else f"mean of {n} seeds, band: lowest to highest"


def _band(axes: Axes, frame: pd.DataFrame, axis: str, name: str, colour: tuple[float, float, float]) -> None:
    """Mean over the seeds that got as far; a run that ended early leaves the band."""
    by_step = frame.groupby("outer_step")
    x, loss = by_step[axis].mean(), by_step["val_loss"]
    axes.plot(x, loss.mean(), color=colour, label=name, marker="o", markersize=2.5, linewidth=1.2)
    axes.fill_between(x, loss.min(), loss.max(), color=colour, alpha=0.2, linewidth=0)


def save(figure: Figure, table: pd.DataFrame, profile: str, stem: str) -> Path:
    """Write figures/<profile>/<stem>.png, .pdf and .csv (the table behind the figure); returns the folder."""
    return write(figure, table, home() / "figures" / profile, stem)


def write(figure: Figure, table: pd.DataFrame, folder: Path, stem: str) -> Path:
    """The same in another folder."""
    # no dates: the same records give the same bytes
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with replacing(folder / f"{stem}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, dpi=200, metadata=metadata)
    with replacing(folder / f"{stem}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return folder
