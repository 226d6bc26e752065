"""A rank put together from its configuration: model, engine, features, trainer, loop; or an encoder's production.

Training, the dry run and the programs that compare steps all build their ranks here.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.config import Config
from megatron_sphinx.data.validation import HeldOut
from megatron_sphinx.device import Platform
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.shards import shards_of
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.model.warm_up import warm_up
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.run.answerer import TrainingAnswerer
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.run.loop import Loop
from megatron_sphinx.run.observer import Observer
from megatron_sphinx.run.questions import Answerer
from megatron_sphinx.run.validator import Validator
from megatron_sphinx.stage.channel import ColocatedEncoders, FeatureReceiver, FeatureSender, FeatureSource
from megatron_sphinx.stage.producer import produce
from megatron_sphinx.stage.schedule import Schedule
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.engine import Engine
from megatron_sphinx.training.metrics import Reporter
from megatron_sphinx.training.step import Trainer


def dtype_of(config: Config) -> torch.dtype:
    """The type that a run computes and holds its weights in."""
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def build_model(config: Config, groups: ProcessGroups, platform: Platform, *, is_drawn: bool = True) -> SphinxModel:
    """Build this rank's shard of the trainable model.

    Args:
        config: of the run.
        groups: the rank's process groups.
        platform: what the rank computes on.
        is_drawn: whether its weights are drawn from the run's seed; tensors without memory have none to be set.
    """
    dtype = dtype_of(config)
    language = build_language(
        config.model,
        groups,
        dtype=dtype,
        sequence_length=config.data.sequence_length,
        recompute=config.training.activation_checkpointing,
        recompute_layers=config.training.checkpointed_layers,
    )
    vision = None
    if groups.is_first_stage:
        vision = VisualProjection(config.vision, config.model.hidden, dtype=dtype, device=platform.device)
    model = SphinxModel(language, vision, groups)
    if is_drawn:
        draw_weights(model, config.model, groups, config.run.seed)
    model.freeze(config.training.train)
    if is_drawn and platform.is_cuda:
        processors = torch.cuda.get_device_properties(platform.device).multi_processor_count
        warm_up(language, longest=config.data.sequence_length, processors=processors)
    return model


def build_engine(context: RankContext, model: SphinxModel, kind: Callable[..., Engine] = Engine) -> Engine:
    """Put a rank's model under its optimizer; `kind` is what makes the engine."""
    config, groups = context.config, context.groups
    return kind(
        model,
        shards_of(model, config.model, groups),
        groups,
        context.platform,
        config.optimizer,
    )


def build_features(
    context: RankContext,
    encoders: FrozenEncoders | None,
    first_step: int,
    last_step: int | None = None,
    *,
    held_out: HeldOut | None = None,
    is_owed: bool = False,
) -> FeatureSource | None:
    """Open where a language rank's features come from; None where it needs none and encodes none.

    Args:
        context: of the rank.
        encoders: of a rank that encodes itself; None where encoder ranks do.
        first_step: the step to begin with.
        last_step: the one to end before; the run's last one unless given.
        held_out: what is validated on; None for steps without validations.
        is_owed: whether a validation comes before the first step.
    """
    config, lookahead = context.config, context.config.stage.lookahead
    last = config.training.steps if last_step is None else last_step
    if encoders is not None:
        ahead = _schedule(context, held_out).between(first_step, last, is_owed=is_owed)
        return ColocatedEncoders(ahead, context.groups, encoders, lookahead)
    if not context.groups.is_first_stage:
        return None
    unread = Schedule(context.planner, held_out=held_out).between(first_step, last, is_owed=is_owed)
    rounds = (micro_batch.rows for micro_batch in unread)
    return FeatureReceiver(rounds, context.groups, values=config.vision.feature_values, lookahead=lookahead)


def build_trainer(context: RankContext, engine: Engine, features: FeatureSource | None, watch: Watch) -> Trainer:
    """Join what every step of a language rank is computed with."""
    config = context.config
    return Trainer(
        engine=engine,
        features=features,
        groups=context.groups,
        device=context.platform.device,
        watch=watch,
        progress=context.progress,
        text_weight=config.loss.text_weight,
        moe_layers=config.model.layers if config.model.experts else 0,
    )


def build_answerer(context: RankContext, model: SphinxModel) -> Answerer | None:
    """Make what answers the samples of validations; None where none are to be answered.

    Raises:
        ConfigError: they cannot be answered.
    """
    return TrainingAnswerer(context, model) if context.config.validation.samples else None


def build_loop(
    context: RankContext,
    trainer: Trainer,
    store: CheckpointStore,
    reporter: Reporter | None,
    *,
    bad_pairs: int = 0,
    observer: Observer | None = None,
    validator: Validator | None = None,
) -> Loop:
    """Make the steps of a language rank ready to run; every language rank calls this, together."""
    return Loop(context, trainer, store, reporter, _measure_peak_flops(context), bad_pairs, observer, validator)


def _schedule(context: RankContext, held_out: HeldOut | None) -> Schedule:
    """Put the micro-batches of a run in order, and open what reads their pictures."""
    held_out_pixels = context.pixels(held_out.sources) if held_out is not None else None
    return Schedule(context.planner, context.pixels(), held_out, held_out_pixels)


def encode_steps(
    context: RankContext,
    encoders: FrozenEncoders,
    first_step: int,
    last_step: int,
    observer: Observer | None = None,
    *,
    held_out: HeldOut | None = None,
    is_owed: bool = False,
) -> None:
    """Encode an encoder rank's share of the views of steps, and of validations on the way, and send the features.

    Args:
        context: of the rank.
        encoders: what it encodes with.
        first_step: the step to begin with.
        last_step: the one to end before.
        observer: hears of each micro-batch.
        held_out: what is validated on; None for steps without validations.
        is_owed: whether a validation comes before the first step.
    """
    config, number = context.config, context.groups.seat.encoder
    assert number is not None, "a language rank has no encoder's number"
    produce(
        _schedule(context, held_out).between(first_step, last_step, is_owed=is_owed),
        encoder=number,
        encoder_count=config.parallel.encoder,
        encoders=encoders,
        sender=FeatureSender(context.groups, config.stage.lookahead),
        lookahead=config.stage.lookahead,
        progress=context.progress,
        observer=observer,
    )


def _measure_peak_flops(context: RankContext) -> float:
    """Measure the FLOP/s that the language ranks reach together on a large matrix product."""
    platform = context.platform
    peak = torch.tensor(
        platform.measure_peak_flops(dtype_of(context.config)), dtype=torch.float64, device=platform.device
    )
    dist.all_reduce(peak, group=context.groups.language)
    return float(peak)
