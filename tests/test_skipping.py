"""tools/compare/skipping.py: encoding all views beside skipping those of padding, on made-up runs."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import size_of
from PIL import Image

from megatron_sphinx.data.pairs import ImageReader, SampleIndex

pytest_plugins = ["fake_runs"]

TOOLS = Path(__file__).parents[1] / "tools"


# tools/compare/skipping.py


@pytest.mark.parametrize(("views", "encoded", "ranks"), [(5, 3, 3), (10, 4, 1)])
def test_skipping(runs, tiny, tmp_path, run_ranks, views, encoded, ranks):
    runs.seconds = lambda config, before: [0.5 if config.vision.skip_padding_views else 1.25] * 3
    config = tiny.write(tmp_path / "c.yaml")
    options = [config, "data.pairs_per_step=7", "--views", views, "--ranks", ranks, "--steps", 2, "--warmup", 1]

    def work() -> int:
        sys.argv = ["skipping.py", "--config", *map(str, options), "--folder", str(tmp_path / "digits")]
        status = runpy.run_path(str(TOOLS / "compare" / "skipping.py"))["main"]()
        for config, world in runs.asked:
            assert (config.parallel.encoder, world) == (int(ranks > 1), ranks)
            assert (config.vision.views, config.vision.padding) == (views, "corner")
        return status

    *_, skipping, every, last = run_ranks(1, work).text().splitlines()
    found = json.loads(last)
    assert found["ratios"] == {"skipping": pytest.approx(2.5)}
    rows = found["variants"]
    assert (rows["skipping"]["views_per_step"], rows["all views"]["views_per_step"]) == (7 * encoded, 7 * views)
    saved = rows["all views"]["positions_per_step"] - rows["skipping"]["positions_per_step"]
    assert saved == 7 * (views - encoded) * (19 - 1)
    assert skipping.split()[:4] == ["skipping", "14.0", "0.500", str(7 * encoded)]
    assert every.split()[:5] == ["all", "views", "5.6", "1.250", str(7 * views)]
    if views == 5:
        check_captions(tmp_path / "digits" / "pairs", tiny)


def check_captions(folder: Path, tiny) -> None:
    """A caption names the digits of its picture, which scikit-learn has."""
    from sklearn.datasets import load_digits

    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    digits = load_digits()
    inked = 255 - np.rint(digits.images * (255 / 16))
    index = SampleIndex([folder])
    assert {size_of(index, pair) for pair in range(len(index))} == {(24, 8)}
    for pair in range(12):
        path = folder / "picture.png"
        path.write_bytes(ImageReader(index).read(pair))
        row = np.asarray(Image.open(path))
        parts = [row[:, 8 * part : 8 * part + 8] for part in range(3)]
        labels = [digits.target[(inked == part).all((1, 2))][0] for part in parts]
        caption = f"The digits {', '.join(words[label] for label in labels)}."
        assert index.caption(pair).tolist() == tiny.tokenizer.encode(caption)
