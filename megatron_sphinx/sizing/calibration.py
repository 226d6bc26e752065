"""Measures this machine and writes a hardware file: what a job's ranks on it reach, at the shapes of its model.

torchrun starts this module once for each rank: the ranks of a job share cores, memory and links, so all are measured
at the same time.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from megatron_sphinx import config as configuration
from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.device import current_platform
from megatron_sphinx.errors import ConfigError, SphinxError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.attention import PackedRows
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.language import build_language
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.launch import run_launcher
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job
from megatron_sphinx.sizing import automatic
from megatron_sphinx.sizing.hardware import Efficiency, Flops, Hardware, load
from megatron_sphinx.sizing.layouts import work_of
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.step_time import OPERATIONS
from megatron_sphinx.sizing.work import Work

_REPEATS = 5  # of each measurement, after one that warms up
_LARGE, _SMALL = 4 * 2**20, 16  # numbers in a large and in a small message
_LAYERS = 4  # how many decoder layers are timed on next to no tokens


class CalibrationError(SphinxError):
    """The ranks that measure did not end well."""

    exit_status = 1


def calibrate(config: Config, *, ranks: int, target: Path) -> Hardware:
    """Measure this machine, write a hardware file, and say what was measured.

    Args:
        config: the run whose shapes are measured.
        ranks: how many processes measure at once.
        target: path of the hardware file.

    Raises:
        CalibrationError: a rank failed.
        ConfigError: the target is no YAML file.
    """
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--calibrate={target}: must be the path of a .yaml file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.yaml"
        resolved.write_text(config.to_yaml())
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["-m", __name__, str(resolved), str(target)]
        errors = Path(folder) / "stderr.txt"
        with open(os.devnull, "w") as nowhere, errors.open("w") as stderr:
            status = run_launcher(command, stdout=nowhere, stderr=stderr)
        if status:
            raise CalibrationError(f"{' '.join(command)}: ended with {status}: {errors.read_text()[-2000:]}")
    measured = load(str(target))
    say(f"{target}: {measured.source}")
    for name, value in asdict(measured).items():
        if name not in ("source", "shares"):
            say(f"  {name:20}{value}")
    return measured


def measure(config: Config, groups: ProcessGroups) -> Hardware:
    """Measure what this rank reaches while all others measure at the same time; return the slowest rank's numbers."""
    platform = current_platform()
    work, _ = work_of(config)
    config = _settled(config, work)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    positions = max(1, round(min(work.rows, config.data.rows_at_once) * work.positions))
    dtype = dtypes[config.training.precision]
    products = {name: _least(_matmul_flops(config.model, positions, kind)) for name, kind in dtypes.items()}
    attention = _least(_attention_flops(config.model, work, dtype)) / products[config.training.precision]
    encoding = _least(_encoder_flops(config)) / products[config.vision.precision]
    bandwidth = _least(_memory_bandwidth())
    kernel = _most(_kernel_seconds(config, groups, dtype))
    latency, link = _link()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Hardware(
        source=f"measured by {dist.get_world_size()} ranks on one {platform.device.type} machine, at the shapes of "
        f"{config.model.preset or config.run.folder}",
        memory_bytes=_memory_bytes(),
        process_bytes=_most(float(resident)),
        memory_bandwidth=bandwidth,
        node_bandwidth=link,
        network_bandwidth=link,
        latency_seconds=latency,
        kernel_seconds=kernel,
        flops=Flops(bf16=products["bf16"], fp32=products["fp32"]),
        shares=Efficiency(attention=attention, encoders=encoding),
        is_cuda=platform.is_cuda,
    )


def _memory_bytes() -> float:
    """Bytes of memory of a rank: of its GPU, or its share of the machine's."""
    platform = current_platform()
    return platform.memory_bytes() / (1 if platform.is_cuda else dist.get_world_size())


def _settled(config: Config, work: Work) -> Config:
    """Take what a run on this machine would take where a value is auto, a replica on each rank."""
    platform, layout = current_platform(), ParallelLayout(world=dist.get_world_size(), config=ParallelConfig())
    kind = replace(load("h100-80g" if platform.is_cuda else "cpu"), memory_bytes=_least(_memory_bytes()))
    precision = "bf16" if platform.encoder_dtype(config.vision.precision) is torch.bfloat16 else "fp32"
    config = replace(config, vision=replace(config.vision, precision=precision))
    return automatic.settle(config, layout, work, kind, encoder_cost(config.vision)).config


def _least(value: float) -> float:
    """Return the least of the values that all ranks have."""
    least = torch.tensor(value, dtype=torch.float64, device=current_platform().device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)


def _most(value: float) -> float:
    """Return the largest of the values that all ranks have."""
    return -_least(-value)


def _seconds(work: Callable[[], object]) -> float:
    """Time some work that all ranks begin at once; the median of some repetitions, in seconds."""
    platform, seconds = current_platform(), []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        platform.synchronize()
        begin = time.perf_counter()
        work()
        platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def _shapes(model: LanguageConfig) -> Iterator[tuple[int, int]]:
    """Yield rows and columns of each matrix of a layer: queries, keys and values; output; gate and up; down."""
    keys = model.groups * (model.hidden // model.heads)
    yield model.hidden + 2 * keys, model.hidden
    yield model.hidden, model.hidden
    yield 2 * model.ffn, model.hidden
    yield model.hidden, model.ffn


def _matmul_flops(model: LanguageConfig, positions: int, dtype: torch.dtype) -> float:
    """FLOP/s of a layer's matrix products, forward and backward."""
    device = current_platform().device
    weights = [torch.ones(*shape, dtype=dtype, device=device, requires_grad=True) for shape in _shapes(model)]
    inputs = [torch.ones(positions, w.shape[1], dtype=dtype, device=device, requires_grad=True) for w in weights]

    def layer() -> None:
        for weight, rows in zip(weights, inputs, strict=True):
            out = F.linear(rows, weight)
            torch.autograd.grad(out, (rows, weight), out)

    return 6 * positions * sum(weight.numel() for weight in weights) / _seconds(layer)


def _attention_flops(model: LanguageConfig, work: Work, dtype: torch.dtype) -> float:
    """FLOP/s of causal attention over documents of the step's mean length, forward and backward."""
    device, head = current_platform().device, model.hidden // model.heads
    length = max(2, round(2 * work.attended / work.positions))
    documents = max(1, round(work.positions / length))
    shapes = [(documents, heads, length, head) for heads in (model.heads, model.groups, model.groups)]
    query, key, value = (torch.ones(*shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)

    def attend() -> None:
        is_grouped = model.heads != model.groups
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    pairs = documents * length * (length + 1) / 2
    return 3.5 * 4 * model.hidden * pairs / _seconds(attend)


def _memory_bandwidth() -> float:
    """Bytes/s of adding two large tensors into a third."""
    a, b, c = (torch.ones(16 * 2**20, device=current_platform().device) for _ in range(3))
    return 3 * a.nbytes / _seconds(lambda: torch.add(a, b, out=c))


def _kernel_seconds(config: Config, groups: ProcessGroups, dtype: torch.dtype) -> float:
    """Seconds to start an operation: what a decoder layer takes on next to no tokens, over its operations."""
    model, device = replace(config.model, experts=0, vocabulary=128), current_platform().device
    seconds = []
    for layers in (1, 1 + _LAYERS):
        decoder = build_language(replace(model, layers=layers), groups, dtype=dtype, sequence_length=_SMALL)
        tokens = torch.zeros(1, _SMALL, dtype=torch.int64, device=device)

        def step(decoder: torch.nn.Module = decoder, tokens: torch.Tensor = tokens) -> None:
            rows = PackedRows.of([_SMALL], device)
            decoder(
                input_ids=tokens, position_ids=None, attention_mask=None, labels=tokens, packed_seq_params=rows
            ).sum().backward()

        seconds.append(_seconds(step))
    return max(0.0, seconds[1] - seconds[0]) / _LAYERS / (3 * (OPERATIONS["layer"] + OPERATIONS["document"]))


def _encoder_flops(config: Config) -> float:
    """FLOP/s of the encoders on one of their batches; weights drawn, as they do not matter here."""
    platform, vision = current_platform(), config.vision
    drawn = replace(vision, experts=tuple(replace(item, weights="random") for item in vision.experts))
    dtype = platform.encoder_dtype(vision.precision)
    encoders = FrozenEncoders(drawn, device=platform.device, dtype=dtype, seed=config.run.seed)
    views = {side: torch.zeros(vision.views_at_once, 3, side, side) for side in vision.sides}
    return encoder_cost(vision).flops * vision.views_at_once / _seconds(lambda: encoders(views))


def _link() -> tuple[float, float]:
    """Measure the seconds of an empty message and the bytes/s between two ranks, by small and large all-reduces."""
    ranks, device = dist.get_world_size(), current_platform().device
    if ranks == 1:
        return 1e-6, 1e12  # nobody to talk to
    small, large = torch.ones(_SMALL, device=device), torch.ones(_LARGE, device=device)
    short = _most(_seconds(lambda: dist.all_reduce(small)))
    long = _most(_seconds(lambda: dist.all_reduce(large)))
    rounds = 2 * max(1.0, (ranks - 1).bit_length())
    return short / rounds, 2 * (ranks - 1) / ranks * large.nbytes / max(long - short, 1e-9)


def main(path: Path, target: Path) -> None:
    """Measure as one rank of several; the first one writes the hardware file.

    Args:
        path: the configuration, resolved.
        target: path of the hardware file.
    """
    config = configuration.load(path)
    platform = job.join(config.run.device, config.run.storage_timeout)
    layout = ParallelLayout(world=dist.get_world_size(), config=ParallelConfig())
    measured = measure(config, ProcessGroups.create(layout, platform.backend))
    if dist.get_rank() == 0:
        target.write_text(yaml.safe_dump(asdict(measured), sort_keys=False))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
