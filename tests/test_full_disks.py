"""A full disk is one line, whatever is written, and leaves what was there."""

import resource
import signal
from pathlib import Path

import pytest
from test_divergence import SKIP, poison

from megatron_sphinx.__main__ import main
from megatron_sphinx.data import images
from megatron_sphinx.errors import DataError


def with_small_files(config: Path, most: int) -> int:
    """Train, but no file may grow beyond so many bytes: a full disk, as far as a program can tell."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return main(["train", str(config)])


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(train, start_ranks, tiny, tmp_path):
    done = train(2, {"parallel.encoder": 1}, name="full")
    config = tiny.write(tmp_path / "full.yaml", {"parallel.encoder": 1, "training.steps": 6})
    ranks = start_ranks(2, lambda: with_small_files(config, 40_000))
    assert ranks.wait() == [2, 2], ranks.text()
    assert "step_00000004: rank 0 could not write it (" in ranks.text(0)
    assert "earlier checkpoints are untouched; make room, then resume with checkpoint.resume=auto" in ranks.text(0)
    kept = [path.name for path in (done.folder / "checkpoints").iterdir()]
    assert sorted(kept) == ["step_00000002", "step_00000003"]
    assert len(train(2, {"parallel.encoder": 1, "training.steps": 6}, name="full").metrics) == 6


def test_a_disk_too_full_for_the_metrics_is_one_line_too(train, start_ranks, tiny, tmp_path):
    done = train(2, {"parallel.encoder": 1}, name="full")
    config = tiny.write(tmp_path / "full.yaml", {"parallel.encoder": 1, "training.steps": 6})
    most = (done.folder / "metrics.jsonl").stat().st_size + 100
    ranks = start_ranks(2, lambda: with_small_files(config, most))
    assert ranks.wait() == [2, 2], ranks.text()
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "cannot be written (File too large); make room" in said
    (tmp_path / "file").write_text("in the way")
    config = tiny.write(tmp_path / "other.yaml")
    ranks = start_ranks(2, lambda: main(["train", str(config), f"run.folder={tmp_path / 'file' / 'run'}"]))
    assert ranks.wait() == [2, 2]
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "cannot be written (Not a directory); make room or give another folder" in said


def read_nothing(config: Path) -> int:
    """Train, but no image can be read."""

    def decode(_):
        raise DataError("does not decode")

    images.decode = decode
    return main(["train", str(config)])


@pytest.mark.parametrize(
    ("name", "work", "settings"),
    [
        ("quarantine.jsonl", read_nothing, {"data.max_bad_share": 1.0, "parallel.encoder": 1}),
        ("skipped.jsonl", lambda config: poison(config, list(range(60)), None), SKIP),
    ],
    ids=["quarantine", "skipped"],
)
def test_a_full_disk_is_one_line_whatever_is_written(start_ranks, tiny, tmp_path, name, work, settings):
    config = tiny.write(tmp_path / "run.yaml", settings)
    config.with_suffix("").mkdir()
    (config.with_suffix("") / name).symlink_to("/dev/full")
    ranks = start_ranks(2, lambda: work(config))
    assert ranks.wait() == [2, 2]
    said = {line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")}
    assert len(said) == 1  # two ranks may have met it, each for itself
    assert (
        f"run.folder={config.with_suffix('')}: cannot be written (No space left on device); make room or" in said.pop()
    )
    assert "Traceback" not in ranks.text()
