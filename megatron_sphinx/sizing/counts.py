"""What a rank of each role computes and communicates in a step: FLOPs and bytes. Arithmetic only, from the sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from megatron_sphinx.config import Config
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing.activations import number_bytes
from megatron_sphinx.sizing.memory import EncoderCost
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.memory import BUCKET, rank_weights


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training run, ours or a published one: the model, and how the software goes about it.

    Attributes:
        model: the language model.
        vision: its eyes; None for a model of text.
        precision: what matrix products are computed in: bf16, fp8 or fp32.
        recompute: what backward computes again: none, selective (feed-forward layers) or full.
        recomputed_layers: with `full`, how many layers of each stage are computed again; None for all.
        micro_batch_rows: most rows that a replica computes at once.
        train: what is trained: all, projections or language.
        virtual_stages: parts of the model on each pipeline stage. Several hide what stages send each other behind their
            work, one does not.
        gradient_bytes: bytes of a number when gradients are summed over replicas.
        reduces_each_micro_batch: whether gradients are reduced for each micro-batch; else once a step.
        is_reduction_overlapped: whether gradients are reduced while backward goes on.
        is_gather_overlapped: whether the weights are gathered while the next forward goes on.
        is_tensor_overlapped: whether tensor ranks communicate while they compute matrix products.
        shards: ranks that gradients and optimizer are partitioned over; None for all replicas. The shards' sums are
            then added over the other replicas.
        is_sharding_weights: whether weights too are partitioned, and gathered for each forward and backward (ZeRO-3,
            FSDP).
        lookahead: micro-batches that encoders may be ahead.
        is_fused: whether norms, SwiGLU and rotary embeddings are one kernel each.
    """

    model: LanguageConfig
    vision: VisionConfig | None = None
    precision: str = "bf16"
    recompute: str = "none"
    recomputed_layers: int | None = None
    micro_batch_rows: int = 1
    train: str = "all"
    virtual_stages: int = 1
    gradient_bytes: int = 4
    reduces_each_micro_batch: bool = False
    is_reduction_overlapped: bool = True
    is_gather_overlapped: bool = True
    is_tensor_overlapped: bool = False
    shards: int | None = None
    is_sharding_weights: bool = False
    lookahead: int = 1
    is_fused: bool = True

    @classmethod
    def ours(cls, config: Config, *, is_cuda: bool) -> "TrainingSetup":
        """Describe how training/engine.py takes a step with this configuration.

        Args:
            config: the run.
            is_cuda: whether it computes on GPUs, where gradients are reduced while backward goes on.
        """
        training = config.training
        return cls(
            model=config.model,
            vision=config.vision,
            precision=training.precision,
            recompute=training.activation_checkpointing,
            recomputed_layers=training.checkpointed_layers,
            micro_batch_rows=config.data.rows_at_once,
            train=training.train,
            reduces_each_micro_batch=config.parallel.pipeline == 1,
            is_reduction_overlapped=is_cuda and config.parallel.pipeline == 1,
            is_gather_overlapped=False,
            lookahead=config.stage.lookahead,
            is_fused=False,
        )

    @property
    def width(self) -> int:
        """Bytes of one number of an activation."""
        return number_bytes(self.precision)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of communication of a rank in a step.

    Attributes:
        group: whom it goes to: tensor, data, expert, expert_tensor, expert_data, pipeline, model or features.
        kind: which collective: all_reduce, all_gather, reduce_scatter (also as a reduce to each rank), all_to_all, send
            or broadcast.
        purpose: what it is for, in a word or two.
        count: calls in a step.
        bytes: how much all calls together sum, gather (the whole) or send.
    """

    group: str
    kind: str
    purpose: str
    count: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class ReplicaWork:
    """A replica's micro-batches in a step: how many they are, and how much is in one on average.

    Attributes:
        micro_batches: how many the replica computes one after the other.
        positions: tokens and image positions of a micro-batch.
        attended: pairs of positions of which one sees the other, in each head.
        targets: positions whose loss is computed.
        views: views that are encoded.
        documents: documents and samples that attention stays inside.
    """

    micro_batches: int
    positions: float
    attended: float
    targets: float
    views: float
    documents: float

    @classmethod
    def busiest(cls, work: Work, layout: ParallelLayout, micro_batch_rows: int) -> "ReplicaWork":
        """Return the work of the replica that has most rows of a step.

        Args:
            work: the rows of the step.
            layout: how many replicas share them.
            micro_batch_rows: most rows that a replica computes at once.
        """
        replica_rows = -(-work.rows // layout.data)
        count = -(-replica_rows // micro_batch_rows)
        rows = replica_rows / count
        return cls(
            micro_batches=count,
            positions=rows * work.positions,
            attended=rows * work.attended,
            targets=rows * work.targets,
            views=rows * work.views,
            documents=rows * work.documents,
        )


def recomputed(setup: TrainingSetup, layers: int) -> float:
    """How many of a stage's layers backward computes again as a whole."""
    if setup.recompute != "full":
        return 0.0
    return float(min(setup.recomputed_layers or layers, layers))


def flops(
    setup: TrainingSetup, layout: ParallelLayout, work: Work, encoders: EncoderCost | None = None
) -> dict[str, dict[str, float]]:
    """FLOPs of a rank of each role in a step, by what they are for.

    Returns:
        For `language stage 0` and so on, and for `encoder`: matrices, attention, logits, projections, recompute,
        encoders. Matrix products and attention only, two FLOPs a multiply-add; attention's backward is counted as 2.5
        times its forward.
    """
    roles = {}
    replica = ReplicaWork.busiest(work, layout, setup.micro_batch_rows)
    for stage in range(layout.config.pipeline):
        once = forward_flops(setup, layout, replica, stage)
        backward = 1.0 if setup.train == "projections" else 2.0
        parts = {
            "matrices": (1 + backward) * once["matrices"],
            "attention": (1 + 2.5) * once["attention"],
            "logits": (1 + backward) * once["logits"],
            "projections": 2 * once["projections"] if setup.train != "language" else once["projections"],
            "recompute": once["again"],
            "encoders": 0.0,
        }
        if encoders is not None and not layout.config.encoder:
            parts["encoders"] = encoders.flops * replica.views / (layout.config.tensor * layout.config.pipeline)
        roles[f"language stage {stage}"] = {name: replica.micro_batches * value for name, value in parts.items()}
    if layout.config.encoder and encoders is not None:
        roles["encoder"] = {"encoders": encoders.flops * work.views * work.rows / layout.config.encoder}
    return roles


def forward_flops(setup: TrainingSetup, layout: ParallelLayout, replica: ReplicaWork, stage: int) -> dict[str, float]:
    """FLOPs of one micro-batch's forward on a rank of a stage, by what they are for.

    Returns:
        matrices, attention, logits and projections; and `again`, the part of them that backward computes once more.
    """
    model, sizes = setup.model, layout.config
    layers = sizes.stage_layers(model.layers)[stage]
    matrices = 2 * replica.positions * layers * model.active_matrices / sizes.tensor
    attention = 4 * model.hidden * replica.attended * layers / sizes.tensor
    feed_forward = 2 * replica.positions * model.expert_matrices * (model.experts_per_token if model.experts else 1)
    again = (matrices + attention) / layers * recomputed(setup, layers)
    if setup.recompute == "selective":
        again = feed_forward * layers / sizes.tensor
    vision = setup.vision
    projected = 0.0
    if vision is not None and stage == 0:
        projected = vision.mixed_tokens * vision.channels
        projected += vision.qformer.queries * vision.qformer.channels if vision.qformer else 0
    return {
        "matrices": matrices,
        "attention": attention,
        "logits": 2 * replica.targets * model.padded_vocabulary * model.hidden / sizes.tensor
        if stage == sizes.pipeline - 1
        else 0.0,
        "projections": 2 * replica.views * projected * model.hidden,
        "again": again,
    }


def communication(setup: TrainingSetup, layout: ParallelLayout, work: Work) -> dict[str, list[Transfer]]:
    """List what a rank of each role communicates in a step, groups of one rank left out.

    Returns:
        For `language stage 0` and so on, and for `encoder`, the transfers in the order in which they first happen.
    """
    replica = ReplicaWork.busiest(work, layout, setup.micro_batch_rows)
    roles = {}
    for stage in range(layout.config.pipeline):
        parts = [
            *feature_transfers(setup, layout, replica, stage),
            *tensor_transfers(setup, layout, replica, stage),
            *expert_transfers(setup, layout, replica, stage),
            *pipeline_transfers(setup, layout, replica, stage),
            *reductions(setup, layout, replica, stage),
        ]
        roles[f"language stage {stage}"] = [part for part in parts if part.bytes]
    if layout.config.encoder and setup.vision is not None:
        total = 2.0 * setup.vision.feature_values * work.views * work.rows / layout.config.encoder
        messages = replica.micro_batches * max(1.0, layout.data / layout.config.encoder)
        sent = Transfer(group="features", kind="send", purpose="features", count=messages, bytes=total)
        roles["encoder"] = [sent] if total else []
    return roles


def feature_transfers(
    setup: TrainingSetup, layout: ParallelLayout, replica: ReplicaWork, stage: int
) -> Iterator[Transfer]:
    """Yield how features spread inside a replica: over its tensor group, or over all its ranks where they encode."""
    sizes = layout.config
    if setup.vision is None:
        return
    total = 2.0 * setup.vision.feature_values * replica.views * replica.micro_batches
    if sizes.encoder and stage == 0 and sizes.tensor > 1:
        yield Transfer(group="tensor", kind="broadcast", purpose="features", count=replica.micro_batches, bytes=total)
    elif not sizes.encoder and (ranks := sizes.tensor * sizes.pipeline) > 1:
        yield Transfer(
            group="model", kind="broadcast", purpose="features", count=ranks * replica.micro_batches, bytes=total
        )


def tensor_transfers(
    setup: TrainingSetup, layout: ParallelLayout, replica: ReplicaWork, stage: int
) -> Iterator[Transfer]:
    """Yield the sums and gathers of hidden states over the tensor group, as megatron-core's linear layers do them."""
    model, sizes = setup.model, layout.config
    if sizes.tensor == 1:
        return
    layers, last = sizes.stage_layers(model.layers)[stage], stage == sizes.pipeline - 1
    hidden = replica.positions * model.hidden * setup.width
    blocks = 1 if model.experts else 2  # attention; and the feed-forward part, unless it is MoE experts
    again = blocks * recomputed(setup, layers)
    if setup.recompute == "selective" and not model.experts:
        again += layers
    forward, backward = blocks * layers + again, blocks * layers
    sums, gathers, scatters = float(stage == 0), 0.0, 0.0  # the embedding
    if sizes.sequence:
        gathers = forward + 2 * backward  # backward gathers the inputs once more, for the gradients of their weights
        scatters = forward + backward
        gathers += (stage == 0) + last  # before the output layer chooses what has a target
        scatters += last
    else:
        sums += forward + backward
    times = replica.micro_batches
    for kind, calls in (("all_reduce", sums), ("all_gather", gathers), ("reduce_scatter", scatters)):
        count = times * calls
        yield Transfer(group="tensor", kind=kind, purpose="hidden states", count=count, bytes=count * hidden)
    if last and not sizes.sequence:
        chosen = replica.targets * model.hidden * setup.width
        yield Transfer(group="tensor", kind="all_reduce", purpose="hidden states", count=times, bytes=times * chosen)
    if last:
        count = 3 * times  # the logits' maximum, the target's logit, the sum of exponentials
        yield Transfer(
            group="tensor", kind="all_reduce", purpose="cross entropy", count=count, bytes=count * 4 * replica.targets
        )
    if sizes.sequence:
        norms, routers = 2 * layers + last, layers if model.experts else 0
        weights = norms * model.hidden + layers * model.experts * model.hidden
        yield Transfer(
            group="tensor", kind="all_reduce", purpose="gradients of norms",
            count=times * (norms + routers), bytes=times * weights * setup.width,
        )  # fmt: skip


def expert_transfers(
    setup: TrainingSetup, layout: ParallelLayout, replica: ReplicaWork, stage: int
) -> Iterator[Transfer]:
    """Yield how tokens go to the ranks that have their MoE experts and back, in forward and backward."""
    model, sizes = setup.model, layout.config
    if not model.experts:
        return
    layers = sizes.stage_layers(model.layers)[stage]
    again = recomputed(setup, layers) if setup.recompute == "full" else layers * (setup.recompute == "selective")
    times = replica.micro_batches * (2 * layers + again)
    copies = replica.positions / sizes.tensor * model.experts_per_token  # of tokens, that one rank sends
    sent = times * copies * model.hidden * setup.width
    if sizes.expert > 1:  # there and back
        yield Transfer(group="expert", kind="all_to_all", purpose="tokens", count=2 * times, bytes=2 * sent)
    if sizes.expert_tensor > 1:
        whole = sent * sizes.expert_tensor
        yield Transfer(group="expert_tensor", kind="all_gather", purpose="tokens", count=times, bytes=whole)
        yield Transfer(group="expert_tensor", kind="reduce_scatter", purpose="tokens", count=times, bytes=whole)


def pipeline_transfers(
    setup: TrainingSetup, layout: ParallelLayout, replica: ReplicaWork, stage: int
) -> Iterator[Transfer]:
    """Yield what a stage sends: hidden states to the next stage, their gradients to the one before."""
    sizes = layout.config
    if sizes.pipeline == 1:
        return
    hidden = replica.positions / (sizes.tensor if sizes.sequence else 1) * setup.model.hidden * setup.width
    is_end = stage in (0, sizes.pipeline - 1)
    edges = (2 * setup.virtual_stages - 1) if is_end else 2 * setup.virtual_stages
    count = replica.micro_batches * edges
    yield Transfer(group="pipeline", kind="send", purpose="hidden states", count=count, bytes=count * hidden)


def reductions(setup: TrainingSetup, layout: ParallelLayout, replica: ReplicaWork, stage: int) -> Iterator[Transfer]:
    """Yield the reduction of gradients over the replicas, and how the updated weights come back to them."""
    weights = rank_weights(setup.model, setup.vision, layout, stage, setup.train)
    times = replica.micro_batches if setup.reduces_each_micro_batch else 1
    for group, number, copies in (
        ("data", weights.shared, layout.data),
        ("expert_data", weights.experts, layout.expert_data),
    ):
        shards = min(setup.shards or copies, copies)
        if copies == 1 or not number:
            continue
        buckets = max(1, ceil(number / BUCKET))
        total = float(times * setup.gradient_bytes * number)
        if shards > 1:
            name = group if shards == copies else f"{group} shards"
            yield Transfer(group=name, kind="reduce_scatter", purpose="gradients", count=times * buckets, bytes=total)
            gathers = 2 * replica.micro_batches if setup.is_sharding_weights else 1
            whole = float(gathers * setup.width * number)
            yield Transfer(group=name, kind="all_gather", purpose="weights", count=gathers, bytes=whole)
        if shards < copies:
            yield Transfer(
                group=f"{group} copies", kind="all_reduce", purpose="gradients", count=1, bytes=total / shards
            )
