"""Steps on made data of a wanted composition: captions of real lengths, rows full of text, features from memory."""

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import Tensor

from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.config import Config
from megatron_sphinx.data.index import SAMPLE, UPRIGHT
from megatron_sphinx.data.packing import Row, views_in
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.plan import StepPlan, rounds
from megatron_sphinx.data.sources import Sources, make_planner
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.device import Stopwatch, current_platform
from megatron_sphinx.gpu_check.scales import Scale
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.stage.channel import Round
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.engine import Engine
from megatron_sphinx.training.metrics import Reporter, read
from megatron_sphinx.values import build

LENGTHS = Path(str(resources.files("megatron_sphinx") / "gpu_check" / "real_lengths.json"))
PAIRS, TEXT_TOKENS = 4096, 2**20  # of the made data
PICTURES = 32  # whose features there are; more pairs share them
TOKENIZER = {"vocabulary": 32_000, "sha256": "made by gpu-check"}


def make_data(folder: Path, vocabulary: int) -> None:
    """Write indexes of pairs, whose captions have real lengths, and of text, one document; tokens are random."""
    rng = np.random.default_rng(0)
    counted = json.loads(LENGTHS.read_text())["captions"]
    lengths = np.repeat(np.array(list(counted), np.int64), list(counted.values()))
    samples = np.zeros(PAIRS, SAMPLE)
    samples["tokens"] = rng.choice(lengths, PAIRS)
    samples["caption"] = np.cumsum(samples["tokens"]) - samples["tokens"]
    samples["width"] = samples["height"] = 224
    (folder / "pairs").mkdir(parents=True)
    samples.tofile(folder / "pairs" / "samples.bin")
    rng.integers(3, vocabulary, samples["tokens"].sum()).astype(np.uint16).tofile(folder / "pairs" / "captions.bin")
    content = {
        "tokenizer": TOKENIZER,
        "caption_type": "<u2",
        "sizes": UPRIGHT,
        "shards": [{"path": "0.tar", "bytes": 0, "samples": PAIRS}],
    }
    (folder / "pairs" / "index.json").write_text(json.dumps(content))
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    builder.add_document(torch.from_numpy(rng.integers(3, vocabulary, TEXT_TOKENS)), [TEXT_TOKENS])
    builder.finalize(str(folder / "text.idx"))


def configure(scale: Scale, kind: str, micro_batch_rows: int, folder: Path) -> Config:
    """Configure a step of the table, on the data in a folder.

    Args:
        scale: sizes of the model and the step.
        kind: mixed, captions or text.
        micro_batch_rows: how many rows are computed at once.
        folder: where `make_data` has written.
    """
    pairs = {"mixed": scale.pairs, "captions": 2 * scale.pairs, "text": 0}[kind]
    rows = {"mixed": scale.text_rows, "captions": 0, "text": 4 * scale.text_rows}[kind]
    values = {
        "run": {"folder": str(folder / f"run_{kind}_{micro_batch_rows}"), "seed": 1, "print_interval": 99_999_999},
        "model": {
            "layers": scale.layers, "hidden": scale.hidden, "ffn": scale.ffn, "vocabulary": scale.vocabulary,
            "heads": scale.heads, "groups": scale.heads,
        },
        "vision": {"grid": scale.grid, "experts": [{"name": name, "weights": "random"} for name in scale.experts]},
        "data": {
            "pairs": str(folder / "pairs"), "text": str(folder / "text"), "tokenizer": "none",
            "pairs_per_step": pairs, "text_tokens_per_step": rows * scale.length,
            "sequence_length": scale.length, "row_multiple": 1, "micro_batch_rows": micro_batch_rows,
        },
        "optimizer": {"learning_rate": 1e-5, "minimum_learning_rate": 1e-5, "warmup_steps": 0},
        "training": {"steps": scale.warmup + scale.steps + 1, "precision": "bf16"},
    }  # fmt: skip
    return build(Config, values)


def open_job(config: Config, folder: Path) -> RankContext:
    """Open a job of all ranks as replicas, on the made data."""
    platform = current_platform()
    groups = ProcessGroups.create(
        ParallelLayout(world=dist.get_world_size(), config=ParallelConfig()), platform.backend
    )
    tokenizer: Any = SimpleNamespace(bos=1, eos=2, identity=TokenizerIdentity(config.model.vocabulary, "none"))
    sources = Sources(tokenizer, SampleIndex([folder / "pairs"]), TextIndex([folder / "text"]))
    planner = make_planner(
        config.data, sources, config.model, config.vision, replicas=groups.layout.data, seed=config.run.seed
    )
    return RankContext(config, platform, groups, sources, planner)


class Features:
    """What the frozen encoders have made of the pictures: a source for our loop, and features for the others."""

    def __init__(self, job: RankContext) -> None:
        self.waiting, self.received_bytes = Stopwatch(job.platform), 0
        values = job.config.vision.feature_values
        drawn = torch.randn(PICTURES, values, generator=torch.Generator().manual_seed(0))
        self.bank = drawn.to(job.platform.device, torch.bfloat16)
        self._rounds: Iterator[Round] = rounds(job.planner, 0, job.config.training.steps)
        self._replica = job.groups.seat.data

    def of(self, rows: Sequence[Row]) -> Tensor:
        """Look up the features of the views of some rows: bf16 [views, feature_values]."""
        pictures = torch.tensor([pair % PICTURES for pair, _ in views_in(rows)], dtype=torch.int64)
        return self.bank.index_select(0, pictures.to(self.bank.device, non_blocking=True))

    def prepare(self, count: int) -> None:
        """Do nothing: all features lie ready."""

    def next(self) -> Tensor:
        """Look up the features of this replica's next micro-batch."""
        return self.of(next(self._rounds)[self._replica])


def targets_of(plan: StepPlan) -> int:
    """Count the targets of a step."""
    return plan.targets(of_samples=True) + plan.targets(of_samples=False)


class OurSteps:
    """Our training loop, one step at a time.

    Args:
        job: the rank, with its data.
        engine: holds the model, where several jobs share one; a new one unless given.
    """

    def __init__(self, job: RankContext, engine: Engine | None = None) -> None:
        config, groups = job.config, job.groups
        if engine is None:
            engine = assembly.build_engine(job, assembly.build_model(config, groups, job.platform))
        trainer = assembly.build_trainer(job, engine, Features(job), Watch(config.divergence))
        job.folder.mkdir(parents=True, exist_ok=True)
        store = CheckpointStore(job.folder / "checkpoints", groups, keep=1, identity=dict, about={})
        reporter = None
        if groups.seat.rank == 0:
            reporter = Reporter(job.folder, start=0, steps=config.training.steps, interval=config.run.print_interval)
        self.loop, self.folder = assembly.build_loop(job, trainer, store, reporter), job.folder

    def __call__(self, step: int) -> None:
        """Take one step of the loop: plan, loader, training, metrics."""
        self.loop.take_step(step)

    def close(self) -> None:
        """End what goes on beside the steps."""
        self.loop.close()

    def loss(self) -> float:
        """Read the loss where our loop has written it."""
        losses: list[Any] = [read(self.folder / "metrics.jsonl")[-1]["loss"] if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(losses)
        return float(losses[0])
