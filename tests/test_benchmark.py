"""Variants side by side: what is run, and the arithmetic of the tables; runs are made up here, and nothing is timed."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import size_of
from PIL import Image

from megatron_sphinx import benchmark
from megatron_sphinx.__main__ import main
from megatron_sphinx.benchmark import BenchmarkError
from megatron_sphinx.data.pairs import ImageReader, PairIndex
from megatron_sphinx.model.views import place, views_of

TOOLS = Path(__file__).parents[1] / "tools"


class Runs:
    """Runs that end at once.

    Attributes:
        asked: overrides and ranks of each.
        seconds: of each step of each run, from its overrides and how many there were before it.
        samples: what names a run's samples, from its overrides.
    """

    def __init__(self):
        self.asked, self.seconds, self.samples = [], lambda values, before: [1.0] * 99, lambda values: "sample"

    def __call__(self, config, overrides, ranks):
        values = dict(override.split("=", 1) for override in overrides)
        taken = self.seconds(values, len(self.asked))[: int(values["training.steps"])]
        self.asked.append((values, ranks))
        lines = [
            {
                "step": step,
                "sample_ids": f"{self.samples(values)} {step}",
                "pairs": 12,
                "step_seconds": seconds,
                "tokens_per_second": 600 / seconds,
                "exposed_encoder_seconds": seconds / 4,
                "feature_bytes": 1000 * (step + 1),
            }
            for step, seconds in enumerate(taken)
        ]
        path = Path(values["run.folder"]) / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(monkeypatch):
    fake = Runs()
    monkeypatch.setattr(benchmark, "_run", fake)
    return fake


def test_variants_take_turns_and_their_medians_are_compared(runs, capsys):
    seconds = {"a": ([90, 1, 2, 6], [90, 3, 4, 5]), "b": ([0.1, 8, 8, 8], [0.1, 8, 8, 8])}
    runs.seconds = lambda values, before: seconds[values["x.variant"]][before // 2]
    variants = {"one": ["x.variant=a"], "two": ["x.variant=b", "y=2"]}
    rows = benchmark.compare(Path("c.yaml"), ["y=1", "z=1"], variants, ranks=3, steps=3, warmup=1, repeats=2)
    assert [values["x.variant"] for values, _ in runs.asked] == ["a", "b", "a", "b"]
    assert [values["y"] for values, _ in runs.asked] == ["1", "2", "1", "2"]
    assert {(values["z"], values["training.steps"], ranks) for values, ranks in runs.asked} == {("1", "4", 3)}
    assert rows["one"] == pytest.approx({
        "tokens_per_second": (600 / 3 + 600 / 4) / 2, "samples_per_second": 12 / 3.5, "step_seconds": 3.5,
        "exposed_encoder_share": 0.25, "feature_bytes_per_step": 3000,
    })  # fmt: skip
    assert rows["two"]["samples_per_second"] == 1.5
    assert "run 1/2 of one: 300 tokens/s, 2.000 s/step\n" in capsys.readouterr().out


def test_three_variants_take_turns(runs):
    variants = {name: [f"x={name}"] for name in "abc"}
    rows = benchmark.compare(Path("c.yaml"), [], variants, ranks=1, steps=1, warmup=0, repeats=2)
    assert (list(rows), [values["x"] for values, _ in runs.asked]) == ([*"abc"], [*"abcabc"])


def test_other_samples_are_not_compared(runs):
    runs.samples = lambda values: values["x"]
    with pytest.raises(BenchmarkError, match="b: trained on other samples than the runs before it"):
        benchmark.compare(Path("c.yaml"), [], {"a": ["x=a"], "b": ["x=b"]}, ranks=1, steps=1, warmup=0, repeats=1)


def test_the_command(runs, tiny, tmp_path, capsys):
    runs.seconds = lambda values, before: [2.0, 2.0, 2.0] if values["parallel.encoder"] == "2" else [3.0, 3.0, 3.0]
    config = tiny.write(tmp_path / "c.yaml", {"parallel.encoder": 2})
    options = ["--ranks", "4", "--steps", "2", "--warmup", "1", "--repeats", "2"]
    assert main(["benchmark", str(config), "training.precision=bf16", *options]) == 0
    assert [values["parallel.encoder"] for values, _ in runs.asked] == ["2", "0", "2", "0"]
    assert {(values["training.precision"], ranks) for values, ranks in runs.asked} == {("bf16", 4)}
    *_, head, stage, colocated, last = capsys.readouterr().out.splitlines()
    assert head == "layout            tokens/s   s/step   waiting for features  feature bytes/step"
    assert stage.split() == ["encoder", "stage", "300", "2.000", "25.0%", "2,500"]
    assert colocated.split() == ["colocated", "200", "3.000", "25.0%", "2,500"]
    found = json.loads(last)
    assert (found["ranks"], found["steps"], list(found["layouts"])) == (4, 4, ["encoder stage", "colocated"])
    assert found["ratios"] == {"encoder_stage": pytest.approx(1.5)}
    assert found["layouts"]["encoder stage"]["parallel.encoder"] == 2
    assert found["layouts"]["colocated"]["tokens_per_second"] == 200


# tools/compare/skipping.py


@pytest.mark.parametrize(("views", "encoded", "ranks"), [(5, 3, 3), (10, 4, 1)])
def test_skipping(runs, tiny, tmp_path, run_ranks, views, encoded, ranks):
    runs.seconds = lambda values, before: [0.5 if values["vision.skip_padding_views"] == "true" else 1.25] * 3
    config = tiny.write(tmp_path / "c.yaml")
    options = [config, "data.pairs_per_step=7", "--views", views, "--ranks", ranks, "--steps", 2, "--warmup", 1]

    def work() -> int:
        sys.argv = ["skipping.py", "--config", *map(str, options), "--folder", str(tmp_path / "digits")]
        status = runpy.run_path(str(TOOLS / "compare" / "skipping.py"))["main"]()
        for values, world in runs.asked:
            assert (values["parallel.encoder"], world) == (str(int(ranks > 1)), ranks)
            assert (values["vision.views"], values["vision.padding"]) == (str(views), "corner")
        return status

    *_, skipping, every, last = run_ranks(1, work).text().splitlines()
    found = json.loads(last)
    assert found["ratios"] == {"skipping": pytest.approx(2.5)}
    rows = found["variants"]
    assert (rows["skipping"]["views_per_step"], rows["all views"]["views_per_step"]) == (7 * encoded, 7 * views)
    saved = rows["all views"]["positions_per_step"] - rows["skipping"]["positions_per_step"]
    assert saved == 7 * (views - encoded) * (19 - 1)
    assert skipping.split()[:4] == ["skipping", "24.0", "0.500", str(7 * encoded)]
    assert every.split()[:5] == ["all", "views", "9.6", "1.250", str(7 * views)]
    if views == 5:
        check_captions(tmp_path / "digits" / "pairs", tiny)


def check_captions(folder: Path, tiny) -> None:
    """A caption names the digits of its picture, which scikit-learn has."""
    from sklearn.datasets import load_digits

    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    digits = load_digits()
    inked = 255 - np.rint(digits.images * (255 / 16))
    index = PairIndex([folder])
    assert {size_of(index, pair) for pair in range(len(index))} == {(24, 8)}
    for pair in range(12):
        path = folder / "picture.png"
        path.write_bytes(ImageReader(index).read(pair))
        row = np.asarray(Image.open(path))
        parts = [row[:, 8 * part : 8 * part + 8] for part in range(3)]
        labels = [digits.target[(inked == part).all((1, 2))][0] for part in parts]
        caption = f"The digits {', '.join(words[label] for label in labels)}."
        assert index.caption(pair).tolist() == tiny.tokenizer.encode(caption)


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
    assert (status, "index.json: No such file or directory; make the index by tools/prepare_pairs.py" in error) == (
        2,
        True,
    )
