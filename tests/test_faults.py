"""What goes wrong on a cluster: ranks that hang, vanish, fail or are slow, and stores that do not answer."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Ranks, fork_store, kill
from torch._C._distributed_c10d import HashStore

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.device import Platform
from megatron_sphinx.liveness import lifeline
from megatron_sphinx.liveness.lifeline import Lifeline
from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.training import step as training_step

ENDLESS = {"training.steps": 100_000, "run.print_interval": 1000, "checkpoint.interval": 100_000}


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def verdict(ranks: Ranks) -> str:
    """The one line that a job ended with."""
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    return said


def wait_for_others(ranks: Ranks, lost: int) -> list[int]:
    """Exit statuses of all but a rank that never ends, which is killed then."""
    others = Ranks([pid for rank, pid in enumerate(ranks.pids) if rank != lost], ranks.logs)
    statuses = others.wait()
    os.kill(ranks.pids[lost], signal.SIGKILL)
    return statuses


# ranks that stop, vanish or hang


@pytest.mark.parametrize(("lost", "role"), [(0, "language"), (2, "encoder")])
def test_a_stopped_rank_is_named_by_the_others(train, lost, role):
    folder, ranks = train.start(3, ENDLESS | {"parallel.encoder": 1, "run.timeout": 5})
    wait_for_steps(folder, 3)
    os.kill(ranks.pids[lost], signal.SIGSTOP)
    assert wait_for_others(ranks, lost) == [1, 1]
    said = verdict(ranks)
    assert f"run.timeout=5: {role} rank {lost} on host " in said
    assert re.search(r"has not been heard of for \d+ s \(killed, stopped, or its node is gone\), last in ", said)
    assert re.search(r"; 2 ranks wait, the first, \w+ rank \d, in step \d+, .*; look there, then resume with", said)
    assert "Traceback" not in ranks.text()


def test_a_rank_that_stood_still_names_itself_and_nobody_else(train):
    folder, ranks = train.start(3, ENDLESS | {"parallel.encoder": 1, "run.timeout": 5})
    wait_for_steps(folder, 3)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    time.sleep(6.5)  # the last rank judges later
    os.kill(ranks.pids[0], signal.SIGCONT)
    assert ranks.wait() == [1, 1, 1]
    assert re.search(
        r"run.timeout=5: language rank 0 on host \S+ stood still for [67] s itself \(stopped by SIGSTOP", verdict(ranks)
    )
    assert "resume with checkpoint.resume=auto" in verdict(ranks)
    assert "Traceback" not in ranks.text()


def test_a_short_stop_is_reported_and_the_run_goes_on(train, monkeypatch):
    monkeypatch.setattr(lifeline, "_STILL_SECONDS", 1.0)
    folder, ranks = train.start(2, ENDLESS | {"parallel.encoder": 1, "run.timeout": 60})
    wait_for_steps(folder, 2)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    time.sleep(2)
    os.kill(ranks.pids[1], signal.SIGCONT)
    wait_for_steps(folder, (folder / "metrics.jsonl").read_text().count("\n") + 3)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    assert re.search(r"\[encoder rank 1\] stood still for \d s itself .*; goes on\n", ranks.text(1))


def test_a_killed_rank_is_named_by_the_others(train):
    folder, ranks = train.start(3, ENDLESS | {"parallel.pipeline": 3, "model.layers": 3, "run.timeout": 20})
    wait_for_steps(folder, 2)
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.wait() == [1, -9, 1]
    assert "run.timeout=20: language rank 1 on host " in verdict(ranks)
    assert "(killed, stopped, or its node is gone), last in " in verdict(ranks)  # a step, if it lived to say so
    assert "Traceback" not in ranks.text()


def hang(config: Path, doomed: int, where: type, name: str) -> int:
    """Train, but from some call on one rank waits for its disk and for nobody else."""
    work, calls = getattr(where, name), []

    def wait(self, *args, **options):
        calls.append(1)
        if os.environ["RANK"] == str(doomed) and len(calls) > 12:
            time.sleep(1000)
        return work(self, *args, **options)

    setattr(where, name, wait)
    return main(["train", str(config)])


@pytest.mark.parametrize(
    ("doomed", "where", "name", "place"),
    [
        (1, BatchBuilder, "build", r"language rank 1 .* step \d+, reading data \(batches.py:\d+ in step\)"),
        (
            2,
            PixelLoader,
            "_read",
            r"encoder rank 2 .* step \d+, micro-batch \d, reading data \(pixels.py:\d+ in wait\)",
        ),
        (1, training_step.Forward, "_loss", r"language rank 1 .* step \d+, micro-batch \d, forward and backward \("),
    ],
)
def test_a_rank_that_hangs_is_named_with_what_it_is_at(start_ranks, tiny, tmp_path, doomed, where, name, place):
    config = tiny.write(tmp_path / "run.yaml", ENDLESS | {"parallel.encoder": 1, "run.timeout": 5})
    ranks = start_ranks(3, lambda: hang(config, doomed, where, name))
    assert ranks.wait() == [1, 1, 1]
    assert re.search(rf"run.timeout=5: {place}", verdict(ranks)), verdict(ranks)
    assert "is stuck for " in verdict(ranks)
    assert "Traceback" not in ranks.text()
    assert "2 ranks wait, the first, " in verdict(ranks)


def test_a_rank_alone_is_watched_too(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml", ENDLESS | {"run.timeout": 5})
    ranks = start_ranks(1, lambda: hang(config, 0, BatchBuilder, "build"))
    assert ranks.wait() == [1]
    assert re.search(r"run.timeout=5: language rank 0 .* is stuck for \d+ s in step \d+, reading data", verdict(ranks))
    assert ", the first, " not in verdict(ranks)


def watch_store(port: int) -> None:
    os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    Lifeline.connect("rank 0", progress=Progress(timeout=5))
    sys.stdout.write("connected\n")
    time.sleep(1000)


def test_a_rank_is_known_from_its_first_moment():
    store = HashStore()
    line = Lifeline(store, "language rank 1", rank=1, world=3)
    assert store.check(["beat/1"]), "a rank that is lost before its watcher looked for the first time is named too"
    line.close()


def test_a_store_that_does_not_answer_ends_the_job(start_ranks):
    store, port = fork_store()
    ranks = start_ranks(1, lambda: watch_store(port))
    while "connected" not in ranks.text():
        time.sleep(0.01)
    os.kill(store, signal.SIGSTOP)
    statuses = ranks.wait()
    kill(store)
    assert statuses == [1]
    assert re.search(r"\[rank 0\] leaves: run.timeout=5: the job's store on 127.0.0.1 has not answered", ranks.text())
    assert "the first rank or its node is gone; resume with checkpoint.resume=auto" in ranks.text()


@pytest.mark.parametrize(("told", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)], ids=["language", "encoder"])
def test_a_signal_to_any_one_rank_stops_all(train, told, number):
    folder, ranks = train.start(3, ENDLESS | {"parallel.encoder": 1, "parallel.tensor": 2})
    wait_for_steps(folder, 2)
    os.kill(ranks.pids[told], number)
    assert ranks.wait() == [75, 75, 75], ranks.text()
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in complete(folder / "checkpoints")] == [f"step_{done:08d}"]


SAVING_OFTEN = {"parallel.encoder": 1, "run.timeout": 6, "checkpoint.interval": 1}


def save_slowly(config: Path, seconds: float) -> int:
    """Train, but rank 1 takes its time to write its part of a checkpoint."""
    write = CheckpointStore._write_pieces

    def wait(self, *args):
        if os.environ["RANK"] == "1":
            time.sleep(seconds)
        return write(self, *args)

    CheckpointStore._write_pieces = wait
    return main(["train", str(config)])


@pytest.mark.slow
def test_a_long_save_is_no_stall(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "slow.yaml", SAVING_OFTEN)
    assert start_ranks(3, lambda: save_slowly(config, 9.0)).wait() == [0, 0, 0]


def test_a_save_that_takes_longer_than_files_may_is_a_stall(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "hung.yaml", SAVING_OFTEN | {"run.storage_timeout": 6})
    ranks = start_ranks(3, lambda: save_slowly(config, 1000.0))
    assert ranks.wait() == [1, 1, 1]
    assert re.search(
        r"run.storage_timeout=6: language rank 1 on host \S+ is stuck for \d+ s in step 1, saving a checkpoint",
        verdict(ranks),
    )


# ranks that are slow


def be_slow(config: Path, slow: int) -> int:
    """Train, but one rank takes longer for the work that its speed is probed with."""
    probe = Platform.probe_seconds
    if os.environ["RANK"] == str(slow):
        Platform.probe_seconds = lambda self: probe(self) + 0.05
    return main(["train", str(config)])


def test_a_slow_rank_is_reported(start_ranks, tiny, tmp_path):
    settings = ENDLESS | {"parallel.encoder": 1, "run.timeout": 10, "run.straggler_interval": 1}
    config = tiny.write(tmp_path / "run.yaml", settings | {"run.straggler_ratio": 5.0})
    ranks, folder = start_ranks(3, lambda: be_slow(config, 2)), config.with_suffix("")
    deadline = time.monotonic() + 60
    while "straggler: encoder rank 2 on host " not in ranks.text(0):
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.05)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGTERM)
    assert ranks.wait() == [75, 75, 75]
    assert re.search(r"takes \d+\.\d\d times as long as the median rank for the same work", ranks.text(0))
    assert ranks.text(0).count("straggler:") == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (who,) = lines[-1]["stragglers"]
    assert who.startswith("encoder rank 2 on host ")
    assert lines[0]["stragglers"] == {}
    assert {line["data_wait_rank"] for line in lines} <= {0, 1}


# encoders that fail


def lose_an_encoder(config: Path) -> int:
    """Train, but the encoder rank meets an error of its own in its second micro-batch."""
    from megatron_sphinx.model.encoders import FrozenEncoders

    encode, calls = FrozenEncoders._encode, []

    def fail(self, chunk):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("the encoder's own error")
        return encode(self, chunk)

    FrozenEncoders._encode = fail
    return main(["train", str(config)])


def test_a_failing_encoder_ends_the_job_within_seconds_with_its_own_error(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml", {"parallel.encoder": 1, "training.steps": 50})
    start = time.monotonic()
    ranks = start_ranks(3, lambda: lose_an_encoder(config))
    assert ranks.wait() == [1, 1, 1]
    assert time.monotonic() - start < 30
    assert "[encoder rank 2] failed:" in ranks.text(2)
    assert "MemoryError: the encoder's own error" in ranks.text(2)
    for rank in (0, 1):
        assert f"[language rank {rank}] leaves: encoder rank 2 ended the job" in ranks.text(rank)
        assert "Traceback" not in ranks.text(rank)


def test_an_encoder_that_is_killed_ends_the_job(train):
    folder, ranks = train.start(3, {"parallel.encoder": 1, "training.steps": 2000})
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(ranks.pids[2], signal.SIGKILL)
    start = time.monotonic()
    assert ranks.wait() == [1, 1, -9]
    assert time.monotonic() - start < 20


def test_wrong_encoder_weights_are_one_line_on_all_ranks(train, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    experts = [{"name": "dinov2_small", "weights": str(tmp_path / "w.pth")}]
    refused = train(4, {"vision.experts": experts, "parallel.encoder": 2}, status=2)
    said = [line for line in refused.ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert len(said) == 1
    assert "holds weights of another architecture" in said[0]


# files that are cut while a run reads them


@pytest.mark.parametrize("name", ["text/000000.bin", "text/000000.idx", "pairs/samples.bin", "pairs/captions.bin"])
def test_a_file_that_is_cut_under_a_run_is_named(train, tiny, tmp_path, name):
    """What is mapped and read beyond its end would kill the process by SIGBUS."""
    kind = name.partition("/")[0]
    shutil.copytree(tiny.folder / kind, tmp_path / "copy" / kind)
    shutil.copytree(tiny.folder / "shards", tmp_path / "copy" / "shards")
    folder, ranks = train.start(2, ENDLESS | {"parallel.encoder": 1, f"data.{kind}": str(tmp_path / "copy" / kind)})
    wait_for_steps(folder, 2)
    os.truncate(tmp_path / "copy" / name, 40)
    assert ranks.wait() == [2, 2]
    assert re.search(
        rf"train: \S+/copy/{name}: has 40 bytes, and had \d+ when it was opened: it was cut while it is in use; copy",
        verdict(ranks),
    )
    assert "Traceback" not in ranks.text()
