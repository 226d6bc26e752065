"""Plots of a look at MoE experts: usage by layer, evenness, divergence, and what the model reaches with fewer.

Source: figures 5 to 7 of SPHINX-X, arXiv:2402.05935.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sphinx.evaluation.expert_pruning import Pruning
from megatron_sphinx.evaluation.expert_routing import Divergence, RoutingCounts, Shares, Uniform, evenness, shares_of
from megatron_sphinx.evaluation.expert_sweep import Point
from megatron_sphinx.evaluation.plots import canvas, png

_MARKS = {Pruning.RANDOM: ("o", -0.08), Pruning.USAGE: ("s", 0.0), Pruning.RECONSTRUCTION: ("^", 0.08)}  # and shift


def plot_usage(counts: RoutingCounts) -> bytes:
    """Plot the share of each expert in each layer for tokens of images, of text, and of both, as a PNG.

    Args:
        counts: of a data set.
    """
    groups = {name: counts.of_kinds(kinds).sum(0) for name, kinds in counts.groups.items()}
    shown = {name: shares_of(one) for name, one in groups.items() if one.sum()}
    figure, rows = canvas(len(shown), 2.0)
    uniform = Uniform.of(counts.experts, counts.choices).share
    for axes, (name, shares) in zip(rows, shown.items(), strict=True):
        drawn = axes.imshow(shares.T, aspect="auto", cmap="coolwarm", vmin=0, vmax=2 * uniform, origin="lower")
        axes.set(title=f"{counts.name}: {name}", xlabel="layer", ylabel="expert")
        _count_along(axes.xaxis, axes.yaxis)
        figure.colorbar(drawn, ax=axes, label=f"share; uniform: {uniform:.1%}")
    return png(figure)


def plot_lines(lines: Mapping[str, Shares], ylabel: str, bands: Mapping[str, Divergence] | None = None) -> bytes:
    """Plot figures [layers] over the layers, as a PNG.

    Args:
        lines: by the name that the legend has.
        ylabel: what they are.
        bands: those of which the interval and the level of chance are drawn, too.
    """
    figure, (axes,) = canvas(1, 3.5)
    for number, (name, values) in enumerate(lines.items()):
        layers = np.arange(len(values))
        axes.plot(layers, values, marker="o", color=f"C{number}", label=name)
        if bands is not None:
            axes.fill_between(layers, bands[name].low, bands[name].high, color=f"C{number}", alpha=0.2)
            axes.plot(layers, bands[name].chance, linestyle="dotted", color=f"C{number}", label=f"{name}: chance")
    axes.set(xlabel="layer", ylabel=ylabel)
    _count_along(axes.xaxis)
    axes.legend(fontsize="x-small")
    return png(figure)


def _count_along(*axes: Any) -> None:
    """Let axes have whole numbers alone."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def lines_of_evenness(counts: Sequence[RoutingCounts]) -> dict[str, Shares]:
    """Return how evenly the experts of each layer are used, by data set and kind of token."""
    return {
        f"{one.name}: {name}": evenness(shares_of(group))
        for one in counts
        for name, kinds in one.groups.items()
        if (group := one.of_kinds(kinds).sum(0)).sum()
    }


def plot_together(counts: RoutingCounts) -> bytes:
    """Plot how often two experts compute a token together in the first, the middle and the last layer, as a PNG."""
    layers = sorted({0, len(counts.together) // 2, len(counts.together) - 1})
    figure, rows = canvas(len(layers), 2.4)
    for axes, layer in zip(rows, layers, strict=True):
        shares = counts.together[layer] / np.diagonal(counts.together[layer]).clip(1)[:, None]
        drawn = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        axes.set(title=f"{counts.name}: layer {layer}", xlabel="expert", ylabel="expert")
        figure.colorbar(drawn, ax=axes, label="share of the row's tokens")
    return png(figure)


def plot_points(points: Sequence[Point], trained: int) -> bytes:
    """Plot what a model reaches with other numbers of active experts, and with pruned ones, as a PNG.

    Args:
        points: of a sweep.
        trained: how many experts were active in training.
    """
    has_pruned = any(point.pruned is not None for point in points)
    figure, rows = canvas(1 + has_pruned, 3.0)
    active = [point for point in points if point.pruned is None]
    for number, task in enumerate(points[0].figures):
        rows[0].plot([p.active for p in active], [p.figures[task] for p in active], marker="o", label=task)
        if has_pruned:
            _plot_pruned(rows[1], points, task, f"C{number}")
    rows[0].axvline(trained, color="gray", linestyle="dotted", label="as trained")
    for axes, label in zip(rows, ("active experts", "experts kept in each layer"), strict=False):
        axes.set(xlabel=label)
        _count_along(axes.xaxis)
        axes.legend(fontsize="x-small")
    return png(figure)


def _plot_pruned(axes: Any, points: Sequence[Point], task: str, color: str) -> None:
    """Plot the figures of a task with pruned experts: random runs with their mean dotted, other methods as marks."""
    for method, (mark, shift) in _MARKS.items():
        found: dict[int, list[float]] = defaultdict(list)
        for point in points:
            if point.pruned is not None and point.pruned.method is method:
                found[point.pruned.keep].append(point.figures[task])
        if not found:
            continue
        places = [(keep + shift, value) for keep, values in found.items() for value in values]
        axes.plot(*zip(*places, strict=True), mark, color=color, label=f"{task}: {method.value}")
        if method is Pruning.RANDOM:
            means = sorted((keep + shift, float(np.mean(values))) for keep, values in found.items())
            axes.plot(*zip(*means, strict=True), linestyle="dotted", color=color)
