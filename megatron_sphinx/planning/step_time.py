"""How long a step takes: what each role computes and communicates, over what its hardware reaches. Arithmetic only.

`flops` and `communication` count; `step_time` turns the counts into seconds. Only hardware's numbers are measured or
fitted, everything here follows from the sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import ceil, log2

from megatron_sphinx.config import RunConfig
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.planning.hardware import Hardware
from megatron_sphinx.planning.memory import EncoderCost, unlike_stages, width_of
from megatron_sphinx.planning.work import Work
from megatron_sphinx.training.memory import REDUCE_BUCKET, rank_weights


@dataclass(frozen=True, kw_only=True)
class Run:
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
    def ours(cls, config: RunConfig, *, is_cuda: bool) -> "Run":
        """As training/deepspeed_engine.py does it."""
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
class Share:
    """A replica's micro-batches: how many, and what is in one on average."""

    micro_batches: int
    positions: float
    attended: float
    targets: float
    views: float
    documents: float

    @classmethod
    def of(cls, work: Work, layout: ParallelLayout, micro_batch_rows: int) -> "Share":
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


def recomputed(run: Run, layers: int) -> float:
    """Forwards of a stage's layers that backward does again, in layers."""
    if run.recompute != "full":
        return 0.0
    return float(min(run.recomputed_layers or layers, layers))


def flops(
    run: Run, layout: ParallelLayout, work: Work, encoders: EncoderCost | None = None
) -> dict[str, dict[str, float]]:
    """FLOPs of a rank of each role in a step, by what they are for.

    Returns:
        For `language stage 0` ... and `encoder`: matrices, attention, logits, projections, recompute, encoders. Matrix
        products and attention only, two FLOPs a multiply-add; attention's backward is counted as 2.5 times its forward.
    """
    found = {}
    share = Share.of(work, layout, run.micro_batch_rows)
    for stage in range(layout.config.pipeline):
        once = _forward(run, layout, share, stage)
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


def _forward(run: Run, layout: ParallelLayout, share: Share, stage: int) -> dict[str, float]:
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


def communication(run: Run, layout: ParallelLayout, work: Work) -> dict[str, list[Transfer]]:
    """What a rank of each role communicates in a step, groups of one rank left out.

    Returns:
        For `language stage 0` ... and `encoder`, in the order in which it first happens.
    """
    share = Share.of(work, layout, run.micro_batch_rows)
    found = {}
    for stage in range(layout.config.pipeline):
        parts = [
            *_features(run, layout, share, stage),
            *_tensor(run, layout, share, stage),
            *_experts(run, layout, share, stage),
            *_pipeline(run, layout, share, stage),
            *_reductions(run, layout, share, stage),
        ]
        found[f"language stage {stage}"] = [part for part in parts if part.bytes]
    if layout.config.encoder and run.vision is not None:
        total = 2.0 * run.vision.feature_values * work.views * work.rows / layout.config.encoder
        messages = share.micro_batches * max(1.0, layout.data / layout.config.encoder)
        sent = Transfer(group="features", kind="send", purpose="features", count=messages, bytes=total)
        found["encoder"] = [sent] if total else []
    return found


def _features(run: Run, layout: ParallelLayout, share: Share, stage: int) -> Iterator[Transfer]:
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


def _tensor(run: Run, layout: ParallelLayout, share: Share, stage: int) -> Iterator[Transfer]:
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


def _experts(run: Run, layout: ParallelLayout, share: Share, stage: int) -> Iterator[Transfer]:
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


def _pipeline(run: Run, layout: ParallelLayout, share: Share, stage: int) -> Iterator[Transfer]:
    """Hidden states to the next stage, their gradients to the one before."""
    sizes = layout.config
    if sizes.pipeline == 1:
        return
    hidden = share.positions / (sizes.tensor if sizes.sequence else 1) * run.model.hidden * run.width
    is_end = stage in (0, sizes.pipeline - 1)
    edges = (2 * run.virtual_stages - 1) if is_end else 2 * run.virtual_stages
    count = share.micro_batches * edges
    yield Transfer(group="pipeline", kind="send", purpose="hidden states", count=count, bytes=count * hidden)


def _reductions(run: Run, layout: ParallelLayout, share: Share, stage: int) -> Iterator[Transfer]:
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


@dataclass(frozen=True)
class Group:
    """Where the ranks of a group are.

    Attributes:
        ranks: of the group.
        in_node: how many of them share a node.
    """

    ranks: int
    in_node: int

    @property
    def nodes(self) -> float:
        """Nodes that the group spans."""
        return self.ranks / self.in_node


def group_of(name: str, layout: ParallelLayout, ranks_per_node: int, shards: int | None = None) -> Group:
    """The ranks of a group, of which neighbours are `stride` apart in the world."""
    sizes = layout.config
    data_shards = min(shards or layout.data, layout.data)
    expert_shards = min(shards or layout.expert_data, layout.expert_data)
    experts = sizes.expert * sizes.expert_tensor
    ranks, stride = {
        "tensor": (sizes.tensor, 1),
        "data": (layout.data, sizes.tensor),
        "data shards": (data_shards, sizes.tensor),
        "data copies": (layout.data // data_shards, sizes.tensor * data_shards),
        "expert": (sizes.expert, sizes.expert_tensor),
        "expert_tensor": (sizes.expert_tensor, 1),
        "expert_data": (layout.expert_data, experts),
        "expert_data shards": (expert_shards, experts),
        "expert_data copies": (layout.expert_data // expert_shards, experts * expert_shards),
        "pipeline": (sizes.pipeline, layout.stage),
        "model": (sizes.tensor * sizes.pipeline, 1 if sizes.pipeline == 1 else layout.stage),
        "features": (layout.world, 1),
    }[name]
    return Group(ranks, max(1, min(ranks, ranks_per_node // stride)))


def seconds_of(transfer: Transfer, group: Group, hardware: Hardware) -> float:
    """Seconds of a transfer alone: rings inside a node, and rings of nodes that use the adapters of all members there.

    Sources: nccl-tests/doc/PERFORMANCE.md for the bytes that each collective moves; a node's members of a group share
    its traffic to other nodes.
    """
    if group.ranks == 1 or not transfer.count:
        return 0.0
    inside = hardware.node_bandwidth * hardware.shares.link
    outside = hardware.network_bandwidth * hardware.shares.link
    here, nodes, ranks = group.in_node, group.nodes, group.ranks
    if transfer.kind == "send":
        moved = transfer.bytes / (inside if here == ranks else outside)
        return moved + transfer.count * hardware.latency_seconds
    if transfer.kind == "all_to_all":
        moved = max(transfer.bytes * (here - 1) / ranks / inside, transfer.bytes * (ranks - here) / ranks / outside)
        return moved + transfer.count * hardware.latency_seconds * log2(ranks)
    twice = 2 if transfer.kind == "all_reduce" else 1
    moved = transfer.bytes * twice * max((here - 1) / here / inside, (nodes - 1) / nodes / (here * outside))
    return moved + transfer.count * twice * hardware.latency_seconds * log2(ranks)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a step, by what takes them; communication only as far as it shows.

    Attributes:
        matrices, attention, elementwise, logits: of the slowest stage, all its micro-batches.
        recompute: of all three, done again.
        kernels: of starting operations, where that shows.
        tensor, experts, pipeline: communication.
        bubble: a stage's waiting for the others.
        reduction, gather: gradients and weights over the replicas.
        optimizer: the update.
        features: encoding on the language ranks, or what encoder ranks are slower by; and spreading features.
        encoder: of an encoder rank, whether it shows or not.
    """

    matrices: float
    attention: float
    elementwise: float
    logits: float
    recompute: float
    kernels: float
    tensor: float
    experts: float
    pipeline: float
    bubble: float
    reduction: float
    gather: float
    optimizer: float
    features: float
    encoder: float

    @property
    def language(self) -> float:
        """Seconds of a step of the language ranks, if they never wait for an encoder rank."""
        names = (field.name for field in fields(self) if field.name not in ("features", "encoder"))
        return float(sum(getattr(self, name) for name in names))

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.language + self.features


def elementwise_bytes(run: Run, sizes: ParallelConfig) -> float:
    """Bytes that the layers' element-wise operations of a forward read and write, for each position.

    Fused: two norms and two residual sums read and write the hidden states, rotary embeddings the queries and keys,
    SwiGLU reads gate and up. fp8: each input of a matrix product is read and written twice, once transposed. What is
    not fused reads and writes in between.
    """
    model, width, tensor = run.model, run.width, sizes.tensor
    copies = model.experts_per_token if model.experts else 1
    part = model.hidden / (tensor if sizes.sequence else 1)
    keys = model.groups * (model.hidden // model.heads)
    norms, residuals = 2 * 2 * part, 2 * 3 * part
    rotary, swiglu = 2 * (model.hidden + keys) / tensor, 3 * copies * model.ffn / tensor
    dispatch = 4 * copies * model.hidden / tensor if model.experts else 0.0  # into the experts' order and back
    if not run.is_fused:
        norms, rotary, swiglu = 2.5 * norms, 3 * rotary, 3 * swiglu
    total = width * (norms + residuals + rotary + swiglu + dispatch)
    if run.precision == "fp8":
        total += 4 * (2 * part + model.hidden / tensor + copies * model.ffn / tensor)
    return total


# Operations started by a layer's forward, by its experts, for each document in it (rotary embeddings, attention), by a
# step, and for each weight that is reduced.
OPERATIONS = {"layer": 60, "experts": 60, "document": 8, "step": 400, "weight": 12}


def step_time(
    run: Run,
    layout: ParallelLayout,
    work: Work,
    hardware: Hardware,
    *,
    ranks_per_node: int,
    encoders: EncoderCost | None = None,
) -> Timing:
    """Seconds of a step.

    The slowest stage works through all its micro-batches; the other stages' part of one micro-batch is the bubble.
    """
    share = Share.of(work, layout, run.micro_batch_rows)
    counts = unlike_stages(layout, run.model.layers)
    stages = {stage: _stage(run, layout, share, stage, hardware, ranks_per_node) for stage in counts}
    totals = {stage: sum(parts.values()) for stage, parts in stages.items()}
    slowest = max(totals, key=lambda stage: totals[stage])
    m = share.micro_batches
    parts = {name: m * value for name, value in stages[slowest].items()}
    everyone = sum(counts[stage] * total for stage, total in totals.items())
    bubble = (everyone - totals[slowest]) / run.virtual_stages
    backward = totals[slowest] * 2 / 3
    exposed = _exposed(run, layout, share, slowest, hardware, ranks_per_node, backward)
    language = sum(parts.values()) + bubble + sum(exposed.values())
    features, encoder = _encoding(run, layout, work, share, hardware, ranks_per_node, encoders, language)
    return Timing(**parts, **exposed, bubble=bubble, features=features, encoder=encoder)


def _stage(
    run: Run, layout: ParallelLayout, share: Share, stage: int, hardware: Hardware, ranks_per_node: int
) -> dict[str, float]:
    """Seconds of one micro-batch on a stage, forward and backward."""
    model, sizes = run.model, layout.config
    layers = sizes.stage_layers(model.layers)[stage]
    once = _forward(run, layout, share, stage)
    matmul, attend = hardware.matmul_flops(run.precision), hardware.attention_flops(run.precision)
    plain = hardware.matmul_flops("bf16" if run.precision == "fp8" else run.precision)  # of logits and projections
    memory = hardware.memory_bandwidth * hardware.shares.memory
    elementwise = share.positions * elementwise_bytes(run, sizes) * layers / memory
    matrices, attention = once["matrices"] / matmul, once["attention"] / attend
    backward = 1.0 if run.train == "projections" else 2.0
    again = recomputed(run, layers) / layers * (matrices + attention + elementwise)
    if run.recompute == "selective":
        again = once["again"] / matmul
    logits = once["logits"] * (1 + backward) / plain
    if once["logits"]:
        logits += 5 * share.targets * model.padded_vocabulary / sizes.tensor * (4 + run.width) / memory
    one = replace(share, micro_batches=1)
    wire = {"tensor": 0.0, "experts": 0.0, "pipeline": 0.0}
    for name, transfers in (
        ("tensor", _tensor(run, layout, one, stage)),
        ("experts", _experts(run, layout, one, stage)),
        ("pipeline", _pipeline(run, layout, one, stage)),
    ):
        for transfer in transfers:
            wire[name] += seconds_of(transfer, group_of(transfer.group, layout, ranks_per_node), hardware)
    if run.is_tensor_overlapped:
        wire["tensor"] = max(0.0, wire["tensor"] - (1 + backward) * matrices)
    if run.virtual_stages > 1:
        wire["pipeline"] = max(0.0, wire["pipeline"] - (1 + backward) * matrices)
    operations = float(layers) * (OPERATIONS["layer"] + (OPERATIONS["experts"] if model.experts else 0))
    operations += layers * OPERATIONS["document"] * share.documents
    return {
        "matrices": (1 + backward) * matrices + 3 * once["projections"] / plain,
        "attention": (1 + 2.5) * attention,
        "elementwise": (1 + backward) * elementwise,
        "logits": logits,
        "recompute": again,
        "kernels": hardware.kernel_seconds * (3 * operations + recomputed(run, layers) * OPERATIONS["layer"]),
        **wire,
    }


def _exposed(
    run: Run,
    layout: ParallelLayout,
    share: Share,
    stage: int,
    hardware: Hardware,
    ranks_per_node: int,
    backward_seconds: float,
) -> dict[str, float]:
    """Seconds of gradients' reduction, weights' gather and update, as far as they show."""
    found = {"reduction": 0.0, "gather": 0.0}
    for transfer in _reductions(run, layout, share, stage):
        group = group_of(transfer.group, layout, ranks_per_node, run.shards)
        found["reduction" if transfer.purpose == "gradients" else "gather"] += seconds_of(transfer, group, hardware)
    times = share.micro_batches if run.reduces_each_micro_batch else 1
    if run.is_reduction_overlapped:
        found["reduction"] = max(0.0, found["reduction"] - times * backward_seconds)
    if run.is_gather_overlapped:
        hidden = backward_seconds / 2 * (3 * share.micro_batches if run.is_sharding_weights else 1)
        found["gather"] = max(0.0, found["gather"] - hidden)
    weights = rank_weights(run.model, run.vision, layout, stage, run.train)
    partition = weights.shared / min(run.shards or layout.data, layout.data)
    partition += weights.experts / min(run.shards or layout.expert_data, layout.expert_data)
    memory = hardware.memory_bandwidth * hardware.shares.memory
    passes = 1 if hardware.is_cuda else 3  # a fused AdamW, or one operation after the other
    tensors = layout.config.stage_layers(run.model.layers)[stage] * 6 + 3
    operations = OPERATIONS["step"] + times * tensors * OPERATIONS["weight"]
    update = passes * partition * (4 + 2 * 12 + 2 * run.width) / memory
    return found | {"optimizer": update + hardware.kernel_seconds * operations}


def _encoding(
    run: Run,
    layout: ParallelLayout,
    work: Work,
    share: Share,
    hardware: Hardware,
    ranks_per_node: int,
    encoders: EncoderCost | None,
    language: float,
) -> tuple[float, float]:
    """Seconds that features show, and seconds of an encoder rank."""
    if run.vision is None or encoders is None:
        return 0.0, 0.0
    sizes = layout.config
    rate = hardware.encoder_flops
    spread = sum(
        seconds_of(transfer, group_of(transfer.group, layout, ranks_per_node), hardware)
        for transfer in _features(run, layout, share, 0)
    )
    if not sizes.encoder:
        views = share.views * share.micro_batches / (sizes.tensor * sizes.pipeline)
        return views * encoders.flops / rate + spread, 0.0
    seconds = work.views * work.rows * encoders.flops / sizes.encoder / rate
    sent = communication(run, layout, work)["encoder"]
    seconds += sum(seconds_of(transfer, group_of("features", layout, ranks_per_node), hardware) for transfer in sent)
    return max(0.0, seconds - language) + spread, seconds


def tokens_per_second(work: Work, timing: Timing) -> float:
    """Positions of a step over its seconds."""
    return work.rows * work.positions / timing.total
