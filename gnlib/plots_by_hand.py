"""The pictures of notebook 00. Needs the `figures` extra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnlib.blocks import Block
from gnlib.by_hand import Path, Problem
from gnlib.plots import WIDTH, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_LABELS = ("y = 0", "y = 1")
DPI = 120  # a pixel or more for each entry of the decoder's matrices


def step_colours() -> dict[str, tuple[float, float, float]]:
    """Names in this notebook -> colours; Gauss-Newton and prox-linear as in all others."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    methods = colours()
    return {
        "Gauss-Newton": methods["GN"], "GN-prox-linear": methods["GN-prox-linear"],
        "Newton": palette[3], "gradient": (0.0, 0.0, 0.0), "layer": palette[1],
    }


def _axes(height: float, columns: int = 1, style: str = "whitegrid", sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of one column's width; closed at once, since the notebook shows the returned figure."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    with sns.axes_style(style), sns.plotting_context("paper"):
        figure, axes = plt.subplots(
            1, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, sharey=sharey, dpi=DPI
        )
    plt.close(figure)
    return figure, list(axes[0])


def curve_figure(problem: Problem, curves: Mapping[str, Tensor]) -> Figure:
    """The labels as ticks, their share in 20 bins, and a logistic curve for each of two thetas."""
    figure, (axes,) = _axes(2.6)
    x, y = problem.inputs, problem.targets.double()
    for value, (name, place) in enumerate(zip(CLASS_LABELS, (-0.06, 1.06), strict=True)):
        axes.plot(x[y == value], torch.full_like(x[y == value], place), "|", color="0.4", markersize=5, alpha=0.6)
        axes.annotate(name, (3.08, place), va="center", annotation_clip=False, fontsize=8)
    axes.plot(x.view(20, -1).mean(1), y.view(20, -1).mean(1), "o", color="0.4", markersize=3.5, label="share of y = 1")
    for line, (name, (slope, threshold)) in zip(("--", "-"), curves.items(), strict=False):
        label = f"{name}: a = {slope:.2f}, b = {threshold:.2f}"
        axes.plot(x, torch.sigmoid(slope * (x - threshold)), line, color="black", linewidth=1.3, label=label)
    axes.set(xlabel="x", ylabel="P(y = 1 | x)", yticks=[0, 0.5, 1], xlim=(-3.2, 3.6), ylim=(-0.12, 1.12))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False, columnspacing=1.2)
    return figure


def _grid(slopes: tuple[float, float], thresholds: tuple[float, float], points: int = 121) -> tuple[Tensor, ...]:
    a = torch.linspace(*slopes, points, dtype=torch.float64)
    b = torch.linspace(*thresholds, points, dtype=torch.float64)
    slope, threshold = torch.meshgrid(a, b, indexing="xy")
    return slope, threshold, torch.stack([slope, threshold], dim=-1).flatten(0, 1)


def contour_figure(
    problem: Problem,
    steps: Mapping[str, Tensor],
    minimum: Tensor,
    slopes: tuple[float, float] = (-0.75, 2.5),
    thresholds: tuple[float, float] = (-3.0, 3.0),
) -> Figure:
    """The true loss over (a, b), the Gauss-Newton quadratic around the start, and an arrow for each step."""
    import seaborn as sns

    figure, (axes,) = _axes(4.0, style="ticks")
    slope, threshold, points = _grid(slopes, thresholds)
    loss = torch.vmap(problem.objective)(points).view_as(slope)
    low = loss.min().item()
    levels = [low + 0.015 * 1.55**i for i in range(11)]
    axes.contourf(slope, threshold, loss, [low, *levels], cmap=sns.light_palette("0.45", as_cmap=True, reverse=True),
                  extend="max")
    palette = step_colours()
    delta = points - problem.theta
    quadratic = delta @ problem.gradient() + 0.5 * ((delta @ problem.gauss_newton()) * delta).sum(-1)
    bottom = quadratic.min().item()
    rings = [bottom * (1 - fraction) for fraction in (0.03, 0.25, 1.0, 2.25)]
    axes.contour(slope, threshold, quadratic.view_as(slope), rings, colors=[palette["Gauss-Newton"]], linewidths=0.9,
                 linestyles="dashed")
    axes.plot([], [], "--", color=palette["Gauss-Newton"], linewidth=0.9, label="level lines of the GN quadratic")
    for name, step in steps.items():
        _arrow(axes, problem.theta, problem.theta + step, palette[name])
        what = "direction" if name == "gradient" else "step"
        axes.plot([], [], "-", color=palette[name], linewidth=2, label=f"{name} {what}")
    axes.plot(*problem.theta, "o", color="black", markersize=5, linestyle="", label="start")
    axes.plot(*minimum, "*", color="black", markersize=10, linestyle="", label="minimum of the loss")
    axes.set(xlabel="slope a", ylabel="threshold b", xlim=slopes, ylim=thresholds)
    axes.set_title("Shading: true loss, darker is lower", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _arrow(axes: Axes, start: Tensor, end: Tensor, colour: tuple[float, float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", tuple(end.tolist()), tuple(start.tolist()), arrowprops=style)


def matrix_figure(matrices: Mapping[str, Tensor], problem: Problem, blocks: Sequence[Block]) -> Figure:
    """|entries| on a log scale side by side, each block of parameters outlined on the diagonal."""
    import seaborn as sns
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Rectangle

    figure, axes = _axes(3.5, columns=len(matrices), style="ticks", sharey=True)
    shades = sns.color_palette("Greys", 5)  # one a decade
    top = 10.0 ** math.ceil(math.log10(max(matrix.abs().max().item() for matrix in matrices.values())))
    parameters = dict(problem.model.named_parameters())
    sizes = [sum(parameters[name].numel() for name in block) for block in blocks]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    centres = [start + size / 2 - 0.5 for start, size in zip(starts, sizes, strict=True)]
    labels = [_layer(block) for block in blocks]
    for panel, (title, matrix) in zip(axes, matrices.items(), strict=True):
        norm = LogNorm(top * 1e-5, top, clip=True)
        entries = matrix.abs().clamp(min=top * 1e-5).numpy()
        image = panel.imshow(entries, norm=norm, cmap=ListedColormap(shades), interpolation="nearest")
        for start, size in zip(starts, sizes, strict=True):
            panel.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, fill=False, linewidth=1.4,
                                      edgecolor=step_colours()["layer"]))
        panel.set_title(title, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks(centres, labels, fontsize=8)
        panel.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=35, extend="min")
    bar.set_label("|entry|", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _layer(block: Block) -> str:
    first = block[0].split(".")
    return f"block {first[1]}" if first[0] == "blocks" else first[0]


def spectrum_figure(spectra: Mapping[str, Tensor]) -> Figure:
    """Eigenvalues in descending order; a linear scale within 1e-4 of zero, logarithmic beyond."""
    figure, (axes,) = _axes(2.8)
    looks = {"Gauss-Newton": (2.4, "-"), "Newton": (1.4, "-")}
    names = {"Gauss-Newton": "G = JᵀHJ", "Newton": "Hessian of the loss"}
    axes.axhline(0, color="0.3", linewidth=0.8)
    for name, eigenvalues in spectra.items():
        width, line = looks[name]
        ordered = eigenvalues.sort(descending=True).values
        axes.plot(range(1, len(ordered) + 1), ordered, line, color=step_colours()[name], linewidth=width,
                  label=names[name])
    axes.set_yscale("symlog", linthresh=1e-4, linscale=0.6)
    axes.set_yticks([-100, -1, -1e-2, 0, 1e-2, 1, 100])
    axes.set(xlabel="index, from the largest eigenvalue to the smallest", ylabel="eigenvalue")
    axes.legend(fontsize=8)
    return figure


def direction_figure(alphas: Tensor, curves: Mapping[str, Tensor], candidates: Mapping[float, float]) -> Figure:
    """Subproblems and true loss against the step size; the line search's candidates and its choice."""
    figure, (axes,) = _axes(3.1)
    palette = step_colours()
    for name, values in curves.items():
        line = "-" if name == "true loss" else "--"
        axes.plot(alphas, values, line, color=palette.get(name, "black"), linewidth=1.6, label=name)
    chosen = min(candidates, key=lambda size: candidates[size])
    axes.plot(list(candidates), list(candidates.values()), "o", color="black", markersize=4.5, label="candidates")
    axes.plot(chosen, candidates[chosen], "o", color="black", markersize=12, fillstyle="none", label="chosen")
    ticks = sorted(candidates)
    axes.set_xticks(ticks, [f"{size:.2f}" if 0 < size < 1 else f"{size:.0f}" for size in ticks])
    axes.set(xlabel="step size α along the Gauss-Newton direction", ylabel="loss")
    axes.legend(loc="upper center", fontsize=8)
    return figure


def loss_figure(paths: Mapping[str, Path], minimum: float) -> Figure:
    """Loss above the minimum against the outer step."""
    figure, (axes,) = _axes(2.9)
    for name, path in paths.items():
        gaps = [max(loss - minimum, 1e-16) for loss in path.losses]
        axes.plot(gaps, "-o", color=step_colours()[name], markersize=4, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="outer step", ylabel="loss minus its minimum")
    axes.legend(fontsize=8)
    return figure
