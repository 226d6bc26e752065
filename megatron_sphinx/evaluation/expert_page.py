"""The report of a look at MoE experts: a page with tables and plots, and JSON with every figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sphinx.data.files import renamed
from megatron_sphinx.errors import DataError, remedy_of
from megatron_sphinx.evaluation.expert_look import Look
from megatron_sphinx.evaluation.expert_plots import (
    lines_of_evenness,
    plot_lines,
    plot_points,
    plot_together,
    plot_usage,
)
from megatron_sphinx.evaluation.expert_routing import (
    Divergence,
    RoutingCounts,
    Uniform,
    figures_of,
)
from megatron_sphinx.evaluation.expert_sweep import Point, Pruned
from megatron_sphinx.evaluation.pages import Block, Heading, Paragraph, Plot, Table, html, markdown

_INTRODUCTION = (
    "Shares are of assignments: a token that two experts compute counts twice. Evenness is the entropy of the shares "
    "over that of equal ones. Divergence is Jensen and Shannon's, in bits, of the shares of a layer's experts; for its "
    "interval pictures are drawn with repetition, and for what chance gives (95 %) shuffled between both groups."
)


def write_look(
    folder: Path, name: str, found: Look, pruned: Sequence[Pruned], points: Sequence[Point], trained: int
) -> Path:
    """Write what was seen of a model's experts; return the page in Markdown.

    Args:
        folder: where; the files are experts.json, experts.md, experts.html, plots, and kept experts.
        name: of the model.
        found: what was seen.
        pruned: which experts were chosen to be kept.
        points: what the model reaches with other experts; none where nobody asked.
        trained: how many experts were active in training.

    Raises:
        DataError: the folder cannot be written.
    """
    divergences = _divergences(found.counts)
    blocks: list[Block] = [Heading(f"The experts of {name}", 1), Paragraph(_INTRODUCTION)]
    for counts in found.counts:
        blocks += _of_data_set(counts)
    blocks += [Heading("Evenness"), Plot("evenness.png", "evenness by layer", _evenness(found.counts))]
    blocks += _of_divergences(divergences)
    blocks += _of_pruned(pruned, found)
    if points:
        blocks += _of_points(points, trained)
    content: dict[str, Any] = {
        "model": name,
        "faults": found.faults,
        "data": {one.name: figures_of(one) for one in found.counts},
        "divergence": {
            title: {part: values.tolist() for part, values in asdict(one).items()} for title, one in divergences.items()
        },
        "pruned": {one.name: [list(row) for row in one.kept.layers] for one in pruned},
        "sweep": [{"name": point.name, "active": point.active, "figures": dict(point.figures)} for point in points],
    }
    texts = {
        "experts.json": json.dumps(content, indent=1),
        "experts.md": markdown(blocks),
        "experts.html": html(blocks),
    }
    for one in pruned:
        texts[f"kept_{one.name}.json"] = one.kept.as_json(model=name, method=one.method.value, seed=one.seed)
    files = {one: text.encode() for one, text in texts.items()}
    files |= {block.name: block.content for block in blocks if isinstance(block, Plot)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            with renamed(folder / file) as partial:
                partial.write_bytes(data)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); {remedy_of(error)}") from error
    return folder / "experts.md"


def _evenness(counts: Sequence[RoutingCounts]) -> bytes:
    return plot_lines(lines_of_evenness(counts), "entropy / log of the number of experts")


def _of_data_set(counts: RoutingCounts) -> list[Block]:
    """Return what the page says of a data set."""
    figures: Mapping[str, Any] = figures_of(counts)
    uniform = Uniform.of(counts.experts, counts.choices)
    tokens = ", ".join(f"{count:,} {kind}" for kind, count in figures["tokens"].items() if count)
    head = ["layer", "largest share", "smallest share", "evenness", "weight of first choice"]
    head += [f"{which} repeated, {kind}" for which in ("first", "any") for kind in ("text", "image")]
    rows = [
        (
            str(layer), f"{max(shares):.1%}", f"{min(shares):.1%}", f"{figures['evenness']['both'][layer]:.3f}",
            f"{figures['first_weight'][layer]:.3f}",
            *(_percent(figures[f"{which}_repeated"][kind][layer]) for which in ("first", "any")
              for kind in ("text", "image")),
        )
        for layer, shares in enumerate(figures["share"]["both"])
    ]  # fmt: skip
    share, any_repeated = f"{uniform.share:.1%}", f"{uniform.any_repeated:.1%}"
    rows.append(("uniform", share, share, "1.000", "", share, share, any_repeated, any_repeated))
    return [
        Heading(counts.name),
        Paragraph(f"{figures['units']} pictures or questions; tokens by kind: {tokens}."),
        Table(tuple(head), tuple(rows)),
        Plot(f"usage_{counts.name}.png", f"usage of experts: {counts.name}", plot_usage(counts)),
        Plot(f"together_{counts.name}.png", f"experts that compute together: {counts.name}", plot_together(counts)),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _divergences(counts: Sequence[RoutingCounts]) -> dict[str, Divergence]:
    """Compare data sets with each other, and in each the tokens of images with those of text."""
    found = {}
    for one, other in combinations(counts, 2):
        found[f"{one.name} and {other.name}"] = Divergence.between(one.of_kinds(one.kinds), other.of_kinds(other.kinds))
    for one in counts:
        image, text = (one.of_kinds(one.groups[kind]) for kind in ("image", "text"))
        if image.sum() and text.sum():
            found[f"{one.name}: image and text"] = Divergence.between(image, text)
    return found


def _of_divergences(divergences: Mapping[str, Divergence]) -> list[Block]:
    """Return what the page says of groups of tokens."""
    if not divergences:
        return []
    rows = [
        (name, str(layer), f"{one.value[layer]:.4f}", f"{one.low[layer]:.4f} to {one.high[layer]:.4f}",
         f"{one.chance[layer]:.4f}")
        for name, one in divergences.items()
        for layer in range(len(one.value))
    ]  # fmt: skip
    plot = plot_lines({name: one.value for name, one in divergences.items()}, "divergence, bits", divergences)
    return [
        Heading("Divergence"),
        Table(("groups", "layer", "bits", "95 % interval", "chance"), tuple(rows)),
        Plot("divergence.png", "divergence by layer", plot),
    ]


def _of_pruned(pruned: Sequence[Pruned], found: Look) -> list[Block]:
    """Return what the page says of experts that were chosen to be kept."""
    if not pruned:
        return []
    rows = []
    for one in pruned:
        errors = [
            (found.errors[layer][row] / found.norms[layer]) ** 0.5
            for layer, row in enumerate(one.kept.layers)
            if row in found.errors.get(layer, {})
        ]
        rows.append((one.name, str(one.kept), f"{np.mean(errors):.3f}" if errors else ""))
    head = ("chosen by", "kept in each layer", "relative error of a layer's output, mean")
    return [Heading("Pruning"), Table(head, tuple(rows), words=2)]


def _of_points(points: Sequence[Point], trained: int) -> list[Block]:
    """Return what the page says of a sweep."""
    tasks = list(points[0].figures)
    rows = [(point.name, str(point.active), *(f"{point.figures[task]:.2f}" for task in tasks)) for point in points]
    return [
        Heading("With other experts"),
        Table(("experts", "active", *tasks), tuple(rows)),
        Plot("sweep.png", "figures with other experts", plot_points(points, trained)),
    ]
