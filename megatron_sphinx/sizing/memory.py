"""The most bytes that a rank holds at once, by what holds them. Arithmetic only.

Counted from the code that runs: the activations that activations.py counts, and DeepSpeed's ZeRO-2 as
training/engine.py sets it up.
"""

from dataclasses import dataclass

from megatron_sphinx.config import Config
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing.activations import (
    FP32_BYTES,
    MicroBatchSize,
    activation_bytes,
    logit_bytes,
    number_bytes,
    rows_at_once,
)
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.stage.dealing import joined
from megatron_sphinx.training.memory import BUCKET, RankWeights, rank_weights

_LARGE_BYTES = 32 * 2**20  # glibc maps larger tensors one by one, and gives them back when they are freed
_OPTIMIZER_BYTES = 12  # for each trained number: its fp32 value and AdamW's two moments


@dataclass(frozen=True)
class EncoderCost:
    """What it takes to encode views with a visual expert, or with a mixture of them.

    Attributes:
        weights: how many numbers the weights are.
        flops: FLOPs to encode one view.
        values: numbers that one view has in memory at the moment when it has most.
        families: the FLOPs of a view in each visual expert, behind its family.
    """

    weights: int
    flops: float
    values: float
    families: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class GradientBytes:
    """Bytes of gradients on one rank, and of the buffers that reduce them.

    Attributes:
        whole: gradients that lie beside their weights until the end of a pipeline's schedule.
        partition: the part of the reduced gradient that this rank keeps for its optimizer.
        earlier: as much of it as is there when another micro-batch's backward begins.
        buckets: buffers in which gradients leave for the ranks that update them.
        newest: the largest gradient, while it is moved.
    """

    whole: float
    partition: float
    earlier: float
    buckets: float
    newest: float


def _gradient_bytes(
    weights: RankWeights, layout: ParallelLayout, precision: str, micro_batches: int, largest: float
) -> GradientBytes:
    """Count the bytes of the gradients of one rank's trained weights.

    Args:
        weights: how many numbers the rank trains.
        layout: how they are divided.
        precision: of the run.
        micro_batches: how many a step has on the busiest replica.
        largest: numbers in the largest trained weight.
    """
    width, trained = number_bytes(precision), weights.shared + weights.experts
    partition = float(-(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data))
    is_pipeline = layout.config.pipeline > 1
    is_reduced_again = micro_batches > 1 and not is_pipeline
    buckets = 0.0
    for number, copies in ((weights.shared, layout.data), (weights.experts, layout.expert_data)):
        if copies > 1:
            size = min(BUCKET, number)
            buckets += size * (2 if number > size or is_reduced_again else 1)
    return GradientBytes(
        whole=float(width * trained) if is_pipeline else 0.0,
        partition=FP32_BYTES * partition,
        earlier=FP32_BYTES * partition if is_reduced_again else 0.0,
        buckets=FP32_BYTES * buckets,
        newest=0.0 if is_pipeline else width * largest,
    )


def largest_trained_weight(config: Config, layout: ParallelLayout, stage: int) -> int:
    """How many numbers the largest weight that this run trains has on a rank of a pipeline stage; 0 without one."""
    model, vision, sizes, train = config.model, config.vision, layout.config, config.training.train
    hidden, tensor = model.hidden, sizes.tensor
    candidates = [0]
    if train != "language" and stage == 0:  # the projections, whole on every tensor rank
        candidates += [vision.channels * hidden, vision.qformer.channels * hidden if vision.qformer else 0]
    if train != "projections":
        candidates.append((hidden + 2 * model.groups * (hidden // model.heads)) * hidden // tensor)
        if model.experts:
            candidates.append(2 * model.ffn * hidden * model.experts // (sizes.expert * sizes.expert_tensor))
        else:
            candidates.append(2 * model.ffn * hidden // tensor)
        if stage in (0, sizes.pipeline - 1):
            candidates.append(model.padded_vocabulary * hidden // tensor)
    return max(candidates)


def language_rank(
    config: Config, layout: ParallelLayout, stage: int, work: Work, hardware: Hardware, encoders: EncoderCost
) -> dict[str, float]:
    """Bytes on a language rank of a pipeline stage at the moment when it holds most, by what holds them, and `total`.

    What is held all the time is the process, the weights, the optimizer, features and encoders; the rest depends on
    the moment, see `_moments`.

    Args:
        config: the run; its `parallel` is not read.
        layout: how it is divided.
        stage: number of the pipeline stage.
        work: the rows of a step.
        hardware: of the rank; its `process_bytes` are counted in.
        encoders: what it takes to encode; counted in where there are no encoder ranks.
    """
    width = number_bytes(config.training.precision)
    weights = rank_weights(config.model, config.vision, layout, stage, config.training.train)
    trained = weights.shared + weights.experts
    rows, micro_batches = rows_at_once(work, layout, config.data.rows_at_once)
    size = MicroBatchSize.of_rows(work, rows)
    partition = -(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data)
    frozen_masters = 0.0 if hardware.is_cuda else FP32_BYTES * -(-weights.frozen // layout.data)
    always = {
        "process": hardware.process_bytes,
        "weights": float(width * (trained + weights.frozen)),
        "optimizer": float(_OPTIMIZER_BYTES * partition) + frozen_masters,
        "features": _feature_bytes(config, layout, stage, size, is_cuda=hardware.is_cuda),
        "encoders": 0.0 if layout.config.encoder else _encoder_bytes(config, encoders, hardware),
    }
    moments = _moments(config, layout, stage, weights, size, micro_batches, is_cuda=hardware.is_cuda)
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    total = always | {name: fullest.get(name, 0.0) for name in NAMES[len(always) :]}
    return total | {"total": sum(total.values())}


def _moments(
    config: Config,
    layout: ParallelLayout,
    stage: int,
    weights: RankWeights,
    size: MicroBatchSize,
    micro_batches: int,
    *,
    is_cuda: bool,
) -> list[dict[str, float]]:
    """Bytes that a language rank holds for a while, at each moment of a step that may be the one with most.

    Those moments: backward begins, and all activations are there; it ends, and the last gradients are reduced; the
    optimizer computes; on a CPU also: gloo gathers the weights, and a checkpoint is copied. A CPU's allocator keeps
    what small tensors have left, so there the other moments have the activations' memory too.
    """
    model, sizes, precision = config.model, layout.config, config.training.precision
    width = number_bytes(precision)
    trained = weights.shared + weights.experts
    partition = -(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data)
    largest = float(largest_trained_weight(config, layout, stage))
    gradients = _gradient_bytes(weights, layout, precision, micro_batches, largest)
    in_flight = min(micro_batches, sizes.pipeline - stage)
    forward = {
        "activations": activation_bytes(config, layout, stage, size, in_flight),
        "logits": logit_bytes(config, layout, size) if stage == sizes.pipeline - 1 else 0.0,
    }
    backward_begins = forward | {
        "gradients": gradients.earlier + gradients.whole,
        "buckets": gradients.buckets if gradients.earlier else 0.0,
    }
    backward_ends = {
        "gradients": gradients.partition + gradients.whole + gradients.newest,
        "buckets": gradients.buckets,
    }
    update = {"gradients": gradients.partition}
    gather = {"temporaries": 0.0 if is_cuda or layout.data == 1 else float(width * trained)}
    save = {"temporaries": 0.0 if is_cuda else float(_OPTIMIZER_BYTES * partition)}
    moments = [backward_begins, backward_ends, update, gather, save]
    if not is_cuda and size.positions * width * model.hidden < _LARGE_BYTES:
        moments = [moment | forward for moment in moments]
    return moments


NAMES = (
    "process", "weights", "optimizer", "features", "encoders", "gradients", "activations", "logits", "buckets",
    "temporaries",
)  # fmt: skip


def encoder_rank(
    config: Config, layout: ParallelLayout, work: Work, hardware: Hardware, encoders: EncoderCost
) -> dict[str, float]:
    """Bytes on an encoder rank when it holds most, by what holds them, and `total`."""
    rows, _ = rows_at_once(work, layout, config.data.rows_at_once)
    size = MicroBatchSize.of_rows(work, rows)
    views = -(-size.views * layout.data // layout.config.encoder)  # a micro-batch's of all replicas, dealt evenly
    parts = {
        "process": hardware.process_bytes,
        "features": 2.0
        * config.vision.feature_values
        * views
        * (config.stage.lookahead + 1 + _together(config, views)),
        "encoders": _encoder_bytes(config, encoders, hardware),
    }
    if not hardware.is_cuda:
        parts["pixels"] = _pixel_bytes(config) * views * (config.stage.lookahead + 1)
    return parts | {"total": sum(parts.values())}


def _feature_bytes(config: Config, layout: ParallelLayout, stage: int, size: MicroBatchSize, *, is_cuda: bool) -> float:
    """Bytes of features on a language rank, which the first stage alone has.

    There is a buffer for each micro-batch that is received ahead, one for the micro-batch being computed, and one for
    its masked copy. On a GPU what the micro-batch was received to is kept until the next one, when it has been read.
    Where the rank encodes itself, there are those that it has encoded together.
    """
    if stage:
        return 0.0
    ahead = config.stage.lookahead + is_cuda if layout.config.encoder else _together(config, size.views) - 1
    return 2.0 * config.vision.feature_values * size.views * (ahead + 2)


def _together(config: Config, views: float) -> int:
    """How many micro-batches of so many views an encoder encodes together."""
    return joined([views] * config.stage.lookahead, config.vision.views_at_once)


def _pixel_bytes(config: Config) -> float:
    """Bytes of one view's pixels in all input sizes: a byte each, or fp32 with the released code's resizing."""
    width = FP32_BYTES if config.vision.resize == "accessory" else 1
    return width * 3.0 * sum(side * side for side in config.vision.sides)


def _encoder_bytes(config: Config, encoders: EncoderCost, hardware: Hardware) -> float:
    """Bytes of the experts' weights, and of the activations and fp32 pixels of one batch of views."""
    width = number_bytes(hardware.encoder_precision(config.vision.precision))
    views = config.vision.views_at_once
    return width * (encoders.weights + views * encoders.values) + FP32_BYTES * _pixel_bytes(config) * views


def peak(
    config: Config, layout: ParallelLayout, work: Work, hardware: Hardware, encoders: EncoderCost
) -> dict[str, dict[str, float]]:
    """Bytes of every role at its fullest moment, by what holds them, and `total`.

    Returns:
        For `language stage 0` and so on, and for `encoder`. Stages with the same work are told once, under the number
        of the first one, which holds most.
    """
    stages = unlike_stages(layout, config.model.layers)
    roles = {
        f"language stage {stage}": language_rank(config, layout, stage, work, hardware, encoders) for stage in stages
    }
    if layout.config.encoder:
        roles["encoder"] = encoder_rank(config, layout, work, hardware, encoders)
    return roles


def unlike_stages(layout: ParallelLayout, layers: int) -> dict[int, int]:
    """Group the pipeline's stages by their work: the first stage of each group, and how many are in it."""
    sizes = layout.config
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for stage, count in enumerate(sizes.stage_layers(layers)):
        groups.setdefault((count, stage == 0, stage == sizes.pipeline - 1), []).append(stage)
    return {stages[0]: len(stages) for stages in groups.values()}


def heaviest(roles: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Name the role that holds most, and its bytes."""
    return max(((name, parts["total"]) for name, parts in roles.items()), key=lambda item: item[1])
