"""Plots of a report: figures with their intervals beside those of a paper, and those of the parts of a benchmark."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sphinx.evaluation.scores import Figure, Part

_ROOM = 1.15  # of the longest bar, up to the edge


@dataclass(frozen=True)
class Bar:
    """A figure to plot.

    Attributes:
        title: of its benchmark.
        figure: the figure with its interval.
        paper: what the paper has there; None for nothing.
    """

    title: str
    figure: Figure
    paper: float | None


def plot_figures(bars: Sequence[Bar], paper: str) -> bytes:
    """Plot figures with their intervals, each in its own unit; return the content of a PNG.

    Args:
        bars: the figures.
        paper: the name of the model that the paper's figures are of.
    """
    figure, rows = canvas(max(1, len(bars)), 0.55)
    for row, bar in zip(rows, bars, strict=False):
        one = bar.figure
        arms = [[max(0.0, one.value - one.low)], [max(0.0, one.high - one.value)]]
        row.barh([0], [one.value], color="C0", xerr=arms, capsize=3)
        if bar.paper is not None:
            row.plot([bar.paper, bar.paper], [-0.45, 0.45], color="C3", label=f"{paper} in its paper")
            row.legend(fontsize="x-small", loc="lower right")
        row.set(yticks=[0], yticklabels=[bar.title], xlim=(0, _ROOM * max(one.high, bar.paper or 0, 1e-9)))
        row.tick_params(labelsize="small")
    return png(figure)


def plot_parts(parts: Mapping[str, Part], name: str) -> bytes:
    """Plot the figures of a benchmark's parts; return the content of a PNG.

    Args:
        parts: by their names; those without a figure are left out.
        name: of the figure.
    """
    shown = {title: part.value for title, part in parts.items() if part.value is not None}
    figure, (axes,) = canvas(1, 0.28 * len(shown))
    axes.barh(list(shown), list(shown.values()), color="C0")
    axes.invert_yaxis()
    axes.set(xlabel=name, xlim=(0, _ROOM * max([*shown.values(), 1e-9])))
    axes.tick_params(labelsize="small")
    return png(figure)


def canvas(rows: int, inches: float) -> tuple[Any, Sequence[Any]]:
    """Make a figure with so many axes below each other, each so many inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(9, 1 + inches * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0].tolist()


def png(figure: Any) -> bytes:
    """Return the content of a file that shows a figure; equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
