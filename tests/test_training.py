"""Whole runs on gloo ranks: every layout against one rank, exact resume, and what bad luck gets."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import Ranks
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.prepare.pairs import index_shards
from megatron_sphinx.training.deepspeed_engine import Engine
from megatron_sphinx.training.optimizer import OptimizerConfig, learning_rate

EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm")
KEYS = {
    "step", "loss", "loss_pairs", "loss_text", "target_tokens_pairs", "target_tokens_text", "learning_rate",
    "gradient_norm", "step_seconds", "tokens_per_second", "exposed_encoder_seconds", "data_wait_seconds",
    "model_flops_utilization", "peak_memory_bytes",
}  # fmt: skip
# language ranks, tensor, encoder
LAYOUTS = [(2, 1, 0), (1, 1, 2), (2, 2, 1), (4, 2, 2), (3, 1, 2)]  # test_parity.py has the many


def facts_of_ranks(text: str, after: str = "") -> list[str]:
    """What the first rank said of each rank, as far as it begins so."""
    facts: dict[int, str] = {}
    for first, last, fact in re.findall(rf"^ranks? (\d+)(?:-(\d+))?: ({after}.*)$", text, re.MULTILINE):
        facts |= {rank: fact for rank in range(int(first), int(last or first) + 1) if rank not in facts}
    assert list(facts) == list(range(len(facts)))
    return list(facts.values())


def worst_difference(lines: list[dict], reference: list[dict]) -> float:
    assert [line["sample_ids"] for line in lines] == [line["sample_ids"] for line in reference]
    return max(abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(lines, reference, strict=True) for n in EXACT)


def identical(lines: list[dict], reference: list[dict]) -> bool:
    """Whether all that does not depend on the clock is the same to the last bit."""
    names = ("step", "sample_ids", "learning_rate", "target_tokens_pairs", "target_tokens_text", "bad_pairs", *EXACT)
    return [[line[n] for n in names] for line in lines] == [[line[n] for n in names] for line in reference]


@pytest.fixture(scope="module")
def one_rank():
    """Metrics of one rank by overrides, each computed once."""
    return {}


def reference(train, one_rank, **overrides) -> list[dict]:
    key = json.dumps(overrides)
    if key not in one_rank:
        one_rank[key] = train(1, overrides, name="reference").metrics
    return one_rank[key]


# every layout


@pytest.mark.parametrize(("language", "tensor", "encoder"), LAYOUTS, ids=lambda size: str(size))
def test_every_layout_trains_as_one_rank_does(train, one_rank, language, tensor, encoder):
    wanted = reference(train, one_rank)
    rows = random.Random(f"{language} {tensor} {encoder}").randint(1, 4)
    layout = {"parallel.tensor": tensor, "parallel.encoder": encoder, "data.micro_batch_rows": rows}
    run = train(language + encoder, layout)
    assert worst_difference(run.metrics, wanted) < 1e-5
    crossing = 6 * 17 * (96 + 96) * 2 if encoder else 0
    assert {line["feature_bytes"] for line in run.metrics} == {crossing}
    said = facts_of_ranks(run.ranks.text(0))
    assert [fact.split(",")[0] for fact in said] == ["language"] * language + ["encoder"] * encoder
    if encoder:
        assert all(fact.endswith("encoder weights 0 bytes") for fact in said[:language])
        assert all("language weights 0 bytes" in fact for fact in said[language:])
        assert f"= {crossing:,} bytes of features cross, 0 come back" in run.ranks.text(0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.activation_checkpointing": "full"},
        {"data.micro_batch_rows": 1},
        {"data.micro_batch_rows": 9},
        {"stage.lookahead": 1, "parallel.encoder": 1},
        {"data.workers": 5, "parallel.encoder": 1},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_must_not_matter_does_not(train, one_rank, overrides):
    ranks = 1 + overrides.get("parallel.encoder", 0)
    assert worst_difference(train(ranks, overrides).metrics, reference(train, one_rank)) < 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss.text_weight": 0.25},
        {"data.isolate_documents": False},
        {"data.text_tokens_per_step": 149, "data.pairs_per_step": 5},
        {"data.pairs_per_step": 70},
    ],
    ids=str,
)
def test_settings_that_matter_do_so_in_every_layout(train, one_rank, overrides):
    wanted = reference(train, one_rank, **overrides)
    lines = train(5, overrides | {"parallel.tensor": 2, "parallel.encoder": 1}).metrics
    assert worst_difference(lines, wanted) < 1e-5
    assert worst_difference_of_loss(wanted, reference(train, one_rank)) > 1e-4


def worst_difference_of_loss(lines: list[dict], other: list[dict]) -> float:
    return max(abs(a["gradient_norm"] - b["gradient_norm"]) for a, b in zip(lines, other, strict=True))


def test_the_loss_is_one_mean_over_all_target_tokens(train, one_rank):
    for line in reference(train, one_rank, **{"loss.text_weight": 0.25}):
        pairs, text = line["target_tokens_pairs"], 0.25 * line["target_tokens_text"]
        mean = (line["loss_pairs"] * pairs + line["loss_text"] * text) / (pairs + text)
        assert line["loss"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("overrides", [{"data.text_tokens_per_step": 0}, {"data.pairs_per_step": 0}], ids=str)
def test_one_stream_alone_trains_in_every_role(train, one_rank, overrides):
    lines = train(4, overrides | {"parallel.encoder": 2}).metrics
    wanted = reference(train, one_rank, **overrides)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    missing = "loss_text" if "data.text_tokens_per_step" in overrides else "loss_pairs"
    assert {line[missing] for line in lines} == {None}


def test_bf16_stays_near_fp32_and_learns(train, one_rank):
    longer = {"training.steps": 25, "optimizer.warmup_steps": 2}
    exact = reference(train, one_rank, **longer)
    for layout in ({"parallel.encoder": 1}, {"parallel.tensor": 2}):
        lines = train(3 if "parallel.encoder" in layout else 2, layout | longer | {"training.precision": "bf16"},
                      name=str(len(layout) + len(str(layout)))).metrics  # fmt: skip
        assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-3)
        assert lines[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.1)
        assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_uneven_work_of_replicas_is_said_with_its_remedy(train):
    uneven = {"data.row_multiple": 1, "data.micro_batch_rows": 1, "data.text_tokens_per_step": 100, "training.steps": 1}
    run = train(2, uneven)
    assert run.metrics[0]["imbalance"] > 1.05
    assert "the replicas' work is uneven: data.row_multiple=2 would divide it better" in run.ranks.text(0)
    assert "the replicas' work is uneven" not in train(2, uneven | {"data.row_multiple": 2}, name="even").ranks.text(0)
    (line,) = train(1, uneven, name="one").metrics
    assert line["imbalance"] == 1
    assert 0.5 < line["fill"] <= 1
    assert line["padding_share"] == 0


# resume


def kill_after(folder: Path, ranks: Ranks, steps: int) -> None:
    """Kill all ranks, without warning, once so many steps are done and there is a checkpoint."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
        if lines >= steps and complete(folder / "checkpoints"):
            break
        time.sleep(0.005)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGKILL)
    ranks.wait()


def test_killed_at_a_random_step_a_run_goes_on_to_the_same_bits(train):
    settings = {"training.steps": 9, "checkpoint.interval": 2, "parallel.encoder": 1}
    whole = train(3, settings, name="whole").metrics
    folder, ranks = train.start(3, settings, name="killed")
    last = random.SystemRandom().randint(2, 7)
    kill_after(folder, ranks, last)
    resumed = train(3, settings, name="killed")
    assert "resumed after step " in resumed.ranks.text(0), f"killed after {last} steps"
    assert identical(resumed.metrics, whole), f"killed after {last} steps"
    names = {path.name for path in resumed.folder.iterdir()} - {"metrics.superseded.jsonl"}  # where steps were redone
    assert sorted(names) == [
        "checkpoints",
        "config.yaml",
        "encoders.json",
        "ended.json",
        "loss.png",
        "metrics.jsonl",
        "tensorboard",
    ]


def test_five_kills_and_other_layouts_lose_and_repeat_no_sample(train, tiny):
    """Two epochs of the pairs, each part of the run with other replicas, encoders and workers."""
    settings = {"training.steps": 20, "checkpoint.interval": 1}
    rng = random.SystemRandom()
    said = []
    for kill_at in sorted(rng.sample(range(1, 19), 5)):
        encoders, replicas, workers = rng.randint(0, 2), rng.randint(1, 3), rng.randint(1, 3)
        said.append(f"{kill_at}: E={encoders} D={replicas} workers={workers}")
        layout = {"parallel.encoder": encoders, "data.workers": workers, "stage.lookahead": rng.randint(1, 5)}
        folder, ranks = train.start(encoders + replicas, settings | layout)
        kill_after(folder, ranks, kill_at)
    lines = train(2, settings).metrics
    assert [line["step"] for line in lines] == list(range(20)), said
    config = configuration.load(folder / "config.yaml")
    sources = open_sources(config.data, config.model)
    planner = make_planner(config.data, sources, config.model, config.vision, replicas=1, seed=config.run.seed)
    plans = [planner.step(step) for step in range(20)]
    assert [line["sample_ids"] for line in lines] == [plan.digest for plan in plans], said
    assert sorted(pair for plan in plans for pair in plan.samples) == sorted(2 * list(range(60)))
    times = Counter((item, at) for plan in plans for item, start, n in plan.text for at in range(start, start + n))
    epochs = 20 * config.data.text_tokens_per_step / sources.text.bounds[-1]
    assert set(times.values()) <= {int(epochs), int(epochs) + 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_a_signal_saves_and_exits_75_and_the_run_goes_on(train, number):
    settings = {"training.steps": 40, "checkpoint.interval": 100}
    whole = train(1, settings | {"parallel.encoder": 0}, name="whole").metrics
    folder, ranks = train.start(3, settings | {"parallel.encoder": 1, "parallel.tensor": 2}, name="stopped")
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        time.sleep(0.01)
    for pid in ranks.pids:
        os.kill(pid, number)
    assert ranks.wait() == [75, 75, 75], ranks.text()
    assert json.loads((folder / "ended.json").read_text()) == {"status": 75}
    (saved,) = complete(folder / "checkpoints")
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert saved.name == f"step_{done:08d}"
    assert done < 40
    resumed = train(
        4, settings | {"parallel.encoder": 2, "parallel.tensor": 2}, name="stopped"
    ).metrics  # encoders are free
    assert len(resumed) == 40
    assert worst_difference(resumed[:3], whole[:3]) < 1e-5
    assert [line["sample_ids"] for line in resumed] == [line["sample_ids"] for line in whole]


def test_only_the_newest_checkpoints_stay(train):
    run = train(1, {"training.steps": 7, "checkpoint.interval": 2, "checkpoint.keep": 3})
    assert [path.name for path in complete(run.folder / "checkpoints")] == [f"step_{n:08d}" for n in (4, 6, 7)]
    assert train(1, {"training.steps": 7}).metrics == run.metrics  # nothing is left to do


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.layers": 1}, r"was made with model.layers=2, this run has 1"),
        ({"run.seed": 4}, r"was made with run.seed=3, this run has 4"),
        ({"data.pairs_per_step": 5}, r"was made with data.pairs_per_step=6, this run has 5"),
        ({"training.precision": "bf16"}, r"was made with training.precision=fp32, this run has bf16"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(train, overrides, message):
    train(1)
    refused = train(1, {"training.steps": 5} | overrides, status=2)
    assert message in refused.ranks.text()
    assert (
        "use the configuration and the data in its run folder, or start in another run.folder" in refused.ranks.text()
    )


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


# bad luck


@pytest.fixture
def spoiled(tiny, tmp_path):
    """The tiny pairs, copied, with some images overwritten inside a shard whose index does not know it yet."""
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    shutil.copytree(tiny.folder / "pairs", tmp_path / "pairs")
    index = SampleIndex([tmp_path / "pairs"])
    bad = [3, 30, 31]
    for pair in bad:
        place = index.location(pair)
        with Path(place.path).open("r+b") as file:
            file.seek(place.offset + place.bytes // 2)
            file.write(b"\0" * (place.bytes // 2))
    return str(tmp_path / "pairs"), bad


def test_bad_images_are_masked_and_the_loss_is_the_rest(train, spoiled, one_rank):
    folder, bad = spoiled
    settings = {"data.pairs": folder, "training.steps": 10, "data.max_bad_share": 0.5}
    wanted = train(1, settings, name="one")
    assert sum(line["bad_pairs"] for line in wanted.metrics) == len(bad)  # ten steps of six pairs are one epoch
    assert all(line["pairs"] == 6 for line in wanted.metrics)
    quarantined = [json.loads(line) for line in (wanted.folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["pair"] for line in quarantined) == bad
    assert all(line["shard"] and line["key"] and "does not decode" in line["reason"] for line in quarantined)
    layouts = [
        (3, {"parallel.encoder": 1}),
        (4, {"parallel.tensor": 2}),
        (3, {"parallel.pipeline": 2, "parallel.encoder": 1}),
        (4, {"parallel.pipeline": 2, "parallel.tensor": 2, "parallel.sequence": True}),
    ]
    for name, (ranks, layout) in enumerate(layouts):
        lines = train(ranks, settings | layout, name=f"layout{name}").metrics
        assert worst_difference(lines, wanted.metrics) < 1e-5
        assert [line["bad_pairs"] for line in lines] == [line["bad_pairs"] for line in wanted.metrics]
    half = train(3, settings | {"parallel.encoder": 1, "training.precision": "bf16"}, name="bf16").metrics
    norms = [[line["gradient_norm"] for line in lines] for lines in (half, wanted.metrics)]
    assert norms[0][:3] == pytest.approx(norms[1][:3], rel=0.05)
    clean = reference(train, one_rank, **{"training.steps": 10})
    first = next(n for n, line in enumerate(wanted.metrics) if line["bad_pairs"])
    assert identical(wanted.metrics[:first], clean[:first])
    assert wanted.metrics[first]["target_tokens_pairs"] < clean[first]["target_tokens_pairs"]


def test_a_run_on_weighted_sources_with_bad_data_goes_on(train, tiny, tmp_path):
    """What is seen to be bad beforehand is in the index's quarantine, what is found while training in the run's."""
    content = {}
    for name in ("whole", "torn", "zero", "words"):
        image = io.BytesIO()
        Image.new("CMYK", (300, 200), (0, 200, 30, 0)).save(image, "JPEG")
        content[name] = image.getvalue()
    content |= {"torn": content["torn"][:-500], "zero": b"", "words": b"<html>not found</html>"}
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, data in content.items():
            for ending, part in ((".jpg", data), (".txt", b"a red circle")):
                member = tarfile.TarInfo(name + ending)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    report = index_shards([tmp_path / "odd.tar"], tmp_path / "odd", tiny.tokenizer)
    assert (report.taken, report.rejected) == (2, {"not an image": 2})
    sources = [{"path": str(tiny.folder / "pairs"), "weight": 2}, {"path": str(tmp_path / "odd"), "weight": 1}]
    run = train(3, {"data.pairs": sources, "data.max_bad_share": 0.5, "parallel.encoder": 1})
    assert [line["pairs"] for line in run.metrics] == [6, 6, 6]
    assert [line["bad_pairs"] for line in run.metrics] == [1, 1, 1]  # two of six are of the second source, one is torn
    lines = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    shard = str(tmp_path / "odd.tar")
    assert {(line["shard"], line["key"]) for line in lines} == {(shard, "torn")}
    lines = [json.loads(line) for line in (tmp_path / "odd" / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["shard"], line["key"]) for line in lines} == {(shard, key) for key in ("zero", "words")}


def test_too_many_bad_images_stop_the_run_with_one_line(train, spoiled):
    settings = {"data.pairs": spoiled[0], "training.steps": 10, "data.max_bad_share": 0.0, "parallel.encoder": 1}
    stopped = train(3, settings, status=2)
    said = [line for line in stopped.ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert len(said) == 1
    assert re.search(r"data\.max_bad_share=0\.0: \d of the \d+ pairs up to step=\d could not be read", said[0])
    assert "see quarantine.jsonl in run.folder" in said[0]


def test_a_shard_that_changed_is_refused_before_anything_is_trained(train, spoiled):
    folder = Path(spoiled[0])
    with (folder.parent / "shards" / "000000.tar").open("ab") as file:
        file.write(b"\0")
    refused = train(3, {"data.pairs": str(folder), "parallel.encoder": 1}, status=2)
    said = [line for line in refused.ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert len(said) == 1
    assert re.search(r"000000\.tar has \d+ bytes, its index was made for \d+; copy it again", said[0])
    assert not (refused.folder / "metrics.jsonl").exists()


def slowly(config: Path) -> int:
    """Train, but writing a checkpoint takes much longer than a step."""
    write = CheckpointStore._write_pieces

    def wait(self, *args):
        time.sleep(3.0)
        return write(self, *args)

    CheckpointStore._write_pieces = wait
    return main(["train", str(config)])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(start_ranks, tiny, tmp_path):
    settings = {"optimizer.learning_rate": 1e30, "optimizer.gradient_clip": 0.0, "optimizer.warmup_steps": 0}
    settings |= {"training.steps": 9, "checkpoint.interval": 1, "parallel.encoder": 1}
    config = tiny.write(tmp_path / "run.yaml", settings)
    ranks, folder = start_ranks(3, lambda: slowly(config)), config.with_suffix("")
    assert ranks.wait() == [1, 1, 1]
    assert json.loads((folder / "ended.json").read_text()) == {"status": 1}
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "weights unchanged; samples in it: pairs [" in said
    step = int(said.split("step=")[1].split(":")[0])
    (newest, *_) = reversed(complete(folder / "checkpoints"))
    assert newest.name == f"step_{step:08d}"  # the save before it was completed, the step that failed left no trace
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == step


def overflow(config: Path) -> int:
    """Train, but in the second step a gradient is infinite though the loss is not."""
    backward, calls = Engine.backward, []

    def spoil(self, *args):
        backward(self, *args)
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            next(self.gradients())[1][0] = float("inf")

    Engine.backward = spoil
    return main(["train", str(config)])


def test_a_gradient_that_is_not_finite_changes_no_weight(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml", {"checkpoint.interval": 1})
    ranks = start_ranks(2, lambda: overflow(config))
    assert ranks.wait() == [1, 1]
    (said,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    assert "step=1: the gradient's norm is inf; weights unchanged; resume with a lower optimizer.learning_rate" in said
    assert [path.name for path in complete(config.with_suffix("") / "checkpoints")] == ["step_00000001"]


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


def test_the_run_folder_says_what_was_run(train):
    run = train(2, {"parallel.encoder": 1})
    marks = json.loads((run.folder / "encoders.json").read_text())
    assert marks == {"clip_convnext_small": "random 3", "dinov2_small": "random 3"}
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.folder / "tensorboard").iterdir())
    for number, line in enumerate(run.metrics):
        assert line["step"] == number
        assert line.keys() >= KEYS
        assert 0 < line["model_flops_utilization"] < 1
        assert line["text_tokens"] == 150


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, {}),
        (3, {"parallel.tensor": 2, "parallel.encoder": 1}),
        (4, {"parallel.pipeline": 2}),
        (4, {"parallel.pipeline": 2, "parallel.expert": 2, "model.experts": 4}),
        (4, {"parallel.expert": 2, "model.experts": 4}),
        (2, {"training.train": "projections", "parallel.expert": 2, "model.experts": 4}),
        (4, {"training.train": "language", "parallel.pipeline": 2}),
    ],
    ids=str,
)
def test_ranks_hold_what_zero2_needs(train, world, overrides):
    model = {"model.layers": 3, "model.hidden": 64, "training.precision": "bf16"}
    text = train(world, model | overrides).ranks.text(0)
    found = facts_of_ranks(text, "bytes of")
    assert len(found) == world - overrides.get("parallel.encoder", 0)
    for line in found:
        numbers = re.findall(r"(\w+) ([\d,]+) \(formula ([\d,]+)\)", line)
        assert [name for name, *_ in numbers] == ["weights", "gradients", "optimizer"]
        for name, held, formula in numbers:
            held, formula = (int(number.replace(",", "")) for number in (held, formula))
            # DeepSpeed pads each of three groups so that its partitions begin at 4 bytes
            assert formula <= held <= formula + (0 if name == "weights" else 12 * 3 * 2 * world), line


# the schedule


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, minimum_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 15) for step in range(15)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=-1: must be at least 0"):
        OptimizerConfig(warmup_steps=-1)
