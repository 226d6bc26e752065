"""How long a step takes: what counts.py counts, over what the hardware reaches. Arithmetic only.

Only the numbers of the hardware are measured or fitted; everything here follows from the sizes.
"""

from dataclasses import dataclass, fields, replace
from math import ceil, log2

from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing.counts import (
    ReplicaWork,
    TrainingSetup,
    Transfer,
    communication,
    expert_transfers,
    feature_transfers,
    forward_flops,
    pipeline_transfers,
    recomputed,
    reductions,
    tensor_transfers,
)
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.sizing.memory import EncoderCost, unlike_stages
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.stage.dealing import joined
from megatron_sphinx.training.memory import rank_weights


@dataclass(frozen=True)
class GroupPlacement:
    """How the ranks of a process group lie on the nodes of the job.

    Attributes:
        ranks: how many are in the group.
        ranks_of_node: how many of them share a node.
    """

    ranks: int
    ranks_of_node: int

    @property
    def nodes(self) -> float:
        """How many nodes the group spans."""
        return self.ranks / self.ranks_of_node


def placement_of(name: str, layout: ParallelLayout, ranks_per_node: int, shards: int | None = None) -> GroupPlacement:
    """Find how the ranks of a group lie on nodes, from the distance (stride) of neighbours' numbers in the world.

    Args:
        name: the group, as `Transfer.group` names it.
        layout: how the job is divided.
        ranks_per_node: ranks of the job on each node.
        shards: ranks that gradients and optimizer are partitioned over; None for all replicas.
    """
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
    return GroupPlacement(ranks, max(1, min(ranks, ranks_per_node // stride)))


def seconds_of(transfer: Transfer, group: GroupPlacement, hardware: Hardware) -> float:
    """Seconds of a transfer that nothing hides: a ring inside each node, and rings over the nodes.

    Sources: nccl-tests/doc/PERFORMANCE.md for the bytes that each collective moves; a node's members of a group share
    its traffic to other nodes.
    """
    if group.ranks == 1 or not transfer.count:
        return 0.0
    inside = hardware.node_bandwidth * hardware.shares.link
    outside = hardware.network_bandwidth * hardware.shares.link
    local, nodes, ranks = group.ranks_of_node, group.nodes, group.ranks
    if transfer.kind == "send":
        moving = transfer.bytes / (inside if local == ranks else outside)
        return moving + transfer.count * hardware.latency_seconds
    if transfer.kind == "all_to_all":
        moving = max(transfer.bytes * (local - 1) / ranks / inside, transfer.bytes * (ranks - local) / ranks / outside)
        return moving + transfer.count * hardware.latency_seconds * log2(ranks)
    passes = 2 if transfer.kind == "all_reduce" else 1  # a reduce-scatter, then an all-gather
    moving = transfer.bytes * passes * max((local - 1) / local / inside, (nodes - 1) / nodes / (local * outside))
    return moving + transfer.count * passes * hardware.latency_seconds * log2(ranks)


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of a step by what takes them, of communication only what no computation hides.

    Attributes:
        matrices, attention, elementwise, logits: computation of the slowest stage, all its micro-batches.
        recompute: what backward computes of it again.
        kernels: starting operations, where the device waits for it.
        tensor, experts, pipeline: communication of tensor ranks, of tokens to their experts, between stages.
        bubble: a stage's waiting for the others.
        reduction, gather: gradients and weights over the replicas.
        optimizer: the update of the weights.
        features: encoding on the language ranks, or what encoder ranks are slower by; and spreading features.
        encoder: a step of an encoder rank, whether anybody waits for it or not.
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


def elementwise_bytes(setup: TrainingSetup, sizes: ParallelConfig) -> float:
    """Bytes that the element-wise operations of one layer's forward read and write, for each position of a replica.

    Fused: two norms and two residual sums read and write the hidden states, rotary embeddings the queries and keys,
    SwiGLU reads gate and up. fp8: each input of a matrix product is read and written twice, once transposed. What is
    not fused reads and writes in between.
    """
    model, width, tensor = setup.model, setup.width, sizes.tensor
    copies = model.experts_per_token if model.experts else 1
    own_hidden = model.hidden / (tensor if sizes.sequence else 1)
    keys = model.groups * (model.hidden // model.heads)
    norms, residuals = 2 * 2 * own_hidden, 2 * 3 * own_hidden
    rotary, swiglu = 2 * (model.hidden + keys) / tensor, 3 * copies * model.ffn / tensor
    dispatch = 4 * copies * model.hidden / tensor if model.experts else 0.0  # into the experts' order and back
    if not setup.is_fused:
        norms, rotary, swiglu = 2.5 * norms, 3 * rotary, 3 * swiglu
    total = width * (norms + residuals + rotary + swiglu + dispatch)
    if setup.precision == "fp8":
        total += 4 * (2 * own_hidden + model.hidden / tensor + copies * model.ffn / tensor)
    return total


# Operations started by a layer's forward, by its experts, for each document in it (rotary embeddings, attention), by a
# step, and for each weight that is reduced.
OPERATIONS = {"layer": 60, "experts": 60, "document": 8, "step": 400, "weight": 12}


def step_time(
    setup: TrainingSetup,
    layout: ParallelLayout,
    work: Work,
    hardware: Hardware,
    *,
    ranks_per_node: int,
    encoders: EncoderCost | None = None,
) -> StepSeconds:
    """Predict the seconds of a step.

    The slowest stage works through all its micro-batches; the other stages' part of one micro-batch is the bubble.

    Args:
        setup: the model, and how the software goes about a step.
        layout: how the job is divided.
        work: the rows of a step.
        hardware: of each rank.
        ranks_per_node: ranks of the job on each node.
        encoders: what it takes to encode; None for a model of text.
    """
    replica = ReplicaWork.busiest(work, layout, setup.micro_batch_rows)
    counts = unlike_stages(layout, setup.model.layers)
    ranks = _RanksOnNodes(layout, hardware, ranks_per_node)
    stages = {stage: _stage(setup, replica, stage, ranks) for stage in counts}
    totals = {stage: sum(parts.values()) for stage, parts in stages.items()}
    slowest = max(totals, key=lambda stage: totals[stage])
    parts = {name: replica.micro_batches * value for name, value in stages[slowest].items()}
    all_stages = sum(counts[stage] * total for stage, total in totals.items())
    bubble = (all_stages - totals[slowest]) / setup.virtual_stages
    backward = totals[slowest] * 2 / 3
    exposed = _exposed(setup, replica, slowest, ranks, backward)
    language = sum(parts.values()) + bubble + sum(exposed.values())
    features, encoder = _encoding(setup, work, replica, ranks, encoders, language)
    return StepSeconds(**parts, **exposed, bubble=bubble, features=features, encoder=encoder)


@dataclass(frozen=True)
class _RanksOnNodes:
    """A job's ranks on the nodes that they share.

    Attributes:
        layout: how the job is divided.
        hardware: hardware of each rank.
        per_node: ranks of the job on each node.
    """

    layout: ParallelLayout
    hardware: Hardware
    per_node: int

    def seconds_of(self, transfer: Transfer, shards: int | None = None) -> float:
        """Predict the seconds of a transfer in its group, or among the first `shards` ranks of it."""
        return seconds_of(transfer, placement_of(transfer.group, self.layout, self.per_node, shards), self.hardware)


def _stage(setup: TrainingSetup, replica: ReplicaWork, stage: int, ranks: _RanksOnNodes) -> dict[str, float]:
    """Seconds of one micro-batch on a stage, forward and backward, by what takes them."""
    model, layout, hardware, sizes = setup.model, ranks.layout, ranks.hardware, ranks.layout.config
    layers = sizes.stage_layers(model.layers)[stage]
    once = forward_flops(setup, layout, replica, stage)
    matmul, attend = hardware.matmul_flops(setup.precision), hardware.attention_flops(setup.precision)
    plain = hardware.matmul_flops("bf16" if setup.precision == "fp8" else setup.precision)  # of logits and projections
    memory = hardware.memory_bandwidth * hardware.shares.memory
    elementwise = replica.positions * elementwise_bytes(setup, sizes) * layers / memory
    matrices, attention = once["matrices"] / matmul, once["attention"] / attend
    backward = 1.0 if setup.train == "projections" else 2.0
    again = recomputed(setup, layers) / layers * (matrices + attention + elementwise)
    if setup.recompute == "selective":
        again = once["again"] / matmul
    logits = once["logits"] * (1 + backward) / plain
    if once["logits"]:
        logits += 5 * replica.targets * model.padded_vocabulary / sizes.tensor * (4 + setup.width) / memory
    one_micro_batch = replace(replica, micro_batches=1)
    wire = {"tensor": 0.0, "experts": 0.0, "pipeline": 0.0}
    for name, transfers in (
        ("tensor", tensor_transfers(setup, layout, one_micro_batch, stage)),
        ("experts", expert_transfers(setup, layout, one_micro_batch, stage)),
        ("pipeline", pipeline_transfers(setup, layout, one_micro_batch, stage)),
    ):
        for transfer in transfers:
            wire[name] += ranks.seconds_of(transfer)
    if setup.is_tensor_overlapped:
        wire["tensor"] = max(0.0, wire["tensor"] - (1 + backward) * matrices)
    if setup.virtual_stages > 1:
        wire["pipeline"] = max(0.0, wire["pipeline"] - (1 + backward) * matrices)
    operations = float(layers) * (OPERATIONS["layer"] + (OPERATIONS["experts"] if model.experts else 0))
    operations += layers * OPERATIONS["document"] * replica.documents
    return {
        "matrices": (1 + backward) * matrices + 3 * once["projections"] / plain,
        "attention": (1 + 2.5) * attention,
        "elementwise": (1 + backward) * elementwise,
        "logits": logits,
        "recompute": again,
        "kernels": hardware.kernel_seconds * (3 * operations + recomputed(setup, layers) * OPERATIONS["layer"]),
        **wire,
    }


def _exposed(
    setup: TrainingSetup, replica: ReplicaWork, stage: int, ranks: _RanksOnNodes, backward_seconds: float
) -> dict[str, float]:
    """Seconds of the gradients' reduction, the weights' gather and the update that no computation hides."""
    layout, hardware = ranks.layout, ranks.hardware
    seconds = {"reduction": 0.0, "gather": 0.0}
    for transfer in reductions(setup, layout, replica, stage):
        name = "reduction" if transfer.purpose == "gradients" else "gather"
        seconds[name] += ranks.seconds_of(transfer, setup.shards)
    times = replica.micro_batches if setup.reduces_each_micro_batch else 1
    if setup.is_reduction_overlapped:
        seconds["reduction"] = max(0.0, seconds["reduction"] - times * backward_seconds)
    if setup.is_gather_overlapped:
        hidden = backward_seconds / 2 * (3 * replica.micro_batches if setup.is_sharding_weights else 1)
        seconds["gather"] = max(0.0, seconds["gather"] - hidden)
    weights = rank_weights(setup.model, setup.vision, layout, stage, setup.train)
    partition = weights.shared / min(setup.shards or layout.data, layout.data)
    partition += weights.experts / min(setup.shards or layout.expert_data, layout.expert_data)
    memory = hardware.memory_bandwidth * hardware.shares.memory
    passes = 1 if hardware.is_cuda else 3  # a fused AdamW, or one operation after the other
    tensors = layout.config.stage_layers(setup.model.layers)[stage] * 6 + 3
    operations = OPERATIONS["step"] + times * tensors * OPERATIONS["weight"]
    update = passes * partition * (4 + 2 * 12 + 2 * setup.width) / memory
    return seconds | {"optimizer": update + hardware.kernel_seconds * operations}


def view_seconds(vision: VisionConfig, encoders: EncoderCost, hardware: Hardware) -> float:
    """Seconds to encode one view of a full batch, one visual expert after the other."""
    precision = hardware.encoder_precision(vision.precision)
    return sum(
        flops / hardware.encoder_flops(precision, family, vision.views_at_once) for family, flops in encoders.families
    )


def full_batches(views: float, size: int, ahead: int) -> float:
    """Return how many views are encoded for a micro-batch of so many: batches are filled up, with zeros.

    Args:
        views: of the micro-batch.
        size: of a batch.
        ahead: how many micro-batches can be encoded together.
    """
    together = joined([views] * ahead, size)
    return ceil(together * views / size - 1e-9) * size / together


def _encoding(
    setup: TrainingSetup,
    work: Work,
    replica: ReplicaWork,
    ranks: _RanksOnNodes,
    encoders: EncoderCost | None,
    language: float,
) -> tuple[float, float]:
    """Seconds of a step that language ranks give to features, and seconds that an encoder rank takes for a step."""
    if setup.vision is None or encoders is None:
        return 0.0, 0.0
    layout, sizes = ranks.layout, ranks.layout.config
    of_view, lookahead = view_seconds(setup.vision, encoders, ranks.hardware), setup.lookahead
    spread = sum(map(ranks.seconds_of, feature_transfers(setup, layout, replica, 0)))
    if not sizes.encoder:
        views = full_batches(replica.views / (sizes.tensor * sizes.pipeline), setup.vision.views_at_once, lookahead)
        return replica.micro_batches * views * of_view + spread, 0.0
    views = full_batches(replica.views * layout.data / sizes.encoder, setup.vision.views_at_once, lookahead)
    seconds = replica.micro_batches * views * of_view
    seconds += sum(map(ranks.seconds_of, communication(setup, layout, work)["encoder"]))
    return max(0.0, seconds - language) + spread, seconds


def tokens_per_second(work: Work, seconds: StepSeconds) -> float:
    """Positions of a step, of the whole job, over its seconds."""
    return work.rows * work.positions / seconds.total
