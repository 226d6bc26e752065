"""The engine on real ranks: what of the gradient reaches the weights."""

import json
import os
from pathlib import Path

import pytest

from megatron_sphinx.__main__ import main
from megatron_sphinx.training.engine import Engine


def train_and_look(config: Path) -> int:
    """Train, and keep the norm of what the optimizer is given at each step."""
    step, norms = Engine._step, []

    def look(self) -> None:
        norms.append(self.gradient_norm())
        step(self)

    Engine._step = look
    status = main(["train", str(config)])
    (config.with_suffix("") / f"norms_{os.environ['RANK']}.json").write_text(json.dumps(norms))
    return status


@pytest.mark.parametrize("clip", [0.0, 0.25, 1000.0])
def test_a_gradient_is_clipped_to_the_largest_norm_and_a_smaller_one_left_alone(start_ranks, tiny, tmp_path, clip):
    config = tiny.write(tmp_path / "run.yaml", {"optimizer.gradient_clip": clip})
    ranks = start_ranks(2, lambda: train_and_look(config))
    assert ranks.wait() == [0, 0], ranks.text()
    folder = config.with_suffix("")
    found = [json.loads(line)["gradient_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert min(found) > 0.25
    for rank in range(2):
        norms = json.loads((folder / f"norms_{rank}.json").read_text())
        assert norms == pytest.approx([clip if clip == 0.25 else norm for norm in found], rel=1e-5)
