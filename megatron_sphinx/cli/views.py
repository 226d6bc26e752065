"""Print what skipping the views that show no part of a picture saves, for the pictures of prepared data.

    megatron-sphinx views INDEX... [--preset sphinx_plus]

INDEX is a folder that `megatron-sphinx prepare pairs` or `prepare conversations` made; only its sizes are read, no
picture. For 5 and 10 views and both paddings: views that are encoded, positions in the sequence and GFLOP of the
preset's encoders, each the mean of an image, and what is saved of all views and of their positions; the share of the
views is that of the encoders' work too. Then how many pictures have which ratio of their sides. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sphinx.errors import DataError

if TYPE_CHECKING:
    from megatron_sphinx.model.architecture import VisionConfig

Sizes = Counter[tuple[int, int]]  # how many pictures have a width and height
SAMPLES_AT_ONCE = 2**20
# The least longer over shorter side of each, as whole numbers: where a part of the square begins to be empty.
RATIOS = {"1:1": (1, 1), "below 3:2": (1, 1), "3:2 to 2:1": (3, 2), "2:1 to 3:1": (2, 1), "3:1 and more": (3, 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("indexes", type=Path, nargs="+", metavar="INDEX")
    parser.add_argument(
        "--preset", type=Path, default=Path("sphinx_plus"), help="or a configuration; default: sphinx_plus"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx import config as configuration
    from megatron_sphinx.model.expert_work import WORK

    vision = replace(configuration.load(args.preset).vision, skip_padding_views=True)
    sizes = sizes_of(args.indexes)
    gflop = sum(WORK[item.name].flops for item in vision.experts) / 1e9
    rows = [
        saved(sizes, replace(vision, views=views, padding=padding), gflop)
        for views in (5, 10)
        for padding in ("corner", "centre")
    ]
    ratios = aspect_ratios(sizes)
    print(f"{sizes.total():,} pictures, {args.preset}: {gflop:,.0f} GFLOP a view")
    print(_table(rows, ratios))
    pictures = {"pictures": sizes.total(), "preset": str(args.preset), "gflop_per_view": gflop}
    print(json.dumps({**pictures, "rows": rows, "aspect_ratios": ratios}))
    return 0


def sizes_of(folders: Sequence[Path]) -> Sizes:
    """Count the sizes of all pictures of some indexes; a conversation may have none.

    Raises:
        DataError: a folder holds no index, or none of them a picture.
    """
    from megatron_sphinx.data.pairs import SampleIndex

    counts: Sizes = Counter()
    for folder in folders:
        index = SampleIndex([folder], _key_of(folder))
        for first in range(0, len(index), SAMPLES_AT_ONCE):
            sizes = index.sizes(first, min(first + SAMPLES_AT_ONCE, len(index)))
            counts.update(zip(sizes.width.tolist(), sizes.height.tolist(), strict=True))
    counts.pop((0, 0), None)
    if not counts:
        raise DataError(f"{', '.join(map(str, folders))}: no picture; give an index of samples with pictures")
    return counts


def _key_of(folder: Path) -> str:
    """What an index is of: pairs or conversations; where there is none SampleIndex says so."""
    from megatron_sphinx import parsing

    try:
        content = parsing.read_json(folder / "index.json")
    except (OSError, ValueError):
        return "pairs"
    return "conversations" if isinstance(content, dict) and content.get("of") == "conversations" else "pairs"


def saved(sizes: Sizes, vision: VisionConfig, gflop_per_view: float) -> dict[str, Any]:
    """Work out what skipping saves with these views and this padding: means of an image, and shares."""
    from megatron_sphinx.model.views import encoded_views, image_positions

    pictures, views, positions = sizes.total(), 0, 0
    for (width, height), count in sizes.items():
        encoded = len(encoded_views(width, height, vision))
        views += count * encoded
        positions += count * image_positions(encoded, vision)
    return {
        "pixels": vision.released_pixels,
        "views": vision.views,
        "padding": vision.padding,
        "encoded_views": views / pictures,
        "positions": positions / pictures,
        "encoder_gflop": gflop_per_view * views / pictures,
        "views_saved": 1 - views / pictures / vision.views,
        "positions_saved": 1 - positions / pictures / vision.most_image_positions,
    }


def aspect_ratios(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Shares of the wide and of the tall pictures with each ratio of the sides; squares count as wide."""
    counts = {name: {"wide": 0, "tall": 0} for name in RATIOS}
    for (width, height), count in sizes.items():
        longer, shorter = max(width, height), min(width, height)
        reached = [name for name, (most, least) in RATIOS.items() if longer * least >= shorter * most]
        name = "1:1" if longer == shorter else reached[-1]
        counts[name]["tall" if height > width else "wide"] += count
    return {name: {side: count / sizes.total() for side, count in row.items()} for name, row in counts.items()}


def _table(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, Mapping[str, float]]) -> str:
    """What skipping saves, and the shapes of the pictures, as text."""
    lines = ["pixels  views  padding  encoded views  positions  encoder GFLOP  views saved  positions saved"]
    lines += [
        f"{row['pixels']:6}{row['views']:7}  {row['padding']:7}{row['encoded_views']:15.3f}"
        f"{row['positions']:11,.1f}{row['encoder_gflop']:15,.0f}"
        f"{row['views_saved']:13.1%}{row['positions_saved']:17.1%}"
        for row in rows
    ]
    lines.append("sides            wide    tall")
    lines += [f"{name:13}{row['wide']:8.1%}{row['tall']:8.1%}" for name, row in ratios.items()]
    return "\n".join(lines)
