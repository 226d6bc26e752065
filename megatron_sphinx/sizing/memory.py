"""The most that a rank holds at once, by what holds it. Arithmetic only.

Counted from the code that runs: what megatron-core's layers and our attention, norms and experts keep for backward
(tests/test_planning.py compares with autograd's own account), and DeepSpeed's ZeRO-2 as training/engine.py
sets it up.
"""

from dataclasses import dataclass

from megatron_sphinx.config import Config
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.memory import REDUCE_BUCKET, RankWeights, rank_weights

_LARGE_BYTES = 32 * 2**20  # glibc maps larger tensors one by one, and gives them back when they are freed


@dataclass(frozen=True)
class EncoderCost:
    """What it takes to encode.

    Attributes:
        weights: of all experts together.
        flops: of a view, by all experts.
        values: of one view, that are held at once where most are.
    """

    weights: int
    flops: float
    values: float


@dataclass(frozen=True)
class MicroBatchSize:
    """A replica's largest micro-batch."""

    positions: float
    targets: float
    views: float

    @classmethod
    def of(cls, work: Work, rows: int) -> "MicroBatchSize":
        """Of so many rows."""
        return cls(rows * work.most_positions, rows * work.most_targets, rows * work.most_views)


def rows_at_once(work: Work, layout: ParallelLayout, micro_batch_rows: int) -> tuple[int, int]:
    """Rows of the largest micro-batch of a replica, and how many micro-batches the busiest one has."""
    mine = -(-work.rows // layout.data)
    return min(mine, micro_batch_rows), -(-mine // micro_batch_rows)


def width_of(precision: str) -> int:
    """Bytes of a weight and of an activation."""
    return 4 if precision == "fp32" else 2


def feed_forward_values(model: LanguageConfig, sizes: ParallelConfig) -> float:
    """Numbers that the feed-forward layer or the experts of a layer keep for backward, for each position of a replica.

    Gate and up are one tensor; SiLU of the gate, up (megatron-core adds an offset to it, a copy) and their product are
    one each. Experts get each token `experts_per_token` times: the token, its place among the others and their result
    are kept too.
    """
    if not model.experts:
        return 5 * model.ffn / sizes.tensor
    copies = model.experts_per_token / sizes.tensor * sizes.expert_tensor
    return copies * (4 * model.ffn / sizes.expert_tensor + 4 * model.hidden)


def layer_bytes(model: LanguageConfig, sizes: ParallelConfig, precision: str, recompute: str) -> tuple[float, float]:
    """Bytes that a decoder layer keeps for each position of a replica, and those it has when it is computed again.

    A norm keeps its input and, for each position, its scale; RoPE keeps nothing of its own.
    """
    width, hidden, tensor = width_of(precision), model.hidden, sizes.tensor
    part = hidden / (tensor if sizes.sequence else 1)  # of what tensor ranks share only with sequence parallelism
    head = hidden // model.heads
    keys = model.groups * head
    norms = 2 * (part * 2 * width + 4 / (tensor if sizes.sequence else 1))
    attention = width * (4 * hidden + 3 * keys) / tensor  # queries, keys, values; turned queries and keys; output twice
    attention += 4 * model.heads / tensor  # softmax's sums
    router = 0.0
    if model.experts:
        router = (4 * part if width == 2 else 0.0) + (10 * model.experts + 50) / (tensor if sizes.sequence else 1)
    forward = width * feed_forward_values(model, sizes)
    whole = norms + attention + router + forward
    if recompute == "none":
        return whole, 0.0
    if recompute == "selective":
        return whole - forward - router, forward + router
    return width * part, whole


def kept_layers(config: Config, layers: int) -> tuple[int, int]:
    """Layers of a stage that keep their activations, and those that are computed again from their inputs."""
    if config.training.activation_checkpointing != "full":
        return layers, 0
    again = min(config.training.checkpointed_layers or layers, layers)
    return layers - again, again


def activation_bytes(config: Config, layout: ParallelLayout, stage: int, size: MicroBatchSize, in_flight: int) -> float:
    """Bytes of activations of a stage at the start of backward, those of a layer being computed again included."""
    model, sizes, recompute = config.model, layout.config, config.training.activation_checkpointing
    width, precision = width_of(config.training.precision), config.training.precision
    layers = sizes.stage_layers(model.layers)[stage]
    whole, again = kept_layers(config, layers)
    kept, anew = layer_bytes(model, sizes, precision, "selective" if recompute == "selective" else "none")
    total = whole * kept * in_flight
    if again:
        inputs, anew = layer_bytes(model, sizes, precision, "full")
        total += again * inputs * in_flight
    total += anew
    # gradients inside one layer, where it is widest
    copies = model.experts_per_token / sizes.tensor if model.experts else 1 / sizes.tensor
    total += 4 * width * copies * model.ffn + 2 * width * model.hidden
    if sizes.sequence:  # a matrix's input, gathered from all ranks once more, and its gradient before it is scattered
        total += 2 * width * model.hidden
    total *= size.positions
    if stage == 0:
        values = config.vision.feature_values
        projected = size.views * (
            values * (4 if width == 4 else 0) + config.vision.tokens_per_view * model.hidden * 2 * width
        )
        total += (projected + 2 * width * model.hidden * size.positions) * in_flight
    return total


def logit_bytes(config: Config, layout: ParallelLayout, size: MicroBatchSize) -> float:
    """Bytes of logits, where most are held: their own, with the padded ones hidden, and the fp32 softmax."""
    model, width = config.model, width_of(config.training.precision)
    vocabulary = model.padded_vocabulary / layout.config.tensor
    copies = 2 * width if model.padded_vocabulary != model.vocabulary else width
    softmax = 4 if width == 2 else (4 if copies == 4 else 0)
    held = max(copies + softmax - (width if width == 2 and copies > width else 0), 4 + copies - width)
    return size.targets * vocabulary * max(held, 4)


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients and of what reduces them.

    Attributes:
        whole: gradients that lie with their weights until the end of a pipeline's schedule.
        partition: what this rank keeps of the reduced gradient.
        before: of it, what is held from micro-batches before, while one more is reduced.
        buckets: that gradients are collected in.
        reducing: copies that are made of a bucket while it is reduced.
    """

    whole: float
    partition: float
    before: float
    buckets: float
    reducing: float


def _gradients(
    weights: RankWeights, layout: ParallelLayout, precision: str, micro_batches: int, largest: float, *, is_cuda: bool
) -> Gradients:
    """Of a rank with these weights, the largest of which has so many numbers.

    In bf16 the reduced partition is fp32 and summed in place; in fp32 weights that are only partly in the partition
    are kept whole, and those of one more micro-batch lie beside the sum.
    """
    width, trained = width_of(precision), weights.shared + weights.experts
    partition = float(-(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data))
    is_pipeline = layout.config.pipeline > 1
    bucket = float(max(min(REDUCE_BUCKET, trained), largest))
    if width == 4:
        partition = min(partition + largest, trained)
    reduces_again = micro_batches > 1 and not is_pipeline
    return Gradients(
        whole=width * trained if is_pipeline else 0.0,
        partition=4.0 * partition,
        before=4.0 * partition if reduces_again else 0.0,
        buckets=width * (2.0 * REDUCE_BUCKET if is_cuda else bucket),
        reducing=bucket * (width + (4 if width == 2 else 0)),
    )


def _largest_weight(model: LanguageConfig, sizes: ParallelConfig, stage: int) -> float:
    """Numbers in the largest weight of a stage."""
    hidden, tensor = model.hidden, sizes.tensor
    found = [(hidden + 2 * model.groups * (hidden // model.heads)) * hidden / tensor]
    if model.experts:
        found.append(2 * model.ffn * hidden * model.experts / (sizes.expert * sizes.expert_tensor))
    else:
        found.append(2 * model.ffn * hidden / tensor)
    if stage in (0, sizes.pipeline - 1):
        found.append(model.padded_vocabulary * hidden / tensor)
    return max(found)


def language_rank(
    config: Config, layout: ParallelLayout, stage: int, work: Work, hardware: Hardware, encoders: EncoderCost
) -> dict[str, float]:
    """Bytes on a language rank of a pipeline stage at the moment when most are held, by what holds them, and `total`.

    That moment is one of these: backward has begun, and all activations are there; it has ended, and the last
    gradients are reduced; the optimizer computes; on a CPU also: gloo gathers the weights, or a checkpoint is copied.
    A CPU's allocator keeps what small tensors have left, so there the other moments have the activations' memory too.

    Args:
        config: the run; its `parallel` is not read.
        layout: how it is divided.
        stage: of the pipeline.
        work: the rows of a step.
        hardware: whose `process_bytes` are counted in.
        encoders: counted in where there are no encoder ranks.
    """
    model, sizes, precision = config.model, layout.config, config.training.precision
    width, is_cuda = width_of(precision), hardware.is_cuda
    weights = rank_weights(model, config.vision, layout, stage, config.training.train)
    trained = weights.shared + weights.experts
    partition = -(-weights.shared // layout.data) + -(-weights.experts // layout.expert_data)
    rows, micro_batches = rows_at_once(work, layout, config.data.micro_batch_rows)
    size = MicroBatchSize.of(work, rows)
    largest = _largest_weight(model, sizes, stage) if trained == weights.shared + weights.experts and trained else 0.0
    largest = min(largest, float(trained))
    held = _gradients(weights, layout, precision, micro_batches, largest, is_cuda=is_cuda)
    in_flight = min(micro_batches, sizes.pipeline - stage)
    activations = activation_bytes(config, layout, stage, size, in_flight)
    logits = logit_bytes(config, layout, size) if stage == sizes.pipeline - 1 else 0.0
    frozen = 0.0 if is_cuda else 4.0 * -(-weights.frozen // layout.data)
    base = {
        "process": hardware.process_bytes,
        "weights": float(width * (trained + weights.frozen)),
        "optimizer": 12.0 * partition + frozen,
        "features": _feature_bytes(config, layout, stage, size),
        "encoders": 0.0 if sizes.encoder else _encoder_bytes(config, encoders, size, hardware),
    }
    earlier = held.before if width == 4 else (held.partition if held.before else 0.0)
    moments = {
        "backward begins": {
            "gradients": earlier + held.whole,
            "activations": activations,
            "logits": logits,
            "buckets": held.buckets if is_cuda else 0.0,
        },
        "backward ends": {
            "gradients": held.partition + held.before * (width == 4) + held.whole,
            "buckets": held.buckets + (held.reducing if width == 2 else max(0.0, held.reducing - held.partition)),
        },
        "update": {"gradients": held.partition + (4.0 * partition if width == 4 else 0.0)},
        "gather": {"temporaries": 0.0 if is_cuda or layout.data == 1 else float(width * trained)},
        "save": {"temporaries": 0.0 if is_cuda else 12.0 * partition},
    }
    if not is_cuda and size.positions * width * model.hidden < _LARGE_BYTES:
        kept = {"activations": activations, "logits": logits}
        moments = {name: parts | kept for name, parts in moments.items()}
    most = max(moments.values(), key=lambda parts: sum(parts.values()))
    found = base | {name: most.get(name, 0.0) for name in NAMES[len(base) :]}
    return found | {"total": sum(found.values())}


NAMES = (
    "process", "weights", "optimizer", "features", "encoders", "gradients", "activations", "logits", "buckets",
    "temporaries",
)  # fmt: skip


def encoder_rank(
    config: Config, layout: ParallelLayout, work: Work, hardware: Hardware, encoders: EncoderCost
) -> dict[str, float]:
    """Bytes on an encoder rank, by what holds them, and `total`."""
    rows, _ = rows_at_once(work, layout, config.data.micro_batch_rows)
    size = MicroBatchSize.of(work, rows)
    views = -(-size.views * layout.data // layout.config.encoder)  # of a round, dealt evenly
    found = {
        "process": hardware.process_bytes,
        "features": 2.0 * config.vision.feature_values * views * (config.stage.lookahead + 2),
        "encoders": _encoder_bytes(config, encoders, size, hardware),
    }
    if not hardware.is_cuda:
        found["pixels"] = _pixel_bytes(config) * views * (config.stage.lookahead + 1)
    return found | {"total": sum(found.values())}


def _feature_bytes(config: Config, layout: ParallelLayout, stage: int, size: MicroBatchSize) -> float:
    """Buffers of features that are received ahead, the micro-batch being computed and its masked copy included."""
    if stage:
        return 0.0
    ahead = config.stage.lookahead if layout.config.encoder else 0
    return 2.0 * config.vision.feature_values * size.views * (ahead + 2)


def _pixel_bytes(config: Config) -> float:
    """Of one view, in all sizes; bytes, or fp32 where the released code's resizing is asked for."""
    width = 4 if config.vision.resize == "accessory" else 1
    return width * 3.0 * sum(side * side for side in config.vision.sides)


def _encoder_bytes(config: Config, encoders: EncoderCost, size: MicroBatchSize, hardware: Hardware) -> float:
    """Weights of the experts, activations of a batch of views and its pixels in fp32; bf16 where there is a GPU."""
    width = width_of(hardware.encoder_precision)
    views = config.vision.batch_views
    return width * (encoders.weights + views * encoders.values) + 4 * _pixel_bytes(config) * views


def peak(
    config: Config, layout: ParallelLayout, work: Work, hardware: Hardware, encoders: EncoderCost
) -> dict[str, dict[str, float]]:
    """Bytes of every role, `language stage 0` ... and `encoder`, by what holds them, and `total`.

    Of stages that hold as many layers, the first one, which holds most.
    """
    stages = unlike_stages(layout, config.model.layers)
    found = {
        f"language stage {stage}": language_rank(config, layout, stage, work, hardware, encoders) for stage in stages
    }
    if layout.config.encoder:
        found["encoder"] = encoder_rank(config, layout, work, hardware, encoders)
    return found


def unlike_stages(layout: ParallelLayout, layers: int) -> dict[int, int]:
    """The first of the pipeline's stages that have the same work, and how many there are of each."""
    sizes = layout.config
    kinds: dict[tuple[int, bool, bool], list[int]] = {}
    for stage, count in enumerate(sizes.stage_layers(layers)):
        kinds.setdefault((count, stage == 0, stage == sizes.pipeline - 1), []).append(stage)
    return {stages[0]: len(stages) for stages in kinds.values()}


def heaviest(roles: dict[str, dict[str, float]]) -> tuple[str, float]:
    """The role that holds most, and its bytes."""
    return max(((name, parts["total"]) for name, parts in roles.items()), key=lambda item: item[1])
