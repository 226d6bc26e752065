"""What goes wrong on a cluster: ranks that hang, vanish or are slow, losses that blow up, disks that fill."""

import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Ranks, fork_store, kill
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.pieces import read_tensors
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.config import RunConfig
from megatron_sphinx.data import images
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.liveness.lifeline import Lifeline
from megatron_sphinx.liveness.progress import Beat, Doing, Progress
from megatron_sphinx.liveness.stalls import LastBeat, find_stall, find_stragglers
from megatron_sphinx.training import step as training_step
from megatron_sphinx.training.divergence import DivergenceConfig, Watch

EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm", "skipped", "sample_ids")
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
    lifeline = Lifeline(store, "language rank 1", rank=1, world=3)
    assert store.check(["beat/1"]), "a rank that is lost before its watcher looked for the first time is named too"
    lifeline.close()


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


def save_slowly(config: Path, seconds: float) -> int:
    """Train, but rank 1 takes its time to write its part of a checkpoint."""
    write = CheckpointStore._write_pieces

    def wait(self, *args):
        if os.environ["RANK"] == "1":
            time.sleep(seconds)
        return write(self, *args)

    CheckpointStore._write_pieces = wait
    return main(["train", str(config)])


def test_a_long_save_is_no_stall_until_it_takes_longer_than_files_may(start_ranks, tiny, tmp_path):
    settings = {"parallel.encoder": 1, "run.timeout": 6, "checkpoint.interval": 1}
    config = tiny.write(tmp_path / "slow.yaml", settings)
    assert start_ranks(3, lambda: save_slowly(config, 9.0)).wait() == [0, 0, 0]
    config = tiny.write(tmp_path / "hung.yaml", settings | {"run.storage_timeout": 6})
    ranks = start_ranks(3, lambda: save_slowly(config, 1000.0))
    assert ranks.wait() == [1, 1, 1]
    assert re.search(
        r"run.storage_timeout=6: language rank 1 on host \S+ is stuck for \d+ s in step 1, saving a checkpoint",
        verdict(ranks),
    )


# the judge


def heard(
    who: str, doing: Doing, seconds: float, *, silent: float = 0.0, step: int = 5, waits: bool = False
) -> LastBeat:
    return LastBeat(Beat(1, who, "n0", doing.name, step, None, seconds, waits or doing.is_waiting, "", None), silent)


JUDGE = {"timeout": 60.0, "storage_timeout": 600.0, "silence": 60.0}


def test_waiting_for_files_or_working_hard_is_no_stall():
    busy = heard("a", Doing.COMPUTING, 59)
    assert find_stall([busy, heard("b", Doing.COMPUTING, 59, waits=True)], **JUDGE) is None
    for doing in (Doing.STARTING, Doing.SAVING):
        assert find_stall([heard("a", doing, 599), heard("b", Doing.SENDING, 599)], **JUDGE) is None
        assert find_stall([heard("a", doing, 600), heard("b", Doing.SENDING, 599)], **JUDGE).startswith(
            "run.storage_timeout=600: a on host n0 is stuck for 600 s in step 5, "
        )
    assert find_stall([heard("a", Doing.ENDING, 599), busy], **JUDGE) is None


def test_who_is_silent_is_blamed_before_who_is_late_and_who_is_late_before_who_works():
    silent, late = heard("silent", Doing.COMPUTING, 3, silent=61), heard("late", Doing.READING, 61)
    working, waiting = heard("working", Doing.UPDATING, 3), heard("waiting", Doing.COMPUTING, 70, step=4, waits=True)
    everyone = [waiting, working, late, silent]
    random.shuffle(everyone)
    for blamed in (silent, late, working, waiting):
        said = find_stall(everyone, **JUDGE)
        assert said.startswith(f"run.timeout=60: {blamed.beat.who} on host n0 ")
        everyone.remove(blamed)
        assert (", the first, waiting, in step 4, forward and backward;" in said) == bool(everyone)
    assert "waits, as all do, for 70 s in step 4, forward and backward; look there" in said


def test_ranks_at_the_same_place_are_named_together():
    ranks = [heard(f"r{n}", Doing.COMPUTING, 70, waits=True) for n in range(5)]
    said = find_stall(ranks, **JUDGE)
    assert all(f"r{n} on host n0 waits, as all do, for 70 s" in said for n in range(3))
    assert " and 2 more; look there" in said


@pytest.mark.parametrize("seed", range(5))
def test_stragglers_are_those_slower_than_the_median(seed):
    rng = random.Random(seed)
    beats = [
        replace(heard(f"r{n}", Doing.READING, 0).beat, probe_seconds=rng.uniform(1.0, 1.2))
        for n in range(rng.randint(2, 9))
    ]
    assert find_stragglers(beats, 1.3) == {}
    slow = rng.randrange(len(beats))
    beats[slow] = replace(beats[slow], probe_seconds=2.4)
    assert list(find_stragglers(beats, 1.3)) == [f"r{slow} on host n0"]
    assert 2.0 <= find_stragglers(beats, 1.3)[f"r{slow} on host n0"] <= 2.4
    unknown = [replace(beat, probe_seconds=None) for beat in beats]
    assert find_stragglers([beats[slow], *unknown], 1.3) == {}


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


# losses that blow up


def poison(config: Path, pairs: list[int], factor: float | None) -> int:
    """Train, but micro-batches with these pairs have a loss so many times too high, or features that overflow."""
    mask_bad, loss = training_step.mask_bad, training_step.Forward._loss

    def overflow(batch, features):
        features, bad = mask_bad(batch, features)
        is_hit = torch.tensor([pair in pairs for pair in batch.samples], dtype=torch.bool)[batch.sample_of_view]
        return torch.where(is_hit[:, None], features * 1e38, features), bad

    def enlarge(self, batch, losses, *rest):
        return loss(self, batch, losses * (factor if set(pairs) & set(batch.samples) else 1.0), *rest)

    if factor is None:
        training_step.mask_bad = overflow
    else:
        training_step.Forward._loss = enlarge
    return main(["train", str(config)])


def pairs_of(config: Path, *steps: int) -> list[int]:
    """A pair of each of these steps."""
    read = configuration.load(config)
    sources = open_sources(read.data, read.model)
    planner = make_planner(read.data, sources, read.model, read.vision, replicas=1, seed=read.run.seed)
    return [random.choice(planner.step(step).samples) for step in steps]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def spoil(start_ranks, tiny, tmp_path):
    """`spoil(world, overrides, steps, value)` trains with a pair of each of these steps spoiled."""
    chosen: dict[tuple[int, ...], list[int]] = {}

    def train(
        world: int, overrides: dict, steps: tuple[int, ...], factor: float | None = None, status: int = 0, name="run"
    ):
        config = tiny.write(tmp_path / f"{name}.yaml", overrides)
        if steps not in chosen:
            chosen[steps] = pairs_of(config, *steps)
        ranks = start_ranks(world, lambda: poison(config, chosen[steps], factor))
        assert ranks.wait() == [status] * world, ranks.text()
        return config.with_suffix(""), ranks, chosen[steps]

    return train


SKIP = {"divergence.on_nan": "skip", "training.steps": 6, "checkpoint.interval": 1, "checkpoint.keep": 9}


def test_a_loss_that_is_not_finite_stops_the_run_unless_told_otherwise(spoil):
    _, ranks, pairs = spoil(1, {}, (1,), status=1)
    assert "megatron-sphinx train: step=1: loss is nan; weights unchanged; samples in it: pairs [" in verdict(ranks)
    assert str(pairs[0]) in re.findall(r"\d+", verdict(ranks).split("pairs [")[1].split("]")[0])
    assert "resume with a lower optimizer.learning_rate, or with divergence.on_nan=skip" in verdict(ranks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing_and_is_logged(spoil, precision):
    folder, ranks, pairs = spoil(3, SKIP | {"parallel.encoder": 1, "training.precision": precision}, (0, 3))
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [0, 3]
    assert [line["skipped"] for line in lines] == ["loss is nan", None, None, "loss is nan", None, None]
    assert all((line["loss"] is None) == bool(line["skipped"]) for line in lines)
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    logged = lines_of(folder / "skipped.jsonl")
    assert [(line["step"], line["reason"], line["loss"]) for line in logged] == [
        (n, "loss is nan", None) for n in (0, 3)
    ]
    for line, pair in zip(logged, pairs, strict=True):
        assert pair in line["pairs"]
        assert line["sample_ids"] == lines[line["step"]]["sample_ids"]
    assert "step 4 is skipped: loss is nan; its samples are in skipped.jsonl" in ranks.text(0)
    states = [states_of(path) for path in complete(folder / "checkpoints")]
    for step in range(1, 6):
        same = [torch.equal(states[step][name], states[step - 1][name]) for name in states[step]]
        assert all(same) if step == 3 else not all(same)


def states_of(path: Path) -> dict[str, torch.Tensor]:
    """The whole weights and moments of a checkpoint."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {name: about.size for name, about in saved.items() if hasattr(about, "size")}
    assert any(name.startswith("exp_avg_sq/") for name in shapes)
    return read_tensors(path, shapes)


MIXTRAL = {"model.experts": 4, "model.heads": 4, "model.groups": 4}


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel.tensor": 2, "parallel.sequence": True}),
        (4, {"parallel.pipeline": 2, "parallel.expert": 2, **MIXTRAL}),
    ],
    ids=str,
)
def test_every_layout_skips_the_same_steps(spoil, world, layout):
    model = MIXTRAL if "model.experts" in layout else {}
    wanted, _, _ = spoil(1, SKIP | model, (0, 3), name="one")
    folder, _, _ = spoil(world, SKIP | layout, (0, 3))
    for line, other in zip(lines_of(folder / "metrics.jsonl"), lines_of(wanted / "metrics.jsonl"), strict=True):
        assert line["skipped"] == other["skipped"]
        if not line["skipped"]:
            assert [line[n] for n in EXACT[:4]] == pytest.approx([other[n] for n in EXACT[:4]], rel=1e-4)


SPIKE = r"loss is \d+\.\d+, \d+\.\d standard deviations above the mean \d\.\d+ of the last \d trained steps"


def test_a_run_with_skipped_steps_goes_on_to_the_same_bits(spoil):
    """The steps after a skipped one, its optimizer's count of steps, and what a spike is measured by, all survive."""
    settings = SKIP | {"training.steps": 10, "checkpoint.keep": 99, "parallel.encoder": 1}
    settings |= {"divergence.on_spike": "skip", "divergence.window": 8, "divergence.sigma": 6.0}
    folder, _, pairs = spoil(3, settings, (6, 9), factor=20.0)
    whole = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in whole if line["skipped"]] == [6, 9]
    assert re.fullmatch(SPIKE, whole[6]["skipped"]), whole[6]
    for first in (7, 4):
        for path in complete(folder / "checkpoints"):
            if path.name > f"step_{first:08d}":
                (path / "checkpoint.json").unlink()
        folder, ranks, _ = spoil(3, settings, (6, 9), factor=20.0)
        assert f"resumed after step {first}" in ranks.text(0)
        lines = lines_of(folder / "metrics.jsonl")
        assert [[line[n] for n in EXACT] for line in lines] == [[line[n] for n in EXACT] for line in whole]
        logged = lines_of(folder / "skipped.jsonl")
        assert [line["step"] for line in logged] == [6, 9]
        assert all(pair in line["pairs"] for pair, line in zip(pairs, logged, strict=True))


def test_too_many_skipped_steps_in_a_row_stop_the_run(spoil):
    settings = SKIP | {"divergence.most_skipped": 2}
    folder, ranks, _ = spoil(1, settings, (0, 2, 3, 4), status=1)
    assert "divergence.most_skipped=2: 3 steps in a row would be skipped, the last one step=4: loss is" in verdict(
        ranks
    )
    assert [line["step"] for line in lines_of(folder / "skipped.jsonl")] == [0, 2, 3]


def test_a_spike_stops_the_run_where_it_is_told_to(spoil):
    settings = {"divergence.on_spike": "stop", "divergence.window": 8, "training.steps": 10}
    folder, ranks, pairs = spoil(1, settings, (9,), factor=20.0, status=1)
    said = re.search(rf"step=9: {SPIKE}; weights unchanged; samples in it: pairs \[(.*?)\],", verdict(ranks))
    assert str(pairs[0]) in said[1].split(", ")
    assert verdict(ranks).endswith("or with divergence.on_spike=skip")
    assert len(lines_of(folder / "metrics.jsonl")) == 9


# the policy


@pytest.mark.parametrize("seed", range(5))
def test_a_watch_knows_spikes_by_its_window_only_and_remembers_it(seed):
    rng = random.Random(seed)
    window = rng.randint(4, 40)
    watch = Watch(DivergenceConfig(on_spike="skip", window=window, sigma=6.0))
    for step in range(3 * window):
        loss, norm = rng.gauss(3, 0.1), rng.gauss(1, 0.1)
        if 2 * step < window:
            assert not watch.fault(1e9, 1e9)
        else:
            assert "loss is 1e+09, " in watch.fault(1e9, norm)
            assert "the gradient's norm is 1e+09, " in watch.fault(2.5, 1e9)
            assert f"of the last {min(step, window)} trained steps" in watch.fault(1e9, norm)
            assert not watch.fault(-1e9, 0.0)
            watch.settle(step, 1e9, norm, watch.fault(1e9, norm), ([], []))  # leaves no trace in the window
            again = Watch(watch.config, json.loads(json.dumps(watch.state())))
            value = rng.gauss(3.5, 0.3)
            assert again.fault(value, norm) == watch.fault(value, norm)
            assert again.state() == watch.state()
        watch.settle(step, loss, norm, "", ([], []))
    assert Watch(DivergenceConfig(window=window), watch.state()).fault(1e9, 1e9) == ""
    assert watch.fault(float("nan"), 1.0) == "loss is nan"
    assert watch.fault(1.0, float("inf")) == "the gradient's norm is inf"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_nan": "skpi"}, r"divergence\.on_nan=skpi: unknown value; did you mean skip\?"),
        ({"on_spike": "never"}, r"divergence\.on_spike=never: unknown value; known: off, stop, skip"),
        ({"window": 3}, r"divergence\.window=3: must be at least 4"),
        ({"most_skipped": 0}, r"divergence\.most_skipped=0: must be at least 1"),
        ({"sigma": 0.0}, r"divergence\.sigma=0\.0: must be above 0"),
    ],
    ids=str,
)
def test_impossible_policies_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DivergenceConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timeout": 2.0}, r"run\.timeout=2\.0: must be at least 3; ranks are heard of only so often"),
        ({"storage_timeout": 9.0}, r"run\.storage_timeout=9\.0: must be at least run\.timeout=600\.0"),
        ({"straggler_interval": -1}, r"run\.straggler_interval=-1: must be at least 0"),
        ({"straggler_ratio": 1.0}, r"run\.straggler_ratio=1\.0: must be above 1"),
    ],
    ids=str,
)
def test_impossible_limits_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(folder="runs/x", **values)


# full disks


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
    ids=str,
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
