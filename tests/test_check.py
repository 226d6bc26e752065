"""`train --check`: it says what a start would do or end with, and changes nothing."""

import os
from pathlib import Path

import pytest

from megatron_sphinx.__main__ import main


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def checked(start_ranks, tmp_path):
    """Checks a configuration in a process of its own: status and what it said; all files stay as they are."""

    def check(config: Path, *words: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
        def work() -> int:
            for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
            os.environ.update(environment or {})
            return main(["train", str(config), "--check", *words])

        before = listing(tmp_path)
        ranks = start_ranks(1, work)
        [status] = ranks.wait()
        assert {name: seen for name, seen in listing(tmp_path).items() if name in before} == before
        return status, ranks.text()

    return check


def test_it_says_what_a_start_would_do(checked, tiny, tmp_path, start_ranks):
    config = tiny.write(tmp_path / "run.yaml", {"training.steps": 2, "parallel.tensor": 2, "parallel.encoder": 1})
    folder = config.with_suffix("")
    status, said = checked(config, "--ranks", "5")
    assert status == 0
    assert "tensor 2 x data 2 + encoder 1 = 5 ranks" in said
    assert "step 0 takes 6 samples" in said
    assert "would begin with new weights" in said
    assert said.rstrip().endswith("checked: nothing stands in the way of the run; nothing was written")
    assert not folder.exists()
    assert start_ranks(1, lambda: main(["train", str(config), "parallel.tensor=1", "parallel.encoder=0"])).wait() == [0]
    assert f"would go on after step 2 from {folder}/checkpoints/step_00000002" in checked(config)[1]
    other = tiny.write(tmp_path / "other.yaml", {"model.weights": str(folder)})
    assert "would begin with the weights of" in checked(other)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3", "parallel.tensor=2"], "parallel"),
        (["parallel.tensor=3"], "parallel.tensor=3: must divide"),
        (["data.text=nowhere"], "data.text=nowhere"),
        (["data.tokenizer=nowhere"], "data.tokenizer=nowhere"),
        (["vision.experts=[{name: clip_vit_small, weights: nowhere}]", "vision.grid=4"], "nowhere"),
        (["model.weights=nowhere"], "model.weights=nowhere"),
        (["checkpoint.resume=nowhere"], "checkpoint.resume=nowhere"),
        (["run.folder=a_file"], "run.folder=a_file: "),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_what_a_start_would_end_with_is_one_line(checked, tiny, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    config = tiny.write(tmp_path / "run.yaml")
    status, said = checked(config, *words)
    assert status == 2, said
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("megatron-sphinx train: ")
    assert message in last
    assert "Traceback" not in said


def test_a_folder_that_cannot_be_written_is_named(checked, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    status, said = checked(tiny.write(tmp_path / "run.yaml"))
    assert status == 2
    assert (
        f"run.folder={tmp_path / 'run'}: {tmp_path} cannot be written; name another folder, or ask for the right"
        in said
    )


def test_it_is_not_for_the_ranks_of_a_job(checked, tiny, tmp_path):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    status, said = checked(tiny.write(tmp_path / "run.yaml"), environment=launched)
    assert status == 2
    assert "--check: is for one process, not for each rank of a job; start it without torchrun or srun" in said
