"""A dry run: one rank of each role takes the real training step in a fake world, on tensors without memory.

The model, DeepSpeed's ZeRO-2, megatron-core's schedule, the encoders and the channel from them are the real code at
full size. Floating-point tensors are fake: they have a shape and a type, and no numbers. Integers are real, so that
whatever depends on positions and counts goes as it would. What the code asks of torch on the way is counted.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sphinx.config import Config
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.canvas import pixel_type
from megatron_sphinx.data.packing import Segment, positions
from megatron_sphinx.data.pixels import PixelLoader, Pixels
from megatron_sphinx.data.plan import Planner, StepPlan, numbered_rounds, rounds
from megatron_sphinx.data.sources import Sources, make_planner, open_sources
from megatron_sphinx.data.streams import SampleSizes, TextSpans
from megatron_sphinx.device import Platform, use_platform
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.experts import Routing, RowRouter
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.shards import shards_of
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parallel.seeding import seed_rank
from megatron_sphinx.run import train as run
from megatron_sphinx.sizing import counts
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.recorder import HOST, Recorder
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import CAPTION_TOKENS, Work
from megatron_sphinx.stage.channel import ColocatedEncoders, FeatureReceiver, FeatureSender, FeatureSource
from megatron_sphinx.stage.producer import produce
from megatron_sphinx.training.deepspeed_engine import Engine
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.memory import rank_weights, zero2_bytes
from megatron_sphinx.training.step import train_step


def axes(groups: ProcessGroups) -> dict[str, Any]:
    """The process groups of a rank by the name of what goes over them."""
    names = ("tensor", "data", "pipeline", "model", "expert", "expert_data", "language")
    found = {name: getattr(groups, name) for name in names} | {"pipeline flags": groups.flags}
    if groups.collection is not None:
        found["expert counts"] = groups.collection.tp_ep
    return found | {"features": dist.group.WORLD}


class RecordedEngine(Engine):
    """Says which memory holds weights, gradients and optimizer state."""

    def __init__(self, recorder: Recorder, model: SphinxModel, *args: Any, **kwargs: Any) -> None:
        self.recorder = recorder
        super().__init__(model, *args, **kwargs)
        for group in self._engine.optimizer.param_groups:
            group["fused"] = True  # as on CUDA, where the update copies nothing
        self.prepare_state(0)  # moments, as they are there in every step but the first
        recorder.name("weights", *model.parameters())
        recorder.name("optimizer", *(piece.values for piece in self.pieces(of_copies=True)))
        recorder.name(HOST, *(frozen.master for frozen in self.frozen))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(self._name_gradient)

    def _name_gradient(self, gradient: Tensor) -> None:
        self.recorder.name("gradients", gradient)
        self.recorder.name("reduction", *self.reduction_buffers())

    def backward(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """As Engine's; in a pipeline all reduction comes behind the schedule."""
        with self.recorder.memory_for("activations" if self._groups.layout.config.pipeline == 1 else "reduction"):
            super().backward(forward, batches)

    def _run_pipeline(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        with self.recorder.memory_for("activations"):
            super()._run_pipeline(forward, batches)

    def update(self, rate: float, norm: float, factor: float = 1.0) -> None:
        """As Engine's."""
        self.recorder.name("gradients", *(part for _, part in self.gradients()))
        with self.recorder.memory_for("update"):
            super().update(rate, norm, factor)


class RecordedFeatures:
    """A FeatureSource whose memory is known as that of features."""

    def __init__(self, recorder: Recorder, source: FeatureSource) -> None:
        self.recorder, self.source = recorder, source
        self.waiting = source.waiting

    @property
    def received_bytes(self) -> int:
        """See FeatureSource."""
        return self.source.received_bytes

    def prepare(self, count: int) -> None:
        """See FeatureSource."""
        with self.recorder.memory_for("features"):
            self.source.prepare(count)

    def next(self) -> Tensor:
        """See FeatureSource."""
        with self.recorder.memory_for("features"):
            return self.source.next()


class BalancedRouter(RowRouter):
    """Sends every expert as many tokens, as a router that nobody has trained cannot be asked to."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As RowRouter's, but for the choice."""
        weights, chosen = super().routing(logits, padding_mask)
        return weights, self._even(chosen)

    def _losses(self, logits: Tensor, chosen: Tensor, batch: Routing) -> Tensor:
        return super()._losses(logits, self._even(chosen), batch)

    def _even(self, chosen: Tensor) -> Tensor:
        tokens, experts = chosen.shape
        choice = (torch.arange(tokens * self.topk) % experts).view(tokens, self.topk)
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, choice, True)


class BlankBatches(BatchBuilder):
    """Micro-batches with everything but the tokens themselves: nothing is read."""

    def _fill(self, piece: Segment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        targets = np.full(piece.length, -100, np.int64)
        last = max(piece.length - 1, piece.targets)  # behind the last target; a text that goes on has one at each token
        targets[last - piece.targets : last] = 0
        return np.zeros(piece.length, np.int64), targets

    def _check_ids(self, *_: object) -> None:
        """There are none."""


@dataclass(frozen=True)
class MadeUpSamples:
    """Square pictures with captions of one length."""

    caption_tokens: int
    bounds: Sequence[int] = (0, 2**20)

    def sizes(self, first: int, last: int) -> SampleSizes:
        """See SampleSource."""
        return SampleSizes(*(np.full(last - first, n) for n in (1, 1, self.caption_tokens, self.caption_tokens + 1)))

    def cut(self, _pair: int, most: int) -> tuple[int, int]:
        """See SampleSource."""
        return most, most + 1


@dataclass(frozen=True)
class MadeUpText:
    """One document without an end."""

    bounds: Sequence[int] = (0, 2**30)

    def spans(self, first: int, last: int) -> TextSpans:
        """See TextSource."""
        return TextSpans(np.array([0]), np.array([first]), np.array([last - first]), np.array([False]))


class BlankPixels:
    """Stands for a PixelLoader: pictures of the right sizes, at once."""

    def __init__(self, recorder: Recorder, vision: VisionConfig) -> None:
        self.recorder, self.vision = recorder, vision

    def submit(self, views: Sequence[tuple[int, int]]) -> SimpleNamespace:
        """See PixelLoader; what `result` gives is in the CPU's memory."""
        kind = torch.from_numpy(np.zeros(0, pixel_type(self.vision))).dtype
        with self.recorder.memory_for(HOST):
            pixels = {side: torch.empty(len(views), 3, side, side).to(kind) for side in self.vision.sides}
        return SimpleNamespace(wait=lambda: None, result=lambda: Pixels(pixels, ()))


def plan_of(config: Config, layout: ParallelLayout) -> tuple[Planner, str]:
    """The planner of the run's data, or where it is not there, of data that is made up; and which of both it is."""
    data = config.data
    paths = [data.tokenizer, *(source.path for source in (*data.samples, *data.text))]
    absent = [path for path in paths if not (Path(path).exists() or Path(f"{path}.idx").exists())]
    if absent:
        pairs = MadeUpSamples(CAPTION_TOKENS) if data.samples_per_step else None
        text = MadeUpText() if data.text_tokens_per_step else None
        sources = cast(Sources, SimpleNamespace(samples=pairs, text=text))
        parts = [f"{data.samples_per_step} samples with all views and {CAPTION_TOKENS} tokens each"] if pairs else []
        parts += [f"{data.text_tokens_per_step:,} tokens of one text without an end"] if text else []
        said = f"made up, for {absent[0]} is not there: {', '.join(parts)}"
    else:
        sources, said = open_sources(data, config.model), "step 0 of the run's data"
    planner = make_planner(
        data, sources, config.model, config.vision,
        replicas=layout.data, seed=config.run.seed, multiple=layout.config.token_multiple,
    )  # fmt: skip
    return planner, said


def roles(layout: ParallelLayout, layers: int, plan: StepPlan) -> dict[str, int]:
    """A rank of each role: of the first and last stage and of the largest between, in the replica with most to hold.

    Stages between the first and the last hold fewer micro-batches at once the later they are.
    """
    stages = layout.config.stage_layers(layers)
    middle = range(1, len(stages) - 1)
    chosen = sorted({0, *(stage for stage in middle if stage == max(middle, key=lambda n: stages[n])), len(stages) - 1})
    replica = max(range(layout.data), key=lambda n: max(positions(micro[n]) for micro in plan.micro_batches))
    found = {
        f"language, stage {stage}" if len(stages) > 1 else "language": layout.rank_of(
            data=replica, tensor=0, pipeline=stage
        )
        for stage in chosen
    }
    return found | ({"encoder": layout.encoder_rank(0)} if layout.config.encoder else {})


@dataclass(frozen=True)
class Counted:
    """What a rank did in a step.

    Attributes:
        parameters: that it holds.
        flops: of matrix products and convolutions, and of attention.
        held: bytes of weights, gradients and optimizer, as the engine itself finds them.
        peak: bytes by part when it held most.
        collectives: (group, kind) to how many there were and the bytes of their messages.
    """

    parameters: int
    flops: dict[str, float]
    held: dict[str, int]
    peak: dict[str, int]
    collectives: dict[tuple[str, str], tuple[int, int]]

    def rows(self) -> dict[str, float]:
        """Every number by what it is called in a report."""
        found: dict[str, float] = {"parameters": self.parameters, "FLOPs": sum(self.flops.values())}
        found |= {f"FLOPs: {kind}": flops for kind, flops in self.flops.items()}
        found |= {f"bytes held: {part}": nbytes for part, nbytes in self.held.items()}
        found |= {"bytes at the peak": sum(self.peak.values())}
        found |= {f"bytes at the peak: {part}": nbytes for part, nbytes in sorted(self.peak.items()) if nbytes}
        for (group, kind), (times, nbytes) in sorted(self.collectives.items()):
            found |= {f"{group} {kind}: times": times, f"{group} {kind}: bytes": nbytes}
        return found


def formulas(config: Config, layout: ParallelLayout, planner: Planner, rank: int) -> dict[str, float]:
    """What arithmetic says of a rank's step, under the names that `Counted.rows` gives; of fewer numbers.

    Work and messages are those that step times are predicted from: of rows as they are on average, on a replica that
    has most of them.
    """
    seat, ours = layout.seat(rank), TrainingSetup.ours(config, is_cuda=False)
    role = "encoder" if seat.encoder is not None else f"language stage {seat.pipeline}"
    work = Work.of_plan(planner.step(0), planner.lengths)
    found = {"FLOPs": sum(counts.flops(ours, layout, work, encoder_cost(config.vision))[role].values())}
    for transfer in counts.communication(ours, layout, work)[role]:
        name = f"{transfer.group} {transfer.kind.replace('_', '-')}"
        for what, number in (("times", transfer.count), ("bytes", transfer.bytes)):
            found[f"{name}: {what}"] = found.get(f"{name}: {what}", 0.0) + number
    if seat.encoder is not None:
        return found
    weights = rank_weights(config.model, config.vision, layout, seat.pipeline, config.training.train)
    held = zero2_bytes(weights, layout, precision=config.training.precision)
    parameters = weights.shared + weights.experts + weights.frozen
    return found | {"parameters": parameters} | {f"bytes held: {part}": nbytes for part, nbytes in held.items()}


def report(config: Config, layout: ParallelLayout) -> dict[str, Any]:
    """Take the step of each role in a process of its own; what was counted, and what arithmetic says.

    Raises:
        SphinxError: the user's mistake, as the rank found it.
        RuntimeError: a rank failed.
    """
    planner, said = plan_of(config, layout)
    plan = planner.step(0)
    chosen = roles(layout, config.model.layers, plan)
    context = get_context("fork")  # imports are done, and nothing has been computed yet
    started = {}
    for role, rank in chosen.items():
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, config, layout, rank), name=role, daemon=True)
        process.start()
        theirs.close()
        started[role] = (process, ours)
    found = {}
    for role, (process, ours) in started.items():
        try:
            counted: Counted | SphinxError = ours.recv()
        except EOFError:
            raise RuntimeError(f"the dry run of {role} failed; see above") from None
        finally:
            process.join()
        if isinstance(counted, SphinxError):
            raise counted
        found[role] = {
            "rank": chosen[role],
            "counted": counted.rows(),
            "formula": formulas(config, layout, planner, chosen[role]),
        }
    return {
        "layout": str(layout),
        "ranks": layout.world,
        "step": said,
        "rows": len(plan.rows),
        "micro_batches": len(plan.micro_batches),
        "roles": found,
    }


def table(found: Mapping[str, Any]) -> str:
    """What `report` has found, readable."""
    lines = [
        f"{found['layout']} = {found['ranks']} ranks",
        f"step: {found['step']}; {found['rows']} rows, {found['micro_batches']} micro-batches a replica",
    ]
    for role, rank in found["roles"].items():
        head = f"{role} (rank {rank['rank']})"
        lines += ["", f"{head:44}{'counted':>24}{'formula':>24}"]
        for name, value in rank["counted"].items():
            known = rank["formula"].get(name)
            lines.append(f"  {name:42}{value:24,.0f}{'' if known is None else f'{known:,.0f}':>24}".rstrip())
    return "\n".join(lines)


def _work(answer: Any, config: Config, layout: ParallelLayout, rank: int) -> None:
    """The whole life of a process that takes a rank's step."""
    torch.set_num_threads(1)  # nothing is computed; and a pool of threads does not survive the fork
    try:
        answer.send(count(config, layout, rank))
    except SphinxError as error:
        answer.send(error)


def count(config: Config, layout: ParallelLayout, rank: int) -> Counted:
    """One rank's step in a fake world; to be called in a process that does nothing else."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(layout.world)}
    cpu = use_platform(None)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor", category=UserWarning)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    groups = ProcessGroups.create(layout, "fake", storage_backend="fake")
    here = Platform(cpu.device, "fake", is_bf16_fast=True)
    planner, _ = plan_of(config, layout)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        recorder = Recorder(axes(groups), fake)
        pixels = cast(PixelLoader, BlankPixels(recorder, config.vision))
        if groups.seat.encoder is not None:
            return _encoder_step(config, groups, here, planner, recorder, pixels)
        builder = BlankBatches(config.data, cast(Sources, None), config.vision, planner.multiple)
        return language_step(
            config, groups, here, planner, recorder, builder, lambda: BlankEncoders(recorder, config, here), pixels
        )


def language_step(
    config: Config,
    groups: ProcessGroups,
    here: Platform,
    planner: Planner,
    recorder: Recorder,
    builder: BatchBuilder,
    encoders: Callable[[], FrozenEncoders],
    pixels: PixelLoader,
) -> Counted:
    """Step 0 of a language rank, counted; its experts are asked for as many tokens each.

    Args:
        config: the run.
        groups: of the rank, in a real world or a fake one.
        here: what it computes on.
        planner: of the steps.
        recorder: counts.
        builder: makes the micro-batches.
        encoders: makes the encoders, where there are no encoder ranks.
        pixels: where they get pictures.
    """
    seed_rank(config.run.seed, groups.seat)
    ahead, lookahead = rounds(planner, 0, 2**62), config.stage.lookahead
    with recorder:
        model = run.build_model(config, groups, here)
        if recorder.fake is not None:
            model._apply = lambda *_, **__: model  # type: ignore[method-assign]  # cannot be moved, and need not
        for module in model.modules():
            if isinstance(module, RowRouter):
                module.__class__ = BalancedRouter
        engine = RecordedEngine(
            recorder, model, shards_of(model, config.model, groups), groups, here, config.optimizer,
            precision=config.training.precision,
        )  # fmt: skip
        features: FeatureSource | None = None
        with recorder.memory_for("features"):
            if not config.parallel.encoder:
                experts = encoders()
                recorder.name("weights", *experts.parameters())
                features = ColocatedEncoders(ahead, groups, experts, pixels, lookahead)
            elif groups.is_first_stage:
                features = FeatureReceiver(ahead, groups, values=config.vision.feature_values, lookahead=lookahead)
        recorded = cast(FeatureSource, RecordedFeatures(recorder, features)) if features else None
        plan = planner.step(0)
        batches = [builder.build(replicas[groups.seat.data]) for replicas in plan.micro_batches]
        recorder.begin()
        with recorder.memory_for("activations"):
            train_step(
                engine, plan, batches, recorded, groups,
                text_weight=config.loss.text_weight, rate=config.optimizer.learning_rate, device=here.device,
                fault=Watch(config.divergence).fault, progress=Progress(),
                layers=config.model.layers if config.model.experts else 0,
            )  # fmt: skip
        parameters = sum(weight.numel() for weight in model.parameters())
        return Counted(parameters, recorder.flops, engine.held, recorder.peak(), recorder.collectives)


class BlankEncoders(FrozenEncoders):
    """FrozenEncoders with weights of the right shapes. Every batch is alike, so the first one is run for all."""

    def __init__(self, recorder: Recorder, config: Config, here: Platform) -> None:
        dtype = torch.bfloat16 if here.is_bf16_fast else torch.float32
        drawn = tuple(replace(item, weights="random") for item in config.vision.experts)
        with unset_fake_temporarily(), torch.device("meta"):
            super().__init__(
                replace(config.vision, experts=drawn), device=torch.device("meta"), dtype=dtype, seed=config.run.seed
            )
        self.recorder, self.device = recorder, here.device
        self._flops: dict[str, float] | None = None
        for module in self.modules():
            for kind in (module._parameters, module._buffers):
                for name, value in kind.items():
                    if value is not None:
                        kind[name] = self._blank(value)
        recorder.name("weights", *self.parameters())

    def _blank(self, value: Tensor) -> Any:
        blank = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        return nn.Parameter(blank, requires_grad=False) if isinstance(value, nn.Parameter) else blank

    def _encode(self, chunk: Mapping[int, Tensor]) -> Tensor:
        if self._flops is None:
            before = dict(self.recorder.flops)
            out = super()._encode(chunk)
            self._flops = {kind: flops - before[kind] for kind, flops in self.recorder.flops.items()}
            return out
        for kind, flops in self._flops.items():
            self.recorder.flops[kind] += flops
        return torch.empty(self.config.batch_views, self.config.feature_values, dtype=torch.bfloat16)


def _encoder_step(
    config: Config, groups: ProcessGroups, here: Platform, planner: Planner, recorder: Recorder, pixels: PixelLoader
) -> Counted:
    """Steps of an encoder rank: FLOPs and messages of step 0; memory when it is as far ahead as it may be."""
    number, lookahead = groups.seat.encoder, config.stage.lookahead
    assert number is not None

    def steps(count: int) -> None:
        recorder.begin()
        with recorder.memory_for("activations"):
            produce(
                numbered_rounds(planner, 0, count), encoder=number, encoder_count=config.parallel.encoder,
                encoders=encoders, pixels=pixels, sender=FeatureSender(groups, lookahead), lookahead=lookahead,
                progress=Progress(),
            )  # fmt: skip

    with recorder:
        encoders = BlankEncoders(recorder, config, here)
        steps(1)
        flops, collectives = recorder.flops, recorder.collectives
        steps(ceil((lookahead + 1) / len(planner.step(0).micro_batches)))
        weights = list(encoders.parameters())
        held = {"weights": sum(weight.nbytes for weight in weights)}
        return Counted(sum(weight.numel() for weight in weights), flops, held, recorder.peak(), collectives)
