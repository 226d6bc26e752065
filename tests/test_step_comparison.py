"""The comparison of steps with peers: both sides do the same work, and the arithmetic of its table."""

import runpy
import sys
from argparse import Namespace

import pytest
import torch.distributed as dist
from conftest import TOOLS

sys.path.insert(0, str(TOOLS / "compare"))  # as Python does for a program that is started
TOOL = str(TOOLS / "compare" / "step.py")
TINY = {
    "ranks": 2, "rounds": 1, "warmup": 1, "layers": 2, "hidden": 64, "ffn": 96, "vocabulary": 640, "grid": 4,
    "sequence_length": 300, "micro_batch_rows": 1, "pairs": 12, "rows": 4, "precision": "fp32",
    "expert": "dinov2_small",
}  # fmt: skip


def check_sides_train_alike(folder):
    """The program compares the losses of two steps itself."""
    tool = runpy.run_path(TOOL)
    rows = tool["work"](Namespace(**TINY, only=tool["NAMES"]), folder)
    assert set(rows) == set(tool["NAMES"])
    for name, row in rows.items():
        is_padded = "captions" in name and row["peer_micro_batch"] > 1
        assert (row["positions_peer"] > row["positions"]) is is_padded
        assert row["targets"] >= 12
    assert rows["transformers_text"]["positions"] == rows["transformers_text"]["targets"] == 1200


def test_both_sides_train_the_same_weights_on_the_same_samples(run_ranks, tmp_path):
    run_ranks(2, lambda: check_sides_train_alike(tmp_path))


class Still:
    """A side that does nothing, and says what its loss is."""

    def __init__(self, *losses):
        self.losses = list(losses)

    def __call__(self, step):
        pass

    def loss(self):
        return self.losses.pop(0)


def check_other_losses_are_refused():
    compare = runpy.run_path(TOOL)["compare"]
    dist.init_process_group("gloo")
    assert len(compare(Still(2.0, 1.0), Still(2.0015, 1.0005), 1, 3)) == 3
    for losses in ((2.003, 1.0), (2.0, 0.998)):
        with pytest.raises(SystemExit, match=r"step [01]: losses .*; the sides do not do the same work"):
            compare(Still(2.0, 1.0), Still(*losses), 1, 3)


def test_sides_with_other_losses_are_not_compared(run_ranks):
    run_ranks(1, check_other_losses_are_refused)


def test_ratios_are_medians_of_steps_taken_in_turn():
    tool = runpy.run_path(TOOL)
    seconds = [(1.0, 2.0), (2.0, 2.0), (4.0, 12.0), (1.0, 1.5), (8.0, 8.8)]  # the machine was slow twice
    turns = [(tool["Turn"](ours, ours / 2), tool["Turn"](peer, peer)) for ours, peer in seconds]
    row = tool["row"](turns, {"targets": 100, "positions": 300, "positions_peer": 400})
    assert (row["ratio"], row["cpu_ratio"]) == (1.5, 3.0)
    assert row["ours"] == {"step_seconds": 2.0, "cpu_seconds": 1.0, "target_tokens_per_second": 50.0}
    assert row["peer"]["step_seconds"] == 2.0
    head, ours, peer = tool["table"]({"bare": row}).splitlines()
    assert head.split() == ["s/step", "CPU", "s/step", "targets/s", "positions", "ratio", "of", "CPU"]
    assert ours.split() == ["bare", "ours", "2.000", "1.000", "50", "300", "1.500", "3.000"]
    assert peer.split() == ["peer", "2.000", "2.000", "50", "400"]
