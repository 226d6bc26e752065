"""What a run draws of its losses."""

import json

import pytest
from matplotlib import image

from megatron_sphinx.training.metrics import plot, smoothed


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_the_smoothed_curve_is_never_late(count):
    line = [3.0 - 0.01 * step for step in range(count)]
    assert smoothed(line) == pytest.approx(line)


def test_noise_is_averaged_over_neighbours_on_both_sides():
    assert smoothed([0.0, 3.0, 0.0, 3.0, 0.0, 3.0]) == pytest.approx([0, 1, 1.2, 1.8, 2, 3])


def test_a_step_without_a_finite_loss_leaves_a_gap_and_a_plot(tmp_path):
    losses = [2.0, None, float("nan"), float("inf"), 1.0]
    lines = [{"step": step, "loss_pairs": loss, "loss_text": None} for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert image.imread(tmp_path / "loss.png").std() > 0.01
