"""The dry run: what it counts equals what real ranks count, and what arithmetic says."""

import json
import pickle
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.sources import open_sources
from megatron_sphinx.device import Platform, current_platform
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.sizing import dry_run
from megatron_sphinx.sizing.rank_counts import RankCounts
from megatron_sphinx.sizing.recorder import HOST, Recorder
from megatron_sphinx.sizing.work import CAPTION_TOKENS
from megatron_sphinx.stage.channel import shares_of

MIXTRAL = {"model.experts": 4, "model.balance_loss_coefficient": 0.01, "model.z_loss_coefficient": 0.001}
LAYOUTS = {
    "tensor and data, one encoder": (5, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.encoder": 1}),
    "pipeline, two encoders": (6, {"parallel.pipeline": 2, "parallel.encoder": 2, "training.precision": "bf16"}),
    "colocated, computed again": (
        2, {"training.precision": "bf16", "training.activation_checkpointing": "full", "model.groups": 4},
    ),
    "experts": (
        5,
        MIXTRAL | {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2, "parallel.encoder": 1,
                   "training.precision": "bf16", "training.activation_checkpointing": "selective"},
    ),
    "projections alone": (3, {"training.train": "projections", "parallel.encoder": 1}),
}  # fmt: skip


@dataclass(frozen=True)
class HostPixels:
    """A PixelLoader whose pictures are known to be in the CPU's memory, not the device's."""

    loader: PixelLoader
    recorder: Recorder

    def submit(self, views):
        pending = self.loader.submit(views)
        self.recorder.name(HOST, *pending.pixels.values())
        return pending


@dataclass(frozen=True, kw_only=True)
class HostContext(RankContext):
    """A RankContext whose pictures are known to be in the CPU's memory."""

    recorder: Recorder

    def pixels(self):
        return HostPixels(super().pixels(), self.recorder)


def take_real_step(config: configuration.Config, layout: ParallelLayout, target: Path) -> None:
    """A rank's first step in a real world, counted by our counter and by torch's."""
    here = Platform(current_platform().device, "gloo", is_bf16_fast=True)
    dist.init_process_group("gloo")
    groups = ProcessGroups.create(layout, "gloo")
    planner, _ = dry_run.plan_of(config, layout)
    recorder = Recorder(dry_run.axes(groups))
    sources = open_sources(config.data, config.model)
    context = HostContext(config, here, groups, sources, planner, recorder=recorder)
    seat = groups.seat
    if seat.encoder is not None:
        assembly.encode_steps(context, context.encoders(), 0, 1)
        dist.barrier()  # what it sent is taken
        return
    builder = BatchBuilder(config.data, sources, config.vision, planner.multiple)
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * prod(a) * b[-1]}  # which torch does not count
    torchs = FlopCounterMode(
        display=False, custom_mapping=grouped
    )  # it keeps activations alive, so it counts where memory is not compared
    with torchs if seat.rank else nullcontext():
        counted = dry_run.language_step(context, recorder, builder)
    dist.barrier()
    (target / str(seat.rank)).write_bytes(pickle.dumps((counted, torchs.get_total_flops())))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_equal_those_of_real_ranks(run_ranks, tiny, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    config = configuration.load(tiny.write(tmp_path / "run.yaml", overrides))
    placed = ParallelLayout(world=world, config=config.parallel)
    Path(config.run.folder).mkdir()
    run_ranks(world, lambda: take_real_step(config, placed, tmp_path))
    for rank in sorted({0, placed.language - 1}):
        real, flops = pickle.loads((tmp_path / str(rank)).read_bytes())

        def check(rank: int = rank, real: RankCounts = real, flops: int = flops) -> None:
            found = dry_run.count(config, placed, rank)
            assert found.parameters == real.parameters
            assert found.held == real.held
            assert found.collectives == real.collectives
            assert found.flops == real.flops
            if rank:
                assert found.flops["matrices"] == flops  # torch's counter knows nothing of attention on the CPU
                return
            # Gloo holds messages a little longer; then of two nearly equal moments the other is the peak.
            messages = (real.collectives.get(key, (1, 0)) for key in (("pipeline", "send"), ("data", "reduce-scatter")))
            longer = sum(ceil(nbytes / times) for times, nbytes in messages)
            small = sum(nbytes for part, nbytes in real.peak.items() if part != "reduction")
            total = pytest.approx(sum(real.peak.values()), rel=0, abs=0.01 * small + 2048 + longer)
            assert (sum(found.peak.values()), lasting(found.peak)) == (total, lasting(real.peak))

        run_ranks(1, check)


def lasting(peak: dict[str, int]) -> dict[str, int]:
    """Of what is held, what is held all through a step."""
    return {part: peak[part] for part in ("weights", "optimizer", "features") if part in peak}


PAIRS = ["data.pairs_per_step=64", "data.text_tokens_per_step=0"]
PRESETS = {
    "sphinx_7b": (34, ["parallel.encoder=2", "model.layers=4", *PAIRS]),
    "sphinx_13b": (17, ["parallel.encoder=1", "parallel.pipeline=4", "model.layers=8", *PAIRS]),
    "sphinx_moe": (66, ["parallel.encoder=2", "model.layers=4", "data.conversations_per_step=16"]),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_few_layers(preset, capsys):
    world, overrides = PRESETS[preset]
    assert main(["plan", preset, "--ranks", str(world), "--dry-run", "--json", *overrides]) == 0
    found = json.loads(capsys.readouterr().out)
    config = configuration.load(Path(preset), overrides)
    layout = ParallelLayout(world=world, config=config.parallel)
    stages = config.parallel.pipeline
    names = ["language"] if stages == 1 else [f"language, stage {stage}" for stage in range(stages) if stage != 2]
    assert list(found["roles"]) == [*names, "encoder"]
    for role in names:
        counted, formula = (found["roles"][role][which] for which in ("counted", "formula"))
        assert counted["parameters"] == formula["parameters"]
        for part in ("weights", "gradients", "optimizer"):
            assert counted[f"bytes held: {part}"] == pytest.approx(formula[f"bytes held: {part}"], rel=1e-3)
        assert counted["bytes at the peak"] >= counted["bytes held: weights"] + counted["bytes held: optimizer"]
        times = 1 if stages > 1 else found["micro_batches"]  # in a pipeline once, when the schedule has ended
        for name in ("FLOPs", *(name for name in formula if name.endswith(": bytes"))):
            assert counted[name] == pytest.approx(formula[name], rel=0.01), name
        reduced = sum(counted.get(f"{group} reduce-scatter: bytes", 0) for group in ("data", "expert_data"))
        assert reduced == pytest.approx(4 * counted["parameters"] * times, rel=1e-3), "gradients travel in fp32"
    planner, _ = dry_run.plan_of(config, layout)
    shares = [share for micro in planner.step(0).micro_batches for share in shares_of(micro, config.parallel.encoder)]
    views = sum(share.count for share in shares if share.encoder == 0)
    encoder = found["roles"]["encoder"]
    assert encoder["counted"]["features send: bytes"] == 2 * views * config.vision.feature_values
    assert encoder["counted"]["FLOPs"] >= encoder["formula"]["FLOPs"], "batches are filled up"


def test_the_readable_table(tiny, tmp_path, capsys):
    config = tiny.write(tmp_path / "run.yaml", {"parallel.encoder": 1})
    assert main(["plan", str(config), "--ranks", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "tensor 1 x data 2 + encoder 1 = 3 ranks" in out
    assert "step: step 0 of the run's data" in out
    line = next(line for line in out.splitlines() if line.startswith("  bytes held: optimizer"))
    assert len(set(line.split()[-2:])) == 1  # counted, formula


def test_what_is_made_up_has_the_steps_composition():
    config = configuration.load(Path("sphinx_7b"))
    planner, said = dry_run.plan_of(config, ParallelLayout(world=8, config=config.parallel))
    plan = planner.step(0)
    assert said.startswith(
        "made up, for weights/tokenizer.model is not there: 640 samples with all views and 20 tokens"
    )
    assert len(plan.samples) == 640
    assert sum(tokens for _, _, tokens in plan.text) == 65536
    assert plan.targets(of_samples=True) == 640 * (CAPTION_TOKENS + 1)


def test_a_rank_that_fails_is_an_error(tiny, tmp_path, monkeypatch):
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    monkeypatch.setattr(dry_run, "count", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="the dry run of language failed; see above"):
        dry_run.report(config, ParallelLayout(world=1, config=config.parallel), "a100-80g")


def test_memory_is_counted_by_part_and_time(run_ranks):
    def check() -> None:
        recorder = Recorder({})
        kept = torch.zeros(10)
        with recorder:
            with recorder.memory_for("weights"):
                weights = torch.zeros(100)
            before = torch.zeros(1000)
            del before
            recorder.begin()
            some = torch.zeros(200) + 1  # two at once
            more = some[:3] * 2
            recorder.name(HOST, kept.view(-1))
            assert recorder.peak() == {"weights": 400, "other": 1600}
            del some, more
            weights.view(10, 10) @ weights.view(10, 10)
            assert recorder.flops == {"matrices": 2 * 10 * 10 * 10, "attention": 0}

    run_ranks(1, check)
