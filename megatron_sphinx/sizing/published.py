"""What the step-time model says of runs whose speed has been published: its calibration, and its test."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import yaml

from megatron_sphinx import config as configuration
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing import hardware as machines
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.step_time import StepSeconds, step_time
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.values import build

RUNS = Path(str(resources.files("megatron_sphinx") / "sizing" / "published.yaml"))
_GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run whose speed was published: one item of published.yaml's `runs`, on nodes of eight GPUs.

    Attributes:
        name: which software and model it is.
        source: where its number was published.
        gpu: the GPU, by its name in hardware.yaml.
        nodes: how many nodes of eight GPUs.
        model: the model, by its name in published.yaml; None where `preset` is given.
        preset: one of our presets, whose recipe it is; None where `model` is given.
        network_bandwidth, memory_bandwidth: bytes/s, where they are not the GPU's of hardware.yaml.
        sequences: how many sequences a step has.
        sequence_length: tokens of each sequence.
        document: tokens of each document in a sequence; None where one fills it.
        micro_batch_rows: sequences that a replica computes at once.
        tensor, pipeline, virtual_stages, expert: the layout; data is what is left.
        tokens_per_second: the published tokens/s of one GPU; None where `seconds` is given.
        seconds: the published seconds of a step; None where `tokens_per_second` is given.
        software: fields of TrainingSetup.
        is_fitted: whether a number of hardware.yaml is from this run.
        assumed: what the source does not say, and what is taken for it.
    """

    name: str
    source: str
    gpu: str
    nodes: int
    model: str | None = None
    preset: str | None = None
    network_bandwidth: float | None = None
    memory_bandwidth: float | None = None
    sequences: int = 0
    sequence_length: int = 0
    document: int | None = None
    micro_batch_rows: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    expert: int = 1
    tokens_per_second: float | None = None
    seconds: float | None = None
    software: dict[str, Any] = field(default_factory=dict)
    is_fitted: bool = False
    assumed: str = ""

    @property
    def gpus(self) -> int:
        """How many GPUs the run had."""
        return _GPUS_PER_NODE * self.nodes


def read() -> list[tuple[PublishedRun, LanguageConfig | None]]:
    """Read the published runs, each with its model; None for a run of one of our presets."""
    values = yaml.safe_load(RUNS.read_text())
    models = {name: build(LanguageConfig, shape) for name, shape in values["models"].items()}
    return [(PublishedRun(**run), models.get(run.get("model"))) for run in values["runs"]]


def predict(run: PublishedRun, model: LanguageConfig | None) -> tuple[StepSeconds, Work]:
    """Predict the step of a published run: its seconds, and its rows."""
    machine = machines.load(run.gpu)
    for name in ("network_bandwidth", "memory_bandwidth"):
        if (value := getattr(run, name)) is not None:
            machine = replace(machine, **{name: value})
    sizes = ParallelConfig(
        tensor=run.tensor, sequence=run.tensor > 1, pipeline=run.pipeline, expert=run.expert, encoder=0
    )
    layout = ParallelLayout(world=run.gpus, config=sizes)
    encoders = vision = None
    if run.preset is not None:
        config = configuration.load(Path(run.preset))
        work, model, vision = Work.expected(config), config.model, config.vision
        encoders = encoder_cost(vision)
    else:
        work = _text_work(run)
    assert model is not None
    setup = TrainingSetup(
        model=model, vision=vision, micro_batch_rows=run.micro_batch_rows, virtual_stages=run.virtual_stages,
        **run.software,
    )  # fmt: skip
    return step_time(setup, layout, work, machine, ranks_per_node=_GPUS_PER_NODE, encoders=encoders), work


def _text_work(run: PublishedRun) -> Work:
    """The rows of a step of a run that trains on text alone."""
    size = run.sequence_length
    document = run.document or size
    return Work(
        rows=run.sequences, positions=size, attended=size * (document + 1) / 2, targets=size, views=0,
        documents=size / document, most_positions=size, most_targets=size, most_views=0,
    )  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    """Yield for each published run what was published, what is predicted, and predicted over published speed."""
    for run, model in read():
        seconds, work = predict(run, model)
        speed = work.rows * work.positions / seconds.total / run.gpus
        published = run.tokens_per_second or work.rows * work.positions / (run.seconds or 1.0) / run.gpus
        yield {
            "name": run.name,
            "gpu": run.gpu,
            "gpus": run.gpus,
            "layout": "".join(
                f"{short}{size} "
                for short, size in (
                    ("T", run.tensor),
                    ("P", run.pipeline),
                    ("V", run.virtual_stages),
                    ("E", run.expert),
                )
                if size > 1
            ).strip(),
            "precision": run.software.get("precision", "bf16"),
            "published": published,
            "predicted": speed,
            "ratio": speed / published,
            "is_fitted": run.is_fitted,
            "source": run.source,
            "assumed": run.assumed,
        }


def table(compared: list[dict[str, Any]]) -> str:
    """Format what `rows` yields as a table of predicted beside published speeds, in tokens/s of one GPU."""
    lines = [f"{'run':36}{'GPUs':>6} {'kind':>11}  {'layout':12}{'':5}{'published':>10}{'predicted':>10}{'ratio':>7}"]
    for row in compared:
        lines.append(
            f"{row['name']:36}{row['gpus']:>6} {row['gpu']:>11}  {row['layout']:12}{row['precision']:5}"
            f"{row['published']:10,.0f}{row['predicted']:10,.0f}{row['ratio']:7.2f}{'  fitted' * row['is_fitted']}"
        )
    predictions = [row["ratio"] for row in compared if not row["is_fitted"]]
    near = sum(abs(ratio - 1) <= 0.15 for ratio in predictions)
    lines.append(
        f"tokens/s of a GPU; {near} of {len(predictions)} predictions within 15 %, "
        f"geometric mean {geometric_mean(predictions):.2f}"
    )
    return "\n".join(lines)
