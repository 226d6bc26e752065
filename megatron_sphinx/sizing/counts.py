"""What a rank of each role computes and communicates in a step: FLOPs and bytes. Arithmetic only, from the sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from megatron_sphinx.config import Config
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing.memory import EncoderCost, width_of
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.memory import REDUCE_BUCKET, rank_weights


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training run, ours or a published one: the model, and how the software goes about it.

    Attributes:
        model: the language model.
        vision: its eyes; None for a model of text.
        precision: of matrix products: bf16, fp8 or fp32.
        recompute: what backward computes again: none, selective (feed-forward layers) or full.
        recomputed_layers: of full: layers of each stage; None for all.
        micro_batch_rows: most rows that a replica computes at once.
        train: what is trained: all, projections or language.
        lookahead: whether encoder ranks work ahead, so that only what they are slower by shows.
        virtual_stages: parts of the model on each pipeline stage. Several hide what stages send each other behind their
            work, one does not.
        gradient_bytes: of a number when gradients are summed over replicas.
        reduces_each_micro_batch: or once a step.
        is_partitioned_reduction: a reduce-scatter; or an all-reduce, as DeepSpeed's buckets do it.
        is_reduction_overlapped: with backward.
        is_gather_overlapped: the weights' all-gather, with the next forward.
        is_tensor_overlapped: tensor-parallel communication with matrix products.
        shards: ranks that gradients and optimizer are partitioned over; None for all replicas. The shards' sums are
            then added over the other replicas.
        is_sharding_weights: weights too are partitioned, and gathered for each forward and backward (ZeRO-3, FSDP).
        is_fused: norms, SwiGLU and rotary embeddings are one kernel each.
    """

    model: LanguageConfig
    vision: VisionConfig | None = None
    precision: str = "bf16"
    recompute: str = "none"
    recomputed_layers: int | None = None
    micro_batch_rows: int = 1
    train: str = "all"
    lookahead: int = 4
    virtual_stages: int = 1
    gradient_bytes: int = 4
    reduces_each_micro_batch: bool = False
    is_partitioned_reduction: bool = True
    is_reduction_overlapped: bool = True
    is_gather_overlapped: bool = True
    is_tensor_overlapped: bool = False
    shards: int | None = None
    is_sharding_weights: bool = False
    is_fused: bool = True

    @classmethod
    def ours(cls, config: Config, *, is_cuda: bool) -> "TrainingSetup":
        """As training/engine.py does it."""
        training = config.training
        return cls(
            model=config.model,
            vision=config.vision,
            precision=training.precision,
            recompute=training.activation_checkpointing,
            recomputed_layers=training.checkpointed_layers,
            micro_batch_rows=config.data.micro_batch_rows,
            train=training.train,
            lookahead=config.stage.lookahead,
            reduces_each_micro_batch=config.parallel.pipeline == 1,
            is_partitioned_reduction=False,
            is_reduction_overlapped=is_cuda and config.parallel.pipeline == 1,
            is_gather_overlapped=False,
            is_fused=False,
        )

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return width_of(self.precision)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of communication of a rank in a step.

    Attributes:
        group: tensor, data, expert, expert_tensor, expert_data, pipeline, model or features.
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, send or broadcast.
        purpose: what for, in a word or two.
        count: calls in a step.
        bytes: of all calls together: of what is summed, of what is gathered, of what is sent.
    """

    group: str
    kind: str
    purpose: str
    count: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class ReplicaWork:
    """A replica's micro-batches: how many, and what is in one on average."""

    micro_batches: int
    positions: float
    attended: float
    targets: float
    views: float
    documents: float

    @classmethod
    def of(cls, work: Work, layout: ParallelLayout, micro_batch_rows: int) -> "ReplicaWork":
        """Of the replica that has most rows."""
        mine = -(-work.rows // layout.data)
        count = -(-mine // micro_batch_rows)
        rows = mine / count
        return cls(
            micro_batches=count,
            positions=rows * work.positions,
            attended=rows * work.attended,
            targets=rows * work.targets,
            views=rows * work.views,
            documents=rows * work.documents,
        )


def recomputed(run: TrainingSetup, layers: int) -> float:
    """Forwards of a stage's layers that backward does again, in layers."""
    if run.recompute != "full":
        return 0.0
    return float(min(run.recomputed_layers or layers, layers))


def flops(
    run: TrainingSetup, layout: ParallelLayout, work: Work, encoders: EncoderCost | None = None
) -> dict[str, dict[str, float]]:
    """FLOPs of a rank of each role in a step, by what they are for.

    Returns:
        For `language stage 0` ... and `encoder`: matrices, attention, logits, projections, recompute, encoders. Matrix
        products and attention only, two FLOPs a multiply-add; attention's backward is counted as 2.5 times its forward.
    """
    found = {}
    share = ReplicaWork.of(work, layout, run.micro_batch_rows)
    for stage in range(layout.config.pipeline):
        once = forward_flops(run, layout, share, stage)
        backward = 1.0 if run.train == "projections" else 2.0
        again = once["again"]
        parts = {
            "matrices": (1 + backward) * once["matrices"],
            "attention": (1 + 2.5) * once["attention"],
            "logits": (1 + backward) * once["logits"],
            "projections": 2 * once["projections"] if run.train != "language" else once["projections"],
            "recompute": again,
            "encoders": 0.0,
        }
        if encoders is not None and not layout.config.encoder:
            parts["encoders"] = encoders.flops * share.views / (layout.config.tensor * layout.config.pipeline)
        found[f"language stage {stage}"] = {name: share.micro_batches * value for name, value in parts.items()}
    if layout.config.encoder and encoders is not None:
        found["encoder"] = {"encoders": encoders.flops * work.views * work.rows / layout.config.encoder}
    return found


def forward_flops(run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int) -> dict[str, float]:
    """FLOPs of one micro-batch's forward on a stage; `again` is what backward does of it once more."""
    model, sizes = run.model, layout.config
    layers = sizes.stage_layers(model.layers)[stage]
    matrices = 2 * share.positions * layers * model.active_matrices / sizes.tensor
    attention = 4 * model.hidden * share.attended * layers / sizes.tensor
    feed_forward = 2 * share.positions * model.expert_matrices * (model.experts_per_token if model.experts else 1)
    again = (matrices + attention) / layers * recomputed(run, layers)
    if run.recompute == "selective":
        again = feed_forward * layers / sizes.tensor
    vision = run.vision
    projected = 0.0
    if vision is not None and stage == 0:
        projected = vision.mixed_tokens * vision.channels
        projected += vision.qformer.queries * vision.qformer.channels if vision.qformer else 0
    return {
        "matrices": matrices,
        "attention": attention,
        "logits": 2 * share.targets * model.padded_vocabulary * model.hidden / sizes.tensor
        if stage == sizes.pipeline - 1
        else 0.0,
        "projections": 2 * share.views * projected * model.hidden,
        "again": again,
    }


def communication(run: TrainingSetup, layout: ParallelLayout, work: Work) -> dict[str, list[Transfer]]:
    """What a rank of each role communicates in a step, groups of one rank left out.

    Returns:
        For `language stage 0` ... and `encoder`, in the order in which it first happens.
    """
    share = ReplicaWork.of(work, layout, run.micro_batch_rows)
    found = {}
    for stage in range(layout.config.pipeline):
        parts = [
            *feature_transfers(run, layout, share, stage),
            *tensor_transfers(run, layout, share, stage),
            *expert_transfers(run, layout, share, stage),
            *pipeline_transfers(run, layout, share, stage),
            *reductions(run, layout, share, stage),
        ]
        found[f"language stage {stage}"] = [part for part in parts if part.bytes]
    if layout.config.encoder and run.vision is not None:
        total = 2.0 * run.vision.feature_values * work.views * work.rows / layout.config.encoder
        messages = share.micro_batches * max(1.0, layout.data / layout.config.encoder)
        sent = Transfer(group="features", kind="send", purpose="features", count=messages, bytes=total)
        found["encoder"] = [sent] if total else []
    return found


def feature_transfers(run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int) -> Iterator[Transfer]:
    """Spreading of features inside a replica: over its tensor group, or over all its ranks where they encode."""
    sizes = layout.config
    if run.vision is None:
        return
    total = 2.0 * run.vision.feature_values * share.views * share.micro_batches
    if sizes.encoder and stage == 0 and sizes.tensor > 1:
        yield Transfer(group="tensor", kind="broadcast", purpose="features", count=share.micro_batches, bytes=total)
    elif not sizes.encoder and (ranks := sizes.tensor * sizes.pipeline) > 1:
        yield Transfer(
            group="model", kind="broadcast", purpose="features", count=ranks * share.micro_batches, bytes=total
        )


def tensor_transfers(run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int) -> Iterator[Transfer]:
    """Sums and gathers of hidden states over the tensor group, as megatron-core's linear layers do them."""
    model, sizes = run.model, layout.config
    if sizes.tensor == 1:
        return
    layers, last = sizes.stage_layers(model.layers)[stage], stage == sizes.pipeline - 1
    hidden = share.positions * model.hidden * run.width
    blocks = 1 if model.experts else 2  # of attention, and of a feed-forward layer that is not experts
    again = recomputed(run, layers)
    both = blocks * layers + blocks * again + (layers if run.recompute == "selective" and not model.experts else 0)
    backward = blocks * layers
    sums, gathers, scatters = float(stage == 0), 0.0, 0.0  # the embedding
    if sizes.sequence:
        gathers, scatters = both + 2 * backward, both + backward  # the inputs are gathered once more for their weights
        gathers += (stage == 0) + last  # before the output layer chooses what has a target
        scatters += last
    else:
        sums += both + backward
    m = share.micro_batches
    for kind, count in (("all_reduce", sums), ("all_gather", gathers), ("reduce_scatter", scatters)):
        yield Transfer(group="tensor", kind=kind, purpose="hidden states", count=m * count, bytes=m * count * hidden)
    if last and not sizes.sequence:
        chosen = share.targets * model.hidden * run.width
        yield Transfer(group="tensor", kind="all_reduce", purpose="hidden states", count=m, bytes=m * chosen)
    if last:
        small = 3 * m
        yield Transfer(
            group="tensor", kind="all_reduce", purpose="cross entropy", count=small, bytes=small * 4 * share.targets
        )
    if sizes.sequence:
        vectors = 2 * layers + last
        weights = vectors * model.hidden + layers * model.experts * model.hidden
        yield Transfer(
            group="tensor", kind="all_reduce", purpose="gradients of norms",
            count=m * (vectors + (layers if model.experts else 0)), bytes=m * weights * run.width,
        )  # fmt: skip


def expert_transfers(run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int) -> Iterator[Transfer]:
    """Tokens to the ranks that have their experts and back, in forward and backward."""
    model, sizes = run.model, layout.config
    if not model.experts:
        return
    layers = sizes.stage_layers(model.layers)[stage]
    again = recomputed(run, layers) if run.recompute == "full" else layers * (run.recompute == "selective")
    times = 2 * layers + again
    local = share.positions / sizes.tensor * model.experts_per_token
    m = share.micro_batches
    tokens = m * times * local * model.hidden * run.width
    if sizes.expert > 1:
        yield Transfer(group="expert", kind="all_to_all", purpose="tokens", count=2 * m * times, bytes=2 * tokens)
    if sizes.expert_tensor > 1:
        whole = tokens * sizes.expert_tensor
        yield Transfer(group="expert_tensor", kind="all_gather", purpose="tokens", count=m * times, bytes=whole)
        yield Transfer(group="expert_tensor", kind="reduce_scatter", purpose="tokens", count=m * times, bytes=whole)


def pipeline_transfers(
    run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int
) -> Iterator[Transfer]:
    """Hidden states to the next stage, their gradients to the one before."""
    sizes = layout.config
    if sizes.pipeline == 1:
        return
    hidden = share.positions / (sizes.tensor if sizes.sequence else 1) * run.model.hidden * run.width
    is_end = stage in (0, sizes.pipeline - 1)
    edges = (2 * run.virtual_stages - 1) if is_end else 2 * run.virtual_stages
    count = share.micro_batches * edges
    yield Transfer(group="pipeline", kind="send", purpose="hidden states", count=count, bytes=count * hidden)


def reductions(run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int) -> Iterator[Transfer]:
    """Gradients over the replicas, and the updated weights back to them."""
    weights = rank_weights(run.model, run.vision, layout, stage, run.train)
    times = share.micro_batches if run.reduces_each_micro_batch else 1
    for group, number, copies in (
        ("data", weights.shared, layout.data),
        ("expert_data", weights.experts, layout.expert_data),
    ):
        shards = min(run.shards or copies, copies)
        if copies == 1 or not number:
            continue
        buckets = max(1, ceil(number / REDUCE_BUCKET))
        kind = "reduce_scatter" if run.is_partitioned_reduction else "all_reduce"
        total = float(times * run.gradient_bytes * number)
        if shards > 1:
            name = group if shards == copies else f"{group} shards"
            yield Transfer(group=name, kind=kind, purpose="gradients", count=times * buckets, bytes=total)
            gathers = 2 * share.micro_batches if run.is_sharding_weights else 1
            whole = float(gathers * run.width * number)
            yield Transfer(group=name, kind="all_gather", purpose="weights", count=gathers, bytes=whole)
        if shards < copies:
            yield Transfer(
                group=f"{group} copies", kind="all_reduce", purpose="gradients", count=1, bytes=total / shards
            )
