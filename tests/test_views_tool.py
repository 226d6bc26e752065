"""tools/views.py: what skipping views saves for the pictures of an index."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_sphinx.model.views import place, views_of

TOOLS = Path(__file__).parents[1] / "tools"


# tools/views.py


@pytest.fixture
def run_views(tiny, tmp_path, monkeypatch, capsys):
    """`run_views(*indexes)` runs tools/views.py for the small encoders; its status, and what it printed."""
    config = tiny.write(tmp_path / "c.yaml")

    def run(*indexes: Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["views.py", *map(str, indexes), "--preset", str(config)])
        status = runpy.run_path(str(TOOLS / "views.py"))["main"]()
        out, error = capsys.readouterr()
        return status, out.splitlines(), error

    return run


def shown(width: int, height: int, views: int, padding: str) -> int:
    """How many views hold a pixel of a picture: painted, so enlarged that the parts have whole pixels."""
    parts, side = {5: 2, 10: 3}[views], max(width, height)
    square = np.zeros((side * parts, side * parts), bool)
    left, top = (number * parts for number in place(width, height, padding))
    square[top : top + height * parts, left : left + width * parts] = True
    cuts = (square[y * side : (y + 1) * side, x * side : (x + 1) * side] for y in range(parts) for x in range(parts))
    assert len(views_of(parts)) == views
    return 1 + sum(bool(cut.any()) for cut in cuts)


def ratio_name(width: int, height: int) -> str:
    ratio = max(width, height) / min(width, height)
    limits = ((1, "1:1"), (1.4999, "below 3:2"), (1.9999, "3:2 to 2:1"), (2.9999, "2:1 to 3:1"))
    return next((name for limit, name in limits if ratio <= limit), "3:1 and more")


def test_what_skipping_saves(run_views, tiny, dialogs):
    """Pairs and conversations together, the latter one in four without a picture."""
    with_picture = [*range(60), *(number for number in range(40) if number % 4 != 3)]
    sizes = [Image.open(tiny.folder / "pictures" / f"{number:03d}.png").size for number in with_picture]
    status, lines, _ = run_views(tiny.folder / "pairs", dialogs)
    found = json.loads(lines[-1])
    assert (status, found["pictures"], len(found["rows"])) == (0, 90, 4)
    for row in found["rows"]:
        counts = np.array([shown(*size, row["views"], row["padding"]) for size in sizes])
        positions = counts * 19 + (row["views"] - counts)
        assert row["encoded_views"] == pytest.approx(counts.mean())
        assert row["positions"] == pytest.approx(positions.mean())
        assert row["encoder_gflop"] == pytest.approx(counts.mean() * found["gflop_per_view"])
        assert row["views_saved"] == pytest.approx(1 - counts.sum() / (90 * row["views"]))
        assert row["positions_saved"] == pytest.approx(1 - positions.sum() / (90 * row["views"] * 19))
        assert row["pixels"] == {5: 112, 10: 168}[row["views"]]
    assert [(row["views"], row["padding"]) for row in found["rows"]] == [
        (5, "corner"), (5, "centre"), (10, "corner"), (10, "centre"),
    ]  # fmt: skip
    assert 0.02 < found["rows"][0]["views_saved"] < found["rows"][2]["views_saved"]
    for name, shares in found["aspect_ratios"].items():
        wide = sum(width >= height and ratio_name(width, height) == name for width, height in sizes)
        tall = sum(width < height and ratio_name(width, height) == name for width, height in sizes)
        assert (shares["wide"], shares["tall"]) == pytest.approx((wide / 90, tall / 90))
    row = next(line for line in lines if line.startswith("   112      5  corner")).split()
    assert float(row[3]) == pytest.approx(found["rows"][0]["encoded_views"], abs=5e-4)


def test_an_index_that_is_none(run_views, tmp_path):
    status, _, error = run_views(tmp_path)
    assert status == 2
    assert "index.json: No such file or directory; make the index by megatron-sphinx prepare pairs" in error
