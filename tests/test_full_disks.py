"""A full disk is one line, whatever is written, and leaves what was there."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from test_divergence import SKIP, poison

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.slices import cause_of, reason_of
from megatron_sphinx.data import images
from megatron_sphinx.errors import DataError, FolderError, remedy_of, writing
from megatron_sphinx.lock import RunLock


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
    assert "earlier checkpoints are untouched; " in ranks.text(0)
    assert "make room or give another folder, then resume with checkpoint.resume=auto" in ranks.text(0)
    assert "enforce fail" not in ranks.text(0)
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
    assert "cannot be written (File too large); the largest size" in said
    (tmp_path / "file").write_text("in the way")
    config = tiny.write(tmp_path / "other.yaml")
    ranks = start_ranks(2, lambda: main(["train", str(config), f"run.folder={tmp_path / 'file' / 'run'}"]))
    assert ranks.wait() == [2, 2]
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "cannot be written " in said
    assert f"({tmp_path / 'file'} is a file); give a folder whose path holds folders only, then go on" in said


def read_nothing(config: Path) -> int:
    """Train, but no image can be read."""

    def decode(*_, **__):
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


def test_a_folder_that_cannot_be_made_is_refused_with_its_true_reason(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, said in {
        "file": r"file is a file\); give a folder whose path holds folders only, then go on",
        "file/run": r"file is a file\); give a folder whose path",
        "link": r"link is a link to \S+nowhere, which leads nowhere\); give a folder whose path",
        "link/run": r"link is a link to \S+nowhere, which leads nowhere\); give",
        "circle": r"circle is a link to \S+circle, which leads nowhere\); give",
        "n" * 300: r"File name too long\); give a folder with a shorter name",
        "/proc/run": r"No such file or directory\); nothing can be made there: give a folder on a file system",
    }.items():
        with pytest.raises(FolderError, match=rf"^run\.folder=\S+: cannot be written \(.*{said}"):
            RunLock(tmp_path / name, print)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "(Read-only file system); it is mounted for reading only: give another folder"),
        (errno.EACCES, "(Permission denied); get the right to write there, or give another folder"),
        (errno.ENOSPC, "(No space left on device); make room or give another folder"),
        (errno.EDQUOT, "(Disk quota exceeded); the quota is used up: make room or give another folder"),
        (errno.EIO, "(Input/output error); the disk or the server of files fails: look at it"),
        (errno.EXDEV, "(Invalid cross-device link); see that it can be written, or give another folder"),
    ],
    ids=errno.errorcode.get,
)
def test_room_is_asked_for_only_where_there_is_none(tmp_path, number, said):
    with pytest.raises(FolderError) as refused, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    assert f"run.folder={tmp_path}: cannot be written {said}" in str(refused.value)
    assert ("make room" in str(refused.value)) is (number in (errno.ENOSPC, errno.EDQUOT))


def test_the_systems_own_error_is_found_below_torchs():
    def fail(cause: OSError | None) -> RuntimeError:
        try:
            try:
                raise cause or ValueError
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing")
        except RuntimeError as error:
            return error

    known, hidden = fail(OSError(errno.ENOSPC, "No space left on device")), fail(None)
    assert (reason_of(known), cause_of(known).errno) == ("No space left on device", errno.ENOSPC)
    assert reason_of(hidden) == "a file could not be written to its end, as where there is no room"
    assert remedy_of(hidden) == "make room or give another folder"
    assert reason_of(RuntimeError("another")) == "another"
