"""Values of auto: what a run takes by the memory that there is, the same on all ranks, and kept when it goes on."""

import json
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from test_training import identical, worst_difference

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.config import Config
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing import automatic, hardware
from megatron_sphinx.sizing.memory import EncoderCost, heaviest, peak
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import Work

ROWS, VIEWS, PRECISION = "data.micro_batch_rows", "vision.batch_views", "vision.precision"


SHORT = ("model.layers=8", "training.activation_checkpointing=none")  # 2 billion weights that keep all activations

# what fits, by arithmetic


@cache
def sphinx(*overrides: str) -> tuple[Config, EncoderCost, Work]:
    """A preset on hardware with more or less memory, rows and views by auto."""
    config = configuration.load(Path("sphinx_7b"), [f"{ROWS}=auto", f"{VIEWS}=auto", *overrides])
    return config, encoder_cost(config.vision), Work.expected(config)


def settled(gigabytes: float, world: int, *overrides: str, kind: str = "h100-80g") -> automatic.Settled:
    config, encoders, work = sphinx(*overrides)
    machine = replace(hardware.load(kind), memory_bytes=gigabytes * 1e9)
    return automatic.settle(config, ParallelLayout(world=world, config=config.parallel), work, machine, encoders)


@pytest.mark.parametrize("gigabytes", [30, 40, 50, 80, 300])
@pytest.mark.parametrize("encoder", [0, 2])
def test_the_most_rows_are_taken_that_fit(gigabytes, encoder):
    overrides = (f"parallel.encoder={encoder}", *SHORT)
    found = settled(gigabytes, 16 + encoder, *overrides)
    config, encoders, work = sphinx(*overrides)
    layout = ParallelLayout(world=16 + encoder, config=config.parallel)
    machine = replace(hardware.load("h100-80g"), memory_bytes=gigabytes * 1e9)
    rows, replica_rows = found.config.data.rows_at_once, -(-work.rows // 16)

    def fits(rows: int) -> bool:
        data = replace(found.config.data, micro_batch_rows=rows)
        return (
            heaviest(peak(replace(found.config, data=data), layout, work, machine, encoders))[1] <= machine.usable_bytes
        )

    assert found.fits == fits(rows)
    assert 1 <= rows <= replica_rows
    assert rows == replica_rows or not fits(rows + 1)
    assert f"of {machine.usable_bytes / 1e9:.3g} usable GB" in found.reason


def test_more_memory_takes_more_rows_and_never_more_than_a_replica_has():
    rows = [settled(gigabytes, 16, *SHORT).config.data.rows_at_once for gigabytes in (32, 40, 50, 80, 1000)]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1] == -(-sphinx(*SHORT)[2].rows // 16)


def test_numbers_that_are_given_stay():
    found = settled(80, 16, *SHORT, "data.micro_batch_rows=3", "vision.batch_views=7", "vision.precision=fp32")
    assert (found.config.data.micro_batch_rows, found.config.vision.batch_views) == (3, 7)
    assert found.config.vision.precision == "fp32"


def test_where_nothing_fits_the_least_is_taken_and_said():
    found = settled(20, 16)
    assert (found.config.data.micro_batch_rows, found.config.vision.batch_views) == (1, 8)
    assert not found.fits
    assert "which does not fit; divide the model further" in found.reason


def test_a_pipeline_keeps_four_micro_batches_for_each_stage():
    rows = settled(1000, 16, *SHORT, "parallel.pipeline=2").config.data.rows_at_once
    assert rows == -(-sphinx(*SHORT)[2].rows // 8) // 8


def test_views_at_once_are_32_on_a_gpu_fewer_where_memory_is_short_and_8_on_a_cpu():
    """ConvNeXt has 19 million numbers of a view in memory: 38 MB in bf16."""
    short = ("model.layers=1", "stage.lookahead=1")  # so that micro-batches are not encoded together
    _, encoders, _ = sphinx(*short)
    least = settled(1000, 16, *short, f"{VIEWS}=8", f"{ROWS}=1").needed
    of_view = settled(1000, 16, *short, f"{VIEWS}=9", f"{ROWS}=1").needed - least
    assert of_view > 2 * encoders.values
    taken = {}
    for views in (8, 16, 32):
        enough = (least + (views - 7.5) * of_view) / 0.9 / 1e9
        taken[views] = settled(enough, 16, *short).config.vision.batch_views
    assert taken == {8: 8, 16: 16, 32: 32}
    assert settled(1000, 16, *short, kind="cpu").config.vision.batch_views == 8


def test_encoders_compute_in_what_the_hardware_is_fast_in():
    assert settled(1000, 16).config.vision.precision == "bf16"
    slow = replace(hardware.load("cpu"), flops=hardware.Flops(bf16=1e9, fp32=2e9))
    assert [slow.encoder_precision(asked) for asked in ("auto", "bf16", "fp32")] == ["fp32", "bf16", "fp32"]


@pytest.mark.parametrize(("views", "share"), [(1, 0.2), (8, 0.2), (16, 0.3), (32, 0.4), (500, 0.4)])
def test_shares_of_encoders_are_interpolated_by_views(views, share):
    shares = hardware.EncoderShares(clip=((8.0, 0.2), (32.0, 0.4)))
    machine = replace(hardware.load("a100-80g"), encoder_shares=shares)
    assert machine.encoder_flops("bf16", "clip", views) == pytest.approx(312e12 * share)
    assert machine.encoder_flops("bf16", "cnn", views) == pytest.approx(312e12 * 0.45)
    assert machine.encoder_flops("fp32", "clip", views) == pytest.approx(19.5e12 * 0.45)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data.micro_batch_rows=many", r"data\.micro_batch_rows=many: must be a whole number or auto"),
        ("data.micro_batch_rows=0", r"data\.micro_batch_rows=0: must be at least 1"),
        ("vision.batch_views=1.5", r"vision\.batch_views=1\.5: must be a whole number or auto"),
        ("vision.precision=fp16", r"vision\.precision=fp16: must be auto or bf16 or fp32"),
    ],
)
def test_what_is_neither_a_number_nor_auto_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        configuration.load(Path("sphinx_7b"), [text])


# runs


def test_losses_do_not_depend_on_what_is_taken(train):
    """A replica has few rows, and all of them fit."""
    wanted = train(1, {ROWS: 1}, name="one").metrics
    for name, (world, overrides) in enumerate([(1, {}), (2, {}), (3, {"parallel.encoder": 1})]):
        run = train(world, {ROWS: "auto", **overrides}, name=f"auto{name}")
        assert worst_difference(run.metrics, wanted) < 1e-5
        taken = yaml.safe_load((run.folder / "config.yaml").read_text())
        rows, views = taken["data"]["micro_batch_rows"], taken["vision"]["batch_views"]
        precision = taken["vision"]["precision"]
        assert isinstance(rows, int)
        assert rows > 1
        assert views == 8
        said = [line for line in run.ranks.text().splitlines() if line.startswith("auto: ")]
        assert len(said) == 1
        assert said[0].startswith(f"auto: {ROWS}={rows} {VIEWS}=8 {PRECISION}={precision}; by the plan ")
        assert said[0].endswith(" of 7.2 usable GB")  # a machine with more gives a rank no more than 8 GB


def test_the_rank_with_least_memory_decides(train, monkeypatch):
    """Two ranks of one machine each have half of it; one of another size has less."""
    own = [9e9, 1.3e9]

    def memory_bytes(self: Platform) -> int:
        return int(own[int(os.environ["RANK"])])

    monkeypatch.setattr(Platform, "memory_bytes", memory_bytes)
    run = train(2, {ROWS: "auto"})
    assert "of 0.585 usable GB" in run.ranks.text(0)  # half of the smaller machine, nine tenths of it


def test_a_run_that_goes_on_keeps_what_it_took(train, monkeypatch):
    """On a machine that is fast in another type, and has no memory for the rows; not where it begins anew."""
    auto = {ROWS: "auto", "training.steps": 4}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    whole = train(1, auto, name="whole")
    shutil.copytree(whole.folder, whole.folder.with_name("cut"))
    shutil.rmtree(whole.folder.with_name("cut") / "checkpoints" / "step_00000004")
    taken = yaml.safe_load((whole.folder / "config.yaml").read_text())
    assert (taken["vision"]["precision"], taken["data"]["micro_batch_rows"] > 1) == ("bf16", True)

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(Platform, "memory_bytes", lambda _: 200_000_000)
    again = train(1, auto, name="cut")
    assert identical(again.metrics, whole.metrics)
    values = f"{ROWS}={taken['data']['micro_batch_rows']} {VIEWS}=8 {PRECISION}=bf16"
    kept = (
        f"auto: {values}; {ROWS} and {VIEWS} and {PRECISION} as the run took before; by the plan language stage 0 holds"
    )
    assert kept in again.ranks.text()
    assert "of 0.18 usable GB, which does not fit" in again.ranks.text()
    assert "changed: data" not in again.ranks.text()
    assert "changed: vision" not in again.ranks.text()

    anew = train(1, auto | {"checkpoint.resume": "none", "training.steps": 1}, name="cut")
    assert f"auto: {ROWS}=1 {VIEWS}=8 {PRECISION}=fp32; by the plan" in anew.ranks.text()


def test_a_run_on_another_ones_checkpoint_keeps_what_that_took(train):
    first = train(1, {ROWS: 2, PRECISION: "fp32", "training.steps": 2}, name="first")
    resume = str(first.folder / "checkpoints" / "step_00000002")
    second = train(1, {ROWS: "auto", "checkpoint.resume": resume}, name="second")
    assert f"auto: {ROWS}=2 {VIEWS}=8 {PRECISION}=fp32; {ROWS} and {VIEWS} and {PRECISION} as" in second.ranks.text()


@pytest.mark.parametrize("kind", ["a100-80g", "h100-80g"])
def test_plans_tell_what_would_be_taken(tiny, tmp_path, capsys, kind):
    path = tiny.write(tmp_path / "run.yaml", {ROWS: "auto"})
    assert main(["plan", "layouts", str(path), "--gpus-per-node", "2", "--gpu", kind, "--as-configured", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"][0]
    rows = next(text.partition("=")[2] for text in best["overrides"] if text.startswith(ROWS))
    assert main(["plan", "step", str(path), "--ranks", "2", "--gpu", kind]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["micro_batch_rows"] == int(rows)
    assert max(len(line["rows"]) for line in lines[1:]) == int(rows)
    assert main(["plan", "dry-run", str(path), "--ranks", "2", "--gpu", kind, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert (counted["micro_batch_rows"], counted["batch_views"]) == (int(rows), 32)
