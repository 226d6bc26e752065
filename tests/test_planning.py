"""The planner: its arithmetic beside what really is kept, held and sent; its refusals; its choice; published runs."""

import ctypes
import gc
import json
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import yaml
from test_model import groups
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.config import Config
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.attention import PackedRows
from megatron_sphinx.model.experts import Routing
from megatron_sphinx.model.language import build_language
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing import activations, counts, hardware, memory, published, search
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.layouts import request_of, work_of
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training import loop

MEDIUM = {
    "model.layers": 4, "model.hidden": 512, "model.ffn": 1408, "model.heads": 8, "model.groups": 4,
    "data.text_tokens_per_step": 8000, "data.pairs_per_step": 4, "data.sequence_length": 1024, "training.steps": 2,
    "checkpoint.interval": 100, "training.precision": "fp32",
}  # fmt: skip


@cache
def one_rank() -> ProcessGroups:
    """The groups of a rank alone, made once."""
    return groups()


def kept_bytes(layers: int, dtype: torch.dtype, recompute: str, lengths: list[int], **shape: int) -> float:
    """What autograd keeps for backward of a decoder of so many layers, for each position."""
    values = {"hidden": 96, "ffn": 208, "heads": 6, "groups": 3, "vocabulary": 300} | shape
    config = LanguageConfig(layers=layers, **values)
    model = build_language(config, one_rank(), dtype=dtype, sequence_length=max(lengths), recompute=recompute)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    count = sum(lengths)
    hidden = torch.randn(count, 1, config.hidden, dtype=dtype, requires_grad=True)
    routing = None
    if config.experts:
        row = torch.zeros(count, dtype=torch.int64)
        routing = Routing(row, torch.zeros_like(row), torch.tensor([count]), 1.0)
    tokens = torch.zeros(1, count, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = model(
            input_ids=tokens, position_ids=None, attention_mask=None, decoder_input=hidden, labels=tokens,
            packed_seq_params=PackedRows.of(
                lengths, torch.device("cpu"), routing=routing, rotation=model.rotation(lengths)
            ),
        )  # fmt: skip
    assert out.requires_grad
    return sum(kept.values()) / count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(run_ranks, precision):
    rng = random.Random(precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    head, per_group, kv = 2 * rng.randint(4, 12), rng.randint(1, 3), rng.randint(1, 4)
    shape = {"hidden": head * per_group * kv, "heads": per_group * kv, "groups": kv, "ffn": rng.randint(40, 300)}
    lengths = sorted(rng.randint(8, 90) for _ in range(3))

    def check() -> None:
        for recompute in ("none", "selective", "full"):
            measured = [kept_bytes(n, dtype, recompute, lengths, **shape) for n in (1, 2)]
            model = LanguageConfig(layers=2, vocabulary=300, **shape)
            planned, _ = activations.layer_bytes(model, ParallelConfig(), precision, recompute)
            assert planned == pytest.approx(measured[1] - measured[0], rel=0.01), (recompute, shape)

    run_ranks(1, check)


def test_activations_of_experts(run_ranks):
    """Which the experts hold themselves is partly out of autograd's sight, and padded where the router is uneven."""

    def check() -> None:
        measured = [kept_bytes(n, torch.bfloat16, "none", [200, 200], experts=4) for n in (1, 2)]
        model = LanguageConfig(layers=2, hidden=96, ffn=208, heads=6, groups=3, vocabulary=300, experts=4)
        planned, _ = activations.layer_bytes(model, ParallelConfig(), "bf16", "none")
        assert measured[1] - measured[0] < planned < 1.35 * (measured[1] - measured[0])

    run_ranks(1, check)


def held(config: Path) -> int:
    """Train, and print the most bytes that were resident on this rank.

    What the tests before this one have freed goes back to the system first: training would move into it, and less
    would be seen than it holds.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    status = main(["train", str(config)])
    lines = Path("/proc/self/status").read_text().splitlines()
    sys.stdout.write(f"PEAK {1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))}\n")
    return status


@pytest.fixture(scope="module")
def small_peaks() -> dict[int, int]:
    """Resident bytes of a rank that trains next to nothing, by the ranks of the job: measured once."""
    return {}


def random_layout(seed: int) -> tuple[int, dict[str, object]]:
    """Ranks and overrides of a random layout of two or fewer ranks."""
    rng = random.Random(seed)
    world = rng.choice([1, 2, 2])
    axes: list[dict[str, object]] = [{}]
    if world == 2:
        axes = [
            {}, {"parallel.tensor": 2}, {"parallel.tensor": 2, "parallel.sequence": True}, {"parallel.pipeline": 2},
            {"parallel.encoder": 1}, {"model.experts": 4, "model.ffn": 512, "parallel.expert": 2},
        ]  # fmt: skip
    return world, rng.choice(axes) | {
        "model.layers": rng.randint(3, 6), "model.ffn": 128 * rng.randint(4, 12),
        "data.micro_batch_rows": rng.choice([1, 2, 4]),
        "training.activation_checkpointing": rng.choice(["none", "none", "selective", "full"]),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_memory_of_random_layouts(start_ranks, tiny, tmp_path, small_peaks, seed):
    """Predicted within 10 % of what each rank held at most."""

    def peaks(world: int, overrides: dict[str, object], name: str) -> tuple[Config, list[int]]:
        path = tiny.write(tmp_path / f"{name}.yaml", overrides)
        ranks = start_ranks(world, lambda: held(path))
        assert ranks.wait(240) == [0] * world, ranks.text()
        found = [[line for line in ranks.text(rank).splitlines() if line.startswith("PEAK")] for rank in range(world)]
        return configuration.load(path), [int(lines[0].split()[1]) for lines in found]

    world, overrides = random_layout(seed)
    if world not in small_peaks:
        small_peaks[world] = peaks(world, {"training.steps": 2}, "small")[1][0]
    config, measured = peaks(world, MEDIUM | overrides, "medium")
    layout = ParallelLayout(world=world, config=config.parallel)
    machine = replace(hardware.load("cpu"), process_bytes=small_peaks[world], memory_bytes=1e12)
    roles = memory.peak(config, layout, work_of(config)[0], machine, encoder_cost(config.vision))
    for rank, most in enumerate(measured):
        seat = layout.seat(rank)
        if seat.encoder is None:
            parts = roles[f"language stage {seat.pipeline}"]
            assert parts["total"] == pytest.approx(most, rel=0.10), (overrides, parts)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"parallel.tensor": 2},
        {"parallel.tensor": 2, "parallel.sequence": True},
        {"parallel.pipeline": 2},
        {"model.experts": 4, "parallel.expert": 2},
        {"parallel.tensor": 2, "training.activation_checkpointing": "full"},
    ],
)
def test_bytes_of_collectives(run_ranks, tiny, tmp_path, monkeypatch, overrides):
    """What a step sends is what megatron-core and DeepSpeed hand to torch.distributed, in groups of two."""
    path = tiny.write(tmp_path / "run.yaml", {"training.steps": 2, "training.precision": "fp32"} | overrides)
    config = configuration.load(path)
    layout = ParallelLayout(world=2, config=config.parallel)
    work, _ = work_of(config)
    planned = counts.communication(TrainingSetup.ours(config, is_cuda=False), layout, work)
    steps: list[Counter[str]] = []
    train_step = loop.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        with CountBytes() as counts:
            report = train_step(*args, **kwargs)
        steps.append(counts.found)
        return report

    monkeypatch.setattr(loop, "train_step", counted)

    def check() -> None:
        assert main(["train", str(path)]) == 0
        (tmp_path / os.environ["RANK"]).write_text(json.dumps(steps[0]))

    run_ranks(2, check)
    sent = [Counter(json.loads((tmp_path / str(rank)).read_text())) for rank in range(2)]
    for role, transfers in planned.items():
        ranks = [rank for rank in range(2) if role == f"language stage {layout.seat(rank).pipeline}"]
        expected: Counter[str] = Counter()
        for transfer in transfers:
            expected[transfer.kind] += transfer.bytes
        for kind, total in expected.items():
            found = sum(sent[rank][kind] for rank in ranks) / len(ranks)  # replicas have unlike rows
            assert found == pytest.approx(total, rel=0.05), (role, kind, expected, sent)


class CountBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to each kind of collective in groups of several ranks."""

    KINDS: ClassVar = {
        "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
        "alltoall_base_": "all_to_all", "send": "send", "broadcast_": "broadcast",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name in self.KINDS:
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            inputs = args[1] if name in ("_reduce_scatter_base_", "alltoall_base_") else args[0]
            values = [inputs] if isinstance(inputs, torch.Tensor) else inputs
            large = [value for value in values if value.numel() > 24]  # reports and counts are less
            if group.size() > 1:
                self.found[self.KINDS[name]] += sum(value.nbytes for value in large)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["a100-80g", "h100-80g"])
def test_the_best_layout_is_the_fastest_of_those_that_fit(kind):
    config = configuration.load(Path("sphinx_7b"))
    job, origin = request_of(config, nodes=2, ranks_per_node=4, kind=kind)
    assert origin.startswith("expected")
    found, refusals = search.search(job)
    times = [candidate.seconds.total for candidate in found]
    assert times == sorted(times)
    assert len(found) > 20
    for candidate in found:
        assert memory.heaviest(candidate.memory)[1] <= job.hardware.usable_bytes
        again = search.evaluate(job, candidate.config)  # as the command line would build it
        assert again.seconds == candidate.seconds
    assert refusals.counts["out of memory"] > 0
    assert "GB of 72.0 GB" in refusals.examples["out of memory"]


def test_more_memory_refuses_less():
    config = configuration.load(Path("sphinx_13b"))
    refused = []
    for kind in ("a100-40g", "a100-80g", "h200-141g"):
        job, _ = request_of(config, nodes=1, ranks_per_node=8, kind=kind)
        refused.append(search.search(job)[1].counts.get("out of memory", 0))
    assert refused == sorted(refused, reverse=True)
    assert refused[0] > refused[-1]


def test_the_command_prints_a_table_and_json(capsys):
    args = ["plan", "sphinx_tiny", "--nodes", "1", "--gpus-per-node", "4", "--gpu", "a100-80g"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "4 ranks, a100-80g" in out
    assert "layouts can be run" in out
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["best"][0]
    assert f"the first one: {' '.join(best['overrides'])}" in out
    assert best["step_seconds"] == pytest.approx(
        sum(value for name, value in best["seconds"].items() if name != "encoder")
    )
    assert set(best["bytes"]) >= {"language stage 0"}
    assert main(["plan", "sphinx_tiny", *best["overrides"], *args[2:], "--as-configured", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["best"][0]
    assert alone["step_seconds"] == pytest.approx(best["step_seconds"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sphinx_13b", "parallel.tensor=1", "parallel.sequence=false", "--as-configured", "--gpu", "a100-40g"],
         "language stage 0 needs"),
        (["sphinx_moe", "--gpu", "a100-40g"], "none of the"),
        (["sphinx_7b", "--gpu", "a100"], "--gpu=a100: unknown; did you mean a100-"),
        (["sphinx_7b", "--gpu", "absent.yaml"], "--gpu=absent.yaml: No such file"),
        (["sphinx_7b", "data.pairs_per_step=2", "data.text_tokens_per_step=0", "data.row_multiple=1",
          "--as-configured", "--gpu", "a100-80g"], "makes 1 rows a step for 8 data-parallel replicas"),
        (["sphinx_7b", "parallel.tensor=3", "--as-configured", "--gpu", "a100-80g"], "parallel.tensor=3: must divide"),
        (["sphinx_7b", "parallel.pipeline=3", "--as-configured", "--gpu", "a100-80g"], "must divide the 8 language"),
        (["--nodes", "1"], "plan: give a configuration"),
        (["sphinx_7b", "--calibrate", "here"], "--calibrate=here: must be the path of a .yaml"),
    ],
)  # fmt: skip
def test_refusals(args, message, capsys):
    nodes = [] if "--nodes" in args or "--calibrate" in args else ["--nodes", "1", "--gpus-per-node", "8"]
    assert main(["plan", *args, *nodes]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold keys such as"),
        ("base: a100", "base=a100: unknown hardware; did you mean a100-"),
        ("{base: a100-80g, memory: 3}", "memory: unknown key"),
        ("{base: a100-80g, memory_bytes: 0}", "memory_bytes=0.0: must be more than 0"),
        ("{", "not YAML"),
    ],
)
def test_hardware_files(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        hardware.load(str(file))


def test_a_hardware_file_changes_what_it_says(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "h100-80g", "network_bandwidth": 12.5e9}))
    mine = hardware.load(str(file))
    assert mine == replace(hardware.load("h100-80g"), network_bandwidth=12.5e9)
    with pytest.raises(ConfigError, match=r"training\.precision=fp8: .* has no such matrix products"):
        hardware.load("a100-80g").matmul_flops("fp8")


@pytest.mark.parametrize("kind", hardware.kinds())
def test_every_hardware_names_its_source(kind):
    assert hardware.load(kind).source


def test_published_runs(capsys):
    """The model is what README prints of it: of the runs that nothing was fitted to, most within 15 %."""
    assert main(["plan", "--published"]) == 0
    assert "predictions within 15 %" in capsys.readouterr().out
    rows = list(published.rows())
    assert all(row["source"] for row in rows)
    assert all(0.9 < row["ratio"] < 1.1 for row in rows if row["is_fitted"])
    near = [abs(row["ratio"] - 1) <= 0.15 for row in rows if not row["is_fitted"]]
    assert sum(near) >= 0.8 * len(near)


def test_work_of_expected_and_planned_steps_agree(tiny, tmp_path):
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    planned, origin = work_of(config)
    assert origin.startswith("planned")
    expected = Work.expected(config)
    total = [work.rows * work.positions for work in (planned, expected)]
    assert total[1] == pytest.approx(total[0], rel=0.3)
    assert planned.rows * planned.views == expected.rows * expected.views == config.data.pairs_per_step


def test_flops_are_the_models(tiny, tmp_path):
    """All ranks together compute what LanguageConfig.train_flops counts, attention's backward and padding aside."""
    rng = random.Random(7)
    config = configuration.load(tiny.write(tmp_path / "run.yaml", {"model.vocabulary": 256}))
    work = replace(work_of(config)[0], rows=8)
    sizes = ParallelConfig(tensor=rng.choice([1, 2]), pipeline=rng.choice([1, 2]))
    layout = ParallelLayout(world=4, config=sizes)
    found = counts.flops(TrainingSetup.ours(config, is_cuda=True), layout, work)
    parts = ((part["matrices"], part["logits"], part["attention"] * 3 / 3.5) for part in found.values())
    counted = work.rows * work.language_flops(config.model)
    assert sum(map(sum, parts)) * layout.stage == pytest.approx(counted, rel=1e-6)


def test_calibration_writes_hardware_that_plans(tiny, tmp_path, capsys):
    path, target = tiny.write(tmp_path / "run.yaml", {"training.precision": "fp32"}), tmp_path / "here" / "mine.yaml"
    assert main(["plan", str(path), "--ranks", "2", "--calibrate", str(target)]) == 0
    found = hardware.load(str(target))
    assert "2 ranks" in found.source
    assert not found.is_cuda
    assert min(found.kernel_seconds, found.latency_seconds, found.shares.encoders, found.shares.attention) > 0
    assert found.memory_bytes > found.process_bytes > 50e6
    capsys.readouterr()
    args = ["--nodes", "1", "--gpus-per-node", "2", "--gpu", str(target), "--as-configured", "--json"]
    assert main(["plan", str(path), *args]) == 0
    seconds = json.loads(capsys.readouterr().out)["best"][0]["seconds"]
    assert min(seconds[name] for name in ("matrices", "kernels", "features", "reduction")) > 0
