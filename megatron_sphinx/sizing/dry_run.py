"""A dry run: one rank of each role takes the real training step in a fake world, on tensors without memory.

The model, DeepSpeed's ZeRO-2, megatron-core's schedule, the encoders and the channel from them are the real code at
full size. Floating-point tensors are fake: they have a shape and a type, and no numbers. Integers are real, so that
whatever depends on positions and counts goes as it would. What the code asks of torch on the way is counted.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sphinx.config import Config
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.packing import positions
from megatron_sphinx.data.plan import Planner, StepPlan
from megatron_sphinx.data.sources import Sources, make_planner, open_sources
from megatron_sphinx.device import Platform, use_platform
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.model.experts import RowRouter
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parallel.seeding import seed_rank
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.sizing.blanks import BlankBatches, BlankContext, MadeUpSamples, MadeUpText
from megatron_sphinx.sizing.layouts import settled
from megatron_sphinx.sizing.rank_counts import RankCounts, formulas
from megatron_sphinx.sizing.recorded import BalancedRouter, RecordedEngine, RecordedFeatures
from megatron_sphinx.sizing.recorder import CONTROL, Recorder
from megatron_sphinx.sizing.work import CAPTION_TOKENS
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.sums import Sums

_ENDLESS = 2**62  # steps: what is dealt ahead does not end with the run


def axes(groups: ProcessGroups) -> dict[str, Any]:
    """List the process groups of a rank by the name of what goes over them."""
    names = ("tensor", "data", "pipeline", "model", "expert", "expert_data", "language")
    axes = {name: getattr(groups, name) for name in names} | {"pipeline flags": groups.flags}
    if groups.collection is not None:
        axes["expert counts"] = groups.collection.tp_ep
    return axes | {"features": groups.features, CONTROL: groups.control}


def plan_of(config: Config, layout: ParallelLayout) -> tuple[Planner, str]:
    """Make the planner of the run's data, or where that is absent, of made-up data; and say which it is."""
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
    """Choose a rank of each role: of the first, the last and the largest other stage, in the replica with most to hold.

    Stages between the first and the last hold fewer micro-batches at once the later they are.
    """
    stages = layout.config.stage_layers(layers)
    middle = range(1, len(stages) - 1)
    chosen = sorted({0, *(stage for stage in middle if stage == max(middle, key=lambda n: stages[n])), len(stages) - 1})
    replica = max(range(layout.data), key=lambda n: max(positions(micro[n]) for micro in plan.micro_batches))
    ranks = {
        f"language, stage {stage}" if len(stages) > 1 else "language": layout.rank_of(
            data=replica, tensor=0, pipeline=stage
        )
        for stage in chosen
    }
    return ranks | ({"encoder": layout.encoder_rank(0)} if layout.config.encoder else {})


def report(config: Config, layout: ParallelLayout, kind: str) -> dict[str, Any]:
    """Take the step of each role in a process of its own; report what was counted, and what arithmetic says.

    Args:
        config: the run.
        layout: how it is divided.
        kind: the hardware on which a value of auto is taken, a name of hardware.yaml or the path of a file.

    Raises:
        SphinxError: the user's mistake, as the rank found it.
        RuntimeError: a rank failed.
    """
    config = settled(config, layout, kind).config
    planner, said = plan_of(config, layout)
    plan = planner.step(0)
    chosen = roles(layout, config.model.layers, plan)
    context = get_context("fork")  # imports are done, and nothing has been computed yet
    started = {}
    for role, rank in chosen.items():
        answers, target = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(target, config, layout, rank), name=role, daemon=True)
        process.start()
        target.close()
        started[role] = (process, answers)
    reports = {}
    for role, (process, answers) in started.items():
        try:
            counted: RankCounts | SphinxError = answers.recv()
        except EOFError:
            raise RuntimeError(f"the dry run of {role} failed; see above") from None
        finally:
            process.join()
        if isinstance(counted, SphinxError):
            raise counted
        reports[role] = {
            "rank": chosen[role],
            "counted": counted.rows(),
            "formula": formulas(config, layout, planner, chosen[role]),
        }
    return {
        "layout": str(layout),
        "ranks": layout.world,
        "step": said,
        "rows": len(plan.rows),
        "micro_batch_rows": config.data.micro_batch_rows,
        "batch_views": config.vision.batch_views,
        "micro_batches": len(plan.micro_batches),
        "roles": reports,
    }


def table(report: Mapping[str, Any]) -> str:
    """Lay out what `report` gives as text."""
    lines = [
        f"{report['layout']} = {report['ranks']} ranks",
        f"step: {report['step']}; {report['rows']} rows, {report['micro_batches']} micro-batches a replica of "
        f"{report['micro_batch_rows']} rows; {report['batch_views']} views at once",
    ]
    for role, rank in report["roles"].items():
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


def count(config: Config, layout: ParallelLayout, rank: int) -> RankCounts:
    """Take one rank's step in a fake world; to be called in a process that does nothing else."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(layout.world)}
    cpu = use_platform(None)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor", category=UserWarning)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    groups = ProcessGroups.create(layout, "fake", storage_backend="fake")
    platform = Platform(cpu.device, "fake", is_bf16_fast=True)
    planner, _ = plan_of(config, layout)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        recorder = Recorder(axes(groups), fake)
        context = BlankContext(config, platform, groups, cast(Sources, None), planner, recorder=recorder)
        if groups.seat.encoder is not None:
            return encoder_step(context, recorder)
        builder = BlankBatches(config.data, context.sources, config.vision, planner.multiple)
        return language_step(context, recorder, builder)


def language_step(context: RankContext, recorder: Recorder, builder: BatchBuilder) -> RankCounts:
    """Count step 0 of a language rank; its MoE experts are asked for as many tokens each.

    Where the run validates, what it holds then is that of a forward of step 1: rows are filled alike.

    Args:
        context: of the rank, in a real world or a fake one.
        recorder: counts.
        builder: makes the micro-batches.
    """
    config, groups, planner = context.config, context.groups, context.planner
    seed_rank(config.run.seed, groups.seat)
    with recorder:
        model = assembly.build_model(config, groups, context.platform, is_drawn=recorder.fake is None)
        if recorder.fake is not None:
            model._apply = lambda *_, **__: model  # type: ignore[method-assign]  # cannot be moved, and need not
        for module in model.modules():
            if isinstance(module, RowRouter):
                module.__class__ = BalancedRouter
        engine = assembly.build_engine(context, model, partial(RecordedEngine, recorder))
        with recorder.memory_for("features"):
            encoders = None if config.parallel.encoder else context.encoders()
            if encoders is not None:
                recorder.name("weights", *encoders.parameters())
            source = assembly.build_features(context, encoders, 0, _ENDLESS)
        features = RecordedFeatures(recorder, source) if source else None
        trainer = assembly.build_trainer(context, engine, features, Watch(config.divergence))

        def batches(step: int) -> list[MicroBatch]:
            """Build the micro-batches of a step; those of an earlier one are gone by then, as in a run."""
            return [builder.build(replicas[groups.seat.data]) for replicas in planner.step(step).micro_batches]

        recorder.begin()
        with recorder.memory_for("activations"):
            trainer.step(planner.step(0), batches(0), rate=config.optimizer.learning_rate)
        parameters = sum(weight.numel() for weight in model.parameters())
        counts = RankCounts(parameters, recorder.flops, engine.held, recorder.peak(), recorder.collectives)
        if not config.validation.is_on:
            return counts
        recorder.begin()
        with recorder.memory_for("activations"):
            trainer.evaluate(planner.step(1), batches(1), Sums())
        return replace(counts, validation_peak=sum(recorder.peak().values()))


def encoder_step(context: RankContext, recorder: Recorder) -> RankCounts:
    """Count an encoder rank: FLOPs and messages of step 0; memory when it is as far ahead as it may be."""
    lookahead, micro_batches = context.config.stage.lookahead, len(context.planner.step(0).micro_batches)

    def take_steps(steps: int) -> None:
        """Encode so many steps, counted anew."""
        recorder.begin()
        with recorder.memory_for("activations"):
            assembly.encode_steps(context, encoders, 0, steps)

    with recorder:
        encoders = context.encoders()
        take_steps(1)
        flops, collectives = recorder.flops, recorder.collectives
        take_steps(ceil((lookahead + 1) / micro_batches))
        weights = list(encoders.parameters())
        held = {"weights": sum(weight.nbytes for weight in weights)}
        return RankCounts(sum(weight.numel() for weight in weights), flops, held, recorder.peak(), collectives)
